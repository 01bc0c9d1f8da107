"""Open a path or a file object as a reader of its bytes."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import stat
from typing import BinaryIO

from smartload.errors import CheckpointNotFoundError, UnreadableError
from smartload.reading.files import (
    SHARED_DESCRIPTOR,
    BytesReader,
    FileReader,
    ObjectReader,
    io_problem,
)
from smartload.records.problems import Problem
from smartload.records.text import LONGEST_PATH, printable

_SEPARATORS = os.sep + (os.altsep or "")  # on Windows both "\\" and "/"


def base_name(path: str) -> str:
    """Give the last segment of `path`, as messages call the file: '/data/net.pth' -> 'net.pth'."""
    return printable(os.path.basename(path.rstrip(_SEPARATORS)) or path)  # the root folder has no segment


def open_path(path: str) -> FileReader:
    """Open the file at `path`.

    Raises:
        CheckpointNotFoundError: there is none; the message names what lies beside.
        UnreadableError: it cannot be opened, is no regular file, or is being written.
        ValueError: the path has a NUL character.
    """
    # The system would end the path there, and os.open raises a ValueError that does not name the argument.
    if "\0" in path:
        raise ValueError("path must not contain a NUL character")
    name = base_name(path)
    try:
        return FileReader(path, name)
    except (FileNotFoundError, NotADirectoryError):  # the second: a file where the path has a folder
        raise CheckpointNotFoundError(
            Problem("not_found", printable(path, LONGEST_PATH), {"beside": _beside(path)})
        ) from None
    except OSError as error:
        if os.path.isdir(path):  # Windows opens no folder, and says only that it is not permitted
            raise UnreadableError(Problem("not_regular", name, {"what": "a folder"})) from None
        raise io_problem(name, error) from error  # also a volume of Windows, which can be opened and has no status


def open_object(file: BinaryIO) -> FileReader | ObjectReader | BytesReader:
    """Open a reader of a binary file object, from its present position on.

    A regular file is read by a duplicate of its descriptor, which is faster and lets threads read at once; other
    seekable objects, and files where a duplicate would move the position of the original, are read by seek and read;
    what cannot seek is read into memory.
    """
    name = base_name(file.name) if isinstance(getattr(file, "name", None), str) else "the file object"
    raw = file.raw if type(file) is io.BufferedReader else file
    if type(raw) is io.FileIO:
        # Exactly these two classes give the bytes of their descriptor: a GzipFile, say, has a fileno() as well.
        status = os.fstat(raw.fileno())
        if stat.S_ISREG(status.st_mode):
            if not SHARED_DESCRIPTOR:
                return ObjectReader(file, name, raw.fileno())
            return FileReader(raw.fileno(), name, file.tell())
    if not _seekable(file):
        return BytesReader(file.read(), name)
    return ObjectReader(file, name)


def _seekable(file: BinaryIO) -> bool:
    """Tell whether the file object can seek; by a try, since not every object has `seekable()`."""
    try:
        file.seek(file.tell())
    except (OSError, AttributeError):
        return False
    return True


def names_in(path: str) -> list[str]:
    """List the names in the folder `path`, sorted; none where it cannot be listed."""
    with contextlib.suppress(OSError):
        return sorted(os.listdir(path))
    return []


def _beside(path: str) -> str:
    """Say what lies beside a missing file: five names at most, the similar ones first, then those with its suffix."""
    parent, missing = os.path.split(path.rstrip(_SEPARATORS))
    names = names_in(parent or ".")
    # Only of so many: difflib takes about a second for them.
    close = difflib.get_close_matches(missing, names[:10_000], n=5, cutoff=0.5)
    suffix = os.path.splitext(missing)[1]
    same = [name for name in names if os.path.splitext(name)[1] == suffix and name not in close]
    listed = ", ".join(printable(name) for name in (close + same)[:5])
    if listed:
        return f"Beside it lie: {listed}"
    return "No file of that kind lies beside it" if names else "Its folder is empty or not there"
