"""What a load is asked for, and what of the model and the file goes into the answer: keys, options, placement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from smartload.records.entries import TensorSpec


@dataclass(frozen=True, slots=True)
class ModelKeys:
    """The keys that a model wants: `specs` in the order of its state dict (None: an extra state, no tensor)."""

    name: str
    # A shape without its values: `match` decides by names, and never has a tensor in hand.
    specs: Mapping[str, TensorSpec | None]
    tied: tuple[tuple[str, ...], ...] = ()
    """Groups of keys that are one tensor (tied weights, shared modules)."""
    wrappers: frozenset[str] = frozenset()
    """Paths of children that exist only because a wrapper put them there ("module", "net._orig_mod")."""
    non_persistent: Mapping[str, TensorSpec] = field(default_factory=dict)
    """Non-persistent buffers: keys that a state dict of this model does not have."""


@dataclass(frozen=True, slots=True)
class Options:
    """The arguments of a call that decide about keys; see `smart_load`."""

    # Values that do not change, so that a proposed argument is tried on a copy of the options.
    select: str | None = None
    rename: Mapping[str, str] | Callable[[str], str] | None = None
    allow_missing: tuple[str, ...] = ()
    allow_unexpected: tuple[str, ...] = ()


class Ignored(NamedTuple):
    """A key that is not loaded, of the file or of the model, and why."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Placement:
    """What moves before the bytes come."""

    # As text, because this folder does not import torch; with the index, so that "cuda" cannot change its meaning.
    device: str | None
    """The device that the whole model goes to; None where it stays where it is."""
    moves: tuple[tuple[str, str], ...] = ()
    """(module path, device) of each module that moves."""
    new: Mapping[str, str] = field(default_factory=dict)
    """Key -> device of each tensor that is made anew: those on meta, with `assign` all."""
