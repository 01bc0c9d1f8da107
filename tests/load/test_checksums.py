"""The CRC32 of records: compared with the bytes that are read for tensors, once, in whatever pieces they are read."""

from __future__ import annotations

import copy
import io
import os
import random
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from formats import dcp_in_chunks
from reading_tools import assert_same, saved
from torch import nn

from smartload import SmartLoadError, UnreadableError, convert, smart_load
from smartload.load import checksums
from smartload.load.checksums import CheckedFile, crc_of_both
from smartload.records.entries import ZipRecord

DATA = bytes(random.Random(1).randbytes(1000))


class Counting:
    """Bytes in memory, and what was read of them."""

    name = "w.pt"

    def __init__(self, data: bytes = DATA) -> None:
        self.data, self.size = data, len(data)
        self.reads: list[tuple[int, int]] = []
        self.changed = False

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.reads.append((offset, len(buffer)))
        buffer[:] = self.data[offset : offset + len(buffer)]

    def check_unchanged(self) -> None:
        if self.changed:
            raise OSError("changed")

    def close(self) -> None: ...


def record(offset: int, nbytes: int, crc: int | None = None) -> ZipRecord:
    right = zlib.crc32(DATA[offset : offset + nbytes])
    return ZipRecord(0, offset, nbytes, right if crc is None else crc, f"r{offset}")


def read(file: CheckedFile, start: int, stop: int) -> None:
    file.read_into(start, memoryview(buffer := bytearray(stop - start)))
    assert buffer == DATA[start:stop]


