"""What can lie on disk: one room per kind of file, each a pair `sniff(file)` / `open(file)`."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import BinaryIO, Protocol, TypeAlias, cast

from smartload.errors import UnreadableError
from smartload.formats import safetensors, torch_legacy, torch_save
from smartload.reading import gzip as compressed
from smartload.reading.files import head
from smartload.reading.opening import base_name, names_in, open_object, open_path
from smartload.reading.zip import Directory, read_directory
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import ByteReader
from smartload.records.problems import Problem
from smartload.records.text import printable, size_text

__all__ = ["Source", "open_checkpoint"]

MAX_TEXT = 1 << 27
"""Characters of all names of a checkpoint."""

Source: TypeAlias = "str | os.PathLike[str] | BinaryIO | Mapping[str, object]"


class FileFormat(Protocol):
    """A kind of file, by its content; the name of a file is no more than a hint."""

    def sniff(self, file: ByteReader) -> bool:
        """Tell whether the file is of this kind."""

    def open(self, file: ByteReader) -> Checkpoint:
        """Read the names and spans of the file; UnreadableError where it breaks a rule."""


class ZipFormat(Protocol):
    """A kind of zip archive, by the names of its records."""

    def sniff_zip(self, names: Collection[str]) -> bool:
        """Tell whether a zip with these records is of this kind."""

    def open_zip(self, file: ByteReader, directory: Directory) -> Checkpoint:
        """Read the names and spans of the zip; UnreadableError where it breaks a rule."""


def file_formats() -> Iterator[FileFormat]:
    """Give the kinds of files that are no zip, in the order in which they are asked.

    Those that are rare are imported when the others have said no. To add a format, add its module here.
    """
    yield from (torch_legacy, safetensors)
    from smartload.formats import pickle_file, sharded

    yield from (pickle_file, sharded)


def zip_formats() -> Iterator[ZipFormat]:
    """Give the kinds of zips, in the order in which they are asked; all but that of `torch.save` are rare."""
    yield torch_save
    from smartload.formats import npz, torch_export, torchscript

    yield from (torchscript, torch_export, npz)


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
        checkpoint = _in_memory(path) if isinstance(path, Mapping) else _opened(_path_or_file(path), stack)
        for file in checkpoint.files:
            stack.callback(file.close)
        _check_unique(checkpoint)
        yield checkpoint


def _check_unique(checkpoint: Checkpoint) -> None:
    """UnreadableError where two dicts give one dotted name: "m.w" at the top, and "w" in the dict "m"."""
    if len(checkpoint.entries) < sum(map(len, checkpoint.keys.values())):
        seen: set[str] = set()
        dotted = (key.dotted for keys in checkpoint.keys.values() for key in keys)
        twice = next(name for name in dotted if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise UnreadableError(Problem("key_twice", checkpoint.path, {"name": printable(twice)}))


def _in_memory(given: Mapping[str, object]) -> Checkpoint:
    from smartload.formats import in_memory

    return in_memory.open(given)


def _path_or_file(path: object) -> str | BinaryIO:
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
    if head(file, 4) == b"PK\3\4":
        return _read_zip(file)
    for kind in file_formats():
        if kind.sniff(file):
            return kind.open(file)
    from smartload.formats import unsupported

    raise UnreadableError(unsupported.name(file))


def _read_zip(file: ByteReader) -> Checkpoint:
    if file.name.endswith(".distcp"):
        raise UnreadableError(Problem("dcp_file", file.name))
    directory = read_directory(file)
    names = frozenset(directory.names())
    for kind in zip_formats():
        if kind.sniff_zip(names):
            return kind.open_zip(file, directory)
    from smartload.formats import unsupported

    raise UnreadableError(unsupported.name_zip(file, names))


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    """Give the checkpoint, if its dotted names are of the length that models have."""
    text = sum(sum(map(len, part.entries)) + len(path) * len(part.entries) for path, part in checkpoint.parts.items())
    if text > MAX_TEXT:
        raise UnreadableError(Problem("names_long", checkpoint.path, {"limit": size_text(MAX_TEXT)}))
    return checkpoint


def _guarded(name: str, read: Callable[[], Checkpoint]) -> Checkpoint:
    try:
        return _checked(read())
    except (IndexError, KeyError, struct.error, ValueError, OverflowError, RecursionError, MemoryError):
        # Whatever a rule of the parsers did not foresee is damage, never an error of its own.
        raise UnreadableError(Problem("damaged", name)) from None
