"""Real wrappers of torch, end to end: what one of them saved loads into any other, bit for bit."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from dtypes import DTYPES, dtype
from systems import loopback
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

from smartload import AmbiguousKeysError, KeyMismatchError, ShapeMismatchError, smart_load

Make = Callable[[nn.Module], nn.Module]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.submodule = nn.Linear(6, 6)
        self.module = nn.Linear(6, 2)  # a real child of this name
        self.register_buffer("scale", torch.rand(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.module(self.submodule(self.body(x)))
        return result


class Plain(Net):
    """Without a child whose name could be a wrapper's."""

    def __init__(self) -> None:
        super().__init__()
        self.head = self.module
        del self.module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.submodule(self.body(x)))
        return result


class Under(nn.Module):
    """Holds the network under a name, as Lightning, Fabric, Opacus and people do."""

    def __init__(self, name: str, net: nn.Module) -> None:
        super().__init__()
        self.add_module(name, net)


def under(name: str) -> Make:
    return lambda net: Under(name, net)


def inside(wrap: Make) -> Make:
    def make(net: nn.Module) -> nn.Module:
        net.body = wrap(net.body)
        return net

    return make


def ddp(net: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(net)


def compiled(net: nn.Module) -> nn.Module:
    return torch.compile(net)  # type: ignore[return-value]


WRAPPED: dict[str, Make] = {
    "plain": lambda net: net,
    "DataParallel": nn.DataParallel,
    "DataParallel twice": lambda net: nn.DataParallel(nn.DataParallel(net)),
    "DDP": ddp,
    "compile": compiled,
    "DataParallel of compile": lambda net: nn.DataParallel(compiled(net)),
    "compile of DataParallel": lambda net: compiled(nn.DataParallel(net)),
    "DDP of compile": lambda net: ddp(compiled(net)),
    "compile of DDP": lambda net: compiled(ddp(net)),
    "compile inside": inside(compiled),
    "DataParallel inside": inside(nn.DataParallel),
    "compile of compile inside": lambda net: compiled(inside(compiled)(net)),
    "checkpoint wrapper": checkpoint_wrapper,
    "checkpoint wrapper inside": inside(checkpoint_wrapper),
    "DDP of checkpoint wrapper": lambda net: ddp(checkpoint_wrapper(net)),
    "AveragedModel": AveragedModel,
    "AveragedModel of DataParallel": lambda net: AveragedModel(nn.DataParallel(net)),
    "AveragedModel of compile": lambda net: AveragedModel(compiled(net)),
    "Lightning": under("model"),
    "Lightning, compiled inside": lambda net: Under("model", compiled(net)),
    "Fabric": under("_forward_module"),
    "Opacus": under("_module"),
    "FSDP": under("_fsdp_wrapped_module"),
    "FSDP, old": under("_fpw_module"),
    "backbone": under("backbone"),
}
OWN_PREFIX = ("Lightning", "Lightning, compiled inside", "Fabric", "Opacus", "FSDP", "FSDP, old", "backbone")


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback())
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    torch.distributed.destroy_process_group()


def trained(kind: type[nn.Module]) -> nn.Module:
    net = kind()
    for tensor in [*net.parameters(), *net.buffers()]:
        tensor.data.copy_(torch.rand(tensor.shape) * 100)
    return net


