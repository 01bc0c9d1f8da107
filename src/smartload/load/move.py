"""Give memory to tensors on meta, and move modules and the state of optimizers to their devices.

Each change is written to the undo's log, or is one that the undo has noted before.
"""

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
"""Key -> a tensor that loading code must fill, and its `_mark` before the load."""


def materialise_and_move(survey: Survey, placement: Placement, plan: KeyPlan, assign: bool, log: Undo) -> None:
    """Give memory to tensors on meta, and move the modules that must move.

    Args:
        survey: the model before.
        placement: which tensors get memory, which modules move, and where.
        plan: which keys the file has a value for.
        assign: whether the file's own tensors replace the model's; none on meta needs memory then.
        log: is told which tensors were exchanged.
    """
    new = {} if assign else placement.new
    places = {id(survey.tensors[key]): (key, device) for key, device in new.items()}
    done: set[int] = set()  # tied names are one tensor: it gets memory once
    for module in survey.modules.values() if places else ():
        for group in (module._parameters, module._buffers):
            for tensor in group.values():
                if tensor is not None and id(tensor) in places and id(tensor) not in done:
                    key, device = places[id(tensor)]
                    done.add(id(tensor))
                    _exchange(tensor, _materialise(tensor, device, key in plan.pairs), survey, log)
    for path, device in placement.moves:  # last, because `to` raises for a tensor on meta
        _move_module(survey.model.get_submodule(path), device)


def tensors_to_be_filled(survey: Survey, placement: Placement, plan: KeyPlan, assign: bool) -> Marks:
    """Give the tensors that were on meta and are not in the file: only the model's own code can give them a value."""
    keys = () if assign else [key for key in placement.new if key not in plan.pairs]
    # Of a lazy tensor, a subclass or one made in inference mode it cannot be told whether it was written to.
    ordinary = {key: survey.tensors[key] for key in keys if is_ordinary(survey.tensors[key])}
    return {key: (tensor, _mark(tensor)) for key, tensor in ordinary.items() if not tensor.is_inference()}


def check_filled(marks: Marks) -> None:
    """Refuse a load that left one of these tensors unwritten: it would hold zeros that nobody chose.

    Raises:
        PlacementError: names them.
    """
    absent = [key for key, (tensor, mark) in marks.items() if _mark(tensor) == mark]
    if absent:
        raise PlacementError(Problem("meta-missing", facts={"names": absent}))


def move_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Move the optimizer's state to the devices of its parameters; `step` stays where torch keeps it.

    A parameter keeps its identity in a move, so the optimizer still has it, but its state stays on the old device and
    the next `step()` would raise.
    """
    for group in optimizer.param_groups:
        # As in `Optimizer.load_state_dict`: torch reads the count of steps on the CPU, unless one of these is set.
        step_on_device = group.get("capturable") or group.get("fused")
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                if name != "step" or step_on_device:
                    state[name] = _moved_copy(value, parameter.device)


def _moved_copy(value: object, device: torch.device) -> object:
    """Give a value of an optimizer's state with its tensors on the device, in dicts, lists and tuples too.

    Containers are made anew: the undo puts the old ones back as they are.
    """
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict) and type(value) is dict:
        return {name: _moved_copy(each, device) for name, each in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_moved_copy(each, device) for each in value)
    return value


def _mark(tensor: torch.Tensor) -> object:
    """Give a value that differs after every write to the tensor."""
    # torch counts writes in `_version`; assigning to `.data` is not counted, but changes the address.
    return tensor._version, tensor.data_ptr()


def _move_module(module: nn.Module, device: str) -> None:
    """Move a module to the device; tensors on meta, which `assign` will replace, stay."""
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        # `to` raises for them; `_apply` is what it calls for each tensor.
        module._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))  # type: ignore[no-untyped-call]
    else:
        module.to(device)


def _materialise(tensor: torch.Tensor, device: str, in_file: bool) -> torch.Tensor:
    """Make a tensor with memory like one on meta: same shape, strides, dtype, class and flag."""
    if is_lazy(tensor):  # it stays lazy: torch gives it its shape in the load
        kind = UninitializedParameter if isinstance(tensor, nn.Parameter) else UninitializedBuffer
        return kind(requires_grad=tensor.requires_grad, device=device, dtype=tensor.dtype)  # type: ignore[call-arg]
    if not is_ordinary(tensor):  # made by the subclass's own code: a DTensor needs its mesh
        return torch.empty_like(tensor, device=device)
    real = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    # Where the file lacks the key, the values would be whatever the memory held before.
    if not in_file:
        real.zero_()
    return nn.Parameter(real, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else real


def _exchange(tensor: torch.Tensor, real: torch.Tensor, survey: Survey, log: Undo) -> None:
    """Give the memory of `real` to the Python object of `tensor`, or put a new object in its place."""
    vars(real).update(vars(tensor))  # the swap exchanges the attributes, too
    # `.data = real` is refused across meta and real devices, so the two objects swap all that they are. Whoever holds
    # the tensor (an optimizer, a tied name) then holds the one with memory.
    log.before_swap(tensor, real)
    try:
        torch.utils.swap_tensors(tensor, real)  # type: ignore[no-untyped-call]
    except RuntimeError:
        # torch refuses where a weak reference to the tensor exists, or C++ code refers to it: these would follow the
        # wrong object. Every module gets the new one then; the report says so, as optimizers still hold the old one.
        for module in survey.modules.values():
            for group in (module._parameters, module._buffers):
                for name, registered in group.items():
                    if registered is tensor:
                        group[name] = real  # type: ignore[assignment]
