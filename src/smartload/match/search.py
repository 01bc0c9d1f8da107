"""Names and shapes -> KeyPlan, or a reasoned refusal. Pure: it never sees a tensor.

A file is read as one tree of dotted names: dicts inside dicts and prefixes of keys are the same thing. A
candidate is a path in that tree; it fits when the names below it, wrapper segments seen through, pair off one
to one with the model's, in equal shapes. One fit is the plan, two are an error that names both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import NoReturn

from smartload.errors import AmbiguousKeysError, KeyMismatchError, ShapeMismatchError
from smartload.match import hints
from smartload.match.candidates import ENOUGH, closeness, select, try_candidates
from smartload.match.choose import DataChecks, check_buffers, distinct, largest, rehearsed, unnamed
from smartload.match.fit import Fit, Fitter, is_counter, matches
from smartload.match.names import FileNames, ModelNames, Parts, within
from smartload.match.plan import describe_rule, make_plan, part_and_prefix
from smartload.records.keys import Renames, join
from smartload.records.problems import Ambiguity, Mismatch, Problem
from smartload.records.report import KeyPlan
from smartload.records.requests import ModelKeys, Options


@dataclass(frozen=True, slots=True)
class _Question:
    """One call of `match`; `wishes` may be replaced to try a hint."""

    model: ModelKeys
    parts: Parts
    path: str
    options: Options
    checks: DataChecks


@dataclass(frozen=True, slots=True)
class _Found:
    """The readings of a file: those that are answers, and the closest of the others."""

    fitter: Fitter
    answers: list[Fit]
    near: list[Fit]


def match(model: ModelKeys, parts: Parts, path: str, options: Options, checks: DataChecks) -> KeyPlan:
    """The one way in which the file's names become the model's.

    Args:
        model: the names, shapes and dtypes that the model wants.
        parts: the names, shapes and dtypes of every state dict in the file.
        path: the file, for messages.
        options: `select`, `rename`, `allow_missing` and `allow_unexpected`.
        checks: answers about data.

    Raises:
        AmbiguousKeysError: two parts fit, two names would fill one key, or tied names differ.
        ShapeMismatchError: the names pair off, shapes do not.
        KeyMismatchError: names have no partner; or a wish matched nothing.
    """
    question = _Question(model, parts, path, options, checks)
    found = _search(question)
    if not found.answers:
        _refuse(found, question)
    if len(found.answers) > 1:
        raise _ambiguous(found, question)
    best = found.answers[0]
    if conflict := _in_conflict(best, found.fitter, question):
        raise AmbiguousKeysError(_choice(*conflict, found.fitter, question))
    return make_plan(best, found.fitter, model, path)


def _search(question: _Question) -> _Found:
    options, path, checks = question.options, question.path, question.checks
    renames = Renames(options.rename)
    file = FileNames(select(question.parts, options.select, path), renames)
    fitter = Fitter(file, renames, options)
    found = try_candidates(fitter, question.model, path)
    near = found.near
    answers: list[Fit] = []
    for each in found.complete:
        check_buffers(each, file, checks)
        (answers if each.complete else near).append(each)
    near.sort(key=closeness, reverse=True)
    answers = unnamed(largest(answers, found), fitter) or rehearsed(near, file, checks)
    answers = answers[:ENOUGH] if found.more else distinct(answers, file, checks)
    if len(answers) == 1:
        fitter.look_outside(answers[0])
        if answers[0].clashes:
            near, answers = [answers[0]], []
    _check_wishes(question, fitter, answers, near)
    return _Found(fitter, answers, near)


def _check_wishes(question: _Question, fitter: Fitter, answers: list[Fit], near: list[Fit]) -> None:
    """A wish that matched nothing is a slip of the pen, and is said to be one."""
    path, options, keys = question.path, question.options, question.model.specs
    file_keys = fitter.file.keys.values()
    dotted = [key.dotted for key in file_keys]
    looked = answers or near
    used = fitter.file.used.union(*(each.rules for each in looked))
    for old in fitter.renames.unused(used):
        raise KeyMismatchError(Problem("rename", path, {"old": old, "examples": tuple(dotted[:3])}))
    unwrapped = ModelNames(question.model).unwrapped
    for pattern in options.allow_missing:
        if not any(matches(key, (pattern,)) or matches(unwrapped(key), (pattern,)) for key in keys):
            facts = {"argument": "allow_missing", "pattern": pattern, "whose": f"key of {question.model.name}"}
            raise KeyMismatchError(Problem("pattern", path, {**facts, "examples": tuple(islice(keys, 3))}))
    for pattern in options.allow_unexpected:
        adapted = (name for each in looked for name in each.names.values())
        if not any(
            matches(name, (pattern,)) for group in (dotted, (key.key for key in file_keys), adapted) for name in group
        ):
            facts = {"argument": "allow_unexpected", "pattern": pattern, "whose": "key of the file"}
            raise KeyMismatchError(Problem("pattern", path, {**facts, "examples": tuple(dotted[:3])}))


def _in_conflict(best: Fit, fitter: Fitter, question: _Question) -> tuple[str, list[str]] | None:
    """Tied keys that the file would fill with two values, and its names for them; one tensor has one value."""
    for group in question.model.tied:
        names = list(dict.fromkeys(best.pairs[key] for key in group if key in best.pairs))
        stored = [fitter.file.keys[name].dotted for name in names] if len(names) > 1 else []
        first, *others = [name for name in stored if not question.checks.is_own(name)] or [""]
        if not all(question.checks.same(first, other) for other in others):
            return " and ".join(group), names
    return None


def _works(options: Options, question: _Question) -> bool:
    """Whether the call with these arguments would be served."""
    changed = replace(question, options=options)
    try:
        found = _search(changed)
    except KeyMismatchError:
        return False
    if len(found.answers) != 1 or _in_conflict(found.answers[0], found.fitter, changed) is not None:
        return False
    file_keys = found.fitter.file.keys
    return question.checks.loadable({key: file_keys[name].dotted for key, name in found.answers[0].pairs.items()})


def _first(proposals: Iterator[tuple[str, Options]], question: _Question) -> str:
    """The first of the arguments that works, as it is to be written; empty where none does."""
    return next((text for text, options in proposals if len(text) < hints.LONGEST and _works(options, question)), "")


def _refuse(found: _Found, question: _Question) -> NoReturn:
    """The refusal for the reading that came closest, with the arguments that were tried and work."""
    nearest, file = found.near[0], found.fitter.file
    if nearest.clashes:
        key, names = next(iter(nearest.clashes.items()))
        raise AmbiguousKeysError(_choice(key, names, found.fitter, question))
    if nearest.twice:
        name = nearest.twice[0]
        facts = {"first": file.keys[name].dotted, "second": file.twice[name].dotted}
        raise AmbiguousKeysError(Problem("twice", question.path, facts))
    paper = _mismatch(nearest, found.fitter, question)
    raise (ShapeMismatchError if paper.shapes and not (paper.missing or paper.unexpected) else KeyMismatchError)(paper)


def _mismatch(nearest: Fit, fitter: Fitter, question: _Question) -> Mismatch:
    file, specs = fitter.file, question.model.specs
    part, removed = part_and_prefix(nearest, fitter)
    missing, unexpected = nearest.missing, [*nearest.unexpected, *nearest.buffers]
    if not nearest.pairs:
        missing = list(specs)
    if (
        missing and join(part, removed) == nearest.removed
    ):  # dicts beside those that were taken may hold what is missing
        unexpected += [
            item.key for item in nearest.ignored if file.keys[item.key].spec and file.keys[item.key].part != part
        ]
    paired = len(nearest.pairs) - len(nearest.shapes)
    if nearest.shapes and (missing or unexpected):
        pairs = nearest.pairs | {nearest.model.spell(nearest.names[name]): name for name in unexpected}
        if question.checks.accepts({key: file.keys[name].dotted for key, name in pairs.items()}, own_shapes=True):
            paired += len(missing)  # nothing is wrong but the shapes: the model sees to these names itself
            missing, unexpected = [], []
    tried = hints.proposals(nearest, file, missing, unexpected, question.options)
    works = [text for text, options in tried if len(text) < hints.LONGEST and _works(options, question)]
    for path in hints.bodies(nearest, question.model) if not nearest.pairs else ():
        if _works(question.options, replace(question, model=within(question.model, path))):
            works.insert(0, hints.call_on(path))
    return Mismatch(
        model=question.model.name,
        path=question.path,
        part=join(question.options.select or "", part),
        rule=describe_rule(nearest, fitter, part, removed),
        paired=paired,
        wanted=len(specs),
        missing={key: specs[key] for key in sorted(missing, key=is_counter)},
        unexpected={nearest.names[name]: file.keys[name].spec for name in unexpected},
        shapes={key: (file.keys[nearest.pairs[key]].spec, specs[key]) for key in nearest.shapes},
        kind=hints.cause(file, question.path),
        hints=tuple(works),
    )


def _choice(key: str, names: list[str], fitter: Fitter, question: _Question) -> Ambiguity:
    """Several names of the file for one key: each with the argument that takes it."""
    file = fitter.file
    answers = [
        (file.keys[name].dotted, _first(hints.choices(name, names, key, file, question.options), question))
        for name in sorted(set(names), key=list(file.keys).index)[:ENOUGH]
    ]
    return Ambiguity(question.model.name, question.path, tuple(answers), key=key)


def _ambiguous(found: _Found, question: _Question) -> AmbiguousKeysError:
    answers = []
    for each in found.answers:
        part = join(question.options.select or "", *part_and_prefix(each, found.fitter))
        chosen = iter([(f"select={part!r}", replace(question.options, select=part))])
        what = f"{len(each.pairs)} keys of {part!r}" if part else f"{len(each.pairs)} keys at the top"
        answers.append((what, _first(chosen, question)))
    return AmbiguousKeysError(Ambiguity(question.model.name, question.path, tuple(answers)))
