"""docs/glossary.md gives one meaning to each word that the code and the documents use."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TERMS = re.findall(r"^\| ([^|]+?) \| [^|]+ \|$", (ROOT / "docs/glossary.md").read_text(), re.MULTILINE)[1:]


def test_terms_are_in_order_and_none_stands_twice():
    assert len(TERMS) > 50
    assert sorted(TERMS, key=str.lower) == TERMS
    assert len({term.lower() for term in TERMS}) == len(TERMS)


def test_every_term_is_in_use():
    pages = [page for page in (ROOT / "docs").glob("*.md") if page.name != "glossary.md"]
    modules = [path for top in ("dsd_p2p", "node") for path in (ROOT / top).rglob("*.py")]
    used = "\n".join(path.read_text() for path in (ROOT / "README.md", *pages, *modules)).lower()
    words = re.sub(r"[\s_`-]+", " ", used)
    unused = [term for term in TERMS if re.sub(r"[\s_`-]+", " ", term.lower()) not in words]
    assert not unused, f"nothing uses {unused}"
