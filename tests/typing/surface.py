"""What type checkers see of the public surface; read by mypy, never run."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from typing_extensions import assert_type

import smartload
from smartload import Checkpoint, KeyPlan, LoadReport, SmartLoadError, check, convert, inspect, smart_load, unwrap


def paths(model: nn.Module, file: io.BytesIO, state: Mapping[str, torch.Tensor]) -> None:
    assert_type(smart_load(model, "checkpoint.pth"), LoadReport)
    smart_load(model, Path("checkpoint.pth"))
    smart_load(model, file)
    smart_load(model, state)
    smart_load(model, {"epoch": 3, "model": state})
    assert_type(check(model, "checkpoint.pth"), KeyPlan)
    assert_type(inspect("checkpoint.pth"), Checkpoint)
    assert_type(inspect(state).to_dict(), dict[str, object])
    assert_type(convert("checkpoint.pth", "clean.safetensors", select="ema", dtype=torch.float16), Path)
    convert(state, Path("clean.pth"), rename={"head": "fc"}, dtype="bfloat16")
    convert("checkpoint.pth", 3)  # type: ignore[arg-type]
    smart_load(model, 3)  # type: ignore[arg-type]


def devices(model: nn.Module) -> None:
    smart_load(model, "checkpoint.pth", "cuda:1")
    smart_load(model, "checkpoint.pth", 1)
    smart_load(model, "checkpoint.pth", device=torch.device("cpu"))
    smart_load(model, "checkpoint.pth", device=[0, 1])
    smart_load(model, "checkpoint.pth", device=["cuda:0", "cuda:1"])
    smart_load(model, "checkpoint.pth", device=1.5)  # type: ignore[arg-type]


def options(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    smart_load(model, "checkpoint.pth", select="model_ema", rename={"head": "fc"})
    smart_load(model, "checkpoint.pth", rename=str.lower)
    smart_load(model, "checkpoint.pth", progress=True)
    smart_load(model, "checkpoint.pth", progress=lambda done, total: print(done / total))
    smart_load(model, "checkpoint.pth", progress="bar")  # type: ignore[arg-type]
    smart_load(model, "checkpoint.pth", allow_missing=["fc.*"], allow_unexpected=("head.*",))
    smart_load(model, "checkpoint.pth", optimizer=optimizer)
    smart_load(model, "checkpoint.pth", optimizer=[optimizer])
    smart_load(model, "checkpoint.pth", assign=True, undo=True, verify=True)


def results(report: LoadReport, plan: KeyPlan, error: SmartLoadError) -> None:
    missing, unexpected = report
    assert_type(missing, list[str])
    assert_type(report.unexpected_keys, list[str])
    assert_type(unexpected, list[str])
    assert_type(report.plan, KeyPlan)
    assert_type(plan.pairs, Mapping[str, str])
    assert_type(report.to_dict(), dict[str, object])


def version() -> None:
    assert_type(smartload.__version__, str)
    repr(smartload.smart_laod)  # type: ignore[attr-defined]


def networks(parallel: nn.DataParallel[nn.Linear]) -> None:
    assert_type(unwrap(parallel), nn.Module)
