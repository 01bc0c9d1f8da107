"""The desk of one call: what `match` asks of the data, and what the report tells of the load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from smartload.errors import UnreadableError
from smartload.load.commit import Work
from smartload.load.compare import metadata_of, named, same_entry, spec_of, specs_of
from smartload.load.strict import rehearse
from smartload.load.transfer import load
from smartload.match.plan import module_paths
from smartload.match.search import match
from smartload.place.memory import device_name, memory_of
from smartload.place.survey import Survey, loose_tensors
from smartload.records.checkpoint import Checkpoint
from smartload.records.data import Entry, Held, Ignored, Opaque, Problem, Stored, TensorSpec, Wishes
from smartload.records.keys import below, leaf
from smartload.records.report import KeyPlan, LoadReport, casts_of
from smartload.records.text import some

_NOTHING = TensorSpec((), "uint8")


@dataclass(frozen=True)
class Desk:
    """Where the papers of one call lie: it answers what `match` asks of the data."""

    model: nn.Module
    found: Survey
    checkpoint: Checkpoint

    @cached_property
    def entries(self) -> Mapping[str, Entry]:
        """Dotted name -> entry, over all parts."""
        return named(self.checkpoint)

    def match(self, wishes: Wishes) -> KeyPlan:
        """The plan for the whole checkpoint."""
        plan = match(self.found.manifest, specs_of(self.checkpoint), self.checkpoint.path, wishes, self)
        beside = {item.path for item in self.checkpoint.aside}
        ignored = [item for item in plan.ignored if item.key not in beside]
        if wishes.select is not None:
            named = {*plan.pairs.values(), *plan.unexpected_keys, *beside, *(item.key for item in ignored)}
            left = (name for name, entry in self.entries.items() if name not in named and spec_of(entry) is not None)
            ignored += [Ignored(name, "not selected") for name in left]
        return replace(plan, ignored=tuple(ignored))

    def chosen(self, plan: KeyPlan) -> dict[str, Entry]:
        """Model key -> entry, for all that will be loaded."""
        entries = {key: self.entries[name] for key, name in plan.pairs.items()}
        for key, entry in entries.items():
            if isinstance(entry, Stored):
                continue
            entries[key] = wanted = self._wanted(key, entry)
            if what := self._trouble(key, wanted):
                raise UnreadableError(Problem("value", self.checkpoint.path, {"key": plan.pairs[key], "what": what}))
        return entries

    def _wanted(self, key: str, entry: Entry) -> Entry:
        """The entry, as it is where the model keeps something there that is no tensor either."""
        if self.checkpoint.format != "memory" or self.found.manifest.specs.get(key, _NOTHING) is not None:
            return entry
        if isinstance(entry, Held):
            return entry if entry.original is None else Held(entry.original, None)
        return Held(entry.value, None) if isinstance(entry, Opaque) else entry

    def loadable(self, names: Mapping[str, str]) -> bool:
        """Whether all these entries (model key -> name in the file) are tensors that can be loaded."""
        return not any(self._trouble(key, self._wanted(key, self.entries[name])) for key, name in names.items())

    def _trouble(self, key: str, entry: Entry) -> str:
        """What an entry is that cannot be loaded there: no tensor, or one without data where the model has data."""
        if isinstance(entry, Opaque):
            return entry.what
        own = self.found.tensors.get(key)
        value = entry.value if isinstance(entry, Held) else None
        hollow = isinstance(value, torch.Tensor) and value.is_meta and own is not None and not own.is_meta
        return "a meta tensor" if hollow else ""

    def metadata(self, pairs: Mapping[str, str]) -> dict[str, Mapping[str, object]] | None:
        """The file's `_metadata` under the module paths of the model; None where it has none."""
        stored, parts = metadata_of(self.checkpoint), self.checkpoint.parts.items()
        in_file = self.checkpoint.format != "memory"
        pickled = [path for path, part in parts if in_file and part.kind.startswith("module ")]
        if not (stored or pickled):
            return None
        paths = module_paths(pairs)
        known = {paths[module]: entry for module, entry in stored.items() if module in paths}
        for module in self._inside(pickled, paths) if pickled else ():
            known.setdefault(module, {"version": self.found.modules[module]._version})
        return known or None

    def _inside(self, pickled: list[str], paths: Mapping[str, str]) -> Iterator[str]:
        """Modules of the model whose counterparts the file holds as objects.

        A pickled object has the attributes of its class's present version, and its class is the model's. Batch norm
        is left to torch, which then sees to the counter that objects of before 0.4.1 lack.
        """
        for theirs, own in paths.items():
            inside = any(theirs == path or below(theirs, path) is not None for path in pickled)
            if inside and own in self.found.modules and not isinstance(self.found.modules[own], _NormBase):
                yield own

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors of the file are bit for bit equal."""
        return same_entry(self.entries[first], self.entries[second], self.checkpoint.files)

    def is_own(self, name: str) -> bool:
        """Whether a tensor in memory is the model's own, live one: as such it is no second value of a tied tensor."""
        entry = self.entries[name]
        value = entry.value if isinstance(entry, Held) else None
        return isinstance(value, torch.Tensor) and memory_of(value) in self._own

    @cached_property
    def _own(self) -> frozenset[object]:
        return frozenset(memory_of(tensor) for tensor in self.found.tensors.values())

    def equals_buffer(self, name: str, buffer: str) -> bool:
        """Whether a tensor of the file has the values of the model's own non-persistent buffer."""
        own, entry = self.found.transient[buffer], self.entries[name]
        value = load(entry, self.checkpoint.files) if isinstance(entry, Stored) else getattr(entry, "value", None)
        if not isinstance(value, torch.Tensor) or own.is_meta:
            return False
        there, back = value.to(own.device, own.dtype), own.to(value.device, value.dtype)
        return torch.equal(there, own) and torch.equal(back, value)

    def accepts(self, names: Mapping[str, str], own_shapes: bool = False) -> bool:
        """Whether the model's own strict load takes these keys, in the file's shapes or in the model's own."""
        entries = ((key, self.entries[name]) for key, name in names.items())
        specs = {key: None if isinstance(entry, Opaque) else spec_of(entry) for key, entry in entries}
        if own_shapes:
            specs |= {key: spec for key, spec in self.found.manifest.specs.items() if key in specs}
        # What an extra state holds is not asked: a rehearsal does not hand it over.
        known = {key: spec or _NOTHING for key, spec in specs.items() if spec or leaf(key) == "_extra_state"}
        if not self.found.bends or len(known) < len(specs):
            return False
        return rehearse(self.model, self.found.modules, known, self.metadata(names), self.found.own_code)


