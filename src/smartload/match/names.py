"""Hold the two sides of a match: the names of a file, and the names of a model, as they are compared. Pure.

What several candidates ask for is computed once and kept: one file may be tried under thousands of prefixes.
"""

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
"""Dicts in dicts, and wrappers in one path, that are followed. Real files have two or three; a hostile one has
thousands, and each level is a candidate."""

Parts = Mapping[str, Sequence[FileKey]]
"""The keys of a file, or of what `select` took of it: dotted path of each state dict -> its keys."""


class FileNames:
    """The keys of a file by their names: the dotted key, after the caller's `rename`.

    Two keys may get one name by renaming. The first has it, the second is kept in `twice` for the refusal.

    Attributes:
        parts: the dotted paths of the file's state dicts.
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
            if not renames:  # the usual case, without a call for each key
                named = {prefix + key.key: key for key in keys}
                if len(named) == len(keys) and self.keys.keys().isdisjoint(named):
                    self.keys.update(named)
                    continue
                # Otherwise two dicts give one name, as a key "m.w" at the top and the key "w" of a dict "m" do.
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
        # In order, all names with one prefix are neighbours: each prefix is found without a pass over all names.
        return sorted(self.keys)

    def _range(self, prefix: str) -> tuple[int, int]:
        """Give the slice of the sorted names that begin with `prefix` and a dot."""
        names = self._sorted
        return bisect_left(names, prefix + "."), bisect_left(names, prefix + "/")  # "/" is the character after "."

    def under(self, prefix: str) -> list[str]:
        """Give the names below a path; in the file's order for the path "", which has all of them."""
        if not prefix:
            return list(self.keys)
        start, end = self._range(prefix)
        return self._sorted[start:end]

    def count(self, prefix: str) -> int:
        """Count the names below a path."""
        start, end = self._range(prefix) if prefix else (0, len(self.keys))
        return end - start

    # By the part's path, which rename does not change: rules apply to keys within their dict.
    def tail(self, name: str) -> str:
        """Give a name without the path of its dict: 'state_dict.fc.weight' -> 'fc.weight'."""
        return name[len(part) + 1 :] if (part := self.keys[name].part) else name

    @cached_property
    def containers(self) -> tuple[str, ...]:
        """The paths of all dicts that hold tensors, themselves or further in; "" is the whole file."""
        return tuple(dict.fromkeys(path for part in self.parts for path in (*islice(ancestors(part), MOST_LEVELS), "")))


def within(model: ModelKeys, path: str) -> ModelKeys:
    """Give the keys of one module of the model, as they are where it is a model by itself."""

    def inner(names: Iterable[str]) -> list[str]:
        return [name for each in names if (name := without_prefix(each, path)) is not None]

    # A tied group of which one key is left is tied to nothing in that module.
    return replace(
        model,
        specs={name: model.specs[join(path, name)] for name in inner(model.specs)},
        tied=tuple(tuple(group) for names in model.tied if len(group := inner(names)) > 1),
        non_persistent={name: model.non_persistent[join(path, name)] for name in inner(model.non_persistent)},
    )


class ModelNames:
    """The names of a model as a file may have them: without its wrappers' segments and without the prefix `added`.

    Attributes:
        model_keys: the keys of the model.
        added: the prefix that a candidate adds to the file's names. It is left out here instead: one change of the
            model's names stands for a change of every name of the file.
        key: name -> model key. Where a prefix is added, only the keys that have it.
        non_persistent: name -> non-persistent buffer of the model.
    """

    def __init__(self, model: ModelKeys, added: str = "") -> None:
        self.model_keys, self.added = model, added
        self._unwrapped_path: dict[str, str] = {"": ""}
        # Two keys may be one name without the segments: a wrapper's own buffer and the network's. The later key has it,
        # the network's, because a wrapper's own tensors come first in a state dict.
        unwrapped = map(self.unwrapped, model.specs) if model.wrappers else model.specs
        self.key = dict(zip(unwrapped, model.specs))
        if added:
            self.key = {
                name: key for path, key in self.key.items() if (name := without_prefix(path, added)) is not None
            }
        self.non_persistent = {without_prefix(self.unwrapped(key), added): key for key in model.non_persistent}

    def unwrapped(self, key: str) -> str:
        """Give a key of the model without the segments of its wrappers: 'module.fc.weight' -> 'fc.weight'."""
        if not self.model_keys.wrappers:  # most models: nothing is removed, and nothing split
            return key
        path, _, last = key.rpartition(".")
        base = self._unwrapped_path.get(path) or self._unwrapped_module(path)
        return f"{base}.{last}" if base else last

    def _unwrapped_module(self, path: str) -> str:
        """Give a module path without wrappers, and keep it: the keys of one module share it."""
        new = []  # a loop, since modules may be nested deeper than Python nests calls
        while (unwrapped := self._unwrapped_path.get(path)) is None:
            new.append(path)
            path = parent(path)
        for path in reversed(new):
            unwrapped = unwrapped if path in self.model_keys.wrappers else join(unwrapped, leaf(path))
            self._unwrapped_path[path] = unwrapped
        return unwrapped

    @cached_property
    def modules(self) -> dict[str, str]:
        """Module path without wrappers -> the innermost module of the model that has it.

        Of DataParallel(net) both the wrapper and 'module' have the path ""; 'module' is the network itself.
        """
        found: dict[str, str] = {}
        for path in {parent(key) for key in self.model_keys.specs}:
            self._unwrapped_module(path)
        for path, unwrapped in self._unwrapped_path.items():
            name = without_prefix(unwrapped, self.added) if unwrapped != self.added else ""
            # The longest path is the innermost: wrappers only add segments.
            if name is not None and len(path) >= len(found.get(name, "")):
                found[name] = path
        return found

    @cached_property
    def stripper(self) -> WrapperStripper:
        """What removes from names of a file the wrappers' segments that this model does not have."""
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
        """Give the paths above the names that have more than one child."""
        # The first child of each module; a second one that differs makes it crowded.
        first: dict[str, str] = {}
        several: set[str] = set()
        for name in names:
            for path in ancestors(name):
                if path and first.setdefault(parent(path), path) != path:
                    several.add(parent(path))
        return frozenset(several)

    @cached_property
    def bare(self) -> dict[str, list[TensorSpec | None]]:
        """Name without any segment that could be a wrapper's -> the specs of the keys that have it.

        For counting votes only: real children called 'module' are gone from it, too.
        """
        found: dict[str, list[TensorSpec | None]] = {}
        for name, key in self.key.items():
            found.setdefault(without_wrappers(name), []).append(self.model_keys.specs[key])
        return found

    def spell(self, name: str) -> str:
        """Give a name that need not be a key the spelling that it has in the model, with its wrappers' segments.

        The longest part of its path that is a module of the model counts: 'fc.weight_g' -> 'module.fc.weight_g'.
        """
        if name in self.key:
            return self.key[name]
        # Cut first: a hostile name may have more segments than the model is deep, and each path above it is a copy.
        for path in ancestors(".".join(parent(name).split(".", self.depth)[: self.depth])):
            if path in self.modules:
                return join(self.modules[path], without_prefix(name, path) or "")
        return join(self.added, name)
