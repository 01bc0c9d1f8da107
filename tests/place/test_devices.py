"""Where tensors are to land: what is decided for each `device`, and the words of every refusal."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_devices import fake_cuda
from torch import nn

from smartload import PlacementError, smart_load
from smartload.place.devices import Device, default_device, place
from smartload.place.survey import survey
from smartload.records.report import KeyPlan
from smartload.records.requests import Placement

ANYWHERE = "The checkpoint itself loads anywhere: leave device out to load into the model where it is (cpu)."


class Net(nn.Module):
    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2, device=device)
        self.register_buffer("seen", torch.zeros(2, device=device))


def placed(model: nn.Module, device: Device = None, assign: bool = False, **plan: Any) -> Placement:
    found = survey(model)
    keys = {key: key for key in found.tensors if key not in plan.get("missing_keys", ())}
    names = {"model": "Net", "path": "", "part": "", "rule": "", "pairs": keys, "wanted": len(keys)}
    return place(found, device, KeyPlan(**{**names, **plan}), assign, {})


def refused(model: nn.Module, device: Device = None, **plan: Any) -> str:
    with pytest.raises(PlacementError) as caught:
        placed(model, device, **plan)
    assert isinstance(caught.value, ValueError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu"), torch.device("cpu", 0)])
def test_every_spelling_of_the_cpu_is_one_device(cuda2: object, device: Device) -> None:
    assert placed(Net(), device) == Placement("cpu")
    assert placed(Net().to("cuda:1"), device) == Placement("cpu", (("", "cpu"),))


@pytest.mark.parametrize("device", [1, "cuda:1", torch.device("cuda:1"), torch.device("cuda", 1)])
def test_every_spelling_of_a_device_is_one_device(cuda2: object, device: Device) -> None:
    assert placed(Net(), device) == Placement("cuda:1", (("", "cuda:1"),))
    assert placed(Net().to("cuda:1"), device) == Placement("cuda:1")


@pytest.mark.parametrize("device", [0, "cuda", torch.device("cuda")])
def test_cuda_without_an_index_is_the_current_device(cuda2: object, device: Device) -> None:
    assert placed(Net(), device).device == "cuda:0"


def test_one_tensor_elsewhere_is_enough_to_move(cuda2: object) -> None:
    model = Net().to("cuda:0")
    model.seen = model.seen.cpu()
    assert placed(model, 0).moves == (("", "cuda:0"),)
    assert placed(model).moves == ()


@pytest.mark.parametrize("ids", [[0, 1], [1, 0]])
def test_a_data_parallel_is_brought_to_its_first_device(cuda2: object, ids: list[int]) -> None:
    home = f"cuda:{ids[0]}"
    model = nn.Sequential(OrderedDict(head=nn.Linear(2, 2), body=nn.DataParallel(Net(), device_ids=ids)))
    assert placed(model) == Placement(None, (("body", home),))
    for given in (None, ids, tuple(ids), [f"cuda:{i}" for i in ids]):
        assert placed(model.body, given) == Placement(None, (("", home),))
    assert placed(model, home) == Placement(home, (("", home),))
    assert placed(model.body.to(home), ids) == Placement(None)


def test_a_list_is_for_the_data_parallel_inside_other_wrappers_too(cuda2: object) -> None:
    compiled = torch.compile(nn.DataParallel(Net(), device_ids=[0, 1]))
    assert isinstance(compiled, nn.Module)
    assert placed(compiled, [0, 1]).moves == (("_orig_mod", "cuda:0"),)


def test_meta_tensors_get_the_device_asked_for(cuda2: object) -> None:
    keys = ("fc.weight", "fc.bias", "seen")
    assert placed(Net("meta")) == Placement(None, (), dict.fromkeys(keys, "cpu"))
    assert placed(Net("meta"), 1) == Placement("cuda:1", (), dict.fromkeys(keys, "cuda:1"))
    with torch.device("cuda:0"):
        assert placed(Net("meta")).new == dict.fromkeys(keys, "cuda:0")
    parallel = nn.DataParallel(Net("meta"), device_ids=[1, 0])
    assert placed(parallel).new == {f"module.{key}": "cuda:1" for key in keys}


def test_the_default_device_is_that_of_a_new_tensor() -> None:
    assert default_device() == torch.device("cpu")
    with torch.device("meta"):
        assert default_device() == torch.device("meta")
    torch.set_default_device("meta")
    assert default_device() == torch.device("meta")
    torch.set_default_device(None)
    assert default_device() == torch.device("cpu")
    assert placed(Net("meta")).new == dict.fromkeys(("fc.weight", "fc.bias", "seen"), "cpu")


def test_what_is_assigned_lands_where_it_is_asked_to(cuda2: object) -> None:
    keys = ("fc.weight", "fc.bias", "seen")
    assert placed(Net(), assign=True) == placed(Net("meta"), assign=True) == Placement(None)
    assert placed(Net(), 1, assign=True) == Placement("cuda:1", (("", "cuda:1"),), dict.fromkeys(keys, "cuda:1"))
    parallel = nn.DataParallel(Net(), device_ids=[1, 0])
    assert placed(parallel, assign=True).new == {f"module.{key}": "cuda:1" for key in keys}


@pytest.mark.parametrize("device", [True, False, 1.5, b"cuda", {"": 0}, [True], [[0]], [None]])
def test_what_names_no_device_is_a_type_error(cuda2: object, device: Any) -> None:
    with pytest.raises(TypeError, match=r"^device must be None, a device, a string, an int or a list of these, not "):
        placed(Net(), device)


def test_an_empty_list_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"^device=\[\] names no device: leave device out, or name one$"):
        placed(Net(), [])


@pytest.mark.parametrize(
    ("device", "shown"), [("cuda:1", "'cuda:1'"), (torch.device("cuda:1"), "'cuda:1'"), (1, "1"), ([1, 0], "1")]
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_without_cuda_the_refusal_says_so(device: Device, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    why = f"torch.cuda.is_available() is False (torch {torch.__version__} is a build without CUDA)"
    assert refused(Net(), device) == f"device={shown} was asked for, but {why}. {ANYWHERE}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_build_with_cuda_but_without_a_driver_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert f"(torch {torch.__version__} finds no driver or no device)" in refused(Net(), "cuda")


@pytest.mark.parametrize("kind", ["mps", "xpu", "xla", "hpu", "mtia", "vulkan"])
def test_a_kind_of_device_that_is_not_here(kind: str) -> None:
    if getattr(getattr(torch, kind, None), "device_count", int)() > 0:  # some releases say -1 of mtia
        pytest.skip(f"this machine has {kind}")
    why = f"torch {torch.__version__} finds no {kind} device on this machine"
    assert refused(Net(), f"{kind}:3") == f"device='{kind}:3' was asked for, but {why}. {ANYWHERE}"


def test_too_high_an_index_names_what_is_there(cuda2: object) -> None:
    there = "this machine has 2 cuda devices (cuda:0 to cuda:1)"
    assert refused(Net(), 2) == f"device=2 was asked for, but {there}. {ANYWHERE}"
    spread = nn.Sequential(Net().to("cuda:1"), Net(), nn.Linear(2, 2).to("cuda:0"), Net("meta"))
    assert refused(spread, "cuda:7").endswith("to load into the model where it is (cpu, cuda:0, cuda:1).")


def test_one_device_is_counted_as_one() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with fake_cuda(1):
        expected = f"device='cuda:1' was asked for, but this machine has 1 cuda device (cuda:0). {ANYWHERE}"
        assert refused(Net(), "cuda:1") == expected


@pytest.mark.parametrize(
    ("device", "why"),
    [
        (-1, "-1 is not a device that torch knows: Device index must not be negative"),
        ("cuda:-1", "'cuda:-1' is not a device that torch knows: Invalid device string: 'cuda:-1'"),
        ("gpu", "'gpu' is not a device that torch knows: Expected one of cpu, cuda, "),
        ("npu:0", "'npu:0' is not a device that torch knows: Expected one of cpu, cuda, "),
    ],
)
def test_what_torch_does_not_know(device: Device, why: str) -> None:
    assert refused(Net(), device).startswith(f"device={why}")


@pytest.mark.parametrize("device", ["meta", "meta:0", torch.device("meta")])
def test_meta_holds_no_data(device: Device) -> None:
    expected = "the meta device holds no data. Build the model there, and pass the device that its tensors shall be on."
    assert refused(Net(), device) == refused(Net("meta"), device) == expected


def test_a_meta_model_in_a_meta_context_needs_a_device() -> None:
    with torch.device("meta"):
        assert refused(Net()) == refused(Net(), "meta")
        assert placed(Net(), "cpu").new["fc.weight"] == "cpu"


def test_a_data_parallel_on_another_device(cuda2: object) -> None:
    model = nn.Sequential(OrderedDict(body=nn.DataParallel(Net(), device_ids=[0, 1])))
    needs = "which needs its parameters on cuda:0"
    words = f"is a DataParallel over cuda:0, cuda:1, {needs}. Leave device out, or use the network without DataParallel"
    assert refused(model.body, "cuda:1") == f"device='cuda:1', but the model {words} on another device."
    assert refused(model, "cpu") == f"device='cpu', but the module 'body' {words} on another device."


def test_a_list_for_a_model_that_is_no_data_parallel(cuda2: object) -> None:
    expected = (
        "device={0} names several devices, but the model is not a DataParallel (Net). Pass one device, or wrap it: "
        "torch.nn.DataParallel(model, device_ids={0}), then smart_load(that, path)."
    )
    assert refused(Net(), [0, 1]) == expected.format("[0, 1]")
    assert refused(Net(), (0, torch.device("cuda:1"))) == expected.format("[0, 'cuda:1']")


@pytest.mark.parametrize("device", [[0, 1], [1], [1, 0, 1], ["cuda:0"], ["cpu", "cpu"]])
def test_a_list_that_is_not_the_data_parallels(cuda2: object, device: Device) -> None:
    built = "this DataParallel was built for [1, 0]. Leave device out, or wrap the network anew."
    assert refused(nn.DataParallel(Net(), device_ids=[1, 0]), device) == f"device={device}, but {built}"


def dispatched(model: Net) -> nn.Module:
    model.hf_device_map = {"fc": 0, "seen": "cpu"}  # type: ignore[assignment]
    return model


def bound(model: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(body=model))


@pytest.mark.parametrize("wrap", [lambda model: model, bound])
def test_what_accelerate_has_dispatched_is_not_moved(cuda2: object, wrap: Callable[[nn.Module], nn.Module]) -> None:
    assert refused(wrap(dispatched(Net())), "cuda:1") == (
        "device='cuda:1' cannot move this model: it is dispatched over cuda:0, cpu (hf_device_map). "
        "Leave device out; every tensor is loaded where its parameter is."
    )
    assert placed(wrap(dispatched(Net()))).moves == ()


def test_what_lies_on_one_device_may_move(cuda2: object) -> None:
    model = Net()
    model.hf_device_map = {"": "cpu"}  # type: ignore[assignment]
    assert placed(model, "cuda:1").moves == (("", "cuda:1"),)


def test_offloaded_tensors_are_refused() -> None:
    model = Net()
    model.fc = nn.Linear(3, 2, device="meta")
    model.fc._hf_hook = object()  # type: ignore[assignment]
    expected = (
        "offloaded by accelerate (meta tensors with hooks): fc.weight, fc.bias. Load the weights first, then dispatch."
    )
    for assign in (False, True):
        assert refused(model, assign=assign) == refused(model, "cpu", assign=assign) == expected


def test_hooks_without_offloading_are_no_reason() -> None:
    model = Net()
    model.fc._hf_hook = object()  # type: ignore[assignment]
    assert placed(model) == Placement(None)


class Rotary(nn.Module):
    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2, device=device)
        self.register_buffer("angles", torch.ones(3, device=device), persistent=False)


def test_non_persistent_buffers_on_meta_are_named() -> None:
    expected = (
        "non-persistent buffers on the meta device: 0.angles. No checkpoint holds them. Build the model with real "
        "buffers, or fill them after model.to_empty(device=...), then load."
    )
    model = nn.Sequential(Rotary("meta"), Rotary())
    assert refused(model) == refused(model, "cpu") == refused(model, "cpu", assign=True) == expected


def test_non_persistent_buffers_on_meta_stay_where_torch_would_leave_them() -> None:
    model = Rotary()
    model.angles = model.angles.to("meta")
    assert placed(model) == Placement(None)
    assert placed(Rotary("meta"), assign=True) == Placement(None)


@pytest.mark.parametrize("assign", [False, True])
def test_what_is_on_meta_must_be_in_the_file(assign: bool) -> None:
    expected = (
        "on the meta device and not in the file: fc.weight, fc.bias. There is no value to keep. "
        "Build the model on a real device, or give a file that holds them."
    )
    allowed = {"missing_keys": ("fc.weight", "fc.bias"), "assign": assign}
    assert refused(Net("meta"), **allowed) == refused(Net("meta"), rehearsed=True, **allowed) == expected
    assert placed(Net(), **allowed) == Placement(None)


def test_looking_changes_nothing(cuda2: object) -> None:
    model = nn.DataParallel(Net(), device_ids=[1, 0])
    before = copy.deepcopy(model.state_dict())
    placed(model)
    with pytest.raises(PlacementError):
        smart_load(model, before, "cuda:0")
    assert all(torch.equal(value, before[key]) and value.is_cpu for key, value in model.state_dict().items())


def without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every device but the CPU as those of Apple are."""
    real = torch.Tensor.to

    def to(self: torch.Tensor, *where: Any, **settings: Any) -> torch.Tensor:
        moves = where and isinstance(where[0], (str, torch.device)) and torch.device(where[0]).type != "cpu"
        if moves and self.dtype in (torch.float64, torch.complex128):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as MPS doesn't support float64.")
        return real(self, *where, **settings)

    monkeypatch.setattr(torch.Tensor, "to", to)


