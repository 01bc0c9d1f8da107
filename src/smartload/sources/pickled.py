"""Files of `torch.save`: the zip of today and the plain stream of before torch 1.6."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from smartload.errors import UnreadableError
from smartload.folding import shown
from smartload.records import ByteReader, Checkpoint, Problem, Record
from smartload.sources import archive, legacy, lookalikes
from smartload.sources.inert import Pid, parse
from smartload.sources.noted import Noted
from smartload.sources.tensors import Storage, StorageId, Tensors, storage_id
from smartload.sources.tree import explore

MAX_SMALL = 16
"""`byteorder` and `version` are a word each."""
MAX_PICKLE = 1 << 30

Find = Callable[[StorageId], Storage]


def sniff(file: ByteReader) -> bool:
    """Whether the file begins as a zip or as the stream of old."""
    return lookalikes.head(file, 4) == b"PK\3\4" or legacy.sniff(file)


def open(file: ByteReader) -> Checkpoint:
    """The names and spans of a file of `torch.save`."""
    return _open_zip(file) if lookalikes.head(file, 4) == b"PK\3\4" else _open_legacy(file)


def _open_zip(file: ByteReader) -> Checkpoint:
    listed = archive.read_directory(file)
    names = archive.names_below_root(listed)
    if "data.pkl" not in names or "constants.pkl" in names:
        raise UnreadableError(lookalikes.name_zip(file, names))
    found = archive.read_archive(file, listed)
    _small(file, found, "version")
    big_endian = _big_endian(_small(file, found, "byteorder"), file)
    entry = found.records["data.pkl"]
    if entry.nbytes > MAX_PICKLE:
        raise UnreadableError(Problem("pickle_large", file.name, {"size": entry.nbytes}))
    root, _, pids = parse(archive.read_record(file, entry, "data.pkl"), 0, file.name)

    used: dict[str, Record] = {}

    def find(wanted: StorageId) -> Storage:
        name = f"data/{wanted.key}"
        record = found.records.get(name)
        if record is None:
            raise UnreadableError(Problem("record_missing", file.name, {"name": shown(name)}))
        if record.nbytes != wanted.numel * wanted.itemsize:
            facts = {"name": shown(name), "have": record.nbytes, "need": wanted.numel * wanted.itemsize}
            raise UnreadableError(Problem("record_size", file.name, facts))
        used[name] = Record(0, record.offset, record.nbytes, record.crc, shown(name))
        return Storage(record.offset, record.nbytes, wanted.dtype, big_endian)

    return _checkpoint(file, "torch zip", root, find_storages(pids, find, file.name), used.values())


def _open_legacy(file: ByteReader) -> Checkpoint:
    stream = legacy.read_stream(file)
    root, pids, places = stream.root, stream.pids, stream.places

    def find(wanted: StorageId) -> Storage:
        if wanted.key not in places:
            raise UnreadableError(Problem("record_missing", file.name, {"name": shown(wanted.key)}))
        offset, count, nbytes = places[wanted.key]
        if count != wanted.numel:
            facts = {"name": shown(wanted.key), "have": count, "need": wanted.numel}
            raise UnreadableError(Problem("record_size", file.name, facts))
        return Storage(offset, nbytes, wanted.dtype)

    return _checkpoint(file, "torch legacy", root, find_storages(pids, find, file.name))


def _checkpoint(
    file: ByteReader,
    form: str,
    root: object,
    storages: Mapping[Pid, Storage],
    records: Iterable[Record] = (),
) -> Checkpoint:
    parts, aside = explore(root, Noted(Tensors(storages, file.name), file.name))
    return Checkpoint(file.name, form, parts, (file,), tuple(records), aside)


def find_storages(pids: list[Pid], find: Find, file: str) -> dict[Pid, Storage]:
    """Where the storage of each persistent id lies, all checked at once; ids of classes are left out."""
    known: dict[str, tuple[StorageId, Storage]] = {}
    storages: dict[Pid, Storage] = {}
    for pid in pids:
        said = storage_id(pid, file)
        if said is None:
            continue
        first = known.get(said.key)
        if first is None:
            first = known[said.key] = (said, find(said))
        elif said.numel and (said.dtype, said.numel) != (first[0].dtype, first[0].numel):
            raise UnreadableError(Problem("storage_twice", file, {"name": shown(said.key)}))
        storages[pid] = _viewed(said, first[1])
    return storages


def _viewed(said: StorageId, whole: Storage) -> Storage:
    if said.view is None:
        return whole if whole.dtype == said.dtype else whole._replace(dtype=said.dtype)
    first, count = said.view
    offset = whole.offset + first * said.itemsize
    return Storage(offset, count * said.itemsize, said.dtype, whole.big_endian)


def _small(file: ByteReader, found: archive.Archive, name: str) -> bytes | None:
    entry = found.records.get(name)
    if entry is None:
        return None
    if entry.nbytes > MAX_SMALL:
        raise UnreadableError(Problem("record_odd", file.name, {"name": name}))
    return archive.read_record(file, entry, name)


def _big_endian(raw: bytes | None, file: ByteReader) -> bool:
    if raw not in (None, b"little", b"big"):
        raise UnreadableError(Problem("record_odd", file.name, {"name": "byteorder"}))
    return raw == b"big"
