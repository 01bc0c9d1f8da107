"""Write a checkpoint into a model: check casts, note what the model is, move it, read into it, run the strict load.

Any failure on the way, Ctrl-C included, is undone.

Where the model brings no loading code of its own, the bytes are read into its own tensors and these very tensors go
through `load_state_dict(strict=True)`: copying a tensor onto itself is free, and torch's own hooks, version rules and
verdict close the call. Where it brings such code, tensors made for the purpose go through it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from smartload.errors import (
    AmbiguousKeysError,
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
from smartload.place.devices import default_device
from smartload.place.distributed import full_state_dicts, is_sharded, own_shard
from smartload.place.memory import is_ordinary, overlapping, shares_memory
from smartload.place.survey import Survey, survey
from smartload.records.entries import ByteReader, Entry, Extra, InMemory, Stored
from smartload.records.problems import Problem
from smartload.records.report import KeyPlan
from smartload.records.requests import Placement

T = TypeVar("T")

AUTO_UNDO_BYTES = 256 << 20
"""Bytes of a model up to which undo="auto" keeps a copy of its values: up to there it takes a tenth of a second."""


@dataclass(frozen=True, slots=True)
class LoadJob:
    """What a load is to do, all of it decided before the first write.

    Attributes:
        plan: which key of the file is loaded into which of the model.
        placement: what moves, and what gets memory, before that.
        entries: model key -> the checkpoint's entry for it.
        metadata: `_metadata` for the strict load; None where the file has none.
        files: the open files that the entries refer to.
        assign: whether the file's tensors replace the model's.
        undo: whether a copy of the values is kept.
        optimizers: whose state moves with the model.
        on_progress: is told how far the reading is.
    """

    plan: KeyPlan
    placement: Placement
    entries: Mapping[str, Entry]
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
class Changes:
    """What one load has changed so far, so that it can be undone."""

    before: Survey | None = None
    """The model before the load."""
    job: LoadJob | None = None
    log: Undo | None = None
    """What the model was; None before anything of it has changed, and once that is undone."""
    versions: Mapping[str, int] = field(default_factory=dict)
    """Where no copy of the values is kept: how often torch had written to each tensor before the load."""
    begun: set[str] = field(default_factory=set)
    """Keys whose tensors may hold a mixture of old and new values, should the load stop now."""
    moved: dict[int, torch.Tensor] = field(default_factory=dict)
    """Caller's tensor, by identity -> its copy on another device: names of one tensor stay one."""
    overlapping: frozenset[str] = frozenset()
    """Keys whose tensors share a part of their memory, so that one value may overwrite another."""
    doubtful: Mapping[str, CastError] = field(default_factory=dict)
    """Casts that would lose a value, unless loading code of the model's own converts it."""
    grad_enabled: bool = field(default_factory=torch.is_grad_enabled)
    """The caller's mode: an interrupt inside of `torch.no_grad()` may leave it off."""

    def undo(self, failure: BaseException) -> None:
        """Make the model what it was. A second call does what the first left, should an interrupt have broken it off.

        Args:
            failure: what ended the load.

        Raises:
            UnreadableError: no copy of the values was kept, and some have changed; `failure` is its cause.
        """
        try:
            if self.log is None or self.before is None or self.job is None:
                return
            # Before the undo, which writes to tensors itself; and whatever comes of it, the undo must run.
            try:
                written = {} if self.job.undo else _versions(self.before)
            finally:
                self.log.restore()
            changed = {key for key, version in written.items() if self.versions.get(key, version) != version}
            if not self.job.undo and (keys := sorted(self.begun | changed)):
                _half_loaded(keys, failure, self.job)
            self.log = None
        finally:
            torch.set_grad_enabled(self.grad_enabled)


def all_or_nothing(load: Callable[[Changes], T]) -> T:
    """Give what `load` returns; where it raises, make the model what it was.

    The load has succeeded when `load` returns: until then, in its last line too, whatever is raised undoes all.

    Args:
        load: does everything, and hands its argument to `commit`.
    """
    changes = Changes()
    # Twice the same: an interrupt can come while the first undo runs, or in the very line that calls it.
    try:
        try:
            return load(changes)
        except BaseException as failure:
            changes.undo(failure)
            raise
    except BaseException as failure:
        changes.undo(failure)
        raise


