"""Names and shapes -> KeyPlan, or a reasoned refusal. Pure: it never sees a tensor.

A file is read as one tree of dotted names: dicts inside dicts and prefixes of keys are the same thing. A
candidate is a path in that tree; it fits when the names below it, wrapper segments seen through, pair off one
to one with the model's, in equal shapes. One fit is the plan, two are an error that names both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from smartload import hints
from smartload.errors import AmbiguousKeysError, KeyMismatchError, ShapeMismatchError
from smartload.fit import FileNames, Fit, matches
from smartload.readings import ENOUGH, Parts, readings, select
from smartload.records import Ambiguity, Ignored, Manifest, Mismatch, Problem, TensorSpec, Wishes
from smartload.report import KeyPlan
from smartload.spelling import WRAPPER_SEGMENTS, Renames, below, join, parent


class Ask(Protocol):
    """Questions that names cannot answer. The caller has the data and the model; `match` does not."""

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors of the file are bit for bit equal."""

    def equals_buffer(self, name: str, buffer: str) -> bool:
        """Whether a tensor of the file equals the model's own non-persistent buffer."""

    def accepts(self, names: Mapping[str, str]) -> bool:
        """Whether the model's own strict load takes these keys (model's spelling -> name in the file)."""


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
    """The readings of a file, and those among them that are answers."""

    file: FileNames
    fits: list[Fit]
    answers: list[Fit]
    rehearsed: bool


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
        raise _mismatch(found, question)
    if len(found.answers) > 1:
        raise _ambiguous(found, question)
    best = found.answers[0]
    _check_tied(best, found.file, question)
    return _plan(best, found, question)


def _search(question: _Question) -> _Found:
    renames = Renames(question.wishes.rename)
    base = question.wishes.select or ""
    file = FileNames(select(question.parts, question.wishes.select, question.path), renames, base)
    if file.twice:
        facts = {"first": file.twice[0][0], "second": file.twice[0][1]}
        raise AmbiguousKeysError(Problem("twice", question.path, facts))
    fits = readings(file, question.model, renames, question.wishes)
    _check_wishes(question, file, fits, renames)
    answers = _verified(fits, file, question.ask)
    rehearsed = [] if answers else _rehearsed(fits, file, question.ask)
    return _Found(file, fits, _distinct(answers or rehearsed, file, question.ask), bool(rehearsed))


def _check_wishes(question: _Question, file: FileNames, fits: list[Fit], renames: Renames) -> None:
    """A wish that matched nothing is a slip of the pen, and is said to be one."""
    path, wishes, keys = question.path, question.wishes, question.model.specs
    names = file.stored.values()
    for old in renames.unused():
        raise KeyMismatchError(Problem("rename", path, {"old": old, "examples": tuple(names)[:3]}))
    for pattern in wishes.allow_missing:
        if not any(matches(key, (pattern,)) for key in keys):
            facts = {"argument": "allow_missing", "pattern": pattern, "whose": f"key of {question.model.name}"}
            raise KeyMismatchError(Problem("pattern", path, {**facts, "examples": tuple(keys)[:3]}))
    for pattern in wishes.allow_unexpected:
        adapted = (name for each in fits for name in each.names.values())
        if not any(matches(name, (pattern,)) for group in (names, file.own.values(), adapted) for name in group):
            facts = {"argument": "allow_unexpected", "pattern": pattern, "whose": "key of the file"}
            raise KeyMismatchError(Problem("pattern", path, {**facts, "examples": tuple(names)[:3]}))


def _verified(fits: list[Fit], file: FileNames, ask: Ask) -> list[Fit]:
    """The complete fits whose leftovers are indeed equal to buffers of the model."""
    for each in fits:
        for name, buffer in each.buffers.items():
            if each.complete and ask.equals_buffer(file.stored[name], buffer):
                each.ignored.append(Ignored(name, f"equal to the model's own buffer {buffer!r}, which is never saved"))
            else:
                each.left_over.append(name)
        each.buffers = {}
    return [each for each in fits if each.complete]


def _rehearsed(fits: list[Fit], file: FileNames, ask: Ask) -> list[Fit]:
    """Readings that do not pair off by name, but that the model's own loading code accepts."""
    accepted: list[Fit] = []
    for each in sorted(fits, key=lambda each: -len(each.pairs))[:ENOUGH]:
        pairs = each.pairs | {each.model.spell(each.names[name]): name for name in each.left_over}
        whole = len(pairs) == len(each.pairs) + len(each.left_over)
        if whole and not each.clashes and ask.accepts({key: file.stored[name] for key, name in pairs.items()}):
            each.pairs, each.missing, each.left_over, each.shapes = pairs, [], [], []
            accepted.append(each)
    return accepted


def _distinct(answers: list[Fit], file: FileNames, ask: Ask) -> list[Fit]:
    """Each different answer once; parts that are bit for bit the same network are one answer."""
    distinct: list[Fit] = []
    for each in answers:
        if not any(_equal(each, other, file, ask) for other in distinct):
            distinct.append(each)
    return distinct


def _equal(one: Fit, other: Fit, file: FileNames, ask: Ask) -> bool:
    if one.pairs == other.pairs:
        return True
    return one.pairs.keys() == other.pairs.keys() and all(
        name == other.pairs[key] or ask.same(file.stored[name], file.stored[other.pairs[key]])
        for key, name in one.pairs.items()
    )


