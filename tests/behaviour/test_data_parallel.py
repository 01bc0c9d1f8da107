"""DataParallel: the error that torch raises before, and the right output after."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from placing import devices, look, network, same_values
from tagging import saved
from torch import nn

from smartload import PlacementError, smart_load

Spoil = Callable[[nn.Module], None]


def weights_on_the_cpu(net: nn.Module) -> None:
    net.to("cpu")


def weights_on_the_other(net: nn.Module) -> None:
    net.to("cuda:0" if home(net) == "cuda:1" else "cuda:1")


def one_layer_elsewhere(net: nn.Module) -> None:
    net.get_submodule("out").to("cpu")


def buffers_elsewhere(net: nn.Module) -> None:
    for module in net.modules():
        module._buffers.update({name: None if b is None else b.cpu() for name, b in module._buffers.items()})


def non_persistent_buffer_elsewhere(net: nn.Module) -> None:
    scaled = net.get_submodule("scaled")
    scaled.scale = scaled.scale.cpu()  # type: ignore[assignment, operator]


SPOILS = [
    weights_on_the_cpu,
    weights_on_the_other,
    one_layer_elsewhere,
    buffers_elsewhere,
    non_persistent_buffer_elsewhere,
]


def home(net: nn.Module) -> str:
    return str(next(net.parameters()).device)


def wrapped(ids: list[int], spoil: Spoil) -> nn.DataParallel[nn.Module]:
    net = network(seed=1).to(f"cuda:{ids[0]}")
    spoil(net)
    return nn.DataParallel(net, device_ids=ids)


def complaint(ids: list[int]) -> str:
    return (
        f"module must have its parameters and buffers on device cuda:{ids[0]} (device_ids[0]) "
        "but found one of them on device: "
    )


@pytest.mark.parametrize("ids", [[0, 1], [1, 0]], ids=str)
@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("given", ["nothing", "list", "device"])
def test_a_spoilt_data_parallel_works_after_the_load(cuda2: object, ids: list[int], spoil: Spoil, given: str) -> None:
    source, value = network(), torch.randn(6, 4)
    model = wrapped(ids, spoil)
    objects = {name: id(tensor) for name, tensor in model.named_parameters()}
    with pytest.raises(RuntimeError) as caught:
        model(value)
    assert str(caught.value).startswith(complaint(ids))
    wanted = {"nothing": None, "list": ids, "device": f"cuda:{ids[0]}"}[given]
    report = smart_load(model, saved(source.state_dict(), "cuda:1"), wanted)
    assert devices(model) == {f"cuda:{ids[0]}"} == {report.device}
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == objects
    torch.testing.assert_close(model(value).cpu(), source(value))


@pytest.mark.parametrize("spoil", SPOILS)
def test_plain_torch_does_not_mend_it(cuda2: object, spoil: Spoil) -> None:
    model = wrapped([0, 1], spoil)
    model.module.load_state_dict(network().state_dict())
    with pytest.raises(RuntimeError) as caught:
        model(torch.randn(6, 4))
    assert str(caught.value).startswith(complaint([0, 1]))


@pytest.mark.parametrize("ids", [[0, 1], [1, 0]], ids=str)
def test_the_report_says_what_was_moved(cuda2: object, ids: list[int]) -> None:
    report = smart_load(wrapped(ids, weights_on_the_cpu), network().state_dict())
    assert report.moves == (("all", "cpu", f"cuda:{ids[0]}"),)
    assert f"moved:     all from cpu to cuda:{ids[0]}" in str(report)


def test_a_sound_data_parallel_is_left_where_it_is(cuda2: object) -> None:
    model = wrapped([1, 0], lambda net: None)
    pointers = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    assert smart_load(model, network().state_dict()).moves == ()
    assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == pointers
    assert same_values(model, network())


@pytest.mark.parametrize("ids", [[0, 1], [1, 0]], ids=str)
def test_nested_in_a_model_only_it_is_moved(cuda2: object, ids: list[int]) -> None:
    source = nn.Sequential(OrderedDict(body=network(), head=nn.Linear(2, 2)))
    model = nn.Sequential(OrderedDict(body=wrapped(ids, weights_on_the_cpu), head=nn.Linear(2, 2)))
    report = smart_load(model, source.state_dict())
    assert devices(model.body) == {f"cuda:{ids[0]}"}
    assert devices(model.head) == {"cpu"}
    assert report.moves[0][1:] == ("cpu", f"cuda:{ids[0]}")
    value = torch.randn(6, 4)
    torch.testing.assert_close(model.head(model.body(value).cpu()), source(value))


def test_two_of_them_each_go_home(cuda2: object) -> None:
    model = nn.ModuleList([wrapped([0, 1], weights_on_the_cpu), wrapped([1, 0], weights_on_the_cpu)])
    source = nn.ModuleList([network(2), network(3)])
    smart_load(model, source.state_dict())
    assert [devices(each) for each in model] == [{"cuda:0"}, {"cuda:1"}]
    assert same_values(model, source)


@pytest.mark.parametrize("assign", [False, True])
def test_on_meta_it_lands_on_its_first_device(cuda2: object, assign: bool) -> None:
    source, value = network(), torch.randn(6, 4)
    net = network(1)
    for module in net.modules():
        module._parameters.update({name: nn.Parameter(p.to("meta")) for name, p in module._parameters.items()})
    model = nn.DataParallel(net, device_ids=[1, 0])
    for file in (saved(source.state_dict()), source.state_dict()):
        smart_load(model, file, assign=assign)
        assert devices(model) == {"cuda:1"}
        torch.testing.assert_close(model(value).cpu(), source(value))


@pytest.mark.parametrize("form", ["file", "memory"])
def test_assigned_tensors_land_on_its_first_device(cuda2: object, form: str) -> None:
    source, value = network(), torch.randn(6, 4)
    model = wrapped([1, 0], weights_on_the_cpu)
    smart_load(model, saved(source.state_dict()) if form == "file" else source.state_dict(), assign=True)
    torch.testing.assert_close(model(value).cpu(), source(value))


def test_assign_in_plain_torch_breaks_it(cuda2: object) -> None:
    model = wrapped([1, 0], lambda net: None)
    model.module.load_state_dict(network().state_dict(), assign=True)
    with pytest.raises(RuntimeError, match="but found one of them on device: cpu"):
        model(torch.randn(6, 4))


@pytest.mark.parametrize("device", ["cpu", "cuda:1", 1, [1, 0], [0]])
def test_a_refusal_moves_nothing(cuda2: object, device: str | int | list[int]) -> None:
    model = wrapped([0, 1], one_layer_elsewhere)
    before = look(model)
    with pytest.raises(PlacementError):
        smart_load(model, network().state_dict(), device)
    assert look(model) == before


def test_a_file_that_does_not_fit_moves_nothing(cuda2: object) -> None:
    model = wrapped([0, 1], weights_on_the_cpu)
    before = look(model)
    with pytest.raises(RuntimeError):
        smart_load(model, nn.Linear(4, 3).state_dict())
    assert look(model) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_without_devices_it_is_a_wrapper_like_others() -> None:
    model = nn.DataParallel(network(1))
    assert model.device_ids == []
    assert smart_load(model, network().state_dict(), "cpu").moves == ()
    assert same_values(model, network())
    with pytest.raises(PlacementError, match=r"was asked for, but torch\.cuda\.is_available"):
        smart_load(model, network().state_dict(), [0, 1])
