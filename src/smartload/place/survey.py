"""A look at a model: what its strict load wants, whose tensors these are, and which code of its own will run."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from smartload.place.distributed import full_state_dicts
from smartload.place.memory import dtype_name, has_memory, memory_of, takes_raw_bytes
from smartload.records.entries import TensorSpec
from smartload.records.keys import join
from smartload.records.requests import ModelKeys
from smartload.records.wrappers import CHILD_OF

# Loading code of torch's own that adds a missing counter and changes nothing else.
_HARMLESS = (nn.Module._load_from_state_dict, _NormBase._load_from_state_dict)
_EXTRA_STATE = "_extra_state"
_DULL = frozenset((dict, OrderedDict, set, bool, int, float, str, type(None)))
"""What nearly all attributes of modules are."""


@dataclass(frozen=True, slots=True)
class Survey:
    """A model as it was found; nothing of it was changed."""

    model: nn.Module
    keys: ModelKeys
    tensors: Mapping[str, torch.Tensor]
    """Key of the state dict -> the model's very tensor (Parameter objects themselves)."""
    non_persistent: Mapping[str, torch.Tensor]
    """Non-persistent buffers."""
    modules: Mapping[str, nn.Module]
    """All modules by path; a shared one under each of its paths."""
    computed: frozenset[str]
    """Keys whose tensor is none that the model has registered, but one that it made for its state dict."""
    own_code: bool
    """Whether loading runs code that torch does not bring: hooks, overrides, `set_extra_state`."""
    may_accept_other_keys: bool
    """Whether the model may accept other names or shapes than its own: versions, hooks, overrides."""
    rewrites_values: bool
    """Whether such code may change names or values on their way, so that it must be given real tensors."""
    unusual: Mapping[str, torch.Tensor]
    """Tensors that are not registered, or whose memory does not hold their values or may not be written to."""

    @property
    def only_values_change(self) -> bool:
        """Whether a load can change values only: no code but torch's will run, and no tensor is out of the ordinary."""
        return not (self.own_code or self.unusual)


def wrapped_child(kind: type) -> str | None:
    """The name under which a wrapper of this type keeps the wrapped module; None for every other type."""
    names = (f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__)
    return next((CHILD_OF[name] for name in names if name in CHILD_OF), None)


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
    found: list[tuple[str, nn.Module]] = []
    above: set[int] = set()

    def enter(path: str, module: nn.Module) -> None:
        found.append((path, module))
        if not module._modules:
            return
        if id(module) in above:
            raise RecursionError(f"{path!r} contains itself")
        above.add(id(module))
        for name, child in module._modules.items():
            if child is not None:
                enter(f"{path}.{name}" if path else name, child)
        above.discard(id(module))

    enter("", model)
    return iter(found)


def survey(model: nn.Module) -> Survey:
    """Names, shapes and dtypes that the model's strict load wants, and the tensors behind them."""
    modules = dict(walk(model))
    kinds = {kind: _Kind(kind) for kind in {type(module) for module in modules.values()}}
    wanted, non_persistent = _named(modules, kinds)
    computed: frozenset[str] = frozenset()
    if any(kinds[type(module)].saves or _saves_its_own_way(module) for module in modules.values()):
        # Only the model knows its names: what it saves is what it loads.
        with full_state_dicts(model):
            saved = model.state_dict(keep_vars=True)
        registered = {id(tensor) for tensor in wanted.values()}
        wanted = {key: value if isinstance(value, torch.Tensor) else None for key, value in saved.items()}
        computed = frozenset(key for key, value in wanted.items() if value is not None and id(value) not in registered)
    tensors = {key: tensor for key, tensor in wanted.items() if tensor is not None}
    unusual = {key: tensor for key, tensor in tensors.items() if not takes_raw_bytes(tensor) or key in computed}
    spec = _Specs()
    keys = ModelKeys(
        name=type(unwrap(model)).__name__,
        specs={key: None if tensor is None else spec(tensor) for key, tensor in wanted.items()},
        tied=_aliases(tensors, unusual),
        wrappers=frozenset(join(path, child) for path, m in modules.items() if (child := kinds[type(m)].wraps)),
        non_persistent={key: spec(tensor) for key, tensor in non_persistent.items()},
    )
    rewrites_values = _overrides(model, "load_state_dict") or any(
        kinds[type(module)].rewrites_values or _rewrites(module) for module in modules.values()
    )
    late = any(m._load_state_dict_post_hooks or kinds[type(m)].extra_state for m in modules.values())
    may_accept_other_keys = rewrites_values or late or any(kinds[type(module)].versioned for module in modules.values())
    own_code = rewrites_values or late
    return Survey(
        model,
        keys,
        tensors,
        non_persistent,
        modules,
        computed,
        own_code,
        may_accept_other_keys,
        rewrites_values,
        unusual,
    )


