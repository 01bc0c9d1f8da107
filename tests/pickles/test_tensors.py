"""The exact list of names that mean a tensor, and what is checked of each."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from dtypes import DTYPES, dtype
from reading_tools import (
    LEGACY,
    TWO_FLOATS,
    assert_same,
    checkpoint_of,
    dict_of,
    floats,
    number,
    read,
    rebuilt,
    saved,
    tensors,
    text,
)

from smartload.errors import UnreadableError, UnsafeCheckpointError
from smartload.records.entries import Opaque, Span

FORMATS = [{}, LEGACY]


def entry(data: bytes, key: str = "a") -> object:
    return read(data).parts[""].entries[key]


def kind_of(data: bytes) -> str:
    with pytest.raises(UnreadableError) as caught:
        read(data)
    return caught.value.problem.kind  # type: ignore[union-attr]


@pytest.mark.parametrize("form", FORMATS, ids=["zip", "legacy"])
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_comes_back(name: str, form: dict[str, bool]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, for complex32 and bcomplex32
        state = {
            "a": torch.arange(24, dtype=torch.uint8).view(torch.uint8)[:16].clone().view(dtype(name)),
            "none": torch.empty(0, dtype=dtype(name)),
        }
    assert_same(tensors(saved(state, **form)), state)


@pytest.mark.parametrize("form", FORMATS, ids=["zip", "legacy"])
def test_views_of_all_kinds_come_back(form: dict[str, bool]) -> None:
    base = torch.arange(60.0).view(3, 4, 5)
    state = {
        "base": base,
        "slice": base[1:, ::2],
        "transposed": base.permute(2, 0, 1),
        "scalar": base[1, 2, 3],
        "expanded": base[0, 0, :1].expand(7),
        "window": base.view(-1).unfold(0, 5, 2),
        "last": base[2, 3, 4:],
        "channels": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "empty": base[:, :0],
        "zero": base[3:],
    }
    data = saved(state, **form)
    assert_same(tensors(data), state)
    for key, span in read(data).parts[""].entries.items():
        assert isinstance(span, Span)
        assert span.stride == state[key].stride()
    # Pitfall 10: one storage, one record.
    assert {record.name for record in read(saved(state)).records} == {"data.pkl", "data/0", "data/1"}


@pytest.mark.parametrize("form", FORMATS, ids=["zip", "legacy"])
@pytest.mark.parametrize("tag", ["cuda:7", "mps", "xla:1", "npu:0", "hpu", "meta:3", "no such device"])
def test_where_a_tensor_lay_does_not_matter(tag: str, form: dict[str, bool]) -> None:
    state = {"a": torch.arange(4.0), "b": torch.ones(2, dtype=torch.int64)}
    assert_same(tensors(saved(state, tag, **form)), state)


@pytest.mark.parametrize("form", FORMATS, ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_protocol_of_torch_save(protocol: int, form: dict[str, bool]) -> None:
    state = {"a": torch.arange(4.0), "p": torch.nn.Parameter(torch.ones(2)), "u": torch.ones(3, dtype=torch.uint16)}
    assert_same(tensors(saved(state, pickle_protocol=protocol, **form)), state)


def test_parameters_and_buffers_are_unwrapped() -> None:
    # Pitfall 5: any tagged tensor is wrapped as well.
    tagged = torch.ones(2)
    tagged.note = "seen"  # type: ignore[attr-defined]
    tagged_parameter = torch.nn.Parameter(torch.ones(3))
    tagged_parameter.note = "seen"  # type: ignore[attr-defined]
    state = {
        "parameter": torch.nn.Parameter(torch.arange(3.0)),
        "frozen": torch.nn.Parameter(torch.arange(3), requires_grad=False),
        "buffer": torch.nn.Buffer(torch.arange(4.0)),
        "tagged": tagged,
        "tagged_parameter": tagged_parameter,
    }
    for form in FORMATS:
        assert_same(tensors(saved(state, **form)), state)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (torch.eye(3).to_sparse(), "a sparse tensor"),
        (torch.empty(3, device="meta"), "a meta tensor"),
    ],
)
def test_tensors_that_have_no_bytes_of_their_own_are_named(value: torch.Tensor, what: str) -> None:
    data = saved({"a": value, "b": torch.ones(2)})
    assert entry(data) == Opaque(what, tensor=True)
    assert list(tensors(data)) == ["b"]


@pytest.mark.parametrize("form", FORMATS)
def test_views_that_conjugate_or_negate_are_spans_of_what_they_look_at(form: dict[str, Any]) -> None:
    base = torch.tensor([1 + 2j, 3 - 4j])
    views = {"base": base, "conj": base.conj(), "imag": base.clone().conj().imag, "both": torch._neg_view(base.conj())}
    found = read(saved(views, **form)).parts[""].entries
    flags = {key: (span.conj, span.neg) for key, span in found.items() if isinstance(span, Span)}
    assert flags == {"base": (False, False), "conj": (True, False), "imag": (False, True), "both": (True, True)}


@pytest.mark.parametrize(
    ("kind", "flags", "what"),
    [
        ("FloatStorage", {"conj": True}, "a conjugated view"),  # torch itself takes these flags for no such dtype
        ("BoolStorage", {"neg": True}, "a negated view"),
        ("FloatStorage", {"neg": 7}, "a tensor with flags that are not known"),
        ("FloatStorage", {"half": False}, "a tensor with flags that are not known"),
    ],
)
def test_flags_that_torch_does_not_write_are_no_values(kind: str, flags: dict[str, int], what: str) -> None:
    ons = {False: b"\x89", True: b"\x88", 7: b"K\x07"}
    note = b"}(" + b"".join(text(key) + ons[on] for key, on in flags.items()) + b"u"
    plain = rebuilt(floats(kind=kind))
    data = checkpoint_of(dict_of(a=plain[:-2] + note + b"tR"), d0=TWO_FLOATS[: 2 if "Bool" in kind else 8])
    assert entry(data) == Opaque(what, tensor=True)


def test_a_compressed_sparse_tensor_is_named() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = torch.eye(3).to_sparse_csr()
    assert entry(saved({"a": value, "b": torch.ones(2)})) == Opaque("a sparse tensor", tensor=True)


@pytest.mark.filterwarnings("ignore")
def test_quantized_and_nested_tensors_are_named() -> None:
    quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    nested = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])
    for form in FORMATS:
        data = saved({"a": quantized, "n": nested, "b": torch.ones(2)}, **form)
        assert entry(data) == Opaque("a quantized tensor", tensor=True)
        assert entry(data, "n") == Opaque("a nested tensor", tensor=True)
        assert list(tensors(data)) == ["b"]


def test_names_of_old_torch() -> None:
    old = (
        rebuilt(floats())
        .replace(b"_rebuild_tensor_v2", b"_rebuild_tensor")
        .replace(b"\x89ccollections\nOrderedDict\n)R", b"")
    )
    data = checkpoint_of(dict_of(a=old), d0=TWO_FLOATS)
    assert_same(tensors(data), {"a": torch.tensor([1.0, 2.0])})
    wrapped = b"ctorch.nn.parameter\nParameter\n(" + rebuilt(floats()) + b"tR"
    assert_same(tensors(checkpoint_of(dict_of(a=wrapped), d0=TWO_FLOATS)), {"a": torch.tensor([1.0, 2.0])})


@pytest.mark.parametrize("name", [b"torch\nTensor", b"torch\nFloatTensor", b"torch.cuda\nFloatTensor"])
def test_bare_tensor_classes_are_named(name: bytes) -> None:
    found = entry(checkpoint_of(dict_of(a=b"c" + name + b"\nK\x05\x85R", b=rebuilt(floats())), d0=TWO_FLOATS))
    assert isinstance(found, Opaque)
    assert "Tensor" in found.what


@pytest.mark.parametrize(
    "name",
    [
        "os\nsystem",
        "torch._utils\n_rebuild_tensor_v22",
        "torch\n_utils._rebuild_tensor_v2",
        "torch._utils \n_rebuild_tensor_v2",
    ],
)
def test_nothing_else_means_a_tensor(name: str) -> None:
    odd = rebuilt(floats()).replace(b"torch._utils\n_rebuild_tensor_v2", name.encode())
    found = read(checkpoint_of(dict_of(a=odd, b=rebuilt(floats())), d0=TWO_FLOATS)).parts[""].entries
    assert isinstance(found["a"], Opaque)
    assert isinstance(found["b"], Span)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"size": b"K\x03\x85"}, "tensor_outside"),
        ({"offset": b"K\x01"}, "tensor_outside"),
        ({"stride": b"K\x02\x85"}, "tensor_outside"),
        ({"offset": number(1 << 40)}, "tensor_outside"),
        ({"offset": number(1 << 62)}, "tensor"),
        ({"offset": number(-1)}, "tensor"),
        ({"offset": b"\x88"}, "tensor"),
        ({"offset": b"N"}, "tensor"),
        ({"size": number(-1) + b"\x85"}, "tensor"),
        ({"size": number(1 << 48) + b"\x85"}, "tensor"),
        ({"size": b"\x88\x85"}, "tensor"),
        ({"size": b"]"}, "tensor"),
        ({"size": b"K\x01K\x02\x86"}, "tensor"),
        ({"stride": number(-1) + b"\x85"}, "tensor"),
        ({"stride": b"G?\xf0\0\0\0\0\0\0\x85"}, "tensor"),
        ({"stride": b")"}, "tensor"),
        ({"size": b"(" + b"K\x01" * 65 + b"t", "stride": b"(" + b"K\x01" * 65 + b"t"}, "tensor"),
        ({"size": number(1 << 40) * 2 + b"\x86", "stride": b"K\x00K\x00\x86"}, "tensor_outside"),
    ],
)
def test_numbers_that_lie_are_refused(change: dict[str, bytes], kind: str) -> None:
    assert kind_of(checkpoint_of(dict_of(a=rebuilt(floats(), **change)), d0=TWO_FLOATS)) == kind


def test_zero_strides_and_overlaps_are_legal_here() -> None:
    data = checkpoint_of(dict_of(a=rebuilt(floats(), size=number(1000) + b"\x85", stride=b"K\x00\x85")), d0=TWO_FLOATS)
    span = entry(data)
    assert isinstance(span, Span)
    assert span.nbytes == 4
    assert span.shape == (1000,)


@pytest.mark.parametrize("storage", [b"N", b"K\x01", b"cos\nsystem\n", b"cos\nsystem\n)R", b"X\x01\x00\x00\x00a"])
def test_only_a_storage_is_a_storage(storage: bytes) -> None:
    with pytest.raises(UnsafeCheckpointError):
        read(checkpoint_of(dict_of(a=rebuilt(storage)), d0=TWO_FLOATS))


@pytest.mark.parametrize(
    "pid",
    [
        b"NQ",
        b"(tQ",
        b"X\x01\x00\x00\x000Q",
        b"]Q",
        b"(" + text("storage") + b"tQ",
        b"(" + text("other") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x02tQ",
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"\x88tQ",
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(-1) + b"tQ",
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(1 << 48) + b"tQ",
        b"(" + text("storage") + b"ctorch\nFloatStorage\nK\x00" + text("cpu") + b"K\x02tQ",
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x02NNtQ",
    ],
)
def test_other_persistent_ids_are_refused(pid: bytes) -> None:
    assert kind_of(checkpoint_of(dict_of(a=rebuilt(pid)), d0=TWO_FLOATS)) == "storage_id"


@pytest.mark.parametrize("kind", ["SystemStorage", "floatstorage", "_utils", "storage.FloatStorage"])
def test_storage_types_are_an_exact_list(kind: str) -> None:
    assert kind_of(checkpoint_of(dict_of(a=rebuilt(floats(kind=kind))), d0=TWO_FLOATS)) == "storage_type"


def test_a_storage_type_that_is_no_name_is_unsafe() -> None:
    pid = b"(" + text("storage") + b"cos\nsystem\n)R" + text("0") + text("cpu") + b"K\x02tQ"
    with pytest.raises(UnsafeCheckpointError):
        read(checkpoint_of(dict_of(a=rebuilt(pid)), d0=TWO_FLOATS))


def test_one_key_is_one_storage() -> None:
    pickle = dict_of(a=rebuilt(floats()), b=rebuilt(floats(kind="IntStorage")))
    assert kind_of(checkpoint_of(pickle, d0=TWO_FLOATS)) == "storage_twice"
    pickle = dict_of(a=rebuilt(floats()), b=rebuilt(floats(numel=1), size=b"K\x01\x85"))
    assert kind_of(checkpoint_of(pickle, d0=TWO_FLOATS)) == "storage_twice"


def test_a_wrapper_around_a_wrapper_ends() -> None:
    deep = rebuilt(floats())
    for _ in range(40):
        deep = b"ctorch._utils\n_rebuild_parameter\n(" + deep + b"\x89NtR"
    assert kind_of(checkpoint_of(dict_of(a=deep), d0=TWO_FLOATS)) == "tensor"


def test_booleans_may_be_any_byte() -> None:
    # Pitfall 6.
    data = checkpoint_of(dict_of(a=rebuilt(floats(kind="BoolStorage"))), d0=b"\x02\xff")
    assert isinstance(entry(data), Span)
