"""Whatever the format: the same tensors, the same refusals, and nothing is changed by either."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from formats import State, Written, again, files_of
from reading_tools import assert_same, watched
from systems import open_descriptors
from torch import nn

from smartload import (
    AmbiguousKeysError,
    CastError,
    KeyMismatchError,
    ShapeMismatchError,
    SmartLoadError,
    check,
    convert,
    inspect,
    smart_load,
)
from smartload.formats import open_checkpoint

Save = Callable[[State], Written]


class Net(nn.Module):
    """Float weights, counters, a mask, a number and an empty tensor."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
        self.head = nn.Linear(8, classes)
        self.register_buffer("mask", torch.rand(2, 3) > 0.5)
        self.register_buffer("scale", torch.rand(()))
        self.register_buffer("nothing", torch.empty(0, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x)) * self.scale


def trained() -> Net:
    net = Net()
    net.body(torch.randn(16, 6))
    return net


def prefixed(prefix: str, state: State) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def refused(kind: type[SmartLoadError], net: nn.Module, source: Any, **options: Any) -> str:
    """The words of a refusal that leaves the model as it was, bit for bit and object by object."""
    before = copy.deepcopy(net.state_dict())
    objects = {name: id(parameter) for name, parameter in net.named_parameters()}
    with pytest.raises(kind) as caught:
        smart_load(net, source, **options)
    assert_same(net.state_dict(), before)
    assert {name: id(parameter) for name, parameter in net.named_parameters()} == objects
    return str(caught.value)


def test_every_tensor_arrives(checkpoint: Save) -> None:
    source, net = trained(), Net()
    objects = [id(parameter) for parameter in net.parameters()]
    report = smart_load(net, checkpoint(source.state_dict()))
    assert_same(net.state_dict(), source.state_dict())
    assert [id(parameter) for parameter in net.parameters()] == objects
    assert report.missing_keys == report.unexpected_keys == []
    assert list(report.plan.pairs) == list(source.state_dict())


def test_nothing_is_run_and_nothing_is_written(checkpoint: Save) -> None:
    source = checkpoint(trained().state_dict())
    smart_load(Net(), source)  # what is imported by a first load is not the file's doing
    before = {path: path.stat().st_mtime_ns for path in files_of(source)}
    source = again(source)
    with watched() as seen:
        smart_load(Net(), source)
    assert seen == []
    assert {path: path.stat().st_mtime_ns for path in files_of(source)} == before


def test_files_are_closed(checkpoint: Save) -> None:
    source, net = checkpoint(trained().state_dict()), Net()
    before = open_descriptors()
    smart_load(net, source)
    refused(KeyMismatchError, nn.Linear(2, 2), again(source))
    inspect(again(source))
    assert open_descriptors() == before


def test_a_wrappers_prefix_is_seen_through(checkpoint: Save) -> None:
    source, net = trained(), nn.DataParallel(Net())
    smart_load(net, checkpoint(prefixed("module.", source.state_dict())))
    assert_same(net.module.state_dict(), source.state_dict())
    plain = Net()
    smart_load(plain, checkpoint(prefixed("module._orig_mod.", source.state_dict())))
    assert_same(plain.state_dict(), source.state_dict())


def test_a_dry_run_decides_the_same(checkpoint: Save) -> None:
    source, net = checkpoint(prefixed("net.", trained().state_dict())), Net()
    before = copy.deepcopy(net.state_dict())
    plan = check(net, source)
    assert_same(net.state_dict(), before)
    assert plan == smart_load(net, again(source)).plan
    assert plan.rule == "removed 'net.'"


def test_a_missing_key_is_refused(checkpoint: Save) -> None:
    state = trained().state_dict()
    del state["head.bias"]
    source = checkpoint(state)
    words = refused(KeyMismatchError, Net(), source)
    assert "missing:    head.bias [5]" in words
    assert "write allow_missing=['head.bias']" in words
    net = Net()
    kept = net.head.bias.clone()
    report = smart_load(net, again(source), allow_missing=["head.bias"])
    assert report.missing_keys == ["head.bias"]
    assert torch.equal(net.head.bias, kept)


def test_a_tensor_too_many_is_refused(checkpoint: Save) -> None:
    source = checkpoint(trained().state_dict() | {"extra.weight": torch.ones(2)})
    assert "unexpected: extra.weight [2]" in refused(KeyMismatchError, Net(), source)
    assert smart_load(Net(), again(source), allow_unexpected=["extra.*"]).unexpected_keys[0].endswith("extra.weight")


