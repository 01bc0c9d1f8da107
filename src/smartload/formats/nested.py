"""Entries by paths of names, as nested dicts: which of them are state dicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from smartload.errors import UnreadableError
from smartload.reading.state_dicts import Found, article, explore
from smartload.records.data import Entry, Extra, Held, Opaque, Part, Problem, Span, Tiled
from smartload.records.text import shown

OBJECT = Opaque("an object")
"""A value beside the tensors of which no more is known."""
_ENTRIES = (Span, Tiled, Held, Extra, Opaque)


def nested(entries: Iterable[tuple[tuple[str, ...], Entry]], file: str) -> Found:
    """The state dicts in entries whose paths are given; UnreadableError where a path is also the way to another."""
    root: dict[str, object] = {}
    for path, entry in entries:
        here = root
        for name in path[:-1]:
            below = here.setdefault(name, {})
            if not isinstance(below, dict):
                raise UnreadableError(Problem("key_twice", file, {"name": shown(".".join(path))}))
            here = below
        if path[-1] in here:
            raise UnreadableError(Problem("key_twice", file, {"name": shown(".".join(path))}))
        here[path[-1]] = entry
    return explore(root, _Nested(file))


class _Nested:
    """The `tree.Kinds` of nested dicts of entries."""

    keep_all = False
    most = 1 << 23

    def __init__(self, file: str) -> None:
        self.file = file

    def tensor(self, value: object) -> Entry | None:
        """The entry itself; an object that is no tensor is none."""
        return value if isinstance(value, _ENTRIES) and value != OBJECT else None

    def extra(self, value: object) -> Entry:
        """The entry itself."""
        return value if isinstance(value, _ENTRIES) else Opaque(self.noun(value))

    def module(self, value: object) -> Part | None:
        """There are no modules among entries."""

    def items(self, value: object) -> Mapping[str, object] | None:
        """The items of a dict."""
        return value if isinstance(value, dict) else None

    def odd_key(self, value: object) -> tuple[str, str] | None:
        """All keys are names."""

    def repeated(self, value: object) -> str | None:
        """Nothing is named twice."""

    def versions(self, value: object) -> Mapping[str, Mapping[str, object]] | None:
        """There are no versions beside the entries."""

    def noun(self, value: object) -> str:
        """What a value is, with its article."""
        if isinstance(value, dict):
            return article("dict", len(value))
        return value.what if isinstance(value, Opaque) else "a tensor"

    def opaque(self, value: object) -> Entry:
        """The entry of a value that is no tensor."""
        return Opaque(self.noun(value))

    def is_list(self, value: object) -> bool:
        """Whether `value` is a list: here, a dict by numbers."""
        return isinstance(value, dict) and bool(value) and all(name.isdecimal() for name in value)

    def inner(self, value: object) -> Iterable[object]:
        """All values directly inside a dict."""
        return value.values() if isinstance(value, dict) else ()

    def unseen(self) -> int | None:
        """Every tensor has a name."""
        return None
