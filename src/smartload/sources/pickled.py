"""Files of `torch.save`: the zip of today and the plain stream of before torch 1.6."""

from __future__ import annotations

from collections.abc import Callable

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
    found = archive.read_archive(file)
    if "data.pkl" not in found.records or "constants.pkl" in found.records:
        raise UnreadableError(lookalikes.name_zip(file, found.records))
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

    return _checkpoint(file, "torch zip", root, find_storages(pids, find, file.name), lambda: tuple(used.values()))


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

    return _checkpoint(file, "torch legacy", root, find_storages(pids, find, file.name), tuple)


def _checkpoint(
    file: ByteReader,
    form: str,
    root: object,
    find: Callable[[Pid], Storage | None],
    records: Callable[[], tuple[Record, ...]],
) -> Checkpoint:
    parts, aside = explore(root, Noted(Tensors(find, file.name), file.name))
    return Checkpoint(file.name, form, parts, (file,), records(), aside)


def find_storages(pids: list[Pid], find: Find, file: str) -> Callable[[Pid], Storage | None]:
    """Where each persistent id's storage lies, all checked at once; None for the id of a class."""
    wanted: dict[str, tuple[StorageId, Storage]] = {}
    by_pid: dict[int, Storage | None] = {}
    for pid in pids:
        said = storage_id(pid, file)
        if said is None:
            by_pid[id(pid)] = None
            continue
        known = wanted.get(said.key)
        if known is None:
            known = wanted[said.key] = (said, find(said))
        elif said.numel and (said.dtype, said.numel) != (known[0].dtype, known[0].numel):
            raise UnreadableError(Problem("storage_twice", file, {"name": shown(said.key)}))
        by_pid[id(pid)] = _viewed(said, known[1])

    def at(pid: Pid) -> Storage | None:
        return by_pid[id(pid)]

    return at


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
