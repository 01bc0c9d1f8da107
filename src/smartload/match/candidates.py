"""Which readings of a file's names are worth a look: parts, prefixes removed, prefixes added. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

from smartload.errors import KeyMismatchError
from smartload.match.fit import Fit, Fitter, excuse, same_shape
from smartload.match.names import MOST_LEVELS, FileNames, ModelNames, Parts
from smartload.records.entries import FileKey, TensorSpec
from smartload.records.keys import ancestors, common_path, join, without_prefix, without_wrappers
from smartload.records.problems import Kind, Problem
from smartload.records.requests import ModelKeys
from smartload.records.wrappers import SEGMENTS, has_no_wrapper

ENOUGH = 8
"""Readings without full support that are looked at all the same, and told of where none fits."""
MOST_ANSWERS = 64
"""Complete readings after which a file is called ambiguous without looking at the rest."""
LONGEST_NAME = 10_000
"""Characters of a name below which no prefix is looked for; torch's own names are a hundredth of it."""


def select(parts: Parts, path: str | None, name: str) -> Parts:
    """Take the parts at or below the dotted path, which may go through dicts and on through prefixes of keys.

    Args:
        parts: the keys of the file.
        path: what the caller gave for `select`: None for everything, "" for the top only.
        name: the file, for the message.

    Raises:
        KeyMismatchError: nothing lies at that path; the message lists the paths that can be selected.
    """
    if path is None:
        return parts
    if path == "":
        return {"": parts[""]} if "" in parts else parts
    chosen: dict[str, list[FileKey]] = {}
    for part, keys in parts.items():
        if part == path or without_prefix(part, path) is not None:
            below = part[len(path) + 1 :]
            chosen.setdefault(below, []).extend(key._replace(part=below) for key in keys)
        elif prefix := without_prefix(path, part):
            tails = ((key, without_prefix(key.key, prefix)) for key in keys)
            if taken := [key._replace(part="", key=tail) for key, tail in tails if tail is not None]:
                chosen.setdefault("", []).extend(taken)
    if not chosen:
        selectable = tuple(_selectable(parts))
        kind: Kind = "select" if selectable else "select-flat"
        raise KeyMismatchError(Problem(kind, name, {"select": path, "parts": selectable}))
    return chosen


def _selectable(parts: Parts) -> Iterator[str]:
    """Give the paths of the dicts of a file, and the first segments of the keys in each."""
    for part, keys in parts.items():
        heads = dict.fromkeys(key.key.partition(".")[0] for key in keys if "." in key.key)
        if part:
            yield part
        if len(heads) > 1 or not part:
            yield from (join(part, head) for head in islice(heads, ENOUGH))


@dataclass(slots=True)
class Candidates:
    """What came of all the readings that were worth a look."""

    complete: list[Fit] = field(default_factory=list)
    near: list[Fit] = field(default_factory=list)
    """The closest of the others, the closest first."""
    most: int = 0
    """Tensors that the best of all readings would load."""
    more: bool = False
    """Whether there may be more complete ones than are listed."""

    def add(self, fit: Fit) -> None:
        """Take a reading in; one that takes the same names to the same keys as another is no other answer."""
        self.most = max(self.most, len(fit.taken) - len(fit.shapes))
        if not fit.complete:
            self.near.append(fit)
            if len(self.near) > 4 * ENOUGH:
                self._trim()
            return
        for at, other in enumerate(self.complete):
            if fit.pairs == other.pairs:
                self.complete[at] = min(fit, other, key=lambda each: len(each.removed))
                return
        self.complete.append(fit)
        self.more = len(self.complete) >= MOST_ANSWERS

    def _trim(self) -> None:
        self.near = sorted(self.near, key=closeness, reverse=True)[:ENOUGH]

    def done(self) -> Candidates:
        """Itself, sorted."""
        self._trim()
        return self


def closeness(fit: Fit) -> tuple[int, int, int]:
    """How close an incomplete reading comes: most tensors that pair off, fewest left over, least removed."""
    return len(fit.pairs) - len(fit.shapes), -len(fit.unexpected), -len(fit.removed)


class _Candidate(NamedTuple):
    """A reading not yet looked at: names that vote for it, those of them in a fitting shape, and what it is."""

    votes: int
    shapely: int
    model: ModelNames
    removed: str


def try_candidates(fitter: Fitter, model_keys: ModelKeys, path: str) -> Candidates:
    """Every reading worth a look: the whole part first, then prefixes removed and prefixes added, by votes.

    Raises KeyMismatchError where names nest so that looking at all would not be linear in the names any more.
    """
    file, found = fitter.file, Candidates()
    spellings = _spellings(model_keys)
    if len(file.parts) == 1:
        for model in spellings if fitter.renames or fitter.begins_as(spellings[-1], file.parts[0]) else ():
            first = fitter.fit(model, file.parts[0])
            if first.complete and not (first.ignored or first.buffers or first.allowed_unexpected):
                return Candidates([first], [], len(first.pairs))
    plain = spellings[-1]
    wanted = [
        plain.unwrapped(key) for key in model_keys.specs if not (fitter.may_miss(plain, key) or excuse(key, model_keys))
    ]
    least = max(1, len(wanted) - sum(len(group) - 1 for group in model_keys.tied))
    budget = _Budget(64 * (len(file.keys) + len(model_keys.specs)) + 100_000, least, path)
    tries = list(_removed(fitter, plain))
    budget.spend(found, fitter, spellings, [each for each in tries if each.votes])
    # Beside what fits already, names with a prefix less would be left over, unless they may be or lie in other dicts.
    if not found.complete or len(file.parts) > 1 or fitter.options.allow_unexpected:
        budget.spend(found, fitter, spellings, list(_added(fitter, model_keys, wanted, least)))
    if not found.complete:  # for the refusal, or for loading code of the model's own
        budget.spend(found, fitter, spellings, [each for each in tries if not each.votes])
    return found.done()


