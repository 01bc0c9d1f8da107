"""Names for the eye: short, printable, and many of one kind as one."""

from __future__ import annotations

import time

import pytest

from smartload.records.text import LONGEST, first_few, folded, plural, printable, size_text


@pytest.mark.parametrize(
    ("names", "lines"),
    [
        (["fc.weight"], ["fc.weight"]),
        ([f"l.{i}.w" for i in range(12)], ["l.{0...11}.w"]),
        ([f"l.{i}.w" for i in (0, 2, 5)], ["l.{0,2,5}.w"]),
        ([f"l.{i}.w" for i in (0, 2, 5, 9)], ["l.{0,2,5,...,9}.w"]),
        ([f"l.{i}.{j}.w" for i in range(2) for j in range(3)], ["l.{0...1}.{0...2}.w"]),
        (["l.0.0.w", "l.0.1.w", "l.1.0.w"], ["l.0.{0...1}.w", "l.1.0.w"]),
        (["a.1.w", "b", "a.2.w"], ["a.{1...2}.w", "b"]),
        (["0", "1"], ["{0...1}"]),
        ([], []),
        (["l.00.w", "l.1234567890123.w"], ["l.0.w", "l.1234567890123.w"]),
    ],
)
def test_names_that_differ_in_numbers_are_one(names: list[str], lines: list[str]) -> None:
    assert folded(names) == lines


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("fc.weight", "fc.weight"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\nb\r\t", "a\\nb\\r\\t"),
        ("right\u202eleft", "right\\u202eleft"),
        ("half\udc80", "half\\udc80"),
        ("größe.层", "größe.层"),
        ("x" * 101, "x" * (LONGEST - 3) + "..."),
    ],
)
def test_what_is_shown_can_be_shown(text: str, printed: str) -> None:
    assert printable(text) == printed
    assert printable(text).isprintable()
    printable(text).encode()


def test_a_megabyte_of_name_is_one_line() -> None:
    assert len(printable("\n" * 1_000_000)) == LONGEST
    assert len(folded(["1." * 500_000])[0]) == LONGEST


def test_numbers_in_any_pattern_are_folded_in_time() -> None:
    unary = [".".join("1" * i + "2" + "1" * (900 - i)) for i in range(900)]
    started = time.process_time()
    lines = folded(unary)
    assert time.process_time() - started < 20
    assert len(lines) <= 8**3


def test_some_says_how_many_there_are() -> None:
    assert first_few(["a", "b"]) == "a, b"
    assert first_few(["a", "b", "c", "d"]) == "a, b, c, ... (4 in all)"
    assert first_few(f"l.{i}.w" for i in range(2000)) == "l.{0...1999}.w"
    assert first_few(f"{c}.{i}" for c in "abcd" for i in range(500)).endswith("... (2,000 in all)")


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 bytes"), (99_999, "99,999 bytes"), (100_000, "0.1 MB"), (2_500_000_000, "2.50 GB")]
)
def test_size(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text


def test_plural() -> None:
    assert [plural(0, "key"), plural(1, "key"), plural(1234, "key")] == ["0 keys", "1 key", "1,234 keys"]
