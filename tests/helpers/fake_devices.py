"""Pretend CUDA devices on a machine without one, for tests.

    with fake_cuda(2): nn.Linear(3, 2).to("cuda:1").weight    # a plain tensor on cuda:1

No tensor subclass, no mode: C++ sees device cuda:N, the CUDA key and a storage on cuda:N; only the
memory is host memory. Module.to takes a GPU's `param.data = ...` path, torch.save writes cuda:N tags,
torch.load, map_location and DataParallel run torch's own code, and mixing devices raises.

How: malloc'ed memory in a hand-made DLPack capsule that says (kDLCUDA, N). Operators that reach the
CUDA key land in one Python function, which runs them on CPU tensors over the same memory: as the
fallback of the key and, in a build of torch with CUDA, in place of each of its CUDA kernels, none of
which could run here. The C++ device guard that torch wants for CUDA is that of the CPU with its first
five methods exchanged.

Not emulated: backward() (set p.grad by hand), a current device other than 0, streams, pinned memory,
generators, AMP, fused RNNs. Left behind in the process: guard and kernels, so that a later
torch.empty(1, device="cuda") raises RuntimeError, as in a build with CUDA.
For Linux, with or without CUDA in the build, and Windows; FakeDevicesUnavailable where it cannot work.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_map

aten = torch.ops.aten
_CPU_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_CPU_SLOT, _CUDA_SLOT, _SLOTS = 0, 1, 21  # values of c10::DeviceType
_WINDOWS = sys.platform == "win32"
# The array of guards: the library that exports it, and its name there as the compiler spells it.
_REGISTRY = ("libc10.so", "_ZN3c104impl26device_guard_impl_registryE")
if _WINDOWS:
    _GUARD = "PEBUDeviceGuardImplInterface@impl@c10@@"
    _REGISTRY = ("c10.dll", f"?device_guard_impl_registry@impl@c10@@3V?$array@U?$atomic@{_GUARD}@std@@$0BF@@std@@A")
_state = SimpleNamespace(count=0, installed=[])


class FakeDevicesUnavailable(RuntimeError):
    """This build of torch cannot host the pretend devices."""


class _Managed(ctypes.Structure):
    """DLPack's DLManagedTensor, then its one shape and stride."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("shape0", ctypes.c_int64),
        ("stride0", ctypes.c_int64),
    ]


def _blob(nbytes: int, device: torch.device) -> torch.Tensor:
    """New 1-D uint8 tensor on `device`; header and data are one malloc block, freed by free()."""
    if not 0 <= (device.index or 0) < _state.count:
        raise RuntimeError(f"CUDA error: invalid device ordinal ({device}, pretended)")
    libc, size = ctypes.CDLL("ucrtbase" if _WINDOWS else None), ctypes.sizeof(_Managed)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    block = libc.malloc(size + nbytes + 64)
    head = _Managed.from_address(block)
    head.data = (block + size + 63) // 64 * 64
    head.device_type, head.device_id, head.ndim = 2, device.index or 0, 1  # 2 is kDLCUDA
    head.code, head.bits, head.lanes, head.shape0, head.stride0 = 1, 8, 1, nbytes, 1  # uint8
    head.shape, head.strides = block + _Managed.shape0.offset, block + _Managed.stride0.offset
    head.byte_offset, head.ctx, head.deleter = 0, None, ctypes.cast(libc.free, ctypes.c_void_p).value
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return torch._C._from_dlpack(new(block, b"dltensor", None))


def _like(meta: torch.Tensor, device: torch.device) -> torch.Tensor:
    """New uninitialised tensor on `device` with the size, stride and dtype of `meta`."""
    span = 1 + sum((n - 1) * s for n, s in zip(meta.shape, meta.stride())) if meta.numel() else 0
    raw = _blob(span * meta.element_size(), device)
    raw = aten.view.dtype.redispatch(_CPU_KEY, raw, meta.dtype)
    return aten.as_strided.default.redispatch(_CPU_KEY, raw, list(meta.shape), list(meta.stride()), 0)


def _host(t: torch.Tensor) -> torch.Tensor:
    """A CPU tensor over the memory of `t` (a fresh, resizable one where it has none)."""
    s = t.untyped_storage()
    if s.nbytes() == 0:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
    memory = torch._C._construct_storage_from_data_pointer(s.data_ptr(), torch.device("cpu"), s.nbytes())
    return torch.empty(0, dtype=t.dtype).set_(memory, t.storage_offset(), t.shape, t.stride())