def keeps_values(survey: Survey, undo: bool | str) -> bool:
    """Decide what undo="auto" means for a model: keep a copy where code of its own may fail, or where it is small."""
    if undo != "auto":
        return bool(undo)
    # With torch's code alone, all that can fail after the first write is reading, which is rare in a file that was
    # opened and checked: no reason to double the memory of a large model.
    if not survey.only_values_change or sum(tensor.nbytes for tensor in survey.tensors.values()) <= AUTO_UNDO_BYTES:
        return True
    # Whether the file has two values for memory that two tensors share shows only once both are written.
    return bool(overlapping(survey.tensors))


def commit(before: Survey, job: LoadJob, changes: Changes) -> Survey:
    """Load into the model; whoever calls this undoes the `changes` where it raises (see `all_or_nothing`).

    Args:
        before: the model.
        job: what to load.
        changes: is told what changes, each time before it does.

    Returns:
        The model as it is now; `before` itself where nothing but values changed.

    Raises:
        AmbiguousKeysError: tensors of the model share memory, and the file has two values for it.
        CastError: a value of the file cannot be held by the model's dtype.
        KeyMismatchError: torch's own strict load refused after all.
        PlacementError: a tensor on meta got no value from the model's own loading code either.
        UnreadableError: the file failed or changed while it was read.
        SmartLoadError: the model's own loading code raised; it is the cause.
    """
    doubtful = _check_casts(before, job)  # first, because a refusal that has changed nothing needs no undo
    log = _undo_log(before, job)
    changes.before, changes.job, changes.doubtful = before, job, doubtful
    changes.versions = {} if job.undo else _versions(before)
    changes.log = log
    model, moved = before.model, before
    # Before the reading, so that bytes go to where a tensor ends up, and are never moved themselves.
    _move(before, job, log)
    if job.placement.moves or job.placement.new:
        moved = survey(model)  # a move may make new tensors, and give others new memory
    # Before anything is written: what is unwritten after the load is told by comparison with now.
    to_be_filled = tensors_to_be_filled(moved, job.placement, job.plan, job.assign)
    values = _fill(moved, job, changes)
    # Before the strict load: a file that changed while it was read has given a mixture of two checkpoints, and the
    # model's own code (hooks, set_extra_state) must not act on that.
    for reader in job.files:
        reader.check_unchanged()
    _strict_load(moved, state_dict(values, job.metadata), job)
    # After it: only now is it known what the model's own code has done with tensors and values.
    check_filled(to_be_filled)
    _check_doubtful_casts(moved, values, job, changes)
    _check_overlapping(moved, values, job, changes)
    # Code of the model's own may have exchanged tensors, as `assign` always does: the report must see the new ones.
    return survey(model) if moved.own_code or job.assign else moved


def _check_casts(survey: Survey, job: LoadJob) -> dict[str, CastError]:
    """Refuse casts that lose a value; write nothing.

    Returns:
        Model key -> its refusal, where the model's own code may still convert the value, and the undo has a copy.

    Raises:
        CastError: of the first other one.
    """
    doubtful: dict[str, CastError] = {}
    for key, entry in () if job.assign else job.entries.items():  # `assign` takes the file's dtypes: nothing is cast
        target, own = survey.tensors.get(key), survey.keys.specs.get(key)
        # A stored entry has a dtype of its own; making a spec for each of very many keys takes longer.
        stored = entry if isinstance(entry, Stored) else entry.spec
        if target is None or (stored is not None and own is not None and stored.dtype == own.dtype):
            continue
        # A subclass or a quantized tensor converts by rules of its own, and a computed one is not what is written to.
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


def _check_doubtful_casts(survey: Survey, values: Mapping[str, object], job: LoadJob, changes: Changes) -> None:
    """Refuse a doubtful cast that the model's own code did not take over: torch then made it, and lost a value.

    Raises:
        CastError: of the first one.
    """
    for key in changes.doubtful:
        own, value = survey.tensors[key], values[key]
        if isinstance(value, torch.Tensor) and value.shape == own.shape:
            # Whether it was torch's cast shows in the result: the parameter equals the value, cast.
            real = value.real if value.is_complex() and not own.is_complex() else value
            if same_values(real.to(own.device, own.dtype), own):
                check_cast_in_memory(key, value, own, job.plan.path)


