"""Files of `torch.save`: the zip of today and the plain stream of before torch 1.6."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from smartload.errors import UnreadableError
from smartload.formats import torch_legacy as legacy
from smartload.pickles.contents import Noted
from smartload.pickles.inert import Pid, parse
from smartload.pickles.storages import Storage, StorageId, storage_id
from smartload.pickles.tensors import Tensors, untagged
from smartload.reading.files import BytesReader
from smartload.reading.state_dicts import explore
from smartload.reading.zip import Directory, broken, read_archive, read_record
from smartload.records.checkpoint import Checkpoint
from smartload.records.data import ByteReader, Problem, Record, Span
from smartload.records.text import shown

MAX_SMALL = 16
"""`byteorder` and `version` are a word each."""
MAX_PICKLE = 1 << 30

Find = Callable[[StorageId], Storage]


def sniff(file: ByteReader) -> bool:
    """Whether the file begins as the stream of old."""
    return legacy.sniff(file)


def open(file: ByteReader) -> Checkpoint:
    """The names and spans of a stream of before torch 1.6."""
    stream = legacy.read_stream(file)
    known = find_storages(stream.pids, lambda wanted: legacy.find(stream, wanted, file.name), file.name)
    tensors = Tensors(known.storages, file.name, 0)
    return checkpoint(file, "torch legacy", stream.root, tensors, tags=known.tags)


def sniff_zip(names: Collection[str]) -> bool:
    """Whether a zip with these records is one of `torch.save`."""
    return "data.pkl" in names and "constants.pkl" not in names


def open_zip(file: ByteReader, directory: Directory) -> Checkpoint:
    """The names and spans of a zip of `torch.save`."""
    found = read_zip(file, directory)
    return checkpoint(file, "torch zip", found.root, found.tensors, found.records, found.tags)


class Saved(NamedTuple):
    """The value that a zip of `torch.save` holds, and what knows its tensors."""

    root: object
    tensors: Tensors
    records: Collection[Record]
    tags: Mapping[str, int]


def read_zip(file: ByteReader, directory: Directory) -> Saved:
    """What was saved, whatever it is."""
    archive = Records(file, directory)
    root, pids, entry = archive.pickle("data.pkl")
    known = find_storages(pids, archive.storage, file.name)
    tensors = Tensors(known.storages, file.name, entry.offset)
    return Saved(untagged(root), tensors, archive.used.values(), known.tags)


class Records:
    """The records of a zip that torch wrote, and what they hold."""

    def __init__(self, file: ByteReader, directory: Directory) -> None:
        self._file, self.entries = file, read_archive(file, directory)
        self.used: dict[str, Record] = {}
        """Those that are storages of tensors."""
        self._small("version")
        self._big_endian = self._is_big_endian()

    def pickle(self, name: str) -> tuple[object, list[Pid], Record]:
        """The value of a record that is a pickle, the persistent ids in it, and where it lies."""
        entry = self.entries.get(name)
        if entry is None:
            raise broken(self._file, "record_missing", name=name)
        if entry.packed is not None:
            raise broken(self._file, "zip_packed", name=name)
        if entry.nbytes > MAX_PICKLE:
            raise broken(self._file, "pickle_large", size=entry.nbytes)
        root, _, pids = parse(read_record(self._file, entry), 0, self._file.name)
        return root, pids, entry

    def raw(self, name: str, dtype: str = "") -> Storage:
        """Where the bytes of a record lie that is a storage."""
        entry = self.entries.get(name)
        if entry is None:
            raise broken(self._file, "record_missing", name=shown(name))
        if entry.packed is not None:
            raise broken(self._file, "zip_packed", name=shown(name))
        self.used[entry.name] = entry
        return Storage(entry.offset, entry.nbytes, dtype, self._big_endian)

    def storage(self, wanted: StorageId) -> Storage:
        """Where the bytes of a storage lie that a persistent id names."""
        name, need = f"data/{wanted.key}", wanted.numel * wanted.itemsize
        found = self.raw(name, wanted.dtype)
        if found.nbytes != need:
            raise broken(self._file, "record_size", name=shown(name), have=found.nbytes, need=need)
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


class Storages(NamedTuple):
    """Where the storage of each persistent id lies, and how many lay on which device."""

    storages: dict[Pid, Storage]
    tags: Counter[str]


def find_storages(pids: Iterable[Pid], find: Find, file: str) -> Storages:
    """All storages that persistent ids name, checked at once; ids of classes are left out."""
    known: dict[str, Storage] = {}
    storages: dict[Pid, Storage] = {}
    tags: Counter[str] = Counter()
    for pid in pids:
        said = storage_id(pid, file)
        if said is None:
            continue
        whole = known.get(said.key)
        if whole is None:
            whole = known[said.key] = find(said)
            tags[said.location] += 1
        elif said.numel and (said.dtype, said.numel * said.itemsize) != (whole.dtype, whole.nbytes):
            raise UnreadableError(Problem("storage_twice", file, {"name": shown(said.key)}))
        storages[pid] = whole if said.view is None and said.dtype == whole.dtype else _viewed(said, whole)
    return Storages(storages, tags)


def _viewed(said: StorageId, whole: Storage) -> Storage:
    if said.view is None:
        return whole._replace(dtype=said.dtype)
    first, count = said.view
    offset = whole.offset + first * said.itemsize
    return whole._replace(offset=offset, nbytes=count * said.itemsize, dtype=said.dtype)


def checkpoint(
    file: ByteReader,
    form: str,
    root: object,
    tensors: Tensors,
    records: Iterable[Record] = (),
    tags: Mapping[str, int] | None = None,
) -> Checkpoint:
    """What lies below the root of a pickle."""
    parts, aside = explore(root, Noted(tensors, file.name))
    used = {entry.file for part in parts.values() for entry in part.entries.values() if isinstance(entry, Span)}
    held = [BytesReader(raw, file.name) for raw in tensors.held(used)]
    return Checkpoint(file.name, form, parts, (file, *held), tuple(records), aside, dict(tags or {}))
