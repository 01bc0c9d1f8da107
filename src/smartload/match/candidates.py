"""Find the candidates worth a trial, and try them: a prefix removed from the file's keys, a prefix added to them. Pure.

Dicts inside dicts and prefixes of keys are one thing here: 'state_dict.net.' is a prefix of the dotted names. Trying
every prefix of every name would take time quadratic in the names, and a file may be made for that. So each name of the
file first votes for the prefixes without which it is a name of the model, and candidates with enough votes are tried.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

from smartload.errors import KeyMismatchError
from smartload.match.fit import Fit, Fitter, reason_to_keep, same_shape
from smartload.match.names import MOST_LEVELS, FileNames, ModelNames, Parts
from smartload.records.entries import FileKey, TensorSpec
from smartload.records.keys import ancestors, common_path, join, without_prefix, without_wrappers
from smartload.records.problems import Kind, Problem
from smartload.records.requests import ModelKeys
from smartload.records.wrappers import SEGMENTS, has_no_wrapper

MOST_LISTED = 8
"""Choices that one error lists: paths for `select`, complete fits, keys of the file for one key of the model."""
MOST_NEAR = 8
"""Incomplete fits that are kept. A refusal is about the closest one; the model's own loading code is asked about all of
them, which takes a rehearsal each."""
MOST_COMPLETE = 64
"""Complete fits after which the search ends and the file is called ambiguous. A real file has a handful; comparing the
tensors of thousands of parts would take very long."""
LONGEST_NAME = 10_000
"""Characters of a name from which on no prefix of it is looked for: each would be a copy of nearly all of it. Names of
real models have a hundredth of that."""


def select(parts: Parts, path: str | None, name: str) -> Parts:
    """Take the parts of a file at or below the dotted path, which may end in a dict or in a prefix of keys.

    Args:
        parts: the keys of the file.
        path: what the caller gave for `select`: None for everything, "" for the top only.
        name: the file, for the message.

    Raises:
        KeyMismatchError: nothing lies at that path; the message lists the paths that can be selected.
    """
    if path is None:
        return parts
    # The top has the path "": its tensors alone where it has some, else everything, as there is nothing else to mean.
    if path == "":
        return {"": parts[""]} if "" in parts else parts
    chosen: dict[str, list[FileKey]] = {}
    for part, keys in parts.items():
        if part == path or without_prefix(part, path) is not None:  # the path is a dict, or a dict above this one
            below = part[len(path) + 1 :]
            chosen.setdefault(below, []).extend(key._replace(part=below) for key in keys)
        elif prefix := without_prefix(path, part):  # the path goes on in the keys of this dict
            tails = ((key, without_prefix(key.key, prefix)) for key in keys)
            if taken := [key._replace(part="", key=tail) for key, tail in tails if tail is not None]:
                chosen.setdefault("", []).extend(taken)
    if not chosen:
        selectable = tuple(dict.fromkeys(_selectable(parts)))
        kind: Kind = "select" if selectable else "select-flat"
        raise KeyMismatchError(Problem(kind, name, {"select": path, "parts": selectable}))
    return chosen


def _selectable(parts: Parts) -> Iterator[str]:
    """Give the paths of the dicts of a file, and the first segments of the keys in each."""
    for part, keys in parts.items():
        # A dict for its order: the file's own.
        heads = dict.fromkeys(key.key.partition(".")[0] for key in keys if "." in key.key)
        if part:
            yield part
        if len(heads) > 1 or not part:  # a single head of a dict selects what the dict itself does
            yield from (join(part, head) for head in islice(heads, MOST_LISTED))


class Candidate(NamedTuple):
    """A pair that may be tried: the prefix that is removed from the file's names, and the one that is added to them."""

    votes: int
    """Names of the file that are names of the model under this pair."""
    right_shapes: int
    """Those of them whose tensors have the model's shape."""
    model: ModelNames
    """The model's names, without the added prefix."""
    removed: str


@dataclass(slots=True)
class Fits:
    """What came of all the candidates that were tried."""

    complete: list[Fit] = field(default_factory=list)
    near: list[Fit] = field(default_factory=list)
    """Incomplete fits, the closest first."""
    most_loaded: int = 0
    """Tensors that the best of all fits would load."""
    cut_off: bool = False
    """Whether the search ended early, so that there may be more complete fits than are listed."""

    def add(self, fit: Fit) -> None:
        """Sort a fit in; two complete fits with the same pairs are one, reached by two candidates."""
        self.most_loaded = max(self.most_loaded, len(fit.taken) - len(fit.shapes))
        if not fit.complete:
            self.near.append(fit)
            if len(self.near) > 4 * MOST_NEAR:  # not at every fit: a file may have as many candidates as keys
                self.keep_closest()
            return
        for at, other in enumerate(self.complete):
            if fit.pairs == other.pairs:
                # With less removed more names are accounted for by the candidate itself.
                self.complete[at] = min(fit, other, key=lambda each: len(each.removed))
                return
        self.complete.append(fit)
        self.cut_off = len(self.complete) >= MOST_COMPLETE

    def keep_closest(self) -> None:
        """Sort the incomplete fits, and drop all but the closest."""
        self.near = sorted(self.near, key=closeness, reverse=True)[:MOST_NEAR]


