"""Which readings of a file's names are worth a look: parts, prefixes removed, prefixes added. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

from smartload.errors import AmbiguousKeysError, KeyMismatchError
from smartload.match.fit import Fit, Reader, excuse, same_shape
from smartload.match.names import MOST_LEVELS, FileNames, ModelNames
from smartload.records.data import Manifest, Problem, TensorSpec
from smartload.records.keys import WRAPPER_SEGMENTS, ancestors, below, blind, common_path, has_no_wrapper, join

Parts = Mapping[str, Mapping[str, TensorSpec | None]]
"""The names of a file: dotted path of each state dict -> its keys and what they are (None: no tensor)."""

ENOUGH = 8
"""Readings without full support that are looked at all the same, and told of where none fits."""
MOST_ANSWERS = 64
"""Complete readings after which a file is called ambiguous without looking at the rest."""
LONGEST_NAME = 10_000
"""Characters of a name below which no prefix is looked for; torch's own names are a hundredth of it."""


def select(parts: Parts, path: str | None, name: str) -> Parts:
    """The parts at or below the dotted path, which may go through dicts and on through prefixes of keys."""
    if path is None:
        return parts
    if path == "":
        return {"": parts[""]} if "" in parts else parts
    chosen: dict[str, dict[str, TensorSpec | None]] = {}
    for part, specs in parts.items():
        if part == path or below(part, path) is not None:
            _take(chosen, part[len(path) + 1 :], specs, name, path)
        elif prefix := below(path, part):
            tails = {tail: spec for key, spec in specs.items() if (tail := below(key, prefix)) is not None}
            if tails:
                _take(chosen, "", tails, name, path)
    if not chosen:
        options = tuple(_selectable(parts))
        kind = "select" if options else "select-flat"
        raise KeyMismatchError(Problem(kind, name, {"select": path, "parts": options}))
    return chosen


def _selectable(parts: Parts) -> Iterator[str]:
    """The dicts of a file, and the first segments of the names in each."""
    for part, specs in parts.items():
        heads = dict.fromkeys(key.partition(".")[0] for key in specs if "." in key)
        if part:
            yield part
        if len(heads) > 1 or not part:
            yield from (join(part, head) for head in islice(heads, ENOUGH))


def _take(
    chosen: dict[str, dict[str, TensorSpec | None]],
    part: str,
    specs: Mapping[str, TensorSpec | None],
    name: str,
    path: str,
) -> None:
    """Add names to a part; two dicts of one dotted path may not have a name in common."""
    there = chosen.setdefault(part, {})
    if both := there.keys() & specs.keys():
        full = join(path, part, min(both))
        raise AmbiguousKeysError(Problem("twice", name, {"first": full, "second": full}))
    there.update(specs)


@dataclass(slots=True)
class Readings:
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

    def done(self) -> Readings:
        """Itself, sorted."""
        self._trim()
        return self


def closeness(fit: Fit) -> tuple[int, int, int]:
    """How close an incomplete reading comes: most tensors that pair off, fewest left over, least removed."""
    return len(fit.pairs) - len(fit.shapes), -len(fit.left_over), -len(fit.removed)


class _Try(NamedTuple):
    """A reading not yet looked at: names that vote for it, those of them in a fitting shape, and what it is."""

    votes: int
    shapely: int
    model: ModelNames
    removed: str


def readings(reader: Reader, manifest: Manifest, path: str) -> Readings:
    """Every reading worth a look: the whole part first, then prefixes removed and prefixes added, by votes.

    Raises KeyMismatchError where names nest so that looking at all would not be linear in the names any more.
    """
    file, found = reader.file, Readings()
    spellings = _spellings(manifest)
    if len(file.parts) == 1:
        for model in spellings if reader.renames or reader.begins_as(spellings[-1], file.parts[0]) else ():
            first = reader.fit(model, file.parts[0])
            if first.complete and not (first.ignored or first.buffers or first.allowed_unexpected):
                return Readings([first], [], len(first.pairs))
    plain = spellings[-1]
    wanted = [plain.plain(key) for key in manifest.specs if not (reader.may_miss(plain, key) or excuse(key, manifest))]
    least = max(1, len(wanted) - sum(len(group) - 1 for group in manifest.aliases))
    budget = _Budget(64 * (len(file.spec) + len(manifest.specs)) + 100_000, least, path)
    tries = list(_removed(reader, plain))
    budget.spend(found, reader, spellings, [each for each in tries if each.votes])
    # Beside what fits already, names with a prefix less would be left over, unless they may be or lie in other dicts.
    if not found.complete or len(file.parts) > 1 or reader.wishes.allow_unexpected:
        budget.spend(found, reader, spellings, list(_added(reader, manifest, wanted, least)))
    if not found.complete:  # for the refusal, or for loading code of the model's own
        budget.spend(found, reader, spellings, [each for each in tries if not each.votes])
    return found.done()


