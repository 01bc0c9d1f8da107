"""Plain pickles: what `pickle.dump` wrote of a state dict, of arrays, or of a whole module."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from smartload.errors import UnreadableError
from smartload.formats import torch_legacy
from smartload.pickles.arrays import plain_data
from smartload.pickles.contents import pickle_checkpoint
from smartload.pickles.inert import Call, DictNote, Global, PersistentId, RawBytes, parse
from smartload.pickles.storages import Storage, find_storages
from smartload.pickles.tensors import Tensors
from smartload.reading.files import BytesReader, Window, head, read_bytes
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import ByteReader
from smartload.records.problems import Problem
from smartload.records.text import size_text

MAX_PICKLE = 1 << 32
_MAX_TEXT = 1 << 26
_BYTES = ("torch.storage", "_load_from_bytes")


def sniff(file: ByteReader) -> bool:
    """Whether the file is a pickle: of protocol 2 and later by its beginning, of the text protocols by all of it."""
    start = head(file, 2)
    if start[:1] == b"\x80":
        return start[1:] <= b"\5"
    if start[:1] not in (b"(", b"c", b"}", b"]") or file.size > _MAX_TEXT or read_bytes(file, file.size - 1, 1) != b".":
        return False
    try:
        value, end, _ = parse(read_bytes(file, 0, file.size), 0, file.name)
    except UnreadableError:
        return False
    return end == file.size and (type(value) is DictNote or type(value) is Call)


def open(file: ByteReader) -> Checkpoint:
    """The names and spans of what was pickled."""
    if file.size > MAX_PICKLE:
        raise UnreadableError(Problem("plain_large", file.name, {"limit": size_text(MAX_PICKLE)}))
    prefix = torch_legacy.Prefix(file, MAX_PICKLE)
    root, persistent_ids = prefix.next()
    if prefix.pos < file.size:
        raise UnreadableError(Problem("pickle_more", file.name, {"left": file.size - prefix.pos}))
    if persistent_ids:
        raise UnreadableError(Problem("pickle_ids", file.name))
    tensors = _Tensors(file)
    found = pickle_checkpoint(file, "pickle", root, tensors)
    return replace(found, tags=dict(tensors.tags))


class _Tensors(Tensors):
    """Tensors whose storages lie in the pickle itself: the bytes of a small file of torch.save each."""

    def __init__(self, file: ByteReader) -> None:
        super().__init__({}, file.name)
        self._reader = file
        self._known: dict[int, tuple[Call, Storage]] = {}
        self.tags: Counter[str] = Counter()

    def unseen(self) -> int | None:
        """Storages are known only once they are asked for."""
        return None

    def storage(self, value: object) -> Storage | None:
        """The storage that a call of `torch.storage._load_from_bytes` stands for."""
        if type(value) is not Call or type(value.func) is not Global or type(value.args) is not tuple:
            return None
        if (value.func.module, value.func.name) != _BYTES or len(value.args) != 1:
            return None
        if id(value) not in self._known:
            self._known[id(value)] = value, self._read(plain_data(value.args[0]))
        return self._known[id(value)][1]

    def _read(self, data: RawBytes | bytes | str | None) -> Storage:
        if data is None:
            raise UnreadableError(Problem("storage_id", self._reader.name))
        if type(data) is RawBytes:
            start, number = data.offset, 0
            part: ByteReader = Window(self._reader, start, len(data.raw))
        else:
            start, number = 0, self.hold(data)  # type: ignore[arg-type]
            part = BytesReader(data.encode("latin1") if isinstance(data, str) else data, self._reader.name)  # type: ignore[arg-type]
        stream = torch_legacy.read_stream(part)
        known = find_storages(
            stream.persistent_ids, lambda wanted: torch_legacy.find(stream, wanted, part.name), part.name
        )
        if type(stream.root) is not PersistentId or stream.root not in known.storages:
            raise UnreadableError(Problem("storage_id", self._reader.name))
        self.tags.update(known.tags)
        found = known.storages[stream.root]
        return found._replace(offset=found.offset + start, file=number)