# --------------------------------------------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize("seed", range(5))
def test_the_checksum_of_two_runs_of_bytes_is_known_from_those_of_each(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(40):
        first, second = (rng.randbytes(rng.choice((0, 1, 2, 3, 7, 64, 1000, rng.randrange(5000)))) for _ in range(2))
        assert crc_of_both(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


def test_the_checksum_of_large_pieces() -> None:
    piece = bytes(range(256)) * 4096
    crc = whole = 0
    for _ in range(70):
        crc, whole = crc_of_both(crc, zlib.crc32(piece), len(piece)), zlib.crc32(piece, whole)
    assert crc == whole
    assert crc_of_both(1, 2, 5 << 40) == crc_of_both(crc_of_both(1, 0, 3 << 40), 2, 2 << 40)


# -------------------------------------------------------------------------------------------------------- one file


READS: dict[str, list[tuple[int, int]]] = {
    "as a whole": [(100, 300)],
    "with what is around it": [(0, 1000)],
    "in pieces": [(100, 150), (150, 151), (151, 300)],
    "in pieces, backwards": [(250, 300), (100, 250)],
    "its beginning": [(100, 120)],
    "its end": [(299, 300)],
    "its middle": [(150, 160)],
    "two parts": [(120, 130), (200, 210)],
    "beyond both ends": [(90, 150), (200, 310)],
    "twice": [(120, 140), (120, 140)],
    "overlapping": [(120, 140), (130, 170), (135, 136), (160, 300), (110, 125)],
    "one inside another": [(120, 200), (130, 140), (120, 125)],
}


def verdict(file: CheckedFile, reads: list[tuple[int, int]]) -> str:
    try:
        for start, stop in reads:
            read(file, start, stop)
        file.check_unchanged()
    except UnreadableError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("how", READS)
@pytest.mark.parametrize("piece", [7, 1 << 20])
def test_what_is_read_of_a_record_is_compared(how: str, piece: int, reading: Callable[..., None]) -> None:
    reading(piece=piece, count=3)
    others = [record(300, 50), record(50, 40)]
    file = CheckedFile(counting := Counting(), [record(100, 200), *others])
    assert verdict(file, READS[how]) == ""
    # What these reads left of the records was read once, and not a byte more.
    rest = [at for start, size in counting.reads[len(READS[how]) :] for at in range(start, start + size)]
    touched = [(a, b) for a, b in ((50, 90), (100, 300), (300, 350)) if any(x < b and y > a for x, y in READS[how])]
    left = {at for a, b in touched for at in range(a, b) if not any(x <= at < y for x, y in READS[how])}
    assert left <= set(rest)
    assert len(rest) == len(left) or how in ("overlapping", "one inside another")
    for at in (100, 135, 299):
        crc = zlib.crc32(DATA[100:at] + bytes([DATA[at] ^ 1]) + DATA[at + 1 : 300])
        assert "'r100' does not have the checksum" in verdict(
            CheckedFile(Counting(), [record(100, 200, crc), *others]), READS[how]
        )


def test_a_record_that_nobody_read_is_not_compared() -> None:
    file = CheckedFile(counting := Counting(), [record(100, 200, crc=1), record(300, 10)])
    read(file, 300, 305)
    read(file, 10, 100)
    file.check_unchanged()
    assert counting.reads == [(300, 5), (10, 90), (305, 5)]


def test_a_record_that_is_wanted_is_compared_unread() -> None:
    file = CheckedFile(Counting(), [record(100, 200), record(300, 10, crc=1)])
    assert file.want(150, 10) == 200
    assert file.want(160, 10) == 0
    file.compare()
    assert file.want(299, 2) == 10
    with pytest.raises(UnreadableError, match="'r300'"):
        file.compare()


def test_a_file_that_was_changed_is_not_called_corrupt() -> None:
    file = CheckedFile(counting := Counting(), [record(100, 200, crc=1)])
    counting.changed = True
    with pytest.raises(OSError, match="changed"):
        read(file, 100, 300)


# ------------------------------------------------------------------------------------------------------ whole loads


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(50)), nn.Parameter(torch.zeros(50))


STATE = {"a": torch.full((50,), 1.5), "b": torch.arange(50.0)}


def flips(data: bytes, name: str) -> bytes:
    """The same file with one bit of a record flipped."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith(name))
    sizes = struct.unpack_from("<2H", data, info.header_offset + 26)
    at = info.header_offset + 30 + sum(sizes) + info.compress_size - 3
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def refused(model: nn.Module, source: Any, **arguments: Any) -> str:
    """The words with which a load is refused, that leaves the model as it was."""
    before, objects = tensors_of(copy.deepcopy(model)), [id(each) for each in model.parameters()]
    with pytest.raises(UnreadableError, match="does not have the checksum") as caught:
        smart_load(model, source, **arguments)
    assert caught.value.problem.kind == "crc"  # type: ignore[union-attr]
    assert_same(tensors_of(model), before)
    assert objects == [id(each) for each in model.parameters()]
    return str(caught.value)


@pytest.mark.parametrize("name", ["data/0", "data/1"])
@pytest.mark.parametrize("undo", ["auto", True, False])
@pytest.mark.parametrize("verify", ["auto", True])
@pytest.mark.parametrize("assign", [False, True])
def test_a_flipped_bit_is_refused(name: str, undo: Any, verify: Any, assign: bool) -> None:
    data, model = saved(STATE), Two()
    assert name in refused(model, io.BytesIO(flips(data, name)), undo=undo, verify=verify, assign=assign)
    report = smart_load(model, io.BytesIO(data), undo=undo, verify=verify, assign=assign)
    assert report.verified
    assert_same(model.state_dict(), STATE)


def test_a_flipped_bit_is_loaded_where_nothing_is_to_be_compared() -> None:
    model = Two()
    assert not smart_load(model, io.BytesIO(flips(saved(STATE), "data/1")), verify=False).verified
    assert sum(model.b != STATE["b"]) == 1


def test_without_a_copy_everything_is_compared_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    # A mismatch that came later would leave a mixture.
    written: list[object] = []
    monkeypatch.setattr("smartload.load.commit.read_all", lambda *args: written.append(args))
    refused(Two(), io.BytesIO(flips(saved(STATE), "data/1")), undo=False)
    assert not written


@pytest.mark.parametrize("piece", [64, 4096])
def test_pieces_of_one_tensor_are_read_once_by_several_threads(
    piece: int, reading: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading(piece=piece, count=4, together=False)
    state = {"a": torch.randn(50), "b": torch.randn(50)}
    torch.save(state, tmp_path / "w.pt")
    os.utime(tmp_path / "w.pt", (1, 1))
    reads: list[tuple[int, int]] = []
    real = checksums.CheckedFile.read_into

    def read_into(self: CheckedFile, offset: int, buffer: memoryview) -> None:
        reads.append((offset, len(buffer)))
        real(self, offset, buffer)

    monkeypatch.setattr(checksums.CheckedFile, "read_into", read_into)
    model = Two()
    assert smart_load(model, tmp_path / "w.pt").verified
    assert_same(model.state_dict(), state)
    assert sum(size for _, size in reads) == 400
    (tmp_path / "rot.pt").write_bytes(flips((tmp_path / "w.pt").read_bytes(), "data/0"))
    refused(model, tmp_path / "rot.pt")
    assert threading.active_count() < 10


class Cast(nn.Module):
    """Tensors that are read through a buffer: cast, bool, strided, of another byte order."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Parameter(torch.zeros(20, 20, dtype=torch.float16))
        self.register_buffer("mask", torch.zeros(30, dtype=torch.bool))
        self.turned = nn.Parameter(torch.zeros(20, 30))
        self.view = nn.Parameter(torch.zeros(5, 7))
        self.tied = nn.Parameter(torch.zeros(40))


def odd_state() -> dict[str, torch.Tensor]:
    return {
        "narrow": torch.arange(400.0).view(20, 20),
        "mask": torch.arange(30) % 3 == 0,
        "turned": torch.randn(30, 20).t(),
        "view": torch.randn(50, 70)[3:8, 5:68:9],
        "tied": torch.randn(90)[10:50],
    }


@pytest.mark.parametrize("piece", [100, 1 << 22])
def test_what_goes_through_a_buffer_is_compared(piece: int, reading: Callable[..., None]) -> None:
    reading(piece=piece)
    state, model = odd_state(), Cast()
    data = saved(state)
    assert smart_load(model, io.BytesIO(data)).verified
    right = {**state, "narrow": state["narrow"].half()}
    assert_same(model.state_dict(), {key: right[key] for key in model.state_dict()})
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = [name for name in archive.namelist() if "/data/" in name]
    assert len(names) == 5
    for name in names:
        refused(model, io.BytesIO(flips(data, name)))
        refused(model, io.BytesIO(flips(data, name)), undo=False)


def test_what_no_tensor_has_of_a_record_is_compared_as_well() -> None:
    # torch.save writes whole storages: the bit that is flipped here lies beside the view.
    state = {"a": torch.randn(90)[10:60], "b": torch.randn(50)}
    model = Two()
    assert "data/0" in refused(model, io.BytesIO(flips(saved(state), "data/0")))


def test_several_views_of_one_storage() -> None:
    whole = torch.randn(150)
    for a, b in (
        (whole[:50], whole[50:100]),
        (whole[:50], whole[30:80]),
        (whole[10:60], whole[10:60]),
        (whole[:100:2], whole[100:]),
    ):
        data, model = saved({"a": a, "b": b}), Two()
        assert smart_load(model, io.BytesIO(data)).verified
        assert_same(model.state_dict(), {"a": a, "b": b})
        refused(model, io.BytesIO(flips(data, "data/0")))


class Counter(nn.Module):
    """A module with an extra state that holds a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))
        self.extra: Any = {"seen": torch.zeros(4), "deep": [torch.zeros(2)]}

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize("undo", ["auto", False])
def test_tensors_of_an_extra_state_are_compared(undo: Any) -> None:
    source, model = Counter(), Counter()
    source.extra = {"seen": torch.arange(4.0), "deep": [torch.arange(2.0)]}
    data = saved(source.state_dict())
    for name in ("data/0", "data/1", "data/2"):
        refused(model, io.BytesIO(flips(data, name)), undo=undo)
    assert model.extra["seen"].tolist() == [0.0] * 4
    assert smart_load(model, io.BytesIO(data), undo=undo).verified
    assert model.extra["seen"].tolist() == [0.0, 1.0, 2.0, 3.0]


class Doubling(nn.Module):
    """A module whose own code sees the values before they are loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(50))
        self.seen: list[torch.Tensor] = []

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.seen.append(state_dict[f"{prefix}a"].clone())
        super()._load_from_state_dict(state_dict, prefix, *args)


