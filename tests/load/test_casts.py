"""Casts: the verdict by kind against brute force over values, and what the values themselves decide."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from dtypes import DTYPES, dtype
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from smartload import CastError, smart_load
from smartload.load.casts import first_loss, verdict
from smartload.records.entries import ITEMSIZE

pytestmark = pytest.mark.filterwarnings("ignore:B?Complex(Half|32) support")  # torch says so at the first of them

FLOATS = [name for name in DTYPES if name.startswith(("float", "bfloat"))]
COMPLEX = [name for name in DTYPES if "complex" in name]
COMPONENTS = {"complex32": "float16", "bcomplex32": "bfloat16", "complex64": "float32", "complex128": "float64"}
INTEGERS = [name for name in DTYPES if name.startswith(("int", "uint", "bool"))]


def every_value(name: str) -> torch.Tensor:
    """All values of the small dtypes; the edges and a sample of the wide ones."""
    kind = dtype(name)
    if name == "bool":
        return torch.tensor([False, True])
    if ITEMSIZE[name] == 1:
        return torch.arange(256, dtype=torch.uint8).view(kind)
    if ITEMSIZE[name] == 2:
        return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(kind)
    if name in COMPLEX:
        part = every_value(COMPONENTS[name])
        return torch.stack([part, part.flip(0)], -1).view(kind).flatten()
    if name in INTEGERS:
        info = torch.iinfo(kind)
        edges = [info.min, info.min + 1, 0, 1, 255, 256, 2**24 + 1, info.max - 1, info.max]
        return torch.tensor(edges, dtype=kind)
    info = torch.finfo(kind)
    edges = [0.0, -0.0, 1.5, -1.0, info.max, info.min, info.tiny, 65504.0, 65519.0, 65520.0, 1e6, 448.0, 3e38]
    return torch.tensor([*edges, math.inf, -math.inf, math.nan], dtype=kind)


def is_lost(value: complex, back: complex, target: str) -> bool:
    """The rule, spelt out number by number: size, infinity and sign stay; digits may go, and small ones become zero."""
    if isinstance(value, complex) or isinstance(back, complex):
        one, other = complex(value), complex(back)
        return is_lost(one.real, other.real, target) or is_lost(one.imag, other.imag, target)
    if math.isnan(value):
        return False
    if math.isinf(value):
        return value != back
    saturated = target == "float8_e4m3fn" and abs(value) > 464
    return not math.isfinite(back) or saturated or (target == "float8_e8m0fnu" and value <= 0)


@pytest.mark.parametrize("source", [*FLOATS, *COMPLEX])
@pytest.mark.parametrize("target", [*FLOATS, *COMPLEX])
def test_floats_by_brute_force(source: str, target: str) -> None:
    if (source in COMPLEX) > (target in COMPLEX):
        assert verdict(source, target) == "never"
        return
    values = every_value(source)
    wide = torch.complex128 if source in COMPLEX else torch.float64
    back = values.to(dtype(target)).to(torch.complex128 if target in COMPLEX else torch.float64)
    pairs = list(zip(values.to(wide).tolist(), back.tolist()))
    lossy = [(value, there) for value, there in pairs if is_lost(value, there, target)]
    if source != target:
        if verdict(source, target) == "free":
            assert not lossy
        assert verdict(source, target) in ("free", "check")
        for value, there in pairs if len(pairs) <= 300 else pairs[::97]:
            one = torch.tensor([value], dtype=wide).to(dtype(source))
            assert (first_loss(one, dtype(target)) is not None) == is_lost(value, there, target), (value, there)
    assert (first_loss(values, dtype(target)) is not None) == bool(lossy)


@pytest.mark.parametrize("source", [*INTEGERS, *FLOATS])
@pytest.mark.parametrize("target", [*INTEGERS, *FLOATS])
def test_integers_by_brute_force(source: str, target: str) -> None:
    if source not in INTEGERS and target not in INTEGERS:
        return
    values = every_value(source)
    there = values.to(dtype(target)).tolist()
    lossy = [a for a, b in zip(values.tolist(), there) if a != b]  # Python compares numbers exactly
    if verdict(source, target) == "free":
        assert not lossy
    assert verdict(source, target) != "never"
    assert (first_loss(values, dtype(target)) is not None) == bool(lossy)


@pytest.mark.parametrize(
    ("source", "target", "free"),
    [
        ("float16", "float32", True),
        ("bfloat16", "float32", True),
        ("float32", "bfloat16", False),  # the largest float32 rounds up to infinity
        ("float16", "bfloat16", True),
        ("bfloat16", "float16", False),
        ("float16", "float8_e5m2", False),
        ("float8_e5m2", "float16", True),
        ("float8_e5m2", "float8_e5m2fnuz", False),  # no infinity there
        ("float16", "float8_e8m0fnu", False),  # no sign there
        ("float8_e8m0fnu", "bfloat16", True),
        ("float32", "complex64", True),
        ("float64", "complex64", False),
        ("complex64", "complex128", True),
        ("bool", "float16", True),
        ("bool", "float8_e8m0fnu", False),  # no zero there
        ("int8", "int16", False),
    ],
)
def test_the_verdict_looks_at_values_only_where_it_must(source: str, target: str, free: bool) -> None:
    assert verdict(source, target) == ("free" if free else "check")


class One(nn.Module):
    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("v", value)


REFUSED = {
    "a fraction into an integer": ([2.0, 2.87], "float32", "int64", "2.86"),
    "not a number into an integer": ([math.nan], "float32", "int32", "nan"),
    "a million into half": ([1.0, 1e6], "float32", "float16", "1000000.0"),
    "complex into real": ([1 + 2j], "complex64", "float32", "imaginary"),
    "1e300 into float32": ([1e300], "float64", "float32", "1e+300"),
    "beyond int32": ([2**31], "int64", "int32", "2147483648"),
    "beyond int64": ([1, 2**64 - 1], "uint64", "int64", "18446744073709551615"),
    "beyond uint8": ([1, 256], "uint16", "uint8", "256"),
    "beyond int8": ([-129], "int16", "int8", "-129"),
    "negative into unsigned": ([-1], "int8", "uint8", "-1"),
    "two into bool": ([2], "uint8", "bool", "2"),
    "500 into float8_e4m3fn": ([500.0], "float32", "float8_e4m3fn", "500.0"),
    "infinity into float8_e4m3fn": ([math.inf], "float32", "float8_e4m3fn", "inf"),
    "70000 into float8_e5m2": ([70000.0], "float32", "float8_e5m2", "70000.0"),
    "an integer that float32 rounds": ([2**24 + 1], "int32", "float32", "16777217"),
    "a complex part into a smaller one": ([1e300 + 1j], "complex128", "complex64", "1e+300"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("road", ["file", "memory", "strided"])
def test_refusals_end_to_end(name: str, road: str, tmp_path: Path) -> None:
    numbers, source, target, text = REFUSED[name]
    value = torch.tensor(numbers, dtype=dtype(source))
    if road == "strided":
        value = torch.stack([value, value], 1)[:, 0]
    model = One(torch.ones(len(numbers)).to(dtype(target)))
    before = model.v.clone()
    state: object = {"v": value}
    if road == "file":
        torch.save(state, tmp_path / "w.pt")
        state = tmp_path / "w.pt"
    with pytest.raises(CastError, match=text.replace("+", r"\+")) as caught:
        smart_load(model, state)  # type: ignore[arg-type]
    assert "v is " in str(caught.value)
    assert torch.equal(model.v.view(torch.uint8), before.view(torch.uint8))


ACCEPTED = {
    "whole floats into an integer": ([2.0, -3.0], "float32", "int64"),
    "float32 into half": ([65504.0, 1e-9], "float32", "float16"),
    "infinity and nan stay": ([math.inf, -math.inf, math.nan], "float32", "float16"),
    "464 rounds down to the largest": ([464.0, -448.0], "float32", "float8_e4m3fn"),
    "real into complex": ([1.5], "float32", "complex64"),
    "zero and one into bool": ([0, 1], "uint8", "bool"),
    "bool into a float": ([True, False], "bool", "float32"),
    "small integers": ([127, -128], "int64", "int8"),
    "wide unsigned": ([65535], "uint16", "uint32"),
}


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("from_file", [True, False])
def test_what_is_held_is_cast_as_torch_does(name: str, from_file: bool, tmp_path: Path) -> None:
    numbers, source, target = ACCEPTED[name]
    value = torch.tensor(numbers, dtype=dtype(source))
    model, plain = (One(torch.zeros(len(numbers)).to(dtype(target))) for _ in range(2))
    plain.load_state_dict({"v": value})
    torch.save({"v": value}, tmp_path / "w.pt")
    report = smart_load(model, tmp_path / "w.pt" if from_file else {"v": value})
    assert torch.equal(model.v.view(torch.uint8), plain.v.view(torch.uint8))
    assert [(cast.source, cast.target) for cast in report.casts] == [(source, target)]


def test_assign_takes_the_dtype_of_the_file() -> None:
    model = One(torch.zeros(2, dtype=torch.int64))
    smart_load(model, {"v": torch.tensor([0.5, 1.5])}, assign=True)
    assert model.v.dtype is torch.float32


class OldTorch(TorchDispatchMode):
    """Refuses what torch 2.6 has no kernel for: with uint64 it copies, converts and makes views, and little else."""

    has = ("aten.view", "aten._to_copy", "aten.select", "aten._local_scalar_dense", "aten._unsafe_view", "aten.alias")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(each, torch.Tensor) and each.dtype is torch.uint64 for each in args):
            assert str(func).startswith(self.has), f"{func} is not implemented for uint64"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("values", "source", "target", "loss"),
    [
        ([1, 2**64 - 1], "uint64", "int64", 2**64 - 1),
        ([1, 2**53 + 1], "uint64", "float64", 2**53 + 1),
        ([1, 2], "uint64", "bool", 2),
        ([1.0, 0.5], "float32", "uint64", 0.5),
        ([1, -3], "int64", "uint64", -3),
        ([0, 2**60], "uint64", "float32", None),
    ],
)
def test_uint64_is_checked_with_what_every_torch_can_do_with_it(
    values: list[float], source: str, target: str, loss: object
) -> None:
    given = torch.tensor(values, dtype=dtype(source))
    with OldTorch():
        assert first_loss(given, dtype(target)) == loss
