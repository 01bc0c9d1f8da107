"""Find how two checkpoints differ: in names, shapes, dtypes and, where that is asked for, values.

Each is taken as `convert` takes it: its one state dict, under clean names. Names and specs are compared without reading
a tensor; for values, two tensors are in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from smartload.conversion.weights import Value, Weights, check_size, extra_value, size_of, take_weights
from smartload.formats import Source, open_checkpoint
from smartload.load.entries import same_extra_state, same_values
from smartload.load.transfer import read_tensor
from smartload.place.memory import dtype_name
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import TensorSpec
from smartload.records.requests import Options
from smartload.records.text import first_few, for_console, plural, printable

# Lines of one kind that are printed; `to_dict()` has them all.
_LISTED = 10
# Elements that are compared at a time. In float64 they take 8 MiB; a whole tensor of float16, with the differences,
# would take many times what it takes by itself.
_AT_ONCE = 1 << 20


class Side(NamedTuple):
    """One of the two checkpoints that are compared: what was taken of it, and how its names were adapted.

    Attributes:
        path: the name of the file or folder.
        format: what kind it is.
        part: the dotted path of the state dict in it; "" for the top.
        rule: what was adapted in its names, in words.
    """

    path: str
    format: str
    part: str
    rule: str


class Change(NamedTuple):
    """How far two tensors of one name are apart.

    Attributes:
        name: their name.
        absolute: the largest difference of two elements; infinite where one of the two is infinite or NaN.
        relative: the largest difference in terms of the larger of the two elements, which may be two others.
        differing: how many elements differ.
        elements: how many elements each of the tensors has.
    """

    name: str
    absolute: float
    relative: float
    differing: int
    elements: int


@dataclass(frozen=True, slots=True)
class Difference:
    """How two checkpoints differ; print it, or take `to_dict()`.

    Attributes:
        a: the first checkpoint.
        b: the second one.
        common: how many names both have.
        only_a: names that only the first one has.
        only_b: names that only the second one has.
        shapes: name -> shape in either, where the shapes differ, or one is no tensor.
        dtypes: name -> dtype in either, where the dtypes differ.
        values: the tensors with other values, those that are farthest apart first; None where they were not compared.
        extras: names of extra states with other content, where values were compared.
    """

    a: Side
    b: Side
    common: int
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    shapes: Mapping[str, tuple[str, str]]
    dtypes: Mapping[str, tuple[str, str]]
    values: tuple[Change, ...] | None = None
    extras: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether nothing that was compared differs."""
        return not (self.only_a or self.only_b or self.shapes or self.dtypes or self.values or self.extras)

    def __str__(self) -> str:
        what = "names, shapes, dtypes" + (" and values" if self.values is not None else "")
        verdict = f"same: {plural(self.common, 'name')}, equal in {what}" if self.same else "different:"
        lines = [f"A: {_side_line(self.a)}", f"B: {_side_line(self.b)}", verdict, *self._lines()]
        return for_console("\n".join(lines))

    def _lines(self) -> Iterator[str]:
        """Give a line for each difference, as many of one kind as can be read."""
        for side, names in (("A", self.only_a), ("B", self.only_b)):
            if names:
                yield f"  only in {side}: {first_few(names, _LISTED)}"
        for name, (in_a, in_b) in list(self.shapes.items())[:_LISTED]:
            yield f"  shape:     {printable(name)}: {in_a} in A, {in_b} in B"
        if len(self.shapes) > _LISTED:
            yield f"  shape:     ... ({len(self.shapes):,} in all)"
        # By pair of dtypes: as a rule all tensors of a checkpoint were cast alike.
        for pair in dict.fromkeys(self.dtypes.values()):
            listed = first_few(name for name, dtypes in self.dtypes.items() if dtypes == pair)
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
        """Give everything as plain data (for JSON): nested dicts and lists of str, int, float and bool."""
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
    """Compare the weights of two checkpoints, each taken as `convert` takes them: wrappers seen through.

    Args:
        a: the first checkpoint, as in `smart_load`.
        b: the second one.
        select_a: the part to take of the first one, where it holds several.
        select_b: the same for the second one.
        values: compare the values of the tensors, too.

    Raises:
        SmartLoadError: what `convert` would refuse.

    >>> print(diff({"w": torch.zeros(2)}, {"module.w": torch.tensor([0.0, 0.5])}, values=True))
    A: the dict in memory (memory)
    B: the dict in memory (memory): removed 'module.'
    different:
      value:     w: 0.5 apart at most, 1 of the larger (1 of 2 elements)
    """
    with open_checkpoint(a) as checkpoint_a, open_checkpoint(b) as checkpoint_b:
        weights_a = take_weights(checkpoint_a, Options(select_a))
        weights_b = take_weights(checkpoint_b, Options(select_b))
        difference = _compare_names(checkpoint_a, checkpoint_b, weights_a, weights_b)
        if not values:
            return difference
        for checkpoint, weights in ((checkpoint_a, weights_a), (checkpoint_b, weights_b)):
            check_size({key: size_of(value) for key, value in weights.tensors.items()}, weights, checkpoint)
        return _compare_values(difference, checkpoint_a, checkpoint_b, weights_a, weights_b)


def _compare_names(
    checkpoint_a: Checkpoint, checkpoint_b: Checkpoint, weights_a: Weights, weights_b: Weights
) -> Difference:
    """Compare names, shapes and dtypes; no tensor is read."""
    specs_a, specs_b = _specs(weights_a), _specs(weights_b)
    pairs = {name: (spec, specs_b[name]) for name, spec in specs_a.items() if name in specs_b}
    return Difference(
        a=Side(checkpoint_a.path, checkpoint_a.format, weights_a.names.part, weights_a.names.rule),
        b=Side(checkpoint_b.path, checkpoint_b.format, weights_b.names.part, weights_b.names.rule),
        common=len(pairs),
        only_a=tuple(name for name in specs_a if name not in specs_b),
        only_b=tuple(name for name in specs_b if name not in specs_a),
        # As texts: an extra state that is no tensor differs from any shape.
        shapes={name: (_shape(p), _shape(q)) for name, (p, q) in pairs.items() if _shape(p) != _shape(q)},
        dtypes={name: (p.dtype, q.dtype) for name, (p, q) in pairs.items() if p and q and p.dtype != q.dtype},
    )