def test_code_of_the_model_never_sees_a_flipped_bit() -> None:
    model, data = Doubling(), saved({"a": STATE["a"]})
    refused(model, io.BytesIO(flips(data, "data/0")))
    assert not model.seen
    smart_load(model, io.BytesIO(data))
    assert model.seen


@pytest.mark.parametrize("packed", [False, True])
def test_arrays_are_compared_with_their_headers(packed: bool, tmp_path: Path) -> None:
    save = numpy.savez_compressed if packed else numpy.savez
    save(tmp_path / "w.npz", **{key: value.numpy() for key, value in STATE.items()})
    model = Two()
    assert smart_load(model, tmp_path / "w.npz").verified
    assert_same(model.state_dict(), STATE)
    data = (tmp_path / "w.npz").read_bytes()
    refused(model, io.BytesIO(flips(data, "b.npy")))
    if not packed:  # the header, which no tensor has
        refused(model, io.BytesIO(data.replace(b"'<f4'", b"'<i4'", 1)))


def test_arrays_in_a_pickle_are_compared(tmp_path: Path) -> None:
    data, model = saved({key: value.numpy() for key, value in STATE.items()}), Two()
    assert smart_load(model, io.BytesIO(data)).verified
    assert_same(model.state_dict(), STATE)


def test_tiles_and_ranks_files_are_compared(tmp_path: Path) -> None:
    state = {"w": torch.randn(7, 9)}
    folder, model = dcp_in_chunks(state, tmp_path), nn.Module()
    model.w = nn.Parameter(torch.zeros(7, 9))
    assert smart_load(model, folder).verified
    assert_same(model.state_dict(), state)
    number = state["w"][6, 8].numpy().tobytes()
    path = next(path for path in folder.glob("*.distcp") if number in path.read_bytes())
    path.write_bytes(path.read_bytes().replace(number, number[:3] + bytes([number[3] ^ 1])))
    refused(model, folder)
    refused(model, folder, undo=False)


