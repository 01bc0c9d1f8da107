"""Note what a model and its optimizers are before a load, and restore it.

Objects stay the same: a module gets back its attributes, a tensor its memory, so that whoever else refers to a
Parameter (an optimizer, a hook, a tied name) still refers to the model's. Values are copied only if asked for.
"""

from __future__ import annotations

import contextlib
import copyreg
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from smartload.place.memory import SMALL_TENSOR_BYTES, extent, is_ordinary, is_writable, memory_at


class Undo:
    """The state of modules, their tensors and optimizers when it was made, which `restore` brings back.

    Args:
        modules: whose attributes and registered tensors may change: memory, flags, gradients, objects.
        optimizers: whose state may change.
        bits: whether to keep the values of tensors too, which takes a copy of the model. Without it, values that
            were overwritten in place are lost; all else is restored.
        tensors: of which nothing but the values can change. Keeping only these is several times faster, and is all
            that most loads need.

    Attributes:
        flags: tensors of the caller, with the `requires_grad` that they had before the load.
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
        self._tensors = [_SavedTensor(tensor, bits) for tensor in registered.values()]
        # Parameters that require a gradient can be copied from and to only without gradients.
        with torch.no_grad():
            distinct_tensors = {id(tensor): tensor for tensor in tensors if bits}.values()
            self._values = [(tensor, _small_bytes(tensor) or _copy(tensor)) for tensor in distinct_tensors]
        # The load replaces tensors in the state of a parameter, but never writes to them: no copies are needed.
        self._states = [(each, {p: dict(state) for p, state in each.state.items()}) for each in optimizers]
        self._swaps: list[tuple[torch.Tensor, torch.Tensor, dict[str, object]]] = []
        self.flags: list[tuple[torch.Tensor, bool]] = []

    def before_swap(self, tensor: torch.Tensor, real: torch.Tensor) -> None:
        """Note that a tensor on meta is about to be exchanged, by torch.utils.swap_tensors, for one with memory."""
        # A DTensor keeps its shard and its placement in slots.
        slots = copyreg._slotnames(type(tensor))  # type: ignore[attr-defined]
        self._swaps.append((tensor, real, {name: getattr(tensor, name) for name in slots if hasattr(tensor, name)}))

    def restore(self) -> None:
        """Bring everything back: the same objects and, if they were kept, the same bits.

        A Ctrl-C meanwhile does not stop it: each step can be repeated, so it starts again from the beginning. Whatever
        else is raised meanwhile, calling it once more does the rest.
        """
        grad_enabled = torch.is_grad_enabled()
        while True:
            try:
                with torch.no_grad():
                    self._restore()
                return
            except KeyboardInterrupt:
                torch.set_grad_enabled(grad_enabled)  # the interrupt may have come in `no_grad` itself

    def _restore(self) -> None:
        # Before all else, because a tensor that holds the content of another would be given the wrong memory below. By
        # the one step that `swap_tensors` ends with: the steps before it could be interrupted, and its checks refuse
        # where the model's own code has made a weak reference meanwhile. A tensor on meta was not swapped yet, or is
        # swapped back already.
        for tensor, real, slots in self._swaps:
            if not tensor.is_meta:
                torch._C._swap_tensor_impl(tensor, real)  # type: ignore[attr-defined]
            for name, value in slots.items():
                setattr(tensor, name, value)
        # Modules before tensors: which objects a module has registered is in its `_parameters` and `_buffers`. Both
        # dicts are refilled, not replaced, because others may hold them.
        for module, attributes, containers in self._modules:
            vars(module).clear()
            vars(module).update(attributes)
            for container, content in containers:
                _refill(container, content)
        for saved in self._tensors:
            saved.restore()
        for tensor, values in self._values:
            if isinstance(values, bytes):
                memory_at(tensor.data_ptr(), len(values))[:] = values
            else:
                tensor.copy_(values)
        for tensor, requires_grad in self.flags:
            if tensor.requires_grad is not requires_grad:
                tensor.requires_grad_(requires_grad)
        for optimizer, states in self._states:
            for p, state in states.items():
                optimizer.state[p].clear()
                optimizer.state[p].update(state)


class _SavedTensor:
    """What one tensor was.

    Attributes:
        tensor: the tensor itself.
        kind: its class.
        ordinary: whether its memory holds its values as they are.
        attributes: what users have set on it.
        requires_grad: its flag.
        grad: its gradient, the object.
        grad_data: the memory of its gradient, which a move replaces.
        data: its memory, as a tensor that shares it; None for a lazy one, and where its class cannot be viewed.
        values: a copy of its values, where one is kept.
    """

    __slots__ = ("attributes", "data", "grad", "grad_data", "kind", "ordinary", "requires_grad", "tensor", "values")

    def __init__(self, tensor: torch.Tensor, bits: bool) -> None:
        self.tensor, self.kind = tensor, type(tensor)
        self.ordinary = is_ordinary(tensor)
        self.attributes = dict(vars(tensor))
        self.requires_grad = tensor.requires_grad
        self.grad = self.grad_data = self.data = self.values = None
        if is_lazy(tensor):  # it has no values yet, and raises when asked for more
            return
        # A subclass would run its `__torch_function__` for every question asked here, which may be slow, change
        # something or raise. This switch has torch answer for it.
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            # Others never have a gradient, and torch warns whoever asks them for it.
            if tensor.is_leaf or tensor.retains_grad:
                self.grad = tensor.grad
                self.grad_data = None if self.grad is None else self.grad.data
            # A class of the model's own need not know how to be viewed or cloned: it is no reason to refuse the load.
            with contextlib.nullcontext() if self.ordinary else contextlib.suppress(Exception):
                self.data = tensor.data  # a second tensor over the same memory, which keeps that alive
                self.values = _copy(tensor) if bits and not tensor.is_meta and is_writable(tensor) else None

    def restore(self) -> None:
        """Give the tensor back its class, attributes, memory, values, flag and gradient, in this order."""
        tensor = self.tensor
        with torch._C.DisableTorchFunctionSubclass():
            if type(tensor) is not self.kind:
                # A lazy one that the load gave a shape: torch changes its class in place, and a lazy one is empty.
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
                tensor.__class__ = self.kind
            if vars(tensor) != self.attributes:
                vars(tensor).clear()
                vars(tensor).update(self.attributes)
            # An ordinary tensor that still has its memory is left alone. Another class cannot be asked for an address.
            if self.data is not None and not (self.ordinary and _same_memory(tensor, self.data)):
                tensor.data = self.data
            if self.values is not None:
                _restore_storage_size(tensor)
                tensor.detach().copy_(self.values)
            # torch lets only leaves change their flag; a lazy one keeps its own.
            if not tensor.is_leaf or self.data is None:
                return
            if tensor.requires_grad is not self.requires_grad:
                tensor.requires_grad_(self.requires_grad)
            # First the gradient's memory, then the gradient: torch takes none on another device or of another dtype.
            if self.grad is not None and self.grad_data is not None:
                self.grad.data = self.grad_data
            if tensor.grad is not self.grad:
                tensor.grad = self.grad


def _small_bytes(tensor: torch.Tensor) -> bytes | None:
    """Copy the bytes of a small tensor, in a fraction of the time of a new tensor; None for a large or strided one."""
    if tensor.nbytes <= SMALL_TENSOR_BYTES and tensor.is_cpu and tensor.is_contiguous():
        return memory_at(tensor.data_ptr(), tensor.nbytes).tobytes()
    return None


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Copy the values to the CPU: a GPU that just holds the model has no memory for a copy."""
    return tensor.clone() if tensor.device.type == "cpu" else tensor.to("cpu")


