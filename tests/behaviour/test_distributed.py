"""Models that torch.distributed wraps and shards: every rank loads its share of the full checkpoint, or all refuse."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from placing import look, same_values
from systems import leave_group, loopback
from tagging import saved
from torch import nn

from smartload import KeyMismatchError, PlacementError, SmartLoadError, check, smart_load

if not torch.distributed.is_available():
    pytest.skip("torch without torch.distributed", allow_module_level=True)

import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

CPU = torch.device("cpu")
quiet = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # torch's, of its own older parts


def net() -> nn.Sequential:
    """Five rows over two ranks: uneven shards."""
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 5))


def source() -> nn.Sequential:
    torch.manual_seed(7)
    model = net()
    model(torch.randn(8, 4))  # so that the statistics of the BatchNorm are not those of a new one
    return model


def ddp(mesh: DeviceMesh) -> nn.Module:
    return nn.parallel.DistributedDataParallel(net())


def fsdp2(mesh: DeviceMesh) -> nn.Module:
    model = net()
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def fsdp2_on_meta(mesh: DeviceMesh) -> nn.Module:
    with torch.device("meta"):
        model = net()
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def fsdp2_compiled(mesh: DeviceMesh) -> nn.Module:
    model = torch.compile(fsdp2(mesh))
    assert isinstance(model, nn.Module)
    return model


def tensor_parallel(mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(net(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def fsdp1(mesh: DeviceMesh) -> nn.Module:
    return FullyShardedDataParallel(net(), device_id=CPU)


def fsdp1_with_names(mesh: DeviceMesh) -> nn.Module:
    return FullyShardedDataParallel(net(), device_id=CPU, use_orig_params=True)


def fsdp1_nested(mesh: DeviceMesh) -> nn.Module:
    model = net()
    model[0] = FullyShardedDataParallel(model[0], device_id=CPU)
    return FullyShardedDataParallel(model, device_id=CPU)


def fsdp1_set_to_shards(mesh: DeviceMesh) -> nn.Module:
    model = fsdp1(mesh)
    FullyShardedDataParallel.set_state_dict_type(model, StateDictType.SHARDED_STATE_DICT)
    return model


def fsdp1_set_to_rank0(mesh: DeviceMesh) -> nn.Module:
    model = fsdp1(mesh)
    config = FullStateDictConfig(rank0_only=True)
    FullyShardedDataParallel.set_state_dict_type(model, StateDictType.FULL_STATE_DICT, config)
    return model


FLAT = [fsdp1, fsdp1_with_names, fsdp1_nested, fsdp1_set_to_shards, fsdp1_set_to_rank0]
SHARDED = [fsdp2, fsdp2_on_meta, fsdp2_compiled, tensor_parallel]
Make = Callable[[DeviceMesh], nn.Module]


def full(model: nn.Module) -> dict[str, torch.Tensor]:
    """Key by key the full tensors, under plain names."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        config = FullStateDictConfig()
        FullyShardedDataParallel.set_state_dict_type(model, StateDictType.FULL_STATE_DICT, config)
    state = model.state_dict().items()
    names = {key: key.removeprefix("module.").removeprefix("_orig_mod.") for key, _ in state}
    return {names[key]: value.full_tensor() if isinstance(value, DTensor) else value for key, value in state}


def fail(*args: object) -> None:
    raise ValueError("no")


def equal(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(state) == list(other) and all(torch.equal(state[key], other[key]) for key in other)


# ------------------------------------------------------------------------------------------- one process, real wrappers


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback())
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)  # torch has it on every system
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@quiet
@pytest.mark.parametrize("make", [ddp, *SHARDED, *FLAT])
@pytest.mark.parametrize("form", ["file", "memory"])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_full_checkpoint_fills_every_kind(mesh: DeviceMesh, make: Make, form: str, device: str | None) -> None:
    model, state = make(mesh), source().state_dict()
    before = [id(parameter) for parameter in model.parameters()]
    kinds = [type(parameter.data) for parameter in model.parameters()]
    report = smart_load(model, saved({"model": state}, "cuda:1") if form == "file" else {"model": state}, device)
    assert equal(full(model), state)
    assert [id(parameter) for parameter in model.parameters()] == before
    assert [type(parameter.data) for parameter in model.parameters()] == kinds
    assert (report.device, report.notes) == ("cpu", ())
    assert check(model, state).pairs