def test_another_shape_is_refused(checkpoint: Save) -> None:
    words = refused(ShapeMismatchError, Net(classes=7), checkpoint(trained().state_dict()))
    assert "head.weight [5, 8] in the file, [7, 8] in the model" in words


def test_float_widths_are_cast(checkpoint: Save) -> None:
    source, net = trained(), Net().double()
    report = smart_load(net, checkpoint(source.state_dict()))
    assert_same(net.state_dict(), source.double().state_dict())
    assert [(cast.source, cast.target) for cast in report.casts] == [("float32", "float64")]


def test_values_replace_tensors_where_that_is_asked_for(checkpoint: Save) -> None:
    source, net = trained(), Net().half()
    smart_load(net, checkpoint(source.state_dict()), assign=True)
    assert_same(net.state_dict(), source.state_dict())


def test_a_model_without_memory_gets_some(checkpoint: Save) -> None:
    source = trained()
    with torch.device("meta"):
        net = Net()
    smart_load(net, checkpoint(source.state_dict()), device="cpu")
    assert_same(net.state_dict(), source.state_dict())


def test_a_model_with_loading_code_of_its_own_is_asked(checkpoint: Save) -> None:
    source, net = trained(), Net()
    seen: list[str] = []
    net.head.register_load_state_dict_pre_hook(lambda module, state, prefix, *rest: seen.extend(state))
    smart_load(net, checkpoint(source.state_dict()))
    assert "head.weight" in seen
    assert_same(net.state_dict(), source.state_dict())


def test_values_that_do_not_fit_are_refused(checkpoint: Save) -> None:
    source = trained()
    source.head.weight.data[2, 3] = 1e6
    words = refused(SmartLoadError, Net().half(), checkpoint(source.state_dict()))
    assert "cannot hold the value 1000000" in words


def test_shared_weights_stay_shared(checkpoint: Save) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
            self.out.weight = self.embed.weight

    source, net = Tied(), Tied()
    smart_load(net, checkpoint(source.state_dict()))
    assert net.out.weight is net.embed.weight
    assert torch.equal(net.out.weight, source.out.weight)
    half, once = Tied(), dict(source.state_dict())
    del once["out.weight"]
    smart_load(half, checkpoint(once))
    assert torch.equal(half.out.weight, source.out.weight)
    differing = checkpoint(source.state_dict() | {"out.weight": torch.zeros(4, 3)})
    assert "fit embed.weight and out.weight" in refused(AmbiguousKeysError, net, differing)


def test_strides_of_the_file_do_not_matter(checkpoint: Save) -> None:
    state = trained().state_dict()
    state["body.0.weight"] = state["body.0.weight"].t().contiguous().t()
    state["head.weight"] = torch.randn(9, 16)[2:7, ::2]
    net = Net()
    smart_load(net, checkpoint(state))
    assert_same(net.state_dict(), state)


def test_checksums_of_whole_files_are_fine(checkpoint: Save) -> None:
    with open_checkpoint(checkpoint(trained().state_dict())) as opened:
        carries = any(record.crc for record in opened.records)
    assert smart_load(Net(), checkpoint(trained().state_dict()), verify=True).verified == carries
    assert smart_load(Net(), checkpoint(trained().state_dict())).verified == carries
    assert not smart_load(Net(), checkpoint(trained().state_dict()), verify=False).verified


@pytest.mark.parametrize("left", [0.02, 0.3, 0.7, 0.85])
def test_a_file_cut_short_is_refused(checkpoint: Save, left: float) -> None:
    source = checkpoint(trained().state_dict())
    net = Net()
    for path in files_of(source)[:1]:
        os.truncate(path, int(path.stat().st_size * left))
        words = refused(SmartLoadError, net, source)
        assert len(words) < 500
        assert words.isprintable()


