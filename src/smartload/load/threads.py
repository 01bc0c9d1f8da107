"""Pieces of work shared by a few threads, each with a buffer of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch

ALONE = 8 << 20
"""Below this many bytes a second thread costs more than it brings."""


class Buffer:
    """A thread's own buffer, as large as the largest piece it has had to hold."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def take(self, nbytes: int) -> memoryview:
        """The first `nbytes` bytes of the buffer; what was there before is gone."""
        if len(self._bytes) < nbytes:
            self._bytes = bytearray(nbytes)
        return memoryview(self._bytes)[:nbytes]


Piece = Callable[[Buffer], int]
"""Given a buffer to use, it returns the bytes that it moved."""


class _Workers:
    """Pieces of work shared by this thread and a few helpers; after a failure nothing new is begun."""

    def __init__(self, work: Sequence[Piece], done: Callable[[int], None] | None) -> None:
        self._queue = iter(work)  # next() of a list's iterator is atomic
        self._done = done
        self._reported = 0  # of the pieces in _moved
        self._moved: list[int] = []
        self.failures: list[BaseException] = []

    def work(self, report: bool = False) -> None:
        """Take pieces until none is left or one has failed."""
        buffer = Buffer()
        try:
            for piece in self._queue:
                if self.failures:
                    return
                self._moved.append(piece(buffer))
                if report:
                    self._report()
        except BaseException as failure:  # noqa: BLE001 - raised again by the thread that called
            self.failures.append(failure)

    def help(self, inference: bool) -> None:
        """The same in another thread; what was made in inference mode can be written only there."""
        with torch.inference_mode(inference):
            self.work()

    def close(self) -> None:
        """Report what the helpers moved last, or raise what stopped the work."""
        if self.failures:
            raise self.failures[0]
        self._report()

    def _report(self) -> None:
        if self._done is not None:
            new = self._moved[self._reported :]
            self._reported += len(new)
            self._done(sum(new))


def in_threads(work: Sequence[Piece], nbytes: int, done: Callable[[int], None] | None = None) -> None:
    """Do all pieces of work, this thread included; return or raise only when no thread is at work any more."""
    workers = _Workers(work, done)
    count = min(torch.get_num_threads(), 8, len(work)) if nbytes > ALONE else 1
    here = torch.is_inference_mode_enabled()
    helpers = [threading.Thread(target=workers.help, args=(here,), daemon=True) for _ in range(count - 1)]
    try:
        for thread in helpers:
            thread.start()
        workers.work(report=True)
    except BaseException as interrupt:  # noqa: BLE001 - raised again by close()
        workers.failures.append(interrupt)
    for thread in helpers:
        while thread.is_alive():
            try:
                thread.join()
            except BaseException as interrupt:  # noqa: BLE001 - Ctrl-C must not leave a thread writing behind the undo
                workers.failures.append(interrupt)
    workers.close()
