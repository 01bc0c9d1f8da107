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
from smartload.match.candidates import ENOUGH, Parts, closeness, readings, select
from smartload.match.choose import Ask, check_buffers, distinct, largest, rehearsed, unnamed
from smartload.match.fit import Fit, Reader, is_counter, matches
from smartload.match.names import FileNames, ModelNames, within
from smartload.match.plan import place, plan, rule
from smartload.records.data import Ambiguity, Manifest, Mismatch, Problem, Wishes
from smartload.records.keys import Renames, join
from smartload.records.report import KeyPlan


@dataclass(frozen=True, slots=True)
class _Question:
    """One call of `match`; `wishes` may be replaced to try a hint."""

    model: Manifest
    parts: Parts
    path: str
    wishes: Wishes
    ask: Ask


@dataclass(frozen=True, slots=True)
class _Found:
    """The readings of a file: those that are answers, and the closest of the others."""

    reader: Reader
    answers: list[Fit]
    near: list[Fit]


def match(model: Manifest, parts: Parts, path: str, wishes: Wishes, ask: Ask) -> KeyPlan:
    """The one way in which the file's names become the model's.

    Args:
        model: the names, shapes and dtypes that the model wants.
        parts: the names, shapes and dtypes of every state dict in the file.
        path: the file, for messages.
        wishes: `select`, `rename`, `allow_missing` and `allow_unexpected`.
        ask: answers about data.

    Raises:
        AmbiguousKeysError: two parts fit, two names would fill one key, or tied names differ.
        ShapeMismatchError: the names pair off, shapes do not.
        KeyMismatchError: names have no partner; or a wish matched nothing.
    """
    question = _Question(model, parts, path, wishes, ask)
    found = _search(question)
    if not found.answers:
        _refuse(found, question)
    if len(found.answers) > 1:
        raise _ambiguous(found, question)
    best = found.answers[0]
    if conflict := _in_conflict(best, found.reader, question):
        raise AmbiguousKeysError(_choice(*conflict, found.reader, question))
    return plan(best, found.reader, model, path)


def _search(question: _Question) -> _Found:
    wishes, path, ask = question.wishes, question.path, question.ask
    renames = Renames(wishes.rename)
    file = FileNames(select(question.parts, wishes.select, path), renames, wishes.select or "")
    reader = Reader(file, renames, wishes)
    found = readings(reader, question.model, path)
    near = found.near
    answers: list[Fit] = []
    for each in found.complete:
        check_buffers(each, file, ask)
        (answers if each.complete else near).append(each)
    near.sort(key=closeness, reverse=True)
    answers = unnamed(largest(answers, found), reader) or rehearsed(near, file, ask)
    answers = answers[:ENOUGH] if found.more else distinct(answers, file, ask)
    if len(answers) == 1:
        reader.look_outside(answers[0])
        if answers[0].clashes:
            near, answers = [answers[0]], []
    _check_wishes(question, reader, answers, near)
    return _Found(reader, answers, near)


def _check_wishes(question: _Question, reader: Reader, answers: list[Fit], near: list[Fit]) -> None:
    """A wish that matched nothing is a slip of the pen, and is said to be one."""
    path, wishes, keys = question.path, question.wishes, question.model.specs
    stored, own = reader.file.stored.values(), reader.file.own.values()
    looked = answers or near
    used = reader.file.used.union(*(each.rules for each in looked))
    for old in reader.renames.unused(used):
        raise KeyMismatchError(Problem("rename", path, {"old": old, "examples": tuple(islice(stored, 3))}))
    plain = ModelNames(question.model).plain
    for pattern in wishes.allow_missing:
        if not any(matches(key, (pattern,)) or matches(plain(key), (pattern,)) for key in keys):
            facts = {"argument": "allow_missing", "pattern": pattern, "whose": f"key of {question.model.name}"}
            raise KeyMismatchError(Problem("pattern", path, {**facts, "examples": tuple(islice(keys, 3))}))
    for pattern in wishes.allow_unexpected:
        adapted = (name for each in looked for name in each.names.values())
        if not any(matches(name, (pattern,)) for group in (stored, own, adapted) for name in group):
            facts = {"argument": "allow_unexpected", "pattern": pattern, "whose": "key of the file"}
            raise KeyMismatchError(Problem("pattern", path, {**facts, "examples": tuple(islice(stored, 3))}))


def _in_conflict(best: Fit, reader: Reader, question: _Question) -> tuple[str, list[str]] | None:
    """Tied keys that the file would fill with two values, and its names for them; one tensor has one value."""
    for group in question.model.aliases:
        names = list(dict.fromkeys(best.pairs[key] for key in group if key in best.pairs))
        stored = [reader.file.stored[name] for name in names] if len(names) > 1 else []
        first, *others = [name for name in stored if not question.ask.is_own(name)] or [""]
        if not all(question.ask.same(first, other) for other in others):
            return " and ".join(group), names
    return None


