"""The log of a load: everything that a model, and its optimizers, were before, and the way back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from smartload.survey import ordinary, writable


class Undo:
    """What a model was: its modules' attributes, its tensors' memory and, if `bits`, their values.

    Taking it costs no memory to speak of without `bits`, and a copy of the model with it.
    """

    def __init__(self, modules: Iterable[nn.Module], optimizers: Sequence[torch.optim.Optimizer], bits: bool) -> None:
        self.bits = bits
        distinct = {id(module): module for module in modules}.values()
        self._modules = [(module, dict(vars(module)), _containers(module)) for module in distinct]
        tensors = {
            id(tensor): tensor
            for module in distinct
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        }
        self._tensors = [_Saved(tensor, bits) for tensor in tensors.values()]
        self._states = [(optimizer, {p: dict(state) for p, state in optimizer.state.items()}) for optimizer in optimizers]
        self.swapped: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Pairs that were exchanged by torch.utils.swap_tensors, in order."""

    def restore(self) -> None:
        """Bring everything back; the objects are the same as before, and so are their bits."""
        with torch.no_grad():
            for first, second in reversed(self.swapped):
                torch.utils.swap_tensors(first, second)
            for module, attributes, containers in self._modules:
                vars(module).clear()
                vars(module).update(attributes)
                for container, content in containers:
                    _refill(container, content)
            for saved in self._tensors:
                saved.restore()
            for optimizer, states in self._states:
                for p, state in states.items():
                    optimizer.state[p].clear()
                    optimizer.state[p].update(state)


class _Saved:
    """One tensor: the memory it had, its gradient, its class and, if asked for, its values."""

    def __init__(self, tensor: torch.Tensor, bits: bool) -> None:
        self.tensor, self.kind = tensor, type(tensor)
        self.lazy = is_lazy(tensor)
        self.plain = ordinary(tensor)
        self.grad = None if self.lazy else tensor.grad
        self.requires_grad = tensor.requires_grad
        self.data: torch.Tensor | None = None
        self.grad_data = self.grad.data if self.grad is not None else None
        self.values: torch.Tensor | None = None
        if self.lazy:
            return
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            self.data = tensor.data
            if bits and not tensor.is_meta and writable(tensor):
                # On the CPU, so that keeping a log of a model on a GPU takes none of its memory.
                self.values = tensor.detach().clone() if tensor.device.type == "cpu" else tensor.detach().to("cpu")

    def restore(self) -> None:
        tensor = self.tensor
        if self.lazy:
            if type(tensor) is not self.kind:
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
                tensor.__class__ = self.kind
            return
        assert self.data is not None
        with torch._C.DisableTorchFunctionSubclass():
            if not (self.plain and _same_memory(tensor, self.data)):
                tensor.data = self.data
            if self.values is not None:
                tensor.detach().copy_(self.values)
            tensor.requires_grad_(self.requires_grad) if tensor.is_leaf else None
            if self.grad is not None and self.grad_data is not None:
                self.grad.data = self.grad_data
            if tensor.is_leaf and tensor.grad is not self.grad:
                tensor.grad = self.grad


def _same_memory(tensor: torch.Tensor, data: torch.Tensor) -> bool:
    return (
        tensor.device == data.device
        and tensor.dtype == data.dtype
        and tensor.data_ptr() == data.data_ptr()
        and (tensor.shape, tensor.stride()) == (data.shape, data.stride())
    )


def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
    """The module's dicts, lists and sets, each with a copy of what it holds."""
    kinds = (dict, OrderedDict, list, set)
    return [(value, value.copy()) for value in vars(module).values() if type(value) in kinds]


def _refill(container: Any, content: Any) -> None:
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)
