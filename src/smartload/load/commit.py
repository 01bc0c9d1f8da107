"""Write a checkpoint into a model: move, read into place, end in the strict load, or undo all of it.

Where the model brings no loading code of its own, the bytes are read into its own tensors and these very tensors go
through `load_state_dict(strict=True)`: copying a tensor onto itself is free, and torch's own hooks, version rules and
verdict close the call. Where it brings such code, tensors made for the purpose go through it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from smartload.errors import (
    CastError,
    KeyMismatchError,
    ModelCodeError,
    PlacementError,
    SmartLoadError,
    UnreadableError,
    of_both_types,
)
from smartload.load.entries import same_values
from smartload.load.move import check_filled, materialise_and_move, move_optimizer_state, tensors_to_be_filled
from smartload.load.progress import OnProgress, counter
from smartload.load.strict import Metadata, state_dict, strict_load
from smartload.load.transfer import (
    Move,
    check_cast,
    check_cast_in_memory,
    empty_tensor,
    moves_of,
    read_all,
    read_extra_state,
)
from smartload.load.undo import Undo
from smartload.place.distributed import full_state_dicts, is_sharded, own_shard
from smartload.place.memory import is_ordinary, overlapping
from smartload.place.survey import Survey, survey
from smartload.records.entries import ByteReader, Entry, Extra, InMemory, Stored
from smartload.records.problems import Problem
from smartload.records.report import KeyPlan
from smartload.records.requests import Placement

SMALL = 256 << 20
"""Bytes of a model up to which undo="auto" keeps a copy of its values: the copy takes a tenth of a second then."""


@dataclass(frozen=True, slots=True)
class LoadJob:
    """Everything that a load needs, decided: what goes where, and how."""

    plan: KeyPlan
    placement: Placement
    entries: Mapping[str, Entry]
    """Model key -> the checkpoint's entry for it."""
    metadata: Metadata | None
    files: Sequence[ByteReader] = ()
    assign: bool = False
    undo: bool = True
    optimizers: Sequence[torch.optim.Optimizer] = ()
    on_progress: OnProgress | None = None

    @property
    def kept(self) -> list[str]:
        """Model keys that keep their present values."""
        return [*self.plan.missing_keys, *(kept.key for kept in self.plan.kept)]

    @property
    def nkeys(self) -> int:
        """How many keys the state dict of the strict load has."""
        return len(self.entries) + len(self.kept)


@dataclass(slots=True)
class _InProgress:
    """What one load writes down on its way."""

    log: Undo
    begun: set[str] = field(default_factory=set)
    """Keys whose tensors may hold a mixture of old and new values, should the load stop now."""
    moved: dict[int, torch.Tensor] = field(default_factory=dict)
    """Caller's tensor, by identity -> its copy on another device: names of one tensor stay one."""
    doubtful: Mapping[str, CastError] = field(default_factory=dict)
    """Casts that would lose a value, unless loading code of the model's own converts it."""


def keeps_values(survey: Survey, undo: bool | str) -> bool:
    """Decide what undo="auto" means for a model: keep a copy where code of its own may fail, or where it is small."""
    if undo != "auto":
        return bool(undo)
    return not survey.only_values_change or sum(tensor.nbytes for tensor in survey.tensors.values()) <= SMALL


def commit(before: Survey, job: LoadJob) -> Survey:
    """Load, or leave the model exactly as it was.

    Args:
        before: the model.
        job: what to load.

    Returns:
        The model as it is now; `before` itself where nothing but values changed.

    Raises:
        CastError: a value of the file cannot be held by the model's dtype.
        KeyMismatchError: torch's own strict load refused after all.
        PlacementError: a tensor on meta got no value from the model's own loading code either.
        UnreadableError: the file failed or changed while it was read.
        SmartLoadError: the model's own loading code raised; it is the cause.
    """
    doubtful = _check_casts(before, job)
    now = _InProgress(_undo_log(before, job), doubtful=doubtful)
    versions = {} if job.undo else _versions(before)
    try:
        model, found = before.model, before
        _move(before, job, now.log)
        if job.placement.moves or job.placement.new:
            found = survey(model)
        to_be_filled = tensors_to_be_filled(found, job.placement, job.plan, job.assign)
        values = _fill(found, job, now)
        for reader in job.files:
            reader.check_unchanged()
        _strict_load(found, state_dict(values, job.metadata), job)
        check_filled(to_be_filled)
        _check_doubtful_casts(found, values, job, now)
        return survey(model) if found.own_code or job.assign else found
    except BaseException as failure:
        try:
            written = {} if job.undo else _versions(before)
        finally:
            now.log.restore()
        changed = {key for key, version in written.items() if versions.get(key, version) != version}
        if not job.undo and (keys := sorted(now.begun | changed)):
            _half_loaded(keys, failure, job)
        raise


