"""Inputs that are rare and legal, or rare and wrong: each once went astray."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from smartload import (
    AmbiguousKeysError,
    KeyMismatchError,
    ModelCodeError,
    SmartLoadError,
    check,
    convert,
    inspect,
    smart_load,
)


def linear() -> nn.Linear:
    return nn.Linear(2, 2)


@pytest.mark.parametrize("order", [("ema", "model"), ("model", "ema")])
def test_the_models_own_live_tensors_are_no_reason_to_prefer_a_part(order: tuple[str, str]) -> None:
    model = linear()
    state = model.state_dict()
    parts = {"model": state, "ema": {key: value + 1 for key, value in state.items()}}
    with pytest.raises(AmbiguousKeysError, match="select='ema'"):
        smart_load(model, {name: parts[name] for name in order})


class Migrating(nn.Module):
    """A module whose weights were ten times smaller in its first version."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Mapping[str, Any], *rest: Any) -> None:
        if metadata.get("version", 1) < 2:
            state[prefix + "w"] = state[prefix + "w"] * 10
        super()._load_from_state_dict(state, prefix, metadata, *rest)


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, lambda m: {"model": m}])
@pytest.mark.parametrize("zip_file", [True, False])
def test_a_pickled_module_is_of_its_classes_present_version(wrap: Any, zip_file: bool, tmp_path: Path) -> None:
    torch.save(wrap(Migrating()), tmp_path / "m.pt", _use_new_zipfile_serialization=zip_file)
    model = Migrating()
    smart_load(model, tmp_path / "m.pt")
    assert model.w.item() == 1
    torch.save({"w": torch.ones(1)}, tmp_path / "old.pt")  # a state dict without versions is of the first
    smart_load(model, tmp_path / "old.pt")
    assert model.w.item() == 10


class Refusing(nn.Linear):
    def get_extra_state(self) -> int:
        return 1

    def set_extra_state(self, state: object) -> None:
        raise ValueError("not this one")


def test_a_failure_beside_a_lazy_layer_is_undone() -> None:
    model = nn.Sequential(nn.LazyLinear(2), Refusing(2, 2))
    before = model[1].weight.clone()
    with pytest.raises(ModelCodeError, match="not this one"):
        smart_load(model, nn.Sequential(nn.LazyLinear(2), Refusing(2, 2)).state_dict())
    assert torch.equal(model[1].weight, before)
    assert isinstance(model[0].weight, nn.UninitializedParameter)


def test_lazy_state_assigned_is_a_typed_refusal() -> None:
    with pytest.raises(SmartLoadError):
        smart_load(nn.LazyBatchNorm1d(), nn.LazyBatchNorm1d().state_dict(), assign=True)


def test_memory_freed_by_a_hook_comes_back() -> None:
    model = linear()
    before = model.weight.clone()

    def hook(module: nn.Module, _: object) -> None:
        module.weight.untyped_storage().resize_(0)  # type: ignore[union-attr, operator]
        raise RuntimeError("freed")

    model.register_load_state_dict_post_hook(hook)
    with pytest.raises(ModelCodeError, match="freed"):
        smart_load(model, linear().state_dict())
    assert torch.equal(model.weight, before)


def test_equal_parts_in_memory_are_compared_in_linear_time() -> None:
    model = nn.ModuleList(linear() for _ in range(1000))
    state = model.state_dict()
    start = time.process_time()
    assert check(model, {"a": state, "b": {key: value.clone() for key, value in state.items()}}).part == "a"
    assert time.process_time() - start < 5  # 0.2 s; once 30


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_values_that_are_no_tensors_where_the_model_has_such() -> None:
    def quantized() -> nn.Module:
        net = nn.Sequential(nn.Linear(4, 4))
        made: nn.Module = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
        return made

    one, other = quantized(), quantized()
    smart_load(one, other.state_dict())
    x = torch.randn(3, 4)
    assert torch.equal(one(x), other(x))


def test_tied_names_stay_tied_when_assigned_from_memory_to_meta() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    smart_load(model, {"0.weight": torch.ones(2, 2)}, device="cpu", assign=True)
    assert model[1].weight is model[0].weight


def test_a_hint_is_not_given_where_the_value_is_no_tensor() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.ones(2))

    inner = {"state_dict": {"x": torch.ones(2), "y": torch.ones(2)}}
    with pytest.raises(KeyMismatchError) as caught:
        smart_load(One(), {"x": inner, "w": torch.ones(3)})
    assert "write" not in str(caught.value)


