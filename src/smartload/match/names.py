"""The two sides of a match: the names of a file, and the names of a model. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice

from smartload.records.entries import FileKey, TensorSpec
from smartload.records.keys import (
    Renames,
    WrapperStripper,
    ancestors,
    join,
    leaf,
    parent,
    without_prefix,
    without_wrappers,
)
from smartload.records.requests import ModelKeys
from smartload.records.wrappers import SEGMENTS

MOST_LEVELS = 16
"""Levels of dicts in dicts, and wrappers in wrappers, that are looked at; far more than any file has."""


Parts = Mapping[str, Sequence[FileKey]]
"""The keys of a file, or of what `select` took of it: dotted path of each state dict -> its keys."""


class FileNames:
    """The keys of a file by the names that are compared with the model's: dotted, and renamed by the caller's rules.

    Two keys may get one name by renaming; the first has it, the second is remembered in `twice`.
    """

    def __init__(self, parts: Parts, renames: Renames) -> None:
        self.parts = tuple(parts)
        self.keys: dict[str, FileKey] = {}
        """Name -> the key that has it."""
        self.rule: dict[str, str] = {}
        """Name -> the rule of `rename` that gave it; names that no rule changed are not in it."""
        self.twice: dict[str, FileKey] = {}
        """Name -> the second key that would have it."""
        self.used: set[str] = set()
        """The rules that changed a key."""
        for path, keys in parts.items():
            prefix = f"{path}." if path else ""
            if not renames:
                self.keys.update((prefix + key.key, key) for key in keys)
                continue
            for key in keys:
                new, rule = renames.whole(key.key)
                name = prefix + new
                if rule is not None:
                    self.used.add(rule)
                if name in self.keys:
                    self.twice[name] = key
                    continue
                if rule is not None:
                    self.rule[name] = rule
                self.keys[name] = key

    @cached_property
    def _sorted(self) -> list[str]:
        return sorted(self.keys)

    def _range(self, prefix: str) -> tuple[int, int]:
        names = self._sorted
        return bisect_left(names, prefix + "."), bisect_left(names, prefix + "/")  # "/" follows "."

    def under(self, prefix: str) -> list[str]:
        """The names that begin with the whole segments of `prefix`; in the file's order where that is all of them."""
        if not prefix:
            return list(self.keys)
        start, end = self._range(prefix)
        return self._sorted[start:end]

    def count(self, prefix: str) -> int:
        """How many names begin with the whole segments of `prefix`."""
        start, end = self._range(prefix) if prefix else (0, len(self.keys))
        return end - start

    def tail(self, name: str) -> str:
        """The name in its own dict, after the renaming."""
        return name[len(part) + 1 :] if (part := self.keys[name].part) else name

    @cached_property
    def containers(self) -> tuple[str, ...]:
        """The paths of all dicts that hold tensors, at any depth."""
        return tuple(dict.fromkeys(path for part in self.parts for path in (*islice(ancestors(part), MOST_LEVELS), "")))


def within(model: ModelKeys, path: str) -> ModelKeys:
    """What the module at the path wants by itself."""

    def inner(names: Iterable[str]) -> list[str]:
        return [name for each in names if (name := without_prefix(each, path)) is not None]

    return replace(
        model,
        specs={name: model.specs[join(path, name)] for name in inner(model.specs)},
        tied=tuple(tuple(group) for names in model.tied if len(group := inner(names)) > 1),
        non_persistent={name: model.non_persistent[join(path, name)] for name in inner(model.non_persistent)},
    )


class ModelNames:
    """The model's names, without its wrappers' segments and, where `added` is given, without that common prefix."""

    def __init__(self, model: ModelKeys, added: str = "") -> None:
        self.model_keys, self.added = model, added
        self._module: dict[str, str] = {"": ""}
        # Where a wrapper has a name of its own that is also one of the network's, the network's is meant.
        unwrapped = map(self.unwrapped, model.specs) if model.wrappers else model.specs
        self.key = dict(zip(unwrapped, model.specs))
        if added:
            self.key = {
                name: key for path, key in self.key.items() if (name := without_prefix(path, added)) is not None
            }
        self.non_persistent = {without_prefix(self.unwrapped(key), added): key for key in model.non_persistent}

    def unwrapped(self, key: str) -> str:
        """The model's key without the segments of its wrappers."""
        if not self.model_keys.wrappers:
            return key
        path, _, last = key.rpartition(".")
        base = self._module.get(path) or self._unwrapped_module(path)
        return f"{base}.{last}" if base else last

    def _unwrapped_module(self, path: str) -> str:
        known = self._module.get(path)
        if known is None:
            base = self._unwrapped_module(parent(path))
            known = base if path in self.model_keys.wrappers else join(base, leaf(path))
            self._module[path] = known
        return known

    @cached_property
    def modules(self) -> dict[str, str]:
        """Module path without wrappers -> the innermost module of the model that has it."""
        found: dict[str, str] = {}
        for path in {parent(key) for key in self.model_keys.specs}:
            self._unwrapped_module(path)
        for path, unwrapped in self._module.items():
            name = without_prefix(unwrapped, self.added) if unwrapped != self.added else ""
            if name is not None and len(path) >= len(found.get(name, "")):
                found[name] = path
        return found

    @cached_property
    def stripper(self) -> WrapperStripper:
        """Reads names of a file as this model spells them."""
        return WrapperStripper(self.modules)

    @cached_property
    def depth(self) -> int:
        """Segments of the longest name."""
        return max((name.count(".") for name in self.key), default=0) + 1

    @cached_property
    def has_namesakes(self) -> bool:
        """Whether a real module has a name that wrappers use as well."""
        return any(leaf(path) in SEGMENTS for path in self.modules)

    def crowded(self, names: Iterator[str]) -> frozenset[str]:
        """The modules above the names that hold more than one thing."""
        first: dict[str, str] = {}
        several: set[str] = set()
        for name in names:
            for path in ancestors(name):
                if path and first.setdefault(parent(path), path) != path:
                    several.add(parent(path))
        return frozenset(several)

    @cached_property
    def bare(self) -> dict[str, list[TensorSpec | None]]:
        """The names as they look when every segment that could be a wrapper's is gone, with what is there."""
        found: dict[str, list[TensorSpec | None]] = {}
        for name, key in self.key.items():
            found.setdefault(without_wrappers(name), []).append(self.model_keys.specs[key])
        return found

    def spell(self, name: str) -> str:
        """Any name below a module of the model, as the model would write it."""
        if name in self.key:
            return self.key[name]
        for path in ancestors(".".join(parent(name).split(".", self.depth)[: self.depth])):
            if path in self.modules:
                return join(self.modules[path], without_prefix(name, path) or "")
        return join(self.added, name)
