"""JSON that a file brings along: as json reads it, but a name given twice, NaN and what is mere nesting are refused."""

from __future__ import annotations

import json

from smartload.errors import UnreadableError
from smartload.records.problems import Problem
from smartload.records.text import printable


def loads(raw: bytes, file: str) -> object:
    """The value of a JSON text; UnreadableError where it is damaged or says something twice."""
    # What has more brackets and commas than text holds no names; as objects it would take up to thirty times its size.
    if sum(map(raw.count, (b"{", b"[", b","))) > len(raw) // 3 + 64:
        raise UnreadableError(Problem("json_damaged", file))

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise UnreadableError(Problem("key_twice", file, {"name": printable(twice)}))
        return found

    def constant(name: str) -> object:
        raise ValueError(name)

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError):
        raise UnreadableError(Problem("json_damaged", file)) from None
