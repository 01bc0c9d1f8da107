"""Survey a model: the keys that its strict load expects, the tensors behind them, and which code of its own will run.

`survey` walks the modules once and asks each class once what it overrides. Only where a model makes its state dict by
code of its own is `state_dict()` called. Nothing of the model is changed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from smartload.errors import SmartLoadError
from smartload.place.distributed import full_state_dicts
from smartload.place.memory import dtype_name, has_memory, memory_of, takes_raw_bytes
from smartload.records.entries import TensorSpec
from smartload.records.keys import join
from smartload.records.problems import Problem
from smartload.records.requests import ModelKeys
from smartload.records.wrappers import CHILD_OF

# Loading code of torch's own that changes no value that it is given. Batch norm's only adds its counter
# `num_batches_tracked` to a state dict of a version that had none.
_KEEPS_VALUES = (nn.Module._load_from_state_dict, _NormBase._load_from_state_dict)
_EXTRA_STATE = "_extra_state"
_NO_TENSOR_TYPES = frozenset((dict, OrderedDict, set, bool, int, float, str, type(None)))
"""Types of nearly all attributes of a module: a look-up passes over them in a fraction of the time of `isinstance`."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What a load must know of a model. It holds the model's own modules and tensors, no copies."""

    model: nn.Module
    keys: ModelKeys
    tensors: Mapping[str, torch.Tensor]
    """Key of the state dict -> the model's very tensor (Parameter objects themselves)."""
    non_persistent: Mapping[str, torch.Tensor]
    """Key -> buffer that the model leaves out of its state dict."""
    modules: Mapping[str, nn.Module]
    """All modules by path; a shared one under each of its paths."""
    computed: frozenset[str]
    """Keys whose tensor the model made for its state dict; it is registered nowhere, so writing to it is lost."""
    own_code: bool
    """Whether loading runs code that is not torch's: hooks, overrides, `set_extra_state`."""
    may_accept_other_keys: bool
    """Whether the model may accept other keys or shapes than its own: by versions (batch norm), hooks, overrides."""
    rewrites_values: bool
    """Whether hooks or overrides may change keys or values before they are copied, so that they need real tensors."""
    unusual: Mapping[str, torch.Tensor]
    """Key -> tensor that bytes cannot be read into: computed, on meta, sparse, quantized, expanded, a subclass."""

    @property
    def only_values_change(self) -> bool:
        """Whether a load can change values only: no code but torch's will run, and every tensor takes raw bytes."""
        return not (self.own_code or self.unusual)


def wrapped_child(kind: type) -> str | None:
    """Give the name under which a wrapper of this type keeps the wrapped module; None for every other type.

    >>> wrapped_child(nn.DataParallel)
    'module'
    """
    # By name, not by isinstance: most wrappers are in packages that need not be installed and take long to import.
    names = (f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__)
    return next((CHILD_OF[name] for name in names if name in CHILD_OF), None)


