"""The only room that writes to a model: it moves, reads into place, ends in the strict load, and undoes all of it.

Where the model brings no loading code of its own, the bytes are read into its own tensors and these very
tensors go through `load_state_dict(strict=True)`: copying a tensor onto itself is free, and torch's own hooks,
version rules and verdict close the call. Where it brings such code, real tensors go through it.
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
from smartload.load.compare import plain
from smartload.load.move import check_filled, follow, settle, unfilled
from smartload.load.progress import Tell, counter
from smartload.load.strict import Metadata, state_dict, strict_load
from smartload.load.transfer import Move, blank, check_cast, check_held, moves_of, read_all, same_values
from smartload.load.undo import Undo
from smartload.place.distributed import is_sharded, share, whole
from smartload.place.memory import ordinary, overlapping
from smartload.place.survey import Survey, survey
from smartload.records.data import ByteReader, Entry, Extra, Held, Placement, Problem, Stored
from smartload.records.report import KeyPlan

SMALL = 256 << 20  # bytes of model up to which undo="auto" keeps its values


@dataclass(frozen=True, slots=True)
class Work:
    """Everything a load needs, decided: what goes where, and how."""

    plan: KeyPlan
    placement: Placement
    entries: Mapping[str, Entry]
    """Model key -> the file's entry for it."""
    metadata: Metadata | None
    files: Sequence[ByteReader] = ()
    assign: bool = False
    undo: bool = True
    optimizers: Sequence[torch.optim.Optimizer] = ()
    tell: Tell | None = None
    begun: set[str] = field(default_factory=set)
    """Keys whose tensors may hold a mixture, should the load fail."""
    made: dict[int, torch.Tensor] = field(default_factory=dict)
    """Tensors in memory, by identity, that were brought to another device: names of one tensor stay one."""
    doubts: dict[str, CastError] = field(default_factory=dict)
    """Casts that lose a value, unless loading code of the model's own converts it."""


def keeps_values(found: Survey, undo: bool | str) -> bool:
    """What undo="auto" means for this model: yes where code that no check foresees may fail, or the copy is small."""
    if undo != "auto":
        return bool(undo)
    return not found.plain or sum(tensor.nbytes for tensor in found.tensors.values()) <= SMALL


def check_casts(found: Survey, work: Work) -> None:
    """CastError where a value of the file cannot be held by the model's dtype. Nothing is written."""
    if work.assign:
        return
    for key, entry in work.entries.items():
        target, own = found.tensors.get(key), found.manifest.specs.get(key)
        spec = entry.spec if isinstance(entry, Held) else entry if isinstance(entry, Stored) else None
        if target is None or (spec is not None and own is not None and spec.dtype == own.dtype):
            continue
        if not ordinary(target) or key in found.derived:
            continue
        try:
            _check_cast(key, entry, target, work)
        except CastError as loss:
            if not (found.rewrites and work.undo):
                raise
            work.doubts[key] = loss


def _check_cast(key: str, entry: Entry, target: torch.Tensor, work: Work) -> None:
    if isinstance(entry, Stored):
        for move in moves_of(key, entry, target):
            check_cast(move, work.plan.path, work.files)
    elif isinstance(entry, Held) and isinstance(entry.value, torch.Tensor) and ordinary(entry.value):
        check_held(key, entry.value, target, work.plan.path)


def _check_doubts(found: Survey, values: Mapping[str, object], work: Work) -> None:
    """CastError where the model's own code left a cast to torch that loses a value."""
    for key in work.doubts:
        own, value = found.tensors[key], values[key]
        if isinstance(value, torch.Tensor) and value.shape == own.shape:
            real = value.real if value.is_complex() and not own.is_complex() else value
            if same_values(real.to(own.device, own.dtype), own):
                check_held(key, value, own, work.plan.path)


def commit(model: nn.Module, found: Survey, work: Work) -> tuple[Survey, bool]:
    """Load, or leave the model exactly as it was.

    Returns:
        The model as it is now, and whether each of its modules was given its own keys.

    Raises:
        KeyMismatchError: torch's own strict load refused after all.
        PlacementError: a tensor on meta got no value from the model's own loading code either.
        UnreadableError: the file failed or changed under the reading.
        SmartLoadError: the model's own loading code raised; it is the cause.
    """
    log = _log(found, work)
    versions = {} if work.undo else _versions(found)
    try:
        _settle(model, found, work, log)
        if work.placement.moves or work.placement.meta:
            found = survey(model)
        marks = unfilled(found, work.placement, work.plan, work.assign)
        values = _values(found, work, log)
        for reader in work.files:
            reader.check_unchanged()
        apart = _load(model, found, state_dict(values, work.metadata), work)
        check_filled(marks)
        _check_doubts(found, values, work)
        return (survey(model) if found.own_code or work.assign else found), apart
    except BaseException as failure:
        try:
            now = {} if work.undo else _versions(found)
        finally:
            log.restore()
        changed = {key for key, version in now.items() if versions.get(key, version) != version}
        if not work.undo and (keys := sorted(work.begun | changed)):
            _half_loaded(keys, failure, work)
        raise


def _log(found: Survey, work: Work) -> Undo:
    """The way back: all that the load may change, which in most models is the values and nothing else."""
    if work.placement.moves or work.placement.meta or work.assign or _swaps() or not found.plain:
        return Undo(found.modules.values(), work.optimizers, bits=work.undo)
    return Undo((), work.optimizers, bits=work.undo, tensors=found.tensors.values())


