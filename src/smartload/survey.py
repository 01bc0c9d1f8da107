"""A look at a model: what its strict load wants, whose tensors these are, and which code of its own will run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from smartload.records import Manifest, TensorSpec
from smartload.spelling import join

# By name, so that looking for a wrapper imports none: a class that is in use has been imported.
_WRAPPERS = {
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "_fsdp_wrapped_module",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": "_checkpoint_wrapped_module",
    "lightning.fabric.wrappers._FabricModule": "_forward_module",
    "lightning_fabric.wrappers._FabricModule": "_forward_module",
    "opacus.grad_sample.grad_sample_module.GradSampleModule": "_module",
}
# Loading code of torch's own that adds a missing counter and changes nothing else.
_HARMLESS = (nn.Module._load_from_state_dict, _NormBase._load_from_state_dict)
_EXTRA_STATE = "_extra_state"


@dataclass(frozen=True, slots=True)
class Survey:
    """A model as it was found; nothing of it was changed."""

    manifest: Manifest
    tensors: Mapping[str, torch.Tensor]
    """Key of the state dict -> the model's very tensor (Parameter objects themselves)."""
    transient: Mapping[str, torch.Tensor]
    """Non-persistent buffers."""
    modules: Mapping[str, nn.Module]
    """All modules by path; a shared one under each of its paths."""
    own_code: bool
    """Whether loading runs code that torch does not bring: hooks, overrides, `set_extra_state`."""
    bends: bool
    """Whether the model may accept other names or shapes than its own: versions, hooks, overrides."""
    rewrites: bool
    """Whether such code may change names or values on their way, so that it must be given real tensors."""


@lru_cache(maxsize=None)
def wrapped_child(kind: type) -> str | None:
    """The name under which a wrapper of this type keeps the wrapped module; None for every other type."""
    names = (f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__)
    return next((_WRAPPERS[name] for name in names if name in _WRAPPERS), None)


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel, torch.compile, AveragedModel and other wrappers.

    Args:
        model: any module; one that is no wrapper is returned as it is.

    Returns:
        The innermost module that is no wrapper. Wrappers are known by type, so a real child called
        `module` stays where it is.

    >>> import torch
    >>> net = torch.nn.Linear(2, 1)
    >>> unwrap(torch.nn.DataParallel(net)) is net, unwrap(net) is net
    (True, True)
    """
    while (child := wrapped_child(type(model))) is not None:
        inner = getattr(model, child)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules with their paths, in the order of the state dict, shared ones under every path."""
    stack: list[tuple[str, nn.Module, frozenset[int]]] = [("", model, frozenset())]
    while stack:
        path, module, above = stack.pop()
        if id(module) in above:
            raise RecursionError(f"{path!r} contains itself")
        yield path, module
        above = above | {id(module)} if module._modules else above
        for name, child in reversed(module._modules.items()):
            if child is not None:
                stack.append((f"{path}.{name}" if path else name, child, above))


def survey(model: nn.Module) -> Survey:
    """Names, shapes and dtypes that the model's strict load wants, and the tensors behind them."""
    modules = dict(walk(model))
    wanted: dict[str, torch.Tensor | None] = {}
    transient: dict[str, torch.Tensor] = {}
    for path, module in modules.items():
        dot = path + "." if path else ""
        for name, tensor in module._parameters.items():
            if tensor is not None:
                wanted[dot + name] = tensor
        for name, tensor in module._buffers.items():
            if tensor is not None:
                (transient if name in module._non_persistent_buffers_set else wanted)[dot + name] = tensor
        if _overrides(module, "set_extra_state"):
            wanted[dot + _EXTRA_STATE] = None
    if any(_saves_its_own_way(module) for module in modules.values()):
        # Only the model knows its names: what it saves is what it loads.
        wanted = {
            key: value if isinstance(value, torch.Tensor) else None
            for key, value in model.state_dict(keep_vars=True).items()
        }
    tensors = {key: tensor for key, tensor in wanted.items() if tensor is not None}
    rewrites = _overrides(model, "load_state_dict") or any(_rewrites(module) for module in modules.values())
    manifest = Manifest(
        name=type(unwrap(model)).__name__,
        specs={key: None if tensor is None else spec(tensor) for key, tensor in wanted.items()},
        aliases=_aliases(tensors),
        wrappers=frozenset(
            join(path, child) for path, module in modules.items() if (child := wrapped_child(type(module)))
        ),
        transient={key: spec(tensor) for key, tensor in transient.items()},
    )
    late = any(m._load_state_dict_post_hooks or _overrides(m, "set_extra_state") for m in modules.values())
    bends = rewrites or late or any(
        type(module)._load_from_state_dict is not nn.Module._load_from_state_dict for module in modules.values()
    )
    return Survey(manifest, tensors, transient, modules, own_code=rewrites or late, bends=bends, rewrites=rewrites)


def spec(tensor: torch.Tensor) -> TensorSpec:
    """Shape and dtype of a tensor; an uninitialised one (of a lazy module) has no shape yet."""
    return TensorSpec(None if is_lazy(tensor) else tuple(tensor.shape), str(tensor.dtype)[6:])


def loose_tensors(survey: Survey) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors kept as plain attributes: no parameter, no buffer, so `.to()` does not move them."""
    for path, module in survey.modules.items():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield join(path, name), value
            elif isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
                yield join(path, name), value[0]


def _overrides(module: nn.Module, method: str) -> bool:
    plain = getattr(nn.Module, method)
    return method in vars(module) or getattr(type(module), method, plain) is not plain


def _saves_its_own_way(module: nn.Module) -> bool:
    return bool(
        module._state_dict_hooks
        or module._state_dict_pre_hooks
        or _overrides(module, "_save_to_state_dict")
        or _overrides(module, "state_dict")
    )


def _rewrites(module: nn.Module) -> bool:
    return bool(
        module._load_state_dict_pre_hooks
        or "_load_from_state_dict" in vars(module)
        or type(module)._load_from_state_dict not in _HARMLESS
    )


def _aliases(tensors: Mapping[str, torch.Tensor]) -> tuple[tuple[str, ...], ...]:
    """Groups of keys that are one tensor: the same object, or two over the very same memory."""
    groups: dict[object, list[str]] = {}
    for key, tensor in tensors.items():
        groups.setdefault(memory_of(tensor), []).append(key)
    return tuple(tuple(keys) for keys in groups.values() if len(keys) > 1)


def memory_of(tensor: torch.Tensor) -> object:
    """Equal for two tensors that are the same memory seen in the same way; the object itself where there is none."""
    if type(tensor) in _ORDINARY and tensor.layout is torch.strided and tensor.device.type != "meta" and tensor.numel():
        return tensor.data_ptr(), tensor.device, tuple(tensor.shape), tensor.stride(), tensor.dtype
    return id(tensor)


_ORDINARY = (torch.Tensor, nn.Parameter)


def ordinary(tensor: torch.Tensor) -> bool:
    """Whether the tensor is plain memory: no subclass, dense, not quantized, not uninitialised."""
    return type(tensor) in _ORDINARY and tensor.layout is torch.strided and not tensor.is_quantized


def writable(tensor: torch.Tensor) -> bool:
    """Whether torch could write to it at all: an expanded tensor or an inference tensor refuses, so it stays as it is."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return not (tensor.layout is torch.strided and 0 in tensor.stride() and tensor.numel() > 1)


def is_sharded(tensor: torch.Tensor | None) -> bool:
    """Whether the tensor is a DTensor; the package is not imported for the question."""
    package = sys.modules.get("torch.distributed.tensor")
    return package is not None and isinstance(tensor, package.DTensor)
