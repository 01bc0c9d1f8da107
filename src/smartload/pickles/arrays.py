"""NumPy arrays, as pickles and the headers of .npy describe them: dtype, shape, order, and the bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple, TypeGuard

from smartload.pickles.inert import Call, Global, RawBytes
from smartload.records.text import printable

DTYPES: Mapping[str, str] = {
    "f2": "float16", "f4": "float32", "f8": "float64", "c8": "complex64", "c16": "complex128", "b1": "bool",
    "i1": "int8", "i2": "int16", "i4": "int32", "i8": "int64",
    "u1": "uint8", "u2": "uint16", "u4": "uint32", "u8": "uint64",
}  # fmt: skip
"""What torch can hold; the names are NumPy's kind and width."""
_HEADER = re.compile(
    r"""\{\s*'descr':\s*'(?P<order>[<>|=])(?P<kind>\w{1,8})',\s*'fortran_order':\s*(?P<fortran>True|False),"""
    r"""\s*'shape':\s*\((?P<shape>[\d\sL,]*)\),?\s*\}\s*"""
)
MAX_HEADER = 4096
_MAX_DIMS, _DIGITS = 64, 15
_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")


class Array(NamedTuple):
    """An array's elements in a row: `data` holds all of them, the last index running fastest unless `fortran`."""

    kind: str
    big_endian: bool
    fortran: bool
    shape: object
    data: object
    axes: object = None
    """The order in which a permuted array's axes are, where it is neither of the two."""

    @property
    def dtype(self) -> str:
        """The name that torch has for the dtype, "" where it has none."""
        return DTYPES.get(self.kind, "")


_UNUSUAL = Array("", False, False, None, None)


def array_of(value: Call) -> Array | None:
    """The array that a note stands for; None for anything else."""
    func = value.func
    if type(func) is not Global or type(value.args) is not tuple:
        return None
    if func.name == "_reconstruct" and func.module in _MULTIARRAY:
        return _reconstructed(value) or _UNUSUAL
    if func.name == "_frombuffer" and func.module in _NUMERIC:
        return _from_buffer(value.args) or _UNUSUAL
    return None


def _reconstructed(value: Call) -> Array | None:
    # (version, shape, dtype, is_fortran, data); the oldest have no version
    state = value.state[-4:] if type(value.state) is tuple and len(value.state) in (4, 5) else ()
    cls = value.args[0] if type(value.args) is tuple and value.args else None
    plain = type(cls) is Global and cls.name == "ndarray" and cls.module == "numpy"
    if not plain or len(state) != 4 or not (found := _dtype(state[1])):
        return None
    return Array(*found, state[2] is True, state[0], state[3])


def _from_buffer(args: tuple[object, ...]) -> Array | None:
    if len(args) not in (4, 5) or not (found := _dtype(args[1])):
        return None
    data, _, shape, order, *axes = args
    if order == "K" and axes and _is_order(axes[0], shape):
        return Array(*found, False, shape, data, axes[0])
    return Array(*found, order == "F", shape, data) if order in ("C", "F") and axes in ([], [None]) else None


def _is_order(axes: object, shape: object) -> TypeGuard[tuple[int, ...]]:
    return (
        type(axes) is tuple and type(shape) is tuple and sorted(map(str, axes)) == sorted(map(str, range(len(shape))))
    )


def header_of(start: bytes) -> tuple[Array, int] | None:
    """The array of a .npy file that begins with `start`, without its data, and where the data begins."""
    if start[:6] != b"\x93NUMPY" or len(start) < 12:
        return None
    width = 2 if start[6] == 1 else 4
    at = 8 + width
    size = int.from_bytes(start[8:at], "little")
    if at + size > min(len(start), MAX_HEADER):
        return None
    found = _HEADER.fullmatch(start[at : at + size].decode("latin1"))
    if found is None:
        return None
    sizes = found["shape"].replace("L", "").replace(",", " ").split()
    if len(sizes) > _MAX_DIMS or any(len(size) > _DIGITS for size in sizes):
        return None
    shape = tuple(map(int, sizes))
    return Array(found["kind"], found["order"] == ">", found["fortran"] == "True", shape, None), at + size


def strides(shape: tuple[int, ...], fortran: bool) -> tuple[int, ...]:
    """The strides of elements in a row, in elements.

    >>> strides((2, 3, 4), False), strides((2, 3, 4), True)
    ((12, 4, 1), (1, 2, 6))
    """
    sizes, steps, step = shape if fortran else shape[::-1], [], 1
    for size in sizes:
        steps.append(step)
        step *= size
    return tuple(steps if fortran else steps[::-1])


def plain_data(data: object) -> RawBytes | bytes | str | None:
    """The bytes of an array, however its pickle protocol wrote them; a str stands for its Latin-1 bytes."""
    if type(data) is RawBytes or type(data) is bytes:
        return data
    if type(data) is not Call or type(data.func) is not Global or type(data.args) is not tuple:
        return None
    name, args = (data.func.module, data.func.name), data.args
    if name == ("_codecs", "encode") and len(args) == 2 and type(args[0]) is str and args[1] == "latin1":
        return args[0]
    return b"" if name in (("builtins", "bytes"), ("__builtin__", "bytes")) and not args else None


def described(array: Array) -> str:
    """What an array is that torch cannot hold."""
    if not array.kind:
        return "a numpy array of its own class"
    return "a numpy array of objects" if array.kind[:1] == "O" else f"a numpy array of type {printable(array.kind)}"


def _dtype(value: object) -> tuple[str, bool] | None:
    """Kind and width of a dtype, and whether its bytes are in big order."""
    if type(value) is not Call or type(value.func) is not Global or type(value.args) is not tuple or not value.args:
        return None
    if (value.func.module, value.func.name) != ("numpy", "dtype") or type(value.args[0]) is not str:
        return None
    kind = value.args[0]
    order = value.state[1] if type(value.state) is tuple and len(value.state) > 1 else kind[:1]
    return kind.lstrip("<>|="), order == ">"