def closeness(fit: Fit) -> tuple[int, int, int]:
    """Rank an incomplete fit: most pairs in the right shape, then fewest unexpected names, then the shortest prefix."""
    return len(fit.pairs) - len(fit.shapes), -len(fit.unexpected), -len(fit.removed)


def try_candidates(fitter: Fitter, model_keys: ModelKeys, path: str) -> Fits:
    """Try every candidate worth it: nothing removed or added, then prefixes removed, then prefixes added.

    Args:
        fitter: the file and the call.
        model_keys: the keys of the model.
        path: the file, for the message.

    Raises:
        KeyMismatchError: names nest so deeply that the trials would take more than time linear in the names.
    """
    file, fits = fitter.file, Fits()
    spellings = _spellings(model_keys)
    # Nearly every file: the keys of one dict, as they are or with wrappers. Nothing else is looked for then: names that
    # are right as they are come before any that are right after a change.
    if len(file.parts) == 1:
        for model in spellings if fitter.renames or fitter.begins_as(spellings[-1], file.parts[0]) else ():
            direct = fitter.fit(model, file.parts[0])
            # With names set aside it is not the whole file: they may be a second network, which must be noticed.
            if direct.complete and not (direct.ignored or direct.buffers or direct.allowed_unexpected):
                return Fits([direct], [], len(direct.pairs))
    unwrapped = spellings[-1]
    required = [
        unwrapped.unwrapped(key)
        for key in model_keys.specs
        if not (fitter.may_be_missing(unwrapped, key) or reason_to_keep(key, model_keys))
    ]
    # One tensor is enough for all the keys that are tied to it.
    least = max(1, len(required) - sum(len(group) - 1 for group in model_keys.tied))
    budget = _Budget(64 * (len(file.keys) + len(model_keys.specs)) + 100_000, least, path)
    removing = list(_removing(fitter, unwrapped))
    budget.spend(fits, fitter, spellings, [each for each in removing if each.votes])
    # Where one dict fits as it is, adding a prefix would take a piece of that dict and leave the rest unexpected. It is
    # tried only where that rest may be unexpected, or where there are other dicts.
    if not fits.complete or len(file.parts) > 1 or fitter.options.allow_unexpected:
        budget.spend(fits, fitter, spellings, list(_adding(fitter, model_keys, required, least)))
    # Where no name is the model's: for the counts of the refusal, and for the model's own loading code to be asked.
    if not fits.complete:
        budget.spend(fits, fitter, spellings, [each for each in removing if not each.votes])
    fits.keep_closest()
    return fits


@dataclass(slots=True)
class _Budget:
    """The names that trials may still look at, so that all of them together stay linear in the number of names.

    64 looks at each name are far more than real files need: a name is looked at once for each prefix of it that is
    tried. A file with the names 'a.w', 'a.a.w', 'a.a.a.w' and so on would ask for as many looks as names squared.
    """

    left: int
    least: int
    """Tensors without which a fit cannot be complete."""
    path: str

    def spend(self, fits: Fits, fitter: Fitter, spellings: list[ModelNames], candidates: list[Candidate]) -> None:
        """Try the candidates that may be complete, and a few more for the refusal, those with the most votes first."""
        file = fitter.file
        for rank, each in enumerate(sorted(candidates, key=lambda each: -each.votes)):
            # Where keys may be missing nearly everything is complete; only what loads more than the best so far counts.
            needed = max(self.least, fits.most_loaded) if fitter.options.allow_missing else self.least
            is_one_of_few_dicts = len(file.parts) <= MOST_LISTED and each.removed in file.parts
            may_be_complete = each.right_shapes >= needed or is_one_of_few_dicts
            if fits.cut_off or (rank >= MOST_NEAR and not may_be_complete):
                continue
            self.left -= file.count(each.removed) + len(each.model.key)
            if self.left < 0:
                raise KeyMismatchError(Problem("nested", self.path, {"model": each.model.model_keys.name}))
            fits.add(_try(fitter, each, spellings))


def _try(fitter: Fitter, candidate: Candidate, spellings: list[ModelNames]) -> Fit:
    """Fit a candidate, first with the model's names as they are where that may differ."""
    if not candidate.model.added:
        for raw in spellings[:-1]:
            fit = fitter.fit(raw, candidate.removed)
            if fit.complete:
                return fit
    return fitter.fit(candidate.model, candidate.removed)


