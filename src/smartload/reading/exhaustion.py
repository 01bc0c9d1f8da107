"""Tell what a process ran out of: whatever failed for it is no damage to the file, and no fault of the model's."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from smartload.errors import SmartLoadError, of_both_types
from smartload.reading.opening import base_name
from smartload.records.problems import Kind, Problem
from smartload.records.text import printable


@contextmanager
def exhaustion_told(path: object) -> Iterator[None]:
    """Refuse `path` where the block ends because the process has run out of something, and say of what.

    Raises:
        SmartLoadError: it has; also of the type that was raised, for those who catch it.
    """
    try:
        yield
    except SmartLoadError:
        raise
    except Exception as failure:
        kind = _what_ran_out(failure)
        if kind is None:
            raise
        # What the functions below held is given back first: the refusal itself needs some of it.
        traceback.clear_frames(failure.__traceback__)
        name = base_name(os.fsdecode(path)) if isinstance(path, (str, os.PathLike)) else ""
        error = printable(f"{type(failure).__name__}: {failure}".partition("\n")[0].removesuffix(": "))
        raise of_both_types(SmartLoadError, Problem(kind, name, {"error": error}), failure) from failure


def _what_ran_out(failure: Exception) -> Kind | None:
    """Give the kind of refusal for what `failure` says is used up; None where it says nothing of that."""
    # torch has a class for the memory of accelerators only, and its messages differ from system to system.
    text = str(failure) if isinstance(failure, RuntimeError) else ""
    if isinstance(failure, MemoryError) or "DefaultCPUAllocator" in text or "out of memory" in text:
        return "no-memory"
    if isinstance(failure, RecursionError):
        return "too-deep"
    # Of Python's own imports, too: what is rarely needed is imported late, and a library is not opened by Python.
    if isinstance(failure, OSError) and failure.errno in (errno.EMFILE, errno.ENFILE):
        return "no-descriptors"
    if isinstance(failure, ImportError) and os.strerror(errno.EMFILE) in str(failure):
        return "no-descriptors"
    return None
