"""What `match` asks of the data and of the model's own code, answered for one model and one checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from smartload.errors import UnreadableError
from smartload.load.entries import check_names, same_entry, why_not_loadable
from smartload.load.strict import rehearse
from smartload.load.transfer import read_tensor
from smartload.match.plan import module_paths
from smartload.match.search import match
from smartload.place.memory import memory_of
from smartload.place.survey import Survey, survey
from smartload.reading.limits import most_memory
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import ITEMSIZE, Entry, InMemory, Opaque, Stored, TensorSpec
from smartload.records.keys import join, leaf, parent, without_prefix
from smartload.records.problems import Problem
from smartload.records.report import KeyPlan
from smartload.records.requests import Ignored, Options
from smartload.records.text import printable

_NOTHING = TensorSpec((), "uint8")
"""Stands for an extra state where the model's own code is asked about names: it gets no value."""


@dataclass(frozen=True)
class DataChecker:
    """One model and one checkpoint: pairs their keys, and implements `match.choose.DataChecks`."""

    survey: Survey
    checkpoint: Checkpoint

    def match(self, options: Options) -> KeyPlan:
        """Make the plan; raise what `match` raises."""
        checkpoint = self.checkpoint
        plan = match(self.survey.keys, checkpoint.keys, checkpoint.path, options, self)
        beside = {item.path for item in checkpoint.aside}
        ignored = [item for item in plan.ignored if item.key not in beside]
        if options.select is not None:  # no tensor is dropped without being named
            named = {*plan.pairs.values(), *plan.unexpected_keys, *beside, *(item.key for item in ignored)}
            left = (name for name, entry in checkpoint.entries.items() if name not in named and entry.spec is not None)
            ignored += [Ignored(name, "not selected") for name in left]
        return replace(plan, ignored=tuple(ignored))

    def chosen(self, plan: KeyPlan) -> dict[str, Entry]:
        """Give the entry of each model key that will be loaded.

        Raises:
            AmbiguousKeysError: two entries of the file have the name of one of them.
            UnreadableError: one of them cannot be loaded.
        """
        check_names(plan.pairs.values(), self.checkpoint)
        entries = {key: self.checkpoint.entries[name] for key, name in plan.pairs.items()}
        for key, entry in entries.items():
            if isinstance(entry, Stored):
                continue
            entries[key] = entry = self._as_model_keeps_it(key, entry)
            if what := self._why_not_loadable(key, entry):
                raise UnreadableError(Problem("value", self.checkpoint.path, {"key": plan.pairs[key], "what": what}))
        self._check_lazy(entries, plan.pairs)
        return entries

    def _check_lazy(self, entries: Mapping[str, Entry], pairs: Mapping[str, str]) -> None:
        """Refuse a shape that a lazy module would take from the file, where it needs far more memory than the file has.

        Everywhere else the model says how large a tensor is. A stride of 0 repeats one element without end.
        """
        most = most_memory(sum(file.size for file in self.checkpoint.files))
        for key in (key for key, tensor in self.survey.unusual.items() if is_lazy(tensor)):
            entry = entries.get(key)
            if isinstance(entry, Stored) and (need := math.prod(entry.shape) * ITEMSIZE[entry.dtype]) > most:
                facts = {"key": printable(pairs[key]), "need": need, "have": entry.nbytes}
                raise UnreadableError(Problem("grown", self.checkpoint.path, facts))

    def _as_model_keeps_it(self, key: str, entry: Entry) -> Entry:
        """Give the caller's own object where the model, too, keeps under this key something that is no tensor."""
        if self.checkpoint.format != "memory" or self.survey.keys.specs.get(key, _NOTHING) is not None:
            return entry
        if isinstance(entry, InMemory):
            return entry if entry.original is None else InMemory(entry.original, None)
        return InMemory(entry.value, None) if isinstance(entry, Opaque) else entry

    def loadable(self, names: Mapping[str, str]) -> bool:
        """Tell whether all these entries (model key -> dotted name in the file) can be loaded."""
        entries = self.checkpoint.entries
        return not any(
            self._why_not_loadable(key, self._as_model_keeps_it(key, entries[name])) for key, name in names.items()
        )

    def _why_not_loadable(self, key: str, entry: Entry) -> str:
        target = self.survey.tensors.get(key)
        return why_not_loadable(entry, into_meta=target is None or target.is_meta)

    def metadata(self, pairs: Mapping[str, str]) -> dict[str, Mapping[str, object]] | None:
        """Give the file's `_metadata` under the module paths of the model; None where it has none.

        Without it torch takes a state dict for one of its oldest releases: BatchNorm then accepts that
        `num_batches_tracked` is missing.
        """
        stored, parts = self.checkpoint.metadata(), self.checkpoint.parts.items()
        in_file = self.checkpoint.format != "memory"
        pickled = [path for path, part in parts if in_file and part.kind.startswith("module ")]
        if not (stored or pickled):
            return None
        paths = module_paths(pairs)
        metadata = {paths[module]: entry for module, entry in stored.items() if module in paths}
        for module in self._inside(pickled, paths) if pickled else ():
            metadata.setdefault(module, {"version": self.survey.modules[module]._version})
        return metadata or None

    def _inside(self, pickled: list[str], paths: Mapping[str, str]) -> Iterator[str]:
        """Give the modules of the model whose counterparts the file holds as pickled objects.

        A pickled object has the attributes of its class's present version, and its class is the model's. Batch norm
        is left to torch, which then fills in the counter that objects of before 0.4.1 lack.
        """
        for in_file, in_model in paths.items():
            inside = any(in_file == path or without_prefix(in_file, path) is not None for path in pickled)
            if inside and in_model in self.survey.modules and not isinstance(self.survey.modules[in_model], _NormBase):
                yield in_model

    def same(self, first: str, second: str) -> bool:
        """Tell whether two tensors of the file, by dotted name, are bit for bit equal."""
        entries = self.checkpoint.entries
        return same_entry(entries[first], entries[second], self.checkpoint.files)

    def is_own(self, name: str) -> bool:
        """Tell whether a tensor in memory is the model's own: as such it is no second value of a tied tensor."""
        entry = self.checkpoint.entries[name]
        value = entry.value if isinstance(entry, InMemory) else None
        return isinstance(value, torch.Tensor) and memory_of(value) in self._model_memory

    @cached_property
    def _model_memory(self) -> frozenset[object]:
        # Made on demand: most checkpoints never ask for it.
        return frozenset(memory_of(tensor) for tensor in self.survey.tensors.values())

    def equals_buffer(self, name: str, buffer: str) -> bool:
        """Tell whether a tensor of the file has the values of the model's own non-persistent buffer."""
        own, entry = self.survey.non_persistent[buffer], self.checkpoint.entries[name]
        files = self.checkpoint.files
        value = read_tensor(entry, files) if isinstance(entry, Stored) else getattr(entry, "value", None)
        if not isinstance(value, torch.Tensor) or own.is_meta:
            return False
        # Both ways: a cast that loses digits makes different values equal in one of them.
        value_cast, own_cast = value.to(own.device, own.dtype), own.to(value.device, value.dtype)
        # By elements: torch.equal does not know every dtype (complex32).
        return value.shape == own.shape and bool((value_cast == own).all() and (own_cast == value).all())

    def accepts(self, names: Mapping[str, str], own_shapes: bool = False) -> bool:
        """Tell whether the model's own strict load takes these keys, in the file's shapes or in the model's own."""
        entries = ((key, self.checkpoint.entries[name]) for key, name in names.items())
        specs = {key: None if isinstance(entry, Opaque) else entry.spec for key, entry in entries}
        if own_shapes:
            specs |= {key: spec for key, spec in self.survey.keys.specs.items() if key in specs}
        brought = self._brought_along(names)
        specs = {key: spec for key, spec in specs.items() if key not in brought}
        # What an extra state holds is not asked: a rehearsal does not hand it over.
        rehearsed = {key: spec or _NOTHING for key, spec in specs.items() if spec or leaf(key) == "_extra_state"}
        if not self.survey.may_accept_other_keys or len(rehearsed) < len(specs):
            return False
        return rehearse(self.survey, rehearsed, self.metadata(names))

    def _brought_along(self, names: Mapping[str, str]) -> set[str]:
        """Give the keys of modules that extra states hand over: 'child.weight' beside '_extra_state', an nn.Linear.

        `set_extra_state` may register such a module, and torch's strict load then wants the keys below it as well. Only
        that load can tell; a rehearsal hands no extra state over.
        """
        brought: set[str] = set()
        for key, name in names.items():
            entry = self.checkpoint.entries[name]
            if leaf(key) == "_extra_state" and isinstance(entry, InMemory) and isinstance(entry.value, nn.Module):
                path, inner = parent(key), survey(entry.value).keys.specs
                below = ((other, without_prefix(other, path)) for other in names)
                parts = [(other, tail.partition(".")) for other, tail in below if tail]
                brought.update(
                    other
                    for other, (child, _, rest) in parts
                    if rest in inner and join(path, child) not in self.survey.modules
                )
        return brought
