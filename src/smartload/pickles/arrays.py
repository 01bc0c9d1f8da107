"""Recognise NumPy arrays, as pickles and the headers of .npy files describe them: dtype, shape, order and bytes.

NumPy itself is never imported: the inert notes of its functions say all that is needed.
"""

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
"""NumPy's kind and width of a dtype -> torch's name of it, for each dtype that torch can hold."""

# A .npy file gives its header as the text of a Python dict. The pattern takes the form that NumPy writes and no other,
# so that no text of a file is evaluated. Python 2 wrote sizes as longs: (10L, 3L).
_HEADER = re.compile(
    r"""\{\s*'descr':\s*'(?P<order>[<>|=])(?P<kind>\w{1,8})',\s*'fortran_order':\s*(?P<fortran>True|False),"""
    r"""\s*'shape':\s*\((?P<shape>[\d\sL,]*)\),?\s*\}\s*"""
)
MAX_HEADER = 4096
"""The most bytes of a header. NumPy writes 118 for most arrays and 310 for one of 64 dimensions."""
_MAX_DIMS = 64  # as in NumPy 2
_MAX_DIGITS = 15  # of one size; longer ones exceed any memory, and int() takes quadratic time for them
# The modules in which a pickle names NumPy's functions: NumPy 2 renamed `core` to `_core`.
_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")


class Array(NamedTuple):
    """A NumPy array whose elements lie in `data` without gaps.

    Attributes:
        kind: NumPy's kind and width of the dtype: "f4"; "" where the array is of a form that is not understood.
        big_endian: whether the bytes of each element are in big-endian order.
        fortran: whether the first index runs fastest; if not, the last.
        shape: the shape, as the file gives it and unchecked.
        data: the bytes, as the file gives them (see `plain_data`).
        axes: for an array that was permuted before it was saved, the order in which its axes are taken, else None.
    """

    kind: str
    big_endian: bool
    fortran: bool
    shape: object
    data: object
    axes: object = None

    @property
    def dtype(self) -> str:
        """Torch's name of the dtype, "" where torch has none."""
        return DTYPES.get(self.kind, "")


_NOT_UNDERSTOOD = Array("", False, False, None, None)


def array_of(value: Call) -> Array | None:
    """Give the array that the note `value` stands for, None where it stands for anything else.

    A subclass of ndarray, or an array in an unknown form, gives an `Array` whose `kind` is "".
    """
    func = value.func
    if type(func) is not Global or type(value.args) is not tuple:
        return None
    if func.name == "_reconstruct" and func.module in _MULTIARRAY:
        return _from_reconstruct(value) or _NOT_UNDERSTOOD
    if func.name == "_frombuffer" and func.module in _NUMERIC:
        return _from_buffer(value.args) or _NOT_UNDERSTOOD
    return None


def _from_reconstruct(value: Call) -> Array | None:
    """Read the call of `_reconstruct(cls, ...)`, up to pickle protocol 4; None for a subclass or an odd state.

    The call makes an empty array. Its state gives the array: (version, shape, dtype, is_fortran, data).
    """
    # The oldest NumPy gave no version.
    state = value.state[-4:] if type(value.state) is tuple and len(value.state) in (4, 5) else ()
    cls = value.args[0] if type(value.args) is tuple and value.args else None
    is_ndarray = type(cls) is Global and cls.name == "ndarray" and cls.module == "numpy"
    # A subclass (a masked array, a matrix) may mean something else by its data.
    if not is_ndarray or len(state) != 4 or not (dtype := _dtype(state[1])):
        return None
    return Array(*dtype, state[2] is True, state[0], state[3])


def _from_buffer(args: tuple[object, ...]) -> Array | None:
    """Read the arguments of `_frombuffer(data, dtype, shape, order, axes)`, of pickle protocol 5; None for odd ones.

    The order "K" is that of a permuted array: elements in the order of `shape`, the axes then taken as `axes` says.
    """
    if len(args) not in (4, 5) or not (dtype := _dtype(args[1])):
        return None
    data, _, shape, order, *axes = args
    if order == "K" and axes and _is_permutation(axes[0], shape):
        return Array(*dtype, False, shape, data, axes[0])
    # These orders need no axes: the argument is left out, or is None, its default.
    return Array(*dtype, order == "F", shape, data) if order in ("C", "F") and axes in ([], [None]) else None


