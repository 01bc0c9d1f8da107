"""The files on which other loaders fail, row by row: each is loaded right, or refused with the right named error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from formats import FORMATS
from tagging import saved
from torch import nn

from smartload import AmbiguousKeysError, KeyMismatchError, UnreadableError, smart_load

State = dict[str, torch.Tensor]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.Linear(3, 2)


@pytest.fixture
def source() -> Net:
    net = Net()
    for tensor in [*net.parameters(), *net.buffers()]:
        tensor.data.copy_(torch.randint(1, 1000, tensor.shape))
    return net


def equal(net: nn.Module, source: nn.Module) -> bool:
    own = [*net.parameters(), *(b for n, b in net.named_buffers() if not n.endswith("n_averaged"))]
    return all(torch.equal(a, b) for a, b in zip(own, [*source.parameters(), *source.buffers()], strict=True))


def spelled(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + key: value for key, value in state.items()}


def middle(segment: str) -> Callable[[State], State]:
    return lambda state: {key.replace("bn.", f"bn.{segment}."): value for key, value in state.items()}


PLAIN_TARGET = {
    "module.": spelled("module."),
    "_orig_mod.": spelled("_orig_mod."),
    "module._orig_mod.": spelled("module._orig_mod."),
    "_orig_mod.module.": spelled("_orig_mod.module."),
    "model.": spelled("model."),
    "net.": spelled("net."),
    "module.module.": spelled("module.module."),
    "_fsdp_wrapped_module.": spelled("_fsdp_wrapped_module."),
    "_checkpoint_wrapped_module.": spelled("_checkpoint_wrapped_module."),
    "_forward_module.": spelled("_forward_module."),
    "bn.module.": middle("module"),
    "bn._checkpoint_wrapped_module.": middle("_checkpoint_wrapped_module"),
    "AveragedModel": lambda state: {"n_averaged": torch.tensor(9)} | spelled("module.")(state),
    "Lightning with a loss buffer": lambda state: spelled("model.")(state) | {"loss.weight": torch.ones(2)},
}


@pytest.mark.parametrize("row", PLAIN_TARGET)
@pytest.mark.parametrize("container", [None, "state_dict", "model", "model_state_dict", "net", "module"])
def test_into_a_plain_network(row: str, container: str | None, source: Net, tmp_path: Path) -> None:
    state = PLAIN_TARGET[row](dict(source.state_dict()))
    torch.save(state if container is None else {"epoch": 1, container: state}, tmp_path / "c.pt")
    net = Net()
    smart_load(net, tmp_path / "c.pt")
    assert equal(net, source)


@pytest.mark.parametrize("row", PLAIN_TARGET)
def test_in_bf16_and_with_twins_of_one_shape(row: str, tmp_path: Path) -> None:
    source, net = nn.ModuleDict({name: nn.Linear(3, 3) for name in ("conv", "bn", "fc")}), None
    for value, tensor in enumerate(source.parameters()):
        tensor.data.fill_(value + 1)
    torch.save(PLAIN_TARGET[row](dict(source.bfloat16().state_dict())), tmp_path / "c.pt")
    net = nn.ModuleDict({name: nn.Linear(3, 3) for name in ("fc", "bn", "conv")})
    report = smart_load(net, tmp_path / "c.pt")
    assert all(torch.equal(net[name].weight, source[name].weight.float()) for name in source)
    assert [(cast.source, cast.target) for cast in report.casts] == [("bfloat16", "float32")]


@pytest.mark.parametrize("row", ["", "module.", "_orig_mod.", "model."])
@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.compile,
        lambda net: nn.DataParallel(torch.compile(net)),
        lambda net: torch.compile(nn.DataParallel(net)),
    ],
    ids=["DataParallel", "compile", "DataParallel(compile)", "compile(DataParallel)"],
)
def test_into_a_wrapped_network(row: str, wrap: Callable[[nn.Module], nn.Module], source: Net) -> None:
    net = wrap(Net())
    smart_load(net, spelled(row)(dict(source.state_dict())))
    assert equal(net, source)


def test_versions_of_modules_survive(source: Net) -> None:
    state = nn.DataParallel(source).state_dict()
    seen: dict[str, object] = {}
    net = Net()
    net.bn.register_load_state_dict_pre_hook(lambda module, state, prefix, metadata, *rest: seen.update(metadata))
    smart_load(net, state)
    assert seen["version"] == 2


def test_a_cuda_tag_without_an_argument(source: Net) -> None:
    net = Net()
    smart_load(net, saved(spelled("module.")(dict(source.state_dict())), "cuda:1"))
    assert equal(net, source)
    assert {tensor.device.type for tensor in net.state_dict().values()} == {"cpu"}


def test_a_whole_model(source: Net, tmp_path: Path) -> None:
    for number, whole in enumerate((source, nn.DataParallel(source), {"model": source, "epoch": 3})):
        torch.save(whole, tmp_path / f"{number}.pt")
        net = Net()
        smart_load(net, tmp_path / f"{number}.pt")
        assert equal(net, source)


FORMATS_BESIDE_TORCH = {
    "TorchScript": "torchscript",
    "safetensors named .pt": "safetensors",
    "DCP folder": "distributed checkpoint",
}


@pytest.mark.parametrize("row", FORMATS_BESIDE_TORCH)
def test_formats_beside_those_of_torch_save(row: str, source: Net, tmp_path: Path) -> None:
    net = Net()
    smart_load(net, FORMATS[FORMATS_BESIDE_TORCH[row]](source.state_dict(), tmp_path))
    assert equal(net, source)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>404</html>", "the download failed"),
    ],
    ids=["LFS pointer", "HTML page"],
)
def test_what_is_no_checkpoint(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(UnreadableError, match=words):
        smart_load(Net(), tmp_path / "c.pt")


def test_raw_and_ema_weights_both_fit(source: Net) -> None:
    file = {"state_dict": dict(source.state_dict()), "ema": {k: v + 1 for k, v in source.state_dict().items()}}
    with pytest.raises(AmbiguousKeysError, match=r"(?s)select='state_dict'.*select='ema'"):
        smart_load(Net(), file)


def test_both_names_of_one_key(source: Net) -> None:
    state = dict(source.state_dict())
    with pytest.raises(AmbiguousKeysError, match=r"2 tensors fit fc\.bias of Net"):
        smart_load(Net(), state | {"module.fc.bias": state["fc.bias"] + 1})


def test_one_key_missing_leaves_the_model_and_names_the_cure(source: Net) -> None:
    state = spelled("module.")(dict(source.state_dict()))
    del state["module.fc.bias"]
    net = Net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(KeyMismatchError) as caught:
        smart_load(net, state)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert "(after: removed 'module.')" in str(caught.value)
    assert "write allow_missing=['fc.bias']" in str(caught.value)
    assert smart_load(net, state, allow_missing=["fc.bias"]).missing_keys == ["fc.bias"]


@pytest.mark.parametrize("names", [["a.weight"], ["b.weight"], ["a.weight", "b.weight"]])
def test_a_tied_model_and_a_file_with_one_name_or_both(names: list[str]) -> None:
    net = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    net["b"].weight = net["a"].weight
    smart_load(net, {name: torch.ones(2, 2) for name in names})
    assert net["a"].weight is net["b"].weight
    assert torch.equal(net["a"].weight, torch.ones(2, 2))
