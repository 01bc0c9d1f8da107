"""Open a state dict, or a whole checkpoint, that is already in memory: the caller's own dict, as `torch.load` gives it.

The caller's objects are only looked at: nothing in them is changed, and tensors are not copied. The one exception is a
NumPy array whose memory torch cannot take as it is.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from smartload.errors import UnreadableError
from smartload.place.memory import dtype_name, has_memory
from smartload.place.survey import walk
from smartload.reading.state_dicts import TreeValues, article, explore
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import Entry, InMemory, Opaque, Part, TensorSpec
from smartload.records.problems import Problem
from smartload.records.text import printable, with_article

NAME = "the dict in memory"
# The tensors of lazy modules before their first input: they have a dtype, and no shape yet.
_LAZY = (UninitializedParameter, UninitializedBuffer)
# `load_state_dict(state, assign=True)` writes this flag into the `_metadata` of the caller's dict, and leaves it there.
# A later load of the same dict would then replace parameter objects, and an optimizer would go on with the old ones.
_ASSIGN_FLAG = "assign_to_params_buffers"


def open(path: Mapping[str, object]) -> Checkpoint:
    """Find the state dicts in the mapping `path`, by dotted path.

    Raises:
        UnreadableError: a key of the mapping is no string, or there is no state dict in it.
    """
    values = MemoryValues()
    if (odd := values.odd_key(path)) is not None:
        raise UnreadableError(Problem("odd_keys", NAME, {"type": odd[0], "key": odd[1]}))
    parts, aside = explore(path, values)
    return Checkpoint(NAME, "memory", parts, aside=aside, tags=_devices(parts.values()))


class MemoryValues(TreeValues):
    """The objects in a dict in memory, as `explore` asks for them."""

    file = NAME
    # A module may keep more than tensors in its state dict, dicts too; its own loading code wants them all back.
    keep_all = True

    def tensor(self, value: object) -> Entry | None:
        """Give the entry of a tensor, a NumPy array, or whatever torch takes for a tensor; None for anything else."""
        numpy = sys.modules.get("numpy")  # an array cannot be there before NumPy has been imported
        if numpy is not None and isinstance(value, numpy.ndarray):
            return _array_entry(value)
        # A class is asked first: torch.Tensor itself has all that makes an object "like a tensor".
        if isinstance(value, type) or not _is_tensor_like(value):
            return None
        spec = _spec(value)
        return Opaque(with_article(_type_name(value))) if spec is None else InMemory(value, spec, _memory(value))

    def extra(self, value: object) -> Entry:
        """Give the entry of a module's extra state, which is handed on as it is."""
        return InMemory(value, None)

    def module(self, value: object) -> Part | None:
        """Give the state dict of a module, None for anything else."""
        if not isinstance(value, torch.nn.Module):
            return None
        with warnings.catch_warnings():
            # Some classes warn here (FSDP, say); the caller has not called `state_dict`, and can do nothing about it.
            warnings.simplefilter("ignore")
            try:
                state = value.state_dict()
            except RecursionError:
                deque(walk(value), 0)  # which says where a module contains itself
                raise
        entries = {key: self.tensor(item) or InMemory(item, None) for key, item in state.items()}
        return Part(entries, self.versions(state), f"module {_type_name(value)}")

    def items(self, value: object) -> Mapping[str, object] | None:
        """Give the items of a mapping whose keys are all strings, None for anything else."""
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            return None
        return value

    def odd_key(self, value: object) -> tuple[str, str] | None:
        """Give type and text of the first key of a mapping that is no string; None where there is none."""
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str):
                    # The text of any other object would be made by its own code, and may be of any length.
                    text = printable(str(key)) if isinstance(key, (int, float, bytes)) else "..."
                    return type(key).__name__, text
        return None

    def versions(self, value: object) -> Mapping[str, Mapping[str, object]] | None:
        """Copy the `_metadata` of a state dict, without torch's flag to replace parameters; None where it has none."""
        metadata = getattr(value, "_metadata", None)
        if not isinstance(metadata, Mapping):
            return None
        return {
            prefix: {key: item for key, item in local.items() if key != _ASSIGN_FLAG}
            for prefix, local in metadata.items()
            if isinstance(prefix, str) and isinstance(local, Mapping)
        }

    def noun(self, value: object) -> str:
        """Say what `value` is, with its article: 'a list of 3'."""
        if isinstance(value, Mapping):
            return article("dict" if isinstance(value, dict) else _type_name(value), len(value))
        if isinstance(value, (list, tuple, set, frozenset)):
            return article(type(value).__name__, len(value))
        return "None" if value is None else with_article(_type_name(value))

    def opaque(self, value: object) -> Entry:
        """Give the entry of a value among tensors that is none, with the value itself for the module's own code."""
        return Opaque(self.noun(value), value)

    def is_list(self, value: object) -> bool:
        """Tell whether `value` is a list."""
        return isinstance(value, list)

    def inner(self, value: object) -> Iterable[object]:
        """Give all values directly inside a container; objects of other classes are not looked into."""
        if isinstance(value, Mapping):
            return value.values()
        return value if isinstance(value, (list, tuple, set, frozenset)) else ()