def _check_casts(survey: Survey, job: LoadJob) -> dict[str, CastError]:
    """Refuse casts that lose a value; give those that code of the model's own may yet make right. Writes nothing."""
    doubtful: dict[str, CastError] = {}
    for key, entry in () if job.assign else job.entries.items():
        target, own = survey.tensors.get(key), survey.keys.specs.get(key)
        # A stored entry has a dtype of its own; making a spec for each of very many keys takes longer.
        stored = entry if isinstance(entry, Stored) else entry.spec
        if target is None or (stored is not None and own is not None and stored.dtype == own.dtype):
            continue
        if not is_ordinary(target) or key in survey.computed:
            continue
        try:
            if isinstance(entry, Stored):
                for move in moves_of(key, entry, target):
                    check_cast(move, job.plan.path, job.files)
            elif isinstance(entry, InMemory) and isinstance(entry.value, torch.Tensor) and is_ordinary(entry.value):
                check_cast_in_memory(key, entry.value, target, job.plan.path)
        except CastError as loss:
            if not (survey.rewrites_values and job.undo):
                raise
            doubtful[key] = loss
    return doubtful


def _check_doubtful_casts(survey: Survey, values: Mapping[str, object], job: LoadJob, now: _InProgress) -> None:
    """Refuse where the model's own code left a cast to torch that loses a value."""
    for key in now.doubtful:
        own, value = survey.tensors[key], values[key]
        if isinstance(value, torch.Tensor) and value.shape == own.shape:
            real = value.real if value.is_complex() and not own.is_complex() else value
            if same_values(real.to(own.device, own.dtype), own):
                check_cast_in_memory(key, value, own, job.plan.path)


def _undo_log(survey: Survey, job: LoadJob) -> Undo:
    """Note all that the load may change: in most models the values, and nothing else."""
    if job.placement.moves or job.placement.new or job.assign or _swaps() or not survey.only_values_change:
        return Undo(survey.modules.values(), job.optimizers, bits=job.undo)
    return Undo((), job.optimizers, bits=job.undo, tensors=survey.tensors.values())


def _move(survey: Survey, job: LoadJob, log: Undo) -> None:
    try:
        materialise_and_move(survey, job.placement, job.plan, job.assign, log)
        for optimizer in job.optimizers:
            move_optimizer_state(optimizer)
    except SmartLoadError:
        raise
    except Exception as failure:
        facts = {"model": job.plan.model, "error": f"{type(failure).__name__}: {failure}"}
        raise of_both_types(PlacementError, Problem("move-failed", job.plan.path, facts), failure) from failure


def _half_loaded(keys: Sequence[str], failure: BaseException, job: LoadJob) -> None:
    """Say which tensors may hold a mixture: by an error of ours, or by a note on a Ctrl-C or exit."""
    error = UnreadableError(Problem("half-loaded", job.plan.path, {"keys": keys, "cause": repr(failure)}))
    if isinstance(failure, Exception):
        raise error from failure
    if sys.version_info >= (3, 11):
        failure.add_note(str(error))


def _versions(survey: Survey) -> dict[str, int]:
    """Give how often torch has written to each tensor; our own reads are not counted there, but in `begun`."""
    counted = (item for item in survey.tensors.items() if not (is_lazy(item[1]) or item[1].is_inference()))
    return {key: tensor._version for key, tensor in counted}


