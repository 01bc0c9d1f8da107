"""Open the stream that torch wrote before 1.6, and still writes on request.

It is five pickles one after the other (a magic number, a version, facts of the system, the value that was saved, the
keys of the storages), then the storages in the order of those keys: the number of elements, and their bytes.
"""

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
# The pickles end somewhere in the first bytes of the file, nobody says where; the weights behind them need not be read.
# So a prefix is parsed: at first 1 MiB, the names of thousands of tensors. Where a pickle goes on behind it, four times
# as much is read, so that all parsing in vain costs a third of the last. What takes over 1 GiB is more than names.
FIRST_PREFIX, GROWTH, MAX_PREFIX = 1 << 20, 4, 1 << 30


class StorageRange(NamedTuple):
    """Where a storage lies in the stream: its first byte, its number of elements, its bytes."""

    offset: int
    numel: int
    nbytes: int


class Stream(NamedTuple):
    """What the pickles of a legacy file hold, and where its storages lie.

    Attributes:
        root: the value that was saved, as inert notes.
        persistent_ids: all persistent ids in it.
        ranges: key of each storage -> where it lies.
    """

    root: object
    persistent_ids: list[PersistentId]
    ranges: Mapping[str, StorageRange]


def sniff(file: ByteReader) -> bool:
    """Tell whether the first pickle of `file` is torch's magic number, in any pickle protocol."""
    head = read_bytes(file, 0, min(64, file.size))  # the number takes 28 bytes at most
    try:
        # PROTO, or the number at once: as text in protocols 0 and 1, as LONG1.
        return parse(head, 0, file.name)[0] == MAGIC if head[:1] in (b"\x80", b"L", b"\x8a") else False
    except UnreadableError:
        return False


def open(file: ByteReader) -> Checkpoint:
    """Read the names and spans of a stream of before torch 1.6.

    Raises:
        UnreadableError: the stream is corrupt, truncated, or not as torch writes it.
        UnsafeCheckpointError: its pickle tries to change what it merely names.
    """
    stream = read_stream(file)
    storages, tags = find_storages(
        stream.persistent_ids, lambda reference: storage_of(stream, reference, file.name), file.name
    )
    tensors = Tensors(storages, file.name, 0)
    return pickle_checkpoint(file, "torch legacy", stream.root, tensors, tags=tags)


def read_stream(file: ByteReader) -> Stream:
    """Read the pickles of `file` and the ranges of its storages, all of them checked to lie inside it.

    Checked before anything is allocated for a tensor: the numbers of elements are the file's word alone.
    """
    prefix = Prefix(file, MAX_PREFIX)
    prefix.next_pickle()  # the magic number, which `sniff` has compared
    version, _ = prefix.next_pickle()
    if version != 1001 or type(version) is not int:  # 1001.0 would be equal
        raise UnreadableError(Problem("legacy_version", file.name))
    # The facts of the system are not used. They name its byte order, but torch writes little-endian on any system.
    info, _ = prefix.next_pickle()
    if type(info) is not DictNote:
        raise UnreadableError(Problem("legacy", file.name))
    root, persistent_ids = prefix.next_pickle()
    keys, _ = prefix.next_pickle()
    # A key given twice would have two ranges: torch and smartload could take different ones.
    if type(keys) is not list or not all(type(key) is str for key in keys) or len(set(keys)) != len(keys):
        raise UnreadableError(Problem("legacy", file.name))
    # None stands for the class of a pickled module, whose source the stream may bring along; it is not looked at.
    references = {
        reference.key: reference for pid in persistent_ids if (reference := storage_id(pid, file.name)) is not None
    }
    return Stream(root, persistent_ids, _storage_ranges(file, keys, references, prefix.position))


def storage_of(stream: Stream, reference: StorageId, file: str) -> Storage:
    """Give where the bytes of the storage lie that `reference`, a persistent id, names.

    Raises:
        UnreadableError: the storage is not in the stream, or another persistent id gave it another size.
    """
    if reference.key not in stream.ranges:
        raise UnreadableError(Problem("record_missing", file, {"name": printable(reference.key)}))
    offset, count, nbytes = stream.ranges[reference.key]
    if count != reference.numel:
        raise UnreadableError(
            Problem("record_size", file, {"name": printable(reference.key), "have": count, "need": reference.numel})
        )
    return Storage(offset, nbytes, reference.dtype)


def _storage_ranges(
    file: ByteReader, keys: list[str], references: Mapping[str, StorageId], position: int
) -> dict[str, StorageRange]:
    """Find where each storage lies, by its number of elements in the stream; raise UnreadableError where one is odd.

    Args:
        file: the stream.
        keys: the keys of the storages, in their order in the stream.
        references: key -> what a persistent id says of the storage; the size of an element stands nowhere else.
        position: where the first storage begins.
    """
    ranges: dict[str, StorageRange] = {}
    for key in keys:
        if key not in references:  # without the size of its elements, none of those behind it can be found
            raise UnreadableError(Problem("legacy", file.name))
        reference = references[key]
        count = int.from_bytes(read_bytes(file, position, 8), "little", signed=True)
        nbytes = count * reference.itemsize
        if count < 0 or count != reference.numel:
            facts = {"name": printable(key), "have": count, "need": reference.numel}
            raise UnreadableError(Problem("record_size", file.name, facts))
        if position + 8 + nbytes > file.size:
            raise shorter(file.name, position + 8 + nbytes, file.size)
        ranges[key] = StorageRange(position + 8, count, nbytes)
        position += 8 + nbytes
    return ranges


class Prefix:
    """The beginning of a file, read as far as its pickles reach and never much further.

    Attributes:
        position: the byte behind the last pickle that was parsed.
    """

    def __init__(self, file: ByteReader, most: int) -> None:
        self.position = 0
        self._file, self._most = file, most
        self._data = read_buffer(file, 0, min(FIRST_PREFIX, file.size))

    def next_pickle(self) -> tuple[object, list[PersistentId]]:
        """Parse the next pickle: its value, and the persistent ids in it.

        Raises:
            UnreadableError: it is damaged, or does not end within the bytes that may be read.
        """
        while True:
            is_all = len(self._data) >= self._file.size
            with contextlib.suppress(Short):  # raised only where more of the file can be read
                value, self.position, persistent_ids = parse(self._data, self.position, self._file.name, whole=is_all)
                return value, persistent_ids
            if len(self._data) >= self._most:
                raise UnreadableError(Problem("pickle_large", self._file.name, {"size": len(self._data)}))
            size = min(len(self._data) * GROWTH, self._file.size)
            self._data = bytearray()  # the old prefix is not needed while the new one is read
            self._data = read_buffer(self._file, 0, size)
