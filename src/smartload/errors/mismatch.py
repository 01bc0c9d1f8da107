"""Word the two long refusals: keys that differ, and several parts or tensors that fit.

A message about keys has the cause first, where it can be named; then how close the two come; then up to three missing
and unexpected keys and shapes; last the arguments that were tried and work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from smartload.records.entries import TensorSpec
from smartload.records.keys import parent
from smartload.records.problems import Ambiguity, Kind, Mismatch
from smartload.records.text import first_few, plural, printable

# Kinds of file that are recognised by their keys and never are all the weights of a model, so
# the message begins with what to load instead.
CAUSES: Mapping[Kind, str] = {
    "shard": "This is one shard of several. Give the folder, or the .index.json that names them all.",
    "lora": "This is a LoRA adapter: it holds only the low-rank updates. Load the base weights here, and the adapter "
    "with peft.",
    "flat": "These are FSDP flat parameters (_flat_param): shards without names. Save a full state dict on the "
    "training side.",
    "zero3": "All tensors are empty: the file was saved under DeepSpeed ZeRO-3, which keeps the weights in shards. "
    "Gather them with zero_to_fp32.py.",
}
"""One sentence for each cause that is known by name."""

_SHOWN = 3
"""Examples of each side: enough to see a pattern, and few enough to be read."""
_MOST_ANSWERS = 8
"""Lines of an ambiguity. `match` stops to compare there, so of eight answers the count says "8 or more"."""
_WIDTH = 12
"""Characters of the longest label, "unexpected:", and a space."""


def mismatch(problem: Mismatch) -> str:
    """Make the message for keys or shapes that do not pair off."""
    where = f"{printable(problem.path)}{f', part {printable(problem.part)!r}' if problem.part else ''}"
    how = f" (after: {problem.rule})" if problem.rule else ""
    lines = [f"{problem.paired:,} of {plural(problem.wanted, 'key')} of {problem.model} are in {where}{how}"]
    if cause := (CAUSES[problem.kind] if problem.kind else "") or _cause(problem):
        lines.insert(0, cause)
    # torch's own two words, in torch's sense: what the file lacks, and what the model lacks.
    for label, names in (("missing", problem.missing), ("unexpected", problem.unexpected)):
        if names:
            lines.append(f"  {label + ':':{_WIDTH}}{_listed(names)}")
    if problem.shapes:
        lines.append(f"  {'shapes:':{_WIDTH}}{_shapes(problem.shapes)}")
    if problem.hints:
        lines.append(f"write {' or '.join(map(_with_consequence, problem.hints))}")
    return "\n".join(lines)


def _with_consequence(hint: str) -> str:
    """Say beside an argument that lets keys be missing what becomes of them."""
    # Nobody should train or test on such weights because a message was followed without a thought.
    return f"{hint} (what is missing stays as initialised)" if hint.startswith("allow_missing") else hint


def _cause(problem: Mismatch) -> str:
    """Name in one sentence what differs, where that can be said: everything, another size, one layer; "" elsewhere."""
    common = problem.paired + len(problem.shapes)
    # Under a tenth of the smaller side the common names are chance: every network has a "fc" or a "norm.weight".
    if common * 10 < min(problem.wanted, common + len(problem.unexpected)):
        names = f"{common:,} of {problem.wanted:,} names" if common else "no name"
        # A hint that works contradicts it: the names differ by a prefix, and the architecture is the same.
        return "" if problem.hints else f"Another architecture: {names} in common."
    if problem.shapes and not problem.paired and common == problem.wanted:
        return (
            "The same names, but every shape differs: the model was built with another configuration (width, number "
            "of classes)."
        )
    in_model, in_file = _module((*problem.missing, *problem.shapes)), _module(problem.unexpected)
    if not problem.paired or in_model is None or in_file is None or not (in_model or in_file):
        return ""
    # The prefix alone: DataParallel, DistributedDataParallel and AveragedModel all put it there.
    prefix = "The keys have the prefix 'module.' of DataParallel, and " if "removed 'module.'" in problem.rule else ""
    if counts := _counts(problem):
        return f"{prefix}{printable(in_model)} has {counts[1]:,} {counts[2]} in the model, {counts[0]:,} in the file."
    layer = (
        f"{printable(in_model)} in the model is {printable(in_file)} in the file"
        if in_model and in_file and in_model != in_file
        else printable(in_model or in_file)
    )
    return f"{prefix}{'one' if prefix else 'One'} layer differs: {layer}."


def _module(names: Iterable[str]) -> str | None:
    """Find the one module that has all the keys directly; "" where there are no keys, None where no one module does.

    >>> _module(["fc.weight", "fc.bias"]), _module([]), _module(["fc.weight", "conv.weight"])
    ('fc', '', None)
    """
    modules = {parent(name) for name in names}
    if len(modules) > 1 or modules == {""}:  # a tensor of the whole network is in no layer that could be named
        return None
    return modules.pop() if modules else ""


def _counts(problem: Mismatch) -> tuple[int, int, str] | None:
    """Give the first dimension in the file, the one in the model, and what they count: "classes" or "rows".

    None where anything else differs, too, or where the tensors do not differ in the same two sizes.
    """
    sizes = set[tuple[int, int] | None]()
    dimensions = set()
    for file_spec, model_spec in problem.shapes.values():
        in_file, in_model = (file_spec and file_spec.shape) or (), (model_spec and model_spec.shape) or ()
        alike = in_file and in_model and in_file[1:] == in_model[1:]
        sizes.add((in_file[0], in_model[0]) if alike else None)
        dimensions.add(len(in_file))
    counts = sizes.pop() if len(sizes) == 1 else None
    if counts is None or problem.missing or problem.unexpected or max(dimensions) < 2:
        return None
    # A weight with its bias is a layer with outputs, and the last one has one for each class; a weight alone is, as a
    # rule, an embedding with a row for each token.
    return *counts, "classes" if 1 in dimensions else "rows"


def _listed(names: Mapping[str, TensorSpec | None]) -> str:
    """List a few keys with their shapes, or more of them folded, with their count."""
    if len(names) <= _SHOWN:
        return ", ".join(f"{printable(name)}{_shape(spec)}" for name, spec in names.items())
    text = first_few(names)
    return text if text.endswith(" in all)") else f"{len(names):,}: {text}"


def _shape(spec: TensorSpec | None) -> str:
    return "" if spec is None or spec.shape is None else f" {list(spec.shape)}"


def _shapes(shapes: Mapping[str, tuple[TensorSpec | None, TensorSpec | None]]) -> str:
    """List the first few keys whose shapes differ, with both shapes."""
    texts = [
        f"{printable(key)}{_shape(in_file)} in the file,{_shape(in_model)} in the model"
        for key, (in_file, in_model) in shapes.items()
    ]
    return "; ".join(texts[:_SHOWN]) + (f"; ... ({len(texts):,} in all)" if len(texts) > _SHOWN else "")


def ambiguity(problem: Ambiguity) -> str:
    """Make the message for two parts, or two tensors, that fit; or more.

    >>> fit = (("2 keys of 'model'", "select='model'"), ("2 keys of 'ema'", "select='ema'"))
    >>> print(ambiguity(Ambiguity("Net", "run.pth", fit)))
    run.pth is ambiguous: 2 parts fit Net, and they differ:
      2 keys of 'model': write select='model'
      2 keys of 'ema': write select='ema'
    """
    path, count = printable(problem.path), len(problem.answers)
    number = f"{count} or more" if count >= _MOST_ANSWERS else f"{count}"
    if problem.key:
        lines = [f"{path} is ambiguous: {number} tensors fit {printable(problem.key)} of {problem.model}:"]
    elif problem.model:
        lines = [f"{path} is ambiguous: {number} parts fit {problem.model}, and they differ:"]
    else:  # `convert` and `diff` have no model that could decide
        lines = [f"{path} is ambiguous: it holds several state dicts, and no model says which is meant:"]
    for what, argument in problem.answers[:_MOST_ANSWERS]:
        lines.append(f"  {printable(what)}" + (f": write {argument}" if argument else ""))
    return "\n".join(lines)
