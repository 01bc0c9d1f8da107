"""Pair names and shapes of a file with those of a model: a KeyPlan, or a reasoned refusal. Pure: it sees no tensor.

A file is read as one tree of dotted names: dicts inside dicts and prefixes of keys are the same thing. A candidate is a
path in that tree that is removed from the names below it, and a prefix that is added to them; a fit is what comes of
trying it, wrappers' segments seen through. A complete fit pairs the names one to one with the model's, in equal shapes.
One complete fit is the plan; two that load different values are an error that names both; with none, the closest
incomplete fit is the error. There is no second best: nothing is matched by order, similarity or shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import NoReturn

from smartload.errors import AmbiguousKeysError, KeyMismatchError, ShapeMismatchError
from smartload.match import hints
from smartload.match.candidates import MOST_LISTED, closeness, select, try_candidates
from smartload.match.choose import (
    DataChecks,
    accepted_by_model,
    check_buffers,
    distinct,
    drop_allowed,
    drop_pieces,
)
from smartload.match.fit import Fit, Fitter, is_batch_counter, matches
from smartload.match.names import FileNames, ModelNames, Parts, within
from smartload.match.plan import describe_rule, make_plan, part_and_prefix
from smartload.records.keys import Renames, join
from smartload.records.problems import Ambiguity, Mismatch, Problem
from smartload.records.report import KeyPlan
from smartload.records.requests import ModelKeys, Options


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of one call of `match`; a proposal is tried by replacing the options or the model."""

    model: ModelKeys
    parts: Parts
    path: str
    options: Options
    checks: DataChecks


@dataclass(frozen=True, slots=True)
class _Result:
    """What a search ends with: the complete fits that load different values, and the closest of the incomplete ones."""

    fitter: Fitter
    complete: list[Fit]
    near: list[Fit]


def match(model: ModelKeys, parts: Parts, path: str, options: Options, checks: DataChecks) -> KeyPlan:
    """Find the one way in which the file's names become the model's.

    Args:
        model: the names, shapes and dtypes of the model's keys.
        parts: the names, shapes and dtypes of every state dict in the file.
        path: the file, for messages.
        options: `select`, `rename`, `allow_missing` and `allow_unexpected`.
        checks: answers about data.

    Returns:
        The pairs of keys, the rule in words, and every name without a partner with its reason.

    Raises:
        AmbiguousKeysError: two parts fit, two names would fill one key, or tied names have different values.
        ShapeMismatchError: the names pair off, shapes do not.
        KeyMismatchError: names have no partner; or an argument matched nothing.
    """
    call = _Call(model, parts, path, options, checks)
    result = _search(call)
    if not result.complete:
        _refuse(result, call)  # always raises
    if len(result.complete) > 1:
        raise _several_fit(result, call)
    fit = result.complete[0]
    if conflict := _conflict_of_tied(fit, result.fitter, call):
        raise AmbiguousKeysError(_several_names(*conflict, result.fitter, call))
    return make_plan(fit, result.fitter, model, path)


def _search(call: _Call) -> _Result:
    """Try the candidates, and choose among the complete fits.

    Raises KeyMismatchError where an argument matched nothing.
    """
    options, path, checks = call.options, call.path, call.checks
    renames = Renames(options.rename)
    file = FileNames(select(call.parts, options.select, path), renames)
    fitter = Fitter(file, renames, options)
    fits = try_candidates(fitter, call.model, path)
    near = fits.near
    complete: list[Fit] = []
    for fit in fits.complete:
        check_buffers(fit, file, checks)  # may find that a name is unexpected after all
        (complete if fit.complete else near).append(fit)
    near.sort(key=closeness, reverse=True)
    # The model's own code is asked last: a rehearsal of its load takes far longer than a comparison of names.
    complete = drop_allowed(drop_pieces(complete, fits), fitter) or accepted_by_model(near, file, checks)
    complete = complete[:MOST_LISTED] if fits.cut_off else distinct(complete, file, checks)
    if len(complete) == 1:
        fitter.account_for_others(complete[0])
        if complete[0].clashes:  # a name outside of it would fill one of its keys
            # Unless the model's own code takes both, as torch's load would have it.
            clashing, complete = complete[0], accepted_by_model(near, file, checks)
            near = near if complete else [clashing]
    _check_arguments(call, fitter, complete, near)
    return _Result(fitter, complete, near)


