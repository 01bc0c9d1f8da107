"""Which inert notes mean a tensor: an exact list, everything else stays what it is."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from typing import TypeGuard

from smartload.errors import UnreadableError, UnsafeCheckpointError
from smartload.pickles.arrays import Array, array_of, described, plain_data, strides
from smartload.pickles.inert import Call, DictNote, Global, PersistentId, RawBytes
from smartload.pickles.storages import WIDEST, Storage
from smartload.records.entries import ITEMSIZE, Opaque, Span
from smartload.records.problems import Problem
from smartload.records.text import printable, with_article

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
    ("torch.autograd.variable", "Variable"),
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


class Tensors:
    """Knows the tensors of one file: inert notes in, spans out.

    Args:
        storages: where the storage of each persistent id lies.
        file: the file, for messages.
        start: where the pickle begins in the file.
    """

    def __init__(self, storages: Mapping[PersistentId, Storage], file: str, start: int = 0) -> None:
        self._storages, self._file, self._start = storages, file, start
        self._unseen = set(storages)
        self._held: list[bytes | str] = []
        self._numbers: dict[int, int] = {}
        self._texts: dict[int, bytes] = {}
        self._arrays: dict[int, tuple[Call, Span | Opaque]] = {}

    def storage(self, value: object) -> Storage | None:
        """The storage that a note stands for."""
        return self._storages.get(value) if type(value) is PersistentId else None

    def hold(self, raw: bytes | str) -> int:
        """Keep bytes that the file spells otherwise (a str stands for its Latin-1); the number of their file."""
        if id(raw) not in self._numbers:
            self._held.append(raw)
            self._numbers[id(raw)] = len(self._held)
        return self._numbers[id(raw)]

    def unseen(self) -> int | None:
        """How many of the file's references to storages belong to no tensor that was asked for; None: not known."""
        return len(self._unseen)

    def held(self, used: Container[int]) -> Iterator[bytes]:
        """What was kept, as file 1, 2, ...; nothing for those that are not used."""
        for number, raw in enumerate(self._held, 1):
            yield b"" if number not in used else raw.encode("latin1") if isinstance(raw, str) else raw

    def entry(self, value: object) -> Span | Opaque | None:
        """The span of a tensor or an array, or what kind it is of that has none; None for anything else."""
        if type(value) is Call:
            return self.tensor(value) or self._array(value)
        if type(value) is PersistentId:
            self._unseen.discard(value)
        return None

    def tensor(self, value: object) -> Span | Opaque | None:
        """The same for tensors only."""
        for _ in range(_MAX_WRAPS):
            if type(value) is not Call:
                return None
            func, args = value.func, value.args
            if type(func) is not Global or type(args) is not tuple:
                return None
            name = (func.module, func.name)
            if name == _V2 and len(args) == 6:
                return self._tensor(args)
            if name == _V2 and len(args) == 7:
                return self._tensor(args, flags=args[6])
            inner = _unwrapped(name, args)
            if inner is None:
                return self._unusual(name, args)
            value = inner
        raise UnreadableError(Problem("tensor", self._file))

    def _unusual(self, name: tuple[str, str], args: tuple[object, ...]) -> Span | Opaque | None:
        if name == _V1 and len(args) == 4:
            return self._tensor(args)
        if name == _V3 and 7 <= len(args) <= 8:
            dtype = args[6]
            if type(dtype) is not Global or dtype.module != "torch":
                raise UnreadableError(Problem("tensor", self._file))
            return self._tensor(args, dtype.name, args[7] if len(args) == 8 else None)
        if name in (_V1, _V2, _V3):
            raise UnreadableError(Problem("tensor", self._file))
        if name in _OTHER:
            self._see(args)
            return Opaque(_OTHER[name], tensor=True)
        if name == (_UTILS, "_rebuild_wrapper_subclass"):
            kind = args[0] if args else None
            what = with_article(printable(kind.name) if type(kind) is Global else "tensor subclass")
            return Opaque(what, tensor=True)
        if name[0] in ("torch", "torch.cuda", "torch.sparse") and name[1].endswith("Tensor"):
            return Opaque(with_article(printable(".".join(name))), tensor=True)
        return None

    def _see(self, args: tuple[object, ...]) -> None:
        """Note that storages belong to a tensor, though it has none of its own: the indices of a sparse one, say."""
        todo: list[object] = [args]
        for _ in range(_MAX_DIMS):
            value = todo.pop() if todo else None
            if type(value) is PersistentId:
                self._unseen.discard(value)
            elif type(value) is tuple or type(value) is list:
                todo.extend(value[:_MAX_DIMS])
            elif type(value) is Call:
                todo.append(value.args)

    def _array(self, value: Call) -> Span | Opaque | None:
        if id(value) not in self._arrays:
            array = array_of(value)
            if array is None:
                return None
            self._arrays[id(value)] = (
                value,
                self._array_span(array) if array.dtype else Opaque(described(array), tensor=True),
            )
        return self._arrays[id(value)][1]

    def _array_span(self, array: Array) -> Span | Opaque:
        shape, data = array.shape, self._utf8(array.data) if type(array.data) is str else plain_data(array.data)
        if not is_size(shape) or data is None:
            raise UnreadableError(Problem("tensor", self._file))
        size = len(data.raw) if type(data) is RawBytes else len(data)  # type: ignore[arg-type]
        if size != math.prod(shape) * ITEMSIZE[array.dtype]:
            facts = {"need": math.prod(shape) * ITEMSIZE[array.dtype], "have": size}
            raise UnreadableError(Problem("tensor_outside", self._file, facts))
        if type(data) is RawBytes:
            storage = Storage(self._start + data.offset, size, array.dtype, array.big_endian)
        else:
            storage = Storage(0, size, array.dtype, array.big_endian, self.hold(data))  # type: ignore[arg-type]
        steps = strides(shape, array.fortran)
        if type(array.axes) is tuple:
            shape, steps = (tuple(each[axis] for axis in array.axes) for each in (shape, steps))
        return view(storage, array.dtype, 0, shape, steps, self._file)

    def _utf8(self, text: str) -> bytes:
        """The bytes behind what Python 2 wrote, which did not tell names from raw bytes; once for a shared text."""
        if id(text) not in self._texts:
            self._texts[id(text)] = text.encode("utf-8", "surrogatepass")
        return self._texts[id(text)]

    def _tensor(self, args: tuple[object, ...], dtype: str = "", flags: object = None) -> Span | Opaque:
        source, first, shape, stride = args[:4]
        storage = self.storage(source)
        if storage is None:
            raise UnsafeCheckpointError(Problem("unsafe_storage", self._file))
        if type(source) is PersistentId:
            self._unseen.discard(source)
        if type(shape) is not tuple or type(stride) is not tuple:
            shape, stride = plain_size(shape), plain_size(stride)
        span = view(storage, dtype or storage.dtype, first, shape, stride, self._file)
        if flags is not None and isinstance(span, Span) and (view_of := _flagged(flags)) is not None:
            return Opaque(view_of, tensor=True)
        return span


