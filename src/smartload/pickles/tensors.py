"""Recognise the inert notes that stand for tensors, and find where in the file each tensor lies.

An exact list of names decides: `torch._utils._rebuild_tensor_v2` and its like, their wrappers, NumPy's arrays. Whatever
else a file calls is no tensor. The functions are never called: their arguments say storage, offset, shape and strides.
"""

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
"""torch allows more, but many of its own operations stop at 64."""
_MAX_ARGS = 64
"""Values looked at for the storages of a tensor without a span; the real forms have about ten."""
_MAX_WRAPS = 16
"""Wrappers around one tensor; real files have two or three. A hostile one could have millions around a tensor that
many keys share, and each key would go through them all."""

_UTILS, _TENSOR, _PARAMETER = "torch._utils", "torch._tensor", "torch.nn.parameter"
_V1, _V2, _V3 = (_UTILS, "_rebuild_tensor"), (_UTILS, "_rebuild_tensor_v2"), (_UTILS, "_rebuild_tensor_v3")
_CAST = (_UTILS, "_rebuild_device_tensor_from_cpu_tensor")
# Their first argument is the tensor. What else they carry (requires_grad, hooks, attributes, a device) is for the model
# to decide, not for the file.
_WRAPPERS = {
    (_UTILS, "_rebuild_parameter"),
    (_UTILS, "_rebuild_parameter_with_state"),
    _CAST,
    (_PARAMETER, "Parameter"),
    (_PARAMETER, "Buffer"),
    ("torch.autograd.variable", "Variable"),
}
# Attributes that write the values of a tensor, or put others in their place. All others are the Python object's own.
_VALUES = frozenset(("data", "real", "imag"))
# Tensors whose values are not simply the elements of one storage: recognised, so that a message can name them.
_NO_SPAN = {
    (_UTILS, "_rebuild_sparse_tensor"): "a sparse tensor",
    (_UTILS, "_rebuild_sparse_csr_tensor"): "a sparse tensor",
    (_UTILS, "_rebuild_qtensor"): "a quantized tensor",
    (_UTILS, "_rebuild_nested_tensor"): "a nested tensor",
    (_UTILS, "_rebuild_meta_tensor_no_storage"): "a meta tensor",
    (_UTILS, "_rebuild_device_tensor_from_numpy"): "a tensor of a device without storages",
    (_UTILS, "_rebuild_xla_tensor"): "a tensor of a device without storages",
}


