"""Asking a model's own strict load: torch's verdict, with nothing copied, nothing kept and no state handed over."""

from __future__ import annotations

import time
import warnings
from typing import Any

import pytest
import torch
from placing import look
from torch import nn

from smartload.load import strict
from smartload.load.strict import rehearse, state_dict, strict_load
from smartload.place.survey import survey
from smartload.records.entries import TensorSpec


def specs(model: nn.Module) -> dict[str, TensorSpec]:
    return {key: TensorSpec(tuple(value.shape), str(value.dtype)[6:]) for key, value in model.state_dict().items()}


def asked(model: nn.Module, wanted: dict[str, TensorSpec], metadata: Any = None) -> bool:
    before, extras = look(model), [dict(vars(module)) for module in model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verdict = rehearse(survey(model), wanted, metadata)
    assert look(model) == before
    assert [list(vars(module)) for module in model.modules()] == [list(each) for each in extras]
    return verdict


class Renaming(nn.Linear):
    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        if prefix + "w" in state:
            state[prefix + "weight"] = state.pop(prefix + "w")
        super()._load_from_state_dict(state, prefix, *rest)


class Stated(nn.Module):
    calls: list[object] = []  # noqa: RUF012 - beyond the reach of an undo

    def get_extra_state(self) -> object:
        return 1

    def set_extra_state(self, state: object) -> None:
        self.calls.append(state)


class Curious(nn.Linear):
    """Needs real values."""

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        assert state[prefix + "weight"].sum().item() > 0
        super()._load_from_state_dict(state, prefix, *rest)


def without(given: dict[str, TensorSpec], *names: str) -> dict[str, TensorSpec]:
    return {key: value for key, value in given.items() if key not in names}


def test_torchs_verdict() -> None:
    norm = nn.BatchNorm1d(2)
    assert asked(norm, specs(norm))
    assert asked(norm, without(specs(norm), "num_batches_tracked"))
    assert not asked(norm, without(specs(norm), "num_batches_tracked"), {"": {"version": 2}})
    assert asked(norm, without(specs(norm), "num_batches_tracked"), {"": {"version": 1}})
    assert not asked(norm, without(specs(norm), "weight"))
    assert not asked(norm, {**specs(norm), "more": TensorSpec((1,), "float32")})
    assert not asked(norm, {**specs(norm), "weight": TensorSpec((3,), "float32")})


def test_the_models_own_code() -> None:
    model = nn.Sequential(Renaming(2, 1))
    assert asked(model, {"0.w": TensorSpec((1, 2), "float32"), "0.bias": TensorSpec((1,), "float32")})
    assert not asked(model, {"0.w": TensorSpec((2, 2), "float32"), "0.bias": TensorSpec((1,), "float32")})
    assert not asked(Curious(2, 1), specs(nn.Linear(2, 1)))


def test_extra_states_are_not_handed_over() -> None:
    model = Stated()
    assert asked(model, {"_extra_state": TensorSpec((), "uint8")})
    assert model.calls == []
    model.set_extra_state(1)
    assert model.calls == [1]


def test_old_names_of_weight_norm() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    old = {"weight_g": TensorSpec((2, 1), "float32"), "weight_v": TensorSpec((2, 3), "float32")}
    assert asked(model, {"bias": TensorSpec((2,), "float32"), **old})


def test_tied_tensors_have_one_twin() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    seen: list[bool] = []
    model.register_load_state_dict_post_hook(lambda module, keys: seen.append(module[0].weight is module[1].weight))
    assert asked(model, specs(model))
    assert seen == [True]


def test_lazy_modules() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.LazyLinear(2))
    before = [(id(tensor), type(tensor)) for tensor in model.parameters()]
    wanted = {"0.weight": TensorSpec((2, 5), "float32"), "0.bias": TensorSpec((2,), "float32")}
    assert rehearse(survey(model), wanted, None)
    assert [(id(tensor), type(tensor)) for tensor in model.parameters()] == before


def test_a_tensor_without_a_twin_cannot_be_asked() -> None:
    model = nn.Module()
    model.register_buffer("s", torch.ones(2).to_sparse())
    assert not rehearse(survey(model), {"s": TensorSpec((2,), "float32")}, None)


def test_an_exit_goes_through_with_the_model_as_it_was() -> None:
    def leave(*args: object) -> None:
        raise KeyboardInterrupt

    model = nn.Linear(2, 1)
    model.register_load_state_dict_pre_hook(leave)
    before = look(model)
    with pytest.raises(KeyboardInterrupt):
        rehearse(survey(model), specs(model), None)
    assert look(model) == before


def test_the_state_dict_is_a_copy_with_its_metadata() -> None:
    metadata = {"": {"version": 1}}
    state = state_dict({"a": 1}, metadata)
    state._metadata[""]["version"] = 2  # type: ignore[attr-defined]
    assert metadata == {"": {"version": 1}}
    assert not hasattr(state_dict({"a": 1}, None), "_metadata")


def test_many_children_take_linear_time() -> None:
    model = nn.ModuleList(nn.Linear(1, 1) for _ in range(3000))
    state = model.state_dict()
    found = survey(model)
    started = time.process_time()
    strict_load(found, state, assign=False)
    ours = time.process_time() - started
    started = time.process_time()
    model.load_state_dict(state)
    assert ours < (time.process_time() - started) / 2  # a tenth, where nobody measures coverage


@pytest.mark.parametrize("change", ["missing", "unexpected", "stranger", "shape"])
def test_the_short_road_refuses_what_torch_refuses(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict, "MAX_FILTER_STEPS", 0)
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    state = dict(model.state_dict())
    if change == "missing":
        del state["1.bias"]
    else:
        name = {"unexpected": "0.more", "stranger": "7.a.b", "shape": "0.weight"}[change]
        state[name] = torch.ones(5)
    with pytest.raises(RuntimeError, match=r"Error.s. in loading state_dict for Sequential"):
        strict_load(survey(model), state, assign=False)


@pytest.mark.parametrize("left_out", ["num_batches_tracked", "weight"])
def test_a_wide_model_is_asked_module_by_module(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleList(nn.BatchNorm1d(2) for _ in range(3))
    wanted = {key: spec for key, spec in specs(model).items() if not key.endswith(left_out)}
    expected = rehearse(survey(model), wanted, None)
    assert expected is (left_out == "num_batches_tracked")  # torch forgives the counter where the file has no version
    monkeypatch.setattr(strict, "MAX_FILTER_STEPS", 0)
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *args, **kwargs: pytest.fail("the whole was asked"))
    assert rehearse(survey(model), wanted, None) is expected