def test_inspecting_reads_no_tensor(checkpoint: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    state = trained().state_dict()
    source = checkpoint(state)
    monkeypatch.setattr("smartload.load.transfer.read_all", lambda *args: pytest.fail("data was read"))
    found = inspect(source)
    part: Any = next(iter(found.to_dict()["parts"].values()))  # type: ignore[attr-defined]
    want = {name: {"shape": list(t.shape), "dtype": str(t.dtype)[6:]} for name, t in state.items()}
    assert {name.removeprefix("model."): spec for name, spec in part["tensors"].items()} == want
    assert part["elements"] == sum(tensor.numel() for tensor in state.values())
    assert part["nbytes"] == sum(tensor.nbytes for tensor in state.values())
    assert "12 tensors, 141 elements, 550 bytes" in str(found)
    assert "body.{0...1}.weight" in str(found)
    assert "body.{0...1}.weight" in found._repr_html_()


def test_the_written_files_are_what_other_tools_read(checkpoint: Save, request: pytest.FixtureRequest) -> None:
    """The fixture is judged by the tools whose formats it writes."""
    state, name = trained().state_dict(), request.node.callspec.params["checkpoint"]
    source = checkpoint(state)
    if isinstance(source, Path) and name in READERS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = READERS[name](source)
        assert {key: tensor.tolist() for key, tensor in got.items()} == {k: t.tolist() for k, t in state.items()}


def _jit(path: Path) -> dict[str, torch.Tensor]:
    return dict(torch.jit.load(path).state_dict())


def _dcp(path: Path) -> dict[str, torch.Tensor]:
    import torch.distributed.checkpoint as dcp

    got = {key: torch.empty_like(tensor) for key, tensor in trained().state_dict().items()}
    dcp.load(got, checkpoint_id=path)
    return got


def _plain(path: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(path, weights_only=False))


READERS: dict[str, Callable[[Path], dict[str, torch.Tensor]]] = {
    "torch zip of a big-endian machine": _plain,
    "torchscript": _jit,
    "distributed checkpoint in chunks": _dcp,
    "exported program": lambda path: dict(torch.export.load(path).state_dict),
}


# --------------------------------------------------------------------- views that conjugate or negate


def flagged(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Views of one tensor of 3 x 4, whose bytes in a file are not their values."""
    base = (torch.arange(24).reshape(3, 8)[:, ::2] - 7).to(dtype)
    if not dtype.is_complex:
        return {"base": base, "neg": torch._neg_view(base), "neg of the transposed": torch._neg_view(base.t())}
    base = base + base.t().reshape(3, 4) * 1j
    conj = base.conj()
    return {
        "base": base,
        "conj": conj,
        "conj neg": torch._neg_view(conj),
        "imag": base.clone().conj().imag,
        "transposed": conj.t(),
    }


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int64", "uint8", "complex64", "complex128"])
@pytest.mark.parametrize("way", ["zip", "legacy", "module", "assign", "convert", "cast", "pieces"])
def test_views_that_conjugate_or_negate_load_as_torch_loads_them(
    name: str, way: str, tmp_path: Path, reading: Callable[..., None]
) -> None:
    if way == "pieces":
        reading(piece=16, count=3, together=False)
    state = flagged(getattr(torch, name))
    file = tmp_path / "views.pth"
    source = holder(state) if way == "module" else state
    torch.save(source, file, _use_new_zipfile_serialization=way != "legacy")
    theirs = state if way == "module" else torch.load(file)
    assert theirs["conj" if "conj" in theirs else "neg"].is_conj() is ("conj" in theirs)
    wide = {"float32": torch.float64, "complex64": torch.complex128, "uint8": torch.int16}.get(name)
    cast = wide if way == "cast" else None
    model = holder({key: zeros(value, None if key == "imag" else cast) for key, value in state.items()})
    loaded = convert(file, tmp_path / "clean.pth") if way == "convert" else file
    smart_load(model, loaded, assign=way == "assign")
    for key, value in theirs.items():
        ours = model.get_buffer(key)
        assert torch.equal(ours, value.to(ours.dtype).resolve_conj().resolve_neg()), key


def test_a_view_and_what_it_looks_at_are_two_values(tmp_path: Path) -> None:
    base = torch.tensor([1 + 2j, 3 - 4j])
    torch.save({"a": base, "b": base.conj()}, tmp_path / "two.pth")
    tied = nn.Module()
    tied.register_buffer("a", torch.zeros(2, dtype=torch.complex64))
    tied.register_buffer("b", tied.a)
    with pytest.raises(AmbiguousKeysError, match="a and b"):
        smart_load(tied, tmp_path / "two.pth")
    assert tied.a.tolist() == [0, 0]
    assert inspect(tmp_path / "two.pth").to_dict()["parts"][""]["tied"] == []  # type: ignore[index]


def test_a_negated_value_is_checked_as_what_it_is(tmp_path: Path) -> None:
    torch.save({"w": torch._neg_view(torch.tensor([200, 128], dtype=torch.int64))}, tmp_path / "w.pth")
    with pytest.raises(CastError, match="cannot hold the value -200"):
        smart_load(holder({"w": torch.zeros(2, dtype=torch.int8)}), tmp_path / "w.pth")


def zeros(value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return torch.zeros(value.shape, dtype=dtype or value.dtype)


def holder(state: dict[str, torch.Tensor]) -> nn.Module:
    model = nn.Module()
    for key, value in state.items():
        model.register_buffer(key, value)
    return model
