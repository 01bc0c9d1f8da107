"""A state dict or a whole checkpoint that is already in memory; the caller's objects are only looked at."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from smartload.errors import UnreadableError
from smartload.place.memory import dtype_name, has_memory
from smartload.reading.state_dicts import TreeValues, article, explore
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import Entry, InMemory, Opaque, Part, TensorSpec
from smartload.records.problems import Problem
from smartload.records.text import printable, with_article

NAME = "the dict in memory"
_OPEN = (UninitializedParameter, UninitializedBuffer)
_NOT_OF_THE_FILE = "assign_to_params_buffers"


def open(path: Mapping[str, object]) -> Checkpoint:
    """The state dicts in a mapping, by dotted path."""
    kinds = MemoryValues()
    if (odd := kinds.odd_key(path)) is not None:
        raise UnreadableError(Problem("odd_keys", NAME, {"type": odd[0], "key": odd[1]}))
    parts, aside = explore(path, kinds)
    return Checkpoint(NAME, "memory", parts, aside=aside, tags=_devices(parts.values()))


class MemoryValues(TreeValues):
    """Objects in memory."""

    file = NAME
    keep_all = True

    def tensor(self, value: object) -> Entry | None:
        """The entry of a tensor or of anything that torch takes for one, None for anything else."""
        numpy = sys.modules.get("numpy")  # an array cannot be there before it has been imported
        if numpy is not None and isinstance(value, numpy.ndarray):
            return _array(value)
        if isinstance(value, type) or not _is_tensor_like(value):
            return None
        spec = _spec(value)
        return Opaque(with_article(_type_name(value))) if spec is None else InMemory(value, spec, _memory(value))

    def extra(self, value: object) -> Entry:
        """A module's extra state, as it is."""
        return InMemory(value, None)

    def module(self, value: object) -> Part | None:
        """The state dict of a module, None for anything else."""
        if not isinstance(value, torch.nn.Module):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = value.state_dict()
        entries = {key: self.tensor(item) or InMemory(item, None) for key, item in state.items()}
        return Part(entries, self.versions(state), f"module {_type_name(value)}")

    def items(self, value: object) -> Mapping[str, object] | None:
        """The items of a mapping whose keys are strings."""
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            return None
        return value

    def odd_key(self, value: object) -> tuple[str, str] | None:
        """Type and text of the first key that is no string."""
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str):
                    text = printable(str(key)) if isinstance(key, (int, float, bytes)) else "..."
                    return type(key).__name__, text
        return None

    def versions(self, value: object) -> Mapping[str, Mapping[str, object]] | None:
        """A copy of the `_metadata`, without the flag by which an earlier load asked to replace parameters."""
        found = getattr(value, "_metadata", None)
        if not isinstance(found, Mapping):
            return None
        return {
            prefix: {key: item for key, item in local.items() if key != _NOT_OF_THE_FILE}
            for prefix, local in found.items()
            if isinstance(prefix, str) and isinstance(local, Mapping)
        }

    def noun(self, value: object) -> str:
        """What a value is, with its article."""
        if isinstance(value, Mapping):
            return article("dict" if isinstance(value, dict) else _type_name(value), len(value))
        if isinstance(value, (list, tuple, set, frozenset)):
            return article(type(value).__name__, len(value))
        return "None" if value is None else with_article(_type_name(value))

    def opaque(self, value: object) -> Entry:
        """The entry of a value that is no tensor, with the value itself."""
        return Opaque(self.noun(value), value)

    def is_list(self, value: object) -> bool:
        """Whether `value` is a list."""
        return isinstance(value, list)

    def inner(self, value: object) -> Iterable[object]:
        """All values directly inside a container; objects of other classes are not looked into."""
        if isinstance(value, Mapping):
            return value.values()
        return value if isinstance(value, (list, tuple, set, frozenset)) else ()


def _array(value: Any) -> Entry:
    """The entry of a NumPy array: a tensor of the same memory, of a copy where torch could not write to that."""
    backwards = min(value.strides, default=0) < 0
    try:
        native = value.dtype.newbyteorder("=")
        tensor = torch.from_numpy(value.astype(native, copy=backwards or not value.flags.writeable))
    except TypeError:
        return Opaque(f"a numpy array of type {printable(str(value.dtype))}", value, tensor=True)
    return InMemory(tensor, _spec(tensor), _memory(tensor), value)


def _devices(parts: Iterable[Part]) -> Mapping[str, int]:
    held = [entry for part in parts for entry in part.entries.values() if isinstance(entry, InMemory)]
    tensors = {id(entry.value): entry.value for entry in held if isinstance(entry.value, torch.Tensor)}
    return Counter(str(tensor.device) for tensor in tensors.values())


def _is_tensor_like(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    try:
        return bool(torch.overrides.is_tensor_like(value))  # type: ignore[no-untyped-call]
    except Exception:  # noqa: BLE001 - a foreign object may raise whatever it likes when it is asked for an attribute
        return False


def _type_name(value: object) -> str:
    cls = type(value)
    return printable(cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}")


def _spec(value: object) -> TensorSpec | None:
    if isinstance(value, torch.Tensor) and has_memory(value):
        return TensorSpec(tuple(value.shape), dtype_name(value.dtype))
    try:
        dtype = str(value.dtype).removeprefix("torch.")  # type: ignore[attr-defined]
        if isinstance(value, _OPEN):
            return TensorSpec(None, dtype)
        return TensorSpec(tuple(int(size) for size in value.shape), dtype)  # type: ignore[attr-defined]
    except Exception:  # noqa: BLE001 - as above
        return None


def _memory(value: object) -> tuple[object, ...] | None:
    """Where an ordinary tensor's memory lies; None for one that has none, or whose class keeps its own."""
    if not isinstance(value, torch.Tensor) or isinstance(value, _OPEN):
        return None
    own = type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    if own or value.layout is not torch.strided or value.is_quantized or value.device.type == "meta":
        return None
    try:
        pointer = value.untyped_storage().data_ptr()
    except RuntimeError:
        return None
    if not pointer:
        return None
    flags = (value.is_conj(), value.is_neg())
    size = (value.storage_offset(), tuple(value.shape), value.stride())
    return (pointer, *size, value.dtype, value.device, *flags)
