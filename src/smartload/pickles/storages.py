"""Storages: what persistent ids say of them, the exact list of their types, and where they lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from smartload.errors import UnreadableError, UnsafeCheckpointError
from smartload.pickles.inert import Global, PersistentId
from smartload.records.entries import ITEMSIZE
from smartload.records.problems import Problem
from smartload.records.text import printable

STORAGES: Mapping[str, str] = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128",
    # as TorchScript alone writes them
    "UInt16Storage": "uint16", "UInt32Storage": "uint32", "UInt64Storage": "uint64", "ComplexHalfStorage": "complex32",
    "Float8_e4m3fnStorage": "float8_e4m3fn", "Float8_e5m2Storage": "float8_e5m2",
    "Float8_e4m3fnuzStorage": "float8_e4m3fnuz", "Float8_e5m2fnuzStorage": "float8_e5m2fnuz",
    "Float8_e8m0fnuStorage": "float8_e8m0fnu",
}  # fmt: skip
_QUANTIZED = {"QInt8Storage": 1, "QInt32Storage": 4, "QUInt8Storage": 1, "QUInt4x2Storage": 1, "QUInt2x4Storage": 1}
WIDEST = 1 << 48


class Storage(NamedTuple):
    """A run of bytes in the file that tensors are views of; `dtype` is "" where the file leaves it untyped."""

    offset: int
    nbytes: int
    dtype: str
    big_endian: bool = False
    file: int = 0


class StorageId(NamedTuple):
    """What a persistent id says of a storage; `numel` is in elements, in bytes where `dtype` is ""."""

    key: str
    dtype: str
    numel: int
    view: tuple[int, int] | None = None
    """Old files: the first element and the number of elements that are meant."""
    location: str = ""
    """The device that it lay on when it was saved."""

    @property
    def itemsize(self) -> int:
        """Bytes of one element, 1 where the storage is untyped."""
        return (ITEMSIZE.get(self.dtype) or _QUANTIZED[self.dtype]) if self.dtype else 1


def storage_id(pid: PersistentId, file: str) -> StorageId | None:
    """The storage that a persistent id names; None for an id that names a class."""
    value = pid.value
    if type(value) is not tuple or not value or type(value[0]) is not str:
        raise UnreadableError(Problem("storage_id", file))
    if value[0] == "module" and len(value) == 4:
        return None
    if value[0] != "storage" or len(value) not in (5, 6):
        raise UnreadableError(Problem("storage_id", file))
    kind, key, count = value[1], value[2], value[4]
    if type(kind) is not Global:
        raise UnsafeCheckpointError(Problem("unsafe_storage", file))
    if type(key) is not str or type(count) is not int or not 0 <= count < WIDEST:
        raise UnreadableError(Problem("storage_id", file))
    view = _view(value[5], count, file) if len(value) == 6 and value[5] is not None else None
    location = value[3] if type(value[3]) is str else ""
    return StorageId(key, _storage_dtype(kind, file), count, view, location)


def _storage_dtype(kind: Global, file: str) -> str:
    if kind.module == "torch" and kind.name in STORAGES:
        return STORAGES[kind.name]
    if kind.module == "torch" and kind.name in _QUANTIZED:
        return kind.name
    if kind.module == "torch.storage" and kind.name == "UntypedStorage":
        return ""
    raise UnreadableError(Problem("storage_type", file, {"name": printable(f"{kind.module}.{kind.name}")}))


def _view(view: object, count: int, file: str) -> tuple[int, int]:
    if type(view) is tuple and len(view) == 3 and all(type(n) is int and n >= 0 for n in view[1:]):
        first, size = view[1:]
        if first + size <= count:
            return first, size
    raise UnreadableError(Problem("storage_id", file))


Find = Callable[[StorageId], Storage]
"""Finds where the bytes of a storage lie, or raises UnreadableError."""


class Storages(NamedTuple):
    """Where the storage of each persistent id lies, and how many lay on which device."""

    storages: dict[PersistentId, Storage]
    tags: Counter[str]


def find_storages(persistent_ids: Iterable[PersistentId], find: Find, file: str) -> Storages:
    """All storages that persistent ids name, checked at once; ids of classes are left out."""
    known: dict[str, Storage] = {}
    storages: dict[PersistentId, Storage] = {}
    tags: Counter[str] = Counter()
    for pid in persistent_ids:
        said = storage_id(pid, file)
        if said is None:
            continue
        whole = known.get(said.key)
        if whole is None:
            whole = known[said.key] = find(said)
            tags[said.location] += 1
        elif said.numel and (said.dtype, said.numel * said.itemsize) != (whole.dtype, whole.nbytes):
            raise UnreadableError(Problem("storage_twice", file, {"name": printable(said.key)}))
        storages[pid] = whole if said.view is None and said.dtype == whole.dtype else _viewed(said, whole)
    return Storages(storages, tags)


def _viewed(said: StorageId, whole: Storage) -> Storage:
    if said.view is None:
        return whole._replace(dtype=said.dtype)
    first, count = said.view
    offset = whole.offset + first * said.itemsize
    return whole._replace(offset=offset, nbytes=count * said.itemsize, dtype=said.dtype)
