"""Pickles that torch.save did not write, and the arrays of NumPy wherever they stand."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from numpy.lib import format as npy
from reading_tools import CANARY, assert_same, opened, read, saved, text, watched
from torch import nn

from smartload import UnreadableError, UnsafeCheckpointError, inspect, smart_load
from smartload.formats import pickle_file as plain
from smartload.load.transfer import read_tensor
from smartload.pickles.arrays import DTYPES, strides
from smartload.reading import files as readers
from smartload.records.entries import Beside, Span

PROTOCOLS = range(6)
ARRAYS = {
    "row": numpy.arange(6, dtype="f4").reshape(2, 3),
    "column": numpy.asfortranarray(numpy.arange(6, dtype="f8").reshape(2, 3)),
    "turned": numpy.arange(6, dtype="i8").reshape(2, 3).T,
    "slice": numpy.arange(20, dtype="i4")[::3],
    "backwards": numpy.arange(5, dtype="f4")[::-1],
    "scalar": numpy.array(2.5),
    "empty": numpy.empty((0, 3), dtype="f2"),
    "big": numpy.arange(3, dtype=">f4"),
    "bool": numpy.array([True, False]),
    "cube": numpy.arange(24, dtype="u1").reshape(2, 3, 4),
}


def as_tensors(arrays: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(numpy.ascontiguousarray(a).astype(a.dtype.newbyteorder("="))).reshape(a.shape)
        for name, a in arrays.items()
    }


def kind_of(data: bytes) -> str:
    with pytest.raises(UnreadableError) as caught:
        read(data)
    assert str(caught.value).isprintable()
    return caught.value.problem.kind  # type: ignore[union-attr]


def the(data: bytes) -> dict[str, torch.Tensor]:
    """All tensors at the top of a file, those in memory too."""
    with opened(data) as checkpoint:
        entries = checkpoint.parts[""].entries
        return {key: read_tensor(entry, checkpoint.files) for key, entry in entries.items() if isinstance(entry, Span)}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tensors_of_any_protocol(protocol: int) -> None:
    base = torch.arange(12.0)
    state = {"a": base[2:8].view(2, 3), "b": base, "half": torch.ones(2).half(), "count": torch.tensor(3)}
    assert_same(the(pickle.dumps(state, protocol)), state)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_of_any_protocol(protocol: int) -> None:
    assert_same(the(pickle.dumps(ARRAYS, protocol)), as_tensors(ARRAYS))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_in_files_of_torch(protocol: int) -> None:
    assert_same(the(saved(ARRAYS, pickle_protocol=protocol)), as_tensors(ARRAYS))
    assert_same(the(saved(ARRAYS, pickle_protocol=protocol, _use_new_zipfile_serialization=False)), as_tensors(ARRAYS))


def test_arrays_of_python_2() -> None:
    """Bytes were text there: what happens to be UTF-8 comes as a str."""
    for raw in (b"\x00\x00\x80?", b"abcd", b"\xff\xff\xff\xff"):
        dtype = b"cnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
        array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        state = b"(I1\n(I1\nt" + dtype + b"I00\nU\x04" + raw + b"tb"
        assert the(b"\x80\x02}" + text("w") + array + state + b"s.")["w"].numpy().tobytes() == raw


def test_shared_storages_stay_shared() -> None:
    weight = torch.ones(2, 3)
    for protocol in (2, 4):
        entries = read(pickle.dumps({"a": weight, "b": weight}, protocol)).parts[""].entries
        assert entries["a"] == entries["b"]


def test_later_protocols_lie_in_the_file_and_are_not_copied(tmp_path: Path) -> None:
    for value in ({"w": torch.ones(1000)}, {"w": numpy.ones(1000)}):
        for protocol in (3, 4, 5):
            checkpoint = read(pickle.dumps(value, protocol))
            assert len(checkpoint.files) == 1
        assert len(read(pickle.dumps(value, 2)).files) == 2


def test_what_no_state_dict_names_takes_no_memory() -> None:
    """Arrays beside the weights, a replay buffer say, are counted and let go."""
    checkpoint = read(pickle.dumps({"model": {"w": torch.ones(1)}, "buffer": [numpy.zeros(100_000)]}, 2))
    assert checkpoint.aside == (Beside("buffer", "1 tensor in a list of 1", 1),)
    assert sum(file.size for file in checkpoint.files[1:]) < 5_000


def test_one_array_under_many_names_is_held_once() -> None:
    array = numpy.zeros(1000)
    checkpoint = read(pickle.dumps({f"w{i}": array for i in range(500)}, 2))
    assert len(checkpoint.files) == 2


def test_a_pickled_module_is_its_weights() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    for protocol in (2, 5):
        data = pickle.dumps(nn.DataParallel(net), protocol)
        assert_same(the(data), {f"module.{key}": value for key, value in net.state_dict().items()})
        assert read(data).parts[""].kind.startswith("module torch.nn.parallel")


def test_an_object_that_holds_modules_gives_each_of_them() -> None:
    data = saved(Trainer())
    assert read(data).parts.keys() == {"encoder", "decoder"}
    decoder = nn.Linear(2, 3)
    report = smart_load(decoder, io.BytesIO(data))
    assert report.plan.part == "decoder"
    assert [item.path for item in report.aside] == ["lr", "optimizer"]


class Trainer:
    def __init__(self) -> None:
        self.encoder, self.decoder, self.lr = nn.Linear(2, 2), nn.Linear(2, 3), 0.1
        self.optimizer = torch.optim.Adam(self.encoder.parameters())


def test_the_devices_of_storages_in_pickles_are_told() -> None:
    assert inspect(io.BytesIO(pickle.dumps({"w": torch.ones(2)}))).tags == {"cpu": 1}


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (pickle.dumps({"w": torch.ones(1)}) + b"x", "pickle_more"),
        (pickle.dumps({"w": torch.ones(1)}) + pickle.dumps(3), "pickle_more"),
        (pickle.dumps({"w": torch.ones(1)})[:-1], "pickle_short"),
        (b"\x80\x02}" + text("w") + b"K\x01Qs.", "pickle_ids"),
        (pickle.dumps([torch.ones(1)]), "a_list"),
        (pickle.dumps(torch.ones(1)), "bare_tensor"),
        (pickle.dumps({1: torch.ones(1)}), "odd_keys"),
    ],
)
def test_pickles_that_hold_no_state_dict_say_why(data: bytes, kind: str) -> None:
    assert kind_of(data) == kind


def inner(data: bytes) -> bytes:
    """A pickle of one tensor whose storage is the given bytes."""
    load = b"ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(data)) + data + b"\x85R"
    hooks = b"ccollections\nOrderedDict\n)R"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + load + b"K\x00K\x02\x85K\x01\x85\x89" + hooks + b"tR"
    return b"\x80\x03}" + text("w") + rebuilt + b"s."


LEGACY: dict[str, Any] = {"_use_new_zipfile_serialization": False}
STORAGE = saved(torch.ones(2)._typed_storage(), **LEGACY)


def test_a_storage_inside_is_read_by_the_rules_of_any_file() -> None:
    assert the(inner(STORAGE))["w"].tolist() == [1.0, 1.0]
    for data, kind in (
        (STORAGE[:-1], "shorter"),
        (STORAGE[:40], "pickle_short"),
        (b"", "pickle_short"),
        (saved({"a": torch.ones(2)}, **LEGACY), "storage_id"),
        (saved(3, **LEGACY), "storage_id"),
        (pickle.dumps(3), "pickle_short"),
    ):
        assert kind_of(inner(data)) == kind


def test_only_bytes_can_be_a_storage() -> None:
    bad = inner(b"").replace(b"B\0\0\0\0\x85R", b"K\x03\x85R")
    assert kind_of(bad) == "storage_id"
    with pytest.raises(UnsafeCheckpointError):
        read(inner(b"").replace(b"_load_from_bytes", b"_load_from_elsewhere"))


def test_a_pickle_of_gadgets_is_not_run() -> None:
    class Gadget:
        def __reduce__(self) -> object:
            return eval, (f"open({str(CANARY)!r}, 'w')",)

    for protocol in PROTOCOLS:
        data = pickle.dumps({"w": torch.ones(1), "x": Gadget(), "y": {"z": Gadget()}}, protocol)
        with watched() as seen:
            assert the(data)["w"].tolist() == [1.0]
        assert seen == []
    assert not CANARY.exists()


def test_text_that_looks_like_the_beginning_of_a_pickle_is_text() -> None:
    for words in (b"(see the readme for the weights.)", b"checkpoint not found.", b"(.", b"]."):
        assert kind_of(words) in ("text", "unknown")


def test_a_pickle_too_large_to_be_read_whole_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "MAX_PICKLE", 10)
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"w": torch.ones(9)}))
    with pytest.raises(UnreadableError, match=r"w\.pkl: this pickle .* takes more than 10 bytes"):
        inspect(tmp_path / "w.pkl")


# ------------------------------------------------------------------------------------------------- arrays, npz


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_numpy_that_torch_has(dtype: str) -> None:
    arrays = {"a": numpy.array([[0, 1], [1, 0]]).astype(dtype), "b": numpy.array([0, 1]).astype(f">{dtype}")}
    for data in (pickle.dumps(arrays, 2), pickle.dumps(arrays, 5), npz(arrays)):
        assert_same(the(data), as_tensors(arrays))


def npz(arrays: dict[str, Any], compressed: bool = False) -> bytes:
    file = io.BytesIO()
    (numpy.savez_compressed if compressed else numpy.savez)(file, **arrays)
    return file.getvalue()


@pytest.mark.parametrize("compressed", [False, True])
def test_archives_of_arrays(compressed: bool) -> None:
    assert_same(the(npz(ARRAYS, compressed)), as_tensors(ARRAYS))
    named = {"layer/0/weight": ARRAYS["row"], "layer.0.bias": ARRAYS["scalar"]}
    assert_same(the(npz(named, compressed)), as_tensors(named))


def test_arrays_that_torch_cannot_hold_are_named() -> None:
    odd = {
        "names": numpy.array(["a"]),
        "objects": numpy.array([{"a": 1}, None]),
        "times": numpy.array(["2020-01-01"], dtype="M8[s]"),
        "rows": numpy.zeros(2, dtype=[("x", "f4"), ("y", "i4")]),
        "wide": numpy.zeros(2, dtype=numpy.longdouble),
    }
    if odd["wide"].itemsize == 8:  # on Windows, and on many a Mac, it is a float64
        del odd["wide"]
    for data in (pickle.dumps(odd | {"w": ARRAYS["row"]}), npz(odd | {"w": ARRAYS["row"]})):
        entries: Any = read(data).parts[""].entries
        assert isinstance(entries["w"], Span)
        assert all(entries[key].what.startswith("a numpy array ") and entries[key].tensor for key in odd)


def test_objects_in_an_archive_of_arrays_are_not_run() -> None:
    class Gadget:
        def __reduce__(self) -> object:
            return eval, (f"open({str(CANARY)!r}, 'w')",)

    with watched() as seen:
        read(npz({"a": numpy.array([Gadget()], dtype=object), "w": ARRAYS["row"]}))
    assert seen == []
    assert not CANARY.exists()


def header(text: str, data: bytes = b"\0" * 8) -> bytes:
    raw = text.encode("latin1")
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(raw)) + raw + data


def archive(member: bytes, name: str = "w.npy", method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as out:
        out.writestr(name, member)
    return file.getvalue()


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"


@pytest.mark.parametrize(
    ("member", "what"),
    [
        (header(GOOD), None),
        (header(GOOD + " " * 100 + "\n"), None),
        (header(GOOD.replace("<f4", "<V4")), "of type V4"),
        (header(GOOD.replace("'<f4'", "__import__('os')")), "that torch cannot hold"),
        (header(GOOD.replace("(2,)", "(-2,)")), "that torch cannot hold"),
        (header(GOOD.replace("False", "0")), "that torch cannot hold"),
        (header(GOOD + "#" * 5000), "that torch cannot hold"),
        (b"\x93NUMPY\1\0\xff\xff", "that torch cannot hold"),
        (b"text", "no numpy array"),
        (b"", "no numpy array"),
    ],
)
def test_headers_of_arrays_are_read_by_the_letter(member: bytes, what: str | None) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        entry: Any = read(archive(member, method=method)).parts[""].entries["w"]
        assert isinstance(entry, Span) if what is None else what in entry.what


@pytest.mark.parametrize("shape", ["(3,)", "(1,)", "(281474976710656, 281474976710656)"])
def test_an_array_takes_the_bytes_that_its_header_says(shape: str) -> None:
    assert kind_of(archive(header(GOOD.replace("(2,)", shape)))) == "record_size"
    assert kind_of(archive(header(GOOD.replace("(2,)", shape)), method=zipfile.ZIP_DEFLATED)) == "record_size"


def test_newer_headers_are_read() -> None:
    for version in ((1, 0), (2, 0), (3, 0)):
        file = io.BytesIO()
        npy.write_array(file, ARRAYS["row"], version=version)
        assert_same(the(archive(file.getvalue())), as_tensors({"w": ARRAYS["row"]}))


def test_arrays_that_are_packed_are_compared_with_their_checksum() -> None:
    data = bytearray(npz({"w": numpy.random.default_rng(0).normal(size=1000)}, compressed=True))
    data[2000] ^= 1
    assert kind_of(bytes(data)) == "crc"


def test_a_flood_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "UNPACKED", 1000)
    assert kind_of(npz({"w": numpy.zeros(100_000)}, compressed=True)) == "grows"


def test_a_single_array_is_named() -> None:
    file = io.BytesIO()
    numpy.save(file, ARRAYS["row"])
    assert kind_of(file.getvalue()) == "numpy"


def test_strides_count_elements() -> None:
    for shape in ((), (3,), (2, 3), (2, 3, 4), (0, 3), (1, 1)):
        for order in "CF":
            array = numpy.empty(shape, order=order)  # type: ignore[call-overload]
            if array.size:
                assert strides(shape, order == "F") == tuple(step // 8 for step in array.strides)


def test_an_extra_state_with_an_array_is_no_tensor() -> None:
    """A module that saved an array gets none instead of a tensor that it did not save."""
    found: Any = read(saved({"w": torch.ones(1), "_extra_state": {"a": numpy.ones(2)}})).parts[""].entries
    assert "numpy" in found["_extra_state"].what


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (2, 1, 0)])
def test_arrays_whose_axes_are_in_another_order(protocol: int, axes: tuple[int, ...]) -> None:
    arrays = {"w": numpy.arange(24, dtype="f4").reshape(2, 3, 4).transpose(axes)}
    assert_same(the(pickle.dumps(arrays, protocol)), as_tensors(arrays))


class Kept(numpy.ndarray):
    """An array of its own class, like numpy.memmap."""


@pytest.mark.parametrize("protocol", [2, 4])
def test_arrays_of_their_own_class_are_no_less_than_tensors(protocol: int) -> None:
    """Passed over in silence they would be lost."""
    data = pickle.dumps({"w": torch.ones(1), "odd": numpy.ones(2).view(Kept)}, protocol)
    entries: Any = read(data).parts[""].entries
    assert entries["odd"].tensor
    assert entries["odd"].what == "a numpy array of its own class"
