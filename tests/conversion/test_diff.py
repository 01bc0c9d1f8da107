"""How two checkpoints differ: in names, shapes, dtypes and values, whatever their formats."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dtypes import DTYPES
from formats import State, Written, again
from tagging import saved
from torch import nn

from smartload import AmbiguousKeysError, UnreadableError
from smartload.conversion import diff as diff_module
from smartload.conversion.diff import Change, diff

Save = Callable[[State], Written]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def one(a: Any, b: Any, name: str = "w") -> Change | None:
    """How far two tensors are apart."""
    found = diff({name: torch.as_tensor(a)}, {name: torch.as_tensor(b)}, values=True).values
    assert found is not None
    assert len(found) <= 1
    return found[0] if found else None


def test_any_two_formats_of_the_same_weights(checkpoint: Save) -> None:
    state = network().state_dict() | {"mask": torch.tensor([[True, False]])}
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    source = checkpoint(wrapped)
    found = diff(source, saved(state), values=True)
    assert found.same
    assert (found.a.rule, found.b.rule) == ("removed 'module.'", "")
    assert found.common == len(state)
    state["3.bias"] = state["3.bias"] + 1
    other = diff(saved(state), again(source), values=True)
    assert other.values is not None
    assert [change.name for change in other.values] == ["3.bias"]


def test_it_says_what_was_seen_through() -> None:
    state = network().state_dict()
    whole = {"epoch": 1, "net": nn.DataParallel(network()).state_dict()}
    assert str(diff(saved(whole), saved(state), values=True)) == (
        "A: the file object (torch zip): removed 'module.'; from 'net'\n"
        "B: the file object (torch zip)\n"
        "same: 9 names, equal in names, shapes, dtypes and values"
    )
    assert str(diff(saved(whole), saved(state))).endswith("\nsame: 9 names, equal in names, shapes, dtypes")


def test_everything_that_differs_is_said() -> None:
    a = {f"layers.{i}.w": torch.zeros(2, 3) for i in range(12)} | {"head.w": torch.zeros(3), "old": torch.ones(1)}
    b = {f"layers.{i}.w": torch.zeros(2, 3).half() for i in range(12)} | {
        "head.w": torch.zeros(4),
        "new": torch.ones(()),
    }
    b["layers.3.w"][0, 1] = 0.5
    b["layers.4.w"][0] = -2
    found = diff(a, b, values=True)
    assert str(found) == (
        "A: the dict in memory (memory)\n"
        "B: the dict in memory (memory)\n"
        "different:\n"
        "  only in A: old\n"
        "  only in B: new\n"
        "  shape:     head.w: [3] in A, [4] in B\n"
        "  dtype:     float32 in A, float16 in B: layers.{0...11}.w\n"
        "  value:     layers.4.w: 2 apart at most, 1 of the larger (3 of 6 elements)\n"
        "  value:     layers.3.w: 0.5 apart at most, 1 of the larger (1 of 6 elements)"
    )
    assert not found.same
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["shapes"] == {"head.w": ["[3]", "[4]"]}
    assert plain["dtypes"]["layers.0.w"] == ["float32", "float16"]
    assert plain["values"][1] == {
        "name": "layers.3.w",
        "absolute": 0.5,
        "relative": 1.0,
        "differing": 1,
        "elements": 6,
    }
    assert (plain["only_a"], plain["only_b"], plain["common"], plain["same"]) == (["old"], ["new"], 13, False)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"w": torch.ones(1)}, {}),
        ({}, {"w": torch.ones(1)}),
        ({"w": torch.ones(1)}, {"w": torch.ones(())}),
        ({"w": torch.ones(1)}, {"w": torch.ones(1).half()}),
        ({"w": torch.ones(1)}, {"w": torch.zeros(1)}),
        ({"w": torch.ones(1), "_extra_state": 1}, {"w": torch.ones(1), "_extra_state": 2}),
        ({"w": torch.ones(1), "_extra_state": 1}, {"w": torch.ones(1), "_extra_state": torch.ones(1)}),
    ],
)
def test_each_of_them_makes_a_difference(a: dict[str, Any], b: dict[str, Any]) -> None:
    keep = {"keep": torch.ones(1)}
    for values in (True, False):
        for first, second in ((a, b), (b, a)):
            found = diff(saved(keep | first), saved(keep | second), values=values)
            only_values = "w" in a and "w" in b and str(found).count("in A") == 0
            assert found.same == (only_values and not values)


def test_long_lists_are_cut() -> None:
    a = {f"{chr(97 + i)}.w": torch.zeros(2) for i in range(26)}
    b = {name: tensor + at for at, (name, tensor) in enumerate(a.items())}
    text = str(diff(a, b, values=True))
    assert "value:     z.w: 25 apart" in text
    assert "value:     ... (25 in all)" in text
    wide = {name: torch.zeros(3) for name in a}
    assert "shape:     ... (26 in all)" in str(diff(a, wide))


def test_a_file_cannot_write_lines() -> None:
    evil = "\x1b[31m\nsame: all"
    text = str(diff({evil: torch.ones(1)}, {evil: torch.zeros(1)}, values=True))
    assert all(line.isprintable() for line in text.split("\n"))
    assert "\nsame" not in text


# ---------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("a", "b", "apart"),
    [
        ([1.0, 2.0], [1.0, 2.5], (0.5, 0.2, 1)),
        ([1.0, -2.0], [1.0, 2.0], (4.0, 2.0, 1)),
        ([1e-3, 100.0], [2e-3, 101.0], (1.0, 0.5, 2)),
        ([math.nan, 1.0], [math.nan, 1.0], None),
        ([math.inf, -math.inf], [math.inf, -math.inf], None),
        ([math.nan, 1.0], [math.nan, 2.0], (1.0, 0.5, 1)),
        ([math.nan, 1.0], [1.0, 1.0], (math.inf, math.inf, 1)),
        ([math.inf], [-math.inf], (math.inf, math.inf, 1)),
        ([0.0], [-0.0], None),
        ([1, 2], [1, 4], (2.0, 0.5, 1)),
        ([True, False], [True, True], (1.0, 1.0, 1)),
        ([2**62 + 1], [2**62], (1.0, 2.0**-62, 1)),  # one and the same double
        ([1 + 1j], [1 - 1j], (2.0, math.sqrt(2), 1)),
        (1.0, 3.0, (2.0, 2 / 3, 1)),
    ],
)
def test_how_far_numbers_are_apart(a: Any, b: Any, apart: tuple[float, float, int] | None) -> None:
    dtype = torch.float64 if isinstance(a, float) or (isinstance(a, list) and isinstance(a[0], float)) else None
    first, second = torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype)
    for x, y in ((first, second), (second, first)):
        found = one(x, y)
        if apart is None:
            assert found is None
        else:
            assert found is not None
            assert (found.absolute, found.relative) == pytest.approx(apart[:2], rel=1e-6)
            assert (found.differing, found.elements) == (apart[2], first.numel())
    json.dumps(diff({"w": first}, {"w": second}, values=True).to_dict(), allow_nan=False)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "bool"])
def test_every_dtype_can_be_compared(dtype: str) -> None:
    first = torch.tensor([1.0, 2.0, 4.0]).to(getattr(torch, dtype))
    second = torch.tensor([1.0, 2.0, 8.0]).to(getattr(torch, dtype))
    found = one(first, second)
    assert found == Change("w", 4.0, 0.5, 1, 3)
    mixed = one(first, torch.tensor([1.0, 2.0, 8.0]))
    assert mixed == Change("w", 4.0, 0.5, 1, 3)


def test_large_tensors_are_compared_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diff_module, "_AT_ONCE", 7)
    first = torch.randn(10, 10).t()
    second = first.clone()
    second[9, 9] += 8
    second[0, 3] -= 4
    found = one(first, second)
    assert found is not None
    assert (found.absolute, found.differing, found.elements) == (pytest.approx(8.0), 2, 100)


def test_strides_make_no_difference(tmp_path: Path) -> None:
    value = torch.randn(5, 3)
    torch.save({"w": value.t().contiguous().t()}, tmp_path / "a.pth")
    assert diff(tmp_path / "a.pth", {"w": value}, values=True).same


# ------------------------------------------------------------------------------------------------------------ parts


def test_parts_are_taken_as_convert_takes_them() -> None:
    source = {"model": {"w": torch.ones(1)}, "ema": {"w": torch.zeros(1)}}
    with pytest.raises(AmbiguousKeysError, match="holds several state dicts"):
        diff(source, {"w": torch.ones(1)})
    assert diff(source, {"w": torch.ones(1)}, select_a="model", values=True).same
    assert diff({"w": torch.zeros(1)}, source, select_b="ema", values=True).same
    assert not diff(source, source, select_a="model", select_b="ema", values=True).same
    with pytest.raises(UnreadableError, match="w is a sparse tensor"):
        diff(saved({"w": torch.eye(2).to_sparse()}), source)