def plain_values(net: nn.Module, reference: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors inside any wrapper, by the names of the network."""
    skip = [name for name, _ in net.named_buffers() if name.endswith("n_averaged")]
    named = [*net.named_parameters(), *((n, b) for n, b in net.named_buffers() if n not in skip)]
    own = [name for name, _ in [*reference.named_parameters(), *reference.named_buffers()]]
    assert len(named) == len(own)
    return {name: tensor.detach().clone() for name, (_, tensor) in zip(own, named)}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("kind", [Plain, Net])
@pytest.mark.parametrize("written", WRAPPED)
def test_whatever_wrote_it_loads_into_the_plain_network(written: str, kind: type[nn.Module], tmp_path: Path) -> None:
    source = trained(kind)
    expected = plain_values(source, source)
    torch.save({"epoch": 1, "state_dict": WRAPPED[written](source).state_dict()}, tmp_path / "c.pt")
    net = kind()
    report = smart_load(net, tmp_path / "c.pt")
    assert same(plain_values(net, net), expected)
    assert report.plan.part == "state_dict"


@pytest.mark.parametrize("kind", [Plain, Net])
@pytest.mark.parametrize("into", WRAPPED)
def test_a_plain_file_loads_into_whatever_wraps_the_network(into: str, kind: type[nn.Module]) -> None:
    source = trained(kind)
    net = WRAPPED[into](kind())
    smart_load(net, source.state_dict())
    assert same(plain_values(net, source), plain_values(source, source))


@pytest.mark.parametrize(
    "into", ["DataParallel", "compile of DDP", "checkpoint wrapper inside", "AveragedModel", "Lightning"]
)
@pytest.mark.parametrize("written", [name for name in WRAPPED if name not in OWN_PREFIX])
def test_any_wrapper_into_any_other(written: str, into: str) -> None:
    source = trained(Plain)
    expected = plain_values(source, source)
    state = WRAPPED[written](source).state_dict()
    net = WRAPPED[into](Plain())
    smart_load(net, state)
    assert same(plain_values(net, Plain()), expected)


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_what_it_wrote_itself_it_loads_like_torch(wrapper: str) -> None:
    for kind in (Plain, Net):
        state = WRAPPED[wrapper](trained(kind)).state_dict()
        ours, theirs = WRAPPED[wrapper](kind()), WRAPPED[wrapper](kind())
        theirs.load_state_dict(state)
        report = smart_load(ours, state)
        assert same(dict(ours.state_dict()), dict(theirs.state_dict()))
        assert report.plan.rule == ""


def test_the_count_of_averages_is_loaded_where_both_have_it() -> None:
    source = AveragedModel(trained(Plain))
    source.n_averaged.fill_(7)
    net = AveragedModel(Plain())
    smart_load(
        net,
        {f"module.{key}" if key != "n_averaged" else key: v for key, v in source.state_dict().items()},
        rename={"module.module": "module"},
    )
    assert net.n_averaged.item() == 7
    net = AveragedModel(Plain())
    net.n_averaged.fill_(3)
    report = smart_load(net, source.module.state_dict())
    assert net.n_averaged.item() == 3
    assert "kept:      n_averaged: bookkeeping of AveragedModel" in str(report)


def test_one_dict_for_each_child() -> None:
    source = trained(Plain)
    optimizer = torch.optim.Adam(source.parameters())
    parts = {name: nn.DataParallel(child).state_dict() for name, child in source.named_children()}
    net = Plain()
    with pytest.raises(KeyMismatchError, match="missing:    scale"):
        smart_load(net, parts)
    report = smart_load(net, {**parts, "optimizer": optimizer.state_dict()}, allow_missing=["scale"])
    assert report.missing_keys == ["scale"]
    assert torch.equal(net.head.weight, source.head.weight)
    assert torch.equal(net.body[1].running_var, source.body[1].running_var)


def test_raw_beside_averaged_weights() -> None:
    raw, averaged = trained(Plain), trained(Plain)
    file = {"model": nn.DataParallel(raw).state_dict(), "ema": AveragedModel(averaged).state_dict()}
    net = Plain()
    before = plain_values(net, net)
    with pytest.raises(AmbiguousKeysError, match=r"(?s)write select='model'.*write select='ema'"):
        smart_load(net, file)
    assert same(plain_values(net, net), before)
    for part, source in (("model", raw), ("ema", averaged)):
        smart_load(net, file, select=part)
        assert same(plain_values(net, net), plain_values(source, source))
    smart_load(net, {"model": raw.state_dict(), "ema": copy.deepcopy(raw.state_dict())})
    assert same(plain_values(net, net), plain_values(raw, raw))


OLD = {
    "plain": "",
    "DataParallel": "module.",
    "a prefix": "net.",
    "both": "module.net.",
}


@pytest.mark.parametrize("prefix", OLD.values(), ids=OLD)
@pytest.mark.parametrize("container", [None, "state_dict"])
def test_batch_norm_of_before_it_counted(prefix: str, container: str | None, tmp_path: Path) -> None:
    source = trained(Plain)
    state = {prefix + key: v for key, v in source.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(state if container is None else {container: state}, tmp_path / "old.pt")
    for wrap in ("plain", "DataParallel"):
        net = WRAPPED[wrap](Plain())
        report = smart_load(net, tmp_path / "old.pt")
        loaded, expected = plain_values(net, source), plain_values(source, source)
        counters = [key for key in expected if key.endswith("num_batches_tracked")]
        assert all(torch.equal(loaded[key], expected[key]) for key in expected if key not in counters)
        assert "the model's own loading code handles " in str(report)


@pytest.mark.parametrize("prefix", OLD.values(), ids=OLD)
@pytest.mark.parametrize("container", [None, "state_dict"])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_weight_norm_of_before_parametrizations(prefix: str, container: str | None) -> None:
    source = nn.ModuleDict({"fc": nn.utils.weight_norm(nn.Linear(3, 4)), "out": nn.Linear(4, 1)})
    net = nn.ModuleDict({"fc": parametrizations.weight_norm(nn.Linear(3, 4)), "out": nn.Linear(4, 1)})
    state = {prefix + key: value for key, value in source.state_dict().items()}
    smart_load(net, state if container is None else {container: state})
    assert torch.equal(net["fc"].parametrizations.weight.original0, source["fc"].weight_g)
    assert torch.equal(net["fc"].parametrizations.weight.original1, source["fc"].weight_v)
    assert torch.equal(net["out"].weight, source["out"].weight)


class Versioned(nn.Module):
    """A module that migrates what an older version of it wrote."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def _load_from_state_dict(  # type: ignore[override]
        self, state_dict: dict[str, torch.Tensor], prefix: str, metadata: dict[str, int], *rest: object
    ) -> None:
        if metadata.get("version", 1) < 2:
            state_dict[prefix + "weight"] = state_dict[prefix + "weight"] * 10
        super()._load_from_state_dict(state_dict, prefix, metadata, *rest)  # type: ignore[arg-type]


