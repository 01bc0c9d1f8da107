"""Whole modules: what is read without their classes equals what their `state_dict()` gives (section 5)."""

from __future__ import annotations

import collections
import copy
import dataclasses
import datetime
import decimal
import enum
import functools
import pathlib
import sys
import types
import uuid
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reading_tools import (
    LEGACY,
    TWO_FLOATS,
    assert_same,
    checkpoint_of,
    floats,
    opened,
    read,
    rebuilt,
    saved,
    tensors_in,
    text,
)
from torch import nn

from smartload.errors import UnreadableError
from smartload.records.entries import Opaque


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Config:
    width: int = 3


class Slots:
    __slots__ = ("a",)

    def __init__(self) -> None:
        self.a = 1


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.skip = None
        self.short = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Identity())


class Odd(nn.Module):
    """Attributes of many types beside the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.values = [
            Config(),
            Colour.RED,
            pathlib.PurePosixPath("/x"),
            datetime.datetime(2020, 1, 1),
            decimal.Decimal("1.5"),
            collections.deque([1]),
            collections.defaultdict(list),
            Slots(),
            uuid.UUID(int=3),
            2**100,
            {1, 2},
            frozenset({3}),
            b"bytes",
            bytearray(b"x"),
            1j,
            range(3),
            slice(1),
            types.SimpleNamespace(a=1),
            torch.float16,
            torch.device("cpu"),
            torch.Size([1]),
            len,
            functools.partial(max, 1),
            collections.Counter("ab"),
            ...,
            torch.ones(2).numpy(),
        ]
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("none", None)
        self.register_buffer("passing", torch.ones(3), persistent=False)
        self.register_parameter("nothing", None)
        self.plain = torch.ones(5)


def shared() -> nn.Module:
    inner = nn.Linear(2, 2)
    return nn.Sequential(inner, nn.ReLU(), inner)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    model[1].weight = model[0].weight
    return model


def tagged() -> nn.Module:
    model = nn.Linear(2, 2)
    model.weight.note = "seen"  # type: ignore[attr-defined]
    return model


def hooked() -> nn.Module:
    model = nn.Linear(2, 2)
    model.register_forward_hook(functools.partial(print, "x"))
    return model


def pruned() -> nn.Module:
    from torch.nn.utils import prune

    model = nn.Linear(4, 4)
    prune.l1_unstructured(model, "weight", amount=0.5)
    return model


def old_spectral() -> nn.Module:
    return nn.utils.spectral_norm(nn.Linear(4, 4))


def compiled() -> nn.Module:
    return torch.compile(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), backend="eager")  # type: ignore[return-value]


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 2),
    "sequential": lambda: nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1)),
    "blocks": lambda: nn.Sequential(Block(), Block()),
    "batch norm": lambda: nn.Sequential(nn.BatchNorm1d(3), nn.SyncBatchNorm(3), nn.BatchNorm2d(2, affine=False)),
    "lstm": lambda: nn.LSTM(2, 3, num_layers=2, bidirectional=True),
    "gru": lambda: nn.GRU(2, 3),
    "projection": lambda: nn.LSTM(4, 3, proj_size=2),
    "attention": lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=3),
    "transformer": lambda: nn.Transformer(4, 2, 1, 1, 8),
    "embedding bag": lambda: nn.EmbeddingBag(4, 3),
    "data parallel": lambda: nn.DataParallel(nn.Linear(2, 2)),
    "data parallel twice": lambda: nn.DataParallel(nn.DataParallel(nn.Linear(2, 2))),
    "tied": tied,
    "shared": shared,
    "lists": lambda: nn.ModuleDict({"a": nn.ModuleList([nn.Linear(1, 1)]), "p": nn.ParameterList([torch.ones(2)])}),
    "parameter dict": lambda: nn.ParameterDict({"a": torch.ones(2), "b": torch.ones(3)}),
    "old weight norm": lambda: nn.utils.weight_norm(nn.Linear(2, 2)),
    "old spectral norm": old_spectral,
    "pruned": pruned,
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2)),
    "adaptive": lambda: nn.AdaptiveLogSoftmaxWithLoss(8, 10, [4]),
    "half": lambda: nn.Conv2d(3, 4, 3).half().to(memory_format=torch.channels_last),
    "hooked": hooked,
    "odd": Odd,
    "nn.Buffer": lambda: _with_buffer(),
    "tagged": tagged,
    "compiled": compiled,
    "compiled inside": lambda: nn.Sequential(compiled(), nn.Linear(1, 1)),
    "parallel around compiled": lambda: nn.DataParallel(compiled()),
    "traced": lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))),
    "empty": nn.ReLU,
    "complex": lambda: nn.Linear(2, 2, dtype=torch.complex64),
}


def _with_buffer() -> nn.Module:
    model = nn.Linear(1, 1)
    model.extra = nn.Buffer(torch.arange(3))
    model.gone = nn.Buffer(torch.arange(4), persistent=False)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "form", [{}, LEGACY, {"pickle_protocol": 4}, {"pickle_protocol": 5, **LEGACY}], ids=["2", "old2", "4", "old5"]
)
@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_its_state_dict(name: str, form: dict[str, Any]) -> None:
    if name == "compiled" or name == "parallel around compiled" or name == "compiled inside":
        torch._dynamo.reset()
    model = MODULES[name]()
    with opened(saved(model, **form)) as checkpoint:
        assert list(checkpoint.parts) == [""]
        part = checkpoint.parts[""]
        assert_same(tensors_in(checkpoint, part), model.state_dict())
        assert list(part.entries) == list(model.state_dict())
        assert part.kind.startswith("module ")


@pytest.mark.filterwarnings("ignore")
def test_the_class_need_not_exist() -> None:
    module = types.ModuleType("gone_models")
    exec(
        "import torch.nn as nn\nclass Net(nn.Module):\n def __init__(s):\n  super().__init__(); s.fc = nn.Linear(2, 1)",
        module.__dict__,
    )
    sys.modules["gone_models"] = module
    model = module.Net()
    try:
        files = [saved({"model": model, "epoch": 3}), saved({"model": model}, **LEGACY)]
    finally:
        del sys.modules["gone_models"]
    for data in files:
        with opened(data) as checkpoint:
            assert checkpoint.parts["model"].kind == "module gone_models.Net"
            assert_same(tensors_in(checkpoint, checkpoint.parts["model"]), model.state_dict())
    assert "gone_models" not in sys.modules


def test_tensors_that_no_name_leads_to_are_counted() -> None:
    aside = read(saved(Odd())).aside
    assert [(thing.path, thing.tensors) for thing in aside] == [("", 2)]  # a non-persistent buffer, a plain attribute


def test_a_module_beside_tensors_is_a_part_of_its_own() -> None:
    parts = read(saved({"mean": torch.ones(1), "net": nn.Linear(1, 1)})).parts
    assert {path: list(part.entries) for path, part in parts.items()} == {"": ["mean"], "net": ["weight", "bias"]}


def test_a_child_that_is_no_module_is_named() -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    model._modules["1"] = Config()  # type: ignore[assignment]
    entries = read(saved(model)).parts[""].entries
    assert entries["1"] == Opaque(f"a {Config.__module__}.Config")


def test_a_module_that_contains_itself_is_refused() -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    model._modules["self"] = model
    with pytest.raises(UnreadableError, match="contains itself"):
        read(saved(model))


def test_sixty_doublings_stop_early() -> None:
    model: nn.Module = nn.Linear(1, 1)
    for _ in range(60):
        outer = nn.Sequential()
        outer._modules = {"a": model, "b": model}
        model = outer
    with pytest.raises(UnreadableError, match="names"):
        read(saved(model))


def deep(depth: int) -> bytes:
    """A linear layer in as many modules, one in the other. Python does not save so many on every system."""
    parameters = b"}(" + text("_parameters")
    modules = text("_buffers") + b"}" + text("_modules") + b"}"
    linear = b"ctorch.nn.modules.linear\nLinear\n)\x81" + parameters + b"}" + text("weight") + rebuilt(floats()) + b"s"
    outer = b"ctorch.nn.modules.container\nSequential\n)\x81" + parameters + b"}" + modules + text("0")
    pickle = outer * depth + linear + modules + b"ub" + b"sub" * depth
    return checkpoint_of(b"\x80\x02" + pickle + b".", d0=TWO_FLOATS)


def test_a_deep_module_is_read_up_to_where_torch_gives_up() -> None:
    assert list(read(deep(800)).parts[""].entries) == ["0." * 800 + "weight"]
    with pytest.raises(UnreadableError, match="deeper"):
        read(deep(1000))


def test_nothing_is_shared_between_two_readings() -> None:
    data = saved(copy.deepcopy(nn.Linear(1, 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(data).parts == read(data).parts
