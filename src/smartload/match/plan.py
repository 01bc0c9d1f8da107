"""A reading that fits, written down: pairs, the rule in words, and the module paths that go with them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from smartload.match.fit import Fit, Fitter
from smartload.records.keys import join, leaf, parent, without_prefix
from smartload.records.report import KeyPlan
from smartload.records.requests import Ignored, ModelKeys
from smartload.records.text import first_few, printable
from smartload.records.wrappers import SEGMENTS


def make_plan(best: Fit, fitter: Fitter, model: ModelKeys, path: str) -> KeyPlan:
    """The plan for a reading that fits."""
    file, specs = fitter.file, model.specs
    part, removed = part_and_prefix(best, fitter)
    ordered = [key for key in specs if key in best.pairs] + [key for key in best.pairs if key not in specs]
    return KeyPlan(
        model=model.name,
        path=path,
        part=join(fitter.options.select or "", part),
        rule=describe_rule(best, fitter, part, removed),
        pairs={key: file.keys[best.pairs[key]].dotted for key in ordered},
        wanted=len(specs),
        ignored=tuple(
            Ignored(file.keys[name].dotted, reason)
            for name, reason in best.ignored
            if file.keys[name].spec is not None or not _holds_a_part(name, file.parts)
        ),
        kept=tuple(best.kept),
        missing_keys=tuple(best.allowed_missing),
        unexpected_keys=tuple(file.keys[name].dotted for name in best.allowed_unexpected),
        rehearsed=bool(best.accepted),
    )


def _holds_a_part(name: str, parts: Iterable[str]) -> bool:
    """Whether a name is that of a dict which is a part of its own, or holds one."""
    return any(part == name or without_prefix(part, name) is not None for part in parts)


def part_and_prefix(best: Fit, fitter: Fitter) -> tuple[str, str]:
    """The dict of the file that a reading takes, and the prefix that is removed from its keys.

    Over several dicts that make one model it is the path above them.
    """
    parts = {fitter.file.keys[name].part for name in best.pairs.values()}
    if len(parts) == 1:
        part = parts.pop()
        rest = without_prefix(best.removed, part) if best.removed != part else ""
        if rest is not None:
            return part, rest
        seen_through = without_prefix(part, best.removed)
        if seen_through and set(seen_through.split(".")) <= SEGMENTS:
            return part, ""
    return best.removed, ""


def describe_rule(best: Fit, fitter: Fitter, part: str, removed: str) -> str:
    """What was adapted, in words; empty where the names are equal."""
    prefix = join(part, removed)
    added = best.model.added
    steps = {f"removed '{printable(removed)}.'": bool(removed), f"added '{printable(added)}.'": bool(added)}
    seen: set[tuple[str, str]] = set()
    for key, name in best.pairs.items():
        tail = (without_prefix(name, prefix) or name) if prefix else name
        if tail == key:
            continue
        places = (parent(key), parent(tail))
        if places[0] != places[1] and places not in seen:
            seen.add(places)
            adapted = best.names.get(name, tail)
            steps |= {f"removed '{piece}.'": True for piece in _wrappers(tail, adapted)}
            steps |= {f"added '{piece}.'": True for piece in _wrappers(key, join(added, adapted))}
    steps["renamed"] = bool(best.rules)
    if best.accepted:
        steps[f"the model's own loading code sees to {first_few(best.accepted)}"] = True
    return ", ".join(step for step, taken in steps.items() if taken)


def _wrappers(name: str, without: str) -> list[str]:
    """The wrapper segments of `name` that are not in `without`."""
    if name == without:
        return []
    there, left = name.split("."), without.split(".")
    found = dict.fromkeys(piece for piece in there if piece in SEGMENTS)
    return [piece for piece in found if there.count(piece) > left.count(piece)]


def module_paths(pairs: Mapping[str, str]) -> dict[str, str]:
    """Module path in the file -> in the model, for every module above a pair, as far up as the names agree."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    for key, name in pairs.items():
        step = parent(key), parent(name)
        while step not in seen:
            seen.add(step)
            own, theirs = step
            found.setdefault(theirs, own)
            step = _above(own, theirs)
    return found


def _above(own: str, theirs: str) -> tuple[str, str]:
    """The next pair of modules on the way up; the pair itself where the names part ways.

    A wrapper and what it wraps are one module for the purpose: the step is taken on the side that has the wrapper.
    """
    last, other = leaf(own), leaf(theirs)
    if last == other:
        return parent(own), parent(theirs)
    if other in SEGMENTS and own:
        return own, parent(theirs)
    if last in SEGMENTS and theirs:
        return parent(own), theirs
    return own, theirs