WRITTEN = ["plain", "DataParallel", "compile of DataParallel", "AveragedModel", "backbone"]
INTO = ["plain", "DataParallel", "Lightning"]
PAIRS = [
    (w, i) for w in WRITTEN for i in INTO if (w, i) != ("backbone", "Lightning")
]  # one prefix for another: a rename


@pytest.mark.parametrize(("written", "into"), PAIRS)
@pytest.mark.parametrize("container", [None, "state_dict"])
def test_versions_are_spelled_along_with_the_keys(
    written: str, into: str, container: str | None, tmp_path: Path
) -> None:
    source = nn.Sequential(nn.Sequential(Versioned()))
    source[0][0].weight.data.fill_(2.0)
    state = WRAPPED[written](source).state_dict()
    torch.save(state if container is None else {container: state}, tmp_path / "v.pt")
    target = nn.Sequential(nn.Sequential(Versioned()))
    net = WRAPPED[into](target)
    inner = next(module for module in net.modules() if isinstance(module, Versioned))
    smart_load(net, tmp_path / "v.pt")
    assert inner.weight.tolist() == [2.0, 2.0, 2.0]


def test_a_hook_that_renames_is_asked() -> None:
    net = Plain()

    def renames(module: nn.Module, state: dict[str, torch.Tensor], *rest: object) -> None:
        for key in [key for key in state if key.startswith("classifier.")]:
            state["head." + key.removeprefix("classifier.")] = state.pop(key)

    net.register_load_state_dict_pre_hook(renames)
    source = trained(Plain)
    state = {key.replace("head.", "classifier."): value for key, value in source.state_dict().items()}
    for prefix in ("", "module."):
        smart_load(net, {prefix + key: value for key, value in state.items()})
        assert same(plain_values(net, net), plain_values(source, source))


def test_only_shapes_are_told_where_only_shapes_are_wrong() -> None:
    state = {f"module.{k}": v for k, v in Plain().state_dict().items() if not k.endswith("num_batches_tracked")}
    state["module.head.weight"] = torch.ones(9, 6)
    with pytest.raises(ShapeMismatchError) as caught:
        smart_load(Plain(), state)
    assert "missing" not in str(caught.value)
    assert "head.weight [9, 6] in the file, [2, 6] in the model" in str(caught.value)


def test_a_tied_model_and_a_file_with_one_name_or_both() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.out.weight = self.embed.weight

    value = torch.rand(5, 3)
    for names in (["embed.weight"], ["out.weight"], ["embed.weight", "out.weight"]):
        for prefix in ("", "module.", "net."):
            net = nn.DataParallel(Tied())
            smart_load(net, {prefix + name: value.clone() for name in names})
            assert torch.equal(net.module.embed.weight, value)
            assert net.module.out.weight is net.module.embed.weight
    net = Tied()
    before = net.embed.weight.clone()
    with pytest.raises(AmbiguousKeysError):
        smart_load(net, {"embed.weight": value, "out.weight": value + 1})
    assert torch.equal(net.embed.weight, before)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.filterwarnings("ignore:B?Complex(Half|32) support")
def test_a_buffer_that_is_never_saved_may_be_in_the_file(name: str) -> None:
    ids, other = (torch.tensor(values).to(dtype(name)) for values in ([1.0, 1.0], [1.0, 0.0]))

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.register_buffer("ids", ids.clone(), persistent=False)

    source = Positions()
    state = {f"module.{key}": value for key, value in source.fc.state_dict(prefix="fc.").items()}
    report = smart_load(Positions(), state | {"module.ids": ids})
    assert "equal to the model's non-persistent buffer 'ids'" in str(report)
    with pytest.raises(KeyMismatchError, match="unexpected: ids"):
        smart_load(Positions(), state | {"module.ids": other})


@pytest.mark.parametrize(
    "odd",
    [torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.complex64).conj(), torch.ones(2, device="meta")],
    ids=["sparse", "conjugated", "meta"],
)
def test_a_tensor_that_cannot_be_read_is_a_tensor_too_many(odd: torch.Tensor, tmp_path: Path) -> None:
    """It is no value beside the weights that may be passed over."""
    net = nn.Linear(2, 2)
    torch.save(net.state_dict() | {"odd": odd}, tmp_path / "odd.pt")
    with pytest.raises(KeyMismatchError, match="unexpected: odd"):
        smart_load(nn.Linear(2, 2), tmp_path / "odd.pt")
    report = smart_load(nn.Linear(2, 2), tmp_path / "odd.pt", allow_unexpected=["odd"])
    assert report.unexpected_keys == ["odd"]
    assert "no state dict names" not in str(report)
