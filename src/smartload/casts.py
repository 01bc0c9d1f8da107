"""Which casts keep what a tensor means: floats may change width, nothing may lose its fraction, part or finiteness."""

from __future__ import annotations

import torch

_RANGE = {  # the largest exponent of two that the dtype holds, where that is all a cast must keep
    "float8_e4m3fn": 8,
    "float8_e4m3fnuz": 7,
    "float8_e5m2": 15,
    "float8_e5m2fnuz": 15,
    "float8_e8m0fnu": 127,
    "float16": 15,
    "bfloat16": 127,
    "float32": 127,
    "float64": 1023,
}
_MANTISSA = {"bfloat16": 7, "float8_e8m0fnu": 0, "float32": 23, "float64": 52}
_PART = {"complex32": "float16", "complex64": "float32", "complex128": "float64"}


def verdict(source: str, target: str) -> str:
    """"free" where no value can be lost, "check" where the values decide, "never" where the kind itself is lost."""
    if source == target:
        return "free"
    if source in _PART and target not in _PART:
        return "never"
    low, high = _PART.get(source, source), _PART.get(target, target)
    if low == high:
        return "free"
    if low in _RANGE and high in _RANGE:
        wider = _RANGE[high] > _RANGE[low]
        # With equal exponents the longer mantissa can still round up to infinity in the shorter one.
        equal = _RANGE[high] == _RANGE[low] and _MANTISSA.get(high, 99) >= _MANTISSA.get(low, 0)
        return "free" if wider or equal else "check"
    if low == "bool":
        return "free"
    return "check"


def first_loss(values: torch.Tensor, target: torch.dtype) -> object:
    """The first value that the target dtype cannot hold; None where all can be held."""
    source = _comparable(values)
    cast = values.to(target)
    if values.dtype.is_floating_point | values.dtype.is_complex and (target.is_floating_point or target.is_complex):
        lost = torch.isfinite(source) & ~torch.isfinite(_comparable(cast))
    else:
        lost = _comparable(cast.to(values.dtype)) != source
    if not bool(lost.any()):
        return None
    loss: object = source[lost].flatten()[0].item()
    return loss


def _comparable(values: torch.Tensor) -> torch.Tensor:
    """The values in a dtype that torch can compare: float8 and the wide unsigned integers have no operators."""
    if values.dtype.is_complex:
        return values.to(torch.complex128)
    if values.dtype.is_floating_point:
        return values.to(torch.float64)
    return values if values.dtype in (torch.bool, torch.uint64) else values.to(torch.int64)
