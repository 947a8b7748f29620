"""docs/protocol.md describes the messages that the code sends, and code cites the rules by their numbers and titles."""

import re
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from dsd_p2p.types import Constraint, Endpoint, ModelKey, PeerInfo, Relaxation, Sampling, Shaping, Span, TextRequest
from dsd_p2p.wire import membership, messages
from dsd_p2p.wire.hints import Hits
from dsd_p2p.wire.messages import Message
from dsd_p2p.wire.version import PROTOCOL_ID, PROTOCOL_VERSION

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs/protocol.md").read_text()
MESSAGES = {struct.__name__: struct for struct in get_args(Message)}
STRUCTURES = {
    struct.__name__: struct
    for struct in (
        Endpoint, ModelKey, TextRequest, PeerInfo, Span, Sampling, Relaxation, Shaping, Constraint, Hits,
        *(each for module in (messages, membership) for each in vars(module).values()),
    )
    if isinstance(struct, type) and issubclass(struct, msgspec.Struct) and struct.__name__ not in MESSAGES
}  # fmt: skip


def rows(header: str) -> dict[str, list[str]]:
    """The cells of the table under `header`, by the backticked name in each row."""
    table = PAGE.partition(header)[2].partition("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "`" in line]
    return {next(cell for cell in row if cell.startswith("`")).strip("`"): row for row in cells}


def field_names(cell: str) -> list[str]:
    """The names at the beginning of the comma-separated parts that are in no bracket."""
    depth, part, parts = 0, "", []
    for letter in cell:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts, part = [*parts, part], ""
        else:
            part += letter
    return [each.strip().partition(":")[0].split(" ")[0] for each in [*parts, part]]


MESSAGE_ROWS = rows("| tag | message | from → to | fields |")
STRUCTURE_ROWS = rows("| structure | fields |")


def test_the_page_names_the_version_that_peers_speak():
    assert PAGE.startswith(f"# The protocol, version {PROTOCOL_VERSION}\n")
    assert f"`{PROTOCOL_ID}`" in PAGE
    assert f"| 1 | protocol version, {PROTOCOL_VERSION} |" in PAGE


def test_the_page_lists_every_message_and_structure():
    assert list(MESSAGE_ROWS) == sorted(MESSAGES, key=lambda name: MESSAGES[name].__struct_config__.tag)
    assert set(STRUCTURE_ROWS) == set(STRUCTURES)


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_has_the_tag_and_the_fields_that_the_page_gives(name):
    tag, _, _, fields = MESSAGE_ROWS[name]
    assert int(tag) == MESSAGES[name].__struct_config__.tag
    assert field_names(fields) == list(MESSAGES[name].__struct_fields__)


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_structure_has_the_fields_that_the_page_gives(name):
    assert field_names(STRUCTURE_ROWS[name][1]) == list(STRUCTURES[name].__struct_fields__)


def test_code_cites_rules_by_their_present_numbers_and_titles():
    titles = {int(number): title for number, title in re.findall(r"^(\d+)\. \*\*(.+?)\.\*\*", PAGE, re.MULTILINE)}
    cited = 0
    for path in (each for top in ("dsd_p2p", "node", "tests") for each in (ROOT / top).rglob("*.py")):
        text = " ".join(path.read_text().split())
        cases = re.findall(r"\b[Rr]ules? (\d+)((?:: | \()[A-Z]?.{0,20})?", text)
        cases += re.findall(r"\b(\d+)( \([A-Z][a-z ]+\))", text) if "docs/protocol.md" in text else []
        for number, rest in cases:
            title = titles[int(number)]
            assert rest.startswith((f": {title}", f" ({title})")), f"{path} cites rule {number}, which is '{title}'"
            cited += 1
    assert cited > 5
    assert sorted(titles) == list(range(1, len(titles) + 1))
