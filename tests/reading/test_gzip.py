"""Files inside of other containers: gzip around anything, and the tar archives of 2017."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from formats import tar_of_2017
from reading_tools import assert_same, read, saved, tensors, watched
from torch import nn

from smartload import UnreadableError, inspect, smart_load
from smartload.reading import files as readers

STATE = {"0.weight": torch.randn(2, 3), "0.bias": torch.ones(2), "count": torch.tensor(3)}
TAR = tar_of_2017(STATE)


def kind_of(data: bytes) -> str:
    with pytest.raises(UnreadableError) as caught:
        read(data)
    assert str(caught.value).isprintable()
    return caught.value.problem.kind  # type: ignore[union-attr]


@pytest.mark.parametrize("level", [0, 1, 9])
def test_gzip_of_a_checkpoint_is_read(level: int) -> None:
    data = gzip.compress(saved(STATE), level)
    assert_same(tensors(data), STATE)
    assert read(data).format == "torch zip, gzip"


def test_gzip_in_several_members_is_read() -> None:
    whole = saved(STATE)
    assert_same(tensors(gzip.compress(whole[:500]) + gzip.compress(whole[500:])), STATE)


def test_gzip_of_what_is_no_checkpoint_says_what_that_is() -> None:
    assert kind_of(gzip.compress(b"<!DOCTYPE html><html></html>")) == "html"
    assert kind_of(gzip.compress(b"")) == "empty"
    assert kind_of(gzip.compress(gzip.compress(saved(STATE)))) == "unknown"


@pytest.mark.parametrize("zeros", [1, 100, 20_000])
def test_zeros_behind_a_gzip_are_padding(zeros: int) -> None:
    data = gzip.compress(saved(STATE)) + bytes(zeros)
    assert_same(tensors(data), STATE)
    assert_same(tensors(data + gzip.compress(b"") + bytes(zeros)), STATE)


def test_damaged_gzip_is_refused() -> None:
    data = gzip.compress(saved(STATE))
    assert kind_of(data[:-1]) == "gzip_cut"
    assert kind_of(data[:100]) == "gzip_cut"
    assert kind_of(data + b"junk") == "gzip_damaged"
    for at in (len(data) // 2, len(data) - 6, 3):
        assert kind_of(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]) in ("gzip_damaged", "gzip_cut")


def test_a_flood_is_stopped_before_it_takes_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "UNPACKED", 1 << 20)
    data = gzip.compress(b"\0" * (200 << 20), 1)
    tracemalloc.start()
    assert kind_of(data) == "grows"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 << 20


def test_a_gzip_of_nothing_but_zeros_may_still_be_weights() -> None:
    data = gzip.compress(saved({"w": torch.zeros(1_000_000)}))
    assert tensors(data)["w"].sum() == 0


# ---------------------------------------------------------------------------------------------------- tar, 2017


def test_the_tar_of_2017_is_what_torch_reads(tmp_path: Path) -> None:
    (tmp_path / "old.pth.tar").write_bytes(TAR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(dict(torch.load(tmp_path / "old.pth.tar", weights_only=False)), STATE)
    assert_same(tensors(TAR), STATE)
    found = inspect(tmp_path / "old.pth.tar")
    assert (found.format, found.tags) == ("torch tar", {"cpu": 3})


def test_nothing_is_extracted() -> None:
    with watched() as seen:
        read(TAR)
    assert seen == []


def retarred(change: dict[str, Any], extra: dict[str, bytes] | None = None, kind: bytes = tarfile.REGTYPE) -> bytes:
    """The archive with members changed by functions of their bytes, or left out."""
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(TAR)) as old, tarfile.open(fileobj=out, mode="w:") as new:
        for member in old.getmembers():
            edit = change.get(member.name, lambda data: data)
            if edit is None:
                continue
            data = edit(old.extractfile(member).read())  # type: ignore[union-attr]
            info = tarfile.TarInfo(member.name)
            info.size, info.type = len(data), kind
            new.addfile(info, io.BytesIO(data))
        for name, data in (extra or {}).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            new.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _set(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


TENSORS: bytes = tarfile.open(fileobj=io.BytesIO(TAR)).extractfile("tensors").read()  # type: ignore[union-attr]  # noqa: SIM115
AT = TENSORS.index(struct.pack("<qqqqq", 2, 3, 3, 1, 0))


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"tensors": lambda data: _set(data, AT, struct.pack("<q", 99))}, "tensor_outside"),
        ({"tensors": lambda data: _set(data, AT, struct.pack("<q", -1))}, "tensor"),
        ({"tensors": lambda data: _set(data, AT + 16, struct.pack("<q", 1 << 40))}, "tensor_outside"),
        ({"tensors": lambda data: _set(data, AT + 32, struct.pack("<q", 1))}, "tensor_outside"),
        ({"tensors": lambda data: _set(data, AT - 8, struct.pack("<i", 65))}, "tar_broken"),
        ({"tensors": lambda data: _set(data, AT - 8, struct.pack("<i", -1))}, "tar_broken"),
        ({"tensors": lambda data: data[: AT + 3]}, "shorter"),
        ({"tensors": lambda data: data[:1]}, "pickle_short"),
        ({"tensors": lambda data: b"\x80\x02J\xff\xff\xff\x7f." + data}, "tar_broken"),
        ({"storages": lambda data: b"\x80\x02K\x7f." + data[5:]}, "tar_broken"),
        ({"storages": lambda data: data[:-10]}, "shorter"),
        ({"storages": lambda data: data.replace(b"FloatStorage", b"XloatStorage")}, "tar_broken"),
        ({"pickle": lambda data: data[:-1]}, "pickle_short"),
        ({"pickle": lambda data: b"\x80\x02}."}, "no_weights"),
        ({"pickle": None}, "tar"),
        ({"storages": None}, "tar"),
    ],
)
def test_an_archive_that_lies_is_refused(change: dict[str, Any], kind: str) -> None:
    if kind == "no_weights":
        assert read(retarred(change)).parts[""].entries == {}
        return
    assert kind_of(retarred(change)) == kind


def test_members_that_are_links_or_devices_are_no_members() -> None:
    for kind in (tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
        assert kind_of(retarred({}, kind=kind)) == "tar"


def test_a_member_twice_is_refused() -> None:
    assert kind_of(retarred({}, {"pickle": b"\x80\x02}."})) == "zip_twice"


def test_names_that_lead_elsewhere_are_nothing_to_the_reader() -> None:
    assert_same(tensors(retarred({}, {"../../etc/passwd": b"x", "/absolute": b"y"})), STATE)


@pytest.mark.parametrize("at", [130, 150])
def test_a_header_that_does_not_add_up_is_refused(at: int) -> None:
    head = next(at for at in range(0, len(TAR), 512) if TAR[at : at + 7] == b"pickle\0")
    other = bytes([TAR[head + at] ^ 1])
    assert kind_of(_set(TAR, head + at, other)) == "tar_broken"


def test_views_of_storages_are_read() -> None:
    """A storage may be a stretch of another one."""
    import pickle

    def shared(data: bytes) -> bytes:
        assert data.endswith(pickle.dumps([], 2))
        return data.removesuffix(pickle.dumps([], 2)) + pickle.dumps([(5000, 1000, 1, 2)], 2)

    def viewing(data: bytes) -> bytes:
        first = pickle.dumps((1003, 1002, torch.FloatTensor), 2)
        assert first in data
        return data.replace(first, pickle.dumps((1003, 5000, torch.FloatTensor), 2))

    got = tensors(retarred({"storages": shared, "tensors": viewing}))
    assert torch.equal(got["0.bias"], STATE["0.weight"].flatten()[1:3])
    for bad in ((5000, 1000, 5, 2), (5000, 1000, -1, 2), (5000, 77, 0, 1), (5000, 1000, 0), 3):
        lying = retarred({"storages": lambda data, bad=bad: data[: -len(pickle.dumps([], 2))] + pickle.dumps([bad], 2)})
        assert kind_of(lying) == "tar_broken"


def test_a_tar_of_something_else_is_named() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for number in range(1500):
            archive.addfile(tarfile.TarInfo(f"file{number}"))
    assert kind_of(out.getvalue()) == "tar"


def test_it_loads_into_a_model(tmp_path: Path) -> None:
    (tmp_path / "old.pth").write_bytes(tar_of_2017({k: v for k, v in STATE.items() if k != "count"}))
    net = nn.Sequential(nn.Linear(3, 2))
    smart_load(net, tmp_path / "old.pth")
    assert torch.equal(net[0].weight, STATE["0.weight"])
