"""Raise an exception at a chosen line of smartload, as Ctrl-C or a lack of memory does, and at another one after it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import smartload

SOURCES = Path(smartload.__file__).parent.as_posix()

PURE = ("errors", "match", "pickles", "records", "place", "formats/[a-z]", "reading/[a-eg-nq-z]")
"""What neither changes nor opens anything: it reads names, and compares them. Of `formats` all but the package itself,
of `reading` all but `files` and `opening`."""


class Interrupter:
    """Counts the lines of smartload that one call runs in this thread, and raises at some of them.

    Args:
        at: the numbers of the lines, counted from 0 as they are run, at which to raise.
        kind: what to raise.
        without: folders and files of smartload whose lines are not counted, as regular expressions.

    Attributes:
        lines: the lines that were run: file and number of the line.
        raised: how many exceptions were raised.
    """

    def __init__(
        self, at: Collection[int] = (), kind: type[BaseException] = KeyboardInterrupt, without: Sequence[str] = PURE
    ) -> None:
        self._at, self._kind = frozenset(at), kind
        self._counted = re.compile(rf"{re.escape(SOURCES)}.(?!{'|'.join(without) or '^'})")
        self.lines: list[tuple[str, int]] = []
        self.raised = 0
        self._known: dict[str, bool] = {}

    def run(self, act: Callable[[], object]) -> BaseException | None:
        """Call `act`; give what it raises, without tracebacks, which would keep all that it had in hand."""
        before = sys.gettrace()  # of what measures the coverage of the tests
        sys.settrace(self._enter)
        try:
            act()
        except BaseException as failure:
            sys.settrace(None)
            todo: list[BaseException | None] = [failure]
            for each in todo:
                if each is not None and each.__traceback__ is not None:
                    each.__traceback__ = None
                    todo += [each.__context__, each.__cause__]
            return failure
        finally:
            sys.setprofile(None)
            sys.settrace(before)
        return None

    def _enter(self, frame: FrameType, event: str, arg: object) -> Any:
        file = frame.f_code.co_filename
        if file not in self._known:
            self._known[file] = self._counted.match(file.replace(os.sep, "/")) is not None
        return self._line if self._known[file] else None

    def _line(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "line":
            number = len(self.lines)
            self.lines.append((Path(frame.f_code.co_filename).name, frame.f_lineno))
            if number in self._at:
                self.raised += 1
                # Python stops tracing when the function that traces raises. Profiling goes on, and starts it again.
                sys.setprofile(self._trace_again)
                raise self._kind
        return self._line

    def _trace_again(self, frame: FrameType, event: str, arg: object) -> None:
        sys.setprofile(None)
        above: FrameType | None = frame
        while above is not None:
            if self._enter(above, "call", None) is not None:
                above.f_trace = self._line
            above = above.f_back
        sys.settrace(self._enter)
