"""The tar archives of torch before 0.2 (2017): storages, tensors and a pickle that names them."""

from __future__ import annotations

import contextlib
import struct
from collections import Counter
from collections.abc import Iterator, Mapping

from smartload.errors import UnreadableError
from smartload.formats.torch_save import checkpoint
from smartload.pickles.inert import Pid, Ref, Short, parse
from smartload.pickles.storages import STORAGES, Storage
from smartload.pickles.tensors import Tensors, view
from smartload.reading.files import Window, head, read_bytes, shorter
from smartload.records.checkpoint import Checkpoint
from smartload.records.data import ITEMSIZE, ByteReader, Opaque, Problem, Span
from smartload.records.text import shown

MEMBERS = {"storages", "tensors", "pickle"}
BLOCK = 512
_MAX_MEMBERS = 1000
"""Archives of torch have four."""
_AHEAD, _GROWTH, _MAX_PICKLE = 1 << 16, 16, 1 << 28
_MAX_DIMS = 64


def sniff(file: ByteReader) -> bool:
    """Whether the file is a tar with the members that torch gave it."""
    return head(file, BLOCK)[257:262] == b"ustar" and _members(file).keys() >= MEMBERS


def open(file: ByteReader) -> Checkpoint:
    """The names and spans of the archive; nothing is extracted."""
    members = _members(file)
    parts = {name: Window(file, *place) for name, place in members.items()}
    storages = _Storages(parts["storages"], members["storages"][0])
    tensors = dict(_tensors(parts["tensors"], storages.found))
    pickle = parts["pickle"]
    root, _, pids = parse(read_bytes(pickle, 0, pickle.size), 0, file.name)
    known = {pid: tensors[key] for pid in pids if (key := _number(pid.value)) in tensors}
    return checkpoint(file, "torch tar", root, _Tensors(known, file.name), tags=storages.tags)


class _Tensors(Tensors):
    """Tensors that the file names by numbers."""

    def __init__(self, tensors: Mapping[Pid, Span | Opaque], file: str) -> None:
        super().__init__({}, file)
        self._tensors = tensors
        self._unseen = set(tensors)

    def whole(self, value: Pid) -> Span | Opaque | None:
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


def _damaged(file: ByteReader) -> UnreadableError:
    return UnreadableError(Problem("tar_broken", file.name))


class _Cursor:
    """Reads a member from its beginning on: pickles, and numbers between them."""

    def __init__(self, file: Window) -> None:
        self.at = 0
        self.file = file
        self._start, self._data = 0, b""

    def pickle(self) -> object:
        """The next pickle."""
        size = _AHEAD
        while True:
            self._reach(min(size, self.file.size - self.at))
            whole = self._start + len(self._data) >= self.file.size
            with contextlib.suppress(Short):
                value, end, _ = parse(self._data, self.at - self._start, self.file.name, whole=whole)
                self.at = self._start + end
                return value
            size *= _GROWTH
            if size > _MAX_PICKLE:
                raise UnreadableError(Problem("pickle_large", self.file.name, {"size": size}))

    def numbers(self, count: int) -> tuple[int, ...]:
        """The next `count` integers of eight bytes."""
        self._reach(8 * count)
        found = struct.unpack_from(f"<{count}q", self._data, self.at - self._start)
        self.at += 8 * count
        return found

    def _reach(self, size: int) -> None:
        if self.at + size > self.file.size:
            raise shorter(self.file.name, self.at + size, self.file.size)
        if self.at < self._start or self.at + size > self._start + len(self._data):
            self._start = self.at
            self._data = read_bytes(self.file, self.at, max(size, min(_AHEAD, self.file.size - self.at)))

    def count(self) -> int:
        """The pickle that says how many there are."""
        count = self.pickle()
        if type(count) is not int or not 0 <= count <= self.file.size // 8:
            raise _damaged(self.file)
        return count


class _Storages:
    """Storages by number, those that are views of others included."""

    def __init__(self, file: Window, start: int) -> None:
        self.found: dict[int, Storage] = {}
        self.tags: Counter[str] = Counter()
        cursor = _Cursor(file)
        for _ in range(cursor.count()):
            self._storage(cursor, start)
        views = cursor.pickle()
        for each in views if type(views) is list else ():
            self._view(each, file)

    def _storage(self, cursor: _Cursor, start: int) -> None:
        said = cursor.pickle()
        if type(said) is not tuple or len(said) != 3 or not _is_key(said[0]) or type(said[2]) is not Ref:
            raise _damaged(cursor.file)
        key, location, kind = said
        dtype = STORAGES.get(kind.name) if kind.module.split(".")[0] == "torch" else None
        (count,) = cursor.numbers(1)
        if dtype is None or count < 0 or key in self.found:
            raise _damaged(cursor.file)
        nbytes = count * ITEMSIZE[dtype]
        if cursor.at + nbytes > cursor.file.size:
            raise shorter(cursor.file.name, cursor.at + nbytes, cursor.file.size)
        self.found[key] = Storage(start + cursor.at, nbytes, dtype)
        self.tags[location if type(location) is str else ""] += 1
        cursor.at += nbytes

    def _view(self, each: object, file: Window) -> None:
        if type(each) is not tuple or len(each) != 4 or not all(map(_is_key, each)):
            raise _damaged(file)
        target, root, first, count = each
        whole = self.found.get(root)
        if whole is None or (first + count) * ITEMSIZE[whole.dtype] > whole.nbytes:
            raise _damaged(file)
        width = ITEMSIZE[whole.dtype]
        self.found[target] = Storage(whole.offset + first * width, count * width, whole.dtype)


def _is_key(value: object) -> bool:
    """Whether a value may be the number of an object: an address; larger ones can be chosen to have one hash."""
    return type(value) is int and 0 <= value < 1 << 60


def _tensors(file: Window, storages: Mapping[int, Storage]) -> Iterator[tuple[int, Span | Opaque]]:
    cursor = _Cursor(file)
    for _ in range(cursor.count()):
        said = cursor.pickle()
        if type(said) is not tuple or len(said) != 3 or not _is_key(said[0]) or not _is_key(said[1]):
            raise _damaged(file)
        dims = cursor.numbers(1)[0] & 0xFFFFFFFF  # four bytes behind the number of dimensions are not used
        storage = storages.get(said[1])
        if dims > _MAX_DIMS or storage is None:
            raise _damaged(file)
        numbers = cursor.numbers(2 * dims + 1)
        yield said[0], view(storage, storage.dtype, numbers[-1], numbers[:dims], numbers[dims:-1], file.name)