def _fill(survey: Survey, job: LoadJob, now: _InProgress) -> dict[str, object]:
    """Read every tensor, into the model's own where that is possible; give the values for the strict load."""
    values: dict[str, object] = {}
    moves: list[Move] = []
    fresh: dict[Stored, torch.Tensor] = {}
    in_place = _filled_in_place(survey, job)
    first_name = {key: group[0] for group in survey.keys.tied for key in group}
    filled: set[str] = set()
    for key, entry in job.entries.items():
        own = survey.tensors.get(key)
        if not isinstance(entry, Stored):
            values[key] = _value_in_memory(key, entry, own, job, now)
        elif own is not None and key in in_place and own.shape == entry.shape:
            if (name := first_name.get(key, key)) not in filled:  # two threads must not write one tensor
                moves += moves_of(key, entry, own)
            filled.add(name)
            values[key] = own
        else:
            if entry not in fresh:
                fresh[entry] = empty_tensor(entry)
                moves += moves_of("", entry, fresh[entry])
            values[key] = fresh[entry]
    for key in job.kept:
        own = survey.tensors.get(key)
        values[key] = survey.modules[key.rpartition(".")[0]].get_extra_state() if own is None else own
    total = sum(move.span.nbytes for move in moves) if job.on_progress is not None else 0
    read_all(moves, job.files, now.begun, counter(job.on_progress, total))
    now.begun.discard("")  # tensors that are not the model's
    _adapt_fresh(values, survey, job)
    return values


def _filled_in_place(survey: Survey, job: LoadJob) -> Set[str]:
    """Give the keys whose tensors bytes may be read into: nobody else has a say in their values or their memory."""
    if survey.rewrites_values or job.assign or _swaps():
        return frozenset()
    return survey.tensors.keys() - survey.unusual.keys() - overlapping(survey.tensors)


def _swaps() -> bool:
    """Tell whether the user has told torch to exchange tensors in a load, instead of writing to them."""
    return bool(torch.__future__.get_swap_module_params_on_conversion())


def _adapt_fresh(values: dict[str, object], survey: Survey, job: LoadJob) -> None:
    """Give tensors that were read anew what the model's own have: their shard, their device, a Parameter's class."""
    adapted: dict[tuple[Stored, int], torch.Tensor] = {}
    for key, entry in job.entries.items():
        own, value = survey.tensors.get(key), values[key]
        if value is own or own is None or not (isinstance(entry, Stored) and isinstance(value, torch.Tensor)):
            continue
        if (entry, id(own)) not in adapted:  # names of one tensor stay one
            if is_sharded(own):
                value = own_shard(value, own)
            elif job.assign:
                default = torch.get_default_device()
                real = own.device if not own.is_meta else default if default.type != "meta" else torch.device("cpu")
                value = value.to(job.placement.new.get(key) or real)
            adapted[entry, id(own)] = like_parameter(value, own) if job.assign else value
        values[key] = adapted[entry, id(own)]


def _value_in_memory(key: str, entry: Entry, own: torch.Tensor | None, job: LoadJob, now: _InProgress) -> object:
    """Give a value that is in memory, or plain data, as the model's loading code is to see it."""
    if isinstance(entry, Extra):
        return read_extra_state(entry.tree, job.files)
    assert isinstance(entry, InMemory)
    value = entry.value
    if not isinstance(value, torch.Tensor):
        return value
    if is_sharded(own) and not is_sharded(value):
        value = own_shard(value.detach(), own)
        return like_parameter(value, own) if job.assign and own is not None else value
    if job.assign and key in job.placement.new:
        moved = now.moved.get(id(value))
        if moved is None:
            there = value.to(job.placement.new[key])
            moved = now.moved[id(value)] = like_parameter(there, value if own is None else own)
        return moved
    if job.assign and value.is_leaf:
        now.log.flags.append((value, value.requires_grad))  # torch gives the caller's own tensor the model's flag
    return value


def like_parameter(value: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Make the value a Parameter where the other is one, so that tied names stay one object when it is assigned."""
    return nn.Parameter(value, model.requires_grad) if isinstance(model, nn.Parameter) else value


def _strict_load(survey: Survey, state: Mapping[str, object], job: LoadJob) -> None:
    try:
        with full_state_dicts(survey.model):
            strict_load(survey, state, job.assign)
    except Exception as failure:
        if isinstance(failure, RuntimeError) and str(failure).startswith("Error(s) in loading state_dict"):
            raise KeyMismatchError(Problem("strict", job.plan.path, {"torch": str(failure)})) from failure
        facts = {"model": job.plan.model, "error": f"{type(failure).__name__}: {failure}"}
        raise of_both_types(ModelCodeError, Problem("model-code", job.plan.path, facts), failure) from failure
