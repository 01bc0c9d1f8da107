"""Which readings of a file's names are worth a look: parts, prefixes removed, prefixes added. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from smartload.errors import KeyMismatchError
from smartload.fit import FileNames, Fit, ModelNames, fit, matches
from smartload.records import Manifest, Problem, TensorSpec, Wishes
from smartload.spelling import WRAPPER_SEGMENTS, Renames, ancestors, below, blind, common_path

Parts = Mapping[str, Mapping[str, TensorSpec | None]]
"""The names of a file: dotted path of each state dict -> its keys and what they are (None: no tensor)."""

ENOUGH = 8
"""Fits that are compared before a file is called ambiguous, and readings that are tried without full support."""


def select(parts: Parts, path: str | None, name: str) -> Parts:
    """The parts at or below the dotted path, which may go through dicts and on through prefixes of keys."""
    if path is None:
        return parts
    if path == "":
        return {"": parts[""]} if "" in parts else parts
    chosen: dict[str, dict[str, TensorSpec | None]] = {}
    for part, specs in parts.items():
        inner = "" if part == path else below(part, path)
        if inner is not None:
            chosen.setdefault(inner, {}).update(specs)
        prefix = below(path, part) if part != path else None
        if prefix:
            tails = {tail: spec for key, spec in specs.items() if (tail := below(key, prefix)) is not None}
            if tails:
                chosen.setdefault("", {}).update(tails)
    if not chosen:
        raise KeyMismatchError(Problem("select", name, {"select": path, "parts": tuple(parts)}))
    return chosen


def readings(file: FileNames, model: Manifest, renames: Renames, wishes: Wishes) -> list[Fit]:
    """Every reading worth a look: the whole part first, then prefixes removed by votes, then prefixes added."""
    plain = ModelNames(model)
    if len(file.parts) == 1:
        first = fit(file, plain, file.parts[0], renames, wishes)
        if first.complete and len(first.pairs) == len(file.spec):
            return [first]
    wanted = [plain.plain(key) for key in model.specs if not matches(key, wishes.allow_missing)]
    least = max(1, len(wanted) - sum(len(group) - 1 for group in model.aliases))
    found: list[Fit] = []
    for candidate in _candidates(file, plain, renames, least):
        found.append(fit(file, plain, candidate, renames, wishes))
        if sum(each.complete for each in found) >= ENOUGH:
            return found
    big = [part for part in file.containers() if len(file.under(part)) >= least]
    for added in ancestors(common_path(wanted)):
        names = ModelNames(model, added)
        for part in big:
            if added and any(blind(name) in names.blind for name in file.tails(part)):
                found.append(fit(file, names, part, renames, wishes))
    return found


def _candidates(file: FileNames, model: ModelNames, renames: Renames, least: int) -> list[str]:
    """Paths in the file below which names of the model are found, those with the most names first."""
    votes: Counter[str] = Counter()
    depth = max((name.count(".") for name in model.blind), default=0) + 1
    for name in file.spec:
        segments = name.split(".")
        suffix, length = segments[-1], 1
        for start in range(len(segments) - 1, -1, -1):
            if start < len(segments) - 1 and segments[start] not in WRAPPER_SEGMENTS:
                suffix, length = f"{segments[start]}.{suffix}", length + 1
            if length > depth:
                break
            if suffix in model.blind or (renames and renames.prefix(suffix) in model.blind):
                votes[".".join(segments[:start])] += 1
    ranked = [path for i, (path, count) in enumerate(votes.most_common()) if count >= least or i < ENOUGH]
    return list(dict.fromkeys([*ranked, *list(file.containers())[:ENOUGH]]))
