"""How much work a file may ask for: real files stay far below, and shared parts cannot multiply it."""

from __future__ import annotations

from smartload.errors import UnreadableError
from smartload.records.problems import Problem

ITEM_COST = 16
"""What one item costs beside the characters of its name."""


class Budget:
    """Work that is counted; UnreadableError with the given problem once it is more than the limit."""

    def __init__(self, limit: int, problem: Problem) -> None:
        self._left, self._problem = limit, problem

    def take(self, work: int) -> None:
        """Count some work before it is done."""
        self._left -= work
        if self._left < 0:
            raise UnreadableError(self._problem)
