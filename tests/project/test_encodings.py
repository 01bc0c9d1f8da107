"""Text is read and written as UTF-8 on every system: left to itself, Python takes what the system is set to."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    [
        *(path for name in ("src", "tests", "examples") for path in (ROOT / name).rglob("*.py")),
        ROOT / "docs" / "conf.py",
    ]
)
MODE = re.compile(r"[rwaxbt+]{1,3}")
OTHERS = {"os", "gzip", "tarfile"}
"""Modules whose `open` gives bytes, or an archive, unless told otherwise."""


def opens_text(call: ast.Call, name: str, mode: ast.expr | None) -> bool:
    """Whether a call of `open`, as a function or as a method of a path, opens text."""
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    if isinstance(owner, ast.Name) and owner.id in OTHERS and name == "open":
        return False
    # A path's own `open` begins with the mode, the others with what is opened.
    places = call.args if owner is not None and name == "open" else call.args[1:]
    given = mode if mode is not None else places[0] if places else None
    if given is None:
        return not call.args or owner is None
    text = given.value if isinstance(given, ast.Constant) else None
    return isinstance(text, str) and MODE.fullmatch(text) is not None and "b" not in text


def is_left_to_the_system(call: ast.Call) -> bool:
    """Whether a call reads or writes text without naming its encoding."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in given:
        return False
    if name in ("open", "fdopen"):
        return opens_text(call, name, given.get("mode"))
    if name in ("run", "Popen", "check_output"):
        return not given.keys().isdisjoint({"text", "universal_newlines"})
    return name in ("read_text", "write_text", "TextIOWrapper")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_text_names_its_encoding(path: Path) -> None:
    calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    assert [f"line {call.lineno}: {ast.unparse(call)}" for call in calls if is_left_to_the_system(call)] == []


@pytest.mark.parametrize(
    ("call", "found"),
    [
        ("open(path)", True),
        ("open(path, 'w')", True),
        ("open(path, mode='r+')", True),
        ("open(path, 'wb')", False),
        ("open(path, 'w', encoding='utf-8')", False),
        ("path.open()", True),
        ("path.open('a')", True),
        ("path.open('rb')", False),
        ("os.fdopen(number, 'w')", True),
        ("os.open(path, flags)", False),
        ("gzip.open(path)", False),
        ("archive.open('data/0', 'w')", False),
        ("safetensors.open(file)", False),
        ("path.read_text()", True),
        ("path.write_text(words, encoding='utf-8')", False),
        ("subprocess.run(command, text=True)", True),
        ("subprocess.run(command, encoding='utf-8')", False),
        ("subprocess.run(command)", False),
    ],
)
def test_the_rule_sees_it(call: str, found: bool) -> None:
    (statement,) = ast.parse(call).body
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Call)
    assert is_left_to_the_system(statement.value) == found