def _check_overlapping(survey: Survey, values: Mapping[str, object], job: LoadJob, changes: Changes) -> None:
    """Refuse two values for memory that two tensors of the model share: the later one has overwritten the earlier.

    Raises:
        AmbiguousKeysError: of the first tensor that does not hold its own value.
    """
    # Code of the model's own may have changed values for reasons of its own.
    for key in sorted(changes.overlapping) if not survey.own_code else ():
        own, value = survey.tensors[key], values.get(key)
        if isinstance(value, torch.Tensor) and not same_values(value.to(own.device, own.dtype), own):
            others = changes.overlapping - {key}
            second = min((other for other in others if shares_memory(own, survey.tensors[other])), default="")
            what = f"{key} and {second}" if second else f"elements of {key}"
            raise AmbiguousKeysError(Problem("overlap", job.plan.path, {"what": what, "model": job.plan.model}))


def _undo_log(survey: Survey, job: LoadJob) -> Undo:
    """Note all that the load may change: in most loads the values of tensors, and nothing else."""
    if job.placement.moves or job.placement.new or job.assign or _swaps() or not survey.only_values_change:
        return Undo(survey.modules.values(), job.optimizers, bits=job.undo)
    return Undo((), job.optimizers, bits=job.undo, tensors=survey.tensors.values())


def _move(survey: Survey, job: LoadJob, log: Undo) -> None:
    """Give memory to tensors on meta, and move modules and the state of optimizers.

    Raises:
        PlacementError: torch failed, which is the cause; also of that type (OutOfMemoryError) for those who catch it.
    """
    try:
        materialise_and_move(survey, job.placement, job.plan, job.assign, log)
        for optimizer in job.optimizers:
            move_optimizer_state(optimizer)
    except (
        SmartLoadError,
        RecursionError,
    ):  # the second: modules nested too deeply for torch
        raise
    except Exception as failure:
        facts = {"model": job.plan.model, "error": f"{type(failure).__name__}: {failure}"}
        raise of_both_types(PlacementError, Problem("move-failed", job.plan.path, facts), failure) from failure


def _half_loaded(keys: Sequence[str], failure: BaseException, job: LoadJob) -> None:
    """Name the tensors that may hold a mixture, in an error or, for Ctrl-C and exits, on the exception itself.

    An exit must stay an exit: programs count on KeyboardInterrupt and SystemExit.

    Raises:
        UnreadableError: unless `failure` is an exit.
    """
    told = failure.problem if isinstance(failure, UnreadableError) else None
    if isinstance(told, Problem) and told.kind == "half-loaded":  # said when the undo ran for the first time
        return
    error = UnreadableError(
        Problem("half-loaded", job.plan.path, {"keys": keys, "cause": f"{type(failure).__name__}: {failure}"})
    )
    if isinstance(failure, Exception):
        raise error from failure
    said = str(error)
    if sys.version_info >= (3, 11):
        if said not in getattr(failure, "__notes__", ()):
            failure.add_note(said)
    elif said not in failure.args:  # exceptions take no notes there: among its arguments the text is printed with it
        failure.args = (*failure.args, said)


def _versions(survey: Survey) -> dict[str, int]:
    """Give how often torch has written to each tensor (`_version`).

    Reading a file straight into memory is not counted there; `Changes.begun` has those keys.
    """
    # Tensors made in inference mode have no count, and lazy ones do not answer.
    counted = (item for item in survey.tensors.items() if not (is_lazy(item[1]) or item[1].is_inference()))
    return {key: tensor._version for key, tensor in counted}


def _fill(survey: Survey, job: LoadJob, changes: Changes) -> dict[str, object]:
    """Read every tensor, into the model's own where that is possible, else into a new one.

    Returns:
        The values for the strict load: for a tensor that was read in place the model's own, so that the load copies it
        onto itself, which torch does at no cost.

    Raises:
        UnreadableError: a file failed.
    """
    values: dict[str, object] = {}
    moves: list[Move] = []
    fresh: dict[Stored, torch.Tensor] = {}  # by entry: names that are one tensor in the file are read once
    in_place = _filled_in_place(survey, job, changes)
    first_name = {key: group[0] for group in survey.keys.tied for key in group}
    filled: set[str] = set()
    for key, entry in job.entries.items():
        own = survey.tensors.get(key)
        if not isinstance(entry, Stored):
            values[key] = _value_in_memory(key, entry, own, job, changes)
        elif own is not None and key in in_place and own.shape == entry.shape:
            # A tied tensor is filled once. Its names hold equal values in the file (`match` has refused others), and
            # two threads must not write to one tensor.
            if (name := first_name.get(key, key)) not in filled:
                moves += moves_of(key, entry, own)
            filled.add(name)
            values[key] = own
        else:
            if entry not in fresh:
                fresh[entry] = empty_tensor(entry)
                moves += moves_of("", entry, fresh[entry])
            values[key] = fresh[entry]
    # The strict load wants every key: those that keep their values are given the values they have.
    for key in job.kept:
        own = survey.tensors.get(key)
        values[key] = survey.modules[key.rpartition(".")[0]].get_extra_state() if own is None else own
    total = sum(move.span.nbytes for move in moves) if job.on_progress is not None else 0
    try:
        read_all(moves, job.files, changes.begun, counter(job.on_progress, total))
    finally:
        changes.begun.discard("")  # the name of tensors that are not the model's
    _adapt_fresh(values, survey, job)
    return values


