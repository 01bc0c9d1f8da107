"""Which casts keep what a tensor means: floats may change width, nothing may lose its fraction, part or finiteness."""

from __future__ import annotations

from typing import NamedTuple

import torch


class _Float(NamedTuple):
    """What a float dtype can hold: the largest exponent of two, bits of mantissa, infinity, negative values."""

    exponent: int
    mantissa: int
    infinity: bool = True
    signed: bool = True


_FLOATS = {
    "float8_e4m3fn": _Float(8, 3, infinity=False),
    "float8_e4m3fnuz": _Float(7, 3, infinity=False),
    "float8_e5m2": _Float(15, 2),
    "float8_e5m2fnuz": _Float(15, 2, infinity=False),
    "float8_e8m0fnu": _Float(127, 0, infinity=False, signed=False),
    "float16": _Float(15, 10),
    "bfloat16": _Float(127, 7),
    "float32": _Float(127, 23),
    "float64": _Float(1023, 52),
}
_PART = {"complex32": "float16", "complex64": "float32", "complex128": "float64"}


def verdict(source: str, target: str) -> str:
    """What a cast may lose: nothing ("free"), perhaps a value ("check"), or what kind of number it is ("never")."""
    if source == target:
        return "free"
    if source in _PART and target not in _PART:
        return "never"
    low, high = _PART.get(source, source), _PART.get(target, target)
    if low in _FLOATS and high in _FLOATS:
        return "free" if low == high or _holds(_FLOATS[high], _FLOATS[low]) else "check"
    return "free" if low == "bool" and high != "float8_e8m0fnu" else "check"


def _holds(high: _Float, low: _Float) -> bool:
    # With equal exponents the longer mantissa would round up past the largest value of the shorter one.
    reach = high.exponent > low.exponent or (high.exponent == low.exponent and high.mantissa >= low.mantissa)
    return reach and high.infinity >= low.infinity and high.signed >= low.signed


def first_loss(values: torch.Tensor, target: torch.dtype) -> object:
    """The first value that the target dtype cannot hold; None where all can be held."""
    if _is_wide(values.dtype) and _is_wide(target):
        lost = _beyond(values, target)
    elif _is_wide(values.dtype) or _is_wide(target) or torch.bool in (values.dtype, target):
        lost = _comparable(values.to(target).to(values.dtype)) != _comparable(values)  # must come back as it was
    else:
        lost = _outside(values, target)
    if not bool(lost.any()):
        return None
    loss: object = _comparable(values)[lost].flatten()[0].item()
    return loss


def _is_wide(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _beyond(values: torch.Tensor, target: torch.dtype) -> torch.Tensor:
    """Where a float cannot keep its size, its infinity or its sign; it may lose digits, and become a zero."""
    if values.is_complex():
        target = getattr(torch, _PART[str(target)[6:]])
        return _beyond(torch.view_as_real(_comparable(values)), target).any(-1)
    if target.is_complex:
        target = getattr(torch, _PART[str(target)[6:]])
    source, cast = _comparable(values), _comparable(values.to(target))
    largest = torch.finfo(target)
    half_a_step = largest.eps * 2.0 ** (_FLOATS[str(target)[6:]].exponent - 1)
    # float8_e4m3fn saturates: a value far beyond its largest comes back finite.
    lost = source.isfinite() & (~cast.isfinite() | (source.abs() > largest.max + half_a_step))
    lost |= source.isinf() & ~cast.isinf()
    return lost | (cast > 0) & (source <= 0) if target is torch.float8_e8m0fnu else lost


def _outside(values: torch.Tensor, target: torch.dtype) -> torch.Tensor:
    """Where an integer is not in the target's range; it would wrap around, and back again."""
    low, high = torch.iinfo(target).min, torch.iinfo(target).max
    if values.dtype is torch.uint64:  # torch cannot order it; beyond int64 its bits are negative there
        signed = values.view(torch.int64)
        return (signed < 0) & (high < 2**64 - 1) | (signed > min(high, 2**63 - 1))
    source = values.to(torch.int64)
    return (source < low) | (source > min(high, 2**63 - 1))


def _comparable(values: torch.Tensor) -> torch.Tensor:
    """The values in a dtype that torch can compare: float8 and the wide unsigned integers have no operators."""
    if values.dtype.is_complex:
        return values.to(torch.complex128)
    if values.dtype.is_floating_point:
        return values.to(torch.float64)
    return values if values.dtype in (torch.bool, torch.uint64) else values.to(torch.int64)
