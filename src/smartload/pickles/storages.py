"""Read persistent ids as storages, and find where the bytes of each storage lie.

A persistent id of torch is `("storage", type, key, location, numel)`, before torch 1.6 with a view as the sixth.
"""

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
    # These only TorchScript writes; torch.save writes such tensors as untyped storages.
    "UInt16Storage": "uint16", "UInt32Storage": "uint32", "UInt64Storage": "uint64", "ComplexHalfStorage": "complex32",
    "Float8_e4m3fnStorage": "float8_e4m3fn", "Float8_e5m2Storage": "float8_e5m2",
    "Float8_e4m3fnuzStorage": "float8_e4m3fnuz", "Float8_e5m2fnuzStorage": "float8_e5m2fnuz",
    "Float8_e8m0fnuStorage": "float8_e8m0fnu", "BComplex32Storage": "bcomplex32",
}  # fmt: skip
"""Name of a storage class in the module `torch` -> dtype of its elements. The list is exact: nothing else is typed."""
# Quantized storages, with the bytes of an element: they are located, so that the other tensors of the file can be read;
# `Tensors` refuses the quantized tensors themselves by name.
_QUANTIZED = {"QInt8Storage": 1, "QInt32Storage": 4, "QUInt8Storage": 1, "QUInt4x2Storage": 1, "QUInt2x4Storage": 1}
WIDEST = 1 << 48
"""Sizes, strides, offsets and element counts must be smaller: no real tensor comes near, and torch's own integers, of
64 bits, hold each of them."""


class Storage(NamedTuple):
    """Bytes of a file of which tensors are views.

    Attributes:
        offset: where they begin in the file.
        nbytes: how many they are.
        dtype: the dtype of their elements, "" where the storage is untyped.
        big_endian: whether the bytes of each element are in big-endian order.
        file: number of the file: 0 is the checkpoint's own, 1, 2, ... are bytes kept by `Tensors.hold`.
    """

    offset: int
    nbytes: int
    dtype: str
    big_endian: bool = False
    file: int = 0


class StorageId(NamedTuple):
    """What a persistent id says of a storage.

    Attributes:
        key: the name of the storage in its file.
        dtype: the dtype of its elements, "" where it is untyped; for a quantized storage the name of its class.
        numel: the number of its elements, of its bytes where it is untyped.
        view: the part that is meant, in files of before torch 1.6: its own key, its first element, its number of
            elements; else None.
        location: the device on which it lay when it was saved; "" where that is not said.
    """

    key: str
    dtype: str
    numel: int
    view: tuple[str, int, int] | None = None
    location: str = ""

    @property
    def itemsize(self) -> int:
        """The bytes of one element, 1 where the storage is untyped."""
        return (ITEMSIZE.get(self.dtype) or _QUANTIZED[self.dtype]) if self.dtype else 1


def storage_id(pid: PersistentId, file: str) -> StorageId | None:
    """Read a persistent id as that of a storage; None for one that names a module's class.

    Raises:
        UnreadableError: it is not what torch writes.
        UnsafeCheckpointError: it has another value where the type of the storage must be.
    """
    value = pid.value
    if type(value) is not tuple or not value or type(value[0]) is not str:
        raise UnreadableError(Problem("storage_id", file))
    if value[0] == "module" and len(value) == 4:
        return None  # before torch 1.6: the class of a whole module, its source file and its source, which are ignored
    if value[0] != "storage" or len(value) not in (5, 6):
        raise UnreadableError(Problem("storage_id", file))
    kind, key, count = value[1], value[2], value[4]
    # torch would use whatever stands here as a storage class; no writer puts anything but a name here.
    if type(kind) is not Global:
        raise UnsafeCheckpointError(Problem("unsafe_storage", file))
    # `type() is`, not isinstance: a bool is an int to Python.
    if type(key) is not str or type(count) is not int or not 0 <= count < WIDEST:
        raise UnreadableError(Problem("storage_id", file))
    view = _view(value[5], count, file) if len(value) == 6 and value[5] is not None else None
    # The device is told to the user and decides nothing, so whatever a file has in its place is accepted. All but one:
    # what lay on meta has no values, and torch makes it without any, whatever bytes a file has for it.
    location = value[3] if type(value[3]) is str else ""
    if location == "meta":
        raise UnreadableError(Problem("storage_id", file))
    return StorageId(key, _storage_dtype(kind, file), count, view, location)


def _storage_dtype(kind: Global, file: str) -> str:
    """Give the dtype of a storage class; "" for an untyped one, the class's own name for a quantized one."""
    if kind.module == "torch" and kind.name in STORAGES:
        return STORAGES[kind.name]
    if kind.module == "torch" and kind.name in _QUANTIZED:
        return kind.name
    if kind.module == "torch.storage" and kind.name == "UntypedStorage":
        return ""
    raise UnreadableError(Problem("storage_type", file, {"name": printable(f"{kind.module}.{kind.name}")}))


def _view(view: object, count: int, file: str) -> tuple[str, int, int]:
    """Check the view `(key, first, size)` of a storage of `count` elements, and return it."""
    # A view beyond the storage would take the bytes of the next one for weights.
    if type(view) is tuple and len(view) == 3 and all(type(n) is int and n >= 0 for n in view[1:]):
        key, first, size = view
        if type(key) is str and first + size <= count:
            return key, first, size
    raise UnreadableError(Problem("storage_id", file))


Find = Callable[[StorageId], Storage]
"""A function of a file format that finds where the bytes of a storage lie, or raises UnreadableError."""


class Storages(NamedTuple):
    """The storages of a file.

    Attributes:
        storages: the storage of each persistent id.
        tags: device -> number of storages that lay on it when they were saved.
    """

    storages: dict[PersistentId, Storage]
    tags: Counter[str]


def find_storages(persistent_ids: Iterable[PersistentId], find: Find, file: str) -> Storages:
    """Find the storages of all `persistent_ids`, by `find`; ids of module classes are left out.

    A key stands for one storage: `find` is called once for it, and each id with that key must agree on dtype and size,
    or UnreadableError is raised. Which of two descriptions a reader believed would decide the values. The key of a view
    likewise stands for one view: torch takes the first storage or view that had a key for all that have it later.
    """
    by_key: dict[str, Storage] = {}
    views: dict[str, tuple[str, int, int]] = {}
    storages: dict[PersistentId, Storage] = {}
    tags: Counter[str] = Counter()
    for pid in persistent_ids:
        info = storage_id(pid, file)
        if info is None:
            continue
        storage = by_key.get(info.key)
        if storage is None:
            storage = by_key[info.key] = find(info)
            tags[info.location] += 1
        # Without any bytes, each id has the dtype that it says: torch.save writes several for one such storage.
        elif (storage.nbytes or info.numel) and (info.dtype, info.numel * info.itemsize) != (
            storage.dtype,
            storage.nbytes,
        ):
            raise UnreadableError(Problem("storage_twice", file, {"name": printable(info.key)}))
        if info.view is not None:
            key, first, count = info.view
            if views.setdefault(key, (info.key, first, count)) != (info.key, first, count):
                raise UnreadableError(Problem("storage_twice", file, {"name": printable(key)}))
            offset = storage.offset + first * info.itemsize
            storage = storage._replace(offset=offset, nbytes=count * info.itemsize, dtype=info.dtype)
        elif info.dtype != storage.dtype:
            storage = storage._replace(dtype=info.dtype)
        storages[pid] = storage
    if both := views.keys() & by_key.keys():
        raise UnreadableError(Problem("storage_twice", file, {"name": printable(min(both))}))
    return Storages(storages, tags)