def unwrap(model: nn.Module) -> nn.Module:
    """Take the network out of DataParallel, DistributedDataParallel, torch.compile, AveragedModel and other wrappers.

    Wrappers are recognised by their type. A child that only happens to be called `module` is left alone, and the
    model itself is not changed.

    Args:
        model: any module; wrappers may be nested.

    Returns:
        The first module, from the outside in, that is no wrapper: the model itself where it is none.

    >>> import torch
    >>> net = torch.nn.Linear(2, 1)
    >>> unwrap(torch.nn.DataParallel(net)) is net, unwrap(net) is net
    (True, True)
    """
    seen = {id(model)}
    while (child := wrapped_child(type(model))) is not None:
        inner = getattr(model, child)
        # A subclass may keep something else under the name, and a wrapper may have been put into itself.
        if not isinstance(inner, nn.Module) or id(inner) in seen:
            break
        seen.add(id(inner))
        model = inner
    return model


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Give all modules with their paths, in the order of the state dict; a shared module under each of its paths.

    Raises:
        SmartLoadError: a module contains itself; the message gives the path.
    """
    # `named_modules(remove_duplicate=False)` gives the same, but hands every module up through a generator for each
    # level, and says nothing helpful about a module that contains itself. Without recursion: a function that calls
    # itself by its own name is a reference cycle, which would keep the model alive until the collector runs.
    yield "", model
    # Of each module from the root to the present one: its id, its prefix, and the children to come. Dictionaries are
    # read directly, here and below: `children()` and `named_parameters()` look for duplicates, too.
    above = [(id(model), "", iter(model._modules.items()))]
    on_path = {id(model)}
    while above:
        identity, prefix, children = above[-1]
        for name, child in children:
            if child is None:
                continue
            path = prefix + name
            yield path, child
            if child._modules:
                if id(child) in on_path:
                    raise SmartLoadError(Problem("module-loop", facts={"name": path}))
                on_path.add(id(child))
                above.append((id(child), path + ".", iter(child._modules.items())))
                break
        else:
            above.pop()
            on_path.discard(identity)


def survey(model: nn.Module) -> Survey:
    """Find the keys, shapes and dtypes that the model's strict load expects, and the tensors behind them.

    Raises:
        SmartLoadError: a module contains itself.
    """
    modules = dict(walk(model))
    traits = {kind: _ClassTraits(kind) for kind in {type(module) for module in modules.values()}}
    persistent, non_persistent = _registered_tensors(modules, traits)
    computed: frozenset[str] = frozenset()
    # Not for all models, because `state_dict()` takes longer than all else here, and makes a tensor for each key.
    if any(traits[type(module)].saves or _overrides_saving(module) for module in modules.values()):
        # Only the model knows its keys then: what it saves is taken for what it loads. `keep_vars` gives the very
        # tensors, not detached ones, so that those which are registered can be told from those made for the call.
        with full_state_dicts(modules):
            saved = model.state_dict(keep_vars=True)
        registered = {id(tensor) for tensor in persistent.values()}
        persistent = {key: value if isinstance(value, torch.Tensor) else None for key, value in saved.items()}
        computed = frozenset(
            key for key, value in persistent.items() if value is not None and id(value) not in registered
        )
    tensors = {key: tensor for key, tensor in persistent.items() if tensor is not None}
    unusual = {key: tensor for key, tensor in tensors.items() if not takes_raw_bytes(tensor) or key in computed}
    spec = _Specs()
    keys = ModelKeys(
        name=type(unwrap(model)).__name__,
        specs={key: None if tensor is None else spec(tensor) for key, tensor in persistent.items()},
        tied=_tied_keys(tensors, unusual),
        wrappers=frozenset(join(path, child) for path, m in modules.items() if (child := traits[type(m)].wraps)),
        non_persistent={key: spec(tensor) for key, tensor in non_persistent.items()},
    )
    # torch asks only the outermost module for `load_state_dict`, but every module for its hooks and the other methods.
    rewrites_values = _overrides(model, "load_state_dict") or any(
        traits[type(module)].rewrites_values or _overrides_loading(module) for module in modules.values()
    )
    # Post hooks and `set_extra_state` come after the copies: they cannot change what is copied, but may do anything.
    runs_afterwards = any(m._load_state_dict_post_hooks or traits[type(m)].extra_state for m in modules.values())
    own_code = rewrites_values or runs_afterwards
    return Survey(
        model=model,
        keys=keys,
        tensors=tensors,
        non_persistent=non_persistent,
        modules=modules,
        computed=computed,
        own_code=own_code,
        may_accept_other_keys=own_code or any(traits[type(module)].versioned for module in modules.values()),
        rewrites_values=rewrites_values,
        unusual=unusual,
    )


class _ClassTraits:
    """What the class of a module overrides. Found anew for each survey, because libraries patch classes.

    Attributes:
        saves: whether it makes its part of the state dict itself.
        rewrites_values: whether its loading code may change keys or values.
        versioned: whether its loading code is its own, batch norm's included.
        extra_state: whether it has an extra state to set.
        wraps: the name of the wrapped module, where it is a wrapper.
    """

    __slots__ = ("extra_state", "rewrites_values", "saves", "versioned", "wraps")

    def __init__(self, kind: type[nn.Module]) -> None:
        self.saves = _class_overrides(kind, "_save_to_state_dict") or _class_overrides(kind, "state_dict")
        self.rewrites_values = kind._load_from_state_dict not in _KEEPS_VALUES
        self.versioned = kind._load_from_state_dict is not nn.Module._load_from_state_dict
        self.extra_state = _class_overrides(kind, "set_extra_state")
        self.wraps = wrapped_child(kind)


def _registered_tensors(
    modules: Mapping[str, nn.Module], traits: Mapping[type, _ClassTraits]
) -> tuple[dict[str, torch.Tensor | None], dict[str, torch.Tensor]]:
    """Give the tensors that modules have registered, by key: persistent (None: an extra state), then non-persistent."""
    persistent: dict[str, torch.Tensor | None] = {}
    non_persistent: dict[str, torch.Tensor] = {}
    for path, module in modules.items():
        prefix = path + "." if path else ""
        for name, tensor in module._parameters.items():
            if tensor is not None:
                persistent[prefix + name] = tensor
        for name, buffer in module._buffers.items():
            if buffer is not None:
                (non_persistent if name in module._non_persistent_buffers_set else persistent)[prefix + name] = buffer
        if traits[type(module)].extra_state:
            persistent[prefix + _EXTRA_STATE] = None
    return persistent, non_persistent


class _Specs:
    """Give shape and dtype of tensors, one object for all that are alike.

    Most tensors of a large model have one of a few shapes, and finding a spec takes a third of the time of making one.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[torch.Size, torch.dtype], TensorSpec] = {}

    def __call__(self, tensor: torch.Tensor) -> TensorSpec:
        if is_lazy(tensor):  # of a lazy module before its first forward: to ask for its shape raises
            return TensorSpec(None, dtype_name(tensor.dtype))
        shape_and_dtype = tensor.shape, tensor.dtype
        spec = self._made.get(shape_and_dtype)
        if spec is None:
            spec = self._made[shape_and_dtype] = TensorSpec(tuple(tensor.shape), dtype_name(tensor.dtype))
        return spec


