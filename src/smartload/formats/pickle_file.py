"""Open plain pickles: what `pickle.dump` wrote of a state dict, of arrays, or of a whole module.

The tensors lie inside the pickle. torch pickles a storage as the bytes of a small file of `torch.save` of its own, in
the format of before torch 1.6; each of them is read by the rules of such a file (see `torch_legacy`).
"""

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

# Bytes of a pickle. It is read as a whole, tensors and all, so that memory is the limit.
MAX_PICKLE = 1 << 32
# Bytes up to which a file is parsed only to find out whether it is a pickle of a text protocol.
_MAX_TEXT_PICKLE = 1 << 26
# The function that `pickle.dump` names for each storage of torch.
_LOAD_FROM_BYTES = ("torch.storage", "_load_from_bytes")


def sniff(file: ByteReader) -> bool:
    """Tell whether `file` is a pickle: of protocol 2 and later by its first bytes, of the text protocols by all of it.

    Protocols 0 and 1 have no mark at their beginning. A text that opens with one of their opcodes, such as
    "(see the readme.)", is told from them by parsing.
    """
    start = head(file, 2)
    if start[:1] == b"\x80":  # PROTO, and the number of the protocol
        return start[1:] <= b"\5"
    # A dict begins with MARK or EMPTY_DICT, an object with GLOBAL, a list with EMPTY_LIST; all end with STOP.
    if start[:1] not in (b"(", b"c", b"}", b"]"):
        return False
    if file.size > _MAX_TEXT_PICKLE or read_bytes(file, file.size - 1, 1) != b".":
        return False
    try:
        value, end, _ = parse(read_bytes(file, 0, file.size), 0, file.name)
    except UnreadableError:
        return False
    # "]." is a pickle of an empty list, and far more likely a piece of text.
    return end == file.size and (type(value) is DictNote or type(value) is Call)


def open(file: ByteReader) -> Checkpoint:
    """Read the names and spans of what was pickled into `file`.

    Raises:
        UnreadableError: the pickle is damaged, too large, followed by more bytes, or holds no weights.
        UnsafeCheckpointError: a tensor in it has something else for a storage.
    """
    if file.size > MAX_PICKLE:
        raise UnreadableError(Problem("plain_large", file.name, {"limit": size_text(MAX_PICKLE)}))
    prefix = torch_legacy.Prefix(file, MAX_PICKLE)
    root, persistent_ids = prefix.next_pickle()
    # Several pickles in one file: which of them is meant cannot be told.
    if prefix.position < file.size:
        raise UnreadableError(Problem("pickle_more", file.name, {"left": file.size - prefix.position}))
    # `pickle.dump` writes none: their meaning is known only to the program that wrote the file.
    if persistent_ids:
        raise UnreadableError(Problem("pickle_ids", file.name))
    tensors = _PickledTensors(file)
    checkpoint = pickle_checkpoint(file, "pickle", root, tensors)
    return replace(checkpoint, tags=dict(tensors.tags))  # after the walk: the storages are read on the way


class _PickledTensors(Tensors):
    """The tensors of a plain pickle, whose storages are calls on bytes in the pickle instead of persistent ids.

    Attributes:
        tags: the device that each storage lay on when it was saved -> number of storages.
    """

    def __init__(self, file: ByteReader) -> None:
        super().__init__({}, file.name)
        self._reader = file
        # By identity of the call: tied tensors share it. The call is kept so that its id is not used again.
        self._storages_read: dict[int, tuple[Call, Storage]] = {}
        self.tags: Counter[str] = Counter()

    def unseen(self) -> int | None:
        """Give None: a storage is known only once a tensor asks for it, so the rest cannot be counted."""
        return None

    def storage(self, value: object) -> Storage | None:
        """Give the storage that a call of `torch.storage._load_from_bytes` stands for, None for anything else."""
        if type(value) is not Call or type(value.func) is not Global or type(value.args) is not tuple:
            return None
        if (value.func.module, value.func.name) != _LOAD_FROM_BYTES or len(value.args) != 1:
            return None
        if id(value) not in self._storages_read:
            self._storages_read[id(value)] = value, self._read_storage(plain_data(value.args[0]))
        return self._storages_read[id(value)][1]

    def _read_storage(self, data: RawBytes | bytes | str | None) -> Storage:
        """Read the file of `torch.save` in `data`, which must hold one storage and nothing else."""
        if data is None:
            raise UnreadableError(Problem("storage_id", self._reader.name))
        if type(data) is RawBytes:
            # Since protocol 3 the bytes lie in the pickle as they are: a part of the file, not copied.
            start, number = data.offset, 0
            part: ByteReader = Window(self._reader, start, len(data.raw))
        else:
            # Before, they were written as text; decoded they lie nowhere in the file, and are a file in memory.
            start, number = 0, self.hold(data)  # type: ignore[arg-type]
            part = BytesReader(data.encode("latin1") if isinstance(data, str) else data, self._reader.name)  # type: ignore[arg-type]
        stream = torch_legacy.read_stream(part)
        storages, tags = find_storages(
            stream.persistent_ids,
            lambda reference: torch_legacy.storage_of(stream, reference, part.name),
            part.name,
        )
        if type(stream.root) is not PersistentId or stream.root not in storages:
            raise UnreadableError(Problem("storage_id", self._reader.name))
        self.tags.update(tags)
        storage = storages[stream.root]
        return storage._replace(offset=storage.offset + start, file=number)
