"""The built-in page in a real browser: type, stream, stop, reload; by keyboard alone, without an error."""

import json
import re
import shutil

import pytest
from playwright.sync_api import expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
    pytest.mark.xdist_group("gateway"),
]


@pytest.fixture(scope="module")
def page(up):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.trouble = []
        page.on("console", lambda message: page.trouble.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.trouble.append(str(error)))
        page.goto(up.url)
        yield page
        assert page.trouble == []
        browser.close()


def answers(page) -> list[str]:
    return page.locator(".message.assistant").all_text_contents()


def test_type_and_read_an_answer_as_it_is_written(page):
    expect(page.locator("#model")).to_have_text("smollm2-135m")
    # The caret is in the box already: nothing needs the mouse.
    page.keyboard.type("What is the capital of France?")
    page.keyboard.press("Enter")
    expect(page.locator(".message.assistant")).not_to_have_text("", timeout=60_000)
    expect(page.locator("#stop")).to_be_disabled(timeout=60_000)
    assert len(answers(page)) == 1
    assert "tokens/s" in page.locator("#rate").text_content()


def test_the_swarm_is_drawn(page):
    expect(page.locator("#peers tr")).to_have_count(3, timeout=20_000)
    expect(page.locator("#ring circle")).to_have_count(3)
    assert "0:19" in page.locator("#peers").text_content()


def test_stop_with_the_escape_key_keeps_what_was_written(page):
    number = len(answers(page))
    page.keyboard.type("Write a very long story about the sea, with many chapters.")
    page.keyboard.press("Enter")
    answer = page.locator(".message.assistant").nth(number)
    expect(answer).to_have_text(re.compile(".{20}", re.DOTALL), timeout=60_000)
    page.keyboard.press("Escape")
    expect(page.locator("#stop")).to_be_disabled(timeout=5_000)
    written = answers(page)[number]
    page.wait_for_timeout(500)
    assert answers(page)[number] == written
    # A second line in the box needs shift.
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.locator("#text").input_value() == "one\ntwo"
    page.locator("#text").fill("")


def test_a_reload_keeps_the_conversation_and_a_new_chat_ends_it(page):
    page.keyboard.type("Say yes.")
    page.keyboard.press("Enter")
    expect(page.locator("#stop")).to_be_enabled(timeout=10_000)
    expect(page.locator("#stop")).to_be_disabled(timeout=60_000)
    before = answers(page)
    assert before[-1]
    page.reload()
    expect(page.locator(".message.assistant")).to_have_count(len(before))
    assert answers(page) == before
    # Everything can be reached by the tabulator.
    reached = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        focused = page.locator(":focus")
        reached.add(focused.get_attribute("id") if focused.count() else None)
    assert {"send", "fresh", "key", "log"} <= reached
    page.locator("#fresh").focus()
    page.keyboard.press("Enter")
    assert answers(page) == []


def test_the_sampling_and_the_form_that_are_chosen_are_asked_for(page):
    number = len(answers(page))
    page.fill("#temperature", "0")
    page.fill("#seed", "7")
    page.check("#json")
    page.focus("#text")
    with page.expect_request("**/v1/chat/completions") as asked:
        page.keyboard.type("Describe a cat.")
        page.keyboard.press("Enter")
    body = json.loads(asked.value.post_data)
    assert (body["temperature"], body["seed"], body["response_format"]) == (0, 7, {"type": "json_object"})
    answer = page.locator(".message.assistant").nth(number)
    expect(answer).to_have_text(re.compile(r"^\s*\{"), timeout=60_000)
    page.keyboard.press("Escape")
    expect(page.locator("#stop")).to_be_disabled(timeout=5_000)
    for name in ("#temperature", "#seed"):
        page.fill(name, "")
    page.uncheck("#json")


def test_what_the_model_thought_is_folded_away(page):
    page.evaluate("""() => {
        const line = show("assistant", ""); const said = document.createElement("span"); line.append(said);
        think(line, "hm, "); think(line, "yes"); said.textContent = "Yes.";
    }""")
    line = page.locator(".message.assistant").last
    assert line.locator("details span").text_content() == "hm, yes"
    assert not line.locator("details span").is_visible()
    line.locator("summary").click()
    assert line.locator("details span").is_visible()