class Tensors:
    """The tensors of one file: finds the span of each from its inert note.

    Results are kept by `id` of the note, never by its value, so that nothing of the file is hashed or compared. The
    notes live as long as the root of the pickle, so an id stays that of one note.

    Args:
        storages: where the storage of each persistent id lies.
        file: the file, for messages.
        start: where the pickle begins in the file.
    """

    def __init__(self, storages: Mapping[PersistentId, Storage], file: str, start: int = 0) -> None:
        self._storages, self._file, self._start = storages, file, start
        self._unseen = set(storages)  # the persistent ids of which no tensor has been asked for yet
        self._held: list[bytes | str] = []
        self._numbers: dict[int, int] = {}  # by id of the bytes in `_held`
        self._texts: dict[int, bytes] = {}  # by id of the text
        self._arrays: dict[int, tuple[Call, Span | Opaque]] = {}  # by id of the call, which is kept beside

    def storage(self, value: object) -> Storage | None:
        """Find the storage that the note `value` stands for; None where it stands for none."""
        return self._storages.get(value) if type(value) is PersistentId else None

    def hold(self, raw: bytes | str) -> int:
        """Keep bytes that the file does not hold as they are, such as text that stands for its Latin-1 bytes.

        Returns a file number for spans of them: 1, 2, ...; the same for the same object.
        """
        if id(raw) not in self._numbers:
            self._held.append(raw)
            self._numbers[id(raw)] = len(self._held)
        return self._numbers[id(raw)]

    def unseen(self) -> int | None:
        """Count the file's references to storages that belong to no tensor asked for so far; None where not known."""
        return len(self._unseen)

    def held(self, used: Container[int]) -> Iterator[bytes]:
        """Give the bytes that `hold` kept, in the order of their numbers.

        Numbers that are not in `used` give b"", so that memory is spent only on tensors that some key names.
        """
        for number, raw in enumerate(self._held, 1):
            yield b"" if number not in used else raw.encode("latin1") if isinstance(raw, str) else raw

    def entry(self, value: object) -> Span | Opaque | None:
        """Find the span of the tensor or NumPy array `value`.

        Returns an `Opaque` that says what it is where it has no span (a sparse tensor), None where it is no tensor.

        Raises:
            UnreadableError: it contradicts itself, or reaches out of its storage.
            UnsafeCheckpointError: it has another value where its storage must be.
        """
        if type(value) is Call:
            return self.tensor(value) or self._array(value)
        if type(value) is PersistentId:
            self._unseen.discard(value)  # a bare storage under a key: it is named by that key
        return None

    def tensor(self, value: object, wraps: int = _MAX_WRAPS) -> Span | Opaque | None:
        """Do the same as `entry`, for tensors of torch only, in as many wrappers."""
        for left in range(wraps, 0, -1):
            if type(value) is not Call:
                return None
            func, args = value.func, value.args
            if type(func) is not Global or type(args) is not tuple:
                return None
            name = (func.module, func.name)
            if value.state is not None or value.items is not None or value.appends is not None:
                self._check_state(value, name)
            # First what torch writes for nearly every tensor. Arguments 4 and 5, requires_grad and hooks, are ignored.
            if name == _V2 and len(args) == 6:
                return self._tensor_span(args)
            if name == _V2 and len(args) == 7:
                return self._tensor_span(args, flags=args[6])
            inner = _unwrapped(name, args)
            if inner is None:
                return self._rare_tensor(name, args)
            if name == _CAST:
                return self._cast(args, left - 1)
            if len(args) == 4 and not _keeps_values(args[3]):
                raise UnreadableError(Problem("tensor", self._file))
            value = inner
        raise UnreadableError(Problem("tensor", self._file))  # wrapped more often than any real tensor

    def _check_state(self, value: Call, name: tuple[str, str]) -> None:
        """Refuse a tensor that the file changes after it was made: torch would give it another storage, or fail.

        Only torch before 0.4 wrote a state, that of a Parameter: (requires_grad, volatile, hooks).
        """
        if name[0] not in (_UTILS, _TENSOR, _PARAMETER, "torch.autograd.variable"):
            return
        old = name in _WRAPPERS and name[0] != _UTILS and type(value.state) is tuple and len(value.state) == 3
        if not old or value.items is not None or value.appends is not None:
            raise UnreadableError(Problem("tensor", self._file))

    def _cast(self, args: tuple[object, ...], wraps: int) -> Span | Opaque | None:
        """Find the span of a tensor of a device without storages, `(data, dtype, device, requires_grad)`.

        torch casts the data to the dtype. Where they have another, which no writer gives them, their bytes are not its
        values.
        """
        found, dtype = self.tensor(args[0], wraps), args[1] if len(args) == 4 else None
        if type(dtype) is not Global or dtype.module != "torch":
            raise UnreadableError(Problem("tensor", self._file))
        if isinstance(found, Span) and found.dtype != dtype.name:
            raise UnreadableError(Problem("tensor", self._file))
        return found

    def _rare_tensor(self, name: tuple[str, str], args: tuple[object, ...]) -> Span | Opaque | None:
        """Find the span of a tensor in the oldest or newest form, or say its kind; None where it is no tensor."""
        if name == _V1 and len(args) == 4:
            return self._tensor_span(args)
        if name == _V3 and 7 <= len(args) <= 8:
            dtype = args[6]  # v3 has untyped storages, for dtypes that came after the typed ones
            if type(dtype) is not Global or dtype.module != "torch":
                raise UnreadableError(Problem("tensor", self._file))
            # torch turns the bytes of a storage round by the storage's own dtype: not at all, where that has none.
            storage = self.storage(args[0])
            if (
                storage is not None
                and storage.big_endian
                and storage.dtype != dtype.name
                and ITEMSIZE.get(dtype.name, 0) > 1
            ):
                return Opaque(f"a big-endian tensor of {printable(dtype.name)}", tensor=True)
            return self._tensor_span(args, dtype.name, args[7] if len(args) == 8 else None)
        if name in (_V1, _V2, _V3):  # with a number of arguments that torch never writes
            raise UnreadableError(Problem("tensor", self._file))
        if name in _NO_SPAN:
            self._claim_storages(args)
            return Opaque(_NO_SPAN[name], tensor=True)
        # Tensor subclasses that keep their values in inner tensors: what these mean, only the class knows.
        if name == (_UTILS, "_rebuild_wrapper_subclass"):
            kind = args[0] if args else None
            what = with_article(printable(kind.name) if type(kind) is Global else "tensor subclass")
            return Opaque(what, tensor=True)
        # A constructor such as torch.FloatTensor(3), as very old files have it.
        if name[0] in ("torch", "torch.cuda", "torch.sparse") and name[1].endswith("Tensor"):
            return Opaque(with_article(printable(".".join(name))), tensor=True)
        return None

    def _claim_storages(self, args: tuple[object, ...]) -> None:
        """Count the storages in `args` as those of a tensor that has no span: indices and values of a sparse one, say.

        Else they would be reported as tensors that no key names.
        """
        todo: list[object] = [args]
        for _ in range(_MAX_ARGS):
            value = todo.pop() if todo else None
            if type(value) is PersistentId:
                self._unseen.discard(value)
            elif type(value) is tuple or type(value) is list:
                todo.extend(value[:_MAX_ARGS])
            elif type(value) is Call:
                todo.append(value.args)

    def _array(self, value: Call) -> Span | Opaque | None:
        """Find the span of a NumPy array, once however many keys share it; None where `value` is no array."""
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
        """Find the span of an array of a dtype that torch has: in the pickle itself, or in bytes that are held."""
        shape, data = array.shape, self._utf8(array.data) if type(array.data) is str else plain_data(array.data)
        if not is_size(shape) or data is None:
            raise UnreadableError(Problem("tensor", self._file))
        # NumPy's arrays lie without gaps, so shape and data must agree to the byte: what is left over is damage.
        size = len(data.raw) if type(data) is RawBytes else len(data)  # type: ignore[arg-type]
        if size != math.prod(shape) * ITEMSIZE[array.dtype]:
            facts = {"need": math.prod(shape) * ITEMSIZE[array.dtype], "have": size}
            raise UnreadableError(Problem("tensor_outside", self._file, facts))
        if type(data) is RawBytes:
            # The bytes are a run of the file itself, which is read straight into the parameter.
            storage = Storage(self._start + data.offset, size, array.dtype, array.big_endian)
        else:
            storage = Storage(0, size, array.dtype, array.big_endian, self.hold(data))  # type: ignore[arg-type]
        steps = strides(shape, array.fortran)
        if type(array.axes) is tuple:
            shape, steps = (tuple(numbers[axis] for axis in array.axes) for numbers in (shape, steps))
        return view(storage, array.dtype, 0, shape, steps, self._file)

    def _utf8(self, text: str) -> bytes:
        """Give the bytes of an array that Python 2 wrote as `str` and that happened to be UTF-8, so were read as text.

        The same object for the same text, as `hold` keeps one copy of an object.
        """
        if id(text) not in self._texts:
            self._texts[id(text)] = text.encode("utf-8", "surrogatepass")
        return self._texts[id(text)]

    def _tensor_span(self, args: tuple[object, ...], dtype: str = "", flags: object = None) -> Span | Opaque:
        """Find the span of a tensor from the arguments `(storage, offset, shape, strides, ...)`.

        Args:
            args: the arguments, as torch's function takes them.
            dtype: the dtype, where it is not that of the storage.
            flags: what torch writes of a view that conjugates or negates its elements.
        """
        source, first, shape, stride = args[:4]
        storage = self.storage(source)
        if storage is None:  # a global or a call, which torch would use as it is
            raise UnsafeCheckpointError(Problem("unsafe_storage", self._file))
        if type(source) is PersistentId:
            self._unseen.discard(source)
        if type(shape) is not tuple or type(stride) is not tuple:  # asked first: nearly all files have plain tuples
            shape, stride = plain_size(shape), plain_size(stride)
        span = view(storage, dtype or storage.dtype, first, shape, stride, self._file)
        return _flagged(span, flags) if flags is not None and isinstance(span, Span) else span


