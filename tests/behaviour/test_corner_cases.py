"""Inputs that are rare and legal, or rare and wrong: each once went astray."""

from __future__ import annotations

import inspect as inspection
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from placing import look
from torch import nn
from torch._subclasses import FakeTensorMode

from smartload import (
    AmbiguousKeysError,
    KeyMismatchError,
    ModelCodeError,
    PlacementError,
    SmartLoadError,
    check,
    convert,
    inspect,
    smart_load,
    unwrap,
)
from smartload.load import commit


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
def test_a_view_inside_of_tied_tensors_holds_its_values(from_file: bool, tmp_path: Path) -> None:
    def build() -> nn.Module:
        base, model = torch.zeros(60), nn.Module()
        for name, tensor in {"a": base, "b": base[10:20], "c": base}.items():
            model.register_buffer(name, tensor)
        return model

    state = {"a": torch.arange(60.0), "b": torch.arange(10.0, 20.0), "c": torch.arange(60.0)}
    torch.save(state, tmp_path / "w.pt")
    model = build()
    smart_load(model, tmp_path / "w.pt" if from_file else state)
    assert torch.equal(model.a, state["a"])
    state["b"] = state["b"] + 1
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(AmbiguousKeysError, match=r"(a and b|b and a|b and c|c and b) of Module share"):
        smart_load(model, tmp_path / "w.pt" if from_file else state)
    assert torch.equal(model.a, state["a"])


DEEP = 2000


def nested(*inner: nn.Module, wrap: Callable[[nn.Module], nn.Module] = nn.Sequential) -> nn.Module:
    """A module far deeper than Python nests calls; torch's own state_dict and load_state_dict fail at 1,000 levels."""
    model: nn.Module = nn.Sequential(*inner)
    for _ in range(DEEP - 1):
        model = nn.Sequential(model)
    return wrap(model)


def innermost(model: nn.Module) -> nn.Module:
    while (children := list(model.children())) and len(children) == 1:
        model = children[0]
    return model


def deep_state(*inner: nn.Module, fill: float = 7.0) -> dict[str, torch.Tensor]:
    state = nn.Sequential(*inner).state_dict()
    return {"0." * (DEEP - 1) + key: torch.full_like(value, fill) for key, value in state.items()}


@pytest.mark.parametrize("way", ["plain", "assign", "meta", "DataParallel", "normed", "cast"])
@pytest.mark.parametrize("in_file", [True, False])
def test_modules_deeper_than_torch_nests_its_calls(way: str, in_file: bool, tmp_path: Path) -> None:
    inner = (nn.Linear(2, 2), nn.BatchNorm1d(2)) if way == "normed" else (nn.Linear(2, 2), nn.Linear(2, 2))
    state: Any = deep_state(*inner)
    if way == "normed":
        del state["0." * (DEEP - 1) + "1.num_batches_tracked"]
    if in_file:
        torch.save(state, tmp_path / "deep.pth")
    with torch.device("meta" if way == "meta" else "cpu"):
        model = nested(*inner, wrap=nn.DataParallel if way == "DataParallel" else lambda module: module)
    if way == "cast":
        innermost(model).half()
    with pytest.raises(RecursionError):
        model.load_state_dict(state)
    source = tmp_path / "deep.pth" if in_file else state
    assert check(model, source).pairs
    report = smart_load(model, source, "cpu" if way == "meta" else None, assign=way == "assign")
    assert "each module loaded its own keys" in str(report)
    loaded = innermost(model).state_dict()
    assert {key for key, value in loaded.items() if not bool((value == 7).all())} <= {"1.num_batches_tracked"}
    assert len(loaded) == len(nn.Sequential(*inner).state_dict())


class Watching(nn.Linear):
    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)


class Saving(nn.Linear):
    def _save_to_state_dict(self, *arguments: Any) -> None:
        super()._save_to_state_dict(*arguments)


@pytest.mark.parametrize("kind", [Watching, Saving])
def test_a_deep_model_that_only_torch_can_load_is_refused(kind: type[nn.Linear]) -> None:
    model, state = nested(kind(2, 2), nn.ReLU()), deep_state(nn.Linear(2, 2), nn.ReLU())
    before = look(innermost(model))
    with pytest.raises(SmartLoadError, match=r"more calls were nested.*sys\.setrecursionlimit\(10_000\)") as caught:
        smart_load(model, state)
    assert isinstance(caught.value, RecursionError)
    assert look(innermost(model)) == before
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(10_000)
        smart_load(model, state)
    finally:
        sys.setrecursionlimit(limit)
    assert bool((innermost(model).get_parameter("0.weight") == 7).all())


def test_a_module_that_contains_itself() -> None:
    model = nn.Sequential(nn.Sequential(nn.ReLU()))
    model[0].loop = model
    for refused in (lambda: check(model, {}), lambda: smart_load(model, {}), lambda: inspect({"net": model})):
        with pytest.raises(SmartLoadError, match=r"'0\.loop' contains itself"):
            refused()
    wrapper = nn.DataParallel(nn.Linear(1, 1))
    wrapper.module = wrapper
    assert unwrap(wrapper) is wrapper
    with pytest.raises(SmartLoadError, match="'module' contains itself"):
        smart_load(wrapper, {})


