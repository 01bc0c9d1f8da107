"""What a checkpoint holds, entry by entry: tensors as spans of bytes, tensors in memory, and what is no tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

# By name, because this folder does not import torch, and because a file may name a dtype that this torch lacks.
ITEMSIZE: Mapping[str, int] = {
    **dict.fromkeys(("bool", "uint8", "int8", "float8_e4m3fn", "float8_e5m2"), 1),
    **dict.fromkeys(("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("int32", "uint32", "float32", "complex32", "bcomplex32"), 4),
    **dict.fromkeys(("int64", "uint64", "float64", "complex64"), 8),
    "complex128": 16,
}
"""Bytes of one element of each dtype that a file can hold, by torch's name of the dtype."""


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor; `shape` is None where it is not known yet (a lazy module's, say)."""

    shape: tuple[int, ...] | None
    dtype: str


# NamedTuples, here and below: there is one for each key of a file, and they are made faster than frozen dataclasses.
class Span(NamedTuple):
    """A tensor in a file: `nbytes` bytes of file number `file`, from `offset` on, hold every element it can reach.

    `shape` and `stride` count elements, as in torch; element [0, ..., 0] lies at `offset`. Of a view that torch saved
    with a pending `conj` or `neg`, the bytes are those of the tensor that it is a view of.
    """

    file: int
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    big_endian: bool = False
    conj: bool = False
    neg: bool = False

    @property
    def spec(self) -> TensorSpec:
        """Shape and dtype."""
        return TensorSpec(self.shape, self.dtype)


# A kind of its own, so that pieces are read straight into their places in the parameter, never joined before.
class Tiled(NamedTuple):
    """A tensor that a file holds in pieces, as ranks of a distributed save write it.

    Each tile is the index of its first element, one number a dimension, and its span. Together the tiles hold every
    element of the tensor exactly once.
    """

    dtype: str
    shape: tuple[int, ...]
    tiles: tuple[tuple[tuple[int, ...], Span], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tiles."""
        return sum(span.nbytes for _, span in self.tiles)

    @property
    def spec(self) -> TensorSpec:
        """Shape and dtype."""
        return TensorSpec(self.shape, self.dtype)


# A union, because isinstance takes it: everything that `load` reads from files is one of the two.
Stored: TypeAlias = Span | Tiled
"""A tensor whose bytes lie in files."""


class InMemory(NamedTuple):
    """A value that is in memory already; `spec` is None where it is no tensor (an extra state, say)."""

    value: object
    spec: TensorSpec | None
    memory: tuple[object, ...] | None = None
    """Equal for two names of one tensor; None where that cannot be told."""
    original: object = None
    """The caller's own object, where `value` is a tensor made of it (of a NumPy array, say)."""


class Extra(NamedTuple):
    """Plain data read from a file for a module's `set_extra_state`; tensors in it are still spans."""

    tree: object

    @property
    def spec(self) -> None:
        """None: an extra state is no tensor."""


class Opaque(NamedTuple):
    """A value that cannot be loaded as a tensor, and what it is ("a list", "a meta tensor")."""

    what: str
    value: object = None
    """The value itself, where it is in memory: a module may keep more than tensors in its state dict."""
    tensor: bool = False
    """Whether it stands for a tensor: then it is never passed over."""

    @property
    def spec(self) -> TensorSpec | None:
        """A spec without a shape where it stands for a tensor, else None."""
        return TensorSpec(None, self.what) if self.tensor else None


Entry: TypeAlias = Stored | InMemory | Extra | Opaque
"""What a checkpoint has under one key; `.spec` is its shape and dtype, None for what is no tensor."""


# The dotted name beside its two parts: all three are asked for per key, and none is made twice.
class FileKey(NamedTuple):
    """A key of the checkpoint: 'model.fc.weight' is the key 'fc.weight' of the part 'model'."""

    dotted: str
    """The whole name, through all dicts of the file."""
    part: str
    """Dotted path of the dict that has it, below what `select` took; "" for the top."""
    key: str
    """Its key in that dict."""
    spec: TensorSpec | None
    """None for what is no tensor."""


@dataclass(frozen=True, slots=True)
class Part:
    """One state dict of a checkpoint: its own keys, in the file's order, and its `_metadata`."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, Mapping[str, object]] | None = None
    kind: str = "state dict"


class Beside(NamedTuple):
    """A thing of the checkpoint that is no state dict: its dotted path, what it is, and how many tensors are in it."""

    path: str
    what: str
    tensors: int = 0


class ZipRecord(NamedTuple):
    """One record of a zip: a run of bytes, and the CRC32 that the zip gives for it (0: not computed)."""

    file: int
    offset: int
    nbytes: int
    crc: int
    name: str
    packed: int | None = None
    """The bytes that it takes in the file, where it is deflated."""


class ByteReader(Protocol):
    """An open file, read at absolute offsets by any number of threads."""

    name: str
    size: int

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on; UnreadableError where the file ends before."""

    # A load may read for minutes; a file that is replaced meanwhile would give a mixture of two checkpoints.
    def check_unchanged(self) -> None:
        """UnreadableError where size, time or inode differ from those at opening."""

    def close(self) -> None:
        """Give back what was opened."""
