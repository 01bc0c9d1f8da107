"""Models on meta: they end with real tensors, in the same objects, or stay as they were."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from io import BytesIO

import pytest
import torch
from placing import bits, devices, look, same_values
from tagging import saved
from torch import nn

from smartload import KeyMismatchError, PlacementError, SmartLoadError, smart_load

FORMS: list[Callable[[nn.Module], object]] = [
    lambda model: saved(model.state_dict(), "cuda:7"),
    lambda model: saved(model.state_dict(), "cuda:7", legacy=True),
    lambda model: model.state_dict(),
    lambda model: {"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}},
]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()


def on_meta(make: Callable[[], nn.Module] = net) -> nn.Module:
    with torch.device("meta"):
        return make()


def objects(model: nn.Module) -> dict[str, int]:
    return {name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("form", FORMS, ids=["zip", "legacy", "memory", "nested"])
@pytest.mark.parametrize("device", [None, "cpu", "cuda:1"])
def test_a_meta_model_ends_with_real_tensors_in_the_same_objects(
    cuda2: object, form: Callable[[nn.Module], object], device: str | None
) -> None:
    model, source, value = on_meta(), net(), torch.randn(5, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = objects(model)
    report = smart_load(model, form(source), device)  # type: ignore[arg-type]
    home = device or "cpu"
    assert same_values(model, source)
    assert devices(model) == {home} == {report.device}
    assert objects(model) == before
    assert report.moves == (("all", "meta", home),)
    assert report.notes == ()
    torch.testing.assert_close(model(value.to(home)).cpu(), source(value))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.testing.assert_close(next(model.parameters()).cpu(), next(source.parameters()) - 1)


def test_plain_torch_leaves_it_on_meta() -> None:
    model = on_meta()
    with pytest.warns(UserWarning, match="is a no-op"):
        model.load_state_dict(net().state_dict())
    assert devices(model) == {"meta"}


def test_kinds_and_flags_survive() -> None:
    model, source = on_meta(), net()
    model[0].weight.requires_grad_(False)  # type: ignore[index]
    model[0].bias.mark = "mine"  # type: ignore[index]
    model.half()
    smart_load(model, source.state_dict())
    assert [type(tensor) for tensor in model.parameters()] == [nn.Parameter] * 6
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5
    assert model[0].bias.mark == "mine"  # type: ignore[index]
    assert model[0].weight.dtype == torch.float16  # type: ignore[index]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("stored", ["both", "once"])
@pytest.mark.parametrize("form", ["file", "memory"])
def test_tied_weights_are_one_object_again(stored: str, form: str) -> None:
    model, state = on_meta(Tied), Tied().state_dict()
    if stored == "once":
        del state["head.weight"]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    smart_load(model, saved(state) if form == "file" else state)
    assert model.head.weight is model.embed.weight is optimizer.param_groups[0]["params"][0]
    assert bits(model.head.weight) == bits(state["embed.weight"])


def test_partly_on_meta_only_that_part_is_made() -> None:
    model, source = net(), net()
    model[2] = nn.Linear(3, 2, device="meta")
    pointer = model[0].weight.data_ptr()
    report = smart_load(model, source.state_dict())
    assert same_values(model, source)
    assert model[0].weight.data_ptr() == pointer
    assert report.moves == (("2.weight, 2.bias", "meta", "cpu"),)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("form", ["file", "memory"])
def test_partly_on_meta_and_moved(cuda2: object, assign: bool, form: str) -> None:
    model, source = net(), net()
    model[2] = nn.Linear(3, 2, device="meta")
    state = source.state_dict()
    smart_load(model, saved(state) if form == "file" else state, "cuda:1", assign=assign)
    assert same_values(model, source)
    assert devices(model) == {"cuda:1"}


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_inside_a_meta_context_the_device_decides(cuda2: object, device: str) -> None:
    source = net()
    with torch.device("meta"):
        model = net()
        smart_load(model, saved(source.state_dict()), device)
    assert devices(model) == {device}
    assert same_values(model, source)


def test_inside_a_meta_context_without_a_device_it_refuses() -> None:
    with torch.device("meta"):
        model = net()
        before = look(model)
        with pytest.raises(PlacementError, match="the meta device holds no data"):
            smart_load(model, saved(on_cpu()))
    assert look(model) == before


def on_cpu() -> object:
    with torch.device("cpu"):
        return net().state_dict()


def test_a_real_model_is_loaded_inside_a_meta_context() -> None:
    model, source = net(), net()
    with torch.device("meta"):
        smart_load(model, saved(source.state_dict()))
    assert same_values(model, source)


def test_the_default_device_is_where_it_is_made(cuda2: object) -> None:
    model, source = on_meta(), net()
    with torch.device("cuda:1"):
        smart_load(model, saved(source.state_dict()))
    assert devices(model) == {"cuda:1"}
    assert same_values(model, source)


@pytest.mark.parametrize("context", ["cpu", "meta"])
def test_assigned_from_a_file_it_is_real_too(context: str) -> None:
    model, source = on_meta(), net()
    file = saved(source.state_dict(), "cuda:7")
    with torch.device(context):
        smart_load(model, file, assign=True)
    assert devices(model) == {"cpu"}
    assert same_values(model, source)
    assert all(isinstance(parameter, nn.Parameter) for parameter in model.parameters())


def test_batch_norm_of_an_old_file_gets_its_counter() -> None:
    """Before torch 0.4.1 there was none; torch's own rule gives zero."""
    model, source = on_meta(), net()
    state = source.state_dict()
    state._metadata.clear()  # type: ignore[attr-defined]
    del state["1.num_batches_tracked"]
    smart_load(model, state)
    assert same_values(model, source)
    assert model[1].num_batches_tracked.item() == 0  # type: ignore[index]


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.register_buffer("angles", torch.ones(3), persistent=False)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_non_persistent_buffers_on_meta_are_named(device: str | None) -> None:
    model = on_meta(Rotary)
    before = look(model)
    with pytest.raises(PlacementError, match=r"^non-persistent buffers on the meta device: angles\. "):
        smart_load(model, Rotary().state_dict(), device)
    assert look(model) == before


