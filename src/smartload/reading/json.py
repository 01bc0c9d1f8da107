"""Read JSON out of a file more strictly than Python does: no name twice, no NaN, no mere nesting."""

from __future__ import annotations

import json

from smartload.errors import UnreadableError
from smartload.records.problems import Problem
from smartload.records.text import printable


def loads(raw: bytes, file: str) -> object:
    """Read a JSON text in UTF-8.

    Raises:
        UnreadableError: it is damaged, gives a name twice, has NaN or Infinity, or is hardly more than brackets.
    """
    # Each bracket and comma may become an object: "[],[],..." takes more than twenty times its size in memory. Real
    # headers and indexes are mostly names and digits, and far from having one such character in three.
    if sum(map(raw.count, (b"{", b"[", b","))) > len(raw) // 3 + 64:
        raise UnreadableError(Problem("json_damaged", file))

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        # Readers differ in which of two values they take, so one file could give two sets of weights.
        items = dict(pairs)
        if len(items) < len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise UnreadableError(Problem("key_twice", file, {"name": printable(twice)}))
        return items

    def refuse_constant(name: str) -> object:
        # NaN and Infinity, which JSON does not have, but Python reads.
        raise ValueError(name)

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse_constant)
    except (ValueError, RecursionError):  # also UnicodeDecodeError, and a number of more digits than int() takes
        raise UnreadableError(Problem("json_damaged", file)) from None