class _Kind:
    """What the class of a module brings of its own; looked up anew for each survey, for classes can be patched."""

    __slots__ = ("extra_state", "rewrites_values", "saves", "versioned", "wraps")

    def __init__(self, kind: type[nn.Module]) -> None:
        self.saves = _differs(kind, "_save_to_state_dict") or _differs(kind, "state_dict")
        self.rewrites_values = kind._load_from_state_dict not in _HARMLESS
        self.versioned = kind._load_from_state_dict is not nn.Module._load_from_state_dict
        self.extra_state = _differs(kind, "set_extra_state")
        self.wraps = wrapped_child(kind)


def _named(
    modules: Mapping[str, nn.Module], kinds: Mapping[type, _Kind]
) -> tuple[dict[str, torch.Tensor | None], dict[str, torch.Tensor]]:
    """What is registered, by the names of the state dict: persistent (None: an extra state), and not."""
    wanted: dict[str, torch.Tensor | None] = {}
    non_persistent: dict[str, torch.Tensor] = {}
    for path, module in modules.items():
        dot = path + "." if path else ""
        for name, tensor in module._parameters.items():
            if tensor is not None:
                wanted[dot + name] = tensor
        for name, buffer in module._buffers.items():
            if buffer is not None:
                (non_persistent if name in module._non_persistent_buffers_set else wanted)[dot + name] = buffer
        if kinds[type(module)].extra_state:
            wanted[dot + _EXTRA_STATE] = None
    return wanted, non_persistent


class _Specs:
    """Shape and dtype of tensors; an uninitialised one (of a lazy module) has no shape yet.

    Many tensors of a model are alike, and a paper that is there takes a third of the time of a new one.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[torch.Size, torch.dtype], TensorSpec] = {}

    def __call__(self, tensor: torch.Tensor) -> TensorSpec:
        if is_lazy(tensor):
            return TensorSpec(None, dtype_name(tensor.dtype))
        kind = tensor.shape, tensor.dtype
        known = self._known.get(kind)
        if known is None:
            known = self._known[kind] = TensorSpec(tuple(tensor.shape), dtype_name(tensor.dtype))
        return known


def loose_tensors(survey: Survey) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors kept as plain attributes: no parameter, no buffer, so `.to()` does not move them."""
    for path, module in survey.modules.items():
        for name, value in vars(module).items():
            if type(value) in _DULL:
                continue
            if isinstance(value, torch.Tensor):
                yield join(path, name), value
            elif isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
                yield join(path, name), value[0]


def _differs(kind: type, method: str) -> bool:
    plain = getattr(nn.Module, method)
    return getattr(kind, method, plain) is not plain


def _overrides(module: nn.Module, method: str) -> bool:
    return method in vars(module) or _differs(type(module), method)


def _saves_its_own_way(module: nn.Module) -> bool:
    own = vars(module)
    return bool(
        module._state_dict_hooks or module._state_dict_pre_hooks or "_save_to_state_dict" in own or "state_dict" in own
    )


def _rewrites(module: nn.Module) -> bool:
    return bool(module._load_state_dict_pre_hooks) or "_load_from_state_dict" in vars(module)


def _aliases(tensors: Mapping[str, torch.Tensor], unusual: Mapping[str, torch.Tensor]) -> tuple[tuple[str, ...], ...]:
    """Groups of keys that are one tensor: the same object, or two over the very same memory."""
    first: dict[int, str] = {}
    near: dict[str, list[str]] = {}
    for key, tensor in tensors.items():
        placed = key not in unusual or has_memory(tensor)
        other = first.setdefault((placed and tensor.data_ptr()) or -id(tensor), key)
        if other is not key:
            near.setdefault(other, [other]).append(key)
    groups: dict[object, list[str]] = {}
    for keys in near.values():
        for key in keys:
            groups.setdefault(memory_of(tensors[key]), []).append(key)
    return tuple(tuple(keys) for keys in groups.values() if len(keys) > 1)
