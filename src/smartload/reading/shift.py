"""Move the spans of a checkpoint that is a part of another file, or one file of several, to where they lie in it."""

from __future__ import annotations

from collections.abc import Mapping

from smartload.records.entries import Entry, Extra, Span


def shifted(entries: Mapping[str, Entry], file: int, start: int = 0) -> dict[str, Entry]:
    """Give the same entries with their spans moved.

    Args:
        entries: the entries, as their own file has them.
        file: what to add to their file numbers: the number that their file 0 has in the whole checkpoint.
        start: where their file 0 begins in that file.
    """
    made: dict[int, object] = {}
    return {key: _entry(entry, file, start, made) for key, entry in entries.items()}


def _entry(entry: Entry, file: int, start: int, made: dict[int, object]) -> Entry:
    """Move an entry; one without spans stays as it is."""
    if isinstance(entry, Span):
        return _span(entry, file, start)
    if isinstance(entry, Extra):
        return Extra(_tree(entry.tree, file, start, made))
    return entry


def _span(span: Span, file: int, start: int) -> Span:
    # Files 1, 2, ... of the part are bytes in memory, which do not lie at any offset of the whole file.
    return span._replace(file=span.file + file, offset=span.offset + (0 if span.file else start))


def _tree(tree: object, file: int, start: int, made: dict[int, object]) -> object:
    """Move the spans in an extra state, whose depth was limited when it was read.

    `made` has what was made already, by id: a list that holds another one twice, sixty levels deep, has no end else.
    """
    if not isinstance(tree, (Span, dict, list, tuple)):
        return tree
    if id(tree) not in made:
        if isinstance(tree, Span):
            made[id(tree)] = _span(tree, file, start)
        elif isinstance(tree, dict):
            # An OrderedDict stays one.
            made[id(tree)] = type(tree)((key, _tree(value, file, start, made)) for key, value in tree.items())
        else:
            made[id(tree)] = type(tree)(_tree(value, file, start, made) for value in tree)
    return made[id(tree)]
