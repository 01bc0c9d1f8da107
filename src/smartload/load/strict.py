"""Run the model's own strict load, or rehearse it: find out whether it accepts some keys without reading weights.

The rehearsal is for models whose loading code may accept other keys than their own: hooks that rename, or the versions
of batch norm. Only that code knows what it accepts.
"""

from __future__ import annotations

import inspect
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from smartload.load.undo import Undo
from smartload.place.distributed import is_flat
from smartload.place.memory import is_ordinary
from smartload.place.survey import Survey
from smartload.records.entries import TensorSpec

Metadata = Mapping[str, Mapping[str, object]]
"""The `_metadata` of a state dict: module path -> its entry, such as {"version": 2}."""

MAX_FILTER_STEPS = 10_000_000
"""Children of one module times keys of the model, up to which torch loads in its own way.

Measured at 1,000 x 10,000: a second of torch's time."""
MAX_DEPTH = 250
"""Levels of modules up to which torch loads in its own way.

It calls itself at each level: at 990, with nothing else above it, Python's own limit of 1,000 calls is reached."""


def rehearse(survey: Survey, specs: Mapping[str, TensorSpec], metadata: Metadata | None) -> bool:
    """Tell whether `model.load_state_dict(strict=True)` accepts tensors of these names and shapes.

    Every parameter and buffer is exchanged for a twin on meta (tied ones for the same twin), the real method runs with
    its hooks and overrides, and everything is put back. `set_extra_state` is not called. So nothing is copied, and a
    failure in the middle leaves no trace. A deep copy of the model would prove less: it takes the model's memory, has
    other strides, and cannot be made where a module holds a lock.

    Args:
        survey: the model; the same afterwards.
        specs: the model's keys, with the shapes and dtypes of the tensors to be loaded.
        metadata: `_metadata` of the state dict to be loaded.

    Returns:
        False also where it cannot be found out: FullyShardedDataParallel, a tensor without a twin, code that raises.
    """
    modules = survey.modules
    # FullyShardedDataParallel's hooks gather the shards of all ranks, and need its own tensors for that.
    if any(map(is_flat, modules.values())):
        return False
    # Without values: no value is written here, as everything is written to twins.
    log, grad_enabled, restored = Undo(modules.values(), (), bits=False), torch.is_grad_enabled(), False
    try:
        try:
            return _load_twins(survey, specs, metadata)
        except Exception:  # noqa: BLE001 - torch's verdict, or code that needs real values and cannot be asked
            return False
        finally:
            log.restore()
            restored = True
    finally:
        if not restored:  # an interrupt has broken off the lines above
            log.restore()
        torch.set_grad_enabled(grad_enabled)


def _load_twins(survey: Survey, specs: Mapping[str, TensorSpec], metadata: Metadata | None) -> bool:
    """Run the strict load on twins of the model's tensors, which stay in their place; raise what it raises."""
    if not _exchange_for_twins(survey.modules.values()):
        return False
    state = state_dict({key: _meta_tensor(spec) for key, spec in specs.items()}, metadata)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch warns that a copy to meta does nothing, as intended
        if loads_each_module(survey, len(state)):
            return _load_each_module(survey.modules, state, assign=False)
        strict_load(survey, state, assign=False)
    return True


def state_dict(values: Mapping[str, object], metadata: Metadata | None) -> OrderedDict[str, object]:
    """Make a state dict with its `_metadata`, where there is any."""
    # Always a new one, entries of `_metadata` included: hooks may change both, and they may be the caller's.
    state = OrderedDict(values)
    if metadata is not None:
        state._metadata = OrderedDict((path, dict(entry)) for path, entry in metadata.items())  # type: ignore[attr-defined]
    return state


