"""One file, two readers: what `torch.load(weights_only=True)` gives, smartload gives too, or refuses in words.

`python tests/helpers/fuzz.py --against-torch 100000` compares as many as one likes.
"""

from __future__ import annotations

import io
import pickle
import struct

import pytest
import torch
from differential import case, compare, differences, verdict
from reading_tools import TWO_FLOATS, dict_of, floats, opened, rebuilt, text
from reading_tools import zipped as zip_of
from torch import nn

from smartload import SmartLoadError, inspect, smart_load
from smartload.formats.torch_legacy import MAGIC
from smartload.records.entries import Opaque

CASES = 30_000
GOOD, OTHER = rebuilt(floats()), rebuilt(floats("1"))
OTHERS = struct.pack("<2f", 8, 9)
EMPTY = rebuilt(floats("2", numel=0), size=b"K\x00\x85")
DATA = b"}" + text("data") + OTHER + b"s"


def call(name: str, *args: bytes) -> bytes:
    module, _, function = name.rpartition(".")
    return b"c" + module.encode() + b"\n" + function.encode() + b"\n(" + b"".join(args) + b"tR"


def typed(name: str) -> bytes:
    return b"ctorch\n" + name.encode() + b"\n"


def view(key: str, first: int, root: str = "0", count: int = 1) -> bytes:
    """The persistent id of a view, as torch wrote it before 1.6."""
    metadata = text(key) + b"K%cK%c\x87" % (first, count)
    return b"(" + text("storage") + typed("FloatStorage") + text(root) + text("cpu") + b"K\x02" + metadata + b"tQ"


def one(storage: bytes) -> bytes:
    return rebuilt(storage, size=b"K\x01\x85")


def zipped(body: bytes, **records: bytes) -> bytes:
    contents = {"d0": TWO_FLOATS, "d1": OTHERS, "d2": b"", **records}
    data = {f"data/{name[1:]}": content for name, content in contents.items()}
    return zip_of({"data.pkl": b"\x80\x02" + body + b".", "byteorder": b"little", "version": b"3\n", **data})


def items(**values: bytes) -> bytes:
    return dict_of(**values)[2:-1]


def legacy(body: bytes, *keys: str) -> bytes:
    head = b"".join(pickle.dumps(value, 2) for value in (MAGIC, 1001, {}))
    contents = {"0": TWO_FLOATS, "1": OTHERS}
    data = b"".join(struct.pack("<q", 2) + contents[key] for key in keys)
    return (
        head
        + b"\x80\x02"
        + body.replace(b"\x8a\x01\x02tQ", b"\x8a\x01\x02NtQ")
        + b"."
        + pickle.dumps([*keys], 2)
        + data
    )


