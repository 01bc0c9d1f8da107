"""Share tasks among a few threads, each with a buffer of its own.

Reading a file and copying bytes release Python's lock, so threads are enough to keep several cores busy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NoReturn

import torch

MIN_BYTES_FOR_THREADS = 8 << 20
"""Up to this many bytes one thread is faster: starting others takes longer than what they save."""

MAX_THREADS = 8
"""One thread reads several GB a second from the page cache: eight are more than memory and disks deliver."""


class Buffer:
    """A buffer for one thread, used again for every task; it grows to the most that was asked for."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def take(self, nbytes: int) -> memoryview:
        """Give the first `nbytes` bytes of the buffer; whatever it held before is overwritten."""
        if len(self._bytes) < nbytes:
            # A new one, because a bytearray that somebody has a view of cannot be resized.
            self._bytes = bytearray(nbytes)
        return memoryview(self._bytes)[:nbytes]


Task = Callable[[Buffer], int]
"""Work for one thread: it may use the buffer it is given, and returns how many bytes it moved."""


class Helper:
    """A thread that can be waited for through every Ctrl-C.

    `Thread.join` and `is_alive` cannot: where Ctrl-C breaks them off, Python up to 3.12 takes the thread for ended
    while it is still at work.

    Args:
        work: what the thread does.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._ended, self._gate = list[bool](), threading.Lock()
        self._gate.acquire()
        # A daemon: should a read never return (a network drive that is gone), an interpreter that ends does not wait.
        self._thread = threading.Thread(target=_work, args=(work, self._ended, self._gate), daemon=True)

    def start(self) -> None:
        """Start the thread; RuntimeError where the system has none left."""
        self._thread.start()

    def wait(self, failures: list[BaseException]) -> None:
        """Wait until the work is done; of a thread that was not started, there is none.

        Args:
            failures: gets the interrupts meanwhile, so that the work can end early and the caller raise them.
        """
        while True:
            try:
                # What opens the gate has noted the end before. So nobody waits at a gate that an interrupt has passed.
                while self._thread.ident is not None and not self._ended:
                    self._gate.acquire()
                return
            except BaseException as interrupt:  # noqa: BLE001 - the caller raises it
                failures.append(interrupt)


def _work(work: Callable[[], None], ended: list[bool], gate: threading.Lock) -> None:
    """Do the work of a `Helper`, in its thread; no method of it, which would be a reference cycle."""
    try:
        work()
    finally:
        ended.append(True)
        gate.release()


class _Workers:
    """Tasks shared by the calling thread and its helpers; after a failure no new task is begun.

    Attributes:
        failures: what tasks have raised, and interrupts, in the order in which they came.
    """

    def __init__(self, tasks: Sequence[Task], done: Callable[[int], None] | None) -> None:
        # No lock: taking the next item of a list's iterator, and appending to a list, are one step each for threads.
        self._queue = iter(tasks)
        self._done = done
        self._moved: list[int] = []
        self._reported = 0  # how many items of _moved the caller has been told
        self.failures: list[BaseException] = []
        self._over = False  # whether no task may be begun any more

    def work(self, report: bool = False) -> None:
        """Do tasks until none is left or one has failed.

        Args:
            report: whether to report progress after each task. Only the calling thread does: `done` is the user's code,
                which need not expect another thread.
        """
        buffer = Buffer()
        try:
            for task in self._queue:
                if self.failures or self._over:
                    return
                self._moved.append(task(buffer))
                if report:
                    self._report()
        except BaseException as failure:  # noqa: BLE001 - close() raises it in the calling thread
            self.failures.append(failure)

    def help(self, inference: bool) -> None:
        """Do tasks in a helper thread, with the inference mode of the calling thread.

        The mode is one thread's own, and tensors that were made in it can be written only in it.
        """
        with torch.inference_mode(inference):
            self.work()

    def wait(self, helpers: Sequence[Helper]) -> None:
        """Wait until no helper is at work any more."""
        for helper in helpers:
            helper.wait(self.failures)

    def end(self, helpers: Sequence[Helper]) -> None:
        """Do the same, and have no task begun from now on: a thread whose start was interrupted may come later."""
        self._over = True
        self.wait(helpers)

    def close(self) -> None:
        """Report what the helpers moved last, or raise what stopped the tasks first."""
        if self.failures:
            raise_one(self.failures, 0)
        self._report()

    def _report(self) -> None:
        """Report the bytes of the tasks, of all threads, that are done since the last report."""
        if self._done is not None:
            new = self._moved[self._reported :]
            self._reported += len(new)
            self._done(sum(new))


def in_threads(tasks: Sequence[Task], nbytes: int, done: Callable[[int], None] | None = None) -> None:
    """Do all tasks, in this thread and in helpers; return or raise only when no helper is at work any more.

    Args:
        tasks: are begun in this order.
        nbytes: how many bytes they move together; decides whether helpers are worth it.
        done: is called, in this thread, with the bytes moved since its last call.

    Raises:
        BaseException: the first that a task, `done` or an interrupt raised.
    """
    workers = _Workers(tasks, done)
    # torch.set_num_threads, or OMP_NUM_THREADS, is how users bound the threads of a process that shares its machine.
    count = min(torch.get_num_threads(), MAX_THREADS, len(tasks)) if nbytes > MIN_BYTES_FOR_THREADS else 1
    inference = torch.is_inference_mode_enabled()
    helpers = [Helper(partial(workers.help, inference)) for _ in range(count - 1)]
    try:
        try:
            _start(helpers)
            workers.work(report=True)
        except BaseException as interrupt:  # noqa: BLE001 - raised again by close()
            workers.failures.append(interrupt)
        workers.wait(helpers)
    finally:
        # Left alone, a helper would go on writing to a tensor whose old values the undo has put back. So they are
        # waited for once more, should an interrupt have broken off the lines above.
        workers.end(helpers)
    workers.close()


def _start(helpers: Iterable[Helper]) -> None:
    """Start as many of these threads as the system has left."""
    for helper in helpers:
        try:
            helper.start()
        except RuntimeError:  # "can't start new thread"
            return


def raise_one(failures: list[BaseException], number: int) -> NoReturn:
    """Raise one of these exceptions, and forget all of them.

    An exception refers to the frames that it has passed, and a frame to the list: a cycle that would keep their tensors
    until the collector runs.
    """
    failure = failures[number]
    failures.clear()
    try:
        raise failure
    finally:
        del failure
