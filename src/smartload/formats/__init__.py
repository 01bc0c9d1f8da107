"""Open a checkpoint of any format: `open_checkpoint(path)` gives the names in it, and where the bytes of each lie.

How the pieces follow each other: a path, a file object or a dict comes in; a folder is reduced to the one file in it
that counts (or read as a whole, see `dcp`); gzip is unpacked; then the content of the file decides its format, and
the module of that format reads names, shapes and spans. No tensor is built here, and nothing that a file says is run.

A format is a module of this folder with two functions, in one of two forms:

- `sniff(file)` and `open(file)` for a kind of file (see `FileFormat`);
- `sniff_zip(names)` and `open_zip(file, directory)` for a kind of zip archive (see `ZipFormat`).

The first function tells whether the content is of the format, the second returns a `Checkpoint`: the parts with one
entry a key (for a tensor a `Span`: file, offset, bytes, dtype, shape, strides), the open files that the spans refer to
by number, the zip records whose checksums can be compared later, and whatever else lies beside the weights. It raises
UnreadableError where the file breaks a rule of its format. To add a format, write such a module and list it in
`file_formats` or `zip_formats`. `in_memory` and `dcp` are opened by `_open_source`, since neither is one file.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import struct
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import BinaryIO, Protocol, TypeAlias, cast

from smartload.errors import UnreadableError
from smartload.formats import safetensors, torch_legacy, torch_save
from smartload.reading import gzip as compressed
from smartload.reading.exhaustion import exhaustion_told
from smartload.reading.files import head
from smartload.reading.opening import base_name, names_in, open_object, open_path
from smartload.reading.zip import Directory, read_directory
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import ByteReader
from smartload.records.problems import Problem
from smartload.records.text import size_text

__all__ = ["Source", "open_checkpoint"]

# Characters of all dotted names of a checkpoint. A name is the path of its dict and its key: a hostile file can put
# many short keys below one very long path, so that the names take far more memory than the file. A million keys of
# a hundred characters stay below the limit.
MAX_TEXT = 1 << 27
# Characters of all module paths above the names, each path once for each name. Loading and converting ask for them, and
# they grow with the square of the segments: a name of nothing but 80,000 dots has 6 GB of them.
MAX_PATHS = 1 << 29
DEEP = 64  # Segments of a name above which its paths are counted; real names have fewer than twenty.

Source: TypeAlias = "str | os.PathLike[str] | BinaryIO | Mapping[str, object]"


class FileFormat(Protocol):
    """A module that reads one kind of file. The content decides: the suffix of a file is no more than a hint."""

    def sniff(self, file: ByteReader) -> bool:
        """Tell whether `file` is of this kind, by as little of its content as is sure."""

    def open(self, file: ByteReader) -> Checkpoint:
        """Read the names and spans of `file`; raise UnreadableError where it breaks a rule of its format."""


class ZipFormat(Protocol):
    """A module that reads one kind of zip archive. The names of the records decide."""

    def sniff_zip(self, names: Collection[str]) -> bool:
        """Tell whether a zip with records of these names is of this kind."""

    def open_zip(self, file: ByteReader, directory: Directory) -> Checkpoint:
        """Read the names and spans of the zip `file`; raise UnreadableError where it breaks a rule of its format."""


def file_formats() -> Iterator[FileFormat]:
    """Give the formats of files that are no zip, in the order in which they are asked to sniff.

    To add a format, add its module here. Rare formats are imported only after the common ones have said no.
    """
    # Both come before plain pickles: a legacy file of torch begins with a pickle, and the length of a safetensors
    # header may begin with the bytes of one (a header of 640 bytes gives 80 02).
    yield from (torch_legacy, safetensors)
    from smartload.formats import pickle_file, sharded

    yield from (pickle_file, sharded)


def zip_formats() -> Iterator[ZipFormat]:
    """Give the formats of zips, in the order in which they are asked to sniff.

    To add a format, add its module here. All but that of `torch.save` are rare, and imported only when it said no.
    """
    yield torch_save
    from smartload.formats import npz, torch_export, torchscript

    yield from (torchscript, torch_export, npz)


@contextlib.contextmanager
def open_checkpoint(path: Source) -> Iterator[Checkpoint]:
    """Open the checkpoint at `path` and read its names and spans; its files are closed when the `with` block ends.

    Args:
        path: a file, a folder, a binary file object (read from its present position), or a dict-like state dict.

    Raises:
        CheckpointNotFoundError, UnreadableError, UnsafeCheckpointError: with the reason.
        SmartLoadError: the process ran out of memory, nested calls or open files, in this block too.
        TypeError, ValueError: for an argument that cannot be a path.
    """
    stack = contextlib.ExitStack()
    with exhaustion_told(path):  # outermost, so that all is closed and given back when it is told
        # Twice the same: an interrupt may come in the very line that closes, and the caller's file object must get back
        # its position.
        try:
            try:
                with _collector_resting():
                    checkpoint = _open_source(path, stack)
                for file in checkpoint.files:
                    stack.callback(file.close)
                yield checkpoint
            finally:
                stack.close()
        finally:
            stack.close()


@contextlib.contextmanager
def _collector_resting() -> Iterator[None]:
    """Switch the garbage collector off for the block, where nobody could notice: where there is no other thread.

    Reading names makes very many containers and no reference cycles, and each full collection walks through all of them
    again: a quarter of the time of a load of 20,000 small tensors. The switch is the whole process's, so that a thread
    beside would go without a collector, or its own use of the switch would be undone.
    """
    if not gc.isenabled() or not _is_only_thread():
        yield
        return
    try:
        try:
            gc.disable()
            yield
        finally:
            gc.enable()
    finally:  # once more, should Ctrl-C have come in the line above
        gc.enable()


def _is_only_thread() -> bool:
    # Counts threads that were not started by `threading`, too.
    return len(sys._current_frames()) == 1


def _path_or_file(path: object) -> str | BinaryIO:
    """Give `path` as a str, or as the binary file object that it is; raise TypeError or ValueError for the rest."""
    if isinstance(path, (str, os.PathLike)):
        text = os.fspath(path)
        if isinstance(text, str):
            return text
    elif _is_binary_file(path):
        return cast("BinaryIO", path)
    what = "a file opened as text" if isinstance(path, io.TextIOBase) else str(type(path))
    raise TypeError(f"path must be a path, a binary file or a dict-like state dict, got {what}")


def _is_binary_file(value: object) -> bool:
    """Tell whether `value` is an open file that gives bytes; raise ValueError where it is closed."""
    # A class has a `read`, too: io.BytesIO without its parentheses is no file.
    if isinstance(value, (type, io.TextIOBase)) or not callable(getattr(value, "read", None)):
        return False
    if getattr(value, "closed", False):
        raise ValueError("path is a file object that is closed")
    # Only what it reads tells text from bytes, where the object is of a class of its own; nothing is consumed.
    return isinstance(cast("BinaryIO", value).read(0), bytes)


def _open_source(path: Source, stack: contextlib.ExitStack) -> Checkpoint:
    """Open what the caller gave for `path`, whatever it is, as a checkpoint.

    Args:
        path: as in `open_checkpoint`.
        stack: closes the file that is opened here. The checkpoint need not list it, where it was unpacked say; and
            an error may come before there is a checkpoint. Closing it twice does no harm.
    """
    if isinstance(path, Mapping):
        from smartload.formats import in_memory

        # Not guarded: an error in the caller's own objects is no damage to a file.
        return in_memory.open(path)
    source = _path_or_file(path)
    # The .metadata of a distributed checkpoint stands for its folder: by itself it holds names and no weights.
    if isinstance(source, str) and (os.path.isdir(source) or os.path.basename(source) == ".metadata"):
        from smartload.formats import dcp, sharded

        folder = source if os.path.isdir(source) else os.path.dirname(source) or "."
        if dcp.sniff(names_in(folder)):
            return _guarded(base_name(folder), lambda: dcp.open(folder))
        source = sharded.choose_file(folder)
    file = open_path(source) if isinstance(source, str) else open_object(source)
    stack.callback(file.close)
    return _guarded(file.name, lambda: _read_file(file))


def _read_file(file: ByteReader) -> Checkpoint:
    """Read the checkpoint in `file`, which gzip may have packed as a whole."""
    if compressed.sniff(file):
        checkpoint = _read_unpacked(compressed.unpacked(file))
        return replace(checkpoint, format=f"{checkpoint.format}, gzip")
    return _read_unpacked(file)


def _read_unpacked(file: ByteReader) -> Checkpoint:
    """Read the checkpoint in `file` by the first format that knows it; say by name what it is where none does."""
    if head(file, 4) == b"PK\3\4":
        return _read_zip(file)
    for file_format in file_formats():
        if file_format.sniff(file):
            return file_format.open(file)
    from smartload.formats import unsupported

    raise UnreadableError(unsupported.name_file(file))


def _read_zip(file: ByteReader) -> Checkpoint:
    """Read the checkpoint in the zip `file` by the first format that knows its records."""
    # A rank's file of a distributed checkpoint is many zips, one behind the other: as one zip it would look damaged.
    # Its names lie in the .metadata beside it, so it is not worth a look inside.
    if file.name.endswith(".distcp"):
        raise UnreadableError(Problem("dcp_file", file.name))
    directory = read_directory(file)
    names = frozenset(directory.names())
    for zip_format in zip_formats():
        if zip_format.sniff_zip(names):
            return zip_format.open_zip(file, directory)
    from smartload.formats import unsupported

    raise UnreadableError(unsupported.name_zip(file, names))


def _paths_above(path: str, keys: Iterable[str]) -> int:
    """Count the characters of the module paths above the deep keys of one state dict, of which `path` is the path."""
    above = len(path) * path.count(".") if len(path) > DEEP else 0
    for key in keys:
        if len(key) > DEEP and (segments := key.count(".")) > DEEP:  # nearly no real key is so long
            above += segments * (len(path) + len(key))
    return above


def _guarded(name: str, read: Callable[[], Checkpoint]) -> Checkpoint:
    """Give what `read` returns; refuse the file called `name` where reading fails, or its names are far too long."""
    try:
        checkpoint = read()
        # Counted before the dotted names are made: `Checkpoint.entries` would take the memory that is at stake.
        parts = checkpoint.parts.items()
        text = sum(sum(map(len, part.entries)) + len(path) * len(part.entries) for path, part in parts)
        if text > MAX_TEXT:
            raise UnreadableError(Problem("names_long", checkpoint.path, {"limit": size_text(MAX_TEXT)}))
        if sum(_paths_above(path, part.entries) for path, part in parts) > MAX_PATHS:
            raise UnreadableError(Problem("names_deep", checkpoint.path))
        return checkpoint
    except (IndexError, KeyError, TypeError, struct.error, ValueError, OverflowError):
        # Whatever a rule of the parsers did not foresee is damage, never an error of its own.
        raise UnreadableError(Problem("damaged", name)) from None
