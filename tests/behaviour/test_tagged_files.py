"""The device on which a file's tensors lay never matters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tagging import TAGS, saved
from torch import nn

from smartload import smart_load


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def equal(model: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value.cpu(), theirs[key].cpu()) for key, value in model.state_dict().items())


def state_dict(model: nn.Module) -> object:
    return model.state_dict()


def nested(model: nn.Module) -> object:
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {"epoch": 3, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}


def whole(model: nn.Module) -> object:
    """A DataParallel over two devices as it would be pickled on the machine that has them."""
    parallel = nn.DataParallel(model)
    parallel.device_ids, parallel.output_device = [0, 1], 0
    parallel.src_device_obj, parallel.dim = torch.device("cuda:0"), 0
    return parallel


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("shape", [state_dict, nested, whole])
@pytest.mark.parametrize("tag", TAGS)
def test_a_file_from_any_device_loads_here(tag: str, shape: Callable[[nn.Module], object], legacy: bool) -> None:
    source, model = network(), network()
    file = saved(shape(source), tag, legacy=legacy)
    assert tag.encode() in file.getvalue()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    report = smart_load(model, file)
    assert equal(model, source)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert (report.device, report.moves) == ("cpu", ())


@pytest.mark.parametrize("tag", TAGS)
def test_plain_torch_refuses_such_a_file(tag: str) -> None:
    with pytest.raises(RuntimeError):
        torch.load(saved(network().state_dict(), tag))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_file_saved_from_two_devices_loads_here(cuda2: object, tmp_path: Path, legacy: bool) -> None:
    source = network()
    spread = copy.deepcopy(source)
    spread[0].to("cuda:0")
    spread[2].to("cuda:1")
    torch.save(spread.state_dict(), tmp_path / "spread.pth", _use_new_zipfile_serialization=not legacy)
    model = network()
    assert smart_load(model, tmp_path / "spread.pth").device == "cpu"
    assert equal(model, source)


@pytest.mark.parametrize("tag", ["cuda:1", "mps", "npu:0"])
@pytest.mark.parametrize("device", [None, "cuda:0", "cuda:1", "cpu"])
def test_the_tag_does_not_decide_where_tensors_land(cuda2: object, tag: str, device: str | None) -> None:
    source, model = network(), network()
    report = smart_load(model, saved(source.state_dict(), tag), device)
    assert equal(model, source)
    assert {str(tensor.device) for tensor in model.state_dict().values()} == {device or "cpu"} == {report.device}


def test_a_data_parallel_pickled_on_real_devices_loads_into_one_here(cuda2: object) -> None:
    source = network().eval()
    file = saved(nn.DataParallel(copy.deepcopy(source).to("cuda:1"), device_ids=[1, 0]))
    model = nn.DataParallel(network().eval(), device_ids=[0, 1])
    smart_load(model, file)
    value = torch.randn(6, 4)
    torch.testing.assert_close(model(value).cpu(), source(value))
