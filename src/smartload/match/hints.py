"""Propose arguments that may make a refused call work. Pure.

Nothing is applied here: `search` tries every proposal and prints those that work. So a proposal may be a guess (similar
spelling, equal shapes), which matching itself never makes.
"""

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
"""In the name of one shard, as Hugging Face numbers them: 'pytorch_model-00001-of-00002.bin'."""
MOST_ALIKE = 200
"""Modules with the same keys and shapes that are compared by spelling: each is compared with each."""
MOST_RULES = 4
"""Rules of one proposed `rename`; a longer dict is a table of another architecture, which nobody checks."""
LONGEST_ARGUMENT = 300
"""Characters of a proposed argument; a longer one is not read, and may be a hostile name."""


def cause(file: FileNames, path: str) -> Kind | None:
    """Recognise, by its keys and its name, a file that never holds all weights of a model; None elsewhere."""
    # Where there is a base_layer, peft saved the base weights with the adapter.
    if any("lora_A." in name for name in file.keys) and not any("base_layer." in name for name in file.keys):
        return "lora"
    if any(leaf(name) == "_flat_param" for name in file.keys):
        return "flat"
    # Every name is looked at: this runs in a refusal only.
    specs = [file_key.spec for file_key in file.keys.values() if file_key.spec is not None]
    # ZeRO-3 leaves an empty tensor in place of each parameter. A single one may be what somebody saved.
    if len(specs) > 1 and all(spec.shape == (0,) for spec in specs):
        return "zero3"
    return "shard" if _SHARD.search(path) else None


def modules_of_size(nearest: Fit, model: ModelKeys) -> Iterator[str]:
    """Give the modules of the model, one or two levels down, that have as many keys as the file: it may be one of them.

    At most four: each is tried with a search of its own.
    """
    keys: dict[str, int] = {}
    # Not in a wrapper: there `model.module` is the network, and the proposed call would pass by the wrapper.
    for key in () if model.wrappers else model.specs:
        for path in ancestors(parent(key)):
            if path and path.count(".") < 2:
                keys[path] = keys.get(path, 0) + 1
    of_size = {path for path, count in keys.items() if count == len(nearest.adapted) < len(model.specs)}
    # Of a module and its only child the outer one is enough.
    return islice((path for path in keys if path in of_size and parent(path) not in of_size), 4)


def call_on(path: str) -> str:
    """Write the call that loads one module of the model.

    >>> call_on("backbone.body")
    'smart_load(model.backbone.body, path)'
    >>> call_on("layers.0")
    "smart_load(model.get_submodule('layers.0'), path)"
    """
    attributes = all(map(str.isidentifier, path.split(".")))  # 'layers.0' is no expression of Python
    return f"smart_load({f'model.{path}' if attributes else f'model.get_submodule({path!r})'}, path)"


def proposals(
    nearest: Fit, file: FileNames, missing: list[str], unexpected: list[str], options: Options
) -> Iterator[tuple[str, Options]]:
    """Give arguments that may make the call work, each as it is written and as the options to try.

    Args:
        nearest: the closest incomplete fit.
        file: the names of the file.
        missing: model keys without a partner.
        unexpected: names of the file without a partner.
        options: the arguments of the call so far.

    Renames come first: they load tensors, where allowing keys to be missing leaves them out.
    """
    extra = [nearest.adapted[name] for name in unexpected]
    # One prefix of all that is unexpected for one prefix of all that is missing: the usual renamed layer.
    old, new = common_path(extra), common_path(nearest.model.unwrapped(key) for key in missing)
    if old and new and old != new and options.rename is None:
        yield f"rename={{{old!r}: {new!r}}}", replace(options, rename={old: new})
    elif options.rename is None and (rules := _renames(nearest, file, missing, unexpected)):
        yield f"rename={rules!r}", replace(options, rename=rules)
    # Nothing pairs off: the file may be one module of the model, whose names lack its path.
    if not nearest.pairs:
        yield from _allowing_other_modules([nearest.model.unwrapped(key) for key in missing], extra, options)
    # With under a tenth in common next to nothing would be loaded, and the call would look like a success.
    if (len(nearest.pairs) - len(nearest.shapes)) * 10 < min(len(nearest.model.key), len(nearest.adapted)):
        return
    # A key in another shape must be allowed on both sides: it is missing, and the file's tensor is unexpected.
    wrong = set(nearest.shapes)
    missing_globs = _patterns([*missing, *wrong], [key for key in nearest.pairs if key not in wrong])
    loaded = [nearest.adapted[name] for key, name in nearest.pairs.items() if key not in wrong]
    unexpected_globs = _patterns([*extra, *(nearest.adapted[nearest.pairs[key]] for key in nearest.shapes)], loaded)
    arguments = {"allow_missing": missing_globs, "allow_unexpected": unexpected_globs}
    yield (
        ", ".join(f"{argument}={list(globs)!r}" for argument, globs in arguments.items() if globs),
        replace(
            options,
            allow_missing=options.allow_missing + missing_globs,
            allow_unexpected=options.allow_unexpected + unexpected_globs,
        ),
    )