def view(storage: Storage, dtype: str, first: object, shape: object, stride: object, file: str) -> Span | Opaque:
    """Find the span of a tensor that is a view of `storage`.

    Zero strides and strides that overlap are legal, as in torch.

    Args:
        storage: the bytes that it is a view of.
        dtype: the dtype of its elements.
        first: the element of the storage at which it begins.
        shape: its shape, as the file gives it and unchecked.
        stride: its strides in elements, likewise.
        file: the file's name, for messages.

    Returns:
        The span, or an `Opaque` for a dtype that has no entry in `ITEMSIZE`, such as float4_e2m1fn_x2.

    Raises:
        UnreadableError: the numbers describe no tensor, or it reaches out of the storage. torch itself does not check
            this when it maps a file, and takes the bytes behind the storage for weights.
    """
    if type(shape) is not tuple or type(stride) is not tuple or len(shape) != len(stride) or len(shape) > _MAX_DIMS:
        raise UnreadableError(Problem("tensor", file))
    if type(first) is not int or not 0 <= first < WIDEST:
        raise UnreadableError(Problem("tensor", file))
    # `reach`: the elements from the first to the last one that the view touches. This runs for every tensor of a file.
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
    if count == 0:  # a tensor without elements touches nothing, so its offset may be anything
        return Span(storage.file, storage.offset, 0, dtype, shape, stride, storage.big_endian)
    if count >= WIDEST or (first + reach) * itemsize > storage.nbytes:
        facts = {"need": (first + reach) * itemsize, "have": storage.nbytes}
        raise UnreadableError(Problem("tensor_outside", file, facts))
    at = storage.offset + first * itemsize
    return Span(storage.file, at, reach * itemsize, dtype, shape, stride, storage.big_endian)


