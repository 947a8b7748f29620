"""Makes JSON schemas as people write them, to try constrained answers on: nested, with patterns, formats and references.

Every schema bounds its texts and lists, so an answer of any model ends. The kinds of keywords and the depth are those of
the harder parts of JSONSchemaBench (Geng et al. 2025, arXiv:2501.10868); the schemas are our own.
"""

import random
from typing import Any

Schema = dict[str, Any]

_NAMES = (
    *("id", "name", "title", "status", "kind", "price", "count", "tags", "owner", "address"),
    *("city", "zip", "code", "notes", "items", "start", "end", "flags", "unit"),
)
_WORDS = ("red", "green", "blue", "small", "large", "new", "open", "closed", "draft", "north", "south")
_PATTERNS = ("^[A-Z]{2}-[0-9]{3}$", "^[a-z]{2,6}(_[a-z]{2,6}){0,2}$", "^#[0-9a-f]{6}$", r"^\+?[0-9]{6,10}$")
_FORMATS = ("date", "time", "uuid", "ipv4")
_DEPTH = 3


def make_schemas(count: int, seed: int = 1) -> list[Schema]:
    """Return `count` schemas, each an object; the same for the same seed."""
    return [_Maker(random.Random(f"{seed} {number}")).document(number) for number in range(count)]  # noqa: S311


class _Maker:
    """Makes one schema. definitions: parts that are referred to by name."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._definitions: dict[str, Schema] = {}

    def document(self, number: int) -> Schema:
        document = self._object(0)
        # Every third schema refers to a part of its own, twice.
        if number % 3 == 0:
            self._definitions["part"] = self._object(_DEPTH - 1)
            document["properties"] |= {"first": {"$ref": "#/$defs/part"}, "second": {"$ref": "#/$defs/part"}}
            document["required"] += ["first", "second"]
        if self._definitions:
            document["$defs"] = self._definitions
        return document

    def _object(self, depth: int) -> Schema:
        names = self._rng.sample(_NAMES, self._rng.randrange(2, 5))
        properties = {name: self._any(depth + 1) for name in names}
        required = names if self._rng.random() < 0.5 else names[: self._rng.randrange(1, len(names) + 1)]
        return {
            "type": "object",
            "properties": properties,
            "required": list(required),
            "additionalProperties": False,
        }

    def _any(self, depth: int) -> Schema:
        leaves = (self._text, self._number, self._choice, self._pattern, self._format, self._constant)
        if depth >= _DEPTH or self._rng.random() < 0.6:
            return self._rng.choice(leaves)()
        return self._rng.choice((self._object, self._list, self._either))(depth)

    def _list(self, depth: int) -> Schema:
        most = self._rng.randrange(1, 4)
        return {
            "type": "array",
            "items": self._any(depth + 1),
            "minItems": self._rng.randrange(0, most),
            "maxItems": most,
        }

    def _either(self, depth: int) -> Schema:
        return {"anyOf": [self._any(depth + 1), {"type": "null"}, self._object(depth + 1)]}

    def _text(self) -> Schema:
        return {"type": "string", "minLength": self._rng.randrange(0, 3), "maxLength": self._rng.randrange(6, 20)}

    def _number(self) -> Schema:
        low = self._rng.randrange(-50, 50)
        return {"type": self._rng.choice(("integer", "integer", "boolean"))} | {"minimum": low, "maximum": low + 500}

    def _choice(self) -> Schema:
        return {"enum": self._rng.sample(_WORDS, self._rng.randrange(2, 5))}

    def _pattern(self) -> Schema:
        return {"type": "string", "pattern": self._rng.choice(_PATTERNS)}

    def _format(self) -> Schema:
        return {"type": "string", "format": self._rng.choice(_FORMATS)}

    def _constant(self) -> Schema:
        return {"const": self._rng.choice((*_WORDS, 1, True, None))}