LATER, MORE = b"]q\x07(K\x02e", b"h\x07K\x01a"
"""A list, and what makes it longer later on."""
PARAMETER = "torch._utils._rebuild_parameter_with_state"
STORAGE = b"(" + floats("1") + b"K\x00K\x02\x85K\x01\x85t"
REFUSED = {
    "a storage again, of another dtype": zipped(items(a=GOOD, b=rebuilt(floats(kind="IntStorage")))),
    "a storage again, of another dtype and without elements": zipped(
        items(a=GOOD, b=rebuilt(floats(kind="IntStorage", numel=0), size=b"K\x00\x85"))
    ),
    "a storage again, without elements": zipped(items(a=GOOD, b=rebuilt(floats(numel=0), size=b"K\x00\x85"))),
    "a storage on meta": zipped(items(a=rebuilt(floats().replace(text("cpu"), text("meta"))))),
    "another storage set in a tensor": zipped(items(a=GOOD + STORAGE + b"b")),
    "another storage set in a tensor of two names": zipped(
        b"}(" + text("a") + GOOD + b"q\x07" + text("b") + b"h\x07" + STORAGE + b"bu"
    ),
    "another storage set in a parameter": zipped(
        items(a=call("torch._utils._rebuild_parameter", GOOD, b"\x89", b"N") + STORAGE + b"b")
    ),
    "other data in the old state of a parameter": zipped(
        items(a=call("torch.nn.parameter.Parameter", GOOD) + b"(" + OTHER + b"NN\x88\x89tb")
    ),
    "other data in the state of a parameter": zipped(items(a=call(PARAMETER, GOOD, b"\x89", b"N", DATA))),
    "other data in the slots of a parameter": zipped(
        items(a=call(PARAMETER, GOOD, b"\x89", b"N", b"N" + DATA + b"\x86"))
    ),
    "another real part": zipped(items(a=call(PARAMETER, GOOD, b"\x89", b"N", DATA.replace(b"data", b"real")))),
    "a counter as the state": zipped(items(a=call(PARAMETER, GOOD, b"\x89", b"N", call("collections.Counter", DATA)))),
    "other data in the state of a subclass": zipped(
        items(
            a=call(
                "torch._tensor._rebuild_from_type_v2",
                b"ctorch._utils\n_rebuild_tensor_v2\n",
                typed("Tensor"),
                b"(" + floats() + b"K\x00K\x02\x85K\x01\x85\x89Nt",
                DATA,
            )
        )
    ),
    "an OrderedDict of a dict": zipped(call("collections.OrderedDict", items(a=GOOD)) + text("b") + OTHER + b"s"),
    "a counter of a dict": zipped(call("collections.Counter", items(a=GOOD)) + text("b") + OTHER + b"s"),
    "a counter with the attributes of a module": zipped(
        call("collections.Counter") + items(_parameters=items(a=GOOD), _buffers=b"}", _modules=b"}") + b"b"
    ),
    "a set without its elements": zipped(items(a=GOOD, _extra_state=b"cbuiltins\nset\n](K\x01e\x85\x81")),
    "one key for two views": legacy(items(a=one(view("v", 0)), b=one(view("v", 1))), "0"),
    "one key for views of two storages": legacy(items(a=one(view("v", 0)), b=one(view("v", 0, "1"))), "0", "1"),
    "a view under the key of its storage": legacy(items(a=GOOD, b=one(view("0", 1))), "0"),
    "a view under the key of another storage": legacy(items(a=rebuilt(view("1", 0, count=2)), b=OTHER), "0", "1"),
}
EQUAL = {
    "a size of a list that grows": zipped(
        b"}(" + text("a") + rebuilt(floats(), size=b"ctorch\nSize\n" + LATER + b"\x85R") + text("l") + MORE + b"u"
    ),
    "a set of a list that grows": zipped(
        items(a=GOOD, _extra_state=b"}(" + text("s") + call("builtins.set", LATER) + text("l") + MORE + b"u")
    ),
    "an OrderedDict by its class alone": zipped(b"ccollections\nOrderedDict\n)\x81" + text("a") + GOOD + b"s"),
    "a flag that is set to False": zipped(
        items(a=GOOD[:-2] + b"}" + text("conj") + b"\x89stR", b=GOOD).replace(b"Float", b"ComplexFloat"),
        d0=TWO_FLOATS * 2,
    ),
    "storages without bytes, of two dtypes": zipped(
        items(a=EMPTY, b=rebuilt(floats("2", numel=0, kind="IntStorage"), size=b"K\x00\x85"), c=GOOD)
    ),
    "the state of a parameter of before torch 0.4": zipped(
        items(a=call("torch.nn.parameter.Parameter", GOOD) + b"\x89\x89N\x87b")
    ),
    "a state of plain attributes": zipped(
        items(a=call(PARAMETER, GOOD, b"\x89", b"N", b"}" + text("note") + OTHER + b"s"))
    ),
    "one view of two names": legacy(items(a=one(view("v", 1)), b=one(view("v", 1))), "0"),
    "views of two storages": legacy(items(a=one(view("v", 1)), b=one(view("w", 0, "1"))), "0", "1"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_would_read_otherwise_is_refused(name: str) -> None:
    assert verdict(REFUSED[name]) == ("smartload refuses", "")
    net = nn.Module()
    for key in "ab":
        net.register_buffer(key, torch.full((2,), 7.0))
    with pytest.raises(SmartLoadError) as caught:
        smart_load(net, io.BytesIO(REFUSED[name]), allow_missing=["*"], allow_unexpected=["*"])
    assert len(str(caught.value)) < 600
    assert [tensor.tolist() for tensor in net.buffers()] == [[7.0, 7.0]] * 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EQUAL)
def test_what_torch_reads_in_the_same_way_is_read(name: str) -> None:
    assert verdict(EQUAL[name]) == ("equal", "")


def test_a_cast_in_the_file_is_refused() -> None:
    # torch casts the data to the dtype that stands beside; it does not make the tensor of a location alone.
    body = call("torch._utils._rebuild_device_tensor_from_cpu_tensor", GOOD, typed("float64"), text("cpu"), b"\x89")
    with pytest.raises(SmartLoadError, match="description of a tensor"):
        inspect(io.BytesIO(zipped(items(a=body))))
    same = body.replace(typed("float64"), typed("float32"))
    with opened(zipped(items(a=same))) as checkpoint:
        assert checkpoint.parts[""].entries["a"].spec.dtype == "float32"  # type: ignore[union-attr]


def test_big_endian_numbers_without_a_dtype_of_their_storage_are_named() -> None:
    """torch turns the bytes of a storage by the storage's dtype, so that those of an untyped one stay as they are."""
    untyped = floats(numel=8).replace(b"ctorch\nFloatStorage\n", b"ctorch.storage\nUntypedStorage\n")
    third = rebuilt(untyped, size=b"K\x04\x85")[:-2].replace(b"_v2", b"_v3") + typed("uint16") + b"tR"
    data = zip_of(
        {
            "data.pkl": dict_of(a=third, b=OTHER),
            "byteorder": b"big",
            "version": b"3\n",
            "data/0": TWO_FLOATS,
            "data/1": OTHERS,
        }
    )
    assert verdict(data) == ("equal", "")  # that is, what torch has under the key is named and not loaded
    with opened(data) as checkpoint:
        assert checkpoint.parts[""].entries["a"] == Opaque("a big-endian tensor of uint16", tensor=True)


@pytest.mark.timeout(300)
def test_changed_pickles_are_read_as_torch_reads_them() -> None:
    counts, found = compare(0, CASES)
    assert found == []
    assert counts.total() == CASES
    # Each kind of answer is there, or the changes are too wild to tell anything.
    assert min(counts["equal"], counts["torch refuses"], counts["smartload refuses"]) > CASES // 50
    assert counts["torch crashes"] < 10


def test_the_same_number_is_the_same_file() -> None:
    assert [case(number) for number in range(50)] == [case(number) for number in range(50)]


def test_the_comparison_would_see_it() -> None:
    data = zipped(items(a=GOOD, m=items(b=OTHER)))
    theirs = torch.load(io.BytesIO(data), weights_only=True)
    with opened(data) as checkpoint:
        assert not [*differences(checkpoint, theirs)]
        for changed in (
            {**theirs, "a": theirs["a"] + 1},
            {**theirs, "a": theirs["a"].double()},
            {**theirs, "a": theirs["a"].reshape(1, 2)},
            {**theirs, "a": theirs["a"].to_sparse()},
            {**theirs, "c": theirs["a"]},
            {"m": theirs["m"]},
            {**theirs, "m": {}},
        ):
            assert [*differences(checkpoint, changed)]
