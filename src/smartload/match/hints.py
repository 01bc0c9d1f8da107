"""Arguments worth trying when names do not pair off. Pure; nothing here is applied, `match` tries each first."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from difflib import get_close_matches
from itertools import islice

from smartload.match.fit import Fit
from smartload.match.names import MOST_LEVELS, FileNames
from smartload.records.entries import TensorSpec
from smartload.records.keys import ancestors, common_path, join, leaf, parent, without_prefix
from smartload.records.problems import Kind
from smartload.records.requests import ModelKeys, Options

_SHARD = re.compile(r"-\d+-of-\d+\.")
MOST_ALIKE, MOST_RULES = 200, 4
"""Modules of one kind that are compared by their names, and rules that are still a help to read."""
LONGEST = 300
"""Characters of an argument that is still a help to read."""


def cause(file: FileNames, path: str) -> Kind | None:
    """A reason that is known by name: the kind of file that is no full set of weights."""
    if any("lora_A." in name for name in file.keys) and not any("base_layer." in name for name in file.keys):
        return "lora"
    if any(leaf(name) == "_flat_param" for name in file.keys):
        return "flat"
    specs = [file_key.spec for file_key in file.keys.values() if file_key.spec is not None]
    if len(specs) > 1 and all(spec.shape == (0,) for spec in specs):
        return "zero3"
    return "shard" if _SHARD.search(path) else None


def bodies(nearest: Fit, model: ModelKeys) -> Iterator[str]:
    """Modules, one or two levels down, that have as many keys as the file: it may be one of them, saved by itself."""
    keys: dict[str, int] = {}
    for key in () if model.wrappers else model.specs:
        for path in ancestors(parent(key)):
            if path and path.count(".") < 2:
                keys[path] = keys.get(path, 0) + 1
    alike = {path for path, count in keys.items() if count == len(nearest.names) < len(model.specs)}
    return islice((path for path in keys if path in alike and parent(path) not in alike), 4)


def call_on(path: str) -> str:
    """The call for one module of the model."""
    plain = all(map(str.isidentifier, path.split(".")))
    return f"smart_load({f'model.{path}' if plain else f'model.get_submodule({path!r})'}, path)"


def proposals(
    nearest: Fit, file: FileNames, missing: list[str], unexpected: list[str], options: Options
) -> Iterator[tuple[str, Options]]:
    """Changes of the call that may make it work: as they are to be written, and as wishes to try."""
    extra = [nearest.names[name] for name in unexpected]
    old, new = common_path(extra), common_path(nearest.model.unwrapped(key) for key in missing)
    if old and new and old != new and options.rename is None:
        yield f"rename={{{old!r}: {new!r}}}", replace(options, rename={old: new})
    elif options.rename is None and (rules := _renames(nearest, file, missing, unexpected)):
        yield f"rename={rules!r}", replace(options, rename=rules)
    if not nearest.pairs:
        yield from _without_heads([nearest.model.unwrapped(key) for key in missing], extra, options)
    if (len(nearest.pairs) - len(nearest.shapes)) * 10 < min(len(nearest.model.key), len(nearest.names)):
        return  # next to nothing would be loaded
    wrong = set(nearest.shapes)
    wanted = _patterns([*missing, *wrong], [key for key in nearest.pairs if key not in wrong])
    there = [nearest.names[name] for key, name in nearest.pairs.items() if key not in wrong]
    left = _patterns([*extra, *(nearest.names[nearest.pairs[key]] for key in nearest.shapes)], there)
    arguments = {"allow_missing": wanted, "allow_unexpected": left}
    yield (
        ", ".join(f"{name}={list(value)!r}" for name, value in arguments.items() if value),
        replace(
            options, allow_missing=options.allow_missing + wanted, allow_unexpected=options.allow_unexpected + left
        ),
    )


def _renames(nearest: Fit, file: FileNames, missing: list[str], unexpected: list[str]) -> dict[str, str]:
    """Which modules may have got other names: those of the same keys and shapes, the most alike in spelling first."""
    if not unexpected or len(unexpected) != len(missing):
        return {}
    specs, plain = nearest.model.model_keys.specs, nearest.model.unwrapped
    wanted = _signatures((plain(key), specs[key]) for key in missing)
    there = _signatures((nearest.names[name], file.keys[name].spec) for name in unexpected)
    rules: dict[str, str] = {}
    for signature, modules in wanted.items():
        others = there.get(signature, [])
        if len(others) != len(modules) or len(modules) > MOST_ALIKE:
            return {}
        for new in modules:
            (old,) = get_close_matches(new, others, 1, 0)
            others.remove(old)
            old, new = _where_they_part(old, new)
            if not old or rules.setdefault(old, new) != new:
                return {}
    return rules if len(rules) <= MOST_RULES else {}


def _signatures(items: Iterable[tuple[str, TensorSpec | None]]) -> dict[object, list[str]]:
    """The modules by what they hold: their own keys with the shapes."""
    held: dict[str, list[tuple[str, object]]] = {}
    for name, spec in items:
        held.setdefault(parent(name), []).append((leaf(name), spec and spec.shape))
    found: dict[object, list[str]] = {}
    for module, keys in held.items():
        found.setdefault(tuple(sorted(keys, key=str)), []).append(module)
    return found


def _where_they_part(old: str, new: str) -> tuple[str, str]:
    """Two paths without the segments at their ends that they have in common."""
    while old and new and leaf(old) == leaf(new):
        old, new = parent(old), parent(new)
    return old, new


def _without_heads(missing: list[str], extra: list[str], options: Options) -> Iterator[tuple[str, Options]]:
    """The file may be the backbone of the model, saved by itself: everything beside that may be missing."""
    beside: dict[str, set[str]] = {}
    for key in missing:
        beside.setdefault(key.partition(".")[0], set()).add(key)
    bodies = [head for head, keys in beside.items() if len(keys) >= len(extra) > 0]
    for body in bodies if len(beside) <= 4 else ():
        others = {head: keys for head, keys in beside.items() if head != body}
        globs = tuple(exactly(head) + ".*" * (keys != {head}) for head, keys in others.items())
        if globs:
            yield f"allow_missing={list(globs)!r}", replace(options, allow_missing=options.allow_missing + globs)


def _patterns(names: list[str], others: list[str]) -> tuple[str, ...]:
    """One glob for names that have a module to themselves; the names where they are few; nothing for the rest."""
    path = common_path(names)
    if path and len(names) > 1 and all(without_prefix(other, path) is None for other in others):
        return (f"{exactly(path)}.*",)
    return tuple(map(exactly, sorted(names))) if len(names) <= 3 else ()


def exactly(name: str) -> str:
    """The glob pattern that fits nothing but the name."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def choices(name: str, names: list[str], key: str, file: FileNames, options: Options) -> Iterator[tuple[str, Options]]:
    """Ways to say that `name` is meant, where others would fill the same key of the model."""
    others = [file.keys[other].dotted for other in dict.fromkeys(names) if other != name]
    base, stored = options.select or "", file.keys[name].dotted
    yield _without([exactly(other) for other in others], options)  # enough where it is one key only
    for part in _apart(stored, others, base):
        if without_prefix(key, part) is None:  # a path of the model itself is no name for one of two networks
            yield f"select={part!r}", replace(options, select=part)
    paths = [next(_apart(other, [stored], base), "") for other in others]
    if all(paths):
        yield _without([f"{exactly(path)}.*" for path in dict.fromkeys(paths)], options)


def _without(patterns: list[str], options: Options) -> tuple[str, Options]:
    allowed = (*options.allow_unexpected, *patterns)
    return f"allow_unexpected={list(allowed)!r}", replace(options, allow_unexpected=allowed)


def _apart(name: str, others: list[str], base: str) -> Iterator[str]:
    """The first few paths above a name that no other one lies under, the highest first."""
    segments = (without_prefix(name, base) or name).split(".", MOST_LEVELS)[:-1]
    paths = (join(base, *segments[: count + 1]) for count in range(len(segments)))
    return islice((path for path in paths if all(without_prefix(other, path) is None for other in others)), 2)