def _array_entry(array: Any) -> Entry:
    """Give the entry of a NumPy `array`: a tensor that shares its memory, or has a copy where torch cannot share it."""
    # torch takes no negative strides, and warns of memory that it must not write to. Bytes in the other order are
    # copied by `astype` without being told.
    backwards = min(array.strides, default=0) < 0
    try:
        native = array.dtype.newbyteorder("=")
        tensor = torch.from_numpy(array.astype(native, copy=backwards or not array.flags.writeable))
    except TypeError:  # strings, objects, dates: a dtype that torch does not have
        return Opaque(f"a numpy array of type {printable(str(array.dtype))}", array, tensor=True)
    return InMemory(tensor, _spec(tensor), _memory(tensor), array)


def _devices(parts: Iterable[Part]) -> Mapping[str, int]:
    """Count the tensors in `parts` by the device that they lie on; one under several names counts once."""
    in_memory = [entry for part in parts for entry in part.entries.values() if isinstance(entry, InMemory)]
    tensors = {id(entry.value): entry.value for entry in in_memory if isinstance(entry.value, torch.Tensor)}
    return Counter(str(tensor.device) for tensor in tensors.values())


def _is_tensor_like(value: object) -> bool:
    """Tell whether torch takes `value` for a tensor; `load_state_dict` asks the same question of each value."""
    if isinstance(value, torch.Tensor):
        return True
    try:
        return bool(torch.overrides.is_tensor_like(value))  # type: ignore[no-untyped-call]
    except Exception:  # noqa: BLE001 - a foreign object may raise whatever it likes when it is asked for an attribute
        return False


def _type_name(value: object) -> str:
    """Name the class of `value` with its module, without one where it is built in: 'torch.nn.modules.linear.Linear'."""
    cls = type(value)
    return printable(cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}")


def _spec(value: object) -> TensorSpec | None:
    """Give shape and dtype of a tensor or of what is like one; None where it does not say them."""
    if isinstance(value, torch.Tensor) and has_memory(value):
        return TensorSpec(tuple(value.shape), dtype_name(value.dtype))
    try:
        dtype = str(value.dtype).removeprefix("torch.")  # type: ignore[attr-defined]
        if isinstance(value, _LAZY):
            return TensorSpec(None, dtype)
        return TensorSpec(tuple(int(size) for size in value.shape), dtype)  # type: ignore[attr-defined]
    except Exception:  # noqa: BLE001 - the attributes may be missing, or of any type, or raise anything
        return None


def _memory(value: object) -> tuple[object, ...] | None:
    """Give a tuple that is equal for two names of one tensor; None where that cannot be told.

    It says where the memory lies and how it is looked at: tied weights are equal, two views of one storage are not.
    """
    if not isinstance(value, torch.Tensor) or isinstance(value, _LAZY):
        return None
    # A subclass that dispatches by itself keeps its data elsewhere; its pointer says nothing.
    dispatches = type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    if dispatches or value.layout is not torch.strided or value.is_quantized or value.device.type == "meta":
        return None
    try:
        pointer = value.untyped_storage().data_ptr()
    except RuntimeError:  # a tensor without a storage, as in torch.func
        return None
    if not pointer:  # all empty tensors lie at 0: they would count as tied
        return None
    # A conjugated or negated view has the same bytes and other values.
    flags = (value.is_conj(), value.is_neg())
    size = (value.storage_offset(), tuple(value.shape), value.stride())
    return (pointer, *size, value.dtype, value.device, *flags)
