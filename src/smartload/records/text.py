"""Make text for people: names printable, short, and many of one kind as one; counts, sizes, a table. Pure.

Names come from files, and a file may be hostile: whatever is printed goes through `printable`.
"""

from __future__ import annotations

import html
import math
import sys
from collections.abc import Iterable

from smartload.records.entries import Beside

LONGEST = 100
"""Characters of one name that are printed. Real names are shorter; a hostile one may have millions."""
LONGEST_PATH = 1000
"""The same for a path that the caller wrote: its end is the name of the file."""


def printable(text: str, longest: int = LONGEST) -> str:
    r"""Escape everything unprintable in `text`, and cut it to `longest` characters.

    >>> printable("fc.weight"), printable("a\x1b[2J\n")
    ('fc.weight', 'a\\x1b[2J\\n')
    """
    # Cut first: a hostile name may have millions of characters, and be named in thousands of places.
    is_longer, text = len(text) > longest, text[: longest + 1]
    # Escape sequences could rewrite a terminal, newlines forge a line, and marks of direction turn a name around.
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return text[: longest - 3] + "..." if is_longer or len(text) > longest else text


def for_console(text: str) -> str:
    """Escape what standard output cannot write: a Chinese name, say, on a console that has Western letters only."""
    # Where it cannot, print() raises: a load that went well would seem to have failed. In a notebook, and in a program
    # without a console, standard output has no encoding and takes every letter.
    encoding = getattr(sys.stdout, "encoding", None)
    try:
        return text.encode(encoding, "backslashreplace").decode(encoding) if isinstance(encoding, str) else text
    except (LookupError, UnicodeError):  # the name of no encoding, or of one that is not for text
        return text


def folded(names: Iterable[str]) -> list[str]:
    """Write names that differ only in numbers as one: `layers.{0...11}.weight`.

    >>> folded(["layers.0.weight", "layers.1.weight", "fc.bias"])
    ['layers.{0...1}.weight', 'fc.bias']
    """
    # The names with their numbers left out -> the numbers of each.
    groups: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for name in dict.fromkeys(names):  # each once: rows are counted below
        segments = name.split(".")
        numbers = tuple(int(s) for s in segments if _number(s))
        groups.setdefault(tuple("" if _number(s) else s for s in segments), []).append(numbers)
    return [printable(text) for template, numbers in groups.items() for text in _fold(template, numbers)]


def _number(segment: str) -> bool:
    # isdecimal is true of the digits of all scripts, which int() would make one; ten digits are no layer's number.
    return segment.isdecimal() and segment.isascii() and len(segment) < 10


def _fold(template: tuple[str, ...], numbers: list[tuple[int, ...]], levels: int = 3) -> list[str]:
    """Write the names of one template, in as few lines as say which of them there are.

    Args:
        template: the segments of each name, "" in place of a number.
        numbers: the numbers of each name, in order.
        levels: how often the names may be split by one of the numbers.
    """
    # The values of each number, apart from the others.
    columns = [sorted(set(column)) for column in zip(*numbers)]
    combinations = math.prod(map(len, columns))
    at = next((i for i, column in enumerate(columns) if len(column) > 1), 0)
    # Past three levels or eight lines a line may name combinations that do not exist: short matters more than exact.
    if combinations == len(numbers) or not levels or len(columns[at]) > 8:
        return [_filled(template, columns)]
    # Not every combination exists: one line for each value of the first number that varies.
    parts: dict[int, list[tuple[int, ...]]] = {}
    for row in numbers:
        parts.setdefault(row[at], []).append(row)
    return [text for value in sorted(parts) for text in _fold(template, parts[value], levels - 1)]


def _filled(template: tuple[str, ...], columns: list[list[int]]) -> str:
    """Put the ranges of numbers into a template: ('layers', '', 'weight') -> 'layers.{0...11}.weight'."""
    texts = iter([_range(column) for column in columns])
    return ".".join(segment or next(texts, "") for segment in template)


def _range(column: list[int]) -> str:
    """Write sorted numbers as a range, or list the first three: '{0...11}', '{0,2,4,...,22}'."""
    if len(column) == 1:
        return str(column[0])
    if column[-1] - column[0] == len(column) - 1:
        return f"{{{column[0]}...{column[-1]}}}"
    # Gaps, as where layers are pruned or only some are missing.
    few = ",".join(map(str, column[:3]))
    return f"{{{few}}}" if len(column) <= 3 else f"{{{few},...,{column[-1]}}}"


def first_few(names: Iterable[str], limit: int = 3) -> str:
    """List the first few of the folded names, with the number of all names where there are more.

    >>> first_few(["a.w", "b.w", "c.w", "d.w"])
    'a.w, b.w, c.w, ... (4 in all)'
    """
    every = list(names)
    lines = folded(every)
    # The count is of names, not of lines: that is how many tensors are concerned.
    return ", ".join(lines[:limit]) + (f", ... ({len(every):,} in all)" if len(lines) > limit else "")


def beside_line(item: Beside) -> str:
    """Describe in one line what a file holds beside its state dicts: `optimizer: an optimizer's state (4 tensors)`."""
    count = plural(item.tensors, "tensor")
    # "2 tensors in a list of 2" has its count already.
    tensors = f" ({count})" if item.tensors and not item.what.startswith(count) else ""
    return (f"{printable(item.path)}: " if item.path else "") + item.what + tensors


def size_text(nbytes: int) -> str:
    """Write a number of bytes as people read it.

    >>> size_text(820), size_text(2_500_000), size_text(13_476_839_424)
    ('820 bytes', '2.5 MB', '13.48 GB')
    """
    # Powers of ten, as disks and download pages count.
    if nbytes >= 1e9:
        return f"{nbytes / 1e9:.2f} GB"
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e5 else f"{nbytes:,} bytes"


def plural(count: int, noun: str) -> str:
    """Write a count with its noun.

    >>> plural(1, "key"), plural(2000, "key")
    ('1 key', '2,000 keys')
    """
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def html_table(caption: str, rows: Iterable[tuple[str, Iterable[str]]]) -> str:
    """Make an html table for a notebook, with everything escaped.

    Args:
        caption: the text above the table.
        rows: a label, and its lines, for each row.
    """
    # In the tags themselves: a notebook may be shown where it cannot bring a style sheet.
    aligned = 'style="text-align: left; vertical-align: top"'
    cells = "".join(
        f"<tr><th {aligned}>{html.escape(label)}</th><td {aligned}>{'<br>'.join(map(html.escape, lines))}</td></tr>"
        for label, lines in rows
    )
    return f"<table><caption {aligned}>{html.escape(caption)}</caption>{cells}</table>"


def with_article(noun: str) -> str:
    """Put the article before a noun: 'int' -> 'an int', 'list' -> 'a list'."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"
