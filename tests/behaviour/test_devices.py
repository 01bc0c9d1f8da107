"""Models on one device, over several, and half way; what moves, what stays, and what comes back after a failure."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from fake_devices import fake_cuda
from placing import bits, devices, look, network, same_values
from tagging import saved
from torch import nn

from smartload import PlacementError, SmartLoadError, smart_load

DEVICES = [
    ("cpu", "cpu"),
    ("cpu:0", "cpu"),
    ("cuda", "cuda:0"),
    ("cuda:1", "cuda:1"),
    (0, "cuda:0"),
    (1, "cuda:1"),
    (torch.device("cuda:1"), "cuda:1"),
    (torch.device("cpu"), "cpu"),
]


def spread() -> nn.Module:
    model = network(seed=1)
    model.get_submodule("fc").to("cuda:0")
    model.get_submodule("norm").to("cuda:1")
    return model


def half_moved() -> nn.Module:
    model = network(seed=1)
    model.get_submodule("fc").to("cuda:1")
    return model


def on_the_second() -> nn.Module:
    return network(seed=1).to("cuda:1")


def on_the_cpu() -> nn.Module:
    return network(seed=1)


LAYOUTS = [on_the_cpu, on_the_second, spread, half_moved]


def where(model: nn.Module) -> dict[str, str]:
    return {name: str(tensor.device) for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def objects(model: nn.Module) -> dict[str, int]:
    return {name: id(parameter) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["zip", "legacy", "memory"])
def test_without_a_device_nothing_moves(cuda2: object, layout: type[nn.Module], form: str) -> None:
    model, source = layout(), network()
    places, before = where(model), objects(model)
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    state = source.state_dict()
    report = smart_load(model, state if form == "memory" else saved(state, "cuda:7", legacy=form == "legacy"))
    assert same_values(model, source)
    assert (where(model), objects(model), report.moves) == (places, before, ())
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == pointers
    assert set(report.device.split(", ")) == devices(model)


@pytest.mark.parametrize(("device", "home"), DEVICES, ids=repr)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_device_is_where_all_of_it_goes(
    cuda2: object, layout: type[nn.Module], device: str | int | torch.device, home: str
) -> None:
    model, source, value = layout(), network(), torch.randn(5, 4)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = objects(model)
    report = smart_load(model, saved(source.state_dict(), "cuda:1"), device)
    assert same_values(model, source)
    assert devices(model) == {home} == {report.device}
    assert (objects(model), report.notes) == (before, ())
    assert {str(p.grad.device) for p in model.parameters() if p.grad is not None} == {home}
    torch.testing.assert_close(model(value.to(home)).cpu(), source(value))


def test_the_report_is_of_what_the_models_own_code_left(cuda2: object) -> None:
    model = network()
    model.register_load_state_dict_post_hook(lambda module, keys: module.to("cuda:1") and None)
    report = smart_load(model, network().state_dict())
    assert devices(model) == {"cuda:1"} == {report.device}
    assert report.moves == (("all", "cpu", "cuda:1"),)


def test_a_live_optimizer_steps_the_loaded_weights(cuda2: object) -> None:
    model, source = network(1), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    smart_load(model, source.state_dict(), "cuda:1")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model[0].weight.cpu(), source[0].weight - 1)


def test_tied_weights_stay_tied_when_they_move(cuda2: object) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    smart_load(model, copy.deepcopy(model).state_dict(), "cuda:1")
    assert model[1].weight is model[0].weight
    assert devices(model) == {"cuda:1"}


def test_the_report_tells_what_moved_from_where(cuda2: object) -> None:
    report = smart_load(half_moved(), network().state_dict(), 0)
    assert [(source, target) for _, source, target in report.moves] == [("cuda:1", "cuda:0"), ("cpu", "cuda:0")]
    assert "moved:     fc.weight, fc.bias from cuda:1 to cuda:0" in str(report)


class Positions(nn.Module):
    """Keeps one tensor where `.to()` does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.table = torch.ones(2)
        self.steps = [torch.ones(1), torch.ones(1)]


def test_plain_attributes_left_behind_are_named(cuda2: object) -> None:
    model = nn.Sequential(Positions())
    report = smart_load(model, copy.deepcopy(model).state_dict(), "cuda:1")
    expected = "0.table, 0.steps on cpu: plain attributes do not follow .to(); make them buffers (register_buffer)"
    assert report.notes == (expected,)
    assert f"note:      {expected}" in str(report)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        model[0].fc(model[0].table.to("cuda:1")) + model[0].table
    assert smart_load(model, copy.deepcopy(model).state_dict(), "cpu").notes == ()


@contextmanager
def converting(name: str) -> Iterator[None]:
    setter = getattr(torch.__future__, f"set_{name}_module_params_on_conversion")
    setter(True)
    try:
        yield
    finally:
        setter(False)


def test_new_parameter_objects_are_reported(cuda2: object) -> None:
    model, source = network(1), network()
    before = objects(model)
    with converting("overwrite"):
        report = smart_load(model, source.state_dict(), "cuda:1")
    assert not set(objects(model).values()) & set(before.values())
    assert same_values(model, source)
    (note,) = report.notes
    assert note.startswith("new Parameter objects for ")
    assert note.endswith(": rebuild optimizers made before this call")


def test_swapping_keeps_the_objects(cuda2: object) -> None:
    model, source = network(1), network()
    before = objects(model)
    with converting("swap"):
        report = smart_load(model, source.state_dict(), "cuda:1")
    assert (objects(model), devices(model), report.notes) == (before, {"cuda:1"}, ())
    assert same_values(model, source)