# ---------------------------------------------------------------------------------------------- when, and what for


def test_what_the_load_does_not_read_is_not_compared() -> None:
    net = Two()
    optimizer = torch.optim.Adam(net.parameters())
    (net.a.sum() + net.b.sum()).backward()
    optimizer.step()
    data = saved({"model": dict(STATE), "optimizer": optimizer.state_dict()})
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = [name for name in archive.namelist() if "/data/" in name]
    assert len(names) == 8
    for undo in (True, False):
        assert smart_load(net, io.BytesIO(flips(data, names[-1])), verify=True, undo=undo).verified


def test_auto_leaves_large_records_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "AUTO_BYTES", 600)
    rot, model = flips(saved(STATE), "data/0"), Two()
    refused(model, io.BytesIO(rot))
    # By what the load reads: beside it may lie an optimizer's state.
    refused(model, io.BytesIO(flips(saved({"model": dict(STATE), "more": torch.zeros(500)}), "data/0")))
    # By records, not by tensors: all of a record must be read to compare it.
    view = saved({"a": torch.zeros(500)[:50], "b": STATE["b"]})
    assert not smart_load(model, io.BytesIO(view)).verified
    monkeypatch.setattr(checksums, "AUTO_BYTES", 399)
    assert not smart_load(model, io.BytesIO(rot)).verified
    refused(model, io.BytesIO(rot), verify=True)


def test_checksums_that_were_not_computed_are_not_compared() -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        data = saved(STATE)
    finally:
        torch.serialization.set_crc32_options(before)
    model = Two()
    assert not smart_load(model, io.BytesIO(data), verify=True).verified
    assert_same(model.state_dict(), STATE)


@pytest.mark.parametrize("verify", ["yes", None, 2, "True"])
def test_other_values_are_refused(verify: Any) -> None:
    with pytest.raises(ValueError, match=r"verify must be True, False or 'auto', not"):
        smart_load(Two(), io.BytesIO(saved(STATE)), verify=verify)


def test_a_clean_file_is_made_of_right_bytes_only(tmp_path: Path) -> None:
    (tmp_path / "to.pth").write_bytes(b"old")
    for name, state in {"data/0": STATE, "data/1": {"a": STATE["a"], "view": torch.zeros(90)[:40]}}.items():
        with pytest.raises(SmartLoadError, match="does not have the checksum"):
            convert(io.BytesIO(flips(saved(state), name)), tmp_path / "to.pth")
        assert (tmp_path / "to.pth").read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["to.pth"]
    convert(io.BytesIO(saved(STATE)), tmp_path / "to.pth")
    assert_same(torch.load(tmp_path / "to.pth"), STATE)


def test_shards_are_never_overwritten_by_their_clean_file(tmp_path: Path) -> None:
    # The files that compare checksums must still say where they lie.
    torch.save(STATE, tmp_path / "pytorch_model-00001-of-00001.bin")
    index = '{"weight_map": {"a": "pytorch_model-00001-of-00001.bin", "b": "pytorch_model-00001-of-00001.bin"}}'
    (tmp_path / "pytorch_model.bin.index.json").write_text(index, encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    os.link(tmp_path / "pytorch_model-00001-of-00001.bin", tmp_path / "elsewhere" / "to.bin")
    with pytest.raises(SmartLoadError) as caught:
        convert(tmp_path / "pytorch_model.bin.index.json", tmp_path / "elsewhere" / "to.bin")
    assert caught.value.problem.kind == "own-source"  # type: ignore[union-attr]
