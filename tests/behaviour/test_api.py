"""The call itself: arguments, sources, and what is said about slips of the pen."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from torch import nn

import smartload
from smartload import KeyMismatchError, SmartLoadError, check, smart_load, unwrap


@pytest.fixture
def net() -> nn.Linear:
    return nn.Linear(2, 1)


WEIGHTS = {"weight": torch.tensor([[3.0, 4.0]]), "bias": torch.tensor([5.0])}


def loaded(net: nn.Linear) -> bool:
    return torch.equal(net.weight, WEIGHTS["weight"]) and torch.equal(net.bias, WEIGHTS["bias"])


def test_every_kind_of_source(net: nn.Linear, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(WEIGHTS, path)
    buffer = io.BytesIO(path.read_bytes())
    with path.open("rb") as file:
        for source in (path, str(path), file, buffer, WEIGHTS, {"state_dict": WEIGHTS}):
            nn.init.zeros_(net.weight)
            smart_load(net, source)
            assert loaded(net)
    assert buffer.tell() == 0
    assert not buffer.closed


def test_strict_true_means_nothing_and_false_is_refused(net: nn.Linear) -> None:
    smart_load(net, WEIGHTS, strict=True)
    before = net.weight.clone()
    with pytest.raises(SmartLoadError, match=r"allow_missing=\['head\.\*'\], allow_unexpected=\['aux\.\*'\]"):
        smart_load(net, {}, strict=False)  # type: ignore[arg-type]
    assert torch.equal(net.weight, before)


@pytest.mark.parametrize("path", [2, (1, 2), None, b"x.pt", ["a"]])
def test_what_is_no_path_is_a_type_error_that_says_so(net: nn.Linear, path: object) -> None:
    with pytest.raises(TypeError, match="path must be a path, a binary file or a dict-like state dict, got"):
        smart_load(net, path)  # type: ignore[arg-type]


def test_a_model_must_be_a_module() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        smart_load(WEIGHTS, WEIGHTS)  # type: ignore[arg-type]


def test_a_pattern_alone_is_a_slip(net: nn.Linear) -> None:
    with pytest.raises(TypeError, match=r"allow_missing takes a list of patterns: write allow_missing=\['fc\.\*'\]"):
        smart_load(net, WEIGHTS, allow_missing="fc.*")


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ({"rename": {"head": "fc"}}, "rename rule 'head' matched no key of the file"),
        ({"rename": lambda key: key}, "rename rule 'the function' matched no key"),
        ({"allow_missing": ["fc.*"]}, "allow_missing pattern 'fc.*' matched no key of Linear"),
        ({"allow_unexpected": ["fc.*"]}, "allow_unexpected pattern 'fc.*' matched no key of the file"),
        ({"select": "ema"}, "there is no 'ema' in the file"),
    ],
)
def test_a_wish_that_matched_nothing_is_an_error(net: nn.Linear, argument: dict[str, object], words: str) -> None:
    before = net.weight.clone()
    for call in (smart_load, check):
        with pytest.raises(KeyMismatchError) as caught:
            call(net, WEIGHTS, **argument)  # type: ignore[operator]
        assert words in str(caught.value)
    assert torch.equal(net.weight, before)


def test_a_rename_function_must_give_names(net: nn.Linear) -> None:
    with pytest.raises(TypeError, match=r"rename\('weight'\) must return a str, got int"):
        smart_load(net, WEIGHTS, rename=lambda key: 3)  # type: ignore[arg-type, return-value]


def test_the_callers_dict_is_not_touched(net: nn.Linear) -> None:
    state = net.state_dict()
    state._metadata[""]["assign_to_params_buffers"] = True  # type: ignore[attr-defined]
    keys, values, metadata = list(state), [id(v) for v in state.values()], dict(state._metadata[""])  # type: ignore[attr-defined]
    parameter = net.weight
    smart_load(net, state)
    assert net.weight is parameter
    assert (list(state), [id(v) for v in state.values()]) == (keys, values)
    assert state._metadata[""] == metadata  # type: ignore[attr-defined]


def test_unwrap_goes_by_type_and_not_by_name() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(1, 1)

    net = Net()
    assert unwrap(net) is net
    assert unwrap(nn.DataParallel(torch.optim.swa_utils.AveragedModel(net))) is not net  # a deep copy of it
    assert isinstance(unwrap(nn.DataParallel(torch.optim.swa_utils.AveragedModel(net))), Net)
    assert unwrap(torch.compile(nn.DataParallel(net))) is net  # type: ignore[arg-type]


def test_the_front_door_is_what_it_says() -> None:
    assert sorted(smartload.__all__, key=str.lower) == sorted(set(smartload.__all__), key=str.lower)
    assert all(getattr(smartload, name).__doc__ for name in smartload.__all__)


def test_what_was_not_selected_is_named() -> None:
    inner, outer = nn.Linear(2, 1), nn.Linear(3, 3)
    file = {"model": {"enc": inner.state_dict(), "dec": outer.state_dict()}, "ema": inner.state_dict(), "step": 3}
    report = smart_load(nn.Linear(2, 1), file, select="model.enc")
    assert [(item.key, item.reason) for item in report.plan.ignored] == [
        (name, "not selected") for name in ("model.dec.weight", "model.dec.bias", "ema.weight", "ema.bias")
    ]
    flat = {f"enc.{key}": value for key, value in inner.state_dict().items()} | {"dec.weight": torch.ones(1)}
    report = smart_load(nn.Linear(2, 1), flat, select="enc")
    assert [(item.key, item.reason) for item in report.plan.ignored] == [("dec.weight", "not selected")]