def view(storage: Storage, dtype: str, first: object, shape: object, stride: object, file: str) -> Span | Opaque:
    """The span of a tensor in its storage, or what it is where its dtype has no bytes of its own.

    UnreadableError where it is no tensor, or reaches out of the storage.
    """
    if type(shape) is not tuple or type(stride) is not tuple or len(shape) != len(stride) or len(shape) > _MAX_DIMS:
        raise UnreadableError(Problem("tensor", file))
    if type(first) is not int or not 0 <= first < WIDEST:
        raise UnreadableError(Problem("tensor", file))
    reach, count = 1, 1
    for size, step in zip(shape, stride):
        if type(size) is not int or type(step) is not int or not 0 <= size < WIDEST or not 0 <= step < WIDEST:
            raise UnreadableError(Problem("tensor", file))
        reach += (size - 1) * step
        count *= size
    itemsize = ITEMSIZE.get(dtype)
    if itemsize is None:
        if not dtype:
            raise UnreadableError(Problem("tensor", file))
        return Opaque(f"a tensor of {printable(dtype)}", tensor=True)
    if count == 0:
        return Span(storage.file, storage.offset, 0, dtype, shape, stride, storage.big_endian)
    if count >= WIDEST or (first + reach) * itemsize > storage.nbytes:
        facts = {"need": (first + reach) * itemsize, "have": storage.nbytes}
        raise UnreadableError(Problem("tensor_outside", file, facts))
    at = storage.offset + first * itemsize
    return Span(storage.file, at, reach * itemsize, dtype, shape, stride, storage.big_endian)


def _flagged(flags: object) -> str | None:
    """What a tensor is whose bytes are not its values: a view that conjugates or negates them; None for any other."""
    flags = untagged(flags)
    if flags is None:
        return None
    if type(flags) is not DictNote or flags.pairs or not all(type(value) is bool for value in flags.data.values()):
        return "a tensor with flags that are not known"
    known = {"conj": "a conjugated view", "neg": "a negated view"}
    return next(
        (known.get(key, "a tensor with flags that are not known") for key, on in flags.data.items() if on), None
    )


def untagged(value: object) -> object:
    """What the writer of TorchScript marked with its type; anything else as it is."""
    tagged = type(value) is Call and type(value.func) is Global and type(value.args) is tuple and len(value.args) == 2
    if tagged and (value.func.module, value.func.name) == ("torch.jit._pickle", "restore_type_tag"):  # type: ignore[attr-defined]
        return value.args[0]  # type: ignore[attr-defined]
    return value


def _unwrapped(name: tuple[str, str], args: tuple[object, ...]) -> object:
    """The tensor inside a Parameter, a Buffer or a subclass of Tensor; None where `name` wraps nothing."""
    if name in _WRAPPERS and args:
        return args[0]
    if name == (_TENSOR, "_rebuild_from_type_v2") and len(args) == 4:
        return Call(args[0], args[2])
    return None


def plain_size(value: object) -> object:
    """The tuple that a torch.Size stands for; anything else as it is."""
    if type(value) is Call and type(value.func) is Global and type(value.args) is tuple and len(value.args) == 1:
        func = value.func
        if func.module == "torch" and func.name == "Size":
            return tuple(value.args[0]) if type(value.args[0]) is list else value.args[0]
    return value


def is_size(value: object) -> TypeGuard[tuple[int, ...]]:
    """Whether a value can be a shape or strides: numbers that no honest tensor exceeds, and not too many."""
    if type(value) is not tuple or len(value) > _MAX_DIMS:
        return False
    for n in value:  # noqa: SIM110 - a generator would take most of the time of reading many small tensors
        if type(n) is not int or not 0 <= n < WIDEST:
            return False
    return True
