"""Model and device -> Placement, or a reasoned refusal. It looks; nothing moves here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn, TypeAlias

import torch
from torch import nn

from smartload.errors import PlacementError
from smartload.records import Placement, Problem
from smartload.report import KeyPlan
from smartload.spelling import below
from smartload.survey import Survey, is_sharded, wrapped_child

Device: TypeAlias = "str | int | torch.device | Sequence[int | str | torch.device] | None"


def place(model: nn.Module, survey: Survey, device: Device, plan: KeyPlan, assign: bool) -> Placement:
    """Where each tensor of the model must land, and what has to move for it.

    Args:
        model: the model as it is.
        survey: what was seen of it.
        device: as in `smart_load`.
        plan: the names that will be loaded; tensors on meta need one.
        assign: whether the file's tensors replace the model's.

    Raises:
        PlacementError: the device is not there, or the model is bound elsewhere. Nothing has moved.
    """
    parallel = {path: module for path, module in survey.modules.items() if _device_ids(module)}
    target = _target(model, device)
    moves: list[tuple[str, str]] = []
    for path, module in parallel.items():
        source = torch.device(module.src_device_obj)
        if target is not None and target != source:
            ids = ", ".join(f"{source.type}:{i}" for i in _device_ids(module))
            _refuse("data-parallel", device=str(target), ids=ids, first=str(source), where=path)
        if any(tensor.device != source for tensor in _tensors(survey, path) if not tensor.is_meta):
            moves.append((path, str(source)))
    if target is not None and any(tensor.device != target for tensor in _tensors(survey, "") if not tensor.is_meta):
        _check_movable(model, survey, target)
        moves = [("", str(target))]
    home = {path: str(module.src_device_obj) for path, module in parallel.items()}
    meta = {} if assign else _materialised(survey, target, home, plan)
    return Placement(None if target is None else str(target), tuple(moves), meta)


def _target(model: nn.Module, device: Device) -> torch.device | None:
    if device is None:
        return None
    if isinstance(device, (list, tuple)):
        wanted = [_resolve(each) for each in device]
        ids = _device_ids(model)
        if not ids:
            _refuse("several-devices", device=list(device), model=type(model).__name__)
        if wanted != [torch.device(model.src_device_obj.type, i) for i in ids]:
            _refuse("other-devices", device=list(device), ids=ids)
        return None
    return _resolve(device)


def _resolve(device: object) -> torch.device:
    """The device with its index, once it is known to be there."""
    if isinstance(device, bool) or not isinstance(device, (int, str, torch.device)):
        raise TypeError(f"device must be None, a device, a string, an int or a list of these, not {device!r}")
    try:
        want = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except RuntimeError as error:
        raise PlacementError(Problem("no-such-device", facts={"device": device, "torch": str(error)})) from None
    if want.type == "cpu":
        return torch.device("cpu")
    if want.type == "meta":
        _refuse("meta-device")
    try:
        backend = torch.get_device_module(want)
        count = backend.device_count() if backend.is_available() else 0
    except (RuntimeError, AttributeError):
        backend, count = None, 0
    index = want.index if want.index is not None else getattr(backend, "current_device", int)() if count else 0
    if index >= count:
        _refuse("absent-device", device=device, kind=want.type, count=count, torch=torch.__version__)
    return torch.device(want.type, index)


def _device_ids(module: nn.Module) -> list[int]:
    """The devices of a DataParallel; empty for every other module, and where it found no device to use."""
    return list(module.device_ids) if isinstance(module, nn.DataParallel) else []


def _tensors(survey: Survey, path: str) -> Iterator[torch.Tensor]:
    """All parameters and buffers, persistent or not, of the module at the path."""
    for where, module in survey.modules.items():
        if where == path or below(where, path) is not None:
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    yield tensor


def _check_movable(model: nn.Module, survey: Survey, target: torch.device) -> None:
    """Refuse to move what a wrapper has placed."""
    for module in survey.modules.values():
        bound = getattr(module, "hf_device_map", None)
        if isinstance(bound, dict) and len(set(bound.values())) > 1:
            _refuse("bound", device=str(target), how=f"dispatched over {_listed(bound)} (hf_device_map)")
        kind = wrapped_child(type(module)) and type(module).__name__
        if kind == "DistributedDataParallel":
            here = next((str(tensor.device) for tensor in module.parameters()), "its device")
            _refuse("bound", device=str(target), how=f"wrapped in DistributedDataParallel, which is bound to {here}")
        if kind == "FullyShardedDataParallel" or any(is_sharded(p) for p in module._parameters.values()):
            _refuse("bound", device=str(target), how="sharded (FSDP or DTensor)")


def _listed(bound: Mapping[str, object]) -> str:
    return ", ".join(dict.fromkeys(f"cuda:{where}" if isinstance(where, int) else str(where) for where in bound.values()))


def _materialised(
    survey: Survey, target: torch.device | None, home: Mapping[str, str], plan: KeyPlan
) -> dict[str, str]:
    """The device of every tensor on meta, which must all come from the file."""
    on_meta = [key for key, tensor in survey.tensors.items() if tensor.is_meta]
    lost = [key for key, tensor in survey.transient.items() if tensor.is_meta]
    if lost:
        _refuse("meta-buffers", names=lost)
    if not on_meta:
        return {}
    hooked = [path for path, module in survey.modules.items() if hasattr(module, "_hf_hook")]
    if hooked:
        _refuse("offloaded", names=on_meta)
    absent = [key for key in on_meta if key not in plan.pairs and not plan.rehearsed]
    if absent:
        _refuse("meta-missing", names=absent)
    default = str(target or torch.get_default_device())
    if default == "meta":
        _refuse("meta-device")
    return {key: next((home[p] for p in home if below(key, p) is not None), default) for key in on_meta}


def _refuse(kind: str, **facts: object) -> NoReturn:
    raise PlacementError(Problem(kind, facts=facts))


