"""The log of a load: everything that a model, and its optimizers, were before, and the way back."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from smartload.place.memory import TINY, is_ordinary, is_writable, memory_at, reach


class Undo:
    """What a model was: its modules' attributes, its tensors' memory and, if `bits`, their values.

    Taking it costs no memory to speak of without `bits`, and a copy of the model with it. Of `tensors` the values
    alone are kept: they are those of a model of which nothing else can change.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        bits: bool,
        tensors: Iterable[torch.Tensor] = (),
    ) -> None:
        distinct = {id(module): module for module in modules}.values()
        self._modules = [(module, dict(vars(module)), _containers(module)) for module in distinct]
        registered = {
            id(tensor): tensor
            for module in distinct
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        }
        self._tensors = [_Saved(tensor, bits) for tensor in registered.values()]
        with torch.no_grad():
            once = {id(tensor): tensor for tensor in tensors if bits}.values()
            self._values = [(tensor, _bits(tensor) or _copy(tensor)) for tensor in once]
        self._states = [(each, {p: dict(state) for p, state in each.state.items()}) for each in optimizers]
        self.swapped: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Pairs that were exchanged by torch.utils.swap_tensors, in order."""
        self.flags: list[tuple[torch.Tensor, bool]] = []
        """Tensors of the caller whose requires_grad the load may change, with what it was."""

    def restore(self) -> None:
        """Bring everything back; the objects are the same as before, and so are their bits.

        Another Ctrl-C in the middle of it begins it anew, so that it is always done when this returns.
        """
        while True:
            try:
                with torch.no_grad():
                    self._restore()
                return
            except KeyboardInterrupt:
                continue

    def _restore(self) -> None:
        while self.swapped:
            torch.utils.swap_tensors(*self.swapped[-1])  # type: ignore[no-untyped-call]
            self.swapped.pop()
        for module, attributes, containers in self._modules:
            vars(module).clear()
            vars(module).update(attributes)
            for container, content in containers:
                _refill(container, content)
        for saved in self._tensors:
            saved.restore()
        for tensor, values in self._values:
            if isinstance(values, bytes):
                memory_at(tensor.data_ptr(), len(values)).raw = values
            else:
                tensor.copy_(values)
        for tensor, requires_grad in self.flags:
            if tensor.requires_grad is not requires_grad:
                tensor.requires_grad_(requires_grad)
        for optimizer, states in self._states:
            for p, state in states.items():
                optimizer.state[p].clear()
                optimizer.state[p].update(state)


class _Saved:
    """One tensor: the memory it had, its gradient, its class, its attributes and, if asked for, its values."""

    __slots__ = ("attributes", "data", "grad", "grad_data", "kind", "plain", "requires_grad", "tensor", "values")

    def __init__(self, tensor: torch.Tensor, bits: bool) -> None:
        self.tensor, self.kind = tensor, type(tensor)
        self.plain = is_ordinary(tensor)
        self.attributes = dict(vars(tensor))
        self.requires_grad = tensor.requires_grad
        self.grad = self.grad_data = self.data = self.values = None
        if is_lazy(tensor):
            return
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            if tensor.is_leaf or tensor.retains_grad:  # torch warns of every other question for it
                self.grad = tensor.grad
                self.grad_data = None if self.grad is None else self.grad.data
            with contextlib.nullcontext() if self.plain else contextlib.suppress(Exception):
                # A class of the model's own need not know how to be viewed or cloned.
                self.data = tensor.data
                self.values = _copy(tensor) if bits and not tensor.is_meta and is_writable(tensor) else None

    def restore(self) -> None:
        tensor = self.tensor
        with torch._C.DisableTorchFunctionSubclass():
            if type(tensor) is not self.kind:  # a lazy one that was given its shape
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
                tensor.__class__ = self.kind
            if vars(tensor) != self.attributes:
                vars(tensor).clear()
                vars(tensor).update(self.attributes)
            if self.data is not None and not (self.plain and _same_memory(tensor, self.data)):
                tensor.data = self.data
            if self.values is not None:
                _regrown(tensor)
                tensor.detach().copy_(self.values)
            if not tensor.is_leaf or self.data is None:
                return
            if tensor.requires_grad is not self.requires_grad:
                tensor.requires_grad_(self.requires_grad)
            if self.grad is not None and self.grad_data is not None:
                self.grad.data = self.grad_data
            if tensor.grad is not self.grad:
                tensor.grad = self.grad


def _bits(tensor: torch.Tensor) -> bytes | None:
    """The bytes of a small tensor, which take a fraction of the time that a tensor more takes; None for any other."""
    if tensor.nbytes <= TINY and tensor.is_cpu and tensor.is_contiguous():
        bits: bytes = memory_at(tensor.data_ptr(), tensor.nbytes).raw
        return bits
    return None


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """The values, on the CPU, so that the log of a model on a GPU takes none of its memory."""
    return tensor.clone() if tensor.device.type == "cpu" else tensor.to("cpu")


def _regrown(tensor: torch.Tensor) -> None:
    """Give back the memory that a hook may have freed by resizing the storage; writing to it would end the process."""
    if tensor.layout is torch.strided and tensor.numel():
        needed = int(tensor.storage_offset() + reach(tensor)) * tensor.element_size()
        if tensor.untyped_storage().nbytes() < needed:
            tensor.untyped_storage().resize_(needed)


def _same_memory(tensor: torch.Tensor, data: torch.Tensor) -> bool:
    return (
        tensor.device == data.device
        and tensor.dtype == data.dtype
        and tensor.data_ptr() == data.data_ptr()
        and (tensor.shape, tensor.stride()) == (data.shape, data.stride())
    )


_KINDS = (dict, OrderedDict, list, set)


def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
    """The module's dicts, lists and sets, and those in them, each with a copy of what it holds."""
    kept: dict[int, tuple[Any, Any]] = {}
    waiting: list[Any] = [vars(module)]
    while waiting:
        value = waiting.pop()
        for inner in value.values() if isinstance(value, dict) else value:
            if type(inner) in _KINDS and id(inner) not in kept:
                kept[id(inner)] = inner, inner.copy() if inner else ()  # a module has a dozen empty ones
                waiting.append(inner)
    return list(kept.values())


def _refill(container: Any, content: Any) -> None:
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)