def test_filled_as_the_refusal_says_it_loads() -> None:
    model, source = on_meta(Rotary), Rotary()
    model.to_empty(device="cpu")
    model.angles.fill_(1)  # type: ignore[operator]
    smart_load(model, source.state_dict())
    assert same_values(model, source)


@pytest.mark.parametrize("assign", [False, True])
def test_what_may_be_missing_must_have_a_value(assign: bool) -> None:
    model, state = on_meta(), net().state_dict()
    del state["2.weight"]
    before = look(model)
    with pytest.raises(PlacementError, match=r"^on the meta device and not in the file: 2\.weight\. There is no value"):
        smart_load(model, state, allow_missing=["2.*"], assign=assign)
    with pytest.raises(KeyMismatchError, match=r"missing: +2\.weight"):
        smart_load(model, state, assign=assign)
    assert look(model) == before
    smart_load(net(), state, allow_missing=["2.*"])


class Lenient(nn.Linear):
    """Fills in its own value for a bias that the file does not have."""

    fills = True

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *rest: object) -> None:
        if self.fills:
            state_dict.setdefault(prefix + "bias", torch.full((2,), 7.0))
        missing = rest[2]
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[arg-type]
        assert isinstance(missing, list)
        missing[:] = [key for key in missing if key != prefix + "bias"]


def test_what_the_models_own_code_fills_is_taken() -> None:
    model = Lenient(2, 2, device="meta")
    smart_load(model, {"weight": torch.ones(2, 2)})
    assert model.bias.tolist() == [7, 7]


def test_what_no_code_fills_is_refused() -> None:
    model = Lenient(2, 2, device="meta")
    model.fills = False
    before = look(model)
    with pytest.raises(PlacementError, match=r"^on the meta device and not in the file: bias\. "):
        smart_load(model, {"weight": torch.ones(2, 2)})
    assert look(model) == before


@pytest.mark.parametrize("form", ["file", "memory"])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_after_a_failure_all_is_on_meta_in_the_same_objects(form: str, device: str | None) -> None:
    model, state = on_meta(), net().state_dict()
    optimizer = torch.optim.SGD(model.parameters())

    def fail(*args: object) -> None:
        assert devices(model) == {"cpu"}
        raise ValueError("no")

    model.register_load_state_dict_post_hook(fail)
    before = look(model)
    with pytest.raises(SmartLoadError):
        smart_load(model, saved(state) if form == "file" else state, device)
    assert look(model) == before
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], model.parameters()))


@pytest.mark.parametrize("fails", [False, True])
def test_a_weak_reference_costs_the_object_and_the_report_says_so(fails: bool) -> None:
    model, source = on_meta(), net()
    held = weakref.ref(model[0].weight)  # type: ignore[index]
    before = look(model)
    if fails:
        model[2].register_load_state_dict_post_hook(lambda *_: [][0])  # type: ignore[index]
        with pytest.raises(SmartLoadError):
            smart_load(model, source.state_dict())
        assert look(model) == before
        return
    report = smart_load(model, source.state_dict())
    assert same_values(model, source)
    assert held() is not model[0].weight  # type: ignore[index]
    assert report.notes == ("new Parameter objects for 0.weight: rebuild optimizers made before this call",)


def test_a_lazy_layer_on_meta_is_made_real() -> None:
    model, source = nn.LazyLinear(2, device="meta"), nn.Linear(3, 2)
    smart_load(model, source.state_dict())
    assert devices(model) == {"cpu"}
    assert same_values(model, source)


def test_no_tensor_of_the_file_may_be_on_meta() -> None:
    model, source = on_meta(), net()
    model_state = {**source.state_dict(), "0.bias": torch.empty(3, device="meta")}
    before = look(model)
    for file in (model_state, saved(model_state)):
        assert isinstance(file, (dict, BytesIO))
        with pytest.raises(SmartLoadError, match=r"0\.bias"):
            smart_load(model, file)
    assert look(model) == before


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel], ids=["plain", "DataParallel"])
def test_a_state_dict_on_meta_leaves_a_model_on_meta_as_torch_does(
    assign: bool, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    state = on_meta().state_dict()
    plain, smart = on_meta(), wrap(on_meta())
    plain.load_state_dict(state, assign=assign)
    before = objects(smart)
    with torch.device("meta") if assign else nullcontext():
        report = smart_load(smart, state, assign=assign)
    assert devices(smart) == {"meta"} == devices(plain)
    assert (objects(smart) == before) is not assign
    assert (report.device, report.nbytes) == ("meta", 0)


@pytest.mark.parametrize("how", ["a device", "a device, assign", "values for some"])
def test_a_state_dict_on_meta_cannot_give_values(how: str) -> None:
    state, model = on_meta().state_dict(), on_meta()
    if how == "values for some":
        state["0.weight"] = torch.ones(3, 4)
    before = look(model)
    with pytest.raises(PlacementError, match=r"on the meta device in the state dict, too.*0\.*.*bias"):
        smart_load(model, state, None if how == "values for some" else "cpu", assign=how == "a device, assign")
    assert look(model) == before
