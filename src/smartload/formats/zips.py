"""Zip archives: which kind it is, by the names of its records."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Protocol

from smartload.errors import UnreadableError
from smartload.formats import torch_save as pickled
from smartload.reading.files import head
from smartload.reading.zip import Directory, read_directory
from smartload.records.checkpoint import Checkpoint
from smartload.records.data import ByteReader, Problem


class _Room(Protocol):
    def sniff_zip(self, names: Collection[str]) -> bool: ...

    def open_zip(self, file: ByteReader, directory: Directory) -> Checkpoint: ...


def _rooms() -> Iterator[_Room]:
    """The kinds of zips; all but that of `torch.save` are imported when they are needed."""
    yield pickled
    from smartload.formats import npz, torchscript
    from smartload.formats import torch_export as exported

    yield from (torchscript, exported, npz)


def sniff(file: ByteReader) -> bool:
    """Whether the file begins as a zip."""
    return head(file, 4) == b"PK\3\4"


def open(file: ByteReader) -> Checkpoint:
    """The names and spans of a zip, by the room for its kind."""
    if file.name.endswith(".distcp"):
        raise UnreadableError(Problem("dcp_file", file.name))
    directory = read_directory(file)
    names = frozenset(directory.names())
    for room in _rooms():
        if room.sniff_zip(names):
            return room.open_zip(file, directory)
    from smartload.formats import unsupported as lookalikes

    raise UnreadableError(lookalikes.name_zip(file, names))
