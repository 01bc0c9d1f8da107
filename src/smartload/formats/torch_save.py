"""Open the zip files that `torch.save` writes since torch 1.6.

The records of such a zip are `data.pkl`, the pickle of what was saved, `data/0`, `data/1` and so on, the bytes of the
storages, and small ones such as `version` and `byteorder`. Other formats of torch are zips of the same kind.
"""

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

# Bytes of `byteorder` and `version`, which are a word each; read as a whole, they could be of any size.
MAX_SMALL = 16
# Bytes of a pickle, which is parsed in memory. Measured: 125 bytes a tensor; the weights are in records of their own.
MAX_PICKLE = 1 << 30


def sniff_zip(names: Collection[str]) -> bool:
    """Tell whether a zip with records of these `names` is one of `torch.save`; TorchScript adds `constants.pkl`."""
    return "data.pkl" in names and "constants.pkl" not in names


def open_zip(file: ByteReader, directory: Directory) -> Checkpoint:
    """Read the names and spans of the zip `file`.

    Raises:
        UnreadableError: the zip or its pickle breaks a rule, or there are no weights in it.
        UnsafeCheckpointError: the pickle tries to change what it merely names.
    """
    saved = read_zip(file, directory)
    return pickle_checkpoint(file, "torch zip", saved.root, saved.tensors, saved.records, saved.tags)


class Saved(NamedTuple):
    """What a zip of `torch.save` holds.

    Attributes:
        root: the value that was saved, as inert notes.
        tensors: finds the span of each tensor among the notes.
        records: the records of the storages, and of the pickle, which arrays lie in, for the comparison of checksums.
        tags: device that storages lay on when they were saved -> number of storages.
    """

    root: object
    tensors: Tensors
    records: Collection[ZipRecord]
    tags: Mapping[str, int]


def read_zip(file: ByteReader, directory: Directory) -> Saved:
    """Read what was saved in the zip `file`, a state dict or any other value."""
    archive = TorchZip(file, directory)
    root, persistent_ids, entry = archive.pickle("data.pkl")
    storages, tags = find_storages(persistent_ids, archive.storage, file.name)
    tensors = Tensors(storages, file.name, entry.offset)
    return Saved(untagged(root), tensors, (*archive.used.values(), entry), tags)


class TorchZip:
    """The records of a zip that torch wrote, and what they hold.

    Attributes:
        entries: name -> record; the folder that torch puts all records in is no part of the name.
        used: name -> record, of the records that have been asked for as storages of tensors.
    """

    def __init__(self, file: ByteReader, directory: Directory) -> None:
        self._file, self.entries = file, read_archive(file, directory)
        self.used: dict[str, ZipRecord] = {}
        self._small_record("version")  # not used, but its checksum and size are compared as those of any record
        self._big_endian = self._is_big_endian()

    def pickle(self, name: str) -> tuple[object, list[PersistentId], ZipRecord]:
        """Parse the record `name`, a pickle: its value, the persistent ids in it, and where it lies.

        Raises:
            UnreadableError: there is no such record, or it is deflated, too large or damaged.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise broken(self._file, "record_missing", name=name)
        # torch never deflates. Arrays are spans into the pickle, so its bytes must lie in the file as they are.
        if entry.packed is not None:
            raise broken(self._file, "zip_packed", name=name)
        if entry.nbytes > MAX_PICKLE:
            raise broken(self._file, "pickle_large", size=entry.nbytes)
        root, _, persistent_ids = parse(read_record(self._file, entry), 0, self._file.name)
        return root, persistent_ids, entry

    def storage_record(self, name: str, dtype: str = "") -> Storage:
        """Give where the bytes of the record `name` lie, a storage of `dtype`; "" for one without a dtype."""
        entry = self.entries.get(name)
        if entry is None:
            raise broken(self._file, "record_missing", name=printable(name))
        if entry.packed is not None:
            raise broken(self._file, "zip_packed", name=printable(name))
        self.used[entry.name] = entry
        return Storage(entry.offset, entry.nbytes, dtype, self._big_endian)

    def storage(self, reference: StorageId) -> Storage:
        """Give where the bytes of the storage lie that `reference`, a persistent id, names.

        Raises:
            UnreadableError: the record is missing, or its size is not that of the storage. `torch.load(mmap=True)`
                compares nothing here: it takes what follows the record in the file for weights.
        """
        name, need = f"data/{reference.key}", reference.numel * reference.itemsize
        storage = self.storage_record(name, reference.dtype)
        if storage.nbytes != need:
            raise broken(self._file, "record_size", name=printable(name), have=storage.nbytes, need=need)
        return storage

    def _small_record(self, name: str) -> bytes | None:
        """Read a record that is one word, None where there is none; raise UnreadableError where it is longer."""
        entry = self.entries.get(name)
        if entry is None:
            return None
        if entry.nbytes > MAX_SMALL:
            raise broken(self._file, "record_odd", name=name)
        return read_record(self._file, entry)

    def _is_big_endian(self) -> bool:
        """Tell whether the numbers of the storages are big-endian; where no record says so, they are not."""
        raw = self._small_record("byteorder")
        if raw not in (None, b"little", b"big"):
            raise broken(self._file, "record_odd", name="byteorder")
        return raw == b"big"