def _renames(nearest: Fit, file: FileNames, missing: list[str], unexpected: list[str]) -> dict[str, str]:
    """Find prefixes to rename: modules with the same keys and shapes, of these the most alike in spelling.

    Empty where some module has no counterpart: a rename that leaves something missing helps nobody.
    """
    if not unexpected or len(unexpected) != len(missing):
        return {}
    specs, unwrapped = nearest.model.model_keys.specs, nearest.model.unwrapped
    in_model = _by_content((unwrapped(key), specs[key]) for key in missing)
    in_file = _by_content((nearest.adapted[name], file.keys[name].spec) for name in unexpected)
    rules: dict[str, str] = {}
    for content, modules in in_model.items():
        counterparts = in_file.get(content, [])
        if len(counterparts) != len(modules) or len(modules) > MOST_ALIKE:
            return {}
        for new in modules:
            (old,) = get_close_matches(new, counterparts, 1, 0)  # a cutoff of 0: the closest, however far
            counterparts.remove(old)
            # 'trunk.0' and 'body.0' differ in 'trunk' and 'body': one rule for all the layers below.
            old, new = _without_common_end(old, new)
            if not old or rules.setdefault(old, new) != new:
                return {}
    return rules if len(rules) <= MOST_RULES else {}


def _by_content(items: Iterable[tuple[str, TensorSpec | None]]) -> dict[object, list[str]]:
    """Group the modules that have the same keys in the same shapes."""
    contents: dict[str, list[tuple[str, object]]] = {}
    for name, spec in items:
        contents.setdefault(parent(name), []).append((leaf(name), spec and spec.shape))
    groups: dict[object, list[str]] = {}
    for module, keys in contents.items():
        groups.setdefault(tuple(sorted(keys, key=str)), []).append(module)
    return groups


def _without_common_end(old: str, new: str) -> tuple[str, str]:
    """Remove the last segments that two paths have in common: 'trunk.0', 'body.0' -> 'trunk', 'body'."""
    while old and new and leaf(old) == leaf(new):
        old, new = parent(old), parent(new)
    return old, new


def _allowing_other_modules(missing: list[str], extra: list[str], options: Options) -> Iterator[tuple[str, Options]]:
    """Propose that all but one module may be missing: the file may be the backbone of the model, saved by itself."""
    modules: dict[str, set[str]] = {}
    for key in missing:
        modules.setdefault(key.partition(".")[0], set()).add(key)
    # A body has at least the keys of the file; which of several is meant, a trial decides.
    bodies = [head for head, keys in modules.items() if len(keys) >= len(extra) > 0]
    for body in bodies if len(modules) <= 4 else ():  # with more beside it, it is no backbone with its heads
        others = {head: keys for head, keys in modules.items() if head != body}
        # A module is allowed with everything below it, a tensor of the model itself by its name.
        globs = tuple(literal(head) + ".*" * (keys != {head}) for head, keys in others.items())
        if globs:
            yield f"allow_missing={list(globs)!r}", replace(options, allow_missing=options.allow_missing + globs)


def _patterns(names: list[str], others: list[str]) -> tuple[str, ...]:
    """Give the shortest globs that match the names and none of the others; () where that would be a long list.

    >>> _patterns(["fc.weight", "fc.bias"], ["conv.weight"]), _patterns(["fc.weight"], ["conv.weight"])
    (('fc.*',), ('fc.weight',))
    """
    # A glob over a whole module may match only keys that differ: one more, and a tensor that fits is left out.
    path = common_path(names)
    if path and len(names) > 1 and all(without_prefix(other, path) is None for other in others):
        return (f"{literal(path)}.*",)
    return tuple(map(literal, sorted(names))) if len(names) <= 3 else ()


def literal(name: str) -> str:
    """Write the glob pattern that matches nothing but the name.

    >>> literal("fc.weight"), literal("a[0]")
    ('fc.weight', 'a[[]0]')
    """
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def choices(name: str, names: list[str], key: str, file: FileNames, options: Options) -> Iterator[tuple[str, Options]]:
    """Propose arguments that take `name` for a key, where others would fill the same key.

    Args:
        name: the name of the file that is to be taken.
        names: all the names that would fill the key.
        key: the key of the model.
        file: the names of the file.
        options: the arguments of the call so far.
    """
    others = [file.keys[other].dotted for other in dict.fromkeys(names) if other != name]
    base, stored = options.select or "", file.keys[name].dotted
    yield _allowing([literal(other) for other in others], options)  # enough where one key alone is there twice
    for part in _paths_apart(stored, others, base):
        if without_prefix(key, part) is None:  # a path of the model itself does not name one of two networks
            yield f"select={part!r}", replace(options, select=part)
    paths = [next(_paths_apart(other, [stored], base), "") for other in others]
    if all(paths):
        yield _allowing([f"{literal(path)}.*" for path in dict.fromkeys(paths)], options)


def _allowing(patterns: list[str], options: Options) -> tuple[str, Options]:
    """Write the argument that lets the patterns be unexpected beside what is allowed so far."""
    allowed = (*options.allow_unexpected, *patterns)
    return f"allow_unexpected={list(allowed)!r}", replace(options, allow_unexpected=allowed)


def _paths_apart(name: str, others: list[str], base: str) -> Iterator[str]:
    """Give the two highest paths above a name that none of the others lies under."""
    # The highest paths, because they are the shortest to write and name a whole network.
    segments = (without_prefix(name, base) or name).split(".", MOST_LEVELS)[:-1]
    paths = (join(base, *segments[: count + 1]) for count in range(len(segments)))
    return islice((path for path in paths if all(without_prefix(other, path) is None for other in others)), 2)
