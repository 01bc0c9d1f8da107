"""What is seen of a model: its names, its tensors, and which code of its own a load would run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from smartload.errors import SmartLoadError
from smartload.place.memory import is_ordinary, is_writable, overlapping
from smartload.place.survey import survey, unregistered_tensors, walk


class Stated(nn.Linear):
    def get_extra_state(self) -> object:
        return 1

    def set_extra_state(self, state: object) -> None: ...


class Loads(nn.Linear):
    def _load_from_state_dict(self, *args: Any) -> None: ...


class Saves(nn.Linear):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "packed"] = torch.cat([self.weight.flatten(), self.bias])


class Whole(nn.Linear):
    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any: ...


def given(make: Callable[[Any], object]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layer = nn.Linear(2, 1)
        make(layer)
        return layer

    return build


CODE: dict[str, tuple[Callable[[], nn.Module], tuple[bool, bool, bool]]] = {
    # own_code, bends, rewrites
    "linear": (lambda: nn.Linear(2, 1), (False, False, False)),
    "batch norm": (lambda: nn.BatchNorm1d(2), (False, True, False)),
    "extra state": (lambda: Stated(2, 1), (True, True, False)),
    "post hook": (given(lambda m: m.register_load_state_dict_post_hook(print)), (True, True, False)),
    "pre hook": (given(lambda m: m.register_load_state_dict_pre_hook(print)), (True, True, True)),
    "override": (lambda: Loads(2, 1), (True, True, True)),
    "override of the instance": (given(lambda m: setattr(m, "_load_from_state_dict", print)), (True, True, True)),
    "whole override": (lambda: Whole(2, 1), (True, True, True)),
    "whole override of the instance": (given(lambda m: setattr(m, "load_state_dict", print)), (True, True, True)),
}


@pytest.mark.parametrize("name", CODE)
def test_code_of_its_own(name: str) -> None:
    make, (own_code, may_accept_other_keys, rewrites_values) = CODE[name]
    found = survey(make())
    assert (found.own_code, found.may_accept_other_keys, found.rewrites_values) == (
        own_code,
        may_accept_other_keys,
        rewrites_values,
    )
    if "whole" not in name:  # torch never asks a child for this one
        found = survey(nn.Sequential(nn.ReLU(), make()))
        assert (found.own_code, found.may_accept_other_keys, found.rewrites_values) == (
            own_code,
            may_accept_other_keys,
            rewrites_values,
        )


def test_a_class_patched_later_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not survey(nn.Linear(2, 1)).rewrites_values
    monkeypatch.setattr(nn.Linear, "_load_from_state_dict", Loads._load_from_state_dict)
    assert survey(nn.Linear(2, 1)).rewrites_values


def test_names_are_those_of_the_state_dict() -> None:
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, nn.BatchNorm1d(2), nn.Sequential(layer, Stated(2, 1)), nn.LSTM(2, 2))
    model.empty = None
    found = survey(model)
    assert list(found.keys.specs) == list(model.state_dict())
    assert found.keys.specs["2.1._extra_state"] is None
    assert found.tensors["0.weight"] is layer.weight
    assert sorted(found.keys.tied) == [("0.bias", "2.0.bias"), ("0.weight", "2.0.weight")]
    assert [path for path, _ in walk(model)] == [path for path, _ in model.named_modules(remove_duplicate=False)]
    assert not found.computed


def test_what_a_model_saves_its_own_way() -> None:
    model = nn.Sequential(Saves(2, 1), nn.Linear(1, 1))
    found = survey(model)
    assert list(found.keys.specs) == ["0.packed", "1.weight", "1.bias"]
    assert found.computed == {"0.packed"}
    assert found.tensors["1.weight"] is model[1].weight


def test_aliases_by_memory() -> None:
    model = nn.Module()
    base = torch.zeros(4)
    model.a, model.b, model.c = nn.Parameter(base), nn.Parameter(base), nn.Parameter(base[:2])
    model.d, model.e = nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(0))
    wide = torch.zeros(1).expand(3)
    model.f, model.g = nn.Parameter(wide), nn.Parameter(wide)
    assert survey(model).keys.tied == (("a", "b"), ("f", "g"))
    with torch.device("meta"):
        assert survey(nn.Linear(2, 2)).keys.tied == ()


def test_a_module_that_contains_itself_is_named() -> None:
    model = nn.Sequential(nn.Sequential(nn.ReLU()))
    model[0].loop = model
    with pytest.raises(SmartLoadError, match=r"0\.loop"):
        survey(model)


def test_a_container_under_two_names_is_no_loop() -> None:
    block = nn.Sequential(nn.Linear(1, 1))
    model = nn.Sequential(block, nn.Sequential(block), block)
    assert list(survey(model).keys.specs) == list(model.state_dict())


def test_overlaps() -> None:
    base = torch.zeros(100)
    tensors = {
        "left": base[:60],
        "right": base[50:],
        "alone": torch.zeros(3),
        "twice": torch.zeros(3),
        "sliding": torch.zeros(9).as_strided((3, 3), (1, 1)),
        "touching": torch.zeros(9).as_strided((3, 2), (1, 2)),
        "column": torch.zeros(4, 4)[:, :2],
        "empty": torch.zeros(0),
    }
    tensors["again"] = tensors["twice"]
    assert overlapping(tensors) == {"left", "right", "sliding", "touching"}
    nested = {"all": base, "one": base[3:4], "two": base[90:]}
    assert overlapping(nested) == {"all", "one", "two"}
    tied = {"a": base[:60], "b": base[10:20], "c": base[:60]}
    assert overlapping(tied) == {"a", "b", "c"}  # each name of memory that another tensor looks into
    weave = torch.zeros(10)
    assert overlapping({"even": weave[::2], "odd": weave[1::2]}) == {"even", "odd"}  # apart, but it costs little


def test_kinds_of_tensors() -> None:
    assert is_ordinary(nn.Parameter(torch.ones(2)))
    assert not is_ordinary(torch.ones(2).to_sparse())
    assert not is_ordinary(torch.ones(2, dtype=torch.complex64).conj())
    assert not is_ordinary(torch.ones(2, dtype=torch.complex64).conj().imag)
    assert is_writable(torch.ones(2, 2).t())
    assert not is_writable(torch.ones(1).expand(2))
    with torch.inference_mode():
        born = torch.ones(2)
        assert is_writable(born)
    assert not is_writable(born)


def test_unregistered_tensors() -> None:
    model = nn.Sequential(nn.Linear(2, 1))
    model[0].table, model[0].several = torch.ones(2), [torch.zeros(1), torch.zeros(2)]
    assert [name for name, _ in unregistered_tensors(survey(model))] == ["0.table", "0.several"]


def test_a_survey_is_quick() -> None:
    model = nn.ModuleList(nn.Linear(1, 1) for _ in range(5000))
    best = min(_seconds(lambda: survey(model)) for _ in range(4))
    assert best / 10_000 < 25e-6  # 5 us a key on an idle machine


def _seconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started
