"""The words for a checkpoint and a model that differ: the cause, how close they come, and what to write. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from smartload.records.entries import TensorSpec
from smartload.records.keys import parent
from smartload.records.problems import Ambiguity, Kind, Mismatch
from smartload.records.text import first_few, plural, printable

CAUSES: Mapping[Kind, str] = {
    "shard": "This is one shard of several. Give the folder, or the .index.json that names them all.",
    "lora": "This is a LoRA adapter: it holds only the low-rank updates. Load the base weights here, and the adapter "
    "with peft.",
    "flat": "These are FSDP flat parameters (_flat_param): shards without names. Save a full state dict on the "
    "training side.",
    "zero3": "All tensors are empty: the file was saved under DeepSpeed ZeRO-3, which keeps the weights in shards. "
    "Gather them with zero_to_fp32.py.",
}
"""Causes that are known by name, put first."""


def mismatch(paper: Mismatch) -> str:
    """The message for names or shapes that do not pair off."""
    where = f"{printable(paper.path)}{f', part {printable(paper.part)!r}' if paper.part else ''}"
    how = f" (after: {paper.rule})" if paper.rule else ""
    lines = [f"{paper.paired:,} of {plural(paper.wanted, 'key')} of {paper.model} are in {where}{how}"]
    if cause := (CAUSES[paper.kind] if paper.kind else "") or _cause(paper):
        lines.insert(0, cause)
    for label, names in (("missing", paper.missing), ("left over", paper.unexpected)):
        if names:
            lines.append(f"  {label + ':':11}{_listed(names)}")
    if paper.shapes:
        lines.append(f"  {'shapes:':11}{_shapes(paper.shapes)}")
    if paper.hints:
        lines.append(f"write {' or '.join(paper.hints)}")
    return "\n".join(lines)


def _cause(paper: Mismatch) -> str:
    """What is wrong in one sentence, where that can be said: all of it, another head, one layer."""
    common = paper.paired + len(paper.shapes)
    if common * 10 < min(paper.wanted, common + len(paper.unexpected)):
        names = f"{common:,} of {paper.wanted:,} names" if common else "no name"
        return "" if paper.hints else f"Another architecture: {names} in common."
    if paper.shapes and not paper.paired and common == paper.wanted:
        return "The same names in other sizes: the model was built with other numbers."
    here, there = _module((*paper.missing, *paper.shapes)), _module(paper.unexpected)
    if not paper.paired or here is None or there is None or not (here or there):
        return ""
    parallel = "The checkpoint is a DataParallel's, and " if "removed 'module.'" in paper.rule else ""
    if counts := _counts(paper):
        return f"{parallel}{printable(here)} has {counts[1]:,} {counts[2]} in the model, {counts[0]:,} in the file."
    layer = (
        f"{printable(here)} in the model is {printable(there)} in the file"
        if here and there
        else printable(here or there)
    )
    return f"{parallel}{'one' if parallel else 'One'} layer differs: {layer}."


def _module(names: Iterable[str]) -> str | None:
    """The one module that has all these names itself, "" where there are none; None where they are of several."""
    above = {parent(name) for name in names}
    return None if len(above) > 1 or above == {""} else above.pop() if above else ""


def _counts(paper: Mismatch) -> tuple[int, int, str] | None:
    """First dimensions in the file and in the model, and of what, where nothing else differs and all do alike."""
    found = set[tuple[int, int] | None]()
    dimensions = set()
    for there, here in paper.shapes.values():
        shapes = (there and there.shape) or (), (here and here.shape) or ()
        alike = shapes[0] and shapes[1] and shapes[0][1:] == shapes[1][1:]
        found.add((shapes[0][0], shapes[1][0]) if alike else None)
        dimensions.add(len(shapes[0]))
    counts = found.pop() if len(found) == 1 else None
    if counts is None or paper.missing or paper.unexpected or max(dimensions) < 2:
        return None
    return *counts, "classes" if 1 in dimensions else "rows"


def _listed(names: Mapping[str, TensorSpec | None]) -> str:
    """Up to three folded names, a single one with its shape, and the count where there are more."""
    if len(names) <= 3:
        return ", ".join(f"{printable(name)}{_shape(spec)}" for name, spec in names.items())
    text = first_few(names)
    return text if text.endswith(" in all)") else f"{len(names):,}: {text}"


def _shape(spec: TensorSpec | None) -> str:
    return "" if spec is None or spec.shape is None else f" {list(spec.shape)}"


def _shapes(shapes: Mapping[str, tuple[TensorSpec | None, TensorSpec | None]]) -> str:
    texts = [
        f"{printable(key)}{_shape(there)} in the file,{_shape(here)} in the model"
        for key, (there, here) in shapes.items()
    ]
    return "; ".join(texts[:3]) + (f"; ... ({len(texts):,} in all)" if len(texts) > 3 else "")


def ambiguity(paper: Ambiguity) -> str:
    """The message for two answers or more."""
    if paper.key:
        several = plural(len(paper.answers), "tensor")
        lines = [f"{printable(paper.path)}: {several} would fill {printable(paper.key)} of {paper.model}:"]
    elif paper.model:
        parts = plural(len(paper.answers), "part")
        lines = [f"{printable(paper.path)} holds {parts} that fit {paper.model}, and they differ:"]
    else:
        lines = [f"{printable(paper.path)} holds several state dicts, and no model says which is meant:"]
    for what, argument in paper.answers[:8]:
        lines.append(f"  {printable(what)}" + (f": write {argument}" if argument else ""))
    return "\n".join(lines)
