"""Tell what a tensor is in memory: where its bytes lie, whether they are its values, whether they may be written."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache

import torch
from torch import nn

from smartload.errors import PlacementError
from smartload.records.problems import Problem

SMALL_TENSOR_BYTES = 1 << 14
"""Up to this size, what Python does for each tensor takes longer than moving its bytes once more."""

# The exact types: a subclass may hold its values elsewhere (a DTensor, a quantized weight), or change every operation.
_ORDINARY = (torch.Tensor, nn.Parameter)


# Cached, as is `device_name`: both are asked for every key, and a model has few dtypes and devices.
@cache
def dtype_name(dtype: torch.dtype) -> str:
    """Give the name of a dtype without its module.

    >>> dtype_name(torch.float32)
    'float32'
    """
    return str(dtype).removeprefix("torch.")


@cache
def device_name(device: torch.device) -> str:
    """Give the name of a device as torch prints it, as in 'cuda:0'."""
    return str(device)


# A tensor has no buffer protocol of its own. Its `numpy()` needs NumPy, which may not be installed, and knows neither
# bfloat16 nor float8. An array of ctypes needs a type for each size, which stays until the collector runs.
_memory_view = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)
_WRITABLE = 0x200  # PyBUF_WRITE of Python's C interface


def memory_at(address: int, nbytes: int) -> memoryview:
    """Give the bytes at an address, to read and to write.

    Nothing keeps the memory alive or checks its bounds: the caller holds the tensor that it belongs to.
    """
    view: memoryview = _memory_view(address, nbytes, _WRITABLE)
    return view


def memory_of(tensor: torch.Tensor) -> object:
    """Give a value that is equal for two tensors that see the very same memory in the same way.

    A tensor without memory (on meta, sparse, empty) is equal to itself alone.
    """
    if has_memory(tensor) and tensor.numel():
        return tensor.data_ptr(), tensor.device, tuple(tensor.shape), tensor.stride(), tensor.dtype
    return id(tensor)


def has_memory(tensor: torch.Tensor) -> bool:
    """Tell whether the tensor is a dense one, of no subclass, with memory of its own."""
    return type(tensor) in _ORDINARY and tensor.layout is torch.strided and not tensor.is_meta


def check_makes_tensors() -> None:
    """Refuse to go on in a mode in which torch makes other things than tensors with memory, as FakeTensorMode.

    Bytes written to what such a mode makes would go to the address 0, and end the process.

    Raises:
        PlacementError: such a mode is active.
    """
    if (made := type(torch.empty(0, device="cpu"))) is not torch.Tensor:
        raise PlacementError(Problem("fake-mode", facts={"kind": made.__name__}))


def is_ordinary(tensor: torch.Tensor) -> bool:
    """Tell whether the tensor's memory holds its values as they are: dense, of no subclass, nothing done on reading."""
    dense = type(tensor) in _ORDINARY and tensor.layout is torch.strided
    # `conj()` and `_neg_view()` only set a flag: the bytes keep the other sign until something reads them.
    return dense and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())


def takes_raw_bytes(tensor: torch.Tensor) -> bool:
    """Tell whether bytes may be written into the tensor's memory without torch."""
    return is_ordinary(tensor) and not (tensor.is_meta or tensor.is_inference() or _repeats_elements(tensor))


def is_writable(tensor: torch.Tensor) -> bool:
    """Tell whether torch itself could write to the tensor.

    It refuses to write to an expanded tensor, and outside of inference mode to one that was made in it.
    """
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return not (tensor.layout is torch.strided and _repeats_elements(tensor))


def _repeats_elements(tensor: torch.Tensor) -> bool:
    """Tell whether a stride of zero (`expand`) makes one address several elements of the tensor."""
    return 0 in tensor.stride() and tensor.numel() > 1


def overlapping(tensors: Mapping[str, torch.Tensor]) -> frozenset[str]:
    """Give the keys of tensors whose memory is in part that of another, or twice their own.

    The result of writing to such tensors depends on the order, so that threads must not do it. Two names of the very
    same memory do not overlap in this sense: it is filled once.
    """
    overlaps: set[str] = set()
    ranges: dict[torch.device, list[tuple[int, int, str]]] = {}
    for key, tensor in tensors.items():
        if has_memory(tensor) and (nbytes := tensor.nbytes):
            if not tensor.is_contiguous():
                nbytes = extent(tensor) * tensor.element_size()
                if _may_overlap_itself(tensor):
                    overlaps.add(key)
            start = tensor.data_ptr()
            ranges.setdefault(tensor.device, []).append((start, start + nbytes, key))
    for on_device in ranges.values():
        # Sorted by address, a range need only be compared with the one before it that reaches farthest. To compare
        # all pairs would take hours for a model of 100,000 tensors.
        on_device.sort()
        farthest = (0, 0, "")
        for current in on_device:
            start, end, key = current
            if start < farthest[1] and memory_of(tensors[key]) != memory_of(tensors[farthest[2]]):
                overlaps.update((key, farthest[2]))
            if end > farthest[1]:
                farthest = current
    if overlaps:  # every name of such memory: one that is filled apart from the others would break the order
        shared = {memory_of(tensors[key]) for key in overlaps}
        overlaps.update(key for key, tensor in tensors.items() if key not in overlaps and memory_of(tensor) in shared)
    return frozenset(overlaps)


def shares_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether the memory that two tensors reach over, from the first element to the last, is in part the same."""
    first, second = (
        (tensor.data_ptr(), tensor.data_ptr() + extent(tensor) * tensor.element_size()) for tensor in (one, other)
    )
    return one.device == other.device and first[0] < second[1] and second[0] < first[1]


def extent(tensor: torch.Tensor) -> int:
    """Count the elements of memory from the first element of a tensor that is not empty to its last, both included.

    >>> extent(torch.zeros(3, 4)[:, :2])
    10
    """
    return 1 + sum((count - 1) * step for count, step in zip(tensor.shape, tensor.stride()))


def _may_overlap_itself(tensor: torch.Tensor) -> bool:
    """Tell whether two elements of the tensor may have one address; False only where that is certain.

    By rising stride, each dimension must step over all that the dimensions before it cover. Layouts that interleave
    without touching fail this, too, and are filled by torch, which is slower and always right.
    """
    covered = 0
    for step, count in sorted(zip(tensor.stride(), tensor.shape)):
        if count > 1 and step <= covered:
            return True
        covered += (count - 1) * step
    return False