def _filled_in_place(survey: Survey, job: LoadJob, changes: Changes) -> Set[str]:
    """Give the keys whose tensors the file's bytes may be read into.

    No key where hooks or overrides must see the values first, or where torch is to replace tensors. Never that of an
    unusual tensor, nor of one that shares part of its memory with another: there torch's order of writing decides.
    """
    if survey.rewrites_values or job.assign or _swaps():
        return frozenset()
    changes.overlapping = overlapping(survey.tensors)
    return survey.tensors.keys() - survey.unusual.keys() - changes.overlapping


def _swaps() -> bool:
    """Tell whether the user has told torch to exchange tensors in a load, instead of writing to them."""
    return bool(torch.__future__.get_swap_module_params_on_conversion())


def _adapt_fresh(values: dict[str, object], survey: Survey, job: LoadJob) -> None:
    """Give each new tensor what the model's own has: its shard or, for `assign`, its device and its class."""
    # By entry and tensor of the model, so that names of one tensor stay one: a shard depends on both.
    adapted: dict[tuple[Stored, int], torch.Tensor] = {}
    for key, entry in job.entries.items():
        own, value = survey.tensors.get(key), values[key]
        if value is own or own is None or not (isinstance(entry, Stored) and isinstance(value, torch.Tensor)):
            continue
        if (entry, id(own)) not in adapted:
            if is_sharded(own):
                value = own_shard(value, own)
            elif job.assign:
                # As plain torch would have it: where the model's tensor is, or where a new one would be made.
                device = job.placement.new.get(key) or (default_device() if own.is_meta else own.device)
                value = value.to("cpu" if torch.device(device).type == "meta" else device)
            adapted[entry, id(own)] = like_parameter(value, own) if job.assign else value
        values[key] = adapted[entry, id(own)]


def _value_in_memory(key: str, entry: Entry, own: torch.Tensor | None, job: LoadJob, changes: Changes) -> object:
    """Give a value that is in memory, or an extra state of a file, as the strict load is to see it.

    It stays the caller's own object, unless it must be cut into shards or moved.
    """
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
        moved = changes.moved.get(id(value))
        if moved is None:
            copy = value.to(job.placement.new[key])
            moved = changes.moved[id(value)] = like_parameter(copy, value if own is None else own)
        return moved
    if job.assign and value.is_leaf and changes.log is not None:
        # torch puts the caller's own tensor into the model, and gives it the flag of the parameter it replaces.
        changes.log.flags.append((value, value.requires_grad))
    return value


def like_parameter(value: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Make the value a Parameter where the other is one, so that tied names stay one object when it is assigned."""
    return nn.Parameter(value, model.requires_grad) if isinstance(model, nn.Parameter) else value


def _strict_load(survey: Survey, state: Mapping[str, object], job: LoadJob) -> None:
    """Run the model's own strict load.

    Raises:
        KeyMismatchError: torch refused the keys or shapes.
        ModelCodeError: anything else was raised; also of that type, for those who catch it.
    """
    try:
        with full_state_dicts(survey.modules):
            strict_load(survey, state, job.assign)
    except RecursionError:  # of torch, in a deep nest of modules, as well as of the model's code
        raise
    except Exception as failure:
        # torch has no class of its own for this; the text is the same in all its versions.
        if isinstance(failure, RuntimeError) and str(failure).startswith("Error(s) in loading state_dict"):
            raise KeyMismatchError(Problem("strict", job.plan.path, {"torch": str(failure)})) from failure
        facts = {"model": job.plan.model, "error": f"{type(failure).__name__}: {failure}"}
        raise of_both_types(ModelCodeError, Problem("model-code", job.plan.path, facts), failure) from failure
