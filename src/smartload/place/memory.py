"""What a tensor is in memory: where it lies, whether that is its values, whether it may be written to."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

TINY = 1 << 14
"""Bytes up to which what is done for each tensor takes longer than moving its bytes once more."""


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """What torch calls a dtype, as in `float32`."""
    return str(dtype).removeprefix("torch.")


@cache
def device_name(device: torch.device) -> str:
    """What torch calls a device, as in `cuda:0`."""
    return str(device)


def memory_at(address: int, nbytes: int) -> Any:
    """The bytes at an address: an array of ctypes, to be read or written as `raw`."""
    return (ctypes.c_char * nbytes).from_address(address)


def memory_of(tensor: torch.Tensor) -> object:
    """Equal for two tensors that are the same memory seen in the same way; the object itself where there is none."""
    if has_memory(tensor) and tensor.numel():
        return tensor.data_ptr(), tensor.device, tuple(tensor.shape), tensor.stride(), tensor.dtype
    return id(tensor)


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a dense one with memory of its own."""
    return type(tensor) in _ORDINARY and tensor.layout is torch.strided and not tensor.is_meta


_ORDINARY = (torch.Tensor, nn.Parameter)


def is_ordinary(tensor: torch.Tensor) -> bool:
    """Whether the memory holds the values as they are: dense, no subclass, nothing applied on reading."""
    plain = type(tensor) in _ORDINARY and tensor.layout is torch.strided
    return plain and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())


def takes_raw_bytes(tensor: torch.Tensor) -> bool:
    """Whether bytes may be put into the memory as they are."""
    return is_ordinary(tensor) and not (tensor.is_meta or tensor.is_inference() or _repeats(tensor))


def is_writable(tensor: torch.Tensor) -> bool:
    """Whether torch could write to it at all; expanded and inference tensors refuse, and stay as they are."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return not (tensor.layout is torch.strided and _repeats(tensor))


def _repeats(tensor: torch.Tensor) -> bool:
    """Whether one place in memory is several elements of the tensor."""
    return 0 in tensor.stride() and tensor.numel() > 1


def overlapping(tensors: Mapping[str, torch.Tensor]) -> frozenset[str]:
    """Keys whose memory is in part another's, or its own twice over: there the order of writing decides.

    Two names of the very same memory do not overlap in this sense.
    """
    tangled: set[str] = set()
    spans: dict[torch.device, list[tuple[int, int, str]]] = {}
    for key, tensor in tensors.items():
        if has_memory(tensor) and (nbytes := tensor.nbytes):
            if not tensor.is_contiguous():
                nbytes = reach(tensor) * tensor.element_size()
                tangled |= {key} if _folded(tensor) else set()
            start = tensor.data_ptr()
            spans.setdefault(tensor.device, []).append((start, start + nbytes, key))
    for group in spans.values():
        group.sort()
        last = (0, 0, "")
        for span in group:
            start, end, key = span
            if start < last[1] and memory_of(tensors[key]) != memory_of(tensors[last[2]]):
                tangled.update((key, last[2]))
            if end > last[1]:
                last = span
    return frozenset(tangled)


def reach(tensor: torch.Tensor) -> int:
    """How many elements of memory lie from the first element of a tensor that has any to behind its last one."""
    return 1 + sum((count - 1) * step for count, step in zip(tensor.shape, tensor.stride()))


def _folded(tensor: torch.Tensor) -> bool:
    """Whether two elements may lie at one place."""
    reach = 0
    for step, count in sorted(zip(tensor.stride(), tensor.shape)):
        if count > 1 and step <= reach:
            return True
        reach += (count - 1) * step
    return False
