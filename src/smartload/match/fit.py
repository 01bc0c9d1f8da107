"""Try one candidate: pair the file's names with the model's, and give every name without a partner its reason. Pure.

`Fitter.fit` pairs by name alone, then resolves clashes, compares shapes, and explains what is missing and what is
unexpected. Names decide and shapes may only veto: two tensors of one shape are never paired because of it.
"""

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

PROFILER_COUNTERS = ("total_ops", "total_params")
"""Buffers that the profiler thop registers in every module; people save models after profiling them."""


def is_batch_counter(key: str) -> bool:
    """Tell whether a key is a batch norm's counter of batches.

    Files from before torch 0.4.1 lack them all, so where they are missing they say nothing about the cause.
    """
    return leaf(key) == "num_batches_tracked"


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether one of the glob patterns matches the whole name.

    >>> matches("fc.weight", ["fc.*"]), matches("head.fc.weight", ["fc.*"])
    (True, False)
    """
    # fnmatchcase: plain fnmatch ignores case on Windows, and keys differ by case.
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def same_shape(file: TensorSpec | None, model: TensorSpec | None) -> bool:
    """Tell whether a tensor of the file has the shape of the model's; a shape that is not known yet equals any.

    >>> same_shape(TensorSpec((2, 3), "float16"), TensorSpec((2, 3), "float32"))
    True
    >>> same_shape(TensorSpec((2, 3), "float32"), TensorSpec((3, 2), "float32"))
    False
    """
    if file is None or model is None or file.shape is None or model.shape is None:
        return True
    # torch 0.3 had no tensors without dimensions; its load_state_dict, too, takes (1,) for () since then.
    return file.shape == model.shape or (model.shape == () and file.shape == (1,))


def reason_to_keep(key: str, model_keys: ModelKeys) -> str:
    """Say why a key of the model may keep its value where the file lacks it; "" where it may not."""
    if not key.endswith((AVERAGED, *PROFILER_COUNTERS)):  # nearly every key, recognised without a split
        return ""
    last, spec = leaf(key), model_keys.specs[key]
    if last == AVERAGED and join(parent(key), "module") in model_keys.wrappers:
        return "bookkeeping of AveragedModel, not in the file"
    if last in PROFILER_COUNTERS and spec is not None and spec.shape in ((), (1,)):
        return "a counter of the profiler thop, not in the file"
    return ""


@dataclass(slots=True)
class Fit:
    """What came of trying one candidate: the pairs, and every name without a partner with its reason.

    Complete where nothing is missing, unexpected or in another shape, and no two names of the file want one key.
    """

    removed: str
    """The path in the file below which names were taken."""
    model: ModelNames
    """The model's names; `model.added` is the prefix that was added to the file's."""
    pairs: dict[str, str] = field(default_factory=dict)
    """Model key -> name in the file."""
    adapted: dict[str, str] = field(default_factory=dict)
    """Name in the file -> the same without the removed prefix and without wrappers, renamed."""
    rules: set[str] = field(default_factory=set)
    """The rules of `rename` that changed a name."""
    missing: list[str] = field(default_factory=list)
    """Model keys that the file lacks."""
    unexpected: list[str] = field(default_factory=list)
    """Names of the file that the model lacks."""
    shapes: list[str] = field(default_factory=list)
    """Model keys whose tensor in the file has another shape; they are in `pairs`, too."""
    clashes: dict[str, list[str]] = field(default_factory=dict)
    """Model key -> the names of the file that would all fill it."""
    twice: list[str] = field(default_factory=list)
    """Names that the file, once renamed, has for two tensors."""
    buffers: dict[str, str] = field(default_factory=dict)
    """Name in the file -> the non-persistent buffer of the model that it may equal; the data decides."""
    ignored: list[Ignored] = field(default_factory=list)
    """Names of the file that need no partner, and why."""
    kept: list[Ignored] = field(default_factory=list)
    """Model keys that need no partner, and why."""
    allowed_missing: list[str] = field(default_factory=list)
    allowed_unexpected: list[str] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)
    """Keys without a partner, or in another shape, that the model's own loading code handles."""

    @property
    def complete(self) -> bool:
        """Whether every name has its partner or a reason; a load of nothing at all is not complete."""
        loads_nothing = not self.pairs and bool(self.allowed_missing or self.allowed_unexpected)
        return not (self.missing or self.unexpected or self.shapes or self.clashes or self.twice or loads_nothing)

    @property
    def taken(self) -> frozenset[str]:
        """The names of the file that are loaded."""
        return frozenset(self.pairs.values())


