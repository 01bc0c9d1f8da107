"""Zip archives: which kind it is, by the names of its records."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from smartload.checkpoint import Checkpoint
from smartload.errors import UnreadableError
from smartload.records import ByteReader, Problem
from smartload.sources import exported, lookalikes, npz, pickled, torchscript
from smartload.sources.archive import Directory, read_directory
from smartload.sources.readers import head


class _Room(Protocol):
    def sniff_zip(self, names: Collection[str]) -> bool: ...

    def open_zip(self, file: ByteReader, directory: Directory) -> Checkpoint: ...


ZIPS: tuple[_Room, ...] = (pickled, torchscript, exported, npz)


def sniff(file: ByteReader) -> bool:
    """Whether the file begins as a zip."""
    return head(file, 4) == b"PK\3\4"


def open(file: ByteReader) -> Checkpoint:
    """The names and spans of a zip, by the room for its kind."""
    if file.name.endswith(".distcp"):
        raise UnreadableError(Problem("dcp_file", file.name))
    directory = read_directory(file)
    names = frozenset(directory.names())
    for room in ZIPS:
        if room.sniff_zip(names):
            return room.open_zip(file, directory)
    raise UnreadableError(lookalikes.name_zip(file, names))