@pytest.mark.parametrize("form", ["file", "memory"])
def test_assigned_tensors_go_where_they_are_asked_to(cuda2: object, form: str) -> None:
    source = network().double()
    model = half_moved()
    before = objects(model)
    state = source.state_dict()
    report = smart_load(model, saved(state, "cuda:7") if form == "file" else state, "cuda:1", assign=True)
    assert same_values(model, source)
    assert devices(model) == {"cuda:1"} == {report.device}
    assert model.get_submodule("fc").weight.dtype == torch.float64
    assert not set(objects(model).values()) & set(before.values())
    assert all(value.is_cpu for value in state.values())


def test_assigned_from_a_file_without_a_device_each_stays(cuda2: object) -> None:
    model = spread()
    places = where(model)
    smart_load(model, saved(network().state_dict(), "cuda:7"), assign=True)
    assert where(model) == places
    assert same_values(model, network())


def test_assigned_from_memory_without_a_device_the_callers_tensors_are_taken(cuda2: object) -> None:
    model, state = spread(), network().to("cuda:1").state_dict()
    smart_load(model, state, assign=True)
    assert all(value.data_ptr() == state[key].data_ptr() for key, value in model.state_dict().items())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("device", ["cuda:2", "meta", "mps", -1, [0, 1], "nonsense"])
def test_a_refused_device_changes_nothing(
    cuda2: object, layout: type[nn.Module], device: str | int | list[int]
) -> None:
    model = layout()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = look(model)
    with pytest.raises(PlacementError):
        smart_load(model, network().state_dict(), device)
    assert look(model) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("count", [0, 1])
def test_a_file_of_a_device_that_is_not_here_loads_but_not_onto_it(count: int) -> None:
    model, source = network(1), network()
    file = saved(source.state_dict(), "cuda:1")
    before = look(model)
    if count:
        with fake_cuda(1), pytest.raises(PlacementError, match="this machine has 1 cuda device"):
            smart_load(model, file, "cuda:1")
        with fake_cuda(1), pytest.raises(RuntimeError, match="device_count\\(\\) is 1"):
            torch.load(file)
    else:
        with pytest.raises(PlacementError, match=r"torch.cuda.is_available\(\) is False"):
            smart_load(model, file, "cuda:1")
    assert look(model) == before
    file.seek(0)
    smart_load(model, file)
    assert same_values(model, source)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", ["raise", "interrupt"])
def test_after_a_failure_everything_is_back(cuda2: object, layout: type[nn.Module], how: str) -> None:
    model = layout()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.step()
    failure = ValueError("no") if how == "raise" else KeyboardInterrupt()

    def fail(*args: object) -> None:
        assert devices(model) == {"cuda:0"}
        raise failure

    model.get_submodule("out").register_load_state_dict_post_hook(fail)
    before = look(model, [optimizer])
    with pytest.raises((SmartLoadError, KeyboardInterrupt)):
        smart_load(model, saved(network().state_dict()), "cuda:0", optimizer=optimizer)
    assert look(model, [optimizer]) == before


def test_a_move_that_fails_half_way_is_taken_back(cuda2: object, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(1)
    before = look(model)

    def fail(*args: object) -> nn.Module:
        raise MemoryError("CUDA out of memory, pretended")

    monkeypatch.setattr(model.get_submodule("out"), "_apply", fail)
    with pytest.raises(MemoryError):
        smart_load(model, network().state_dict(), "cuda:1")
    assert look(model) == before


def test_a_model_that_moves_its_own_way_is_asked(cuda2: object) -> None:
    class Refuses(nn.Linear):
        def to(self, *args: object, **kwargs: object) -> nn.Module:
            raise ValueError("this model is not to be moved")

    model = Refuses(2, 2)
    before = look(model)
    with pytest.raises(ValueError, match="not to be moved"):
        smart_load(model, nn.Linear(2, 2).state_dict(), 1)
    assert look(model) == before
    assert smart_load(model, nn.Linear(2, 2).state_dict()).device == "cpu"


def test_recurrent_layers_move_with_their_flat_weights(cuda2: object) -> None:
    model, source = nn.GRU(3, 2), nn.GRU(3, 2)
    smart_load(model, source.state_dict(), "cuda:1")
    assert same_values(model, source)
    assert all(str(weight.device) == "cuda:1" for weight in model._flat_weights)
    assert bits(model._flat_weights[0]) == bits(source.weight_ih_l0)


def test_lazy_layers_are_made_on_the_device(cuda2: object) -> None:
    model, source = nn.Sequential(nn.LazyLinear(2)), nn.Sequential(nn.Linear(3, 2))
    smart_load(model, source.state_dict(), "cuda:1")
    assert same_values(model, source)
    assert devices(model) == {"cuda:1"}


@pytest.mark.parametrize("device", ["None", "'cpu'", "torch.device('cpu', 0)"])
def test_a_load_on_the_cpu_never_wakes_cuda(tmp_path: Path, device: str) -> None:
    torch.save(network().state_dict(), tmp_path / "model.pth")
    code = f"""
import sys, torch, smartload
sys.path.insert(0, {str(Path(__file__).parents[1] / "helpers")!r})
from placing import network
def wake(): raise SystemError("CUDA was initialised")
torch.cuda._lazy_init = wake
torch.cuda.is_available = torch.cuda.device_count = torch.cuda.current_device = wake
model = network(1)
optimizer = torch.optim.Adam(model.parameters())
smartload.smart_load(model, {str(tmp_path / "model.pth")!r}, {device}, optimizer=optimizer)
with torch.device("meta"): model = torch.nn.Linear(4, 3)
smartload.smart_load(model, {str(tmp_path / "model.pth")!r}, {device}, select="fc")
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
