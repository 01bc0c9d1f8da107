"""Asking the model's own strict load whether it takes a set of keys, without a byte of weights."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from smartload.records import TensorSpec
from smartload.survey import ordinary
from smartload.undo import Undo

Metadata = Mapping[str, Mapping[str, object]]


def rehearse(
    model: nn.Module, modules: Iterable[nn.Module], specs: Mapping[str, TensorSpec], metadata: Metadata | None
) -> bool:
    """Whether `model.load_state_dict(strict=True)` accepts tensors of these names and shapes.

    Every parameter and buffer is exchanged for a twin on meta (tied ones for the same twin), the real method
    runs with its hooks and overrides, and everything is put back. `set_extra_state` is not called.

    Args:
        model: the model; the same afterwards.
        modules: all its modules.
        specs: names, as the model spells them, with shapes and dtypes.
        metadata: `_metadata` of the state dict to be loaded.
    """
    modules = list(modules)
    log = Undo(modules, (), bits=False)
    try:
        if not _twinned(modules):
            return False
        state = state_dict({key: _blank(spec) for key, spec in specs.items()}, metadata)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch warns that a copy to meta does nothing; that is the idea
            model.load_state_dict(state, strict=True)
        return True
    except Exception:  # torch's verdict, or code that needs real values and cannot be asked
        return False
    finally:
        log.restore()


def state_dict(values: Mapping[str, object], metadata: Metadata | None) -> OrderedDict[str, object]:
    """A fresh state dict with its `_metadata`, where there is any."""
    state = OrderedDict(values)
    if metadata is not None:
        state._metadata = OrderedDict((path, dict(entry)) for path, entry in metadata.items())  # type: ignore[attr-defined]
    return state


def _twinned(modules: Iterable[nn.Module]) -> bool:
    """Exchange all tensors for twins on meta; False where one has no twin (a subclass, a sharded tensor)."""
    twins: dict[int, torch.Tensor] = {}
    for module in modules:
        vars(module)["set_extra_state"] = _ignore
        for group in (module._parameters, module._buffers):
            for name, tensor in group.items():
                if tensor is not None:
                    if not (ordinary(tensor) or is_lazy(tensor)):
                        return False
                    group[name] = twins.setdefault(id(tensor), _twin(tensor))  # type: ignore[assignment]
    return True


def _twin(tensor: torch.Tensor) -> torch.Tensor:
    if is_lazy(tensor):
        kind = UninitializedParameter if isinstance(tensor, nn.Parameter) else UninitializedBuffer
        return kind(device="meta", dtype=tensor.dtype)
    blank = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(blank, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else blank


def _blank(spec: TensorSpec) -> torch.Tensor:
    return torch.empty(spec.shape or (), dtype=getattr(torch, spec.dtype), device="meta")


def _ignore(state: object) -> None:
    """Stands in for a module's `set_extra_state`, which a rehearsal must not call."""
