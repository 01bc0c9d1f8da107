"""The only room that writes to a model: it moves, reads into place, ends in the strict load, and undoes all of it.

Where the model brings no loading code of its own, the bytes are read into its own tensors and these very
tensors go through `load_state_dict(strict=True)`: copying a tensor onto itself is free, and torch's own hooks,
version rules and verdict close the call. Where it brings such code, real tensors go through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from smartload.errors import KeyMismatchError, UnreadableError, model_code_error
from smartload.report import KeyPlan
from smartload.records import ByteReader, Entry, Extra, Held, Placement, Problem, Span
from smartload.rehearse import Metadata, state_dict
from smartload.settle import check_filled, follow, settle, unfilled
from smartload.survey import Survey, is_sharded, memory_of, ordinary, survey, writable
from smartload.transfer import Move, check_cast, check_held, load, read_all
from smartload.undo import Undo

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
    done: Callable[[int], None] | None = None
    begun: set[str] = field(default_factory=set)
    """Keys whose tensors may hold a mixture, should the load fail."""


def keeps_values(found: Survey, undo: bool | str) -> bool:
    """What undo="auto" means for this model: yes where code that no check foresees may fail, or the copy is small."""
    if undo != "auto":
        return bool(undo)
    plain = [tensor for tensor in found.tensors.values() if ordinary(tensor)]
    unforeseen = found.own_code or len(plain) < len(found.tensors) or not all(map(writable, plain))
    return unforeseen or sum(tensor.nbytes for tensor in plain) <= SMALL


def check_casts(found: Survey, work: Work) -> None:
    """CastError where a value of the file cannot be held by the model's dtype. Nothing is written."""
    if work.assign:
        return
    for key, entry in work.entries.items():
        target = found.tensors.get(key)
        if target is None or not ordinary(target):
            continue
        if isinstance(entry, Span):
            check_cast(Move(key, entry, target), work.plan.path, work.files)
        elif isinstance(entry, Held) and isinstance(entry.value, torch.Tensor) and ordinary(entry.value):
            check_held(key, entry.value, target, work.plan.path)


def commit(model: nn.Module, found: Survey, work: Work) -> Survey:
    """Load, or leave the model exactly as it was.

    Returns:
        The model as it is now.

    Raises:
        KeyMismatchError: torch's own strict load refused after all.
        PlacementError: a tensor on meta got no value from the model's own loading code either.
        UnreadableError: the file failed or changed under the reading.
        SmartLoadError: the model's own loading code raised; it is the cause.
    """
    log = Undo(found.modules.values(), work.optimizers, bits=work.undo)
    try:
        settle(model, found, work.placement, work.plan, work.assign, log)
        for optimizer in work.optimizers:
            follow(optimizer)
        if work.placement.moves or work.placement.meta:
            found = survey(model)
        marks = unfilled(found, work.placement, work.plan, work.assign)
        values = _values(found, work)
        for reader in work.files:
            reader.check_unchanged()
        _load(model, state_dict(values, work.metadata), work)
        check_filled(marks)
        return survey(model) if found.rewrites or work.assign else found
    except BaseException as failure:
        log.restore()
        if work.begun and not work.undo:
            raise UnreadableError(
                Problem("half-loaded", work.plan.path, {"keys": sorted(work.begun), "cause": repr(failure)})
            ) from failure
        raise


def _values(found: Survey, work: Work) -> dict[str, object]:
    """The state dict for the strict load; tensors that can be filled where they are have been filled."""
    values: dict[str, object] = {}
    moves: dict[object, Move] = {}
    shared: dict[Span, torch.Tensor] = {}
    for key, entry in work.entries.items():
        own = found.tensors.get(key)
        if isinstance(entry, Span) and own is not None and _in_place(entry, own, found, work):
            moves.setdefault(memory_of(own), Move(key, entry, own))
            values[key] = own
        else:
            values[key] = _value(key, entry, own, shared, work)
    for key in (*work.plan.missing_keys, *(kept.key for kept in work.plan.kept)):
        values[key] = _present(key, found)
    read_all(list(moves.values()), work.files, work.begun, work.done)
    return values


def _in_place(span: Span, own: torch.Tensor, found: Survey, work: Work) -> bool:
    """Whether bytes may be read into the model's own tensor, with nobody else having a say."""
    return (
        not (found.rewrites or work.assign or torch.__future__.get_swap_module_params_on_conversion())
        and ordinary(own)
        and writable(own)
        and not own.is_inference()
        and not own.is_meta
        and own.numel() == math.prod(span.shape)
    )


def _value(
    key: str, entry: Entry, own: torch.Tensor | None, shared: dict[Span, torch.Tensor], work: Work
) -> object:
    """The value as the model's loading code is to see it; names of one tensor share it."""
    if isinstance(entry, Extra):
        return _plain(entry.tree, work.files)
    if isinstance(entry, Held):
        value = entry.value
        if work.assign and key in work.placement.meta and isinstance(value, torch.Tensor):
            value = like_parameter(value.to(work.placement.meta[key]), value)
        return value
    assert isinstance(entry, Span)
    if entry not in shared:
        tensor = load(entry, work.files)
        if own is not None and is_sharded(own):
            tensor = _sharded(tensor, own)
        if work.assign and own is not None:
            tensor = like_parameter(tensor.to(work.placement.meta.get(key) or _home(own)), own)
        shared[entry] = tensor
    return shared[entry]


def _home(own: torch.Tensor) -> torch.device:
    default = torch.get_default_device()
    return own.device if not own.is_meta else default if default.type != "meta" else torch.device("cpu")


def like_parameter(value: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """The value as a Parameter where the other is one, so that tied names stay one object when it is assigned."""
    return nn.Parameter(value, model.requires_grad) if isinstance(model, nn.Parameter) else value


def _sharded(full: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """This rank's share of a full tensor, laid out as the model's; every rank has read the file, nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(own.device), own.device_mesh, own.placements, src_data_rank=None)  # type: ignore[attr-defined]


def _plain(tree: object, files: Sequence[ByteReader]) -> object:
    """An extra state with the tensors in it loaded."""
    if isinstance(tree, Span):
        return load(tree, files)
    if isinstance(tree, dict):
        return type(tree)((key, _plain(value, files)) for key, value in tree.items())
    if isinstance(tree, (list, tuple)):
        return type(tree)(_plain(value, files) for value in tree)
    return tree


def _present(key: str, found: Survey) -> object:
    """The model's own value for a key that the file need not have."""
    if key in found.tensors:
        return found.tensors[key]
    return found.modules[key.rpartition(".")[0]].get_extra_state()


def _load(model: nn.Module, state: Mapping[str, object], work: Work) -> None:
    try:
        if work.assign:
            model.load_state_dict(state, strict=True, assign=True)
        else:
            model.load_state_dict(state, strict=True)
    except Exception as failure:
        if isinstance(failure, RuntimeError) and str(failure).startswith("Error(s) in loading state_dict"):
            raise KeyMismatchError(Problem("strict", work.plan.path, {"torch": str(failure)})) from failure
        facts = {"model": work.plan.model, "error": f"{type(failure).__name__}: {failure}"}
        raise model_code_error(Problem("model-code", work.plan.path, facts), failure) from failure
