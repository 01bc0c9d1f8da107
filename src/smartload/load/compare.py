"""What the entries of a checkpoint are, and whether two of them hold the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from smartload.load.transfer import load, same, same_values
from smartload.records.checkpoint import Checkpoint
from smartload.records.data import ByteReader, Entry, Held, Opaque, Span, Stored, TensorSpec
from smartload.records.keys import join


def named(checkpoint: Checkpoint) -> dict[str, Entry]:
    """Dotted name -> entry, over all parts."""
    parts = checkpoint.parts.items()
    return {join(path, key): entry for path, part in parts for key, entry in part.entries.items()}


def specs_of(checkpoint: Checkpoint) -> dict[str, dict[str, TensorSpec | None]]:
    """Path of each part -> its keys, with shape and dtype of what is a tensor."""
    parts = checkpoint.parts.items()
    return {path: {key: spec_of(entry) for key, entry in part.entries.items()} for path, part in parts}


def metadata_of(checkpoint: Checkpoint) -> dict[str, Mapping[str, object]]:
    """Dotted path of each module -> what `_metadata` says of it, over all parts."""
    parts = checkpoint.parts.items()
    return {join(path, module): entry for path, part in parts for module, entry in (part.metadata or {}).items()}


def spec_of(entry: Entry) -> TensorSpec | None:
    """Shape and dtype of a tensor; None for what is none."""
    if isinstance(entry, Stored):
        return TensorSpec(entry.shape, entry.dtype)
    if isinstance(entry, Opaque) and entry.tensor:
        return TensorSpec(None, entry.what)
    return entry.spec if isinstance(entry, Held) else None


def same_entry(one: Entry, other: Entry, files: Sequence[ByteReader]) -> bool:
    """Whether two entries of a checkpoint are tensors, and bit for bit equal."""
    if isinstance(one, Stored) and isinstance(other, Stored):
        return same(one, other, files)
    if isinstance(one, Held) and isinstance(other, Held):
        if one.place is not None and one.place == other.place:
            return True
        return (
            isinstance(one.value, torch.Tensor)
            and isinstance(other.value, torch.Tensor)
            and same_values(one.value, other.value)
        )
    return False


def plain(tree: object, files: Sequence[ByteReader]) -> object:
    """An extra state with the tensors in it loaded."""
    if isinstance(tree, Span):
        return load(tree, files)
    if isinstance(tree, dict):
        return type(tree)((key, plain(value, files)) for key, value in tree.items())
    if isinstance(tree, (list, tuple)):
        return type(tree)(plain(value, files) for value in tree)
    return tree


def alike(one: object, other: object) -> bool:
    """Whether two extra states are equal in every type, value and bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return same_values(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    return one == other or (one != one and other != other)
