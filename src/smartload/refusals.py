"""The words of every refusal: what, where, how close, what to write. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smartload.records import Problem

if TYPE_CHECKING:
    from smartload.records import Ambiguity, Mismatch

FILES = {
    "truncated": "the file ends too early: {have} bytes are there, {need} are needed. Copy or download it again.",
}
"""One sentence for each kind of file problem; `{name}` stands for a fact of the Problem, `{path}` goes before it."""


def words(problem: Problem | Mismatch | Ambiguity) -> str:
    """The message for a problem."""
    assert isinstance(problem, Problem)
    return f"{problem.path}: {FILES[problem.kind].format(**problem.facts)}"
