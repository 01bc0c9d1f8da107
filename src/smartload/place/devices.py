"""Decide on which device each tensor must land, or refuse with the reason. Nothing moves here.

First the device asked for is resolved, then what moves is found (the whole model, or the modules inside a
DataParallel), then whatever would go wrong in the load is refused: all of it before the first tensor moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import NoReturn, TypeAlias

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from smartload.errors import PlacementError
from smartload.place.distributed import is_flat, is_sharded
from smartload.place.memory import check_makes_tensors
from smartload.place.survey import Survey
from smartload.records.entries import Entry, InMemory
from smartload.records.keys import ancestors, without_prefix
from smartload.records.problems import Kind, Problem
from smartload.records.report import KeyPlan
from smartload.records.requests import Placement

Device: TypeAlias = "str | int | torch.device | Sequence[int | str | torch.device] | None"


def place(survey: Survey, device: Device, plan: KeyPlan, assign: bool, entries: Mapping[str, Entry]) -> Placement:
    """Decide where each tensor of the model must land, and which modules must move for it.

    Args:
        survey: the model.
        device: as in `smart_load`.
        plan: the keys that will be loaded; a tensor on meta must be among them, unless the model's own code fills it.
        assign: whether the file's tensors replace the model's.
        entries: what will be loaded, by model key.

    Raises:
        PlacementError: the device does not exist or lacks a dtype, a wrapper binds the model to another one, or a
            tensor could get no value. Nothing has moved.
        TypeError: `device` is of a type that names no device.
    """
    check_makes_tensors()
    if fake := [key for key, tensor in survey.unusual.items() if type(tensor).__name__ == "FakeTensor"]:
        _refuse("fake", names=fake)
    # Every DataParallel, at any depth, wants its module on its first device, whatever else is asked for.
    parallel = {path: module for path, module in survey.modules.items() if _device_ids(module)}
    sources = {path: _source(module) for path, module in parallel.items()}
    target = _target(survey, device)
    for path, module in parallel.items():
        if target is not None and target != sources[path]:  # its forward would refuse to run there
            _refuse("data-parallel", device=str(target), ids=_ids(module), first=str(sources[path]), where=path)
    if target is None:
        moves = [(path, str(source)) for path, source in sources.items() if _has_tensor_off(survey, path, source)]
    elif _has_tensor_off(survey, "", target):
        _check_movable(survey, target)
        moves = [("", str(target))]
    else:
        moves = []
    # Values on meta for tensors on meta: torch's load copies nothing there, and leaves the model without values.
    hollow = {key for key, tensor in survey.unusual.items() if tensor.is_meta and _is_on_meta(entries.get(key))}
    _check_meta(survey, target, plan, assign, hollow)
    if assign:
        _check_replaceable(survey)
    else:
        _check_writable(survey)
    new = _devices_of_new_tensors(survey, target, sources, assign, hollow)
    _check_dtypes(survey, moves, new, entries if assign else {})
    return Placement(None if target is None else str(target), tuple(moves), new)


def _check_writable(survey: Survey) -> None:
    """Refuse tensors made in inference mode, unless it is on now."""
    # torch raises for them as well, but only after it has written the new values, and then the undo may not write.
    if not torch.is_inference_mode_enabled():
        names = [key for key, tensor in survey.unusual.items() if not is_lazy(tensor) and tensor.is_inference()]
        if names:
            _refuse("inference", names=names)


def _target(survey: Survey, device: Device) -> torch.device | None:
    """Give the one device that the whole model must go to; None where each tensor stays on its own.

    A list gives None, once it equals the `device_ids` of the outermost DataParallel, in their order: it then names
    what the wrapper does anyway. A list cannot wrap a model, because that makes a new object.
    """
    if device is None:
        return None
    if not isinstance(device, (list, tuple)):
        return _resolve(device, survey)
    if not device:
        raise TypeError(f"device={device!r} names no device: leave device out, or name one")
    resolved = [_resolve(each, survey) for each in device]
    given = [_as_written(each) for each in device]
    wrappers = survey.keys.wrappers
    # Outermost: every path above it is a wrapper's, as in torch.compile(DataParallel(net)).
    outermost = [
        module
        for path, module in survey.modules.items()
        if _device_ids(module) and all(above in wrappers for above in ancestors(path) if above)
    ]
    if not outermost:
        _refuse("several-devices", device=given, model=type(survey.model).__name__)
    ids = _device_ids(outermost[0])
    if resolved != [torch.device(_source(outermost[0]).type, i) for i in ids]:
        _refuse("other-devices", device=given, ids=ids)
    return None


def _resolve(device: object, survey: Survey) -> torch.device:
    """Give the device with its index, so that it equals that of a tensor there: `'cuda' -> cuda:0`, `1 -> cuda:1`.

    Raises:
        PlacementError: torch knows no such device, this machine has none, or it is meta.
        TypeError: `device` is of a type that names no device.
    """
    if isinstance(device, bool) or not isinstance(device, (int, str, torch.device)):
        raise TypeError(f"device must be None, a device, a string, an int or a list of these, not {device!r}")
    try:
        # `torch.device(1)` takes torch's current accelerator, and raises where there is none.
        requested = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except RuntimeError as error:
        _refuse("no-such-device", device=_as_written(device), torch=str(error).partition("\n")[0])
    if requested.type == "cpu":
        return torch.device("cpu")  # tensors are on "cpu", which "cpu:0" does not equal
    if requested.type == "meta":
        _refuse("meta-device")
    count, current = _count_and_current(requested)
    index = current if requested.index is None else requested.index
    if index >= count:
        built = requested.type == "cuda" and bool(torch.version.cuda or torch.version.hip)
        facts = {"type": requested.type, "count": count, "torch": torch.__version__, "built": built}
        _refuse("absent-device", device=_as_written(device), home=_present_devices(survey), **facts)
    return torch.device(requested.type, index)


def _count_and_current(device: torch.device) -> tuple[int, int]:
    """Count the devices of this type, and give the index of the current one."""
    try:
        backend = torch.get_device_module(device)
        count = backend.device_count() if getattr(backend, "is_available", lambda: True)() else 0
    except (RuntimeError, AttributeError):  # a type without a module of its own (hpu, npu)
        return 0, 0
    # `current_device` initialises the backend, which takes memory and time: asked only where the answer is needed.
    return count, getattr(backend, "current_device", lambda: 0)() if count and device.index is None else 0


def _as_written(device: object) -> object:
    """Give a device as the caller may have written it: plain data, so that the error can be pickled."""
    return device if isinstance(device, int) else str(device)


def _present_devices(survey: Survey) -> str:
    """List the devices of the model's tensors for a message, as in 'cpu, cuda:0'."""
    devices = {str(t.device if not t.is_meta else default_device()) for _, t in _tensors(survey, "")}
    return ", ".join(sorted(devices)) or "cpu"