def _check_arguments(call: _Call, fitter: Fitter, complete: list[Fit], near: list[Fit]) -> None:
    """Refuse a rule of `rename` or a glob that matched nothing.

    It is misspelt, or meant for another file; a load that ignored it could leave out what it was written for.
    """
    path, options, keys = call.path, call.options, call.model.specs
    file_keys = fitter.file.keys.values()
    dotted = [key.dotted for key in file_keys]
    # Rules apply to adapted names as well, so what is used depends on the fits that were looked at.
    fits = complete or near
    used = fitter.file.used.union(*(fit.rules for fit in fits))
    for old in fitter.renames.unused(used):
        raise KeyMismatchError(Problem("rename", path, {"old": old, "examples": tuple(dotted[:3])}))
    unwrapped = ModelNames(call.model).unwrapped
    # A glob needs a match only, not an effect: the same call is then good for files with and without the keys.
    for pattern in options.allow_missing:
        if not any(matches(key, (pattern,)) or matches(unwrapped(key), (pattern,)) for key in keys):
            facts = {"argument": "allow_missing", "pattern": pattern, "whose": f"key of {call.model.name}"}
            raise KeyMismatchError(Problem("pattern", path, {**facts, "examples": tuple(islice(keys, 3))}))
    for pattern in options.allow_unexpected:
        adapted = (name for fit in fits for name in fit.adapted.values())
        if not any(
            matches(name, (pattern,)) for group in (dotted, (key.key for key in file_keys), adapted) for name in group
        ):
            facts = {"argument": "allow_unexpected", "pattern": pattern, "whose": "key of the file"}
            raise KeyMismatchError(Problem("pattern", path, {**facts, "examples": tuple(dotted[:3])}))


def _conflict_of_tied(fit: Fit, fitter: Fitter, call: _Call) -> tuple[str, list[str]] | None:
    """Find tied keys for which the file has two values: "embed.weight and fc.weight", and its names for them."""
    for group in call.model.tied:
        names = list(dict.fromkeys(fit.pairs[key] for key in group if key in fit.pairs))
        stored = [fitter.file.keys[name].dotted for name in names] if len(names) > 1 else []
        # A state dict in memory that was made of this model holds the model's own tensors, which load into themselves.
        first, *others = [name for name in stored if not call.checks.is_own(name)] or [""]
        if not all(call.checks.same(first, other) for other in others):
            return " and ".join(group), names
    return None


def _works(options: Options, call: _Call) -> bool:
    """Tell whether the call with these options would load."""
    # The whole search again: a proposal that clears one mismatch may make another, or a second fit.
    changed = replace(call, options=options)
    try:
        result = _search(changed)
    except KeyMismatchError:
        return False
    if len(result.complete) != 1 or _conflict_of_tied(result.complete[0], result.fitter, changed) is not None:
        return False
    file_keys = result.fitter.file.keys
    return call.checks.loadable({key: file_keys[name].dotted for key, name in result.complete[0].pairs.items()})


def _first_that_works(proposals: Iterator[tuple[str, Options]], call: _Call) -> str:
    """Give the first proposed argument that works, as it is to be written; "" where none does."""
    short = ((text, options) for text, options in proposals if len(text) < hints.LONGEST_ARGUMENT)
    return next((text for text, options in short if _works(options, call)), "")


