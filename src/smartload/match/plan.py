"""Write a complete fit down: its pairs, its rule in words, and the module paths that go with them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from smartload.match.fit import Fit, Fitter
from smartload.records.keys import join, leaf, parent, without_prefix
from smartload.records.report import KeyPlan
from smartload.records.requests import Ignored, ModelKeys
from smartload.records.text import first_few, printable
from smartload.records.wrappers import SEGMENTS


def make_plan(fit: Fit, fitter: Fitter, model: ModelKeys, path: str) -> KeyPlan:
    """Make the plan of a complete fit: in the model's order, with the dotted names that the file itself has."""
    file, specs = fitter.file, model.specs
    part, removed = part_and_prefix(fit, fitter)
    # Keys that the model's own code accepts beside its state dict's come last.
    ordered = [key for key in specs if key in fit.pairs] + [key for key in fit.pairs if key not in specs]
    return KeyPlan(
        model=model.name,
        path=path,
        part=join(fitter.options.select or "", part),
        rule=describe_rule(fit, fitter, part, removed),
        pairs={key: file.keys[fit.pairs[key]].dotted for key in ordered},
        wanted=len(specs),
        # A dict of tensors stands in the dict above it as a value that is no tensor; its own keys are named already.
        ignored=tuple(
            Ignored(file.keys[name].dotted, reason)
            for name, reason in fit.ignored
            if file.keys[name].spec is not None or not _is_at_or_above_a_part(name, file.parts)
        ),
        kept=tuple(fit.kept),
        missing_keys=tuple(fit.allowed_missing),
        unexpected_keys=tuple(file.keys[name].dotted for name in fit.allowed_unexpected),
        rehearsed=bool(fit.accepted),
    )


def _is_at_or_above_a_part(name: str, parts: Iterable[str]) -> bool:
    return any(part == name or without_prefix(part, name) is not None for part in parts)


def part_and_prefix(fit: Fit, fitter: Fitter) -> tuple[str, str]:
    """Split the removed path of a fit into the dict of the file and the prefix that is removed from its keys.

    'state_dict.net' -> ('state_dict', 'net'). Where several dicts make one model, all of it is the path above them.
    """
    parts = {fitter.file.keys[name].part for name in fit.pairs.values()}
    # What the message calls the part is what the caller can write as `select`.
    if len(parts) == 1:
        part = parts.pop()
        rest = without_prefix(fit.removed, part) if fit.removed != part else ""
        if rest is not None:
            return part, rest
        # The dict lies deeper than what was removed: a dict called 'module' in the file of DeepSpeed is a wrapper, too.
        seen_through = without_prefix(part, fit.removed)
        if seen_through and set(seen_through.split(".")) <= SEGMENTS:
            return part, ""
    return fit.removed, ""


def describe_rule(fit: Fit, fitter: Fitter, part: str, removed: str) -> str:
    """Say in words how names were adapted ("removed 'module.', renamed"); "" where they are equal.

    Args:
        fit: the pairs.
        fitter: the file and the call.
        part: the dict of the file that was taken, from `part_and_prefix`.
        removed: the prefix that was removed from its keys, likewise.
    """
    prefix = join(part, removed)
    added = fit.model.added
    # A dict for its order: each step once, as the names have it first.
    steps = {f"removed '{printable(removed)}.'": bool(removed), f"added '{printable(added)}.'": bool(added)}
    seen: set[tuple[str, str]] = set()
    for key, name in fit.pairs.items():
        tail = (without_prefix(name, prefix) or name) if prefix else name
        if tail == key:  # most keys, once the prefix is gone
            continue
        # The keys of one module differ in the same wrappers.
        modules = (parent(key), parent(tail))
        if modules[0] != modules[1] and modules not in seen:
            seen.add(modules)
            adapted = fit.adapted.get(name, tail)
            steps |= {f"removed '{segment}.'": True for segment in _wrappers(tail, adapted)}
            steps |= {f"added '{segment}.'": True for segment in _wrappers(key, join(added, adapted))}
    # Without the rules themselves: the caller wrote them.
    steps["renamed"] = bool(fit.rules)
    if fit.accepted:
        steps[f"the model's own loading code handles {first_few(fit.accepted)}"] = True
    return ", ".join(step for step, taken in steps.items() if taken)


def _wrappers(name: str, without: str) -> list[str]:
    """Give the wrappers' segments that `name` has more often than `without`."""
    if name == without:
        return []
    segments, left = name.split("."), without.split(".")
    candidates = dict.fromkeys(segment for segment in segments if segment in SEGMENTS)
    return [segment for segment in candidates if segments.count(segment) > left.count(segment)]


def module_paths(pairs: Mapping[str, str]) -> dict[str, str]:
    """Pair the modules that go with paired keys: module path in the file -> module path in the model.

    A state dict has the versions of modules by their paths in the file; torch looks for them by the model's paths.

    >>> module_paths({"fc.weight": "net.fc.weight"})
    {'net.fc': 'fc', 'net': ''}
    """
    paths: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()  # keys share the modules above them: each pair is followed upwards once
    for key, name in pairs.items():
        step = parent(key), parent(name)
        while step not in seen:
            seen.add(step)
            in_model, in_file = step
            # The first key of a module decides; tied keys may pair it with a second one.
            paths.setdefault(in_file, in_model)
            step = _pair_above(in_model, in_file)
    return paths


def _pair_above(in_model: str, in_file: str) -> tuple[str, str]:
    """Give the pair of modules above a pair; the pair itself where their names differ.

    A wrapper and the module in it are one here: the step is taken on the side that has the wrapper.
    """
    model_leaf, file_leaf = leaf(in_model), leaf(in_file)
    if model_leaf == file_leaf:
        return parent(in_model), parent(in_file)
    if file_leaf in SEGMENTS and in_model:
        return in_model, parent(in_file)
    if model_leaf in SEGMENTS and in_file:
        return parent(in_model), in_file
    return in_model, in_file
