"""Who is told how far a load is: the caller's function, or a bar in the terminal."""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

OnProgress: TypeAlias = Callable[[int, int], object]
"""Given the bytes that are done and all that there are."""

PATIENCE = 1.0
"""Seconds before a bar is worth showing."""


@contextlib.contextmanager
def progress_function(progress: bool | OnProgress | None) -> Iterator[OnProgress | None]:
    """The function to call while the block runs; None where nobody is to be told."""
    if progress is None or progress is False:
        yield None
    elif progress is True:
        bar = _Bar()
        try:
            yield bar
        finally:
            bar.close()
    elif callable(progress):
        yield progress
    else:
        raise TypeError(f"progress must be True or a function of two numbers, not {progress!r}")


def counter(on_progress: OnProgress | None, total: int) -> Callable[[int], None] | None:
    """What adds up bytes as they come, and tells the sum."""
    if on_progress is None:
        return None
    done = 0

    def add(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if nbytes or not total:
            on_progress(done, total)

    return add


class _Bar:
    """A bar of tqdm that appears in a terminal, once the load has taken a while; without tqdm, nothing."""

    def __init__(self) -> None:
        self._due = time.monotonic() + PATIENCE
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None and done < total and time.monotonic() > self._due:
            self._due = float("inf")
            self._bar = _shown(done, total)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def _shown(done: int, total: int) -> Any:
    if sys.stderr is None or not sys.stderr.isatty():
        return None
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ImportError:
        return None
    return tqdm(total=total, initial=done, unit="B", unit_scale=True, file=sys.stderr)