def default_device() -> torch.device:
    """Give the device on which torch makes a tensor where none is named."""
    # Of a tensor made for it: up to 2.7, torch.get_default_device() does not see `with torch.device(...)`, and raises
    # after set_default_device(None).
    try:
        return torch.empty(0).device
    except (RuntimeError, AssertionError):  # a device that is not there: whoever makes the tensor will say so
        return torch.get_default_device()


def _device_ids(module: nn.Module) -> list[int]:
    """Give the `device_ids` of a DataParallel; none for other modules, nor where it found no device to use."""
    return list(module.device_ids) if isinstance(module, nn.DataParallel) else []


def _source(module: nn.Module) -> torch.device:
    """Give the first device of a DataParallel, where its forward wants all parameters and buffers."""
    return torch.device(str(module.src_device_obj))


def _ids(module: nn.Module) -> str:
    """List the devices of a DataParallel for a message, as in 'cuda:0, cuda:1'."""
    return ", ".join(f"{_source(module).type}:{i}" for i in _device_ids(module))


def _tensors(survey: Survey, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Give all parameters and buffers, persistent or not, of the module at `path` and below, with their keys."""
    for module_path, module in survey.modules.items():
        if module_path == path or without_prefix(module_path, path) is not None:
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    yield f"{module_path}.{name}" if module_path else name, tensor


def _has_tensor_off(survey: Survey, path: str, device: torch.device) -> bool:
    """Tell whether some tensor of the module at `path` is on another device; those on meta are on none yet."""
    return any(tensor.device != device for _, tensor in _tensors(survey, path) if not tensor.is_meta)


def _check_movable(survey: Survey, target: torch.device) -> None:
    """Refuse to move a model whose devices another library has set: it goes on using them."""
    for module in survey.modules.values():
        # Of accelerate: which module is on which device. With one device it is an ordinary model.
        device_map = getattr(module, "hf_device_map", None)
        if isinstance(device_map, dict) and len(set(device_map.values())) > 1:
            _refuse("bound", device=str(target), how=f"dispatched over {_devices_in(device_map)} (hf_device_map)")
        if isinstance(module, nn.parallel.DistributedDataParallel):  # its buckets of gradients stay on the old device
            device = next((str(tensor.device) for tensor in module.parameters()), "its device")
            _refuse("bound", device=str(target), how=f"wrapped in DistributedDataParallel, which is bound to {device}")
        if is_flat(module) or any(is_sharded(parameter) for parameter in module._parameters.values()):
            _refuse("bound", device=str(target), how="sharded (FSDP or DTensor)")


def _check_replaceable(survey: Survey) -> None:
    """Refuse to replace tensors that a wrapper goes on using: torch would report success and be wrong.

    The flat tensor keeps the old values; the gradients of the new parameters are never synchronised.
    """
    for module in survey.modules.values():
        if is_flat(module):
            _refuse("held-on-to", how="FullyShardedDataParallel, which keeps its own flat tensor")
        if isinstance(module, nn.parallel.DistributedDataParallel):
            _refuse("held-on-to", how="DistributedDataParallel, which would no longer synchronise their gradients")


def _devices_in(device_map: Mapping[str, object]) -> str:
    """List the devices of an `hf_device_map` for a message; accelerate writes CUDA devices as bare numbers."""
    names = (f"cuda:{device}" if isinstance(device, int) else str(device) for device in device_map.values())
    return ", ".join(dict.fromkeys(names))


def _is_on_meta(entry: Entry | None) -> bool:
    """Tell whether an entry is a tensor in memory that has no values."""
    value = entry.value if isinstance(entry, InMemory) else None
    return isinstance(value, torch.Tensor) and value.is_meta


def _check_meta(survey: Survey, target: torch.device | None, plan: KeyPlan, assign: bool, hollow: Set[str]) -> None:
    """Refuse a tensor on meta that would stay without a value: each must come from the file.

    None need come where all stay on meta, since the state dict, too, has no values.
    """
    on_meta = [key for key, tensor in survey.unusual.items() if tensor.is_meta and key not in hollow]
    if hollow and (target is not None or (on_meta and not assign)):
        _refuse("meta-values", names=sorted(hollow))
    meta_buffers = [key for key, tensor in survey.non_persistent.items() if tensor.is_meta]
    # accelerate keeps an offloaded tensor on meta, its values on the CPU or on disk, and puts them back by this hook.
    if (on_meta or meta_buffers) and any(hasattr(module, "_hf_hook") for module in survey.modules.values()):
        _refuse("offloaded", names=on_meta or meta_buffers)
    # No file has the non-persistent ones. They may stay on meta only where torch's own load, too, leaves them there
    # for the caller to fill: where nothing moves, and nothing on meta gets memory here.
    if meta_buffers and (target is not None or (on_meta and not assign)):
        _refuse("meta-buffers", names=meta_buffers)
    # `rehearsed`: the model's own loading code has accepted these keys and may make up for those that lack a pair;
    # whether it did is checked after the load.
    absent = [key for key in on_meta if key in plan.missing_keys or not (key in plan.pairs or plan.rehearsed)]
    if absent:
        _refuse("meta-missing", names=absent)
    # Inside `with torch.device("meta")` the memory would be made on meta again.
    if on_meta and not assign and target is None and default_device().type == "meta":
        _refuse("meta-device")


def _devices_of_new_tensors(
    survey: Survey, target: torch.device | None, sources: Mapping[str, torch.device], assign: bool, hollow: Set[str]
) -> dict[str, str]:
    """Give the device of every tensor that is made anew: those on meta or, with `assign`, all.

    The device asked for comes first, then that of the DataParallel around the tensor, then torch's default device.
    With `assign` no default is set here: a value that is in memory already stays on its own device.
    """
    devices: dict[str, str] = {}
    default = default_device() if survey.unusual and not assign else None
    for key, tensor in (survey.tensors if assign else survey.unusual).items():
        if (assign or tensor.is_meta) and key not in hollow:
            source = next((sources[path] for path in sources if without_prefix(key, path) is not None), None)
            device = target or source or default
            if device is not None:
                devices[key] = str(device)
    return devices


def _check_dtypes(
    survey: Survey, moves: Sequence[tuple[str, str]], new: Mapping[str, str], replaced: Mapping[str, Entry]
) -> None:
    """Refuse a dtype that a device lacks: those of Apple have no float64, and the move would stop midway.

    Args:
        survey: the model.
        moves: which modules move, and where.
        new: the device of every tensor that is made anew.
        replaced: what takes the place of the model's tensors, by key, where it brings a dtype of its own.
    """
    wanted: dict[tuple[str, torch.dtype, bool], list[str]] = {}
    for path, device in moves:
        for key, tensor in _tensors(survey, path):
            wanted.setdefault((device, tensor.dtype, False), []).append(key)
    for key, device in new.items():
        spec = replaced[key].spec if key in replaced else None
        dtype = survey.tensors[key].dtype if spec is None else getattr(torch, spec.dtype, None)
        if dtype is not None:
            wanted.setdefault((device, dtype, spec is not None), []).append(key)
    for (device, dtype, in_file), keys in wanted.items():
        # Where it holds no bytes either, the dtype is not to blame (no memory left, another process has it): the move
        # will say what is.
        if not _holds(device, dtype) and _holds(device, torch.uint8):
            names = list(dict.fromkeys(keys))
            _refuse("device-dtype", device=device, dtype=str(dtype), names=names, in_file=in_file)


def _holds(device: str, dtype: torch.dtype) -> bool:
    """Tell whether a tensor of this dtype can be moved to the device."""
    if torch.device(device).type in ("cpu", "meta"):
        return True
    try:
        torch.empty(1, dtype=dtype, device="cpu").to(device)
    except (RuntimeError, TypeError, AssertionError):  # the last: a torch that was built without this backend
        return False
    return True


def _refuse(kind: Kind, /, **facts: object) -> NoReturn:
    """Raise a PlacementError of this kind; torch's own complaint is among the facts where it says anything."""
    raise PlacementError(Problem(kind, facts=facts)) from None
