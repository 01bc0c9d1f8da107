"""A state dict by itself: which part of a file it is, and its names without what wrappers put in. Pure.

No model says here what the names should be, so nothing is taken that would be a guess: the part is the only one
there is, or the one that was selected, and wrappers are what nobody else would call a module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from smartload.errors import AmbiguousKeysError, KeyMismatchError
from smartload.match.candidates import select
from smartload.match.hints import LONGEST, cause
from smartload.match.names import FileNames, Parts
from smartload.match.plan import module_paths
from smartload.records.keys import Renames, ancestors, join, leaf, without_prefix, without_wrappers
from smartload.records.problems import Ambiguity, Problem
from smartload.records.requests import Ignored, Options
from smartload.records.text import plural
from smartload.records.wrappers import AVERAGED, PLAUSIBLE_SEGMENTS, SEGMENTS

ANYWHERE = SEGMENTS - PLAUSIBLE_SEGMENTS
"""Wrappers that are removed wherever they stand; the others, which a network may have too, only before all keys."""
Same = Callable[[str, str], bool]
"""Whether two tensors of the file, by their dotted names, are bit for bit equal."""


@dataclass(frozen=True, slots=True)
class CleanKeys:
    """A state dict of a file under clean names."""

    part: str
    """Its dotted path in the file; "" for the top."""
    pairs: Mapping[str, str]
    """Clean name -> dotted name in the file."""
    rule: str = ""
    """What was adapted, in words."""
    ignored: tuple[Ignored, ...] = ()
    twice: tuple[tuple[str, str], ...] = ()
    """Pairs of names in the file that would become one."""
    unused: tuple[str, ...] = ()
    """Rules of `rename` that fitted no name."""


def clean_keys(parts: Parts, path: str, options: Options, same: Same) -> CleanKeys:
    """The one state dict of a file, or all that lies at or below `select`, under clean names.

    Args:
        parts: the names of every state dict in the file.
        path: the file, for messages.
        options: `select` and `rename`.
        same: answers about data.

    Raises:
        AmbiguousKeysError: there are several state dicts, or two names would become one.
        KeyMismatchError: `select` or a rule of `rename` matched nothing, or the tensors are no weights.
    """
    if options.select is not None:
        found = _cleaned(select(parts, options.select, path), options.select, path, options)
        taken = {*found.pairs.values(), *(item.key for item in found.ignored)}
        found = _ignoring(found, (Ignored(name, "not selected") for name in _stored(parts) if name not in taken))
    else:
        found, *others = [
            _cleaned({"": [key._replace(part="") for key in keys]}, part, path, options) for part, keys in parts.items()
        ]
        different = [each for each in others if not _equal(found, each, same)]
        if different:
            raise AmbiguousKeysError(_choice([found, *different], parts, path, options))
        where = repr(found.part) if found.part else "at the top"
        found = _ignoring(found, (Ignored(each.part, f"the same tensors as {where}") for each in others))
    for first, second in found.twice:
        raise AmbiguousKeysError(Problem("twice", path, {"first": first, "second": second}))
    for rule in found.unused:
        raise KeyMismatchError(
            Problem("rename", path, {"old": rule, "examples": tuple(islice(found.pairs.values(), 3))})
        )
    return found


def versions(metadata: Mapping[str, Mapping[str, object]], pairs: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """The versions of modules, by dotted path in the file, under the clean paths that go with the names."""
    paths, found = module_paths(pairs), dict[str, dict[str, int]]()
    for module, entry in metadata.items():
        known = next((path for path in ancestors(module) if path in paths), None)
        version = entry.get("version")
        if known is not None and type(version) is int:
            found[join(paths[known], without_prefix(module, known) or "")] = {"version": version}
    return found


def _ignoring(found: CleanKeys, more: Iterable[Ignored]) -> CleanKeys:
    return replace(found, ignored=(*found.ignored, *more))


def _stored(parts: Parts) -> Iterator[str]:
    """The dotted names of all tensors."""
    return (key.dotted for keys in parts.values() for key in keys if key.spec is not None)


def _equal(one: CleanKeys, other: CleanKeys, same: Same) -> bool:
    if one.twice or other.twice or one.pairs.keys() != other.pairs.keys():
        return False
    return all(same(one.pairs[key], other.pairs[key]) for key in one.pairs)


def _cleaned(parts: Parts, base: str, path: str, options: Options) -> CleanKeys:
    """The names of what was taken, the first of two where they would become one."""
    renames = Renames(options.rename)
    file = FileNames(parts, renames)
    if (kind := cause(file, path)) in ("flat", "zero3"):
        raise KeyMismatchError(Problem(kind, path))
    ours = [name for name, file_key in file.keys.items() if file_key.spec is not None or leaf(name) == "_extra_state"]
    own = {
        name: without_wrappers(join(file.keys[name].part, file.keys[name].key), ANYWHERE) for name in ours
    }  # as the file has them
    chain, counters = _leading(own.values())
    pairs: dict[str, str] = {}
    used, twice = set(file.used), [(file.keys[name].dotted, other.dotted) for name, other in file.twice.items()]
    for name in ours:
        if own[name] in counters:
            continue
        new = _without(without_wrappers(name, ANYWHERE), chain)
        if name not in file.rule:
            new, rule = renames.prefix(new)
            used.update([rule] if rule is not None else ())
        if new in pairs:
            twice.append((pairs[new], file.keys[name].dotted))
        pairs.setdefault(new, file.keys[name].dotted)
    inner = {segment for name in ours for segment in name.split(".")[:-1]} & ANYWHERE
    steps = [f"removed '{segment}.'" for segment in sorted({*chain, *inner})] + ["renamed"] * bool(used)
    ignored = [(name, "not a tensor") for name in file.keys if name not in own]
    ignored += [(name, "bookkeeping of AveragedModel") for name in ours if own[name] in counters]
    left_out = tuple(Ignored(file.keys[name].dotted, reason) for name, reason in ignored)
    return CleanKeys(base, pairs, ", ".join(steps), left_out, tuple(twice), tuple(renames.unused(used)))


def _leading(names: Iterable[str]) -> tuple[list[str], set[str]]:
    """The wrappers' segments with which all names begin, and the counters of AveragedModel beside them."""
    chain: list[str] = []
    counters: set[str] = set()
    rest = {name: name for name in names}
    while True:
        beside = {name for name, tail in rest.items() if tail == AVERAGED}
        heads = {tail.partition(".")[0] if "." in tail else "" for name, tail in rest.items() if name not in beside}
        if len(heads) != 1 or not heads <= ({"module"} if beside else PLAUSIBLE_SEGMENTS):
            return chain, counters
        counters |= beside
        chain += heads
        rest = {name: tail.partition(".")[2] for name, tail in rest.items() if name not in beside}


def _without(name: str, chain: Iterable[str]) -> str:
    for segment in chain:
        name = without_prefix(name, segment) or name
    return name


def _choice(found: Sequence[CleanKeys], parts: Parts, path: str, options: Options) -> Ambiguity:
    """The state dicts of a file, each with the argument that takes it, where that was tried and works."""
    answers = []
    for each in found:
        tried = _tried(each.part, parts, path, options)
        keys = plural(len((tried or each).pairs), "key")
        what = f"{keys} of {each.part!r}" if each.part else f"{keys} at the top"
        argument = f"select={each.part!r}"
        answers.append((what, argument if tried and len(argument) < LONGEST else ""))
    whole = _tried("", parts, path, options)
    if whole and "" not in parts:
        keys = plural(len(whole.pairs), "key")
        answers.append((f"all {keys}, each behind the path of its part", "select=''"))
    return Ambiguity("", path, tuple(answers))


def _tried(part: str, parts: Parts, path: str, options: Options) -> CleanKeys | None:
    """What would be taken with this `select`; None where that would be refused."""
    try:
        found = _cleaned(select(parts, part, path), part, path, replace(options, select=part))
    except KeyMismatchError:
        return None
    return None if found.twice or found.unused else found
