"""The weights of a checkpoint by themselves: its one state dict, under clean names, ready to be read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from smartload.errors import UnreadableError
from smartload.load.entries import same_entry, same_extra_state, why_not_loadable
from smartload.load.transfer import read_extra_state
from smartload.match.standalone import CleanKeys, clean_keys, versions
from smartload.place.memory import has_memory
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import ByteReader, Entry, Extra, InMemory, Stored
from smartload.records.problems import Problem
from smartload.records.requests import Options

_PLAIN = (bool, int, float, str, bytes, bytearray, type(None))


Value: TypeAlias = "Stored | torch.Tensor"


@dataclass(frozen=True, slots=True)
class Weights:
    """What was taken of a checkpoint."""

    names: CleanKeys
    tensors: Mapping[str, Value]
    """Clean name -> where the tensor lies, or the tensor."""
    extras: Mapping[str, Entry]
    """Clean name -> the extra state, where it is plain data and no tensor."""
    metadata: Mapping[str, Mapping[str, int]] | None
    """The versions of its modules, under clean paths; None where the file has none."""


def take_weights(checkpoint: Checkpoint, options: Options) -> Weights:
    """The one state dict of a checkpoint, or what `select` takes.

    Raises:
        AmbiguousKeysError, KeyMismatchError: as `clean` does.
        UnreadableError: it holds a tensor without plain data, or an extra state that is more than plain data.
    """
    entries = checkpoint.entries

    def same(first: str, second: str) -> bool:
        one, other = entries[first], entries[second]
        if one.spec is None and other.spec is None:
            return same_extra_state(extra_value(one, checkpoint.files), extra_value(other, checkpoint.files))
        return same_entry(one, other, checkpoint.files)

    names = clean_keys(checkpoint.keys, checkpoint.path, options, same)
    for name in names.pairs.values():
        if what := why_not_loadable(entries[name]) or _why_not_writable(entries[name]):
            raise UnreadableError(Problem("value", checkpoint.path, {"key": name, "what": what}))
    tensors = {key: value for key, name in names.pairs.items() if (value := tensor_of(entries[name])) is not None}
    extras = {key: entries[name] for key, name in names.pairs.items() if key not in tensors}
    return Weights(names, tensors, extras, versions(checkpoint.metadata(), names.pairs) or None)


def extra_value(entry: Entry, files: Sequence[ByteReader]) -> object:
    """The value of an extra state, its tensors loaded."""
    return read_extra_state(entry.tree, files) if isinstance(entry, Extra) else getattr(entry, "value", None)


def tensor_of(entry: Entry) -> Value | None:
    """The tensor that an entry is, an extra state too, or where it lies; None for what is none."""
    value = entry.tree if isinstance(entry, Extra) else entry.value if isinstance(entry, InMemory) else entry
    return value if isinstance(value, (Stored, torch.Tensor)) else None


def _why_not_writable(entry: Entry) -> str:
    """Say what an entry in memory is that no file could give back; "" for one that a file could."""
    value = entry.value if isinstance(entry, InMemory) else None
    if isinstance(value, torch.Tensor):
        usual = has_memory(value) and not value.is_quantized
        return "" if usual else f"a tensor of {type(value).__name__} in {str(value.layout)[6:]} layout"
    return "" if _is_plain(value) else f"an extra state of {type(value).__name__}"


def _is_plain(value: object) -> bool:
    """Whether a value in memory is what a file could give back: plain data, and ordinary CPU tensors in it."""
    if type(value) in (dict, OrderedDict):
        return all(_is_plain(item) for pair in value.items() for item in pair)  # type: ignore[attr-defined]
    if type(value) in (list, tuple, set):
        return all(map(_is_plain, value))  # type: ignore[call-overload]
    if isinstance(value, torch.Tensor):
        return has_memory(value) and value.is_cpu and not value.is_quantized
    return type(value) in _PLAIN