def _works(wishes: Wishes, question: _Question) -> bool:
    """Whether the call with these arguments would be served."""
    changed = replace(question, wishes=wishes)
    try:
        found = _search(changed)
    except KeyMismatchError:
        return False
    if len(found.answers) != 1 or _in_conflict(found.answers[0], found.reader, changed) is not None:
        return False
    stored = found.reader.file.stored
    return question.ask.loadable({key: stored[name] for key, name in found.answers[0].pairs.items()})


def _first(proposals: Iterator[tuple[str, Wishes]], question: _Question) -> str:
    """The first of the arguments that works, as it is to be written; empty where none does."""
    return next((text for text, wishes in proposals if len(text) < hints.LONGEST and _works(wishes, question)), "")


def _refuse(found: _Found, question: _Question) -> NoReturn:
    """The refusal for the reading that came closest, with the arguments that were tried and work."""
    nearest, file = found.near[0], found.reader.file
    if nearest.clashes:
        key, names = next(iter(nearest.clashes.items()))
        raise AmbiguousKeysError(_choice(key, names, found.reader, question))
    if nearest.twice:
        name = nearest.twice[0]
        facts = {"first": file.stored[name], "second": file.twice[name]}
        raise AmbiguousKeysError(Problem("twice", question.path, facts))
    paper = _mismatch(nearest, found.reader, question)
    raise (ShapeMismatchError if paper.shapes and not (paper.missing or paper.left_over) else KeyMismatchError)(paper)


def _mismatch(nearest: Fit, reader: Reader, question: _Question) -> Mismatch:
    file, specs = reader.file, question.model.specs
    part, removed = place(nearest, reader)
    missing, left_over = nearest.missing, [*nearest.left_over, *nearest.buffers]
    if not nearest.pairs:
        missing = list(specs)
    if (
        missing and join(part, removed) == nearest.removed
    ):  # dicts beside those that were taken may hold what is missing
        left_over += [item.key for item in nearest.ignored if file.spec[item.key] and file.part[item.key] != part]
    paired = len(nearest.pairs) - len(nearest.shapes)
    if nearest.shapes and (missing or left_over):
        pairs = nearest.pairs | {nearest.model.spell(nearest.names[name]): name for name in left_over}
        if question.ask.accepts({key: file.stored[name] for key, name in pairs.items()}, own_shapes=True):
            paired += len(missing)  # nothing is wrong but the shapes: the model sees to these names itself
            missing, left_over = [], []
    tried = hints.proposals(nearest, file, missing, left_over, question.wishes)
    works = [text for text, wishes in tried if len(text) < hints.LONGEST and _works(wishes, question)]
    for path in hints.bodies(nearest, question.model) if not nearest.pairs else ():
        if _works(question.wishes, replace(question, model=within(question.model, path))):
            works.insert(0, hints.call_on(path))
    return Mismatch(
        model=question.model.name,
        path=question.path,
        part=join(question.wishes.select or "", part),
        rule=rule(nearest, reader, part, removed),
        paired=paired,
        wanted=len(specs),
        missing={key: specs[key] for key in sorted(missing, key=is_counter)},
        left_over={nearest.names[name]: file.spec[name] for name in left_over},
        shapes={key: (file.spec[nearest.pairs[key]], specs[key]) for key in nearest.shapes},
        kind=hints.cause(file, question.path),
        hints=tuple(works),
    )


def _choice(key: str, names: list[str], reader: Reader, question: _Question) -> Ambiguity:
    """Several names of the file for one key: each with the argument that takes it."""
    file = reader.file
    answers = [
        (file.stored[name], _first(hints.choices(name, names, key, file, question.wishes), question))
        for name in sorted(set(names), key=list(file.spec).index)[:ENOUGH]
    ]
    return Ambiguity(question.model.name, question.path, tuple(answers), key=key)


def _ambiguous(found: _Found, question: _Question) -> AmbiguousKeysError:
    answers = []
    for each in found.answers:
        part = join(question.wishes.select or "", *place(each, found.reader))
        chosen = iter([(f"select={part!r}", replace(question.wishes, select=part))])
        what = f"{len(each.pairs)} keys of {part!r}" if part else f"{len(each.pairs)} keys at the top"
        answers.append((what, _first(chosen, question)))
    return AmbiguousKeysError(Ambiguity(question.model.name, question.path, tuple(answers)))
