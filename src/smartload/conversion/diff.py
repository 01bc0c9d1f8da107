"""How two checkpoints differ: names, shapes, dtypes and, where that is asked for, values, one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from smartload.conversion.weights import Value, Weights, extra_value, take_weights
from smartload.formats import Source, open_checkpoint
from smartload.load.entries import same_extra_state, same_values
from smartload.load.transfer import read_tensor
from smartload.place.memory import dtype_name
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import TensorSpec
from smartload.records.requests import Options
from smartload.records.text import first_few, plural, printable

_LISTED = 10
_AT_ONCE = 1 << 20  # numbers that are compared at a time


class Side(NamedTuple):
    """What was taken of one of the two, and how its names were adapted."""

    path: str
    format: str
    part: str
    rule: str


class Change(NamedTuple):
    """How far two tensors of one name are apart, at the element where they are farthest."""

    name: str
    absolute: float
    relative: float
    """The difference in terms of the larger of the two numbers."""
    differing: int
    """How many elements differ."""
    elements: int


@dataclass(frozen=True, slots=True)
class Difference:
    """How two checkpoints differ; print it, or take `to_dict()`."""

    a: Side
    b: Side
    common: int
    """Names that both have."""
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    shapes: Mapping[str, tuple[str, str]]
    """Name -> what it is on either side, where the shapes differ, or one is no tensor."""
    dtypes: Mapping[str, tuple[str, str]]
    values: tuple[Change, ...] | None = None
    """The tensors with other values, those that are farthest apart first; None where they were not compared."""
    extras: tuple[str, ...] = ()
    """Extra states of other content, where values were compared."""

    @property
    def same(self) -> bool:
        """Whether nothing that was compared differs."""
        return not (self.only_a or self.only_b or self.shapes or self.dtypes or self.values or self.extras)

    def __str__(self) -> str:
        what = "names, shapes, dtypes" + (" and values" if self.values is not None else "")
        verdict = f"same: {plural(self.common, 'name')}, equal in {what}" if self.same else "different:"
        return "\n".join([f"A: {_side(self.a)}", f"B: {_side(self.b)}", verdict, *self._lines()])

    def _lines(self) -> Iterator[str]:
        for side, names in (("A", self.only_a), ("B", self.only_b)):
            if names:
                yield f"  only in {side}: {first_few(names, _LISTED)}"
        for name, (one, other) in list(self.shapes.items())[:_LISTED]:
            yield f"  shape:     {printable(name)}: {one} in A, {other} in B"
        if len(self.shapes) > _LISTED:
            yield f"  shape:     ... ({len(self.shapes):,} in all)"
        for pair in dict.fromkeys(self.dtypes.values()):
            listed = first_few(name for name, other in self.dtypes.items() if other == pair)
            yield f"  dtype:     {pair[0]} in A, {pair[1]} in B: {listed}"
        for change in (self.values or ())[:_LISTED]:
            apart = f"{change.absolute:.3g} apart at most, {change.relative:.3g} of the larger"
            count = f"{change.differing:,} of {plural(change.elements, 'element')}"
            yield f"  value:     {printable(change.name)}: {apart} ({count})"
        if len(self.values or ()) > _LISTED:
            yield f"  value:     ... ({len(self.values or ()):,} in all)"
        if self.extras:
            yield f"  value:     {first_few(self.extras)}: extra states with other content"

    def to_dict(self) -> dict[str, object]:
        """Everything as plain data (for JSON): nested dicts and lists of str, int, float and bool."""
        return {
            "same": self.same,
            "a": self.a._asdict(),
            "b": self.b._asdict(),
            "common": self.common,
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "shapes": {name: list(pair) for name, pair in self.shapes.items()},
            "dtypes": {name: list(pair) for name, pair in self.dtypes.items()},
            "values": None if self.values is None else [_change_to_dict(change) for change in self.values],
            "extras": list(self.extras),
        }


def diff(
    a: Source, b: Source, *, select_a: str | None = None, select_b: str | None = None, values: bool = False
) -> Difference:
    """How the weights of two checkpoints differ, each taken as `convert` takes them: wrappers seen through.

    Args:
        a: the one, as in `smart_load`.
        b: the other.
        select_a: the part to take of the one, where it holds several.
        select_b: the same for the other.
        values: compare the numbers too.

    Raises:
        SmartLoadError: what `convert` would refuse.
    """
    with open_checkpoint(a) as one, open_checkpoint(b) as other:
        found = take_weights(one, Options(select_a)), take_weights(other, Options(select_b))
        difference = _names(one, other, *found)
        if not values:
            return difference
        return _values(difference, one, other, *found)


def _names(one: Checkpoint, other: Checkpoint, ours: Weights, theirs: Weights) -> Difference:
    first, second = _specs(ours), _specs(theirs)
    pairs = {name: (spec, second[name]) for name, spec in first.items() if name in second}
    return Difference(
        a=Side(one.path, one.format, ours.names.part, ours.names.rule),
        b=Side(other.path, other.format, theirs.names.part, theirs.names.rule),
        common=len(pairs),
        only_a=tuple(name for name in first if name not in second),
        only_b=tuple(name for name in second if name not in first),
        shapes={name: (_shape(p), _shape(q)) for name, (p, q) in pairs.items() if _shape(p) != _shape(q)},
        dtypes={name: (p.dtype, q.dtype) for name, (p, q) in pairs.items() if p and q and p.dtype != q.dtype},
    )


def _specs(found: Weights) -> dict[str, TensorSpec | None]:
    """What there is under each name; None for an extra state that is no tensor."""
    return {name: _spec(found.tensors[name]) if name in found.tensors else None for name in found.names.pairs}


def _spec(value: Value) -> TensorSpec:
    return TensorSpec(tuple(value.shape), dtype_name(value.dtype) if isinstance(value, torch.Tensor) else value.dtype)


def _shape(spec: TensorSpec | None) -> str:
    return "an extra state" if spec is None else str(list(spec.shape or ()))


def _values(names: Difference, one: Checkpoint, other: Checkpoint, ours: Weights, theirs: Weights) -> Difference:
    """The same with what the values say, two tensors in memory at a time."""
    changes = []
    for name, value in ours.tensors.items():
        if name not in theirs.tensors or name in names.shapes:
            continue
        first, second = _read(value, one), _read(theirs.tensors[name], other)
        if (change := _change(name, first, second)) is not None:
            changes.append(change)
    extras = tuple(
        name
        for name, entry in ours.extras.items()
        if name in theirs.extras
        and not same_extra_state(extra_value(entry, one.files), extra_value(theirs.extras[name], other.files))
    )
    changes.sort(key=lambda change: (-change.absolute, change.name))
    return replace(names, values=tuple(changes), extras=extras)


def _read(value: Value, checkpoint: Checkpoint) -> torch.Tensor:
    return value.detach().cpu() if isinstance(value, torch.Tensor) else read_tensor(value, checkpoint.files)


def _change(name: str, one: torch.Tensor, other: torch.Tensor) -> Change | None:
    """How far two tensors of one shape are apart; None where every number is equal, and nothing is where nothing is."""
    if same_values(one, other):
        return None
    absolute, relative, count = 0.0, 0.0, 0
    flat = one.reshape(-1), other.reshape(-1)
    for at in range(0, one.numel(), _AT_ONCE):
        first, second = (values[at : at + _AT_ONCE] for values in flat)
        odd = _differ(first, second)
        if not odd.any():
            continue
        count += int(odd.sum())
        x, y = _wide(first[odd]), _wide(second[odd])
        apart = (x - y).abs()
        if not (one.is_floating_point() or other.is_floating_point() or apart.is_complex()):
            apart = apart.clamp(min=1)  # integers beyond 2**53 may be the same double, and are not the same
        absolute = max(absolute, _largest(apart))
        relative = max(relative, _largest(apart / torch.maximum(x.abs(), y.abs())))
    return Change(name, absolute, relative, count, one.numel()) if count else None


def _differ(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Where two numbers differ; one that is none (NaN) equals another."""
    if one.dtype == other.dtype and not (one.is_floating_point() or one.is_complex()):
        bits = [values.contiguous().view(torch.uint8).view(-1, one.element_size()) for values in (one, other)]
        return (bits[0] != bits[1]).any(-1)
    x, y = _wide(one), _wide(other)
    return (x != y) & ~(x.isnan() & y.isnan())


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.complex128 if values.is_complex() else torch.float64)


def _largest(values: torch.Tensor) -> float:
    """The largest of some differences; one to what is no number is infinite."""
    return float(torch.nan_to_num(values, nan=math.inf, posinf=math.inf).max())


def _side(side: Side) -> str:
    notes = "; ".join(note for note in (side.rule, side.part and f"from {printable(side.part)!r}") if note)
    return f"{side.path} ({side.format})" + (f": {notes}" if notes else "")


def _change_to_dict(change: Change) -> dict[str, object]:
    """A change for JSON, which knows no infinity."""
    return {key: "inf" if value == math.inf else value for key, value in change._asdict().items()}
