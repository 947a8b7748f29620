"""Splits a text that arrives in pieces at a pair of tags."""


class TagSplitter:
    """Tells text inside a pair of tags from text outside. The tags themselves are dropped.

    is_inside: whether the text begins inside, because the prompt ended with the opening tag.
    """

    def __init__(self, begin: str, end: str, *, is_inside: bool = False) -> None:
        self._tags = {False: begin, True: end}
        self._held = ""
        self.is_inside = is_inside

    def feed(self, text: str) -> list[tuple[bool, str]]:
        """Add `text`; return what can be told by now: parts, each with whether it is inside. Each tag ends a part."""
        self._held += text
        parts: list[tuple[bool, str]] = []
        while (at := self._held.find(self._tags[self.is_inside])) >= 0:
            parts.append((self.is_inside, self._held[:at]))
            self._held = self._held[at + len(self._tags[self.is_inside]) :]
            self.is_inside = not self.is_inside
        num_held = overlap(self._held, self._tags[self.is_inside])
        shown, self._held = self._held[: len(self._held) - num_held], self._held[len(self._held) - num_held :]
        if shown:
            parts.append((self.is_inside, shown))
        return parts

    def finish(self) -> list[tuple[bool, str]]:
        """Return what is still held back, after the text has ended."""
        held, self._held = self._held, ""
        return [(self.is_inside, held)] if held else []


def overlap(text: str, tag: str) -> int:
    """Return how many characters at the end of `text` could begin `tag`."""
    return next((size for size in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:size])), 0)
