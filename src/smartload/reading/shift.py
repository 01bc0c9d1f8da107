"""A part of another file, or one file of several, as spans of the whole."""

from __future__ import annotations

from collections.abc import Mapping

from smartload.records.entries import Entry, Extra, Span


def shifted(entries: Mapping[str, Entry], file: int, start: int = 0) -> dict[str, Entry]:
    """The same entries, where file 0 of theirs begins at `start` in file number `file`."""
    return {key: _entry(entry, file, start) for key, entry in entries.items()}


def _entry(entry: Entry, file: int, start: int) -> Entry:
    if isinstance(entry, Span):
        return _span(entry, file, start)
    if isinstance(entry, Extra):
        return Extra(_tree(entry.tree, file, start))
    return entry


def _span(span: Span, file: int, start: int) -> Span:
    # What lies in memory, files 1, 2, ... of the part, has no place in the whole file.
    return span._replace(file=span.file + file, offset=span.offset + (0 if span.file else start))


def _tree(tree: object, file: int, start: int) -> object:
    if isinstance(tree, Span):
        return _span(tree, file, start)
    if isinstance(tree, dict):
        return type(tree)((key, _tree(value, file, start)) for key, value in tree.items())
    if isinstance(tree, (list, tuple)):
        return type(tree)(_tree(value, file, start) for value in tree)
    return tree
