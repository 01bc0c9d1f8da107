"""Folders of torch.distributed.checkpoint: `.metadata` is a pickle, and is believed as little as any other."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from formats import dcp_in_chunks
from reading_tools import CANARY, assert_same, saved, watched
from systems import needs_links, open_descriptors
from torch import nn
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, MetadataIndex

from smartload import SmartLoadError, UnreadableError, UnsafeCheckpointError, convert, inspect, smart_load
from smartload.formats import open_checkpoint, sharded
from smartload.load import commit
from smartload.records.entries import Span, Tiled

NET = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
STATE = NET.state_dict()

writes_safetensors = pytest.mark.skipif(
    not hasattr(filesystem, "SerializationFormat"), reason="this torch writes no safetensors into such a folder"
)


def save(value: dict[str, Any], folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(value, checkpoint_id=folder)
    return folder


def loaded(source: Path, **options: Any) -> Any:
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    report = smart_load(net, source, **options)
    assert_same(net.state_dict(), STATE)
    return report


def problem_of(source: Path, kind: type[SmartLoadError] = UnreadableError) -> Any:
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(kind) as caught:
        smart_load(net, source)
    assert_same(net.state_dict(), before)
    assert len(str(caught.value)) < 500
    return caught.value.problem


def changed(folder: Path, change: Callable[[Any], object]) -> Path:
    """A folder whose metadata has been changed, as an object, and written anew."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))
    return folder


def test_parts_have_the_paths_that_were_saved(tmp_path: Path) -> None:
    optimizer = torch.optim.Adam(NET.parameters())
    NET(torch.randn(8, 6)).sum().backward()
    optimizer.step()
    state = {key: value.clone() for key, value in NET.state_dict().items()}
    source = save(
        {"model": state, "ema": STATE, "optim": optimizer.state_dict(), "step": 7, "rng": [torch.ones(2)]}, tmp_path
    )
    found = inspect(source)
    assert {"model", "ema"} <= found.parts.keys()
    aside = {item.path: item.what for item in found.aside}
    assert aside["optim"] == "an optimizer's state"
    assert aside["step"] == "an object"
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    smart_load(net, source, select="model")
    assert_same(net.state_dict(), state)
    smart_load(net, source, select="ema")
    assert_same(net.state_dict(), NET.state_dict())


def test_a_flat_state_dict_is_the_top(tmp_path: Path) -> None:
    assert inspect(save(dict(STATE), tmp_path)).parts.keys() == {""}
    assert loaded(tmp_path).format == "torch.distributed.checkpoint"


@pytest.mark.parametrize("ways", [(1,), (2,), (5,), (1, 3), (2, 3), (7,)])
def test_tensors_in_chunks_are_put_together_in_place(tmp_path: Path, ways: tuple[int, ...]) -> None:
    source = dcp_in_chunks(STATE, tmp_path, ways)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = {key: torch.empty_like(value) for key, value in STATE.items()}
        dcp.load(theirs, checkpoint_id=source)
    assert_same(theirs, STATE)
    loaded(source)
    kinds = {type(entry) for entry in inspect(source).parts[""].entries.values()}
    assert kinds == {Span} if ways == (1,) else Tiled in kinds


def test_what_two_ranks_wrote_loads_here(tmp_path: Path) -> None:
    """Real processes, real shards: FSDP2 over two ranks, uneven rows and an empty share included."""
    writer = Path(__file__).parents[1] / "helpers" / "write_sharded.py"
    torch.save(STATE, tmp_path / "full.pt")
    processes = [
        subprocess.Popen(
            [sys.executable, str(writer), str(rank), str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=100) for process in processes] == [0, 0]
    entries = inspect(tmp_path / "sharded").parts["model"].entries
    assert isinstance(entries["0.weight"], Tiled)
    loaded(tmp_path / "sharded")


def test_a_folder_of_empty_tensors_alone_opens_no_other_file(tmp_path: Path) -> None:
    source = save({"weight": torch.zeros(0, 3), "bias": torch.zeros(0)}, tmp_path / "saved")
    net = nn.Module()
    net.weight, net.bias = nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.empty(0))
    assert smart_load(net, source).plan.pairs.keys() == {"weight", "bias"}
    written = convert(source, tmp_path / "clean.pth")
    assert_same(torch.load(written), {"weight": torch.zeros(0, 3), "bias": torch.zeros(0)})