def _check_tied(best: Fit, file: FileNames, question: _Question) -> None:
    """One tensor under two names must have one value."""
    for group in question.model.aliases:
        names = [file.stored[name] for name in dict.fromkeys(best.pairs[key] for key in group if key in best.pairs)]
        if any(not question.ask.same(names[0], other) for other in names[1:]):
            answers = tuple((name, f"allow_unexpected={[other for other in names if other != name]!r}") for name in names)
            raise AmbiguousKeysError(Ambiguity(question.model.name, question.path, answers, key=" and ".join(group)))


def _plan(best: Fit, found: _Found, question: _Question) -> KeyPlan:
    file, base, specs = found.file, question.wishes.select or "", question.model.specs
    parts = {file.part[name] for name in best.pairs.values()} or {best.removed}
    # Below a single dict the rest of the path is a prefix of its keys; over several dicts all of it is a part.
    part = next((path for path in parts if len(parts) == 1 and below(best.removed + ".", path) is not None), best.removed)
    removed = best.removed[len(part) :].lstrip(".")
    ordered = [key for key in specs if key in best.pairs] + [key for key in best.pairs if key not in specs]
    pairs = {key: file.stored[best.pairs[key]] for key in ordered}
    return KeyPlan(
        model=question.model.name,
        path=question.path,
        part=join(base, part),
        rule=_rule(best, removed, found),
        pairs=pairs,
        wanted=len(specs),
        ignored=tuple(Ignored(file.stored[name], reason) for name, reason in best.ignored),
        kept=tuple(best.kept),
        missing_keys=tuple(best.allowed_missing),
        unexpected_keys=tuple(file.stored[name] for name in best.allowed_unexpected),
        rehearsed=found.rehearsed,
    )


def _rule(best: Fit, removed: str, found: _Found) -> str:
    """What was adapted, in words; empty where the names are equal."""
    steps = {f"removed '{removed}.'": bool(removed), f"added '{best.model.added}.'": bool(best.model.added)}
    seen: set[tuple[str, str]] = set()
    for key, name in best.pairs.items():
        tail = below(name, best.removed) or name
        places = (parent(key), parent(tail))
        if key != tail and places not in seen:
            seen.add(places)
            adapted = best.names.get(name, tail)
            steps |= {f"removed '{piece}.'": True for piece in _wrappers(tail, adapted)}
            steps |= {f"added '{piece}.'": True for piece in _wrappers(key, adapted)}
    file = found.file
    renamed = any(name != join(file.part[name], file.own[name]) for name in best.pairs.values())
    steps["renamed"] = renamed or best.renamed
    steps["accepted by the model's own loading code"] = found.rehearsed
    return ", ".join(step for step, taken in steps.items() if taken)


def _wrappers(name: str, without: str) -> list[str]:
    """The wrapper segments of `name` that are not in `without`."""
    extra = Counter(name.split(".")) - Counter(without.split("."))
    return [piece for piece in extra if piece in WRAPPER_SEGMENTS]


def module_paths(pairs: Mapping[str, str]) -> dict[str, str]:
    """Module path in the file -> in the model, for every module above a pair, as far up as the names agree."""
    found: dict[str, str] = {}
    for key, name in pairs.items():
        own, theirs = parent(key), parent(name)
        while theirs not in found:
            found[theirs] = own
            if not own or own.rpartition(".")[2] != theirs.rpartition(".")[2]:
                break
            own, theirs = parent(own), parent(theirs)
    return found


def _mismatch(found: _Found, question: _Question) -> KeyMismatchError:
    """The refusal for the reading that came closest, with the arguments that were tried and work."""
    file, specs = found.file, question.model.specs
    nearest = max(found.fits, key=lambda each: (len(each.pairs) - len(each.shapes), -len(each.left_over)))
    if nearest.clashes:
        return _clash(nearest, found, question)
    paper = Mismatch(
        model=question.model.name,
        path=question.path,
        part=join(question.wishes.select or "", nearest.removed),
        rule=_rule(nearest, "", found),
        paired=len(nearest.pairs) - len(nearest.shapes),
        wanted=len(specs),
        missing={key: specs[key] for key in nearest.missing},
        left_over={nearest.names[name]: file.spec[name] for name in nearest.left_over},
        shapes={key: (file.spec[nearest.pairs[key]], specs[key]) for key in nearest.shapes},
        kind=hints.cause(file),
        hints=tuple(text for text, wishes in hints.proposals(nearest, question.wishes) if _works(wishes, question)),
    )
    return (ShapeMismatchError if paper.shapes and not (paper.missing or paper.left_over) else KeyMismatchError)(paper)


def _works(wishes: Wishes, question: _Question) -> bool:
    """Whether the call with these arguments would be served."""
    try:
        return len(_search(replace(question, wishes=wishes)).answers) == 1
    except KeyMismatchError:
        return False


def _clash(nearest: Fit, found: _Found, question: _Question) -> AmbiguousKeysError:
    key, *names = nearest.clashes[0]
    answers = []
    for name in names:
        for text, wishes in hints.choices(name, [x for x in names if x != name][0], found.file, question.wishes):
            if _works(wishes, question):
                answers.append((found.file.stored[name], text))
                break
        else:
            answers.append((found.file.stored[name], ""))
    return AmbiguousKeysError(Ambiguity(question.model.name, question.path, tuple(answers), key=key))


def _ambiguous(found: _Found, question: _Question) -> AmbiguousKeysError:
    answers = []
    for each in found.answers:
        part = join(question.wishes.select or "", each.removed)
        text = f"select={part!r}" if _works(replace(question.wishes, select=part), question) else ""
        answers.append((f"{len(each.pairs)} keys of {part!r}" if part else f"{len(each.pairs)} keys at the top", text))
    return AmbiguousKeysError(Ambiguity(question.model.name, question.path, tuple(answers)))