def _flagged(span: Span, flags: object) -> Span | Opaque:
    """Mark the span of a view that conjugates or negates its elements, as `{"conj": True}` and `{"neg": True}` say.

    An `Opaque` for flags that are not known, and for those that torch itself gives no tensor of this dtype.
    """
    flags = untagged(flags)
    if flags is None:
        return span
    on = flags.data if type(flags) is DictNote and not flags.pairs else {"": None}
    if not (on.keys() <= {"conj", "neg"} and all(type(value) is bool for value in on.values())):
        return Opaque("a tensor with flags that are not known", tensor=True)
    conj, neg = "conj" in on, "neg" in on  # torch looks for the name alone: a flag that is False counts all the same
    if conj and "complex" not in span.dtype:
        return Opaque("a conjugated view", tensor=True)
    if neg and span.dtype.startswith(("bool", "uint16", "uint32", "uint64", "float8")):
        return Opaque("a negated view", tensor=True)
    return span._replace(conj=conj, neg=neg)


def untagged(value: object) -> object:
    """Give the value inside a call of `restore_type_tag`, which C++ writers put around dicts and lists; else `value`.

    The tag names the static type in TorchScript, which matters to TorchScript alone.
    """
    tagged = type(value) is Call and type(value.func) is Global and type(value.args) is tuple and len(value.args) == 2
    if tagged and (value.func.module, value.func.name) == ("torch.jit._pickle", "restore_type_tag"):  # type: ignore[attr-defined]
        return value.args[0]  # type: ignore[attr-defined]
    return value


def _keeps_values(state: object) -> bool:
    """Tell whether a tensor has the values that it was made with, once each item of the state was set on it.

    The state is a dict of attributes, or a pair of them where the class has slots.
    """
    states = state if type(state) is tuple and len(state) == 2 else (state,)
    return all(
        each is None or (type(each) is DictNote and not each.pairs and _VALUES.isdisjoint(each.data)) for each in states
    )


def _unwrapped(name: tuple[str, str], args: tuple[object, ...]) -> object:
    """Give the note of the tensor inside a Parameter, a Buffer or a subclass; None where `name` is no wrapper."""
    if name in _WRAPPERS and args:
        return args[0]
    if name == (_TENSOR, "_rebuild_from_type_v2") and len(args) == 4:
        # (func, type, args, state): torch calls func(*args), then sets type and state.
        return Call(args[0], args[2])
    return None


def plain_size(value: object) -> object:
    """Give the tuple inside a call of `torch.Size`; else `value` itself."""
    if type(value) is Call and type(value.func) is Global and type(value.args) is tuple and len(value.args) == 1:
        func = value.func
        if func.module == "torch" and func.name == "Size":
            return tuple(value.args[0]) if type(value.args[0]) is list else value.args[0]
    return value


def is_size(value: object) -> TypeGuard[tuple[int, ...]]:
    """Tell whether `value` can be a shape or strides: a tuple of at most 64 ints from 0 up to, not including, WIDEST.

    A bool is no int here: `True` for a size is nothing that torch writes.
    """
    if type(value) is not tuple or len(value) > _MAX_DIMS:
        return False
    for n in value:  # noqa: SIM110 - a generator would take most of the time of reading many small tensors
        if type(n) is not int or not 0 <= n < WIDEST:
            return False
    return True
