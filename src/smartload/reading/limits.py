"""Limit the work that a file can ask for.

A file may use one part many times, so a few kilobytes can stand for a tree without end. Work is therefore counted while
it is done, and real files stay far below the limits.
"""

from __future__ import annotations

from smartload.errors import UnreadableError
from smartload.records.problems import Problem

_SMALL = 64 << 20
"""A file of fewer bytes may ask for as much memory as one of so many: that is little, and small files are padded."""


def most_memory(nbytes: int) -> int:
    """Give the bytes of memory that what is read from a file of `nbytes` bytes may take beyond its tensors' own.

    >>> most_memory(1000) >> 20, most_memory(1 << 30) >> 20
    (128, 2048)
    """
    return 2 * max(nbytes, _SMALL)


ITEM_COST = 16
"""Work of one item, beside the characters of its name, so that items with short names or none cost something, too."""


class Budget:
    """An amount of work that may be done.

    Args:
        limit: the amount, in whatever unit `take` is called with.
        problem: what the error says once it is used up.
    """

    def __init__(self, limit: int, problem: Problem) -> None:
        self._left, self._problem = limit, problem

    def take(self, work: int) -> None:
        """Count `work`, before it is done; UnreadableError where it exceeds what is left."""
        self._left -= work
        if self._left < 0:
            raise UnreadableError(self._problem)
