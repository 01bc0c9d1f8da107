"""What can lie on disk: one room per kind of file, each a pair `sniff(file)` / `open(file)`."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import BinaryIO, Protocol, TypeAlias, cast

from smartload.errors import UnreadableError
from smartload.formats import safetensors, zips
from smartload.formats import torch_save as pickled
from smartload.reading import gzip as compressed
from smartload.reading.naming import base_name
from smartload.reading.opening import names_in, open_object, open_path
from smartload.records.checkpoint import Checkpoint
from smartload.records.data import ByteReader, Problem
from smartload.records.text import size

__all__ = ["Source", "open_checkpoint"]

MAX_TEXT = 1 << 27
"""Characters of all names of a checkpoint."""

Source: TypeAlias = "str | os.PathLike[str] | BinaryIO | Mapping[str, object]"


class _Room(Protocol):
    def sniff(self, file: ByteReader) -> bool: ...

    def open(self, file: ByteReader) -> Checkpoint: ...


def _rooms() -> Iterator[_Room]:
    """The rooms in the order in which they are asked; the rare ones are imported when the others have said no.

    The content decides, never the name.
    """
    yield from (zips, pickled, safetensors)
    from smartload.formats import pickle_file as plain
    from smartload.formats import sharded

    yield from (plain, sharded)


@contextlib.contextmanager
def open_checkpoint(path: Source) -> Iterator[Checkpoint]:
    """The names and spans of whatever lies at `path`; its files stay open until the `with` block ends.

    As long as it lasts the garbage collector rests: a load leaves no cycles behind, and tracing the model and the
    notes of a file again and again takes as long as building them.

    Args:
        path: a file, a folder, a binary file object (read from its present position), or a dict-like state dict.

    Raises:
        CheckpointNotFoundError, UnreadableError, UnsafeCheckpointError: with the reason.
        TypeError, ValueError: for an argument that cannot be a path.
    """
    with contextlib.ExitStack() as stack:
        if gc.isenabled():
            stack.callback(gc.enable)
            gc.disable()
        checkpoint = _in_memory(path) if isinstance(path, Mapping) else _opened(_told(path), stack)
        for file in checkpoint.files:
            stack.callback(file.close)
        yield checkpoint


def _in_memory(given: Mapping[str, object]) -> Checkpoint:
    from smartload.formats import in_memory as memory

    return memory.open(given)


def _told(path: object) -> str | BinaryIO:
    """The path or the file object that was given."""
    if isinstance(path, (str, os.PathLike)):
        text = os.fspath(path)
        if isinstance(text, str):
            return text
    elif _is_binary_file(path):
        return cast("BinaryIO", path)
    what = "a file opened as text" if isinstance(path, io.TextIOBase) else str(type(path))
    raise TypeError(f"path must be a path, a binary file or a dict-like state dict, got {what}")


def _is_binary_file(value: object) -> bool:
    if isinstance(value, (type, io.TextIOBase)) or not callable(getattr(value, "read", None)):
        return False
    if getattr(value, "closed", False):
        raise ValueError("path is a file object that is closed")
    return isinstance(cast("BinaryIO", value).read(0), bytes)


def _opened(path: str | BinaryIO, stack: contextlib.ExitStack) -> Checkpoint:
    """The checkpoint; `stack` closes what it does not list among its files."""
    if isinstance(path, str) and (os.path.isdir(path) or os.path.basename(path) == ".metadata"):
        from smartload.formats import dcp, sharded

        folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
        if dcp.sniff(names_in(folder)):
            return _guarded(base_name(folder), lambda: dcp.open(folder))
        path = sharded.choose(folder)
    file = open_path(path) if isinstance(path, str) else open_object(path)
    stack.callback(file.close)
    return _guarded(file.name, lambda: _read(file))


def _read(file: ByteReader) -> Checkpoint:
    if compressed.sniff(file):
        found = _read_as(compressed.unpacked(file))
        return replace(found, format=f"{found.format}, gzip")
    return _read_as(file)


def _read_as(file: ByteReader) -> Checkpoint:
    for room in _rooms():
        if room.sniff(file):
            return room.open(file)
    from smartload.formats import unsupported as lookalikes

    raise UnreadableError(lookalikes.name(file))


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, if its dotted names are no longer than those of models; a part's path counts once a name."""
    text = sum(sum(map(len, part.entries)) + len(path) * len(part.entries) for path, part in checkpoint.parts.items())
    if text > MAX_TEXT:
        raise UnreadableError(Problem("names_long", checkpoint.path, {"limit": size(MAX_TEXT)}))
    return checkpoint


def _guarded(name: str, read: Callable[[], Checkpoint]) -> Checkpoint:
    try:
        return _checked(read())
    except (IndexError, KeyError, struct.error, ValueError, OverflowError, RecursionError, MemoryError):
        # Whatever a rule of the parsers did not foresee is damage, never an error of its own.
        raise UnreadableError(Problem("damaged", name)) from None