def _restore_storage_size(tensor: torch.Tensor) -> None:
    """Give a tensor's storage the size that the tensor needs.

    Hooks may free memory by resizing the storage to nothing (FSDP does so between uses). The tensor keeps its shape
    then, and writing to it would end the process.
    """
    if tensor.layout is torch.strided and tensor.numel():
        needed = int(tensor.storage_offset() + extent(tensor)) * tensor.element_size()
        if tensor.untyped_storage().nbytes() < needed:
            tensor.untyped_storage().resize_(needed)


def _same_memory(tensor: torch.Tensor, data: torch.Tensor) -> bool:
    """Tell whether the tensor still is the memory that `data` is, seen in the same way."""
    return (
        tensor.device == data.device
        and tensor.dtype == data.dtype
        and tensor.data_ptr() == data.data_ptr()
        and (tensor.shape, tensor.stride()) == (data.shape, data.stride())
    )


# The exact types: another container may do anything when it is cleared and filled.
_CONTAINER_TYPES = (dict, OrderedDict, list, set)


def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
    """Give the dicts, lists and sets among a module's attributes, at any depth, each with a shallow copy of it.

    Among them are `_parameters`, `_buffers`, `_modules` and the tables of hooks.
    """
    saved: dict[int, tuple[Any, Any]] = {}  # by identity: a container may be in itself
    to_visit: list[Any] = [vars(module)]
    while to_visit:
        value = to_visit.pop()
        for inner in value.values() if isinstance(value, dict) else value:
            if type(inner) in _CONTAINER_TYPES and id(inner) not in saved:
                # A module has a dozen empty ones: for them the one empty tuple serves as a copy.
                saved[id(inner)] = inner, inner.copy() if inner else ()
                to_visit.append(inner)
    return list(saved.values())


def _refill(container: Any, content: Any) -> None:
    """Make a dict, list or set hold just `content` again."""
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)
