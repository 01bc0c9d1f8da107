"""Names for the eye: printable, short, and many of one kind as one. Pure."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable

from smartload.records.entries import Beside

LONGEST = 100


def printable(text: str) -> str:
    """`text` with everything unprintable escaped, at most 100 characters long."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[:LONGEST])
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def folded(names: Iterable[str]) -> list[str]:
    """Names that differ only in numbers as one: `layers.{0...11}.weight`.

    >>> folded(["layers.0.weight", "layers.1.weight", "fc.bias"])
    ['layers.{0...1}.weight', 'fc.bias']
    """
    groups: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for name in names:
        segments = name.split(".")
        numbers = tuple(int(s) for s in segments if _number(s))
        groups.setdefault(tuple("" if _number(s) else s for s in segments), []).append(numbers)
    return [printable(text) for shape, numbers in groups.items() for text in _fold(shape, numbers)]


def _number(segment: str) -> bool:
    return segment.isdecimal() and segment.isascii() and len(segment) < 10


def _fold(shape: tuple[str, ...], numbers: list[tuple[int, ...]], levels: int = 3) -> list[str]:
    columns = [sorted(set(column)) for column in zip(*numbers)]
    whole = math.prod(map(len, columns))
    at = next((i for i, column in enumerate(columns) if len(column) > 1), 0)
    if whole == len(numbers) or not levels or len(columns[at]) > 8:
        return [_filled(shape, columns)]
    # Not every combination is there: one line for each value of the first number that varies.
    parts: dict[int, list[tuple[int, ...]]] = {}
    for row in numbers:
        parts.setdefault(row[at], []).append(row)
    return [text for value in sorted(parts) for text in _fold(shape, parts[value], levels - 1)]


def _filled(shape: tuple[str, ...], columns: list[list[int]]) -> str:
    texts = iter([_range(column) for column in columns])
    return ".".join(segment or next(texts, "") for segment in shape)


def _range(column: list[int]) -> str:
    if len(column) == 1:
        return str(column[0])
    if column[-1] - column[0] == len(column) - 1:
        return f"{{{column[0]}...{column[-1]}}}"
    few = ",".join(map(str, column[:3]))
    return f"{{{few}}}" if len(column) <= 3 else f"{{{few},...,{column[-1]}}}"


def first_few(names: Iterable[str], limit: int = 3) -> str:
    """The first few of the folded names, and how many names there are beyond them."""
    every = list(names)
    lines = folded(every)
    return ", ".join(lines[:limit]) + (f", ... ({len(every):,} in all)" if len(lines) > limit else "")


def beside_line(item: Beside) -> str:
    """A thing of the file that is no weight, in a line."""
    count = plural(item.tensors, "tensor")
    tensors = f" ({count})" if item.tensors and not item.what.startswith(count) else ""
    return (f"{printable(item.path)}: " if item.path else "") + item.what + tensors


def size_text(nbytes: int) -> str:
    """Bytes as a person reads them."""
    if nbytes >= 1e9:
        return f"{nbytes / 1e9:.2f} GB"
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e5 else f"{nbytes:,} bytes"


def plural(count: int, noun: str) -> str:
    """`1 key`, `2 keys`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def html_table(caption: str, rows: Iterable[tuple[str, Iterable[str]]]) -> str:
    """An html table for a notebook: a label and its lines in each row, everything escaped."""
    aligned = 'style="text-align: left; vertical-align: top"'
    cells = "".join(
        f"<tr><th {aligned}>{html.escape(label)}</th><td {aligned}>{'<br>'.join(map(html.escape, lines))}</td></tr>"
        for label, lines in rows
    )
    return f"<table><caption {aligned}>{html.escape(caption)}</caption>{cells}</table>"


def with_article(noun: str) -> str:
    """`an int`, `a list`, `a module` ..."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"
