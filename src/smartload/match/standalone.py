"""Clean the keys of a file where there is no model: choose its state dict, remove wrappers' segments. Pure.

For `convert` and `diff`. No model says what the keys should be, so whatever would be a guess is refused or left alone:
the state dict is the only one of the file or the selected one, and a segment is removed only where it is certain, or as
good as certain, to be a wrapper's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from smartload.errors import AmbiguousKeysError, KeyMismatchError
from smartload.match.candidates import select
from smartload.match.hints import LONGEST_ARGUMENT, cause
from smartload.match.names import FileNames, Parts
from smartload.match.plan import module_paths
from smartload.records.keys import Renames, ancestors, join, leaf, without_prefix, without_wrappers
from smartload.records.problems import Ambiguity, Problem
from smartload.records.requests import Ignored, Options
from smartload.records.text import plural
from smartload.records.wrappers import AVERAGED, PLAUSIBLE_SEGMENTS, SEGMENTS

ALWAYS_WRAPPERS = SEGMENTS - PLAUSIBLE_SEGMENTS
"""Segments that are removed wherever they are, such as '_orig_mod': nobody names a layer so. The others, such as
'module', may be a layer's name and are removed only where all keys begin with them."""
Same = Callable[[str, str], bool]
"""Tells whether two tensors of the file, by their dotted names, are bit for bit equal."""


@dataclass(frozen=True, slots=True)
class CleanKeys:
    """A state dict of a file under clean names.

    Attributes:
        part: its dotted path in the file; "" for the top.
        pairs: clean name -> dotted name in the file.
        rule: what was adapted, in words; "" where nothing was.
        ignored: names of the file that were not taken, and why.
        twice: pairs of names in the file that would become one.
        unused: rules of `rename` that matched no name.
    """

    part: str
    pairs: Mapping[str, str]
    rule: str = ""
    ignored: tuple[Ignored, ...] = ()
    twice: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, ...] = ()


def clean_keys(parts: Parts, path: str, options: Options, same: Same) -> CleanKeys:
    """Take the one state dict of a file, or all that lies at or below `select`, under clean names.

    Args:
        parts: the names of every state dict in the file.
        path: the file, for messages.
        options: `select` and `rename`.
        same: compares two tensors of the file.

    Raises:
        AmbiguousKeysError: there are several different state dicts, or two names would become one.
        KeyMismatchError: `select` or a rule of `rename` matched nothing, or the tensors have no names or no data (FSDP
            flat parameters, DeepSpeed ZeRO-3).
    """
    if options.select is not None:
        clean = _cleaned(select(parts, options.select, path), options.select, path, options)
        taken = {*clean.pairs.values(), *(item.key for item in clean.ignored)}
        # No tensor is dropped in silence.
        others = (key.dotted for keys in parts.values() for key in keys if key.spec is not None)
        clean = _ignoring(clean, (Ignored(name, "not selected") for name in others if name not in taken))
    else:
        clean, *copies = [
            _cleaned({"": [key._replace(part="") for key in keys]}, part, path, options) for part, keys in parts.items()
        ]
        # Raw weights and an EMA copy of them at step 0, say, are equal: it does not matter which of them is taken.
        different = [each for each in copies if not _equal(clean, each, same)]
        if different:
            raise AmbiguousKeysError(_several_parts([clean, *different], parts, path, options))
        where = repr(clean.part) if clean.part else "at the top"
        clean = _ignoring(clean, (Ignored(each.part, f"the same tensors as {where}") for each in copies))
    # Only of what is taken: a clash in a part that nobody wants is no reason to refuse.
    for first, second in clean.twice:
        raise AmbiguousKeysError(Problem("twice", path, {"first": first, "second": second}))
    for rule in clean.unused:
        raise KeyMismatchError(
            Problem("rename", path, {"old": rule, "examples": tuple(islice(clean.pairs.values(), 3))})
        )
    return clean


