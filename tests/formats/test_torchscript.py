"""Programs: the weights are those that torch would have, and the program does not run."""

from __future__ import annotations

import io
import json
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from dtypes import DTYPES, dtype
from formats import Shadow, rezipped
from reading_tools import (
    TWO_FLOATS,
    assert_same,
    floats,
    read,
    rebuilt,
    tensors,
    text,
    unzipped,
    watched,
    zipped,
)
from torch import nn

from smartload import UnreadableError, inspect, smart_load
from smartload.records.entries import Beside

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.[a-z_]*` is deprecated")


class Net(nn.Module):
    """Parameters, buffers of both kinds, plain tensors, a shared child and a list of children."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.again = self.fc
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.BatchNorm1d(2)])
        self.weight = nn.Parameter(torch.randn(2, 3).t())
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("temporary", torch.ones(2), persistent=False)
        self.plain = torch.arange(4.0)
        self.number = 3
        self.names = ["a"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x * self.plain.sum() * self.number + self.temporary


def saved(program: Any) -> bytes:
    file = io.BytesIO()
    torch.jit.save(program, file)
    return file.getvalue()


def theirs(data: bytes) -> dict[str, torch.Tensor]:
    return dict(torch.jit.load(io.BytesIO(data)).state_dict())


def in_order(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(sorted(state.items()))


@pytest.fixture(scope="module")
def scripted() -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return saved(torch.jit.script(Net().eval()))


@pytest.fixture(scope="module")
def traced() -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return saved(torch.jit.trace(Net().eval(), torch.ones(1, 2)))


def test_a_scripted_module_has_what_torch_gives_it(scripted: bytes) -> None:
    assert_same(in_order(tensors(scripted)), in_order(theirs(scripted)))
    assert read(scripted).aside == (Beside("", "tensors that are neither parameters nor buffers of the program", 1),)
    assert read(scripted).format == "TorchScript"


def test_a_traced_module_has_what_torch_gives_it(traced: bytes) -> None:
    assert_same(in_order(tensors(traced)), in_order(theirs(traced)))


@pytest.mark.parametrize(
    "module",
    [
        nn.LSTM(3, 4, 2, bidirectional=True),
        nn.GRU(3, 4),
        nn.TransformerEncoderLayer(8, 2, 16),
        nn.MultiheadAttention(8, 2),
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()),
        nn.EmbeddingBag(5, 3),
        nn.Linear(2, 2).half(),
        nn.Linear(2, 2).double(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_networks_of_torch(module: nn.Module) -> None:
    data = saved(torch.jit.script(module.eval()))
    assert_same(in_order(tensors(data)), in_order(theirs(data)))
    assert_same(in_order(tensors(data)), in_order(dict(module.state_dict())))


def test_a_frozen_program_has_constants_and_no_weights(scripted: bytes) -> None:
    frozen = torch.jit.freeze(torch.jit.load(io.BytesIO(scripted)))
    found = read(saved(frozen))
    assert not found.parts[""].entries
    assert not theirs(saved(frozen))


def test_a_program_is_a_target_like_any_model(scripted: bytes) -> None:
    model = torch.jit.script(Net().eval())
    smart_load(model, io.BytesIO(scripted))
    assert_same(in_order(dict(model.state_dict())), in_order(theirs(scripted)))


def test_nothing_of_the_program_is_run(scripted: bytes) -> None:
    body = b"class Net(Module):\n  def __setstate__(self, state: int) -> NoneType:\n    import os\n    os.system('x')\n"
    evil = rezipped(
        scripted, lambda name, data: body if name.endswith("Net.py") or name == "code/__torch__.py" else data
    )
    with watched() as seen:
        read(evil)
    assert seen == []


def test_where_the_text_is_missing_all_tensors_are_taken(scripted: bytes) -> None:
    """A tensor too many is refused by name; a buffer too few would be a lie."""
    bare = zipped({name: data for name, data in unzipped(scripted).items() if not name.startswith("code/")})
    assert tensors(bare).keys() == theirs(scripted).keys() | {"plain"}


def test_text_that_names_no_buffers_leaves_them_in(scripted: bytes) -> None:
    """Releases before 1.5 did not write which attributes are buffers."""

    def older(name: str, data: bytes) -> bytes:
        return re.sub(rb"  __buffers__ = .*\n", b"", data) if name.endswith(".py") else data

    assert tensors(rezipped(scripted, older)).keys() == theirs(scripted).keys() | {"plain"}


def test_code_that_would_unpack_to_a_flood_is_refused() -> None:

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        pickle = b"\x80\x02c__torch__\nNet\n)\x81}X\x01\x00\x00\x00aK\x01sb."
        archive.writestr("a/data.pkl", pickle)
        archive.writestr("a/constants.pkl", b"\x80\x02).")
        archive.writestr("a/code/__torch__.py", b"\n" * (66 << 20), zipfile.ZIP_DEFLATED)
    assert read(file.getvalue()).parts[""].entries == {}  # the text is not read, and nothing hangs on it


def test_a_program_that_contains_itself_is_refused() -> None:
    pickle = b"\x80\x02c__torch__\nNet\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb."
    with pytest.raises(UnreadableError, match="contains itself"):
        read(zipped({"data.pkl": pickle, "constants.pkl": b"\x80\x02)."}))


@pytest.mark.parametrize("pickle", [b"\x80\x02K\x01.", b"\x80\x02}.", b"\x80\x02c__torch__\nNet\n)\x81."])
def test_a_program_without_a_module_is_refused(pickle: bytes) -> None:
    with pytest.raises(UnreadableError, match="it holds no weights"):
        read(zipped({"data.pkl": pickle, "constants.pkl": b"\x80\x02)."}))


def test_doublings_end_early() -> None:
    """Sixty objects, each twice in the next: the names would never end."""
    pickle = b"\x80\x02c__torch__\nNet\nq\x00)\x81}bq\x01"
    for _ in range(60):
        pickle += b"h\x00)\x81}(X\x01\x00\x00\x00ah\x01X\x01\x00\x00\x00bh\x01ubq\x01"
    with pytest.raises(UnreadableError, match="has more names"):
        read(zipped({"data.pkl": pickle + b".", "constants.pkl": b"\x80\x02)."}))


# ------------------------------------------------------------------------------------------- exported programs


STATE = {"a.b.weight": torch.arange(6.0).view(2, 3), "a.count": torch.tensor(3), "top": torch.ones(2, 2).t()}


def exported(module: nn.Module, path: Path, *inputs: torch.Tensor) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(module, inputs), path)
    return path


@pytest.fixture(scope="module")
def exported_net(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return exported(Net().eval(), tmp_path_factory.mktemp("pt2") / "p.pt2", torch.ones(1, 2)).read_bytes()


def test_an_exported_program_has_what_torch_gives_it(exported_net: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = {key: value.detach() for key, value in torch.export.load(io.BytesIO(exported_net)).state_dict.items()}
    assert_same(in_order(tensors(exported_net)), in_order(want))
    found = read(exported_net)
    assert found.format == "torch.export"
    assert found.tags == {"cpu": len(want) - 2}  # two of them have two names
    if CONFIG in unzipped(exported_net):
        assert found.aside[0].tensors == 2  # the temporary buffer and the plain tensor


def test_tied_weights_of_an_exported_program_are_one_tensor(program: bytes) -> None:
    entries = read(program).parts[""].entries
    assert entries["fc.weight"] == entries["again.weight"]


CONFIG = "data/weights/model_weights_config.json"


def listed(**programs: dict[str, torch.Tensor]) -> bytes:
    """What torch.export.save writes of float32 since 2.9: the list of weights of each program, and their bytes."""
    records, paths = {"archive_format": b"pt2", "byteorder": b"little"}, {}
    for name, state in programs.items():
        config = {}
        for key, value in state.items():
            path = paths.setdefault(id(value), f"weight_{len(paths)}")
            records[f"data/weights/{path}"] = value.numpy().tobytes()
            config[key] = {
                "path_name": path,
                "is_param": True,
                "use_pickle": False,
                "tensor_meta": {
                    "dtype": 7,
                    "sizes": [{"as_int": size} for size in value.shape],
                    "requires_grad": True,
                    "device": {"type": "cpu", "index": None},
                    "strides": [{"as_int": step} for step in value.stride()],
                    "storage_offset": {"as_int": 0},
                    "layout": 7,
                },
            }
        records[f"data/weights/{name}_weights_config.json"] = json.dumps({"config": config}).encode()
    return zipped(records)


@pytest.fixture
def program() -> bytes:
    weight, bias = torch.randn(2, 3), torch.randn(2)
    return listed(model={"fc.weight": weight, "fc.bias": bias, "again.weight": weight})


def test_a_list_of_weights_is_as_torch_writes_it(exported_net: bytes) -> None:
    """The list by which the tests below go, for which torch needs to be 2.9."""
    names = unzipped(exported_net)
    if CONFIG in names:
        theirs = json.loads(names[CONFIG])["config"]["fc.weight"]
        ours = json.loads(unzipped(listed(model={"fc.weight": torch.ones(2, 3)}))[CONFIG])["config"]["fc.weight"]
        assert ours | {"path_name": theirs["path_name"]} == theirs


def with_config(data: bytes, change: Any) -> bytes:
    def edit(name: str, old: bytes) -> bytes:
        if name != CONFIG:
            return old
        config = json.loads(old)
        change(config["config"])
        return json.dumps(config).encode()

    return rezipped(data, edit)


def _weight(config: Any) -> Any:
    return config["fc.weight"]["tensor_meta"]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda config: config["fc.weight"].update(path_name="../../version"), "record_missing"),
        (lambda config: config["fc.weight"].update(path_name="weight_99"), "record_missing"),
        (lambda config: config["fc.weight"].pop("path_name"), "record_odd"),
        (lambda config: config["fc.weight"].update(path_name=[], use_pickle=True), "damaged"),
        (lambda config: config["fc.weight"].update(tensor_meta=None), "record_odd"),
        (lambda config: config.update({"x": 3}), "record_odd"),
        (lambda config: _weight(config).update(sizes=[{"as_int": 99}, {"as_int": 3}]), "tensor_outside"),
        (lambda config: _weight(config).update(sizes=[{"as_int": -2}, {"as_int": 3}]), "tensor"),
        (lambda config: _weight(config).update(sizes=[{"as_int": True}, {"as_int": 3}]), "tensor"),
        (lambda config: _weight(config).update(sizes=3), "tensor"),
        (lambda config: _weight(config).update(strides=[{"as_expr": "s0"}]), "tensor"),
        (lambda config: _weight(config).update(storage_offset={"as_int": 1}), "tensor_outside"),
        (lambda config: _weight(config).update(storage_offset={"as_int": -1}), "tensor"),
        (lambda config: _weight(config).update(storage_offset={"as_int": 0.5}), "tensor"),
    ],
)
def test_an_exported_config_that_lies_is_refused(program: bytes, change: Any, kind: str) -> None:
    with pytest.raises(UnreadableError) as caught:
        read(with_config(program, change))
    assert caught.value.problem.kind == kind  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "change", [{"use_pickle": True}, {"layout": 1}, {"dtype": 99}, {"dtype": "7"}, {"dtype": 7.0}, {"dtype": True}]
)
def test_tensors_that_are_not_plain_are_named(program: bytes, change: dict[str, Any]) -> None:
    def edit(config: Any) -> None:
        (config["fc.weight"] if "use_pickle" in change else _weight(config)).update(change)

    entry: Any = read(with_config(program, edit)).parts[""].entries["fc.weight"]
    assert entry.what == "a tensor subclass"


def test_several_programs_in_one_archive_are_parts(tmp_path: Path) -> None:
    programs = {name: {"w": torch.full((2,), value)} for name, value in (("one", 1.0), ("two", 2.0))}
    (tmp_path / "two.pt2").write_bytes(listed(**programs))
    assert inspect(tmp_path / "two.pt2").parts.keys() == {"one", "two"}
    net = Shadow({"w": torch.zeros(2)})
    smart_load(net, tmp_path / "two.pt2", select="two")
    assert net.w.tolist() == [2.0, 2.0]


def packed(records: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return file.getvalue()


def test_programs_of_earlier_releases_hold_a_file_of_torch_save() -> None:
    file = io.BytesIO()
    torch.save(STATE, file)
    old = {"version": b"8.9", "serialized_exported_program.json": b"{}"}
    for name in ("serialized_state_dict.pt", "serialized_state_dict.json"):
        assert_same(tensors(packed(old | {name: file.getvalue()})), STATE)
    new = {"p/archive_format": b"pt2", "p/archive_version": b"0", "p/byteorder": b"little"}
    one = {"p/data/weights/model.pt": file.getvalue()}
    assert_same(tensors(packed(new | one)), STATE)
    assert read(packed(new | one)).format == "torch.export"
    arrays = io.BytesIO()
    torch.save({"w": numpy.arange(3.0)}, arrays)  # its bytes are not in the file as they are
    net = Shadow({"w": torch.zeros(3)})
    smart_load(net, io.BytesIO(packed(old | {"serialized_state_dict.pt": arrays.getvalue()})))
    assert net.w.tolist() == [0.0, 1.0, 2.0]
    for data, kind in (
        (packed(old), "torch_export"),
        (packed(new), "torch_export"),
        (packed(new | one | {"p/data/weights/other.pt": file.getvalue()}), "torch_export"),
        (packed(new | one, zipfile.ZIP_DEFLATED), "zip_packed"),
        (packed(new | {"p/data/weights/model.pt": b"PK"}), "zip_cut"),
    ):
        with pytest.raises(UnreadableError) as caught:
            read(data)
        assert caught.value.problem.kind == kind  # type: ignore[union-attr]


# ---------------------------------------------------------------------------------- what only a program can hold


class Holder(nn.Module):
    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("c", value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def holding(value: torch.Tensor) -> bytes:
    return saved(torch.jit.trace(Holder(value), torch.ones(1)))


@pytest.mark.parametrize("value", [torch.tensor([1 + 2j]).conj(), torch.tensor([1 + 2j]).conj().imag])
def test_views_whose_bytes_are_not_their_values_are_loaded(value: torch.Tensor) -> None:
    model = Holder(torch.zeros_like(value).resolve_conj().resolve_neg().clone())
    smart_load(model, io.BytesIO(holding(value)))
    assert torch.equal(model.c, value)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.filterwarnings("ignore:B?Complex(Half|32) support")
def test_every_dtype_that_a_program_can_hold(name: str) -> None:
    data = holding(torch.ones(3).to(dtype(name)))
    assert_same(tensors(data), {"c": torch.ones(3).to(dtype(name))})


def test_objects_that_are_no_modules_are_not_in_a_state_dict() -> None:
    """A class of torch.jit.script may hold tensors as well; torch has none of them in a state dict."""
    box = b"c__torch__\nBox\n)\x81}" + text("t") + rebuilt(floats()) + b"sb"
    root = b"\x80\x02c__torch__\nNet\n)\x81}(" + text("box") + box + text("w") + rebuilt(floats("1")) + b"ub."
    code = (
        b'class Net(Module):\n  __parameters__ = ["w", ]\n  __buffers__ = []\n  w : Tensor\nclass Box:\n  t : Tensor\n'
    )
    records = {"data.pkl": root, "constants.pkl": b"\x80\x02).", "code/__torch__.py": code}
    data = zipped({**records, "data/0": TWO_FLOATS, "data/1": TWO_FLOATS})
    assert tensors(data).keys() == {"w"}
    assert [item.tensors for item in read(data).aside] == [1]


def test_what_the_writer_of_programs_saves_of_a_dict_is_read() -> None:
    state = {"w": torch.ones(2), "b": torch.zeros(3)}
    assert_same(tensors(torch._C._pickle_save(state)), state)


@pytest.mark.parametrize("names", [("one", "b.c"), ("teacher-v2", "student")])
def test_programs_have_any_names(tmp_path: Path, names: tuple[str, str]) -> None:
    programs = {name: {"w": torch.full((2,), float(i))} for i, name in enumerate(names)}
    (tmp_path / "two.pt2").write_bytes(listed(**programs))
    (tmp_path / "one.pt2").write_bytes(listed(**{names[0]: programs[names[0]]}))
    assert inspect(tmp_path / "two.pt2").parts.keys() == set(names)
    assert inspect(tmp_path / "one.pt2").parts.keys() == {""}
