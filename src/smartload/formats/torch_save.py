"""Files of `torch.save`: the zip of today and the plain stream of before torch 1.6."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from smartload.pickles.contents import pickle_checkpoint
from smartload.pickles.inert import PersistentId, parse
from smartload.pickles.storages import Storage, StorageId, find_storages
from smartload.pickles.tensors import Tensors, untagged
from smartload.reading.zip import Directory, broken, read_archive, read_record
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import ByteReader, ZipRecord
from smartload.records.text import printable

MAX_SMALL = 16
"""`byteorder` and `version` are a word each."""
MAX_PICKLE = 1 << 30


def sniff_zip(names: Collection[str]) -> bool:
    """Whether a zip with these records is one of `torch.save`."""
    return "data.pkl" in names and "constants.pkl" not in names


def open_zip(file: ByteReader, directory: Directory) -> Checkpoint:
    """The names and spans of a zip of `torch.save`."""
    found = read_zip(file, directory)
    return pickle_checkpoint(file, "torch zip", found.root, found.tensors, found.records, found.tags)


class Saved(NamedTuple):
    """The value that a zip of `torch.save` holds, and what knows its tensors."""

    root: object
    tensors: Tensors
    records: Collection[ZipRecord]
    tags: Mapping[str, int]


def read_zip(file: ByteReader, directory: Directory) -> Saved:
    """What was saved, whatever it is."""
    archive = TorchZip(file, directory)
    root, persistent_ids, entry = archive.pickle("data.pkl")
    known = find_storages(persistent_ids, archive.storage, file.name)
    tensors = Tensors(known.storages, file.name, entry.offset)
    return Saved(untagged(root), tensors, archive.used.values(), known.tags)


class TorchZip:
    """The records of a zip that torch wrote, and what they hold."""

    def __init__(self, file: ByteReader, directory: Directory) -> None:
        self._file, self.entries = file, read_archive(file, directory)
        self.used: dict[str, ZipRecord] = {}
        """Those that are storages of tensors."""
        self._small("version")
        self._big_endian = self._is_big_endian()

    def pickle(self, name: str) -> tuple[object, list[PersistentId], ZipRecord]:
        """The value of a record that is a pickle, the persistent ids in it, and where it lies."""
        entry = self.entries.get(name)
        if entry is None:
            raise broken(self._file, "record_missing", name=name)
        if entry.packed is not None:
            raise broken(self._file, "zip_packed", name=name)
        if entry.nbytes > MAX_PICKLE:
            raise broken(self._file, "pickle_large", size=entry.nbytes)
        root, _, persistent_ids = parse(read_record(self._file, entry), 0, self._file.name)
        return root, persistent_ids, entry

    def raw(self, name: str, dtype: str = "") -> Storage:
        """Where the bytes of a record lie that is a storage."""
        entry = self.entries.get(name)
        if entry is None:
            raise broken(self._file, "record_missing", name=printable(name))
        if entry.packed is not None:
            raise broken(self._file, "zip_packed", name=printable(name))
        self.used[entry.name] = entry
        return Storage(entry.offset, entry.nbytes, dtype, self._big_endian)

    def storage(self, wanted: StorageId) -> Storage:
        """Where the bytes of a storage lie that a persistent id names."""
        name, need = f"data/{wanted.key}", wanted.numel * wanted.itemsize
        found = self.raw(name, wanted.dtype)
        if found.nbytes != need:
            raise broken(self._file, "record_size", name=printable(name), have=found.nbytes, need=need)
        return found

    def _small(self, name: str) -> bytes | None:
        entry = self.entries.get(name)
        if entry is None:
            return None
        if entry.nbytes > MAX_SMALL:
            raise broken(self._file, "record_odd", name=name)
        return read_record(self._file, entry)

    def _is_big_endian(self) -> bool:
        raw = self._small("byteorder")
        if raw not in (None, b"little", b"big"):
            raise broken(self._file, "record_odd", name="byteorder")
        return raw == b"big"