def versions(metadata: Mapping[str, Mapping[str, object]], pairs: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """Give the versions of modules under the clean paths of their keys, as a state dict's `_metadata` has them.

    Args:
        metadata: the file's `_metadata`, by dotted path in the file.
        pairs: clean name -> dotted name in the file.

    >>> versions({"module.bn": {"version": 2}}, {"bn.weight": "module.bn.weight"})
    {'bn': {'version': 2}}
    """
    paths, clean = module_paths(pairs), dict[str, dict[str, int]]()
    for module, entry in metadata.items():
        # A module without keys of its own has no pair: it goes with the nearest module above it that has one.
        above = next((path for path in ancestors(module) if path in paths), None)
        version = entry.get("version")
        # An integer and nothing else: whatever more a file says of a module is not copied.
        if above is not None and type(version) is int:
            clean[join(paths[above], without_prefix(module, above) or "")] = {"version": version}
    return clean


def _ignoring(clean: CleanKeys, more: Iterable[Ignored]) -> CleanKeys:
    return replace(clean, ignored=(*clean.ignored, *more))


def _equal(one: CleanKeys, other: CleanKeys, same: Same) -> bool:
    """Tell whether two state dicts have the same clean names and the same values."""
    # Where two names would become one it is not known which of the tensors would be compared.
    if one.twice or other.twice or one.pairs.keys() != other.pairs.keys():
        return False
    return all(same(one.pairs[key], other.pairs[key]) for key in one.pairs)


def _cleaned(parts: Parts, base: str, path: str, options: Options) -> CleanKeys:
    """Clean the names of the parts that were taken; of two names that would become one the first has it.

    Args:
        parts: the keys that were taken, by path below `base`.
        base: what was taken: a dotted path in the file.
        path: the file, for messages.
        options: `rename`.
    """
    renames = Renames(options.rename)
    file = FileNames(parts, renames)
    # Of the causes that are known by name, the two that leave nothing to write: no names, no data. An adapter or a
    # shard is a state dict like any other here.
    if (kind := cause(file, path)) in ("flat", "zero3"):
        raise KeyMismatchError(Problem(kind, path))
    taken = [name for name, file_key in file.keys.items() if file_key.spec is not None or leaf(name) == "_extra_state"]
    # Before `rename`: which segments all keys begin with is a fact of the file.
    unwrapped = {
        name: without_wrappers(join(file.keys[name].part, file.keys[name].key), ALWAYS_WRAPPERS) for name in taken
    }
    wrappers, counters = _leading_wrappers(unwrapped.values())
    pairs: dict[str, str] = {}
    used, twice = set(file.used), [(file.keys[name].dotted, other.dotted) for name, other in file.twice.items()]
    for name in taken:
        if unwrapped[name] in counters:
            continue
        new = without_wrappers(name, ALWAYS_WRAPPERS)
        for segment in wrappers:
            new = without_prefix(new, segment) or new
        if name not in file.rule:  # a rule may be written for the name as the file has it, or for the clean one
            new, rule = renames.prefix(new)
            used.update([rule] if rule is not None else ())
        if new in pairs:
            twice.append((pairs[new], file.keys[name].dotted))
        pairs.setdefault(new, file.keys[name].dotted)
    inner = {segment for name in taken for segment in name.split(".")[:-1]} & ALWAYS_WRAPPERS
    steps = [f"removed '{segment}.'" for segment in sorted({*wrappers, *inner})] + ["renamed"] * bool(used)
    ignored = [(name, "not a tensor") for name in file.keys if name not in unwrapped]
    ignored += [(name, "bookkeeping of AveragedModel") for name in taken if unwrapped[name] in counters]
    left_out = tuple(Ignored(file.keys[name].dotted, reason) for name, reason in ignored)
    return CleanKeys(base, pairs, ", ".join(steps), left_out, tuple(twice), tuple(renames.unused(used)))


def _leading_wrappers(names: Iterable[str]) -> tuple[list[str], set[str]]:
    """Find the wrappers' segments with which all names begin, and the counters of AveragedModel beside them.

    >>> _leading_wrappers(["n_averaged", "module.module.fc.weight", "module.module.fc.bias"])
    (['module', 'module'], {'n_averaged'})
    """
    wrappers: list[str] = []
    counters: set[str] = set()
    tails = {name: name for name in names}
    while True:  # once for each wrapper around the others
        beside = {name for name, tail in tails.items() if tail == AVERAGED}
        heads = {tail.partition(".")[0] if "." in tail else "" for name, tail in tails.items() if name not in beside}
        # Beside its counter only AveragedModel's own child, 'module', is a wrapper for certain.
        if len(heads) != 1 or not heads <= ({"module"} if beside else PLAUSIBLE_SEGMENTS):
            return wrappers, counters
        counters |= beside
        wrappers += heads
        tails = {name: tail.partition(".")[2] for name, tail in tails.items() if name not in beside}


def _several_parts(found: Sequence[CleanKeys], parts: Parts, path: str, options: Options) -> Ambiguity:
    """Gather the state dicts of a file, each with the argument that takes it, where that was tried and works."""
    answers = []
    for each in found:
        tried = _tried(each.part, parts, path, options)
        keys = plural(len((tried or each).pairs), "key")
        what = f"{keys} of {each.part!r}" if each.part else f"{keys} at the top"
        argument = f"select={each.part!r}"
        answers.append((what, argument if tried and len(argument) < LONGEST_ARGUMENT else ""))
    # select="" takes all of them, under their paths: the way to write an encoder and a decoder to one file.
    everything = _tried("", parts, path, options)
    if everything and "" not in parts:  # with tensors at the top, "" selects these alone
        keys = plural(len(everything.pairs), "key")
        answers.append((f"all {keys}, each behind the path of its part", "select=''"))
    return Ambiguity("", path, tuple(answers))


def _tried(part: str, parts: Parts, path: str, options: Options) -> CleanKeys | None:
    """Take what `select=part` would take; None where that would be refused."""
    try:
        clean = _cleaned(select(parts, part, path), part, path, replace(options, select=part))
    except KeyMismatchError:
        return None
    return None if clean.twice or clean.unused else clean