def unregistered_tensors(survey: Survey) -> Iterator[tuple[str, torch.Tensor]]:
    """Give the tensors that modules keep as plain attributes, by dotted name; `.to()` does not move them.

    Of a list or tuple that begins with a tensor the first stands for all.
    """
    for path, module in survey.modules.items():
        for name, value in vars(module).items():
            # Tensors deeper inside, and those of other libraries' containers, are not looked for: this is only advice.
            if type(value) in _NO_TENSOR_TYPES:
                continue
            if isinstance(value, torch.Tensor):
                yield join(path, name), value
            elif isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
                yield join(path, name), value[0]


def _class_overrides(kind: type, method: str) -> bool:
    """Tell whether the class has another method of this name than nn.Module's."""
    inherited = getattr(nn.Module, method)
    return getattr(kind, method, inherited) is not inherited


def _overrides(module: nn.Module, method: str) -> bool:
    """Tell whether the module has another method than nn.Module's, set on the object or by its class."""
    return method in vars(module) or _class_overrides(type(module), method)


def _overrides_saving(module: nn.Module) -> bool:
    """Tell whether hooks, or methods set on this one object, take part in making its state dict."""
    attributes = vars(module)
    return bool(
        module._state_dict_hooks
        or module._state_dict_pre_hooks
        or "_save_to_state_dict" in attributes
        or "state_dict" in attributes
    )


def _overrides_loading(module: nn.Module) -> bool:
    """Tell whether hooks, or a method set on this one object, see keys and values before they are copied."""
    return bool(module._load_state_dict_pre_hooks) or "_load_from_state_dict" in vars(module)


def _tied_keys(tensors: Mapping[str, torch.Tensor], unusual: Mapping[str, torch.Tensor]) -> tuple[tuple[str, ...], ...]:
    """Give the groups of keys that are one tensor: the same object, or two objects over the very same memory."""
    # In two steps, because `memory_of` is several times as slow as an address: only keys that share their address
    # (a view, or the first element of a larger tensor, share it too) are compared by all that makes memory the same.
    first: dict[int, str] = {}
    candidates: dict[str, list[str]] = {}
    for key, tensor in tensors.items():
        has_address = key not in unusual or has_memory(tensor)
        # Without an address (on meta, empty) the object stands for itself; negated, no id meets an address.
        other = first.setdefault((has_address and tensor.data_ptr()) or -id(tensor), key)
        if other is not key:
            candidates.setdefault(other, [other]).append(key)
    groups: dict[object, list[str]] = {}
    for keys in candidates.values():
        for key in keys:
            groups.setdefault(memory_of(tensors[key]), []).append(key)
    return tuple(tuple(keys) for keys in groups.values() if len(keys) > 1)
