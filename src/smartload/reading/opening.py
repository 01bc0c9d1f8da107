"""From a path or a file object to a reader of its bytes."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import stat
from typing import BinaryIO

from smartload.errors import CheckpointNotFoundError
from smartload.reading.files import BytesReader, FileReader, ObjectReader, io_problem
from smartload.records.problems import Problem
from smartload.records.text import printable


def base_name(path: str) -> str:
    """The last segment of `path`, as messages call the file."""
    return printable(os.path.basename(path.rstrip("/")) or path)


def open_path(path: str) -> FileReader:
    """The file at `path`, or CheckpointNotFoundError or UnreadableError with the reason."""
    if "\0" in path:
        raise ValueError("path must not contain a NUL character")
    name = base_name(path)
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointNotFoundError(Problem("not_found", printable(path), {"beside": _beside(path)})) from None
    except OSError as error:
        raise io_problem(name, error) from error
    try:
        return FileReader(fd, name, path=os.path.abspath(path))
    except BaseException:
        os.close(fd)
        raise


def open_object(file: BinaryIO) -> FileReader | ObjectReader | BytesReader:
    """A reader of a binary file object, from its present position on."""
    name = base_name(file.name) if isinstance(getattr(file, "name", None), str) else "the file object"
    raw = file.raw if type(file) is io.BufferedReader else file
    if type(raw) is io.FileIO and hasattr(os, "preadv"):
        # Only these two are known to show the bytes of their descriptor: a GzipFile has a fileno() as well.
        status = os.fstat(raw.fileno())
        if stat.S_ISREG(status.st_mode):
            return _duplicate(raw.fileno(), name, file.tell())
    if not _seekable(file):
        return BytesReader(file.read(), name)
    return ObjectReader(file, name)


def _duplicate(fd: int, name: str, start: int) -> FileReader:
    own = os.dup(fd)
    try:
        return FileReader(own, name, start)
    except BaseException:
        os.close(own)
        raise


def _seekable(file: BinaryIO) -> bool:
    try:
        file.seek(file.tell())
    except (OSError, AttributeError):
        return False
    return True


def names_in(path: str) -> list[str]:
    """The names in a folder, sorted; none where it cannot be listed."""
    with contextlib.suppress(OSError):
        return sorted(os.listdir(path))
    return []


def _beside(path: str) -> str:
    parent, wanted = os.path.split(path.rstrip("/"))
    names = names_in(parent or ".")
    close = difflib.get_close_matches(wanted, names[:10_000], n=5, cutoff=0.5)
    same = [name for name in names if os.path.splitext(name)[1] == os.path.splitext(wanted)[1] and name not in close]
    listed = ", ".join(printable(name) for name in (close + same)[:5])
    if listed:
        return f"Beside it lie: {listed}"
    return "No file of that kind lies beside it" if names else "Its folder is empty or not there"
