"""What can lie on disk: one room per kind of file, each a pair `sniff(file)` / `open(file)`."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import struct
from collections.abc import Iterator, Mapping
from typing import BinaryIO, Protocol, TypeAlias, cast

from smartload.errors import UnreadableError
from smartload.records import ByteReader, Checkpoint, Problem
from smartload.sources import lookalikes, memory, pickled
from smartload.sources.file import FileReader, ObjectReader, open_object, open_path

__all__ = ["Source", "open_checkpoint"]

Source: TypeAlias = "str | os.PathLike[str] | BinaryIO | Mapping[str, object]"


class _Room(Protocol):
    def sniff(self, file: ByteReader) -> bool: ...

    def open(self, file: ByteReader) -> Checkpoint: ...


SOURCES: tuple[_Room, ...] = (pickled,)
"""Asked in this order; the content decides, never the name."""


@contextlib.contextmanager
def open_checkpoint(path: Source) -> Iterator[Checkpoint]:
    """The names and spans of whatever lies at `path`; its files stay open until the `with` block ends.

    Args:
        path: a path, a binary file object (read from its present position), or a dict-like state dict.

    Raises:
        CheckpointNotFoundError, UnreadableError, UnsafeCheckpointError: with the reason.
        TypeError, ValueError: for an argument that cannot be a path.
    """
    if isinstance(path, Mapping):
        yield memory.open(path)
        return
    with contextlib.closing(_reader(path)) as file:
        yield _read(file)


def _reader(path: object) -> FileReader | ObjectReader:
    if isinstance(path, (str, os.PathLike)):
        text = os.fspath(path)
        if isinstance(text, str):
            return open_path(text)
    elif _is_binary_file(path):
        return open_object(cast("BinaryIO", path))
    what = "a file opened as text" if isinstance(path, io.TextIOBase) else str(type(path))
    raise TypeError(f"path must be a path, a binary file or a dict-like state dict, got {what}")


def _is_binary_file(value: object) -> bool:
    if isinstance(value, (type, io.TextIOBase)) or not callable(getattr(value, "read", None)):
        return False
    if getattr(value, "closed", False):
        raise ValueError("path is a file object that is closed")
    return isinstance(cast("BinaryIO", value).read(0), bytes)


def _read(file: ByteReader) -> Checkpoint:
    collecting = gc.isenabled()
    gc.disable()  # nothing here becomes garbage in cycles, and tracing what grows costs more than building it
    try:
        for room in SOURCES:
            if room.sniff(file):
                return room.open(file)
        raise UnreadableError(lookalikes.name(file))
    except (IndexError, KeyError, struct.error, ValueError, OverflowError, RecursionError, MemoryError):
        # Whatever a rule of the parsers did not foresee is damage, never an error of its own.
        raise UnreadableError(Problem("damaged", file.name)) from None
    finally:
        if collecting:
            gc.enable()
