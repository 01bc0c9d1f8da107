"""The two sides of a match: the names of a file, and the names of a model. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import islice

from smartload.records.data import Manifest, TensorSpec
from smartload.records.keys import WRAPPER_SEGMENTS, Renames, SeeThrough, ancestors, below, blind, join, leaf, parent

MOST_LEVELS = 16
"""Levels of dicts in dicts, and wrappers in wrappers, that are looked at; far more than any file has."""


class FileNames:
    """The names of a file's tensors, dotted through all its dicts, after the renaming of whole names.

    `stored[name]` is the full name that the file has for it, `own[name]` its key in its own dict, `rule[name]` the
    rule that renamed it; `twice[name]` is the second tensor that would have this name; `used` are all rules of use.
    """

    def __init__(self, parts: Mapping[str, Mapping[str, TensorSpec | None]], renames: Renames, base: str = "") -> None:
        self.spec: dict[str, TensorSpec | None] = {}
        self.part: dict[str, str] = {}
        self.stored: dict[str, str] = {}
        self.own: dict[str, str] = {}
        self.rule: dict[str, str] = {}
        self.twice: dict[str, str] = {}
        self.used: set[str] = set()
        self.parts = tuple(parts)
        for path, specs in parts.items():
            if not (renames or self.spec):
                self._take(path, specs, base)
                continue
            for key, spec in specs.items():
                new, rule = renames.whole(key) if renames else (key, None)
                name, stored = join(path, new), join(base, path, key)
                if rule is not None:
                    self.used.add(rule)
                if name in self.spec:
                    self.twice[name] = stored
                    continue
                if rule is not None:
                    self.rule[name] = rule
                self.spec[name], self.part[name] = spec, path
                self.stored[name], self.own[name] = stored, key

    def _take(self, path: str, specs: Mapping[str, TensorSpec | None], base: str) -> None:
        """The names of the first part, which nothing renames and no other name can be equal to."""
        prefix, above = f"{path}." if path else "", join(base, path)
        names = [prefix + key for key in specs] if prefix else list(specs)
        full = f"{above}." if above else ""
        self.spec = dict(zip(names, specs.values()))
        self.part = dict.fromkeys(names, path)
        self.stored = {name: full + key for name, key in zip(names, specs)} if full else dict(zip(names, names))
        self.own = dict(zip(names, specs))

    @cached_property
    def _sorted(self) -> list[str]:
        return sorted(self.spec)

    def _range(self, prefix: str) -> tuple[int, int]:
        names = self._sorted
        return bisect_left(names, prefix + "."), bisect_left(names, prefix + "/")  # "/" follows "."

    def under(self, prefix: str) -> list[str]:
        """The names that begin with the whole segments of `prefix`; in the file's order where that is all of them."""
        if not prefix:
            return list(self.spec)
        start, end = self._range(prefix)
        return self._sorted[start:end]

    def count(self, prefix: str) -> int:
        """How many names begin with the whole segments of `prefix`."""
        start, end = self._range(prefix) if prefix else (0, len(self.spec))
        return end - start

    def tail(self, name: str) -> str:
        """The name in its own dict, after the renaming."""
        return name[len(part) + 1 :] if (part := self.part[name]) else name

    @cached_property
    def containers(self) -> tuple[str, ...]:
        """The paths of all dicts that hold tensors, at any depth."""
        return tuple(dict.fromkeys(path for part in self.parts for path in (*islice(ancestors(part), MOST_LEVELS), "")))


def within(model: Manifest, path: str) -> Manifest:
    """What the module at the path wants by itself."""

    def inner(names: Iterable[str]) -> list[str]:
        return [name for each in names if (name := below(each, path)) is not None]

    return replace(
        model,
        specs={name: model.specs[join(path, name)] for name in inner(model.specs)},
        aliases=tuple(tuple(group) for names in model.aliases if len(group := inner(names)) > 1),
        transient={name: model.transient[join(path, name)] for name in inner(model.transient)},
    )


class ModelNames:
    """The model's names, without its wrappers' segments and, where `added` is given, without that common prefix."""

    def __init__(self, model: Manifest, added: str = "") -> None:
        self.manifest, self.added = model, added
        self._module: dict[str, str] = {"": ""}
        # Where a wrapper has a name of its own that is also one of the network's, the network's is meant.
        plain = map(self.plain, model.specs) if model.wrappers else model.specs
        self.key = dict(zip(plain, model.specs))
        if added:
            self.key = {name: key for path, key in self.key.items() if (name := below(path, added)) is not None}
        self.transient = {below(self.plain(key), added): key for key in model.transient}

    def plain(self, key: str) -> str:
        """The model's key without the segments of its wrappers."""
        if not self.manifest.wrappers:
            return key
        path, _, last = key.rpartition(".")
        base = self._module.get(path) or self._plain_module(path)
        return f"{base}.{last}" if base else last

    def _plain_module(self, path: str) -> str:
        known = self._module.get(path)
        if known is None:
            base = self._plain_module(parent(path))
            known = base if path in self.manifest.wrappers else join(base, leaf(path))
            self._module[path] = known
        return known

    @cached_property
    def modules(self) -> dict[str, str]:
        """Module path without wrappers -> the innermost module of the model that has it."""
        found: dict[str, str] = {}
        for path in {parent(key) for key in self.manifest.specs}:
            self._plain_module(path)
        for path, plain in self._module.items():
            name = below(plain, self.added) if plain != self.added else ""
            if name is not None and len(path) >= len(found.get(name, "")):
                found[name] = path
        return found

    @cached_property
    def see(self) -> SeeThrough:
        """Reads names of a file as this model spells them."""
        return SeeThrough(self.modules)

    @cached_property
    def depth(self) -> int:
        """Segments of the longest name."""
        return max((name.count(".") for name in self.key), default=0) + 1

    @cached_property
    def has_namesakes(self) -> bool:
        """Whether a real module has a name that wrappers use as well."""
        return any(leaf(path) in WRAPPER_SEGMENTS for path in self.modules)

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
    def blind(self) -> dict[str, list[TensorSpec | None]]:
        """The names as they look when every segment that could be a wrapper's is gone, with what is there."""
        found: dict[str, list[TensorSpec | None]] = {}
        for name, key in self.key.items():
            found.setdefault(blind(name), []).append(self.manifest.specs[key])
        return found

    def spell(self, name: str) -> str:
        """Any name below a module of the model, as the model would write it."""
        if name in self.key:
            return self.key[name]
        for path in ancestors(".".join(parent(name).split(".", self.depth)[: self.depth])):
            if path in self.modules:
                return join(self.modules[path], below(name, path) or "")
        return join(self.added, name)