def told(
    checkpoint: Checkpoint,
    work: Work,
    before: tuple[Survey, Mapping[str, torch.device]],
    after: Survey,
    apart: bool,
    seconds: float,
    verified: bool,
) -> LoadReport:
    """The report: what was loaded, and how the model differs from what it was `before` (and on which devices).

    `apart` is true where each module was given its own keys.
    """
    found, homes = before
    changed = after is not found
    now = {key: tensor.device for key, tensor in after.tensors.items()} if changed else homes
    replaced = [  # buffers are new objects after every move, and no optimizer holds them
        key
        for key, tensor in (after.tensors.items() if changed else ())
        if found.tensors.get(key, tensor) is not tensor and isinstance(tensor, nn.Parameter)
    ]
    devices = dict.fromkeys(device_name(device) for device in dict.fromkeys(now.values()))
    return LoadReport(
        plan=work.plan,
        format=checkpoint.format,
        device=", ".join(devices) or "no device",
        nbytes=sum(entry.nbytes if isinstance(entry, Stored) else _nbytes(entry) for entry in work.entries.values()),
        seconds=seconds,
        casts=() if work.assign else casts_of(_dtypes(work, after)),
        moves=tuple(_moves(homes, now)) if changed else (),
        aside=checkpoint.aside,
        notes=tuple(_notes(devices, [] if work.assign else replaced, after, apart)),
        undo=work.undo,
        verified=verified,
    )


def _nbytes(entry: Entry) -> int:
    value = entry.value if isinstance(entry, Held) else None
    # Only dense tensors can say it.
    return value.nbytes if isinstance(value, torch.Tensor) and value.layout is torch.strided else 0


def _dtypes(work: Work, after: Survey) -> Iterator[tuple[str, str, str]]:
    for key, entry in work.entries.items():
        spec, own = entry if isinstance(entry, Stored) else spec_of(entry), after.manifest.specs.get(key)
        if spec is not None and own is not None and spec.dtype != own.dtype:
            yield key, spec.dtype, own.dtype


def _moves(before: Mapping[str, torch.device], now: Mapping[str, torch.device]) -> Iterator[tuple[str, str, str]]:
    moved: dict[tuple[torch.device, torch.device], list[str]] = {}
    for key, device in now.items():
        if before.get(key, device) != device:
            moved.setdefault((before[key], device), []).append(key)
    for (source, target), keys in moved.items():
        yield "all" if len(keys) == len(now) else some(keys), device_name(source), device_name(target)


def _notes(devices: Mapping[str, None], replaced: list[str], after: Survey, apart: bool) -> Iterator[str]:
    if apart:
        yield "each module loaded its own keys, strictly: torch's time for all at once grows with keys times children"
    if replaced:
        yield f"new Parameter objects for {some(replaced)}: rebuild optimizers made before this call"
    if len(devices) == 1:
        home = next(iter(devices))
        strays = {name: str(tensor.device) for name, tensor in loose_tensors(after) if str(tensor.device) != home}
        for where in dict.fromkeys(strays.values()):
            names = some(name for name, device in strays.items() if device == where)
            yield f"{names} on {where}: plain attributes do not follow .to(); make them buffers (register_buffer)"
