"""Rules L1 to L5: the stream that torch wrote before 1.6."""

from __future__ import annotations

import pickle
import struct
from typing import Any

import pytest
import torch
from reading_tools import LEGACY, TWO_FLOATS, assert_same, dict_of, floats, number, read, rebuilt, saved, tensors, text

from smartload.errors import UnreadableError
from smartload.formats import torch_legacy as legacy

STATE = {"a": torch.arange(6.0).view(2, 3), "empty": torch.zeros(0, 4), "b": torch.tensor(7)}
GOOD = saved(STATE, **LEGACY)
MAGIC = legacy.MAGIC


def stream(
    pickled: bytes, keys: Any = ("0",), data: bytes = struct.pack("<q", 2) + TWO_FLOATS, head: Any = None
) -> bytes:
    magic, version, info = head or (MAGIC, 1001, {"little_endian": True})
    small = b"".join(pickle.dumps(value, 2) for value in (magic, version, info))
    return small + pickled + pickle.dumps(list(keys) if isinstance(keys, tuple) else keys, 2) + data


def kind_of(data: bytes) -> str:
    with pytest.raises(UnreadableError) as caught:
        read(data)
    return caught.value.problem.kind  # type: ignore[union-attr]


ONE = dict_of(a=rebuilt(floats()))


def test_the_hand_made_stream_is_right() -> None:
    assert_same(tensors(stream(ONE)), {"a": torch.tensor([1.0, 2.0])})


@pytest.mark.parametrize("protocol", range(1, 6))
def test_every_protocol(protocol: int) -> None:
    assert_same(tensors(saved(STATE, pickle_protocol=protocol, **LEGACY)), STATE)


def test_every_cut_is_a_typed_error() -> None:
    for end in range(0, len(GOOD), 7):
        with pytest.raises(UnreadableError):
            read(GOOD[:end])


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (stream(ONE, head=(MAGIC, 1002, {})), "legacy_version"),
        (stream(ONE, head=(MAGIC, 1001.0, {})), "legacy_version"),
        (stream(ONE, head=(MAGIC, 1001, [])), "legacy"),
        (stream(ONE, keys={"0": 1}), "legacy"),
        (stream(ONE, keys=(0,)), "legacy"),
        (stream(ONE, keys=("0", "0")), "legacy"),
        (stream(ONE, keys=("0", "1")), "legacy"),
        (stream(ONE, keys=()), "record_missing"),
        (stream(ONE, data=struct.pack("<q", 3) + TWO_FLOATS), "record_size"),
        (stream(ONE, data=struct.pack("<q", -2) + TWO_FLOATS), "record_size"),
        (stream(ONE, data=struct.pack("<q", 2) + TWO_FLOATS[:-1]), "shorter"),
        (stream(ONE, data=b"\2\0"), "shorter"),
        (stream(dict_of(a=rebuilt(floats(numel=1 << 40))), data=struct.pack("<q", 1 << 40)), "shorter"),
    ],
)
def test_a_stream_that_breaks_a_rule_is_refused(data: bytes, kind: str) -> None:
    # L1: all of it before anything is allocated.
    assert kind_of(data) == kind


def test_the_magic_number_decides() -> None:
    assert kind_of(stream(ONE, head=(MAGIC + 1, 1001, {}))) == "pickle_more"


def test_only_the_beginning_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    # L2.
    sizes: list[int] = []
    original = legacy.read_buffer

    def counted(file: Any, offset: int, size: int) -> bytearray:
        sizes.append(size)
        return original(file, offset, size)

    monkeypatch.setattr(legacy, "read_buffer", counted)
    data = saved({"a": torch.zeros(3_000_000)}, **LEGACY)
    assert list(read(data).parts[""].entries) == ["a"]
    assert max(sizes) == legacy.FIRST_PREFIX
    sizes.clear()
    monkeypatch.setattr(legacy, "FIRST_PREFIX", 16)
    assert_same(tensors(GOOD), STATE)
    assert max(sizes) <= 16 * 4**4


@pytest.mark.parametrize(
    ("view", "fine"),
    [
        (text("v") + b"K\x01K\x01\x87", True),
        (text("v") + b"K\x01K\x02\x87", False),
        (text("v") + number(-1) + b"K\x01\x87", False),
        (text("v") + b"\x88K\x01\x87", False),
        (b")", False),
    ],
)
def test_a_view_of_a_storage_lies_inside_it(view: bytes, fine: bool) -> None:
    # L3.
    pid = floats().removesuffix(b"tQ") + view + b"tQ"
    data = stream(dict_of(a=rebuilt(pid, size=b"K\x01\x85")))
    if fine:
        assert_same(tensors(data), {"a": torch.tensor([2.0])})
    else:
        assert kind_of(data) == "storage_id"


def test_the_source_of_a_class_is_not_looked_at() -> None:
    # L4: torch would compare it with the class at hand, and may write a patch.
    pid = b"(" + text("module") + b"cos\nsystem\n" + text("/etc/passwd") + text("import os") + b"tQ"
    maps = b"".join(text(name) + b"}" for name in ("_buffers", "_modules"))
    module = pid + b")\x81}(" + maps + text("_parameters") + b"}" + text("w") + rebuilt(floats()) + b"sub"
    checkpoint = read(stream(b"\x80\x02" + module + b"."))
    assert checkpoint.parts[""].kind == "module os.system"
    assert list(checkpoint.parts[""].entries) == ["w"]


def test_the_stream_is_little_endian_whatever_it_says() -> None:
    # L5.
    assert_same(tensors(stream(ONE, head=(MAGIC, 1001, {"little_endian": False}))), {"a": torch.tensor([1.0, 2.0])})