def _specs(weights: Weights) -> dict[str, TensorSpec | None]:
    """Map each name to its spec; None for an extra state that is no tensor."""
    tensors = weights.tensors
    return {name: _spec(tensors[name]) if name in tensors else None for name in weights.names.pairs}


def _spec(value: Value) -> TensorSpec:
    """Give shape and dtype of a tensor in a file or in memory."""
    return TensorSpec(tuple(value.shape), dtype_name(value.dtype) if isinstance(value, torch.Tensor) else value.dtype)


def _shape(spec: TensorSpec | None) -> str:
    """Give the shape in `spec` as text: '[2, 3]'; for None, say that it is an extra state."""
    return "an extra state" if spec is None else str(list(spec.shape or ()))


def _compare_values(
    difference: Difference,
    checkpoint_a: Checkpoint,
    checkpoint_b: Checkpoint,
    weights_a: Weights,
    weights_b: Weights,
) -> Difference:
    """Add to `difference` how far the values are apart; tensors of different shapes are left out."""
    changes = []
    for name, value in weights_a.tensors.items():
        if name not in weights_b.tensors or name in difference.shapes:
            continue
        tensor_a, tensor_b = _read(value, checkpoint_a), _read(weights_b.tensors[name], checkpoint_b)
        # The two tensors are let go when the next two are read.
        if (change := _change(name, tensor_a, tensor_b)) is not None:
            changes.append(change)
    extras = tuple(
        name
        for name, entry in weights_a.extras.items()
        if name in weights_b.extras
        and not same_extra_state(
            extra_value(entry, checkpoint_a.files), extra_value(weights_b.extras[name], checkpoint_b.files)
        )
    )
    # The printed list is cut: what is farthest apart must not be cut off. By name where two are as far apart.
    changes.sort(key=lambda change: (-change.absolute, change.name))
    return replace(difference, values=tuple(changes), extras=extras)


def _read(value: Value, checkpoint: Checkpoint) -> torch.Tensor:
    """Give a tensor of the checkpoint as a CPU tensor."""
    return value.detach().cpu() if isinstance(value, torch.Tensor) else read_tensor(value, checkpoint.files)


def _change(name: str, a: torch.Tensor, b: torch.Tensor) -> Change | None:
    """Find how far two tensors of one shape are apart; None where all of their elements are equal.

    Dtypes may differ, NaN equals NaN, and -0.0 equals 0.0.
    """
    if same_values(a, b):  # bit for bit, which is far faster and the usual case
        return None
    absolute, relative, differing = 0.0, 0.0, 0
    flat = a.reshape(-1), b.reshape(-1)
    for start in range(0, a.numel(), _AT_ONCE):
        piece_a, piece_b = (values[start : start + _AT_ONCE] for values in flat)
        unequal = _differ(piece_a, piece_b)
        if not unequal.any():
            continue
        differing += int(unequal.sum())
        # Widened first: before 2.10 torch cannot select float8, nor uint16 to uint64, by a mask.
        x, y = _widened(piece_a)[unequal], _widened(piece_b)[unequal]
        distance = (x - y).abs()
        if not (a.is_floating_point() or b.is_floating_point() or distance.is_complex()):
            distance = distance.clamp(min=1)  # integers beyond 2**53 may be the same double, and are not the same
        absolute = max(absolute, _largest(distance))
        # Of two elements that differ the larger is not zero, so that nothing is divided by zero.
        relative = max(relative, _largest(distance / torch.maximum(x.abs(), y.abs())))
    return Change(name, absolute, relative, differing, a.numel()) if differing else None


def _differ(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Tell for each pair of elements whether they differ; NaN equals NaN."""
    if a.dtype == b.dtype and not (a.is_floating_point() or a.is_complex()):
        # By their bytes: two integers beyond 2**53 may be the same double. Of two different dtypes, such integers are
        # compared as doubles all the same; that their dtypes differ is said anyway.
        raw = [values.contiguous().view(torch.uint8).view(-1, a.element_size()) for values in (a, b)]
        return (raw[0] != raw[1]).any(-1)
    x, y = _widened(a), _widened(b)
    return (x != y) & ~(x.isnan() & y.isnan())


def _widened(values: torch.Tensor) -> torch.Tensor:
    """Cast `values` to the widest dtype, in which elements of any two dtypes can be compared."""
    # float8 has no arithmetic of its own at all.
    return values.to(torch.complex128 if values.is_complex() else torch.float64)


def _largest(distances: torch.Tensor) -> float:
    """Give the largest of some distances; that between a number and NaN, which is NaN, counts as infinite."""
    return float(torch.nan_to_num(distances, nan=math.inf, posinf=math.inf).max())


def _side_line(side: Side) -> str:
    """Describe one of the two checkpoints in a line: its name, its format, what was taken and adapted."""
    notes = "; ".join(note for note in (side.rule, side.part and f"from {printable(side.part)!r}") if note)
    return f"{side.path} ({side.format})" + (f": {notes}" if notes else "")


def _change_to_dict(change: Change) -> dict[str, object]:
    """Give a change as plain data for JSON, which has no infinity: there it is the text "inf"."""
    return {key: "inf" if value == math.inf else value for key, value in change._asdict().items()}
