"""Bringing modules, tensors on meta and the state of optimizers to their devices, logged for the way back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from smartload.errors import PlacementError
from smartload.load.undo import Undo
from smartload.place.memory import is_ordinary
from smartload.place.survey import Survey
from smartload.records.problems import Problem
from smartload.records.report import KeyPlan
from smartload.records.requests import Placement

Marks = Mapping[str, tuple[torch.Tensor, object]]


def materialise_and_move(survey: Survey, placement: Placement, plan: KeyPlan, assign: bool, log: Undo) -> None:
    """Give memory to what is on meta (unless `assign` brings it) and move the modules that must move."""
    new = {} if assign else placement.new
    homes = {id(survey.tensors[key]): (key, device) for key, device in new.items()}
    done: set[int] = set()
    for module in survey.modules.values() if homes else ():
        for group in (module._parameters, module._buffers):
            for tensor in group.values():
                if tensor is not None and id(tensor) in homes and id(tensor) not in done:
                    key, device = homes[id(tensor)]
                    done.add(id(tensor))
                    _exchange(tensor, _materialised(tensor, device, key in plan.pairs), survey, log)
    for path, device in placement.moves:  # last, because torch moves nothing that has no memory
        _bring(survey.model.get_submodule(path), device)


def tensors_to_be_filled(survey: Survey, placement: Placement, plan: KeyPlan, assign: bool) -> Marks:
    """Tensors that were on meta and that only loading code of the model's own can give a value, each with its mark."""
    keys = () if assign else [key for key in placement.new if key not in plan.pairs]
    ours = {key: survey.tensors[key] for key in keys if is_ordinary(survey.tensors[key])}
    return {key: (tensor, _mark(tensor)) for key, tensor in ours.items() if not tensor.is_inference()}


def check_filled(marks: Marks) -> None:
    """PlacementError where such a tensor is as it was: it would hold zeros that nobody chose."""
    absent = [key for key, (tensor, mark) in marks.items() if _mark(tensor) == mark]
    if absent:
        raise PlacementError(Problem("meta-missing", facts={"names": absent}))


def move_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
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
    if isinstance(value, dict) and type(value) is dict:
        return {name: _brought(each, device) for name, each in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_brought(each, device) for each in value)
    return value


def _mark(tensor: torch.Tensor) -> object:
    """Different after every write: torch counts them."""
    return tensor._version, tensor.data_ptr()


def _bring(module: nn.Module, device: str) -> None:
    """Move a module; what `assign` will replace and has no memory stays."""
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        module._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))  # type: ignore[no-untyped-call]
    else:
        module.to(device)


def _materialised(tensor: torch.Tensor, device: str, filled: bool) -> torch.Tensor:
    """Memory for a tensor on meta; zeros where the model's own code, not the file, gives the value."""
    if is_lazy(tensor):  # torch gives it its shape in the load
        kind = UninitializedParameter if isinstance(tensor, nn.Parameter) else UninitializedBuffer
        return kind(requires_grad=tensor.requires_grad, device=device, dtype=tensor.dtype)  # type: ignore[call-arg]
    if not is_ordinary(tensor):  # a subclass knows how it is made, a DTensor its mesh
        return torch.empty_like(tensor, device=device)
    real = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    if not filled:
        real.zero_()
    return nn.Parameter(real, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else real


def _exchange(tensor: torch.Tensor, real: torch.Tensor, survey: Survey, log: Undo) -> None:
    """Put the memory under the same Python object; a new object takes its place where torch cannot do that."""
    vars(real).update(vars(tensor))
    try:
        torch.utils.swap_tensors(tensor, real)  # type: ignore[no-untyped-call]
        log.swapped.append((tensor, real))
    except RuntimeError:  # a weak reference to the tensor exists
        for module in survey.modules.values():
            for group in (module._parameters, module._buffers):
                for name, held in group.items():
                    if held is tensor:
                        group[name] = real  # type: ignore[assignment]
