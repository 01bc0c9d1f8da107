"""Which inert notes mean a tensor: an exact list, everything else stays what it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeGuard

from smartload.errors import UnreadableError, UnsafeCheckpointError
from smartload.folding import shown
from smartload.records import ITEMSIZE, Opaque, Problem, Span
from smartload.sources.inert import Map, Obj, Pid, Ref
from smartload.sources.naming import with_article

STORAGES: Mapping[str, str] = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128",
}  # fmt: skip
_QUANTIZED = {"QInt8Storage": 1, "QInt32Storage": 4, "QUInt8Storage": 1, "QUInt4x2Storage": 1, "QUInt2x4Storage": 1}
_WIDEST = 1 << 48
_MAX_DIMS = 64
_MAX_WRAPS = 16

_UTILS, _TENSOR, _PARAMETER = "torch._utils", "torch._tensor", "torch.nn.parameter"
_V1, _V2, _V3 = (_UTILS, "_rebuild_tensor"), (_UTILS, "_rebuild_tensor_v2"), (_UTILS, "_rebuild_tensor_v3")
_WRAPPERS = {
    (_UTILS, "_rebuild_parameter"),
    (_UTILS, "_rebuild_parameter_with_state"),
    (_UTILS, "_rebuild_device_tensor_from_cpu_tensor"),
    (_PARAMETER, "Parameter"),
    (_PARAMETER, "Buffer"),
}
_OTHER = {
    (_UTILS, "_rebuild_sparse_tensor"): "a sparse tensor",
    (_UTILS, "_rebuild_sparse_csr_tensor"): "a sparse tensor",
    (_UTILS, "_rebuild_qtensor"): "a quantized tensor",
    (_UTILS, "_rebuild_nested_tensor"): "a nested tensor",
    (_UTILS, "_rebuild_meta_tensor_no_storage"): "a meta tensor",
    (_UTILS, "_rebuild_device_tensor_from_numpy"): "a tensor of a device without storages",
    (_UTILS, "_rebuild_xla_tensor"): "a tensor of a device without storages",
}


class Storage(NamedTuple):
    """A run of bytes in the file that tensors are views of; `dtype` is "" where the file leaves it untyped."""

    offset: int
    nbytes: int
    dtype: str
    big_endian: bool = False


class StorageId(NamedTuple):
    """What a persistent id says of a storage; `numel` is in elements, in bytes where `dtype` is ""."""

    key: str
    dtype: str
    numel: int
    view: tuple[int, int] | None = None
    """Old files: the first element and the number of elements that are meant."""

    @property
    def itemsize(self) -> int:
        """Bytes of one element, 1 where the storage is untyped."""
        return (ITEMSIZE.get(self.dtype) or _QUANTIZED[self.dtype]) if self.dtype else 1


def storage_id(pid: Pid, file: str) -> StorageId | None:
    """The storage that a persistent id names; None for an id that names a class."""
    value = pid.value
    if type(value) is not tuple or not value or type(value[0]) is not str:
        raise UnreadableError(Problem("storage_id", file))
    if value[0] == "module" and len(value) == 4:
        return None
    if value[0] != "storage" or len(value) not in (5, 6):
        raise UnreadableError(Problem("storage_id", file))
    kind, key, count = value[1], value[2], value[4]
    if type(kind) is not Ref:
        raise UnsafeCheckpointError(Problem("unsafe_storage", file))
    if type(key) is not str or type(count) is not int or not 0 <= count < _WIDEST:
        raise UnreadableError(Problem("storage_id", file))
    view = _view(value[5], count, file) if len(value) == 6 and value[5] is not None else None
    return StorageId(key, _storage_dtype(kind, file), count, view)


def _storage_dtype(kind: Ref, file: str) -> str:
    if kind.module == "torch" and kind.name in STORAGES:
        return STORAGES[kind.name]
    if kind.module == "torch" and kind.name in _QUANTIZED:
        return kind.name
    if kind.module == "torch.storage" and kind.name == "UntypedStorage":
        return ""
    raise UnreadableError(Problem("storage_type", file, {"name": shown(f"{kind.module}.{kind.name}")}))


def _view(view: object, count: int, file: str) -> tuple[int, int]:
    if type(view) is tuple and len(view) == 3 and all(type(n) is int and n >= 0 for n in view[1:]):
        first, size = view[1:]
        if first + size <= count:
            return first, size
    raise UnreadableError(Problem("storage_id", file))


class Tensors:
    """Knows the tensors of one file: inert notes in, spans out."""

    def __init__(self, storages: Mapping[Pid, Storage], file: str) -> None:
        self._storages, self._file = storages, file
        self._unseen = set(storages)

    def unseen(self) -> int:
        """How many of the file's references to storages belong to no tensor that was asked for."""
        return len(self._unseen)

    def entry(self, value: object) -> Span | Opaque | None:
        """The span of a tensor, or what kind of tensor it is that has none; None for anything but a tensor."""
        for _ in range(_MAX_WRAPS):
            if type(value) is not Obj:
                return None
            func, args = value.func, value.args
            if type(func) is not Ref or type(args) is not tuple:
                return None
            name = (func.module, func.name)
            if name == _V2 and 6 <= len(args) <= 7:
                return self._tensor(args[:4], "", args[6] if len(args) == 7 else None)
            inner = _unwrapped(name, args)
            if inner is None:
                return self._unusual(name, args)
            value = inner
        raise UnreadableError(Problem("tensor", self._file))

    def _unusual(self, name: tuple[str, str], args: tuple[object, ...]) -> Span | Opaque | None:
        if name == _V1 and len(args) == 4:
            return self._tensor(args, "", None)
        if name == _V3 and 7 <= len(args) <= 8:
            dtype = args[6]
            if type(dtype) is not Ref or dtype.module != "torch":
                raise UnreadableError(Problem("tensor", self._file))
            return self._tensor(args[:4], dtype.name, args[7] if len(args) == 8 else None)
        if name in (_V1, _V2, _V3):
            raise UnreadableError(Problem("tensor", self._file))
        if name in _OTHER:
            return Opaque(_OTHER[name])
        if name == (_UTILS, "_rebuild_wrapper_subclass"):
            kind = args[0] if args else None
            return Opaque(with_article(shown(kind.name) if type(kind) is Ref else "tensor of its own class"))
        if name[0] in ("torch", "torch.cuda", "torch.sparse") and name[1].endswith("Tensor"):
            return Opaque(with_article(shown(".".join(name))))
        return None

    def _tensor(self, args: tuple[object, ...], dtype: str, flags: object) -> Span | Opaque:
        pid, first, shape, stride = args
        if type(pid) is not Pid:
            raise UnsafeCheckpointError(Problem("unsafe_storage", self._file))
        shape, stride = _plain_size(shape), _plain_size(stride)
        if not (_counts(shape) and _counts(stride) and len(shape) == len(stride) and type(first) is int and first >= 0):
            raise UnreadableError(Problem("tensor", self._file))
        storage = self._storages.get(pid)
        if storage is None:
            raise UnsafeCheckpointError(Problem("unsafe_storage", self._file))
        self._unseen.discard(pid)
        dtype = dtype or storage.dtype
        if dtype not in ITEMSIZE:
            if not dtype:
                raise UnreadableError(Problem("tensor", self._file))
            return Opaque(f"a tensor of {shown(dtype)}")
        if type(flags) is Map and (flagged := [key for key in ("conj", "neg") if flags.data.get(key) is True]):
            return Opaque("a conjugated view" if flagged[0] == "conj" else "a negated view")
        return self._span(storage, dtype, first, shape, stride)

    def _span(self, storage: Storage, dtype: str, first: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> Span:
        itemsize = ITEMSIZE[dtype]
        if 0 in shape:
            return Span(0, storage.offset, 0, dtype, shape, stride, storage.big_endian)
        reach, count = 1, 1
        for size, step in zip(shape, stride, strict=True):
            reach += (size - 1) * step
            count *= size
        if count >= _WIDEST or (first + reach) * itemsize > storage.nbytes:
            facts = {"need": (first + reach) * itemsize, "have": storage.nbytes}
            raise UnreadableError(Problem("tensor_outside", self._file, facts))
        at = storage.offset + first * itemsize
        return Span(0, at, reach * itemsize, dtype, shape, stride, storage.big_endian)


def _unwrapped(name: tuple[str, str], args: tuple[object, ...]) -> object:
    """The tensor inside a Parameter, a Buffer or a subclass of Tensor; None where `name` wraps nothing."""
    if name in _WRAPPERS and args:
        return args[0]
    if name == (_TENSOR, "_rebuild_from_type_v2") and len(args) == 4:
        return Obj(args[0], args[2])
    return None


def _plain_size(value: object) -> object:
    if type(value) is Obj and type(value.func) is Ref and type(value.args) is tuple and len(value.args) == 1:
        func = value.func
        if func.module == "torch" and func.name == "Size":
            return tuple(value.args[0]) if type(value.args[0]) is list else value.args[0]
    return value


def _counts(value: object) -> TypeGuard[tuple[int, ...]]:
    if type(value) is not tuple or len(value) > _MAX_DIMS:
        return False
    return all(type(n) is int and 0 <= n < _WIDEST for n in value)