@quiet
@pytest.mark.parametrize("make", [fsdp2, fsdp2_on_meta, tensor_parallel])
@pytest.mark.parametrize("form", ["file", "memory"])
def test_assigned_tensors_are_sharded_like_the_models(mesh: DeviceMesh, make: Make, form: str) -> None:
    model, state = make(mesh), source().state_dict()
    kinds = [type(parameter.data) for parameter in model.parameters()]
    smart_load(model, saved(state) if form == "file" else state, assign=True)
    assert equal(full(model), state)
    assert [type(parameter.data) for parameter in model.parameters()] == kinds


@quiet
@pytest.mark.parametrize("make", [fsdp2, tensor_parallel])
def test_each_rank_cuts_its_own_share_and_nothing_is_sent(
    mesh: DeviceMesh, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send(*args: object, **kwargs: object) -> None:
        raise AssertionError("a rank would wait for the others")

    model, state = make(mesh), source().state_dict()
    for collective in ("mesh_scatter", "mesh_broadcast"):
        monkeypatch.setattr(f"torch.distributed.tensor.placement_types.{collective}", send, raising=False)
        monkeypatch.setattr(f"torch.distributed.tensor._api.{collective}", send, raising=False)
    smart_load(model, saved(state))
    with pytest.raises(AssertionError, match="would wait"):
        distribute_tensor(state["0.weight"], mesh, [Shard(0)])


@quiet
def test_a_sharded_state_dict_in_memory_is_taken_as_it_is(mesh: DeviceMesh) -> None:
    model, other = fsdp2(mesh), fsdp2(mesh)
    smart_load(model, other.state_dict())
    assert equal(full(model), full(other))


@quiet
def test_the_settings_of_fsdp_are_put_back(mesh: DeviceMesh) -> None:
    model = fsdp1_set_to_shards(mesh)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # with which torch would greet a change of these settings
        smart_load(model, source().state_dict())
    with pytest.raises(KeyMismatchError):
        smart_load(model, {"0.weight": torch.ones(6, 4)})
    kind = FullyShardedDataParallel.get_state_dict_type(model)
    assert kind.state_dict_type is StateDictType.SHARDED_STATE_DICT


BOUND = (
    "device='cuda:1' cannot move this model: it is {}. Leave device out; every tensor is loaded where its parameter is."
)


@quiet
@pytest.mark.parametrize("make", [ddp, fsdp2, tensor_parallel, fsdp1, fsdp1_nested])
def test_what_a_wrapper_has_placed_is_not_moved(mesh: DeviceMesh, make: Make, cuda2: object) -> None:
    model = make(mesh)
    before = full(model)
    with pytest.raises(PlacementError) as caught:
        smart_load(model, source().state_dict(), "cuda:1")
    how = "wrapped in DistributedDataParallel, which is bound to cpu" if make is ddp else "sharded (FSDP or DTensor)"
    assert str(caught.value) == BOUND.format(how)
    assert equal(full(model), before)


@quiet
@pytest.mark.parametrize("make", [ddp, fsdp1, fsdp1_nested])
def test_nothing_is_assigned_where_torch_would_be_wrong_in_silence(mesh: DeviceMesh, make: Make) -> None:
    why = {
        ddp: "DistributedDataParallel, which would no longer synchronise their gradients",
        fsdp1: "FullyShardedDataParallel, which keeps its own flat tensor",
    }
    model = make(mesh)
    before = full(model)
    with pytest.raises(PlacementError) as caught:
        smart_load(model, source().state_dict(), assign=True)
    expected = f"assign=True would replace tensors inside a {why.get(make, why[fsdp1])}."
    assert str(caught.value) == f"{expected} Leave assign out, or load before wrapping."
    assert equal(full(model), before)


@quiet
def test_why_nothing_is_assigned_into_fsdp(mesh: DeviceMesh) -> None:
    model, state = fsdp1(mesh), source().state_dict()
    assert str(model.load_state_dict(state, assign=True)) == "<All keys matched successfully>"
    assert not equal(full(model), state)


@quiet
@pytest.mark.parametrize("make", [ddp, fsdp2, fsdp2_on_meta, tensor_parallel, fsdp1, fsdp1_with_names])
def test_after_a_failure_all_is_as_it_was(mesh: DeviceMesh, make: Make) -> None:
    model = make(mesh)
    meta = make is fsdp2_on_meta
    before, objects = {} if meta else full(model), [id(parameter) for parameter in model.parameters()]
    handle = model.register_load_state_dict_post_hook(fail)
    with pytest.raises(SmartLoadError):
        smart_load(model, source().state_dict())
    handle.remove()
    assert [id(parameter) for parameter in model.parameters()] == objects
    if meta:
        assert all(parameter.is_meta for parameter in model.parameters())
    else:
        assert equal(full(model), before)


def test_a_module_that_is_only_called_so_is_none(mesh: DeviceMesh) -> None:
    class FullyShardedDataParallel(nn.Linear):
        pass

    model = FullyShardedDataParallel(2, 1)
    smart_load(model, nn.Linear(2, 1).state_dict(), assign=True)
    before = look(model)
    with pytest.raises(SmartLoadError):
        smart_load(model, {"weight": torch.ones(1)})
    assert look(model) == before
    assert not same_values(model, nn.Linear(2, 1))


# ------------------------------------------------------------------------------------------------------ two processes


def refused_then_loaded(model: nn.Module, what: str, folder: str, rank: int, state: dict[str, torch.Tensor]) -> None:
    objects = [id(parameter) for parameter in model.parameters()]
    # Looking at one would set it to full tensors, or needs values.
    before = {} if "_set_to_" in what or "_on_meta" in what else full(model)
    for file in ("cut.pth", f"cut{rank}.pth"):  # the same key is missing on both ranks, and another one on each
        with pytest.raises(KeyMismatchError, match="missing: "):
            smart_load(model, f"{folder}/{file}")
    handle = model.register_load_state_dict_post_hook(fail)
    with pytest.raises(SmartLoadError, match="no"):
        smart_load(model, f"{folder}/model.pth")
    handle.remove()
    assert not before or equal(full(model), before), what
    report = smart_load(model, f"{folder}/model.pth")
    assert (report.plan.part, report.notes) == ("model", ()), what
    assert equal(full(model), state), what
    assert [id(parameter) for parameter in model.parameters()] == objects, what


def on_each_rank(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback())
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=30))
    mesh = init_device_mesh("cpu", (2,))
    state = torch.load(f"{folder}/model.pth")["model"]
    for make in (ddp, *SHARDED, *FLAT):
        torch.manual_seed(rank)
        refused_then_loaded(make(mesh), make.__name__, folder, rank, state)
    leave_group()


def on_a_grid(rank: int, folder: str) -> None:
    """Two ranks times two, rows of the first Linear cut by both: torch interleaves these shards."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(f"{folder}/store", 4)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4, timeout=timedelta(seconds=30))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    parallelize_module(model, grid["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=grid["data"])
    state = torch.load(f"{folder}/model.pth")
    with CommDebugMode() as sent:
        smart_load(model, f"{folder}/model.pth")
    assert sent.get_total_counts() == 0, sent.get_comm_counts()
    assert equal(full(model), state)
    leave_group()


def test_shards_of_two_kinds_are_cut_and_nothing_is_sent(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).state_dict(), tmp_path / "model.pth")
    mp.spawn(on_a_grid, (str(tmp_path),), nprocs=4)


def test_two_processes_load_and_refuse_alike(tmp_path: Path) -> None:
    state = source().state_dict()
    torch.save({"epoch": 1, "model": state}, tmp_path / "model.pth")
    for file, lost in (("cut.pth", "2.bias"), ("cut0.pth", "0.weight"), ("cut1.pth", "2.weight")):
        torch.save({key: value for key, value in state.items() if key != lost}, tmp_path / file)
    mp.spawn(on_each_rank, (str(tmp_path),), nprocs=2)
