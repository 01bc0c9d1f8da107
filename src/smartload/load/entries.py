"""The entries of a checkpoint as a load sees them: whether one can be loaded, and whether two hold the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from smartload.errors import AmbiguousKeysError
from smartload.load.threads import Buffer
from smartload.load.transfer import Files, cuts, is_contiguous, read_raw, read_tensor
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import ByteReader, Entry, InMemory, Opaque, Stored, Tiled
from smartload.records.problems import Problem
from smartload.records.text import printable


def check_names(names: Iterable[str], checkpoint: Checkpoint) -> None:
    """Refuse to take an entry by a dotted name that two entries of the checkpoint have.

    Raises:
        AmbiguousKeysError: one of the names is that of two.
    """
    # In nearly all checkpoints there is no such name, and nothing is compared.
    if twice := checkpoint.twice and checkpoint.twice.intersection(names):
        raise AmbiguousKeysError(Problem("dotted_twice", checkpoint.path, {"name": printable(min(twice))}))


def why_not_loadable(entry: Entry, into_meta: bool = False) -> str:
    """Say what an entry is that cannot be loaded ("a list", "a meta tensor"); "" for one that can be.

    Args:
        entry: any entry of a checkpoint.
        into_meta: whether what it is loaded into needs no data either.
    """
    if isinstance(entry, Opaque):
        return entry.what
    value = entry.value if isinstance(entry, InMemory) else None
    return "a meta tensor" if isinstance(value, torch.Tensor) and value.is_meta and not into_meta else ""


def same_entry(one: Entry, other: Entry, files: Sequence[ByteReader]) -> bool:
    """Tell whether two entries of one checkpoint are tensors, and bit for bit equal."""
    if isinstance(one, Stored) and isinstance(other, Stored):
        return _same_stored(one, other, files)
    if isinstance(one, InMemory) and isinstance(other, InMemory):
        if one.memory is not None and one.memory == other.memory:
            return True
        return (
            isinstance(one.value, torch.Tensor)
            and isinstance(other.value, torch.Tensor)
            and same_values(one.value, other.value)
        )
    return False


def _same_stored(one: Stored, other: Stored, files: Files) -> bool:
    if one == other:
        return True
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    if isinstance(one, Tiled) or isinstance(other, Tiled):
        return same_values(read_tensor(one, files), read_tensor(other, files))
    # All that says what the bytes mean, from the strides on.
    if one[5:] == other[5:] and is_contiguous(one):
        # Piece by piece: two tensors as large as the model are never in memory side by side.
        buffers = Buffer(), Buffer()
        return all(
            read_raw(one, at, size, files, buffers[0]) == read_raw(other, at, size, files, buffers[1])
            for at, size in cuts(one.nbytes)
        )
    return same_values(read_tensor(one, files), read_tensor(other, files))


def same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two tensors are equal in shape, dtype and every bit."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    # As bytes: NaN equals itself, and float8 has no comparison of its own.
    flat = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return torch.equal(*flat)


def same_extra_state(one: object, other: object) -> bool:
    """Tell whether two extra states are equal in every type, value and bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return same_values(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same_extra_state(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same_extra_state, one, other))
    return one == other or (one != one and other != other)  # NaN
