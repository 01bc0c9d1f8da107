"""The stream that torch wrote before 1.6: five pickles one after the other, then the bytes of each storage."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import NamedTuple

from smartload.errors import UnreadableError
from smartload.pickles.contents import pickle_checkpoint
from smartload.pickles.inert import DictNote, PersistentId, Short, parse
from smartload.pickles.storages import Storage, StorageId, find_storages, storage_id
from smartload.pickles.tensors import Tensors
from smartload.reading.files import read_buffer, read_bytes, shorter
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import ByteReader
from smartload.records.problems import Problem
from smartload.records.text import printable

MAGIC = 0x1950A86A20F9469CFC6C
FIRST_PREFIX, GROWTH, MAX_PREFIX = 1 << 20, 4, 1 << 30


class Place(NamedTuple):
    """Where a storage lies: its first byte, its elements, its bytes."""

    offset: int
    numel: int
    nbytes: int


class Stream(NamedTuple):
    """What the pickles of a legacy file say, and where its storages lie."""

    root: object
    persistent_ids: list[PersistentId]
    places: Mapping[str, Place]


def sniff(file: ByteReader) -> bool:
    """Whether the first pickle of the file is torch's magic number, in any protocol."""
    head = read_bytes(file, 0, min(64, file.size))
    try:
        return parse(head, 0, file.name)[0] == MAGIC if head[:1] in (b"\x80", b"L", b"\x8a") else False
    except UnreadableError:
        return False


def open(file: ByteReader) -> Checkpoint:
    """The names and spans of a stream of before torch 1.6."""
    stream = read_stream(file)
    known = find_storages(stream.persistent_ids, lambda wanted: find(stream, wanted, file.name), file.name)
    tensors = Tensors(known.storages, file.name, 0)
    return pickle_checkpoint(file, "torch legacy", stream.root, tensors, tags=known.tags)


def read_stream(file: ByteReader) -> Stream:
    """The pickles of the file and the places of its storages, all of them checked to lie inside it."""
    prefix = Prefix(file, MAX_PREFIX)
    prefix.next()
    version, _ = prefix.next()
    if version != 1001 or type(version) is not int:
        raise UnreadableError(Problem("legacy_version", file.name))
    info, _ = prefix.next()
    if type(info) is not DictNote:
        raise UnreadableError(Problem("legacy", file.name))
    root, persistent_ids = prefix.next()
    keys, _ = prefix.next()
    if type(keys) is not list or not all(type(key) is str for key in keys) or len(set(keys)) != len(keys):
        raise UnreadableError(Problem("legacy", file.name))
    said = {found.key: found for pid in persistent_ids if (found := storage_id(pid, file.name)) is not None}
    return Stream(root, persistent_ids, _places(file, keys, said, prefix.pos))


def find(stream: Stream, wanted: StorageId, file: str) -> Storage:
    """Where the bytes of a storage lie."""
    if wanted.key not in stream.places:
        raise UnreadableError(Problem("record_missing", file, {"name": printable(wanted.key)}))
    offset, count, nbytes = stream.places[wanted.key]
    if count != wanted.numel:
        raise UnreadableError(
            Problem("record_size", file, {"name": printable(wanted.key), "have": count, "need": wanted.numel})
        )
    return Storage(offset, nbytes, wanted.dtype)


def _places(file: ByteReader, keys: list[str], said: Mapping[str, StorageId], pos: int) -> dict[str, Place]:
    places: dict[str, Place] = {}
    for key in keys:
        if key not in said:
            raise UnreadableError(Problem("legacy", file.name))
        count = int.from_bytes(read_bytes(file, pos, 8), "little", signed=True)
        nbytes = count * said[key].itemsize
        if count < 0 or count != said[key].numel:
            facts = {"name": printable(key), "have": count, "need": said[key].numel}
            raise UnreadableError(Problem("record_size", file.name, facts))
        if pos + 8 + nbytes > file.size:
            raise shorter(file.name, pos + 8 + nbytes, file.size)
        places[key] = Place(pos + 8, count, nbytes)
        pos += 8 + nbytes
    return places


class Prefix:
    """The beginning of the file, read as far as its pickles reach and never much further."""

    def __init__(self, file: ByteReader, most: int) -> None:
        self.pos = 0
        self._file, self._most = file, most
        self._data = read_buffer(file, 0, min(FIRST_PREFIX, file.size))

    def next(self) -> tuple[object, list[PersistentId]]:
        """The next pickle, and the persistent ids in it."""
        while True:
            whole = len(self._data) >= self._file.size
            with contextlib.suppress(Short):
                value, self.pos, persistent_ids = parse(self._data, self.pos, self._file.name, whole=whole)
                return value, persistent_ids
            self._grow()

    def _grow(self) -> None:
        if len(self._data) >= self._most:
            raise UnreadableError(Problem("pickle_large", self._file.name, {"size": len(self._data)}))
        size = min(len(self._data) * GROWTH, self._file.size)
        self._data = bytearray()  # the old is not needed while the new is read
        self._data = read_buffer(self._file, 0, size)