def test_very_deep_inside_other_calls(tmp_path: Path) -> None:
    """An honest file is not damaged where Python has no calls left; wherever they end, the model is what it was."""

    def within(calls: int) -> None:
        within(calls - 1) if calls else smart_load(model, tmp_path / "net.pth")

    torch.save({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, tmp_path / "net.pth")
    limit, kinds = sys.getrecursionlimit(), set()
    for calls in range(100, 250):
        model = linear()
        before = look(model)
        frames = len(inspection.stack())
        sys.setrecursionlimit(frames + 250)
        try:
            within(calls)
            continue
        except SmartLoadError as error:
            kinds.add(error.problem.kind)
        except RecursionError:
            pass  # not even the first line of smart_load was run
        finally:
            sys.setrecursionlimit(limit)
        assert look(model) == before
    assert kinds == {"too-deep"}


OVERLAPS: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, ...]]] = {
    "the end of one": lambda base: (base[:6], base[4:]),
    "a piece of one": lambda base: (base, base[2:5]),
    "transposed": lambda base: (base[:9].view(3, 3), base[:9].view(3, 3).t()),
    "another shape": lambda base: (base, base.view(2, 5)),
    "another dtype": lambda base: (base, base.view(torch.int32)),
    "itself": lambda base: (base.as_strided((3, 3), (1, 1)),),
}


def overlapping_model(name: str) -> nn.Module:
    model = nn.Module()
    for key, tensor in zip("ab", OVERLAPS[name](torch.zeros(10))):
        model.register_buffer(key, tensor)
    return model


@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize("name", OVERLAPS)
def test_two_values_for_memory_that_two_tensors_share(name: str, in_file: bool, tmp_path: Path) -> None:
    """Plain torch keeps what it wrote last, and says nothing."""
    model = overlapping_model(name)
    state: Any = {
        key: (torch.arange(value.numel()).view(value.shape) + i).to(value.dtype)
        for i, (key, value) in enumerate(model.state_dict().items())
    }
    plain = overlapping_model(name)
    plain.load_state_dict(state)
    assert not all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())
    equal = {key: value.clone() for key, value in overlapping_model(name).state_dict().items()}
    if in_file:
        torch.save(state, tmp_path / "two.pth")
        torch.save(equal, tmp_path / "equal.pth")
    before = look(model)
    what = "elements of a" if name == "itself" else "a and b"
    with pytest.raises(AmbiguousKeysError, match=f"{what} of Module share a part of their memory") as caught:
        smart_load(model, tmp_path / "two.pth" if in_file else state)
    assert "or load with assign=True" in str(caught.value)
    assert look(model) == before
    smart_load(model, tmp_path / "equal.pth" if in_file else equal)
    smart_load(model, tmp_path / "two.pth" if in_file else state, assign=True)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_large_model_of_overlapping_tensors_keeps_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "AUTO_UNDO_BYTES", 0)
    model = overlapping_model("a piece of one")
    with pytest.raises(AmbiguousKeysError, match="a and b"):
        smart_load(model, {"a": torch.ones(10), "b": torch.full((3,), 2.0)})
    assert not model.a.any()
    assert not smart_load(linear(), linear().state_dict()).undo


@pytest.mark.parametrize("way", ["file", "memory", "assign", "legacy", "lenient", "same", "convert"])
def test_nothing_is_read_in_a_mode_that_makes_fake_tensors(way: str, tmp_path: Path) -> None:
    """Their memory is at the address 0: bytes read into one would end the process."""
    model, state = linear(), {key: value + 1 for key, value in linear().state_dict().items()}

    def call() -> object:
        if way == "convert":
            return convert(source, tmp_path / "clean.pth")
        return smart_load(model, source, assign=way == "assign")

    if way == "same":  # tied in the model: two tensors of the file are compared, which lie in different ways
        model.register_parameter("other", model.weight)
        state["other"] = state["weight"].t().clone().t()
    torch.save(state, tmp_path / "net.pth", _use_new_zipfile_serialization=way != "legacy")
    before = look(model)
    source: Any = state if way == "memory" else tmp_path / "net.pth"
    with FakeTensorMode(allow_non_fake_inputs=way == "lenient"), pytest.raises(PlacementError, match="a FakeTensor in"):
        call()
    assert look(model) == before


@pytest.mark.parametrize("inside", [True, False])
def test_a_model_of_fake_tensors_is_refused(inside: bool) -> None:
    mode = FakeTensorMode()
    with mode:
        model = linear()
    objects = [id(tensor) for tensor in model.parameters()]
    with mode if inside else nullcontext(), pytest.raises(PlacementError, match=r"FakeTensor|fake tensors"):
        smart_load(model, linear().state_dict())
    assert [id(tensor) for tensor in model.parameters()] == objects