def _is_permutation(axes: object, shape: object) -> TypeGuard[tuple[int, ...]]:
    """Tell whether `axes` names each axis of `shape` once."""
    if type(axes) is not tuple or type(shape) is not tuple or len(axes) != len(shape):
        return False
    # The types first: a list that holds itself many times over takes for ever to compare or to print.
    return all(type(axis) is int for axis in axes) and sorted(axes) == list(range(len(shape)))


def header_of(start: bytes) -> tuple[Array, int] | None:
    """Read the header of a .npy file that begins with `start`.

    Returns the array without its data, and the offset at which its data begins; None where the header is not one that
    NumPy writes for an array of plain numbers.
    """
    if start[:6] != b"\x93NUMPY" or len(start) < 12:
        return None
    width = 2 if start[6] == 1 else 4  # of the header's length; byte 6 is the version of the format
    at = 8 + width
    size = int.from_bytes(start[8:at], "little")
    if at + size > min(len(start), MAX_HEADER):
        return None
    match = _HEADER.fullmatch(start[at : at + size].decode("latin1"))
    if match is None:
        return None
    sizes = match["shape"].replace("L", "").replace(",", " ").split()
    if len(sizes) > _MAX_DIMS or any(len(size) > _MAX_DIGITS for size in sizes):
        return None
    shape = tuple(map(int, sizes))
    return Array(match["kind"], match["order"] == ">", match["fortran"] == "True", shape, None), at + size


def strides(shape: tuple[int, ...], fortran: bool) -> tuple[int, ...]:
    """Give the strides, in elements, of an array of this shape whose elements lie without gaps.

    The last index runs fastest, the first where `fortran` is true.

    >>> strides((2, 3, 4), False), strides((2, 3, 4), True)
    ((12, 4, 1), (1, 2, 6))
    """
    sizes, steps, step = shape if fortran else shape[::-1], [], 1
    for size in sizes:
        steps.append(step)
        step *= size
    return tuple(steps if fortran else steps[::-1])


def plain_data(data: object) -> RawBytes | bytes | str | None:
    """Give the bytes that `data` stands for, however its pickle protocol wrote them; None where it is no bytes object.

    Protocol 2 has no opcode for bytes: Python 3 writes `_codecs.encode(text, "latin1")`, and `bytes()` for none. The
    text is returned as it is and stands for its Latin-1 bytes, so that a large array is not copied before it is wanted.
    """
    if type(data) is RawBytes or type(data) is bytes:
        return data
    if type(data) is not Call or type(data.func) is not Global or type(data.args) is not tuple:
        return None
    name, args = (data.func.module, data.func.name), data.args
    if name == ("_codecs", "encode") and len(args) == 2 and type(args[0]) is str and args[1] == "latin1":
        return args[0]
    return b"" if name in (("builtins", "bytes"), ("__builtin__", "bytes")) and not args else None


def described(array: Array) -> str:
    """Say what an array is that torch cannot hold: 'a numpy array of objects'."""
    if not array.kind:
        return "a numpy array of its own class"
    return "a numpy array of objects" if array.kind[:1] == "O" else f"a numpy array of type {printable(array.kind)}"


def _dtype(value: object) -> tuple[str, bool] | None:
    """Read the note of a dtype as its kind with width, and whether it is big-endian; None where it is no dtype.

    `numpy.dtype("f4")` with the state `(3, ">", ...)` -> `("f4", True)`.
    """
    if type(value) is not Call or type(value.func) is not Global or type(value.args) is not tuple or not value.args:
        return None
    if (value.func.module, value.func.name) != ("numpy", "dtype") or type(value.args[0]) is not str:
        return None
    kind = value.args[0]
    # The state gives the order; the name may give it, too ("<f4"), and does so alone where there is no state.
    order = value.state[1] if type(value.state) is tuple and len(value.state) > 1 else kind[:1]
    return kind.lstrip("<>|="), order == ">"
