"""Report how far a load is: to the caller's function, or as a bar in the terminal."""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

OnProgress: TypeAlias = Callable[[int, int], object]
"""A function of the bytes read so far and the bytes of all; what it returns is ignored."""

BAR_DELAY = 1.0
"""Seconds before a bar is shown: most loads are done by then, and would only leave a line on the screen."""


@contextlib.contextmanager
def progress_function(progress: bool | OnProgress | None) -> Iterator[OnProgress | None]:
    """Give the function that a load calls while the block runs; None where `progress` asks for none.

    Raises:
        TypeError: `progress` is neither a bool, None nor a function.
    """
    # `is True`, not truth: 1 or a list would be a mistake of the caller's.
    if progress is None or progress is False:
        yield None
    elif progress is True:
        bar = _Bar()
        try:
            yield bar
        finally:
            bar.close()  # also after a failure, so that the message starts on a line of its own
    elif callable(progress):
        yield progress
    else:
        raise TypeError(f"progress must be True or a function of two numbers, not {progress!r}")


def counter(on_progress: OnProgress | None, total: int) -> Callable[[int], None] | None:
    """Give a function that adds the bytes it is given and passes the sum on; None without `on_progress`.

    Args:
        on_progress: is called with the sum and `total`.
        total: the bytes of the whole load.
    """
    if on_progress is None:
        return None
    done = 0

    def add(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        # Nothing new is not reported, but a load without any bytes still reports once that it is done.
        if nbytes or not total:
            on_progress(done, total)

    return add


class _Bar:
    """A bar of tqdm that appears once the load has taken a while; nothing without a terminal or without tqdm."""

    def __init__(self) -> None:
        self._due = time.monotonic() + BAR_DELAY
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None and done < total and time.monotonic() > self._due:
            self._due = float("inf")  # one attempt: where there is no bar now, there will be none
            self._bar = _new_bar(done, total)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)  # tqdm counts in steps, not in sums

    def close(self) -> None:
        """End the bar and leave it on the screen."""
        if self._bar is not None:
            self._bar.close()


def _new_bar(done: int, total: int) -> Any:
    """Show a bar of tqdm; return None where stderr is no terminal or tqdm is not installed."""
    if sys.stderr is None or not sys.stderr.isatty():  # None: a program of Windows without a console
        return None
    try:
        # By name: tqdm is optional, and whoever asks for no bar does not wait for its import.
        tqdm = importlib.import_module("tqdm").tqdm
    except ImportError:
        return None
    return tqdm(total=total, initial=done, unit="B", unit_scale=True, file=sys.stderr)