def _refuse(result: _Result, call: _Call) -> NoReturn:
    """Raise the error for the fit that came closest, with the arguments that were tried and work."""
    # There is one: a few candidates are tried even where no name of the file is the model's.
    # Clashes come before a mismatch: with two tensors for one key, what is missing means nothing yet.
    nearest, file = result.near[0], result.fitter.file
    if nearest.clashes:
        key, names = next(iter(nearest.clashes.items()))
        raise AmbiguousKeysError(_several_names(key, names, result.fitter, call))
    if nearest.twice:
        name = nearest.twice[0]
        facts = {"first": file.keys[name].dotted, "second": file.twice[name].dotted}
        raise AmbiguousKeysError(Problem("twice", call.path, facts))
    problem = _mismatch(nearest, result.fitter, call)
    only_shapes = problem.shapes and not (problem.missing or problem.unexpected)
    raise (ShapeMismatchError if only_shapes else KeyMismatchError)(problem)


def _mismatch(nearest: Fit, fitter: Fitter, call: _Call) -> Mismatch:
    """Gather how the closest fit differs from the model, and the arguments that work."""
    file, specs = fitter.file, call.model.specs
    part, removed = part_and_prefix(nearest, fitter)
    missing, unexpected = nearest.missing, [*nearest.unexpected, *nearest.buffers]
    if not nearest.pairs:
        missing = list(specs)  # with nothing in common it does not matter which keys were allowed to be missing
    # Dicts beside those that were taken may hold what is missing, under other names.
    if missing and join(part, removed) == nearest.removed:
        unexpected += [
            item.key for item in nearest.ignored if file.keys[item.key].spec and file.keys[item.key].part != part
        ]
    paired = len(nearest.pairs) - len(nearest.shapes)
    if nearest.shapes and (missing or unexpected):
        pairs = nearest.pairs | {nearest.model.spell(nearest.adapted[name]): name for name in unexpected}
        # If the model's own code takes these keys in its own shapes, only the shapes are wrong: batch norm's counter,
        # say, is missing in every old file, and naming it would hide the cause.
        if call.checks.accepts({key: file.keys[name].dotted for key, name in pairs.items()}, own_shapes=True):
            paired += len(missing)
            missing, unexpected = [], []
    proposed = hints.proposals(nearest, file, missing, unexpected, call.options)
    working = [text for text, options in proposed if len(text) < hints.LONGEST_ARGUMENT and _works(options, call)]
    # Before the arguments: a call on the module itself leaves nothing out.
    for path in hints.modules_of_size(nearest, call.model) if not nearest.pairs else ():
        if _works(call.options, replace(call, model=within(call.model, path))):
            working.insert(0, hints.call_on(path))
    return Mismatch(
        model=call.model.name,
        path=call.path,
        part=join(call.options.select or "", part),
        rule=describe_rule(nearest, fitter, part, removed),
        paired=paired,
        wanted=len(specs),
        missing={key: specs[key] for key in sorted(missing, key=is_batch_counter)},  # what says most comes first
        unexpected={nearest.adapted[name]: file.keys[name].spec for name in unexpected},
        shapes={key: (file.keys[nearest.pairs[key]].spec, specs[key]) for key in nearest.shapes},
        kind=hints.cause(file, call.path),
        hints=tuple(working),
    )


def _several_names(key: str, names: list[str], fitter: Fitter, call: _Call) -> Ambiguity:
    """Gather the names of the file that would fill one key, each with the argument that takes it."""
    file = fitter.file
    answers = [
        (file.keys[name].dotted, _first_that_works(hints.choices(name, names, key, file, call.options), call))
        for name in sorted(set(names), key=list(file.keys).index)[:MOST_LISTED]  # in the file's order
    ]
    return Ambiguity(call.model.name, call.path, tuple(answers), key=key)


def _several_fit(result: _Result, call: _Call) -> AmbiguousKeysError:
    """Make the error for several complete fits, each with the `select` that takes it."""
    answers = []
    for fit in result.complete:
        part = join(call.options.select or "", *part_and_prefix(fit, result.fitter))
        chosen = iter([(f"select={part!r}", replace(call.options, select=part))])
        what = f"{len(fit.pairs)} keys of {part!r}" if part else f"{len(fit.pairs)} keys at the top"
        answers.append((what, _first_that_works(chosen, call)))
    return AmbiguousKeysError(Ambiguity(call.model.name, call.path, tuple(answers)))
