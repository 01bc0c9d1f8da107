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

_MOST_PAIRS = 1 << 20
"""Pairs of containers that are compared in two extra states; two that were saved alike have one for each container."""


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
    """Tell whether two extra states are equal in every type, value and bit.

    False, too, where they are so entangled that to compare them would take far longer than to read them.
    """
    # With a stack, and each pair once: a list may hold another one twice, and so on down.
    todo, seen = [(one, other)], set[tuple[int, int]]()
    while todo:
        left, right = todo.pop()
        if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
            if not same_values(left, right):
                return False
        elif type(left) is not type(right):
            return False
        elif isinstance(left, (dict, list, tuple)) and isinstance(right, (dict, list, tuple)):
            if (id(left), id(right)) in seen:
                continue
            seen.add((id(left), id(right)))
            if len(left) != len(right) or len(seen) > _MOST_PAIRS:
                return False
            if isinstance(left, dict) and isinstance(right, dict):
                if list(left) != list(right):
                    return False
                todo += zip(left.values(), right.values(), strict=True)
            else:
                todo += zip(left, right, strict=True)
        elif not (left == right or (left != left and right != right)):  # NaN
            return False
    return True