def _copy(dst: torch.Tensor, src: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    (_host(dst) if dst.is_cuda else dst).copy_(_host(src) if src.is_cuda else src)
    return dst


def _kernel(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Every operator on a pretend device but copy_ ends here."""
    if op.is_view or op.overloadpacket is aten.set_:  # metadata only: torch's CPU code does it
        return op.redispatch(_CPU_KEY, *args, **kwargs)
    if op in (aten.empty.memory_format, aten.empty_strided.default):
        return _like(op(*args, **{**kwargs, "device": "meta", "pin_memory": None}), kwargs["device"])
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []  # (as given, as run on the CPU)

    def unwrap(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return torch.device("cpu") if isinstance(x, torch.device) else x
        pairs.append((x, _host(x) if x.is_cuda else x))
        return pairs[-1][1]

    host_args, host_kwargs = tree_map(unwrap, (args, kwargs))
    devices = list(dict.fromkeys(x.device for x, _ in pairs if x.is_cuda or x.dim()))  # CPU scalars pass
    if len(devices) > 1:
        two = f"{devices[0]} and {devices[1]}"
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, {two}!")
    target = torch.device(kwargs.get("device") or devices[0])
    result = op(*host_args, **host_kwargs)
    for original, host in pairs:  # an out= argument was resized: give it new memory
        if original.numel() != host.numel():
            new = _copy(_like(host, original.device), host)
            aten.set_.source_Storage_storage_offset.redispatch(
                _CPU_KEY, original, new.untyped_storage(), 0, new.shape, new.stride()
            )

    def wrap(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or target.type != "cuda":
            return x
        known = [original for original, host in pairs if host is x]
        return known[0] if known else _copy(_like(x, target), x)

    return tree_map(wrap, result)


def _install_guard() -> None:
    """Give CUDA a C++ device guard. It stays: tensors that outlive the block need one."""
    library, registry = _REGISTRY
    try:
        slots = (ctypes.c_void_p * _SLOTS).in_dll(ctypes.CDLL(f"{torch.__path__[0]}/lib/{library}"), registry)
    except (OSError, ValueError) as error:
        raise FakeDevicesUnavailable(str(error)) from error
    # A c10::Device is two bytes, type and index. There is one current device, cuda:0, and nothing to be set.
    device, this = ctypes.c_int16, ctypes.c_void_p
    if _WINDOWS:  # there a method is given a place, writes the object to it, and returns the place

        def current(this: int, place: int, new: int = 0) -> int:
            device.from_address(place).value = _CUDA_SLOT
            return place

        exchange, get = ctypes.CFUNCTYPE(this, this, this, device)(current), ctypes.CFUNCTYPE(this, this, this)(current)
    else:
        exchange = ctypes.CFUNCTYPE(device, this, device)(lambda this, new: _CUDA_SLOT)
        get = ctypes.CFUNCTYPE(device, this)(lambda this: _CUDA_SLOT)
    methods = [
        ctypes.CFUNCTYPE(ctypes.c_int8, this)(lambda this: _CUDA_SLOT),  # type
        exchange,  # exchangeDevice
        get,  # getDevice
        ctypes.CFUNCTYPE(None, this, device)(lambda this, new: None),  # setDevice
        ctypes.CFUNCTYPE(None, this, device)(lambda this, new: None),  # uncheckedSetDevice
    ]
    # An object of C++ begins with the address of its table of methods. There are fewer than 40.
    table = (ctypes.c_void_p * 40).from_address(ctypes.c_void_p.from_address(slots[_CPU_SLOT]).value or 0)
    own_table = (ctypes.c_void_p * 40)(*table)
    for i, method in enumerate(methods):
        own_table[i] = ctypes.cast(method, ctypes.c_void_p).value
    guard = ctypes.c_void_p(ctypes.addressof(own_table))
    slots[_CUDA_SLOT] = ctypes.addressof(guard)
    _state.installed += [methods, own_table, guard]  # all of this must live as long as the process


def _install_kernels() -> None:
    """Have every operator on a CUDA tensor run `_kernel`. It stays, as the guard does."""
    fallback, special = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    fallback.fallback(_kernel, "CUDA")
    special.impl("copy_", _copy, "CUDA")  # its composite kernel would win over a fallback
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that kernels are overridden
        for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"):
            space, _, rest = name.partition("::")
            operator, _, overload = rest.partition(".")
            if space == "aten" and rest != "copy_":
                op = getattr(getattr(aten, operator), overload or "default")
                special.impl(rest, partial(_kernel, op), "CUDA")
    _state.installed += [fallback, special]


def _patches() -> list[tuple[Any, str, Any]]:
    cuda, acc, comm = torch.cuda, torch.accelerator, torch.nn.parallel.comm
    storage, to, clone = torch.UntypedStorage, torch.UntypedStorage.to, torch.UntypedStorage.clone
    dp = sys.modules["torch.nn.parallel.data_parallel"]  # torch.nn.parallel has a function so named

    def on(s: Any, device: Any) -> Any:
        return _blob(s.nbytes(), torch.device(device)).untyped_storage().copy_(s)

    def properties(d: int = 0) -> Any:
        assert d in range(_state.count), "Invalid device id"  # as torch.cuda does
        return SimpleNamespace(name="pretend", total_memory=1, multi_processor_count=1)

    def scatter(inputs: Any, kwargs: Any, ids: Any, dim: int = 0) -> Any:
        def part(i: int) -> Any:
            return tree_map(lambda x: x.chunk(len(ids), dim)[i].to(f"cuda:{ids[i]}"), (inputs, kwargs))

        return tuple(zip(*map(part, range(len(inputs[0].chunk(len(ids), dim))))))

    def move(s: Any, *, device: Any, non_blocking: bool = False) -> Any:
        return on(s, device) if torch.device(device).type == "cuda" else to(s, device=device)

    return [
        (cuda, "_lazy_init", lambda: None),
        (cuda, "is_available", lambda: True),
        (cuda, "device_count", lambda: _state.count),
        (cuda, "current_device", lambda: 0),
        (cuda, "get_device_properties", properties),
        (cuda, "is_current_stream_capturing", lambda: False),
        (acc, "is_available", lambda: True),
        (acc, "device_count", lambda: _state.count),
        (acc, "current_accelerator", lambda check_available=False: torch.device("cuda")),
        (acc, "current_stream", lambda d=None: SimpleNamespace(is_capturing=lambda: False)),
        (storage, "clone", lambda s: on(s, s.device) if s.device.type == "cuda" else clone(s)),
        (storage, "to", move),
        # DataParallel.forward past its device check is C++ of CUDA builds; here for tensor arguments:
        (dp, "scatter_kwargs", scatter),
        (comm, "broadcast_coalesced", lambda ts, ids: [[t.to(f"cuda:{i}") for t in ts] for i in ids]),
        (comm, "gather", lambda ts, dim, to: torch.cat([t.to(f"cuda:{to}") for t in ts], dim)),
        (dp, "parallel_apply", lambda ms, xs, kws, ids: [m(*x, **kw) for m, x, kw in zip(ms, xs, kws)]),
    ]


@contextlib.contextmanager
def fake_cuda(count: int = 2) -> Iterator[tuple[torch.device, ...]]:
    """Pretend that `count` CUDA devices exist, until the block ends (do not nest)."""
    if not _state.installed:
        if torch.cuda.is_available():
            raise FakeDevicesUnavailable("a real CUDA device, whose kernels are needed")
        _install_guard()
        _install_kernels()
    # cuDNN has operators of its own, which the CPU lacks.
    with contextlib.ExitStack() as stack, torch.backends.cudnn.flags(enabled=False):
        for owner, name, value in [(_state, "count", count), *_patches()]:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield tuple(torch.device("cuda", i) for i in range(count))


@pytest.fixture
def cuda2() -> Iterator[tuple[torch.device, ...]]:
    """Two CUDA devices: real where there are two, pretend on a machine without any, else skip."""
    try:
        with contextlib.nullcontext() if torch.cuda.device_count() >= 2 else fake_cuda(2):
            yield torch.device("cuda:0"), torch.device("cuda:1")
    except FakeDevicesUnavailable as why:
        pytest.skip(f"no second CUDA device, real or pretend: {why}")
