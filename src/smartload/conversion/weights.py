"""The weights of a checkpoint by themselves: its one state dict, under clean names, ready to be read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from smartload.errors import UnreadableError
from smartload.load.compare import alike, metadata_of, named, plain, same_entry, spec_of, specs_of
from smartload.match.standalone import Clean, clean, versions
from smartload.place.memory import has_memory
from smartload.records.checkpoint import Checkpoint
from smartload.records.data import ByteReader, Entry, Extra, Held, Opaque, Problem, Stored, Wishes

_PLAIN = (bool, int, float, str, bytes, bytearray, type(None))


Value: TypeAlias = "Stored | torch.Tensor"


@dataclass(frozen=True, slots=True)
class Weights:
    """What was taken of a checkpoint."""

    names: Clean
    tensors: Mapping[str, Value]
    """Clean name -> where the tensor lies, or the tensor."""
    extras: Mapping[str, Entry]
    """Clean name -> the extra state, where it is plain data and no tensor."""
    metadata: Mapping[str, Mapping[str, int]] | None
    """The versions of its modules, under clean paths; None where the file has none."""


def weights(checkpoint: Checkpoint, wishes: Wishes) -> Weights:
    """The one state dict of a checkpoint, or what `select` takes.

    Raises:
        AmbiguousKeysError, KeyMismatchError: as `clean` does.
        UnreadableError: it holds a tensor without plain data, or an extra state that is more than plain data.
    """
    entries = named(checkpoint)

    def same(first: str, second: str) -> bool:
        one, other = entries[first], entries[second]
        if spec_of(one) is None and spec_of(other) is None:
            return alike(extra(one, checkpoint.files), extra(other, checkpoint.files))
        return same_entry(one, other, checkpoint.files)

    names = clean(specs_of(checkpoint), checkpoint.path, wishes, same)
    for name in names.pairs.values():
        if what := _trouble(entries[name]):
            raise UnreadableError(Problem("value", checkpoint.path, {"key": name, "what": what}))
    tensors = {key: value for key, name in names.pairs.items() if (value := tensor_of(entries[name])) is not None}
    extras = {key: entries[name] for key, name in names.pairs.items() if key not in tensors}
    return Weights(names, tensors, extras, versions(metadata_of(checkpoint), names.pairs) or None)


def extra(entry: Entry, files: Sequence[ByteReader]) -> object:
    """The value of an extra state, its tensors loaded."""
    return plain(entry.tree, files) if isinstance(entry, Extra) else getattr(entry, "value", None)


def tensor_of(entry: Entry) -> Value | None:
    """The tensor that an entry is, an extra state too, or where it lies; None for what is none."""
    value = entry.tree if isinstance(entry, Extra) else entry.value if isinstance(entry, Held) else entry
    return value if isinstance(value, (Stored, torch.Tensor)) else None


def _trouble(entry: Entry) -> str:
    """What an entry is that cannot be written by itself; empty for all others."""
    if isinstance(entry, Opaque):
        return entry.what
    value = entry.value if isinstance(entry, Held) else None
    if isinstance(value, torch.Tensor):
        if value.is_meta:
            return "a meta tensor"
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
