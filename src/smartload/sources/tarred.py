"""The tar archives of torch before 0.2 (2017): storages, tensors and a pickle that names them."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Mapping

from smartload.checkpoint import Checkpoint
from smartload.errors import UnreadableError
from smartload.folding import shown
from smartload.records import ITEMSIZE, ByteReader, Problem, Span
from smartload.sources.inert import Pid, Ref, Short, parse
from smartload.sources.pickled import checkpoint
from smartload.sources.readers import Window, read_bytes, shorter
from smartload.sources.tensors import STORAGES, Storage, Tensors, view

MEMBERS = {"storages", "tensors", "pickle"}
BLOCK = 512
_MAX_MEMBERS = 1000
"""Archives of torch have four."""
_FIRST, _GROWTH, _MAX_PICKLE = 512, 16, 1 << 28
_MAX_DIMS = 64


def sniff(file: ByteReader) -> bool:
    """Whether the file is a tar with the members that torch gave it."""
    return read_bytes(file, 0, min(BLOCK, file.size))[257:262] == b"ustar" and _members(file).keys() >= MEMBERS


def open(file: ByteReader) -> Checkpoint:
    """The names and spans of the archive; nothing is extracted."""
    parts = {name: Window(file, *place) for name, place in _members(file).items()}
    storages = _Storages(parts["storages"], _members(file)["storages"][0])
    tensors = dict(_tensors(parts["tensors"], storages.found))
    pickle = parts["pickle"]
    root, _, pids = parse(read_bytes(pickle, 0, pickle.size), 0, file.name)
    known = {pid: tensors[key] for pid in pids if (key := _number(pid.value)) in tensors}
    return checkpoint(file, "torch tar", root, _Tensors(known, file.name), tags=storages.tags)


class _Tensors(Tensors):
    """Tensors that the file names by numbers."""

    def __init__(self, tensors: Mapping[Pid, Span], file: str) -> None:
        super().__init__({}, file)
        self._tensors = tensors
        self._unseen = set(tensors)

    def whole(self, value: Pid) -> Span | None:
        """The tensor that a number stands for."""
        return self._tensors.get(value)


def _members(file: ByteReader) -> dict[str, tuple[int, int]]:
    """Name -> place and size of every regular member; UnreadableError where the archive is broken."""
    found: dict[str, tuple[int, int]] = {}
    at = 0
    for _ in range(_MAX_MEMBERS):
        if at + BLOCK > file.size:
            return found
        head = read_bytes(file, at, BLOCK)
        if not head.strip(b"\0"):
            return found
        size, said = _octal(head[124:136]), _octal(head[148:156])
        if size is None or said != sum(head) - sum(head[148:156]) + 8 * 32:
            raise UnreadableError(Problem("tar_broken", file.name))
        if at + BLOCK + size > file.size:
            raise shorter(file.name, at + BLOCK + size, file.size)
        name = head[:100].rstrip(b"\0").decode("utf-8", "surrogateescape").removeprefix("./")
        if head[156:157] in (b"0", b"\0"):
            if name in found:
                raise UnreadableError(Problem("zip_twice", file.name, {"name": shown(name)}))
            found[name] = at + BLOCK, size
        at += BLOCK + -(-size // BLOCK) * BLOCK
    return found


def _octal(field: bytes) -> int | None:
    digits = field.strip(b" \0")
    return int(digits, 8) if digits.isdigit() and not digits.strip(b"01234567") else None


def _number(value: object) -> int:
    return int(value) if type(value) is int or (type(value) is str and value.isdecimal() and len(value) < 20) else -1


def _pickle(file: ByteReader, at: int) -> tuple[object, int]:
    """The pickle at `at`, and where it ends."""
    size = _FIRST
    while True:
        data = read_bytes(file, at, min(size, file.size - at))
        try:
            value, end, _ = parse(data, 0, file.name, whole=at + len(data) >= file.size)
        except Short:
            if size >= _MAX_PICKLE:
                raise UnreadableError(Problem("pickle_large", file.name, {"size": size})) from None
            size *= _GROWTH
        else:
            return value, at + end


def _damaged(file: ByteReader) -> UnreadableError:
    return UnreadableError(Problem("tar_broken", file.name))


class _Storages:
    """Storages by number, those that are views of others included."""

    def __init__(self, file: Window, start: int) -> None:
        self.found: dict[int, Storage] = {}
        self.tags: Counter[str] = Counter()
        count, at = _pickle(file, 0)
        if type(count) is not int or not 0 <= count <= file.size // 8:
            raise _damaged(file)
        for _ in range(count):
            at = self._storage(file, start, *_pickle(file, at))
        views, _ = _pickle(file, at)
        for each in views if type(views) is list else ():
            self._view(each, file)

    def _storage(self, file: Window, start: int, said: object, at: int) -> int:
        if type(said) is not tuple or len(said) != 3 or type(said[0]) is not int or type(said[2]) is not Ref:
            raise _damaged(file)
        key, location, kind = said
        dtype = STORAGES.get(kind.name) if kind.module.split(".")[0] == "torch" else None
        count = int.from_bytes(read_bytes(file, at, 8), "little", signed=True)
        if dtype is None or count < 0 or key in self.found:
            raise _damaged(file)
        nbytes = count * ITEMSIZE[dtype]
        if at + 8 + nbytes > file.size:
            raise shorter(file.name, at + 8 + nbytes, file.size)
        self.found[key] = Storage(start + at + 8, nbytes, dtype)
        self.tags[location if type(location) is str else ""] += 1
        return at + 8 + nbytes

    def _view(self, each: object, file: Window) -> None:
        if type(each) is not tuple or len(each) != 4 or not all(type(n) is int for n in each):
            raise _damaged(file)
        target, root, first, count = each
        whole = self.found.get(root)
        if whole is None or first < 0 or count < 0 or (first + count) * ITEMSIZE[whole.dtype] > whole.nbytes:
            raise _damaged(file)
        width = ITEMSIZE[whole.dtype]
        self.found[target] = Storage(whole.offset + first * width, count * width, whole.dtype)


def _tensors(file: Window, storages: Mapping[int, Storage]) -> Iterator[tuple[int, Span]]:
    count, at = _pickle(file, 0)
    if type(count) is not int or not 0 <= count <= file.size // 8:
        raise _damaged(file)
    for _ in range(count):
        said, at = _pickle(file, at)
        if type(said) is not tuple or len(said) != 3 or type(said[0]) is not int or type(said[1]) is not int:
            raise _damaged(file)
        dims = int.from_bytes(read_bytes(file, at, 4), "little", signed=True)
        storage = storages.get(said[1])
        if not 0 <= dims <= _MAX_DIMS or storage is None:
            raise _damaged(file)
        # four bytes behind the number of dimensions are not used
        numbers = struct.unpack(f"<{2 * dims + 1}q", read_bytes(file, at + 8, 8 * (2 * dims + 1)))
        at += 8 + 8 * (2 * dims + 1)
        yield said[0], view(storage, storage.dtype, numbers[-1], numbers[:dims], numbers[dims:-1], file.name)
