"""What can be counted instead of timed: calls for each key, and bytes of buffers. The clock is in tests/benchmarks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from smartload import check, smart_load
from smartload.load import strict
from smartload.load.threads import Buffer


def experts(layers: int) -> nn.Module:
    return nn.ModuleList(nn.ModuleList(nn.Linear(2, 2) for _ in range(10)) for _ in range(layers))


def calls(work: Callable[[], object]) -> int:
    """How many functions, of Python and of C, a piece of work calls."""
    count = 0

    def seen(frame: Any, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


PREFIXES = {"equal names": ("", ""), "module.": ("module.", ""), "model.": ("model.", ""), "added": ("", "backbone")}


@pytest.mark.parametrize("case", PREFIXES)
def test_planning_takes_calls_in_proportion_to_the_keys(case: str) -> None:
    prefix, added = PREFIXES[case]

    def planned(layers: int) -> int:
        net = experts(layers)
        state = {prefix + key: value for key, value in net.state_dict().items()}
        model = nn.ModuleDict({added: net}) if added else net
        return calls(lambda: check(model, state))

    planned(1)
    small, large = planned(10), planned(80)
    assert large < 8.5 * small
    assert large < 150 * 80 * 20  # calls a key; a key has about forty in the most common case


@pytest.mark.parametrize("form", ["zip", "safetensors"])
def test_loading_takes_calls_in_proportion_to_the_keys(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strict, "MAX_FILTER_STEPS", 0)  # below it torch's own load is called, which is not linear

    def loaded(layers: int) -> int:
        model, path = experts(layers), tmp_path / f"{layers}.{form}"
        (torch.save if form == "zip" else save_file)(model.state_dict(), path)
        return calls(lambda: smart_load(model, path))

    loaded(1)
    small, large = loaded(10), loaded(80)
    assert large < 8.5 * small


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_buffer_is_larger_than_a_piece(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reading: Callable[..., None]
) -> None:
    """A model of many pieces goes straight into place, or, cast, through a buffer of one piece."""
    reading(piece=1 << 16)
    model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 256))
    wanted = {key: torch.randn_like(value).to(dtype) for key, value in model.state_dict().items()}
    torch.save(wanted, tmp_path / "w.pth")
    sizes: list[int] = []
    real = Buffer.take
    monkeypatch.setattr(Buffer, "take", lambda self, nbytes: (sizes.append(nbytes), real(self, nbytes))[1])
    smart_load(model, tmp_path / "w.pth")
    assert max(sizes, default=0) <= 1 << 16
    assert bool(sizes) is (dtype is torch.bfloat16)
    assert all(torch.equal(model.state_dict()[key], value.float()) for key, value in wanted.items())