@dataclass(frozen=True, slots=True)
class Fitter:
    """Tries candidates for one file and one call.

    Attributes:
        file: the names of the file.
        renames: the caller's `rename`.
        options: the caller's other arguments about keys.
    """

    file: FileNames
    renames: Renames
    options: Options

    def fit(self, model: ModelNames, removed: str) -> Fit:
        """Try the names below the path `removed` as names of the model."""
        fit = self._fit(model, removed)
        # A network may have a real child of a wrapper's name, 'module' say. Names are taken as they are first; only
        # where that is not complete may an only child of the file be a wrapper around several children of the model.
        if not fit.complete and model.has_namesakes:
            second = self._fit(model, removed, self._stripper_for_namesakes(model, removed))
            if second.complete:
                return second
        return fit

    def begins_as(self, model: ModelNames, part: str) -> bool:
        """Tell whether the first name below a path is one of the model's, as it is or without wrappers."""
        first = next(iter(self.file.under(part)), part)[len(part) + bool(part) :]
        return first in model.key or without_wrappers(first) in model.bare

    def _stripper_for_namesakes(self, model: ModelNames, removed: str) -> WrapperStripper:
        """Make the stripper for a model with a real child called `module`.

        Where 'net.module' is the only child of 'net' in the file, and 'net' has several children in the model, then it
        is a wrapper there and not the real child.
        """
        required = (name for name, key in model.key.items() if not self.may_be_missing(model, key))
        # The file's paths are longer than the model's by the wrappers in them; nobody has 16 of these in a path.
        depth = model.depth + 16
        start = len(removed) + bool(removed)
        only = only_child_wrappers((name[start:] for name in self.file.under(removed)), depth)
        return WrapperStripper(model.modules, only, model.crowded(required))

    def _fit(self, model: ModelNames, removed: str, stripper: WrapperStripper | None = None) -> Fit:
        fit = Fit(removed, model)
        unmatched = self._pair(fit, stripper)
        # In this order: a clash that is resolved leaves a pair, a shape that is forgiven leaves a key missing.
        self._resolve_clashes(fit)
        self._check_shapes(fit)
        self._explain_missing(fit)
        self._explain_unexpected(fit, unmatched)
        return fit

    def _pair(self, fit: Fit, stripper: WrapperStripper | None) -> list[str]:
        """Pair by name; give the names of the file that are no name of the model.

        Without a `stripper`, a name that is the model's as it is stays as it is.
        """
        unmatched: list[str] = []
        # All in local variables: this loop runs for every name of every candidate.
        keys, pairs, adapted_names = fit.model.key, fit.pairs, fit.adapted
        start, as_it_is, renaming = len(fit.removed) + bool(fit.removed), stripper is None, bool(self.renames)
        for name in self.file.under(fit.removed):
            tail = name[start:]
            adapted = tail if as_it_is and tail in keys else (stripper or fit.model.stripper).strip(tail)
            if renaming:
                adapted = self._renamed(fit, name, adapted)
            adapted_names[name] = adapted
            key = keys.get(adapted)
            if key is None:
                unmatched.append(name)
            elif pairs.setdefault(key, name) != name:
                fit.clashes.setdefault(key, [pairs[key]]).append(name)
        fit.twice = [name for name in self.file.twice if name in adapted_names]
        return unmatched

    def _renamed(self, fit: Fit, name: str, adapted: str) -> str:
        """Rename the adapted name, unless a rule applied to the name as the file has it, and note the rule."""
        rule = self.file.rule.get(name)
        if rule is None:
            adapted, rule = self.renames.prefix(adapted)
            if rule is not None and adapted not in fit.model.key:
                adapted = fit.model.stripper.strip(adapted)  # the rule may have been written with a wrapper's segment
        if rule is not None:
            fit.rules.add(rule)
        return adapted

    def _resolve_clashes(self, fit: Fit) -> None:
        """Take, of several names for one key, the one that the caller did not allow to be unexpected.

        The same for a tied tensor that the file has under several of its names.
        """
        if not self.options.allow_unexpected:
            return
        for key, names in list(fit.clashes.items()):
            remaining = [name for name in names if not self.is_allowed_as_stored(name)]
            if len(remaining) == 1:  # with two left it stays a clash, with none it is not said which is meant
                fit.pairs[key] = remaining[0]
                fit.allowed_unexpected += [name for name in names if name != remaining[0]]
                del fit.clashes[key]
        for group in fit.model.model_keys.tied:
            paired = [key for key in group if key in fit.pairs]
            allowed = [key for key in paired if self.is_allowed_as_stored(fit.pairs[key])]
            for key in allowed if len(allowed) < len(paired) else ():
                fit.allowed_unexpected.append(fit.pairs.pop(key))

    def is_allowed_as_stored(self, name: str) -> bool:
        """Tell whether `allow_unexpected` matches the name as the file has it, dotted or in its own dict."""
        allowed = self.options.allow_unexpected
        return matches(self.file.keys[name].dotted, allowed) or matches(self.file.keys[name].key, allowed)

    def may_be_unexpected(self, fit: Fit, name: str) -> bool:
        """Tell whether `allow_unexpected` matches the name, as the file has it or adapted."""
        allowed = self.options.allow_unexpected
        return bool(allowed) and (self.is_allowed_as_stored(name) or matches(fit.adapted.get(name, name), allowed))

    def may_be_missing(self, model: ModelNames, key: str) -> bool:
        """Tell whether `allow_missing` matches the model key, with or without the segments of its wrappers."""
        allowed = self.options.allow_missing
        return bool(allowed) and (matches(key, allowed) or matches(model.unwrapped(key), allowed))

    def _check_shapes(self, fit: Fit) -> None:
        """Note the keys whose shapes differ; dissolve the pair where both arguments allow it."""
        specs = fit.model.model_keys.specs
        for key, name in list(fit.pairs.items()):
            if same_shape(self.file.keys[name].spec, specs[key]):
                continue
            # Both, because both happen: the model's key is missing, and the file's tensor is left out.
            if self.may_be_missing(fit.model, key) and self.may_be_unexpected(fit, name):
                del fit.pairs[key]
                fit.allowed_unexpected.append(name)
            else:
                fit.shapes.append(key)

    def _explain_missing(self, fit: Fit) -> None:
        """Fill tied keys from their group; find for every other key without a pair what allows it to be missing."""
        model_keys, pairs = fit.model.model_keys, fit.pairs
        if len(pairs) == len(model_keys.specs):
            return
        # Before anything is called missing: torch writes a tied tensor under each of its keys, other writers once.
        for group in model_keys.tied:
            source = next((pairs[key] for key in group if key in pairs), None)
            if source is not None:
                for key in group:
                    pairs.setdefault(key, source)
        for key in model_keys.specs:
            if key in pairs:
                continue
            # What the caller said comes before what is known of wrappers: the report then names the argument.
            if self.may_be_missing(fit.model, key):
                fit.allowed_missing.append(key)
            elif reason := reason_to_keep(key, model_keys):
                fit.kept.append(Ignored(key, reason))
            else:
                fit.missing.append(key)

    def _explain_unexpected(self, fit: Fit, unmatched: list[str]) -> None:
        """Find for every name that is no name of the model what allows it to be unexpected."""
        keys = self.file.keys
        # Dicts that give no tensor at all are other things: an EMA copy of another network, say. Where nothing pairs
        # off, all dicts count, so that the refusal has names to show.
        contributing = {keys[name].part for name in fit.pairs.values()} or {keys[name].part for name in unmatched}
        non_persistent = fit.model.model_keys.non_persistent
        for name in unmatched:
            buffer = fit.model.non_persistent.get(fit.adapted[name])
            if self.may_be_unexpected(fit, name):
                fit.allowed_unexpected.append(name)
            elif keys[name].part not in contributing:
                fit.ignored.append(Ignored(name, "another part of the file"))
            elif reason := self._reason_to_ignore(name):
                fit.ignored.append(Ignored(name, reason))
            elif buffer is not None and same_shape(self.file.keys[name].spec, non_persistent[buffer]):
                fit.buffers[name] = buffer  # saved while it was persistent; harmless if it is the same
            else:
                fit.unexpected.append(name)

    def _reason_to_ignore(self, name: str) -> str:
        """Say why a name of the file needs no partner; "" where it needs one."""
        last, spec = leaf(name), self.file.keys[name].spec
        # An extra state is data of the model: it needs its partner as a tensor does.
        if spec is None:
            return "" if last == "_extra_state" else "not a tensor"
        if last in PROFILER_COUNTERS and spec.shape in ((), (1,)):
            return "a counter of the profiler thop"
        # AveragedModel has the counter beside the module that it wraps; elsewhere the name is a tensor like any other.
        if last == AVERAGED and self.file.count(join(parent(name), "module")):
            return "bookkeeping of AveragedModel"
        return ""

    def account_for_others(self, fit: Fit) -> None:
        """Give the names of the file outside of the candidate their reasons, or note that they clash with it.

        No tensor is dropped in silence: 'fc.bias' beside a complete 'model.fc.bias' is a second value for one key.
        """
        file = self.file
        all_taken = file.count(fit.removed) == len(file.keys)
        outside = [] if all_taken else [name for name in file.keys if without_prefix(name, fit.removed) is None]
        if not (outside or fit.ignored):
            return
        contributing = {file.keys[name].part for name in fit.pairs.values()}
        key_of = {without_wrappers(name): key for key, name in fit.pairs.items()}
        for name in [*outside, *(item.key for item in fit.ignored)]:
            if file.keys[name].spec is None and leaf(name) != "_extra_state":
                continue
            # A clash: it differs from a name that is loaded in nothing but wrappers' segments, wherever it lies ...
            key = key_of.get(without_wrappers(name))
            # ... or it is, without the removed prefix, a key of the model, in a dict that gives tensors.
            if key is None and file.keys[name].part in contributing and name not in fit.adapted:
                key = fit.model.key.get(fit.model.stripper.strip(file.tail(name)))
            if key in fit.pairs and key is not None and not self.may_be_unexpected(fit, name):
                fit.clashes.setdefault(key, [fit.pairs[key]]).append(name)
        for name in outside:
            if self.may_be_unexpected(fit, name):
                fit.allowed_unexpected.append(name)
            elif file.keys[name].part not in contributing or file.keys[name].spec is None:
                fit.ignored.append(Ignored(name, "another part of the file"))
            else:
                fit.ignored.append(Ignored(name, self._reason_to_ignore(name) or f"outside of {fit.removed!r}"))