def test_a_dtype_that_the_device_lacks_is_refused_before_anything_moves(
    cuda2: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    before = copy.deepcopy(model.state_dict())
    without_float64(monkeypatch)
    with pytest.raises(PlacementError) as caught:
        smart_load(model, {key: value + 1 for key, value in before.items()}, "cuda:1")
    assert str(caught.value) == (
        "cuda:1 holds no torch.float64, the dtype of 1.weight, 1.bias in the model. "
        "Convert the model first: model.float()."
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(value.device.type == "cpu" for value in model.state_dict().values())
    smart_load(model.float(), before, "cuda:1")  # what the message says
    assert model[1].weight.device == torch.device("cuda:1")
    assert torch.equal(model[1].weight.cpu().double(), before["1.weight"])


def test_a_dtype_that_assign_would_bring_is_refused_as_well(cuda2: object, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    state = {key: value.double() for key, value in model.state_dict().items()}
    without_float64(monkeypatch)
    with pytest.raises(
        PlacementError, match=r"weight, bias in the file\. Leave assign out, and the model keeps its own"
    ):
        smart_load(model, state, "cuda:1", assign=True)
    assert model.weight.dtype == torch.float32
    assert model.weight.is_cpu
    smart_load(model, state, "cuda:1")
    assert model.weight.device == torch.device("cuda:1")


def test_a_model_of_a_dtype_that_the_device_lacks_is_not_made_there_from_meta(
    cuda2: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(2, 2, device="meta", dtype=torch.complex128)
    without_float64(monkeypatch)
    with pytest.raises(
        PlacementError, match=r"holds no torch\.complex128, .* in the model\. Give them another dtype in"
    ):
        smart_load(model, nn.Linear(2, 2, dtype=torch.complex128).state_dict(), "cuda:1")
    assert model.weight.is_meta


def test_the_models_own_dtype_is_to_blame_with_assign_too(cuda2: object, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2).double()
    without_float64(monkeypatch)
    with pytest.raises(
        PlacementError, match=r"weight, bias in the model\. Convert the model first: model\.float\(\)\."
    ):
        smart_load(model, nn.Linear(2, 2).state_dict(), "cuda:1", assign=True)
    assert model.weight.is_cpu


def test_a_device_that_takes_nothing_is_not_said_to_lack_a_dtype(
    cuda2: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.Tensor.to

    def to(self: torch.Tensor, *where: Any, **settings: Any) -> torch.Tensor:
        if where and str(where[0]) == "cuda:1":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, *where, **settings)

    model = nn.Linear(2, 2)
    monkeypatch.setattr(torch.Tensor, "to", to)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        smart_load(model, nn.Linear(2, 2).state_dict(), "cuda:1")
    assert isinstance(caught.value, PlacementError)
    assert "CUDA out of memory" in str(caught.value)
    assert model.weight.is_cpu
