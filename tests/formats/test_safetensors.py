"""Rules S1 to S3: a header that is believed only as far as every byte of the file bears it out."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
import torch
from dtypes import DTYPES, dtype
from reading_tools import assert_same, read, tensors
from safetensors.torch import save, save_file
from torch import nn

from smartload import KeyMismatchError, SmartLoadError, convert, inspect, smart_load
from smartload.errors import UnreadableError
from smartload.records.entries import Opaque

# All of them but these, which the package does not write.
NAMES = [name for name in DTYPES if name not in ("complex128", "complex32", "bcomplex32")]


def made(header: object, data: bytes = b"\0" * 8, size: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if size is None else size).to_bytes(8, "little") + raw + data


def one(**changed: object) -> dict[str, object]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changed}}


def kind_of(data: bytes) -> str:
    with pytest.raises(UnreadableError) as caught:
        read(data)
    assert str(caught.value).isprintable()
    return caught.value.problem.kind  # type: ignore[union-attr]


def test_what_the_package_writes_is_read_in_every_dtype() -> None:
    state = {name: torch.randint(0, 2, (3, 5)).to(torch.float32).to(dtype(name)) for name in NAMES}
    state |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "x.y": torch.ones(1)}
    data = save(state, {"format": "pt"})
    ours = tensors(data)
    assert_same({name: ours[name] for name in state}, state)


def test_the_smallest_files_are_read() -> None:
    assert read(made({}, b"")).parts[""].entries == {}
    assert read(made(one(shape=[0], data_offsets=[0, 0]), b"")).parts[""].entries.keys() == {"a"}
    assert read(made(b'{"__metadata__":{"a":"b"}}', b"")).parts[""].entries == {}
    assert read(made(json.dumps(one()).encode() + b"   ")).parts[""].entries.keys() == {"a"}


BAD: dict[str, tuple[bytes, str]] = {
    "S1 a header that is larger than the file": (made(one(), size=1000), "shorter"),
    "S1 a header that is larger than any": (made(one(), size=100_000_001), "header_large"),
    "S1 not UTF-8": (made(b'{"\xff":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'), "json_damaged"),
    "S1 a name given twice": (made(b'{"a":1,"a":2}'), "key_twice"),
    "S1 a field given twice": (
        made(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'), "key_twice"
    ),
    "S1 NaN": (made(b'{"a":NaN}'), "json_damaged"),
    "S1 a list": (made(b'{"a":[]}'), "header_entry"),
    "S1 half a header": (made(b'{"a":'), "json_damaged"),
    "S1 deep nesting": (made(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "json_damaged"),
    "S1 mere structure": (made(b"{" + b'"":{},' * 20_000 + b"}"), "json_damaged"),
    "S1 long numbers": (made(b'{"a":' + b"9" * 10_000 + b"}"), "json_damaged"),
    "S2 a field more": (made(one(extra=1)), "header_entry"),
    "S2 a field less": (made({"a": {"dtype": "F32", "shape": [2]}}), "header_entry"),
    "S2 a negative size": (made(one(shape=[-2])), "header_entry"),
    "S2 a boolean size": (made(one(shape=[True, 2])), "header_entry"),
    "S2 a fraction": (made(one(shape=[2.0])), "header_entry"),
    "S2 a text": (made(one(shape="2")), "header_entry"),
    "S2 too many dimensions": (made(one(shape=[1] * 64 + [2])), "header_entry"),
    "S2 three offsets": (made(one(data_offsets=[0, 8, 8])), "header_entry"),
    "S2 negative offsets": (made(one(data_offsets=[-8, 0])), "header_entry"),
    "S2 offsets in the wrong order": (made(one(data_offsets=[8, 0])), "record_size"),
    "S2 sizes that overflow": (made(one(shape=[1 << 40, 1 << 40], data_offsets=[0, 0])), "record_size"),
    "S2 more than the bytes": (made(one(shape=[3])), "record_size"),
    "S2 fewer than the bytes": (made(one(shape=[1])), "record_size"),
    "S2 a gap at the beginning": (made(one(data_offsets=[4, 12]), b"\0" * 12), "header_gap"),
    "S2 two tensors in one place": (made(one() | {"b": one()["a"]}), "header_gap"),
    "S2 overlapping tensors": (
        made(one() | {"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, b"\0" * 12), "header_gap"
    ),
    "S2 the file ends before": (made(one(), b"\0" * 7), "shorter"),
    "S2 the file goes on": (made(one(), b"\0" * 9), "header_end"),
    "S3 metadata that is no text": (made({"__metadata__": {"a": 1}, **one()}), "header_metadata"),
    "S3 metadata that is a list": (made({"__metadata__": ["a"], **one()}), "header_metadata"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_header_that_breaks_a_rule_is_refused(name: str) -> None:
    data, kind = BAD[name]
    assert kind_of(data) == kind


@pytest.mark.parametrize("spaces", range(9))
def test_data_may_begin_at_any_byte(spaces: int) -> None:
    want = torch.tensor([1.5, -2.5], dtype=torch.float64)
    header = json.dumps(one(dtype="F64", data_offsets=[0, 16])).encode() + b" " * spaces
    for of_model in (torch.float64, torch.float32):
        net = Named(["a"]).to(of_model)
        smart_load(net, io.BytesIO(made(header, want.numpy().tobytes())))
        assert torch.equal(net.a, want.to(of_model))


def test_a_file_of_more_than_four_gigabytes(tmp_path: Path) -> None:
    big = 9 << 29
    header = {"big": {"dtype": "U8", "shape": [big], "data_offsets": [0, big]}}
    header["a"] = {"dtype": "F32", "shape": [2], "data_offsets": [big, big + 8]}
    path = tmp_path / "big.safetensors"
    path.write_bytes(made(header, b""))
    with path.open("r+b") as file:
        file.seek(big, io.SEEK_END)
        file.write(torch.tensor([3.0, 4.0]).numpy().tobytes())
    net = Named(["a"])
    smart_load(net, path, allow_unexpected=["big"])
    assert net.a.tolist() == [3.0, 4.0]


def test_a_dtype_that_torch_does_not_have_is_named() -> None:
    entries = read(made(one(dtype="F4", shape=[16]))).parts[""].entries
    assert entries == {"a": Opaque("a tensor of F4", tensor=True)}
    with pytest.raises(UnreadableError, match="a is a tensor of F4, not a tensor that can be loaded"):
        smart_load(Named(["a"]), io.BytesIO(made(one(dtype="F4", shape=[2]))))


class Named(torch.nn.Module):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        for name in names:
            self.register_buffer(name, torch.zeros(2))


def test_a_name_of_the_file_is_a_hint_at_most(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([1.0, 2.0])}, tmp_path / "weights.ckpt")
    net = Named(["a"])
    assert smart_load(net, tmp_path / "weights.ckpt").format == "safetensors"
    torch.save({"a": torch.tensor([3.0, 4.0])}, tmp_path / "really_torch.safetensors")
    assert smart_load(net, tmp_path / "really_torch.safetensors").format == "torch zip"
    assert net.a.tolist() == [3.0, 4.0]


def test_weights_that_were_tied_and_stored_once(tmp_path: Path) -> None:
    from safetensors.torch import save_model

    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = torch.nn.Embedding(4, 3), torch.nn.Linear(3, 4, bias=False)
            self.out.weight = self.embed.weight

    source, net = Tied(), Tied()
    save_model(source, str(tmp_path / "tied.safetensors"))
    assert len(inspect(tmp_path / "tied.safetensors").parts[""].entries) == 1
    smart_load(net, tmp_path / "tied.safetensors")
    assert torch.equal(net.out.weight, source.out.weight)
    assert net.out.weight is net.embed.weight


def test_one_shard_of_several_says_so(tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00002.safetensors"
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(KeyMismatchError, match=r"This is one shard of several\. Give the folder, or the \.index\.json"):
        smart_load(Named(["a", "b"]), path)


def test_a_hundred_thousand_names_take_a_second() -> None:
    header = {f"l.{i}": {"dtype": "F32", "shape": [], "data_offsets": [4 * i, 4 * i + 4]} for i in range(100_000)}
    data = made(header, b"\0" * 400_000)
    started = time.process_time()
    assert len(read(data).parts[""].entries) == 100_000
    assert time.process_time() - started < 5


@pytest.mark.parametrize("shape", [[2**40, 2**40, 2**40, 0], [0, *[2**47] * 63]])
def test_an_empty_tensor_of_an_impossible_shape_is_refused_everywhere(shape: list[int], tmp_path: Path) -> None:
    """It takes no bytes, and torch cannot make it: its sizes or strides overflow."""
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    model = nn.LazyLinear(1)
    for call in (
        lambda: convert(tmp_path / "w.safetensors", tmp_path / "x.pth"),
        lambda: convert(tmp_path / "w.safetensors", tmp_path / "x.pth", dtype="float16"),
        lambda: smart_load(model, tmp_path / "w.safetensors"),
    ):
        with pytest.raises(SmartLoadError):
            call()
    assert not (tmp_path / "x.pth").exists()
