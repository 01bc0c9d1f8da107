"""How far one reading of the file's names fits the model: pairs, and everything that has no partner. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from smartload.match.names import FileNames, ModelNames
from smartload.records.entries import TensorSpec
from smartload.records.keys import (
    Renames,
    WrapperStripper,
    join,
    leaf,
    only_child_wrappers,
    parent,
    without_prefix,
    without_wrappers,
)
from smartload.records.requests import Ignored, ModelKeys, Options
from smartload.records.wrappers import AVERAGED

COUNTERS = ("total_ops", "total_params")
"""What the profiler thop registers in every module."""


def is_counter(key: str) -> bool:
    """Whether a key is a counter of batch norm, which old files lack, and which says nothing of what is wrong."""
    return leaf(key) == "num_batches_tracked"


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the glob patterns fits the name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def same_shape(file: TensorSpec | None, model: TensorSpec | None) -> bool:
    """Whether the file's tensor may go there: equal shapes, open ones, and (1,) for () as torch 0.3 wrote scalars."""
    if file is None or model is None or file.shape is None or model.shape is None:
        return True
    return file.shape == model.shape or (model.shape == () and file.shape == (1,))


def excuse(key: str, model_keys: ModelKeys) -> str:
    """Why a key of the model may keep its value where the file does not have it; empty where it may not."""
    if not key.endswith((AVERAGED, *COUNTERS)):
        return ""
    last, spec = leaf(key), model_keys.specs[key]
    if last == AVERAGED and join(parent(key), "module") in model_keys.wrappers:
        return "bookkeeping of AveragedModel, not in the file"
    if last in COUNTERS and spec is not None and spec.shape in ((), (1,)):
        return "a counter of the profiler thop, not in the file"
    return ""


@dataclass(slots=True)
class Fit:
    """What comes of reading the file's names below `removed`, in front of which the model has `added`."""

    removed: str
    model: ModelNames
    pairs: dict[str, str] = field(default_factory=dict)
    """Model key -> name in the file."""
    names: dict[str, str] = field(default_factory=dict)
    """What the file's names are called once adapted."""
    rules: set[str] = field(default_factory=set)
    """The rules of `rename` that were of use."""
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    clashes: dict[str, list[str]] = field(default_factory=dict)
    """Model key -> the names of the file that would all fill it."""
    twice: list[str] = field(default_factory=list)
    """Names that the file, once renamed, has for two tensors."""
    buffers: dict[str, str] = field(default_factory=dict)
    """Leftovers that may be equal to a non-persistent buffer of the model: name in the file -> model key."""
    ignored: list[Ignored] = field(default_factory=list)
    kept: list[Ignored] = field(default_factory=list)
    allowed_missing: list[str] = field(default_factory=list)
    allowed_unexpected: list[str] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)
    """Keys without a partner that the model's own loading code sees to."""

    @property
    def complete(self) -> bool:
        """Whether every name has its partner, or a reason; a load of nothing at all is none."""
        nothing = not self.pairs and bool(self.allowed_missing or self.allowed_unexpected)
        return not (self.missing or self.unexpected or self.shapes or self.clashes or self.twice or nothing)

    @property
    def taken(self) -> frozenset[str]:
        """The names of the file that are loaded."""
        return frozenset(self.pairs.values())


