"""What the documents say is so: their commands run, their links lead somewhere, their references are made from the code."""

import json
import re
import shlex
from pathlib import Path

import pytest

from node.cli.main import parse
from node.cli.reference import PAGE, with_reference

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[tuple[str, str]]:
    """Every `dsd …` line of a code block, with the page it stands on."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```\w*\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.split(r";|&&|\$ ", line.partition("#")[0]):
                    words = part.strip()
                    if words.startswith("dsd ") and "|" not in words:
                        found.append((page.name, words))
    return found


@pytest.mark.parametrize(("page", "command"), commands(), ids=lambda value: value[:60])
def test_every_command_of_the_documents_is_understood(page, command, monkeypatch):
    """Parsed by the command line itself: a flag that is gone or mistyped ends with an error."""
    words = shlex.split(command.replace("…", "x").replace("'...'", "words"))[1:]
    names, _, _ = parse(words)
    assert names == words[: len(names)]


def test_there_are_commands_to_check():
    """The search for commands finds some on each page that shows how to do something."""
    pages = {page for page, _ in commands()}
    assert pages >= {"README.md", "telemetry.md", "swarm.md", "simulator.md"}
    assert len(commands()) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_flags_are_those_of_the_code():
    page = (ROOT / PAGE).read_text()
    assert page == with_reference(page), "run: python -m node.cli.reference"


def test_the_grafana_dashboard_asks_for_metrics_there_are():
    asked = set(re.findall(r"dsd_\w+", json.dumps(json.loads((ROOT / "docs/grafana.json").read_text()))))
    named = {re.sub(r"_(bucket|total)$", "", name) for name in asked}
    code = (ROOT / "node/gateway/metrics.py").read_text()
    exact = set(re.findall(r'"(dsd_\w+)"', code)) | {f"dsd_{name}" for name in re.findall(r'\("(\w+)", "', code)}
    assert named <= {re.sub(r"_total$", "", name) for name in exact}, named - exact


def test_errors_that_are_explained_exist():
    """The first words of each message of the troubleshooting table stand in the code."""
    code = "\n".join(path.read_text() for folder in ("dsd_p2p", "node") for path in (ROOT / folder).rglob("*.py"))
    table = (ROOT / PAGE).read_text().partition("## What went wrong")[2].partition("## Flags")[0]
    messages = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    assert len(messages) > 10
    for message in messages:
        quoted = re.findall(r"`([^`]+)`", message)[0]
        parts = [part.strip() for part in re.split(r"…|\bN\b|\bHOST\b|MODEL|\[a, b\)", quoted) if len(part.strip()) > 4]
        for part in parts:
            assert part in code, part


def test_the_readmes_python_is_python():
    for page in PAGES:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            compile(block, page.name, "exec", flags=0x2000)  # top-level await
