"""Decide which casts are allowed: floats may change width, but no value may lose its fraction, imaginary part or size.

torch casts whatever it is given: 2.87 becomes 2 in an integer buffer, 1e6 becomes infinite in float16, and a complex
value loses its imaginary part, all in silence. `verdict` decides by the dtypes where it can; only where the
values decide does `first_loss` look at them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from smartload.place.memory import dtype_name


class _Float(NamedTuple):
    """What a float dtype can hold.

    Attributes:
        exponent: of two, in its largest value.
        mantissa: bits behind the leading one.
        infinity: whether it has one; those without turn it into NaN or their largest value.
        signed: whether it has negative values, and zero.
    """

    exponent: int
    mantissa: int
    infinity: bool = True
    signed: bool = True


# A table, because torch.finfo does not say whether a dtype has an infinity. By name, because this torch may lack some.
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
# Complex dtypes, and the float dtype of their two components.
_COMPONENT = {"complex32": "float16", "bcomplex32": "bfloat16", "complex64": "float32", "complex128": "float64"}


def verdict(source: str, target: str) -> str:
    """Tell whether a cast is allowed, by the names of the two dtypes.

    Returns:
        "free": no value can be lost. "check": that depends on the values; see `first_loss`. "never": refused whatever
        the values are, as complex into real.

    >>> verdict("float16", "float32"), verdict("float32", "float16"), verdict("complex64", "float32")
    ('free', 'check', 'never')
    """
    if source == target:
        return "free"
    if source in _COMPONENT and target not in _COMPONENT:
        return "never"
    source, target = _COMPONENT.get(source, source), _COMPONENT.get(target, target)
    if source in _FLOATS and target in _FLOATS:
        return "free" if source == target or _covers(_FLOATS[target], _FLOATS[source]) else "check"
    # 0 and 1 can be held by every dtype but the one that has no zero.
    return "free" if source == "bool" and target != "float8_e8m0fnu" else "check"


def _covers(target: _Float, source: _Float) -> bool:
    """Tell whether every value of the source stays finite, infinite and of its sign; digits may be lost."""
    # With equal exponents a value of the longer mantissa may round up past the largest value of the shorter one.
    range_covered = target.exponent > source.exponent or (
        target.exponent == source.exponent and target.mantissa >= source.mantissa
    )
    return range_covered and target.infinity >= source.infinity and target.signed >= source.signed


def first_loss(values: torch.Tensor, target: torch.dtype) -> object:
    """Find the first value that the target dtype cannot hold; None where it can hold all."""
    if _is_float_or_complex(values.dtype) and _is_float_or_complex(target):
        lost = _lost_floats(values, target)
    elif _is_float_or_complex(values.dtype) or _is_float_or_complex(target) or torch.bool in (values.dtype, target):
        # Between kinds of numbers each value must survive the cast there and back: a fraction, a large integer in a
        # short mantissa and a 2 as bool do not.
        lost = _comparable(values.to(target).to(values.dtype)) != _comparable(values)
    else:
        lost = _lost_integers(values, target)
    if not bool(lost.any()):
        return None
    first = values.flatten()[int(lost.flatten().nonzero()[0])]  # by its index: torch before 2.10 has no mask for uint64
    loss: object = (first if first.dtype is torch.uint64 else _comparable(first)).item()
    return loss


def _is_float_or_complex(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _lost_floats(values: torch.Tensor, target: torch.dtype) -> torch.Tensor:
    """Mark the floats that would lose their size, infinity or sign; they may lose digits, and become zero."""
    if values.is_complex():
        target = getattr(torch, _COMPONENT[dtype_name(target)])
        return _lost_floats(torch.view_as_real(_comparable(values)), target).any(-1)
    if target.is_complex:
        target = getattr(torch, _COMPONENT[dtype_name(target)])
    source, cast = _comparable(values), _comparable(values.to(target))
    largest = torch.finfo(target)
    # Half the distance between the two largest values: what is that much larger still rounds down to the largest.
    half_a_step = largest.eps * 2.0 ** (_FLOATS[dtype_name(target)].exponent - 1)
    # By size as well, because float8 dtypes without infinity may saturate: a value far too large comes back finite.
    lost = source.isfinite() & (~cast.isfinite() | (source.abs() > largest.max + half_a_step))
    lost |= source.isinf() & ~cast.isinf()
    # The dtype without sign and zero: torch's cast makes positive numbers of zero and of negative numbers.
    return lost | (cast > 0) & (source <= 0) if dtype_name(target) == "float8_e8m0fnu" else lost


def _lost_integers(values: torch.Tensor, target: torch.dtype) -> torch.Tensor:
    """Mark the integers outside of the target's range.

    A cast there and back proves nothing here: integers wrap around, and back again.
    """
    low, high = torch.iinfo(target).min, torch.iinfo(target).max
    if values.dtype is torch.uint64:  # torch cannot order it; beyond int64 its bits are negative there
        signed = values.view(torch.int64)
        return (signed < 0) & (high < 2**64 - 1) | (signed > min(high, 2**63 - 1))
    source = values.to(torch.int64)
    return (source < low) | (source > min(high, 2**63 - 1))  # uint64's own limit is no int64 to compare with


def _comparable(values: torch.Tensor) -> torch.Tensor:
    """Convert to a dtype that torch can compare, without loss: float8 and uint16 to uint64 have few operators.

    Of uint64 the bits are given, as int64: they tell whether two are equal, not which is larger.
    """
    if values.dtype.is_complex:
        return values.to(torch.complex128)
    if values.dtype.is_floating_point:
        return values.to(torch.float64)
    if values.dtype is torch.uint64:
        return values.view(torch.int64)
    return values if values.dtype is torch.bool else values.to(torch.int64)
