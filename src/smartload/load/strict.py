"""The model's own strict load: run, or asked whether it takes a set of keys without a byte of weights."""

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
WIDE = 10_000_000
"""Children of one module times keys of the whole: a second of torch's time, measured at 1,000 x 10,000."""


def rehearse(survey: Survey, specs: Mapping[str, TensorSpec], metadata: Metadata | None) -> bool:
    """Tell whether `model.load_state_dict(strict=True)` accepts tensors of these names and shapes.

    Every parameter and buffer is exchanged for a twin on meta (tied ones for the same twin), the real method runs with
    its hooks and overrides, and everything is put back. `set_extra_state` is not called.

    Args:
        survey: the model; the same afterwards.
        specs: names, as the model spells them, with shapes and dtypes.
        metadata: `_metadata` of the state dict to be loaded.
    """
    modules = survey.modules
    if any(map(is_flat, modules.values())):  # its hooks gather what the ranks hold, and need its own tensors for it
        return False
    log = Undo(modules.values(), (), bits=False)
    try:
        if not _twinned(modules.values()):
            return False
        state = state_dict({key: _blank(spec) for key, spec in specs.items()}, metadata)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch warns that a copy to meta does nothing; that is the idea
            if loads_each_module(survey, len(state)):
                return _load_each_module(modules, state, assign=False)
            strict_load(survey, state, assign=False)
        return True
    except Exception:  # noqa: BLE001 - torch's verdict, or code that needs real values and cannot be asked
        return False
    finally:
        log.restore()


def state_dict(values: Mapping[str, object], metadata: Metadata | None) -> OrderedDict[str, object]:
    """A fresh state dict with its `_metadata`, where there is any."""
    state = OrderedDict(values)
    if metadata is not None:
        state._metadata = OrderedDict((path, dict(entry)) for path, entry in metadata.items())  # type: ignore[attr-defined]
    return state


def strict_load(survey: Survey, state: Mapping[str, object], assign: bool) -> None:
    """Call `model.load_state_dict(state, strict=True)`, without torch's quadratic time where it would be felt.

    Args:
        survey: the model.
        state: its state dict, with `_metadata` where there is any.
        assign: as in `load_state_dict`.
    """
    if loads_each_module(survey, len(state)) and _load_each_module(survey.modules, state, assign):
        return
    model = survey.model
    arguments = {"assign": True} if assign else {}
    if _knows_strict(model):
        arguments["strict"] = True
    model.load_state_dict(state, **arguments)


def loads_each_module(survey: Survey, keys: int) -> bool:
    """Tell whether every module is given its own keys, instead of all keys to the model.

    torch filters the dict of a module once for each of its children, which takes children x keys steps. Where that is
    a second or more, and no code but torch's would notice, each module's own strict load gets its own keys. Whatever
    is wrong with them is then left to torch's whole load to say.
    """
    return not survey.own_code and max(len(module._modules) for module in survey.modules.values()) * keys > WIDE


def _load_each_module(modules: Mapping[str, nn.Module], state: Mapping[str, object], assign: bool) -> bool:
    """Give each module its own keys; tell whether all of them were right, and none left over."""
    shares: dict[str, dict[str, object]] = {path: {} for path in modules}
    for key, value in state.items():
        share = shares.get(key.rpartition(".")[0])
        if share is None:
            return False
        share[key] = value
    metadata = getattr(state, "_metadata", {})
    faults: tuple[list[str], list[str], list[str]] = ([], [], [])
    for path, module in modules.items():
        local = dict(metadata.get(path, {}), **({"assign_to_params_buffers": True} if assign else {}))
        module._load_from_state_dict(shares[path], path + "." if path else "", local, True, *faults)
    return not any(faults)


def _knows_strict(model: nn.Module) -> bool:
    """Whether `load_state_dict` takes `strict`; a model's own may be strict without being asked."""
    try:
        parameters = inspect.signature(model.load_state_dict).parameters
    except (TypeError, ValueError):
        return True
    return "strict" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def _twinned(modules: Iterable[nn.Module]) -> bool:
    """Exchange all tensors for twins on meta; False where one has no twin (a subclass, a sharded tensor)."""
    twins: dict[int, torch.Tensor] = {}
    for module in modules:
        vars(module)["set_extra_state"] = _ignore
        for group in (module._parameters, module._buffers):
            for name, tensor in group.items():
                if tensor is not None:
                    if not (is_ordinary(tensor) or is_lazy(tensor)):
                        return False
                    group[name] = twins.setdefault(id(tensor), _twin(tensor))  # type: ignore[assignment]
    return True


def _twin(tensor: torch.Tensor) -> torch.Tensor:
    if is_lazy(tensor):
        kind = UninitializedParameter if isinstance(tensor, nn.Parameter) else UninitializedBuffer
        vacant: torch.Tensor = kind(device="meta", dtype=tensor.dtype)  # type: ignore[call-arg]
        return vacant
    blank = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(blank, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else blank


def _blank(spec: TensorSpec) -> torch.Tensor:
    return torch.empty(spec.shape or (), dtype=getattr(torch, spec.dtype), device="meta")


def _ignore(state: object) -> None:
    """Stands in for a module's `set_extra_state`, which a rehearsal must not call."""