def test_select_names_the_prefixes_that_could_be_meant() -> None:
    state = linear().state_dict()
    flat = {f"{who}.{key}": value for who in ("student", "teacher") for key, value in state.items()}
    with pytest.raises(KeyMismatchError, match=r"It holds: state_dict, state_dict\.student, state_dict\.teacher\."):
        smart_load(linear(), {"state_dict": flat}, select="student")
    with pytest.raises(KeyMismatchError, match="no part in it that could be selected"):
        smart_load(linear(), state, select="model")


@pytest.mark.parametrize("rename", [3, {"a": 1}, [("a", "b")]])
def test_a_rename_of_another_kind_is_a_type_error(rename: Any) -> None:
    with pytest.raises(TypeError, match="rename must map key prefixes to key prefixes, or be a function of a key"):
        smart_load(linear(), linear().state_dict(), rename=rename)


@pytest.mark.parametrize("undo", ["x", None])
def test_undo_is_one_of_three(undo: Any) -> None:
    with pytest.raises(ValueError, match="undo must be True, False or 'auto'"):
        smart_load(linear(), linear().state_dict(), undo=undo)


def test_the_part_that_is_taken_is_not_called_ignored() -> None:
    optimizer = torch.optim.SGD(linear().parameters()).state_dict()
    report = smart_load(
        linear(), {"model": linear().state_dict(), "optimizer": optimizer, "rng": torch.get_rng_state()}
    )
    assert [item.key for item in report.plan.ignored] == ["rng"]
    assert [item.path for item in report.aside] == ["optimizer"]


CLASH = {"m.w": torch.ones(1), "m": {"w": torch.full((1,), 2.0)}}


@pytest.mark.parametrize("select", [None, "", "m"])
@pytest.mark.parametrize("from_file", [False, True])
def test_two_dicts_that_give_one_dotted_name_are_refused(select: str | None, from_file: bool, tmp_path: Path) -> None:
    """A key with a dot in it beside a dict of that name: which of the two tensors is "m.w" nobody can say."""
    torch.save(CLASH, tmp_path / "twice.pt")
    model = nn.ModuleDict({"m": nn.ParameterDict({"w": torch.zeros(1)})})
    assert list(model.state_dict()) == ["m.w"]
    with pytest.raises(AmbiguousKeysError, match=r"'m\.w' is ambiguous|m\.w and m\.w would get the same name"):
        smart_load(model, tmp_path / "twice.pt" if from_file else CLASH, select=select)
    assert model["m"]["w"].item() == 0.0


def test_a_dotted_name_of_two_tensors_is_in_nobodys_way_where_it_is_not_wanted(tmp_path: Path) -> None:
    torch.save({"model": {"weight": torch.ones(1, 2), "bias": torch.ones(1)}, **CLASH}, tmp_path / "beside.pt")
    for select in (None, "model"):
        model = nn.Linear(2, 1)
        assert smart_load(model, tmp_path / "beside.pt", select=select).plan.part == "model"
        assert model.bias.item() == 1.0
    assert set(inspect(tmp_path / "beside.pt").parts) == {"", "model", "m"}
    convert(tmp_path / "beside.pt", tmp_path / "x.pth", select="model")
    with pytest.raises(AmbiguousKeysError, match="ambiguous"):
        convert(tmp_path / "beside.pt", tmp_path / "x.pth", select="")


def test_a_misspelt_select_lists_each_part_once() -> None:
    state = {"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}, "a.extra": torch.ones(1)}
    with pytest.raises(KeyMismatchError, match="It holds: a, b\\. Write one"):
        check(nn.Linear(1, 1), state, select="state_dict")


@pytest.mark.parametrize("from_file", [False, True])
def test_a_view_inside_of_tied_tensors_is_filled_in_torchs_order(from_file: bool, tmp_path: Path) -> None:
    def build() -> nn.Module:
        base, model = torch.zeros(60), nn.Module()
        for name, tensor in {"a": base, "b": base[10:20], "c": base}.items():
            model.register_buffer(name, tensor)
        return model

    state = {"a": torch.full((60,), 1.0), "b": torch.full((10,), 2.0), "c": torch.full((60,), 1.0)}
    torch.save(state, tmp_path / "w.pt")
    plain, smart = build(), build()
    plain.load_state_dict(state)
    smart_load(smart, tmp_path / "w.pt" if from_file else state)
    assert torch.equal(smart.a, plain.a)
