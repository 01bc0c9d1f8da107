"""Model and device -> Placement, or a reasoned refusal. It looks; nothing moves here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn, TypeAlias

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from smartload.errors import PlacementError
from smartload.place.distributed import is_flat, is_sharded
from smartload.place.survey import Survey
from smartload.records.keys import ancestors, without_prefix
from smartload.records.problems import Kind, Problem
from smartload.records.report import KeyPlan
from smartload.records.requests import Placement

Device: TypeAlias = "str | int | torch.device | Sequence[int | str | torch.device] | None"


def place(survey: Survey, device: Device, plan: KeyPlan, assign: bool) -> Placement:
    """Where each tensor of the model must land, and what has to move for it.

    Args:
        survey: the model as it is.
        device: as in `smart_load`.
        plan: the names that will be loaded; tensors on meta need one.
        assign: whether the file's tensors replace the model's.

    Raises:
        PlacementError: the device is not there, or the model is bound elsewhere. Nothing has moved.
        TypeError: `device` is of a type that names no device.
    """
    parallel = {path: module for path, module in survey.modules.items() if _device_ids(module)}
    sources = {path: _source(module) for path, module in parallel.items()}
    target = _target(survey, device)
    for path, module in parallel.items():
        if target is not None and target != sources[path]:
            _refuse("data-parallel", device=str(target), ids=_ids(module), first=str(sources[path]), where=path)
    if target is None:
        moves = [(path, str(source)) for path, source in sources.items() if _elsewhere(survey, path, source)]
    elif _elsewhere(survey, "", target):
        _check_movable(survey, target)
        moves = [("", str(target))]
    else:
        moves = []
    _check_meta(survey, target, plan, assign)
    if assign:
        _check_replaceable(survey)
    else:
        _check_writable(survey)
    return Placement(None if target is None else str(target), tuple(moves), _homes(survey, target, sources, assign))


def _check_writable(survey: Survey) -> None:
    """Refuse tensors that torch itself writes to before it says that nobody may."""
    if not torch.is_inference_mode_enabled():
        frozen = [key for key, tensor in survey.unusual.items() if not is_lazy(tensor) and tensor.is_inference()]
        if frozen:
            _refuse("inference", names=frozen)


def _target(survey: Survey, device: Device) -> torch.device | None:
    """The one device that the whole model must go to; None where each tensor has its place already."""
    if device is None:
        return None
    if not isinstance(device, (list, tuple)):
        return _resolve(device, survey)
    if not device:
        raise TypeError(f"device={device!r} names no device: leave device out, or name one")
    wanted = [_resolve(each, survey) for each in device]
    given = [_plain(each) for each in device]
    wrappers = survey.keys.wrappers
    outer = [
        module
        for path, module in survey.modules.items()
        if _device_ids(module) and all(above in wrappers for above in ancestors(path) if above)
    ]
    if not outer:
        _refuse("several-devices", device=given, model=type(survey.model).__name__)
    ids = _device_ids(outer[0])
    if wanted != [torch.device(_source(outer[0]).type, i) for i in ids]:
        _refuse("other-devices", device=given, ids=ids)
    return None


def _resolve(device: object, survey: Survey) -> torch.device:
    """The device with its index, once it is known to be there; a CPU has none."""
    if isinstance(device, bool) or not isinstance(device, (int, str, torch.device)):
        raise TypeError(f"device must be None, a device, a string, an int or a list of these, not {device!r}")
    try:
        want = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except RuntimeError as error:
        _refuse("no-such-device", device=_plain(device), torch=str(error).partition("\n")[0])
    if want.type == "cpu":
        return torch.device("cpu")
    if want.type == "meta":
        _refuse("meta-device")
    count, current = _backend(want)
    index = current if want.index is None else want.index
    if index >= count:
        known = want.type == "cuda" and bool(torch.version.cuda or torch.version.hip)
        facts = {"type": want.type, "count": count, "torch": torch.__version__, "built": known}
        _refuse("absent-device", device=_plain(device), home=_here(survey), **facts)
    return torch.device(want.type, index)


def _backend(want: torch.device) -> tuple[int, int]:
    """How many devices of the type there are, and which is current; only a device that is there is initialised."""
    try:
        backend = torch.get_device_module(want)
        count = backend.device_count() if getattr(backend, "is_available", lambda: True)() else 0
    except (RuntimeError, AttributeError):
        return 0, 0
    return count, getattr(backend, "current_device", lambda: 0)() if count and want.index is None else 0


def _plain(device: object) -> object:
    """A device as the caller may have written it, for messages that outlive the call."""
    return device if isinstance(device, int) else str(device)


def _here(survey: Survey) -> str:
    devices = {str(t.device if not t.is_meta else torch.get_default_device()) for t in _tensors(survey, "")}
    return ", ".join(sorted(devices)) or "cpu"


def _device_ids(module: nn.Module) -> list[int]:
    """The devices of a DataParallel; empty for every other module, and where it found no device to use."""
    return list(module.device_ids) if isinstance(module, nn.DataParallel) else []


def _source(module: nn.Module) -> torch.device:
    """The first of them, where torch wants parameters and buffers."""
    return torch.device(str(module.src_device_obj))


def _ids(module: nn.Module) -> str:
    return ", ".join(f"{_source(module).type}:{i}" for i in _device_ids(module))


def _tensors(survey: Survey, path: str) -> Iterator[torch.Tensor]:
    """All parameters and buffers, persistent or not, of the module at the path."""
    for where, module in survey.modules.items():
        if where == path or without_prefix(where, path) is not None:
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    yield tensor


def _elsewhere(survey: Survey, path: str, home: torch.device) -> bool:
    """Whether some tensor of the module lies on another device; one on meta lies nowhere yet."""
    return any(tensor.device != home for tensor in _tensors(survey, path) if not tensor.is_meta)


def _check_movable(survey: Survey, target: torch.device) -> None:
    """Refuse to move what a wrapper has placed."""
    for module in survey.modules.values():
        bound = getattr(module, "hf_device_map", None)
        if isinstance(bound, dict) and len(set(bound.values())) > 1:
            _refuse("bound", device=str(target), how=f"dispatched over {_listed(bound)} (hf_device_map)")
        if isinstance(module, nn.parallel.DistributedDataParallel):
            here = next((str(tensor.device) for tensor in module.parameters()), "its device")
            _refuse("bound", device=str(target), how=f"wrapped in DistributedDataParallel, which is bound to {here}")
        if is_flat(module) or any(is_sharded(parameter) for parameter in module._parameters.values()):
            _refuse("bound", device=str(target), how="sharded (FSDP or DTensor)")


def _check_replaceable(survey: Survey) -> None:
    """Refuse to replace tensors that a wrapper goes on using: torch would report success and be wrong."""
    for module in survey.modules.values():
        if is_flat(module):
            _refuse("held-on-to", how="FullyShardedDataParallel, which keeps its own flat tensor")
        if isinstance(module, nn.parallel.DistributedDataParallel):
            _refuse("held-on-to", how="DistributedDataParallel, which would no longer synchronise their gradients")


def _listed(bound: Mapping[str, object]) -> str:
    names = (f"cuda:{where}" if isinstance(where, int) else str(where) for where in bound.values())
    return ", ".join(dict.fromkeys(names))


def _check_meta(survey: Survey, target: torch.device | None, plan: KeyPlan, assign: bool) -> None:
    """Refuse what would stay without a value: every tensor on meta must come from the file."""
    on_meta = [key for key, tensor in survey.unusual.items() if tensor.is_meta]
    lost = [key for key, tensor in survey.non_persistent.items() if tensor.is_meta]
    if (on_meta or lost) and any(hasattr(module, "_hf_hook") for module in survey.modules.values()):
        _refuse("offloaded", names=on_meta or lost)
    # Left alone only where torch's own load would leave them alone, for the caller to fill.
    if lost and (target is not None or (on_meta and not assign)):
        _refuse("meta-buffers", names=lost)
    absent = [key for key in on_meta if key in plan.missing_keys or not (key in plan.pairs or plan.rehearsed)]
    if absent:
        _refuse("meta-missing", names=absent)
    if on_meta and not assign and target is None and torch.get_default_device().type == "meta":
        _refuse("meta-device")


def _homes(
    survey: Survey, target: torch.device | None, sources: Mapping[str, torch.device], assign: bool
) -> dict[str, str]:
    """The device of every tensor that is made anew, where one is decided: those on meta, with `assign` all."""
    homes: dict[str, str] = {}
    for key, tensor in (survey.tensors if assign else survey.unusual).items():
        if assign or tensor.is_meta:
            source = next((sources[path] for path in sources if without_prefix(key, path) is not None), None)
            home = target or source or (None if assign else torch.get_default_device())
            if home is not None:
                homes[key] = str(home)
    return homes


def _refuse(kind: Kind, /, **facts: object) -> NoReturn:
    raise PlacementError(Problem(kind, facts=facts)) from None