@dataclass(slots=True)
class _Budget:
    """Names that may still be looked at, so that all of it stays linear in the names."""

    left: int
    least: int
    """Tensors without which a reading cannot be complete."""
    path: str

    def spend(self, found: Candidates, fitter: Fitter, spellings: list[ModelNames], tries: list[_Candidate]) -> None:
        """Look at the readings that may be complete, and at a few more, those with the most votes first."""
        file = fitter.file
        for rank, each in enumerate(sorted(tries, key=lambda each: -each.votes)):
            needed = max(self.least, found.most) if fitter.options.allow_missing else self.least
            few = len(file.parts) <= ENOUGH and each.removed in file.parts
            if found.more or (rank >= ENOUGH and each.shapely < needed and not few):
                continue
            self.left -= file.count(each.removed) + len(each.model.key)
            if self.left < 0:
                raise KeyMismatchError(Problem("nested", self.path, {"model": each.model.model_keys.name}))
            found.add(_best(fitter, each, spellings))


def _spellings(model_keys: ModelKeys) -> list[ModelNames]:
    """The model's names: as they are, where that may make a difference, and without its wrappers' segments."""
    plain = ModelNames(model_keys)
    if model_keys.wrappers and (plain.has_namesakes or len(plain.key) < len(model_keys.specs)):
        return [ModelNames(replace(model_keys, wrappers=frozenset())), plain]
    return [plain]


def _best(fitter: Fitter, each: _Candidate, spellings: list[ModelNames]) -> Fit:
    if not each.model.added:
        for raw in spellings[:-1]:
            fit = fitter.fit(raw, each.removed)
            if fit.complete:
                return fit
    return fitter.fit(each.model, each.removed)


def _removed(fitter: Fitter, model: ModelNames) -> list[_Candidate]:
    """Paths in the file below which names of the model are found."""
    votes: Counter[str] = Counter()
    shapely: Counter[str] = Counter()
    for name, file_key in fitter.file.keys.items():
        for prefix, there in _prefixes(name, fitter, model) if len(name) < LONGEST_NAME else ():
            votes[prefix] += 1
            shapely[prefix] += _fits(file_key.spec, there)
    paths = dict.fromkeys([*votes, *fitter.file.containers[:ENOUGH]])
    return [_Candidate(votes[path], shapely[path], model, path) for path in paths]


def _prefixes(name: str, fitter: Fitter, model: ModelNames) -> Iterator[tuple[str, list[TensorSpec | None]]]:
    """The prefixes without which `name` is a name of the model, and what the model has there."""
    wanted, renames = model.bare, fitter.renames
    reach = model.depth + renames.depth
    if not renames and has_no_wrapper(name):
        start = len(name)
        for _ in range(reach):
            start = name.rfind(".", 0, start)
            if (there := wanted.get(name[start + 1 :])) is not None:
                yield name[: max(start, 0)], there
            if start < 0:
                return
        return
    suffix, length, wrappers, start = "", 0, 0, len(name) + 1
    for segment in reversed(name.split(".")):
        start -= len(segment) + 1
        if suffix and segment in SEGMENTS:
            wrappers += 1
        else:
            suffix = f"{segment}.{suffix}" if suffix else segment
            length += 1
        if length > reach or wrappers > MOST_LEVELS:
            return
        there = wanted.get(suffix)
        if there is None and renames:
            there = wanted.get(without_wrappers(renames.prefix(suffix)[0]))
        if there is not None:
            yield name[: max(start - 1, 0)], there


def _fits(spec: TensorSpec | None, there: list[TensorSpec | None]) -> bool:
    return same_shape(spec, there[0]) or any(same_shape(spec, each) for each in there[1:])


def _added(fitter: Fitter, model_keys: ModelKeys, wanted: list[str], least: int) -> Iterator[_Candidate]:
    """Dicts of the file in which names of the model are found once a prefix that all of them have is left out."""
    file = fitter.file
    paths = [path for path in ancestors(common_path(wanted)) if path]
    big = [part for part in file.containers if file.count(part) >= least] if paths else []
    names = {part: list(_blind_tails(file, part, fitter)) for part in big}
    for added in paths:
        model = ModelNames(model_keys, added)
        for part in big:
            votes = [(spec, there) for tail, spec in names[part] if (there := model.bare.get(tail)) is not None]
            if votes:
                shapely = sum(_fits(spec, there) for spec, there in votes)
                yield _Candidate(len(votes), shapely, model, part)


def _blind_tails(file: FileNames, part: str, fitter: Fitter) -> Iterator[tuple[str, TensorSpec | None]]:
    for name in file.under(part):
        tail = without_wrappers(name[len(part) + 1 :] if part else name)
        yield (without_wrappers(fitter.renames.prefix(tail)[0]) if fitter.renames else tail), file.keys[name].spec