def _spellings(model_keys: ModelKeys) -> list[ModelNames]:
    """Give the model's names without the segments of its wrappers, and before them, where it may matter, as they are.

    It matters where the network has a child of a wrapper's name, or where two keys are one without the segments.
    """
    unwrapped = ModelNames(model_keys)
    if model_keys.wrappers and (unwrapped.has_namesakes or len(unwrapped.key) < len(model_keys.specs)):
        return [ModelNames(replace(model_keys, wrappers=frozenset())), unwrapped]
    return [unwrapped]


def _removing(fitter: Fitter, model: ModelNames) -> list[Candidate]:
    """Give a candidate for every path in the file below which names of the model are, and for the file's dicts."""
    votes: Counter[str] = Counter()
    right_shapes: Counter[str] = Counter()
    for name, file_key in fitter.file.keys.items():
        for prefix, specs in _prefixes(name, fitter, model) if len(name) < LONGEST_NAME else ():
            votes[prefix] += 1
            right_shapes[prefix] += _fits_one(file_key.spec, specs)
    # The dicts without votes, too: the refusal counts at one of them where no name is the model's.
    paths = dict.fromkeys([*votes, *fitter.file.containers[:MOST_NEAR]])
    return [Candidate(votes[path], right_shapes[path], model, path) for path in paths]


def _prefixes(name: str, fitter: Fitter, model: ModelNames) -> Iterator[tuple[str, list[TensorSpec | None]]]:
    """Give each prefix without which `name` is a name of the model, with the specs that the model has under that name.

    For 'net.fc.weight' and a model with the key 'fc.weight' that is 'net'.
    """
    bare, renames = model.bare, fitter.renames
    most_segments = model.depth + renames.depth
    # The usual name, by slices of it alone: this runs for every key of every file.
    if not renames and has_no_wrapper(name):
        start = len(name)
        for _ in range(most_segments):
            start = name.rfind(".", 0, start)
            if (specs := bare.get(name[start + 1 :])) is not None:
                yield name[: max(start, 0)], specs
            if start < 0:
                return
        return
    suffix, length, wrappers, start = "", 0, 0, len(name) + 1
    for segment in reversed(name.split(".")):
        start -= len(segment) + 1
        # `bare` has no wrapper's segments, so the suffix that is looked up gets none; the last segment is no module.
        if suffix and segment in SEGMENTS:
            wrappers += 1
        else:
            suffix = f"{segment}.{suffix}" if suffix else segment
            length += 1
        if length > most_segments or wrappers > MOST_LEVELS:  # no name of the model is that long
            return
        specs = bare.get(suffix)
        if specs is None and renames:
            specs = bare.get(without_wrappers(renames.prefix(suffix)[0]))
        if specs is not None:
            yield name[: max(start - 1, 0)], specs


def _fits_one(spec: TensorSpec | None, model_specs: list[TensorSpec | None]) -> bool:
    """Tell whether the file's tensor has the shape of one of the model's."""
    # Nearly always there is one, and a generator would take longer than the comparison.
    return same_shape(spec, model_specs[0]) or any(same_shape(spec, each) for each in model_specs[1:])


def _adding(fitter: Fitter, model_keys: ModelKeys, required: list[str], least: int) -> Iterator[Candidate]:
    """Give a candidate for each dict of the file whose names are the model's once a prefix is added to them.

    Args:
        fitter: the file and the call.
        model_keys: the keys of the model.
        required: names that the file must have; a prefix can be added only where all of them have it.
        least: tensors without which a fit cannot be complete.
    """
    file = fitter.file
    # A prefix can be added only if it is one of all names that must be found.
    added_paths = [path for path in ancestors(common_path(required)) if path]
    large = [part for part in file.containers if file.count(part) >= least] if added_paths else []
    tails = {part: list(_bare_tails(file, part, fitter)) for part in large}
    for added in added_paths:
        model = ModelNames(model_keys, added)
        for part in large:
            votes = [(spec, specs) for tail, spec in tails[part] if (specs := model.bare.get(tail)) is not None]
            if votes:
                right_shapes = sum(_fits_one(spec, specs) for spec, specs in votes)
                yield Candidate(len(votes), right_shapes, model, part)


def _bare_tails(file: FileNames, part: str, fitter: Fitter) -> Iterator[tuple[str, TensorSpec | None]]:
    """Give the names below a path without that path and without wrappers' segments, renamed, with their specs."""
    for name in file.under(part):
        tail = without_wrappers(name[len(part) + 1 :] if part else name)
        yield (without_wrappers(fitter.renames.prefix(tail)[0]) if fitter.renames else tail), file.keys[name].spec