def test_casts_and_other_layouts_go_through_every_chunk(tmp_path: Path) -> None:
    source = dcp_in_chunks(STATE, tmp_path, (2, 2))
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).double()
    net[0].weight.data = net[0].weight.data.t().contiguous().t()
    strides = net[0].weight.stride()
    smart_load(net, source)
    assert net[0].weight.stride() == strides
    assert torch.equal(net[0].weight, STATE["0.weight"].double())
    STATE_HUGE = {key: value.clone() for key, value in STATE.items()}
    STATE_HUGE["0.weight"][4, 5] = 1e6
    (tmp_path / "huge").mkdir()
    half = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).half()
    with pytest.raises(SmartLoadError, match="cannot hold the value 1000000"):
        smart_load(half, dcp_in_chunks(STATE_HUGE, tmp_path / "huge", (2, 2)))


def test_nothing_of_torch_distributed_is_needed(tmp_path: Path) -> None:
    source = save({"model": STATE}, tmp_path)
    code = (
        "import sys, torch, smartload; from torch import nn;"
        "smartload.smart_load(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), sys.argv[1]);"
        "print('torch.distributed.checkpoint' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(source)], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout == "False\n"


class Gadget:
    def __reduce__(self) -> object:
        return os.system, (f"echo > {CANARY}",)


def test_a_planted_metadata_is_not_run(tmp_path: Path) -> None:
    source = save({"model": STATE}, tmp_path)
    (source / ".metadata").write_bytes(pickle.dumps(Gadget()))
    with watched() as seen:
        assert problem_of(source).kind == "dcp_damaged"
    assert seen == []
    assert not CANARY.exists()


@pytest.mark.parametrize("where", ["state_dict_metadata", "planner_data", "storage_data", "storage_meta"])
def test_gadgets_inside_the_metadata_are_not_run(tmp_path: Path, where: str) -> None:
    source = changed(save({"model": STATE}, tmp_path), lambda metadata: setattr(metadata, where, Gadget()))
    with watched() as seen:
        if where == "storage_meta":
            loaded(source)
        else:
            problem_of(source, SmartLoadError)
    assert seen == []


def test_byte_entries_are_not_run(tmp_path: Path) -> None:
    source = save({"model": STATE, "note": io.BytesIO(b"x")}, tmp_path)

    def plant(metadata: Any) -> None:
        size = (source / "__0_0.distcp").stat().st_size
        data = saved(Gadget())
        with (source / "__0_0.distcp").open("ab") as file:
            file.write(data)
        for name in ("evil", "model._extra_state"):
            metadata.state_dict_metadata[name] = BytesStorageMetadata()
            metadata.storage_data[MetadataIndex(name)] = _StorageInfo("__0_0.distcp", size, len(data))
            metadata.planner_data[name] = tuple(name.split("."))

    changed(source, plant)
    with watched() as seen:
        found = inspect(source)
    assert seen == []
    assert not CANARY.exists()
    assert {item.path: item.what for item in found.aside}["evil"] == "an object"


def test_an_extra_state_of_plain_data_is_loaded(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        got: object = None

        def get_extra_state(self) -> object:
            return "version 3"

        def set_extra_state(self, state: object) -> None:
            self.got = state

    net = Extra(2, 1)
    smart_load(net, save(net.state_dict(), tmp_path))
    assert net.got == "version 3"


def test_tensors_in_an_extra_state_are_those_of_the_file(tmp_path: Path) -> None:
    """Two modules, so that the second one's chunk does not lie at the beginning of its file."""

    class Extra(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value, self.got = value, None
            self.w = nn.Parameter(torch.ones(3))

        def get_extra_state(self) -> object:
            return (torch.full((5,), self.value), {"n": 3})

        def set_extra_state(self, state: Any) -> None:
            self.got = state

    source = save(nn.Sequential(Extra(1.5), Extra(2.5)).state_dict(), tmp_path)
    net: Any = nn.Sequential(Extra(0.0), Extra(0.0))
    smart_load(net, source)
    for module, value in zip(net, (1.5, 2.5), strict=True):
        assert module.got[0].tolist() == [value] * 5
        assert module.got[1] == {"n": 3}


NAME = "0.weight"


def _index(metadata: Any, name: str = NAME) -> Any:
    return next(index for index in metadata.storage_data if index.fqn == name)


def _info(metadata: Any) -> Any:
    return metadata.storage_data[_index(metadata)]


ATTACKS: dict[str, tuple[Callable[[Any], object], str]] = {
    "a file elsewhere": (lambda m: setattr(_info(m), "relative_path", "../full.pt"), "shard_name"),
    "an absolute file": (lambda m: setattr(_info(m), "relative_path", "/etc/passwd"), "shard_name"),
    "a file that is not there": (lambda m: setattr(_info(m), "relative_path", "__9_0.distcp"), "shard_missing"),
    "a file that is no text": (lambda m: setattr(_info(m), "relative_path", 3), "dcp_damaged"),
    "beyond the file": (lambda m: setattr(_info(m), "length", 1 << 40), "shorter"),
    "before the file": (lambda m: setattr(_info(m), "offset", -1), "shorter"),
    "a negative length": (lambda m: setattr(_info(m), "length", -1), "shorter"),
    "a length that is no number": (lambda m: setattr(_info(m), "length", True), "dcp_damaged"),
    "another chunk": (lambda m: m.storage_data.update({_index(m): m.storage_data[_index(m, "0.bias")]}), "dcp_chunk"),
    "packed": (lambda m: setattr(_info(m), "transform_descriptors", ["zstd"]), "dcp_damaged"),
    "the chunk of another tensor, of the same shape": (
        lambda m: m.storage_data.update({_index(m, "1.weight"): m.storage_data[_index(m, "1.bias")]}), "dcp_damaged"
    ),
    "no place": (lambda m: m.storage_data.pop(_index(m)), "dcp_damaged"),
    "no places": (lambda m: setattr(m, "storage_data", None), "dcp_damaged"),
    "no chunks": (lambda m: setattr(m.state_dict_metadata[NAME], "chunks", []), "dcp_gap"),
    "chunks that are no list": (lambda m: setattr(m.state_dict_metadata[NAME], "chunks", 3), "dcp_damaged"),
    "a shape of more": (lambda m: setattr(m.state_dict_metadata[NAME], "size", torch.Size([6, 6])), "dcp_gap"),
    "a shape of less": (lambda m: setattr(m.state_dict_metadata[NAME], "size", torch.Size([4, 6])), "dcp_gap"),
    "fewer dimensions": (lambda m: setattr(m.state_dict_metadata[NAME], "size", torch.Size([30])), "dcp_damaged"),
    "another dtype": (
        lambda m: setattr(m.state_dict_metadata[NAME].properties, "dtype", torch.float16), "dcp_chunk"
    ),
    "no dtype": (lambda m: setattr(m.state_dict_metadata[NAME].properties, "dtype", None), "value"),
    "a chunk of another size": (
        lambda m: setattr(m.state_dict_metadata[NAME].chunks[0], "sizes", torch.Size([4, 6])), "dcp_chunk"
    ),
    "a chunk elsewhere": (
        lambda m: setattr(m.state_dict_metadata[NAME].chunks[0], "offsets", torch.Size([1, 0])), "dcp_damaged"
    ),
    "a kind of entry that is not known": (lambda m: m.state_dict_metadata.update({NAME: 3}), "dcp_damaged"),
    "a path that is no path": (lambda m: m.planner_data.update({NAME: 3}), "dcp_damaged"),
    "a path through a tensor": (lambda m: m.planner_data.update({NAME: ("0.bias", "x")}), "key_twice"),
    "a path of another": (lambda m: m.planner_data.update({NAME: ("0.bias",)}), "key_twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_metadata_that_lies_is_refused(tmp_path: Path, name: str) -> None:
    change, kind = ATTACKS[name]
    assert problem_of(changed(save(dict(STATE), tmp_path), change), SmartLoadError).kind == kind


def _cut(metadata: Any, change: Callable[[Any], object]) -> None:
    change(metadata.state_dict_metadata[NAME].chunks)


@pytest.mark.parametrize(
    "change",
    [
        lambda chunks: chunks.pop(),
        lambda chunks: chunks.pop(0),
        lambda chunks: setattr(chunks[0], "sizes", torch.Size([3, 2])),
    ],
)
def test_chunks_that_leave_a_gap_are_refused(tmp_path: Path, change: Callable[[Any], object]) -> None:
    source = changed(dcp_in_chunks(STATE, tmp_path, (2, 2)), lambda metadata: _cut(metadata, change))
    assert problem_of(source).kind in ("dcp_gap", "dcp_chunk")


def test_chunks_that_overlap_are_refused(tmp_path: Path) -> None:
    """From the first element to the last, and one in the middle twice."""
    source = dcp_in_chunks({**STATE, "0.bias": torch.arange(5.0)}, tmp_path, (1,))

    def overlap(metadata: Any) -> None:
        entry = metadata.state_dict_metadata["0.bias"]
        data = [saved(torch.zeros(3)), saved(torch.zeros(3))]
        (source / "__7_0.distcp").write_bytes(b"".join(data))
        entry.chunks = [type(entry.chunks[0])(torch.Size([at]), torch.Size([n])) for at, n in ((0, 3), (2, 3))]
        for at, offset, size in ((0, 0, len(data[0])), (2, len(data[0]), len(data[1]))):
            metadata.storage_data[MetadataIndex("0.bias", [at])] = _StorageInfo("__7_0.distcp", offset, size)

    assert problem_of(changed(source, overlap)).kind == "dcp_gap"


@needs_links
def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    source = save(dict(STATE), tmp_path / "step")
    (source / "__0_0.distcp").rename(tmp_path / "elsewhere")
    (source / "__0_0.distcp").symlink_to(tmp_path / "elsewhere")
    assert problem_of(source, UnsafeCheckpointError).kind == "shard_outside"


@pytest.mark.parametrize("content", [b"", b"x", pickle.dumps(3), pickle.dumps({"a": 1}), b"\x80\x04" + b"]" * 1000])
def test_metadata_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    assert problem_of(tmp_path).kind in ("dcp_damaged", "pickle_short", "pickle")


def test_the_metadata_stands_for_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded(save(dict(STATE), tmp_path) / ".metadata")
    monkeypatch.chdir(tmp_path)
    loaded(Path(".metadata"))
    loaded(Path())


def test_one_file_of_a_folder_says_so(tmp_path: Path) -> None:
    source = save(dict(STATE), tmp_path)
    assert problem_of(source / "__0_0.distcp").kind == "dcp_file"


def test_metadata_of_earlier_releases_is_read(tmp_path: Path) -> None:
    """Fields that later releases added are not asked for."""

    def older(metadata: Any) -> None:
        del metadata.storage_meta
        vars(metadata).pop("version", None)  # which torch 2.6 does not write either
        for info in metadata.storage_data.values():
            if hasattr(info, "transform_descriptors"):
                info.__dict__.pop("transform_descriptors", None)

    loaded(changed(save(dict(STATE), tmp_path), older))


@pytest.mark.filterwarnings("ignore")
def test_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    """A rank writes a file of its own, and there may be thousands."""
    state = {f"{i}": torch.full((2,), float(i)) for i in range(300)}
    writer = dcp.FileSystemWriter(tmp_path, single_file_per_rank=False)
    dcp.save(state, storage_writer=writer)
    assert len(list(tmp_path.glob("*.distcp"))) == 300
    net = nn.Module()
    for name in state:
        net.register_buffer(f"b{name}", torch.zeros(2))
    before = open_descriptors()
    with open_checkpoint(tmp_path) as checkpoint:
        assert open_descriptors() < before + 5
        assert len(checkpoint.files) == 300
    smart_load(net, tmp_path, rename=lambda name: f"b{name}")
    assert all(torch.equal(net.state_dict()[f"b{name}"], value) for name, value in state.items())


@pytest.mark.filterwarnings("ignore")
def test_a_file_that_is_replaced_between_two_reads_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "MANY", 0)
    source = save(dict(STATE), tmp_path)
    loaded(source)

    def touched(*args: Any) -> None:
        os.utime(source / "__0_0.distcp")
        original(*args)

    original: Callable[..., None] = commit.read_all
    monkeypatch.setattr(commit, "read_all", touched)
    assert problem_of(source).kind == "changed"


@writes_safetensors
@pytest.mark.filterwarnings("ignore")
def test_files_of_safetensors_in_such_a_folder_are_read(tmp_path: Path) -> None:
    writer = dcp.FileSystemWriter(tmp_path, serialization_format=filesystem.SerializationFormat.SAFETENSORS)
    dcp.save(dict(STATE), storage_writer=writer)
    loaded(tmp_path)
    lying = changed(tmp_path, lambda m: setattr(m.state_dict_metadata["0.bias"], "size", torch.Size([6])))
    assert problem_of(lying).kind == "dcp_gap"


@writes_safetensors
@pytest.mark.filterwarnings("ignore")
def test_two_chunks_of_one_name_in_one_file_of_safetensors_are_refused(tmp_path: Path) -> None:
    """The file has one tensor of that name, and so the values of one of the two."""
    writer = dcp.FileSystemWriter(tmp_path, serialization_format=filesystem.SerializationFormat.SAFETENSORS)
    dcp.save({"w": torch.arange(2.0)}, storage_writer=writer)

    def twice(metadata: Any) -> None:
        said = metadata.state_dict_metadata["w"]
        said.size = torch.Size([4])
        said.chunks = [ChunkStorageMetadata(torch.Size([at]), torch.Size([2])) for at in (0, 2)]
        ((_, where),) = metadata.storage_data.items()
        metadata.storage_data = {MetadataIndex("w", torch.Size([at]), 0): where for at in (0, 2)}

    assert problem_of(changed(tmp_path, twice)).kind == "dcp_chunk"


def test_a_save_that_did_not_finish_says_so(tmp_path: Path) -> None:
    source = save(dict(STATE), tmp_path)
    (source / ".metadata").unlink()
    assert problem_of(source).kind == "folder_unfinished"