def _settle(model: nn.Module, found: Survey, work: Work, log: Undo) -> None:
    try:
        settle(model, found, work.placement, work.plan, work.assign, log)
        for optimizer in work.optimizers:
            follow(optimizer)
    except SmartLoadError:
        raise
    except Exception as failure:
        facts = {"model": work.plan.model, "error": f"{type(failure).__name__}: {failure}"}
        raise of_both_types(PlacementError, Problem("move-failed", work.plan.path, facts), failure) from failure


def _half_loaded(keys: Sequence[str], failure: BaseException, work: Work) -> None:
    """Say that the model is not what it was: by an error of our own, or by a note on an exit that is none."""
    error = UnreadableError(Problem("half-loaded", work.plan.path, {"keys": keys, "cause": repr(failure)}))
    if isinstance(failure, Exception):
        raise error from failure
    if sys.version_info >= (3, 11):
        failure.add_note(str(error))


def _versions(found: Survey) -> dict[str, int]:
    """How often torch has written to each tensor; what it does not count is told by the reading itself."""
    counted = (item for item in found.tensors.items() if not (is_lazy(item[1]) or item[1].is_inference()))
    return {key: tensor._version for key, tensor in counted}


def _values(found: Survey, work: Work, log: Undo) -> dict[str, object]:
    """The state dict for the strict load; tensors that can be filled where they are have been filled."""
    values: dict[str, object] = {}
    moves: list[Move] = []
    fresh: dict[Stored, torch.Tensor] = {}
    inside = _inside(found, work)
    twins = {key: group[0] for group in found.manifest.aliases for key in group}
    filled: set[str] = set()
    for key, entry in work.entries.items():
        own = found.tensors.get(key)
        if not isinstance(entry, Stored):
            values[key] = _held(key, entry, own, work, log)
        elif own is not None and key in inside and own.shape == entry.shape:
            if (name := twins.get(key, key)) not in filled:
                moves += moves_of(key, entry, own)
            filled.add(name)
            values[key] = own
        else:
            if entry not in fresh:
                fresh[entry] = blank(entry)
                moves += moves_of("", entry, fresh[entry])
            values[key] = fresh[entry]
    for key in (*work.plan.missing_keys, *(kept.key for kept in work.plan.kept)):
        values[key] = _present(key, found)
    total = sum(move.span.nbytes for move in moves) if work.tell is not None else 0
    read_all(moves, work.files, work.begun, counter(work.tell, total))
    work.begun.discard("")
    _dress(values, found, work)
    return values


def _inside(found: Survey, work: Work) -> Set[str]:
    """The keys whose tensors bytes may be read into, with nobody else having a say."""
    if found.rewrites or work.assign or _swaps():
        return frozenset()
    return found.tensors.keys() - found.odd.keys() - overlapping(found.tensors)


def _swaps() -> bool:
    """Whether the user has told torch to exchange tensors in a load, instead of writing to them."""
    return bool(torch.__future__.get_swap_module_params_on_conversion())


def _dress(values: dict[str, object], found: Survey, work: Work) -> None:
    """Give tensors that were read anew what the model's have: their share, their device, the Parameter around them."""
    dressed: dict[tuple[Stored, int], torch.Tensor] = {}
    for key, entry in work.entries.items():
        own, value = found.tensors.get(key), values[key]
        if value is own or own is None or not (isinstance(entry, Stored) and isinstance(value, torch.Tensor)):
            continue
        if (entry, id(own)) not in dressed:  # names of one tensor stay one
            if is_sharded(own):
                value = share(value, own)
            elif work.assign:
                value = value.to(work.placement.meta.get(key) or _home(own))
            dressed[entry, id(own)] = like_parameter(value, own) if work.assign else value
        values[key] = dressed[entry, id(own)]


def _held(key: str, entry: Entry, own: torch.Tensor | None, work: Work, log: Undo) -> object:
    """The value in memory as the model's loading code is to see it."""
    if isinstance(entry, Extra):
        return plain(entry.tree, work.files)
    assert isinstance(entry, Held)
    value = entry.value
    if not isinstance(value, torch.Tensor):
        return value
    if is_sharded(own) and not is_sharded(value):
        value = share(value.detach(), own)
        return like_parameter(value, own) if work.assign and own is not None else value
    if work.assign and key in work.placement.meta:
        made = work.made.get(id(value))
        if made is None:
            moved = value.to(work.placement.meta[key])
            made = work.made[id(value)] = like_parameter(moved, value if own is None else own)
        return made
    if work.assign and value.is_leaf:
        log.flags.append((value, value.requires_grad))
    return value


def _home(own: torch.Tensor) -> torch.device:
    default = torch.get_default_device()
    return own.device if not own.is_meta else default if default.type != "meta" else torch.device("cpu")


def like_parameter(value: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """The value as a Parameter where the other is one, so that tied names stay one object when it is assigned."""
    return nn.Parameter(value, model.requires_grad) if isinstance(model, nn.Parameter) else value


def _present(key: str, found: Survey) -> object:
    """The model's own value for a key that the file need not have."""
    if key in found.tensors:
        return found.tensors[key]
    return found.modules[key.rpartition(".")[0]].get_extra_state()


def _load(model: nn.Module, found: Survey, state: Mapping[str, object], work: Work) -> bool:
    try:
        with whole(model):
            return strict_load(model, state, work.assign, None if found.own_code else found.modules)
    except Exception as failure:
        if isinstance(failure, RuntimeError) and str(failure).startswith("Error(s) in loading state_dict"):
            raise KeyMismatchError(Problem("strict", work.plan.path, {"torch": str(failure)})) from failure
        facts = {"model": work.plan.model, "error": f"{type(failure).__name__}: {failure}"}
        raise of_both_types(ModelCodeError, Problem("model-code", work.plan.path, facts), failure) from failure