def strict_load(survey: Survey, state: Mapping[str, object], assign: bool) -> None:
    """Call `model.load_state_dict(state, strict=True)`, or the same module by module where torch would be slow or fail.

    Args:
        survey: the model.
        state: its state dict, with `_metadata` where there is any.
        assign: as in `load_state_dict`.
    """
    # Where module by module fails, torch's whole load runs after all, to say in its own words what is wrong.
    if loads_each_module(survey, len(state)) and _load_each_module(survey.modules, state, assign):
        return
    model = survey.model
    arguments = {"assign": True} if assign else {}  # a model's own load_state_dict need not know it
    if _takes_strict(model):
        arguments["strict"] = True
    model.load_state_dict(state, **arguments)


def loads_each_module(survey: Survey, keys: int) -> bool:
    """Tell whether the load gives each module its own keys, instead of all keys to the model.

    torch filters the dict of a module once for each of its children, which takes children x keys steps: quadratic in a
    long ModuleList. And it calls itself once a level. That is replaced only where it takes about a second or more, or
    modules are nested deeply, and only where no hook or override could notice.
    """
    if survey.own_code:
        return False
    # By their length first, which is quicker than to count: a path of so many levels has a dot and a name for each.
    if any(len(path) > 2 * MAX_DEPTH and path.count(".") > MAX_DEPTH for path in survey.modules):
        return True
    most_children = max(len(module._modules) for module in survey.modules.values())
    return most_children * keys > MAX_FILTER_STEPS


def _load_each_module(modules: Mapping[str, nn.Module], state: Mapping[str, object], assign: bool) -> bool:
    """Have each module load its own keys, strictly; tell whether every key was right and none was left over."""
    states: dict[str, dict[str, object]] = {path: {} for path in modules}
    for key, value in state.items():
        of_module = states.get(key.rpartition(".")[0])
        if of_module is None:
            return False  # before anything is loaded
        of_module[key] = value
    metadata = getattr(state, "_metadata", {})
    # Missing keys, unexpected keys, messages: torch's method adds to them instead of raising.
    faults: tuple[list[str], list[str], list[str]] = ([], [], [])
    for path, module in modules.items():
        # `load_state_dict` hands `assign` on in this entry.
        local = dict(metadata.get(path, {}), **({"assign_to_params_buffers": True} if assign else {}))
        module._load_from_state_dict(states[path], path + "." if path else "", local, True, *faults)
    return not any(faults)


def _takes_strict(model: nn.Module) -> bool:
    """Tell whether the model's `load_state_dict` has a parameter `strict`; an override may be without."""
    try:
        parameters = inspect.signature(model.load_state_dict).parameters
    except (TypeError, ValueError):  # it has no signature to read: torch's own has the parameter
        return True
    return "strict" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def _exchange_for_twins(modules: Iterable[nn.Module]) -> bool:
    """Exchange all tensors for twins on meta; return False where one has no twin (a subclass, a sharded tensor)."""
    twins: dict[int, torch.Tensor] = {}  # by the tensor's identity, so that tied names stay tied
    for module in modules:
        # Set on the object, past `nn.Module.__setattr__`; the undo of the attributes removes it.
        vars(module)["set_extra_state"] = _ignore
        for group in (module._parameters, module._buffers):
            for name, tensor in group.items():
                if tensor is not None:
                    if not (is_ordinary(tensor) or is_lazy(tensor)):
                        return False
                    group[name] = twins.setdefault(id(tensor), _twin(tensor))  # type: ignore[assignment]
    return True


def _twin(tensor: torch.Tensor) -> torch.Tensor:
    """Make a tensor on meta of the same shape, strides, dtype and class; a lazy one stays lazy."""
    if is_lazy(tensor):
        kind = UninitializedParameter if isinstance(tensor, nn.Parameter) else UninitializedBuffer
        lazy: torch.Tensor = kind(device="meta", dtype=tensor.dtype)  # type: ignore[call-arg]
        return lazy
    twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin


def _meta_tensor(spec: TensorSpec) -> torch.Tensor:
    return torch.empty(spec.shape or (), dtype=getattr(torch, spec.dtype), device="meta")


def _ignore(state: object) -> None:
    """Stand in for a module's `set_extra_state`, which a rehearsal must not call: what it does cannot all be undone."""