@dataclass(slots=True)
class _Budget:
    """Names that may still be looked at, so that all of it stays linear in the names."""

    left: int
    least: int
    """Tensors without which a reading cannot be complete."""
    path: str

    def spend(self, found: Readings, reader: Reader, spellings: list[ModelNames], tries: list[_Try]) -> None:
        """Look at the readings that may be complete, and at a few more, those with the most votes first."""
        file = reader.file
        for rank, each in enumerate(sorted(tries, key=lambda each: -each.votes)):
            needed = max(self.least, found.most) if reader.wishes.allow_missing else self.least
            few = len(file.parts) <= ENOUGH and each.removed in file.parts
            if found.more or (rank >= ENOUGH and each.shapely < needed and not few):
                continue
            self.left -= file.count(each.removed) + len(each.model.key)
            if self.left < 0:
                raise KeyMismatchError(Problem("nested", self.path, {"model": each.model.manifest.name}))
            found.add(_best(reader, each, spellings))


def _spellings(manifest: Manifest) -> list[ModelNames]:
    """The model's names: as they are, where that may make a difference, and without its wrappers' segments."""
    plain = ModelNames(manifest)
    if manifest.wrappers and (plain.has_namesakes or len(plain.key) < len(manifest.specs)):
        return [ModelNames(replace(manifest, wrappers=frozenset())), plain]
    return [plain]


def _best(reader: Reader, each: _Try, spellings: list[ModelNames]) -> Fit:
    if not each.model.added:
        for raw in spellings[:-1]:
            fit = reader.fit(raw, each.removed)
            if fit.complete:
                return fit
    return reader.fit(each.model, each.removed)


def _removed(reader: Reader, model: ModelNames) -> list[_Try]:
    """Paths in the file below which names of the model are found."""
    votes: Counter[str] = Counter()
    shapely: Counter[str] = Counter()
    for name, spec in reader.file.spec.items():
        for prefix, there in _prefixes(name, reader, model) if len(name) < LONGEST_NAME else ():
            votes[prefix] += 1
            shapely[prefix] += _fits(spec, there)
    paths = dict.fromkeys([*votes, *reader.file.containers[:ENOUGH]])
    return [_Try(votes[path], shapely[path], model, path) for path in paths]


def _prefixes(name: str, reader: Reader, model: ModelNames) -> Iterator[tuple[str, list[TensorSpec | None]]]:
    """The prefixes without which `name` is a name of the model, and what the model has there."""
    wanted, renames = model.blind, reader.renames
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
        if suffix and segment in WRAPPER_SEGMENTS:
            wrappers += 1
        else:
            suffix = f"{segment}.{suffix}" if suffix else segment
            length += 1
        if length > reach or wrappers > MOST_LEVELS:
            return
        there = wanted.get(suffix)
        if there is None and renames:
            there = wanted.get(blind(renames.prefix(suffix)[0]))
        if there is not None:
            yield name[: max(start - 1, 0)], there


def _fits(spec: TensorSpec | None, there: list[TensorSpec | None]) -> bool:
    return same_shape(spec, there[0]) or any(same_shape(spec, each) for each in there[1:])


def _added(reader: Reader, manifest: Manifest, wanted: list[str], least: int) -> Iterator[_Try]:
    """Dicts of the file in which names of the model are found once a prefix that all of them have is left out."""
    file = reader.file
    paths = [path for path in ancestors(common_path(wanted)) if path]
    big = [part for part in file.containers if file.count(part) >= least] if paths else []
    names = {part: list(_blind_tails(file, part, reader)) for part in big}
    for added in paths:
        model = ModelNames(manifest, added)
        for part in big:
            votes = [(spec, there) for tail, spec in names[part] if (there := model.blind.get(tail)) is not None]
            if votes:
                shapely = sum(_fits(spec, there) for spec, there in votes)
                yield _Try(len(votes), shapely, model, part)


def _blind_tails(file: FileNames, part: str, reader: Reader) -> Iterator[tuple[str, TensorSpec | None]]:
    for name in file.under(part):
        tail = blind(name[len(part) + 1 :] if part else name)
        yield (blind(reader.renames.prefix(tail)[0]) if reader.renames else tail), file.spec[name]