@dataclass(frozen=True, slots=True)
class Fitter:
    """One file and one call: what every reading of the names shares."""

    file: FileNames
    renames: Renames
    options: Options

    def fit(self, model: ModelNames, removed: str) -> Fit:
        """Read the names below `removed` as names of the model, and give every name a partner or a reason."""
        found = self._fit(model, removed)
        if not found.complete and model.has_namesakes:
            second = self._fit(model, removed, self._told_apart(model, removed))
            if second.complete:
                return second
        return found

    def begins_as(self, model: ModelNames, part: str) -> bool:
        """Whether the first name below a path is one of the model's, as it is or with wrappers seen through."""
        first = next(iter(self.file.under(part)), part)[len(part) + bool(part) :]
        return first in model.key or without_wrappers(first) in model.bare

    def _told_apart(self, model: ModelNames, removed: str) -> WrapperStripper:
        """See-through for a model with a real child called `module`: an only child where the model has several."""
        wanted = (name for name, key in model.key.items() if not self.may_miss(model, key))
        depth = model.depth + 16
        start = len(removed) + bool(removed)
        only = only_child_wrappers((name[start:] for name in self.file.under(removed)), depth)
        return WrapperStripper(model.modules, only, model.crowded(wanted))

    def _fit(self, model: ModelNames, removed: str, see: WrapperStripper | None = None) -> Fit:
        found = Fit(removed, model)
        strays = self._pair(found, see)
        self._settle_clashes(found)
        self._settle_shapes(found)
        self._settle_missing(found)
        self._settle_strays(found, strays)
        return found

    def _pair(self, found: Fit, see: WrapperStripper | None) -> list[str]:
        strays: list[str] = []
        keys, pairs, names = found.model.key, found.pairs, found.names
        start, plainly, renaming = len(found.removed) + bool(found.removed), see is None, bool(self.renames)
        for name in self.file.under(found.removed):
            tail = name[start:]
            adapted = tail if plainly and tail in keys else (see or found.model.stripper).strip(tail)
            if renaming:
                adapted = self._renamed(found, name, adapted)
            names[name] = adapted
            key = keys.get(adapted)
            if key is None:
                strays.append(name)
            elif pairs.setdefault(key, name) != name:
                found.clashes.setdefault(key, [pairs[key]]).append(name)
        found.twice = [name for name in self.file.twice if name in names]
        return strays

    def _renamed(self, found: Fit, name: str, adapted: str) -> str:
        """The adapted name under the caller's rules, where the name as it lies in the file had none."""
        rule = self.file.rule.get(name)
        if rule is None:
            adapted, rule = self.renames.prefix(adapted)
            if rule is not None and adapted not in found.model.key:
                adapted = found.model.stripper.strip(adapted)  # the rule may have been written with a wrapper's segment
        if rule is not None:
            found.rules.add(rule)
        return adapted

    def _settle_clashes(self, found: Fit) -> None:
        """Several names for one key: all but one may be left out on demand; so may one name of a tied tensor."""
        if not self.options.allow_unexpected:
            return
        for key, names in list(found.clashes.items()):
            remaining = [name for name in names if not self.named(name)]
            if len(remaining) == 1:
                found.pairs[key] = remaining[0]
                found.allowed_unexpected += [name for name in names if name != remaining[0]]
                del found.clashes[key]
        for group in found.model.model_keys.tied:
            present = [key for key in group if key in found.pairs]
            out = [key for key in present if self.named(found.pairs[key])]
            for key in out if len(out) < len(present) else ():
                found.allowed_unexpected.append(found.pairs.pop(key))

    def named(self, name: str) -> bool:
        """Whether the caller allowed this name as the file spells it."""
        allowed = self.options.allow_unexpected
        return matches(self.file.keys[name].dotted, allowed) or matches(self.file.keys[name].key, allowed)

    def may_go(self, found: Fit, name: str) -> bool:
        """Whether the caller allowed this name of the file, as it is spelled there or as it reads once adapted."""
        allowed = self.options.allow_unexpected
        return bool(allowed) and (self.named(name) or matches(found.names.get(name, name), allowed))

    def may_miss(self, model: ModelNames, key: str) -> bool:
        """Whether the caller allowed this key of the model, with or without the segments of its wrappers."""
        allowed = self.options.allow_missing
        return bool(allowed) and (matches(key, allowed) or matches(model.unwrapped(key), allowed))

    def _settle_shapes(self, found: Fit) -> None:
        specs = found.model.model_keys.specs
        for key, name in list(found.pairs.items()):
            if same_shape(self.file.keys[name].spec, specs[key]):
                continue
            if self.may_miss(found.model, key) and self.may_go(found, name):
                del found.pairs[key]
                found.allowed_unexpected.append(name)
            else:
                found.shapes.append(key)

    def _settle_missing(self, found: Fit) -> None:
        model_keys, pairs = found.model.model_keys, found.pairs
        if len(pairs) == len(model_keys.specs):
            return
        for group in model_keys.tied:
            source = next((pairs[key] for key in group if key in pairs), None)
            if source is not None:
                for key in group:
                    pairs.setdefault(key, source)
        for key in model_keys.specs:
            if key in pairs:
                continue
            if self.may_miss(found.model, key):
                found.allowed_missing.append(key)
            elif reason := excuse(key, model_keys):
                found.kept.append(Ignored(key, reason))
            else:
                found.missing.append(key)

    def _settle_strays(self, found: Fit, strays: list[str]) -> None:
        keys = self.file.keys
        contributing = {keys[name].part for name in found.pairs.values()} or {keys[name].part for name in strays}
        non_persistent = found.model.model_keys.non_persistent
        for name in strays:
            buffer = found.model.non_persistent.get(found.names[name])
            if self.may_go(found, name):
                found.allowed_unexpected.append(name)
            elif keys[name].part not in contributing:
                found.ignored.append(Ignored(name, "another part of the file"))
            elif reason := self._reason(name):
                found.ignored.append(Ignored(name, reason))
            elif buffer is not None and same_shape(self.file.keys[name].spec, non_persistent[buffer]):
                found.buffers[name] = buffer
            else:
                found.unexpected.append(name)

    def _reason(self, name: str) -> str:
        """Why a name of the file need not have a partner; empty where it must."""
        last, spec = leaf(name), self.file.keys[name].spec
        if spec is None:
            return "" if last == "_extra_state" else "not a tensor"
        if last in COUNTERS and spec.shape in ((), (1,)):
            return "a counter of the profiler thop"
        if last == AVERAGED and self.file.count(join(parent(name), "module")):
            return "bookkeeping of AveragedModel"
        return ""

    def look_outside(self, found: Fit) -> None:
        """Names beside `removed`: other parts of the file, unless they would fill the same keys."""
        file = self.file
        whole = file.count(found.removed) == len(file.keys)
        beside = [] if whole else [name for name in file.keys if without_prefix(name, found.removed) is None]
        if not (beside or found.ignored):
            return
        contributing = {file.keys[name].part for name in found.pairs.values()}
        own = {without_wrappers(name): key for key, name in found.pairs.items()}
        # A name that differs from one that is loaded in nothing but wrapper segments, wherever it lies ...
        for name in [*beside, *(item.key for item in found.ignored)]:
            if file.keys[name].spec is None and leaf(name) != "_extra_state":
                continue
            key = own.get(without_wrappers(name))
            # ... or that is, without what was removed, a key of the model itself.
            if key is None and file.keys[name].part in contributing and name not in found.names:
                key = found.model.key.get(found.model.stripper.strip(file.tail(name)))
            if key in found.pairs and key is not None and not self.may_go(found, name):
                found.clashes.setdefault(key, [found.pairs[key]]).append(name)
        for name in beside:
            if self.may_go(found, name):
                found.allowed_unexpected.append(name)
            elif file.keys[name].part not in contributing or file.keys[name].spec is None:
                found.ignored.append(Ignored(name, "another part of the file"))
            else:
                found.ignored.append(Ignored(name, self._reason(name) or f"outside of {found.removed!r}"))
