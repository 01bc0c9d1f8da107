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
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from smartload.errors import KeyMismatchError, PlacementError, UnreadableError, model_code_error
from smartload.report import KeyPlan
from smartload.records import ByteReader, Entry, Extra, Held, Placement, Problem, Span
from smartload.rehearse import Metadata, state_dict
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
        _move(model, found, work, log)
        if work.placement.moves or work.placement.meta:
            found = survey(model)
        blank = _blank(found, work)
        values = _values(found, work)
        for reader in work.files:
            reader.check_unchanged()
        _load(model, state_dict(values, work.metadata), work)
        unwritten = [key for key, (tensor, mark) in blank.items() if _mark(tensor) == mark]
        if unwritten:
            raise PlacementError(Problem("meta-missing", facts={"names": unwritten}))
        return survey(model) if found.rewrites or work.assign else found
    except BaseException as failure:
        log.restore()
        if work.begun and not work.undo:
            raise UnreadableError(
                Problem("half-loaded", work.plan.path, {"keys": sorted(work.begun), "cause": repr(failure)})
            ) from failure
        raise


def _move(model: nn.Module, found: Survey, work: Work, log: Undo) -> None:
    meta = {} if work.assign else work.placement.meta
    homes = {id(found.tensors[key]): (key, device) for key, device in meta.items()}
    new: dict[int, torch.Tensor] = {}
    for module in found.modules.values() if homes else ():
        for group in (module._parameters, module._buffers):
            for name, tensor in group.items():
                if tensor is not None and id(tensor) in homes and id(tensor) not in new:
                    key, device = homes[id(tensor)]
                    new[id(tensor)] = real = _materialised(tensor, device, key in work.plan.pairs)
                    _exchange(tensor, real, found, log)
    for path, device in work.placement.moves:  # last, because torch moves nothing that has no memory
        _bring(model.get_submodule(path), device)
    for optimizer in work.optimizers:
        _follow(optimizer)


def _blank(found: Survey, work: Work) -> dict[str, tuple[torch.Tensor, object]]:
    """Tensors that were on meta and that only loading code of the model's own can give a value, with a mark of their state."""
    keys = () if work.assign else [key for key in work.placement.meta if key not in work.plan.pairs]
    ours = {key: found.tensors[key] for key in keys if ordinary(found.tensors[key])}
    return {key: (tensor, _mark(tensor)) for key, tensor in ours.items() if not tensor.is_inference()}


def _mark(tensor: torch.Tensor) -> object:
    """Different after every write: torch counts them."""
    return tensor._version, tensor.data_ptr()


def _bring(module: nn.Module, device: str) -> None:
    """Move a module; what `assign` will replace and has no memory stays."""
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        module._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
    else:
        module.to(device)


def _materialised(tensor: torch.Tensor, device: str, filled: bool) -> torch.Tensor:
    """Memory for a tensor on meta; zeros where the model's own code, not the file, gives the value."""
    if is_lazy(tensor):
        return _vacant(tensor, device)
    if not ordinary(tensor):
        return torch.empty_like(tensor, device=device)  # a subclass knows how it is made, a DTensor its mesh
    real = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    if not filled:
        real.zero_()
    return nn.Parameter(real, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else real


def _vacant(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """An uninitialised tensor like this one; torch gives it its shape in the load."""
    if isinstance(tensor, nn.Parameter):
        return UninitializedParameter(tensor.requires_grad, device=device, dtype=tensor.dtype)
    return UninitializedBuffer(device=device, dtype=tensor.dtype)


def _exchange(tensor: torch.Tensor, real: torch.Tensor, found: Survey, log: Undo) -> None:
    """Put the memory under the same Python object; a new object takes its place where torch cannot do that."""
    vars(real).update(vars(tensor))
    try:
        torch.utils.swap_tensors(tensor, real)
        log.swapped.append((tensor, real))
    except RuntimeError:  # a weak reference to the tensor exists
        for module in found.modules.values():
            for group in (module._parameters, module._buffers):
                for name, held in group.items():
                    if held is tensor:
                        group[name] = real  # type: ignore[assignment]


def _follow(optimizer: torch.optim.Optimizer) -> None:
    """Bring the optimizer's state to the devices of its parameters; `step` stays where torch keeps it."""
    for group in optimizer.param_groups:
        on_device = group.get("capturable") or group.get("fused")
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                if name != "step" or on_device:
                    state[name] = _brought(value, parameter.device)


def _brought(value: object, device: torch.device) -> object:
    """Tensors and plain containers of them on the device; containers are made anew, for the way back."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) in (list, tuple):
        return type(value)(_brought(each, device) for each in value)  # type: ignore[call-overload]
    if type(value) is dict:
        return {name: _brought(each, device) for name, each in value.items()}
    return value


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
