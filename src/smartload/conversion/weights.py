"""Take the weights of a checkpoint by themselves: its one state dict, under clean names, ready to be read.

No model is given here, so the names can only be freed of what wrappers put in front of them.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from smartload.errors import UnreadableError
from smartload.load.entries import check_names, same_entry, same_extra_state, why_not_loadable
from smartload.load.transfer import dtype_of, read_extra_state
from smartload.match.standalone import CleanKeys, clean_keys, versions
from smartload.place.memory import has_memory
from smartload.reading.files import MAX_GROWTH, UNPACKED
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import ByteReader, Entry, Extra, InMemory, Stored
from smartload.records.problems import Problem
from smartload.records.requests import Options
from smartload.records.text import size_text

# What an extra state may be made of, beside containers: the types that the weights-only unpickler of torch gives back.
_PLAIN_TYPES = (bool, int, float, str, bytes, bytearray, type(None))


Value: TypeAlias = "Stored | torch.Tensor"


@dataclass(frozen=True, slots=True)
class Weights:
    """The one state dict that was taken of a checkpoint, under clean keys; tensors in files are not read yet.

    Attributes:
        names: clean key -> key in the file, and what was adapted.
        tensors: clean key -> where the tensor lies, or the tensor where it is in memory.
        extras: clean key -> the extra state, where it is plain data and no tensor.
        metadata: the versions of the modules, under clean paths; None where the file has none.
    """

    names: CleanKeys
    tensors: Mapping[str, Value]
    extras: Mapping[str, Entry]
    metadata: Mapping[str, Mapping[str, int]] | None


def take_weights(checkpoint: Checkpoint, options: Options) -> Weights:
    """Take the one state dict of `checkpoint`, or what `options.select` names.

    Raises:
        AmbiguousKeysError, KeyMismatchError: as `convert` does.
        UnreadableError: it holds a tensor without plain data, or an extra state that is more than plain data.
    """
    entries = checkpoint.entries

    def same(first: str, second: str) -> bool:
        """Tell whether two keys of the file hold the same: then two state dicts with them are no question."""
        a, b = entries[first], entries[second]
        if a.spec is None and b.spec is None:
            return same_extra_state(extra_value(a, checkpoint.files), extra_value(b, checkpoint.files))
        return same_entry(a, b, checkpoint.files)

    # Data is compared only where the names of two state dicts agree, so that as a rule nothing is read here.
    names = clean_keys(checkpoint.keys, checkpoint.path, options, same)
    check_names(names.pairs.values(), checkpoint)
    # All of them before anything is read or written: a file must not turn out to be unwritable at its last tensor.
    for name in names.pairs.values():
        if what := why_not_loadable(entries[name]) or _why_not_writable(entries[name]):
            raise UnreadableError(Problem("value", checkpoint.path, {"key": name, "what": what}))
    tensors = {key: value for key, name in names.pairs.items() if (value := tensor_of(entries[name])) is not None}
    extras = {key: entries[name] for key, name in names.pairs.items() if key not in tensors}
    return Weights(names, tensors, extras, versions(checkpoint.metadata(), names.pairs) or None)


def size_of(value: Value, dtype: torch.dtype | None = None) -> int:
    """Count the bytes of a tensor with every element by itself, in `dtype` where that is given."""
    own = value.dtype if isinstance(value, torch.Tensor) else dtype_of(value)
    return math.prod(value.shape) * (dtype or own).itemsize


def check_size(sizes: Mapping[str, int], weights: Weights, checkpoint: Checkpoint) -> None:
    """Refuse tensors that would take far more room than they take where they are.

    An element may be repeated without end (by a stride of zero), and one tensor have very many names: a file of some
    hundred bytes could fill a disk.

    Args:
        sizes: clean key -> the bytes that its tensor would take; 0 for one that another key has already.
        weights: what is taken of the checkpoint.
        checkpoint: the checkpoint.

    Raises:
        UnreadableError: they would; the largest is named.
    """
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in weights.tensors.values()
        if isinstance(value, torch.Tensor)
    }
    have = sum(file.size for file in checkpoint.files) + sum(storages.values())
    extras = {
        key: sum(map(size_of, _stored_in(entry.tree)))
        for key, entry in weights.extras.items()
        if isinstance(entry, Extra)
    }
    sizes = {**sizes, **extras}
    more = sum(sizes.values())
    if more > max(UNPACKED, MAX_GROWTH * have):
        largest = max(sizes, key=sizes.__getitem__)
        facts = {"have": size_text(have), "more": size_text(more), "need": size_text(sizes[largest])}
        raise UnreadableError(Problem("repeats", checkpoint.path, {**facts, "key": weights.names.pairs[largest]}))


def _stored_in(tree: object) -> Iterator[Stored]:
    """Give the tensors in an extra state, each as often as it occurs: as often it will be read."""
    if isinstance(tree, Stored):
        yield tree
    elif isinstance(tree, (dict, list, tuple)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _stored_in(value)


def extra_value(entry: Entry, files: Sequence[ByteReader]) -> object:
    """Give the value of the extra state in `entry`; tensors in it are read from `files`."""
    return read_extra_state(entry.tree, files) if isinstance(entry, Extra) else getattr(entry, "value", None)


def tensor_of(entry: Entry) -> Value | None:
    """Give the tensor that `entry` is, or where it lies; None for an entry that is no tensor.

    An extra state may be a tensor as well; it is then written like any other.
    """
    value = entry.tree if isinstance(entry, Extra) else entry.value if isinstance(entry, InMemory) else entry
    return value if isinstance(value, (Stored, torch.Tensor)) else None


def _why_not_writable(entry: Entry) -> str:
    """Say what an entry in memory is that no file could give back; "" for one that a file could.

    A value that came from a file is always writable: the reader has let nothing else through.
    """
    value = entry.value if isinstance(entry, InMemory) else None
    if isinstance(value, torch.Tensor):
        usual = has_memory(value) and not value.is_quantized
        return "" if usual else f"a tensor of {type(value).__name__} in {str(value.layout)[6:]} layout"
    return "" if _is_plain(value) else f"an extra state of {type(value).__name__}"


def _is_plain(value: object) -> bool:
    """Tell whether a file could give `value` back: plain data, and ordinary CPU tensors in it.

    The types are compared exactly: a subclass would be pickled by its name, and need its class when it is loaded.
    """
    if type(value) in (dict, OrderedDict):
        return all(_is_plain(item) for pair in value.items() for item in pair)  # type: ignore[attr-defined]
    if type(value) in (list, tuple, set):
        return all(map(_is_plain, value))  # type: ignore[call-overload]
    if isinstance(value, torch.Tensor):
        # A tensor of another device would be written with its device tag, and need that device when it is loaded.
        return has_memory(value) and value.is_cpu and not value.is_quantized
    return type(value) in _PLAIN_TYPES
