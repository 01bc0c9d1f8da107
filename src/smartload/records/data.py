"""The papers that are carried from room to room: names, shapes and where bytes lie. Pure: no torch, no files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeAlias

ITEMSIZE: Mapping[str, int] = {
    **dict.fromkeys(("bool", "uint8", "int8", "float8_e4m3fn", "float8_e5m2"), 1),
    **dict.fromkeys(("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("int32", "uint32", "float32", "complex32"), 4),
    **dict.fromkeys(("int64", "uint64", "float64", "complex64"), 8),
    "complex128": 16,
}
"""Bytes of one element of each dtype that a file can hold, by torch's name of the dtype."""


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor; `shape` is None where it is open (a lazy module's, say)."""

    shape: tuple[int, ...] | None
    dtype: str


class Span(NamedTuple):
    """A tensor that lies in a file: `nbytes` bytes from `offset` on hold all elements that the strides reach.

    `shape` and `stride` count elements, as in torch; element [0, ..., 0] lies at `offset`.
    """

    file: int
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    big_endian: bool = False


class Tiled(NamedTuple):
    """A tensor that lies in pieces: each the place of its first element, one index a dimension, and its span.

    The tiles cover the whole tensor, and no element twice.
    """

    dtype: str
    shape: tuple[int, ...]
    tiles: tuple[tuple[tuple[int, ...], Span], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tiles."""
        return sum(span.nbytes for _, span in self.tiles)


Stored: TypeAlias = Span | Tiled
"""A tensor whose bytes lie in files."""


class Held(NamedTuple):
    """A value that is already in memory; `spec` is None where it is no tensor (an extra state, say)."""

    value: object
    spec: TensorSpec | None
    place: tuple[object, ...] | None = None
    """Where its memory lies: equal for two names of one tensor."""
    original: object = None
    """The caller's own object, where the value is a tensor made of it."""


class Extra(NamedTuple):
    """Plain data read from a file for a module's `set_extra_state`; tensors in it are still spans."""

    tree: object


class Opaque(NamedTuple):
    """A value that cannot be loaded as a tensor, and what it is ("a list", "a meta tensor")."""

    what: str
    value: object = None
    """The value itself, where it is in memory: a module may keep more than tensors in its state dict."""
    tensor: bool = False
    """Whether it stands for a tensor: such a one is never passed over."""


Entry: TypeAlias = Stored | Held | Extra | Opaque


class ByteReader(Protocol):
    """An open file, read at absolute offsets by any number of threads."""

    name: str
    size: int

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on; UnreadableError where the file ends before."""

    def check_unchanged(self) -> None:
        """UnreadableError where size, time or inode differ from those at opening."""

    def close(self) -> None:
        """Give back what was opened."""


class Record(NamedTuple):
    """A run of bytes with the CRC32 that its archive gives for it (0: not computed)."""

    file: int
    offset: int
    nbytes: int
    crc: int
    name: str
    packed: int | None = None
    """The bytes that it takes in the file, where it is deflated."""


class Aside(NamedTuple):
    """A thing of the file that is no weight: its dotted path, what it is, and how many tensors lie in it."""

    path: str
    what: str
    tensors: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """One state dict inside a file: its own keys, in the file's order, and its `_metadata`."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, Mapping[str, object]] | None = None
    kind: str = "state dict"


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a file or a call cannot be served: a kind that `refusals` has the words for, and the facts they need."""

    kind: str
    path: str = ""
    facts: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """How a checkpoint and a model differ, counted at the part of the file that came closest."""

    model: str
    path: str
    part: str
    rule: str
    paired: int
    wanted: int
    missing: Mapping[str, TensorSpec | None] = field(default_factory=dict)
    left_over: Mapping[str, TensorSpec | None] = field(default_factory=dict)
    shapes: Mapping[str, tuple[TensorSpec | None, TensorSpec | None]] = field(default_factory=dict)
    """Model key -> (spec in the file, spec in the model)."""
    kind: str = ""
    """A cause that is known by name ("lora", "zero3", "optimizer"), or ""."""
    hints: tuple[str, ...] = ()
    """Arguments that were tried and work, as they are to be written."""


@dataclass(frozen=True, slots=True)
class Ambiguity:
    """Two or more answers: what each takes, and the arguments that decide for it."""

    model: str
    path: str
    answers: tuple[tuple[str, str], ...]
    """(what the answer would load, the argument that takes it)"""
    key: str = ""
    """The model key that both answers would fill, where they differ in one key only."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a model wants, by name: `specs` in the order of its state dict (None: an extra state, no tensor)."""

    name: str
    specs: Mapping[str, TensorSpec | None]
    aliases: tuple[tuple[str, ...], ...] = ()
    """Groups of names that are one tensor (tied weights, shared modules)."""
    wrappers: frozenset[str] = frozenset()
    """Paths of children that exist only because a wrapper put them there ("module", "net._orig_mod")."""
    transient: Mapping[str, TensorSpec] = field(default_factory=dict)
    """Non-persistent buffers: names that a state dict of this model does not have."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the caller asked of the names; see `smart_load`."""

    select: str | None = None
    rename: Mapping[str, str] | Callable[[str], str] | None = None
    allow_missing: tuple[str, ...] = ()
    allow_unexpected: tuple[str, ...] = ()


class Ignored(NamedTuple):
    """A tensor of the file that is not loaded, and why."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Placement:
    """What moves before the bytes come: (module path, device) for modules, and the device for tensors on meta."""

    device: str | None
    moves: tuple[tuple[str, str], ...] = ()
    meta: Mapping[str, str] = field(default_factory=dict)
    """Dotted name of a parameter or buffer on meta -> the device that it is to have."""
