"""What torch writes for a tensor is read at once; the result must be the one that its opcodes have one by one."""

from __future__ import annotations

import io
import itertools
import pickletools
import struct
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from smartload.errors import SmartLoadError
from smartload.pickles.inert import Bag, Blob, Map, Obj, Pid, Ref, Short, parse
from smartload.pickles.inert.fast_tensors import Phrases


def saved(value: object, *, zipped: bool = True) -> bytes:
    """The pickle that torch writes for it; in the old format the third one of the file."""
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    if zipped:
        with zipfile.ZipFile(file) as archive:
            return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    data, at = file.getvalue(), 0
    for _ in range(3):
        at = parse(data, at, "file", whole=False)[1]
    return data[at : parse(data, at, "file", whole=False)[1]]


def many(count: int = 60) -> dict[str, torch.Tensor]:
    """Enough tensors for a memo beyond one byte, in all ranks, sizes of one, two and four bytes, and some storages."""
    shared = torch.arange(4096.0)
    shapes = [(), (3,), (300,), (70_000,), (2, 3), (1, 300), (2, 1, 3), (2, 1, 2, 1), (1, 2, 1, 2, 1), (0,), (4, 0)]
    made = {f"layers.{i}.weight": torch.zeros(shapes[i % len(shapes)]) for i in range(count)}
    made |= {f"view.{i}": shared[i * 300 :].as_strided((2, 3), (3, 1)) for i in range(12)}
    made |= {f"kind.{i}": torch.zeros(2, dtype=dtype) for i, dtype in enumerate((torch.half, torch.int64, torch.bool))}
    return made


def told(value: object) -> object:
    """All of a value as plain data; what can be changed later is numbered where it is met, so that sharing shows."""
    seen: dict[int, int] = {}

    def of(value: Any) -> object:
        if isinstance(value, (tuple, type(None), bool, int, float, str, bytes)):
            return tuple(map(of, value)) if type(value) is tuple else (type(value).__name__, value)
        if id(value) in seen:
            return "again", seen[id(value)]
        seen[id(value)] = len(seen)
        if type(value) is list:
            return "list", [of(each) for each in value]
        if type(value) is Map:
            items = [(key, of(each)) for key, each in value.data.items()]
            pairs = [(of(key), of(each)) for key, each in value.pairs or ()]
            return "Map", items, pairs, value.repeated, value.ordered, of(value.state)
        if type(value) is Obj:
            return "Obj", of(value.func), of(value.args), of(value.state), of(value.items), of(value.appends)
        if type(value) is Ref:
            return "Ref", value.module, value.name
        if type(value) is Pid:
            return "Pid", of(value.value)
        if type(value) is Bag:
            return "Bag", [of(each) for each in value.items]
        assert type(value) is Blob
        return "Blob", value.offset, bytes(value.raw), value.mutable

    return of(value)


def outcome(data: bytes) -> object:
    """Value, end and persistent ids, or the refusal."""
    try:
        root, end, pids = parse(data, 0, "file")
    except (SmartLoadError, Short) as error:
        return type(error).__name__, str(error)
    return told((root, [*pids])), end


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], object]:
    """The outcome without phrases."""

    def run(data: bytes) -> object:
        with monkeypatch.context() as patch:
            patch.setattr(Phrases, "read", lambda self, pos, func: None)
            return outcome(data)

    return run


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where phrases were read."""
    found: list[int] = []
    read = Phrases.read

    def counted(self: Phrases, pos: int, func: object) -> Any:
        done = read(self, pos, func)
        found.extend([pos] if done is not None else [])
        return done

    monkeypatch.setattr(Phrases, "read", counted)
    return found


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        many,
        lambda: OrderedDict(many()),
        lambda: {key: nn.Parameter(value) for key, value in many().items() if value.is_floating_point()},
        lambda: nn.Sequential(*(nn.Linear(3, 2) for _ in range(20)), nn.BatchNorm2d(300)),
        lambda: {"a": many(), "b": [many(), {"c": many()}]},
    ],
)
def test_a_phrase_is_what_its_opcodes_are(
    make: Callable[[], object], zipped: bool, one_by_one: Callable[[bytes], object], taken: list[int]
) -> None:
    data = saved(make(), zipped=zipped)
    assert outcome(data) == one_by_one(data)
    assert len(taken) > 15


def test_nearly_all_tensors_are_phrases(taken: list[int]) -> None:
    state = {f"{i}.weight": torch.zeros(8, 8) for i in range(1000)}
    parse(saved(state), 0, "file")
    assert len({*taken}) > 950


PIECES = (
    b"", b"(", b"((", b"t", b")", b"N", b"\x89", b"\x85", b"\x86", b"\x87", b"0", b"2", b"1", b"R", b"Q",
    b".", b"b", b"e", b"K\3", b"M\3\2", b"J\xff\xff\xff\xff", b"K\2K\3K\4", b"(K\2K\3K\4K\5t", b"K\2K\3t",
    b"(K\2K\3\x86", b"K\2\x86", b"h\5", b"h\xff", b"j\0\0\0\0", b"j\xff\xff\0\0", b"r\0\0\0\0", b"r\5\0\0\0",
    b"r\xff\xff\0\0", b"X\1\0\0\0a", b"ccollections\nOrderedDict\n", b"cbuiltins\ndict\n",
    b"cother\nOrderedDict\n",
)  # fmt: skip
"""What may stand in a pickle instead of what does."""


def middle() -> tuple[bytes, list[int]]:
    """A pickle with three tensors that ends with all of its memo, and where the opcodes of the second one lie."""
    data = saved([str(number) for number in range(300)] + [torch.zeros(2, 3) for _ in range(3)])
    opcodes = [(at, opcode.name) for opcode, _, at in pickletools.genops(data)]
    starts = [number for number, (_, name) in enumerate(opcodes) if name == "BINPERSID"]
    places = [at for at, _ in opcodes[starts[1] - 11 : starts[2] - 10]]
    puts = sum(name in ("BINPUT", "LONG_BINPUT") for _, name in opcodes)
    gets = b"".join(b"j" + struct.pack("<I", number) for number in range(puts))
    return data[:-1] + b"(" + gets + b"t\x86.", places


def test_the_memo_is_what_it_is_one_by_one(one_by_one: Callable[[bytes], object], taken: list[int]) -> None:
    data, places = middle()
    assert outcome(data) == one_by_one(data)
    assert places[1] in taken


@pytest.mark.parametrize("inserted", [True, False])
def test_other_opcodes_are_read_as_before(inserted: bool, one_by_one: Callable[[bytes], object]) -> None:
    data, places = middle()
    for here, following in itertools.pairwise(places):
        for piece in PIECES:
            changed = data[:here] + piece + data[here if inserted else following :]
            assert outcome(changed) == one_by_one(changed), (here, piece)


def test_other_operands_are_read_as_before(one_by_one: Callable[[bytes], object]) -> None:
    data, places = middle()
    for at in range(places[0], places[-1]):
        for value in {0, 1, 2, 255, data[at] ^ 1, data[at] + 1 & 255}:
            changed = data[:at] + bytes([value]) + data[at + 1 :]
            assert outcome(changed) == one_by_one(changed), (at, value)


def test_what_is_nearly_a_phrase_takes_no_time() -> None:
    """At every 25th byte a name may end, and what follows it may go on to the end of the file."""
    nearly = b"cm\nn\n((h\0h\0X\1\0\0\0" + b"raaJahaKJtraaJaQKaJaaaaJa" * 40_000
    started = time.process_time()
    assert outcome(nearly) == ("UnreadableError", mock.ANY)
    assert time.process_time() - started < 1


@pytest.mark.parametrize("place", range(12))
def test_a_memo_that_is_written_over_counts(
    place: int, one_by_one: Callable[[bytes], object], taken: list[int]
) -> None:
    """Between two phrases the pickle puts another thing where they get the function, the storage's type, ..."""
    data = saved({f"{i}.weight": torch.zeros(2, 3) for i in range(60)})
    parse(data, 0, "file")
    between = data.index(b"X", taken[20] + 60)  # the next key
    changed = data[:between] + b"r" + struct.pack("<I", place) + data[between:]
    del taken[:]
    assert outcome(changed) == one_by_one(changed)
    assert len(taken) > 20 or place in (0, 3)  # what is called, and the class of the hooks


def test_a_number_that_was_remembered_ahead_is_counted_once(one_by_one: Callable[[bytes], object]) -> None:
    data, places = middle()
    end = data.rindex(b"j") + 5
    (last,) = struct.unpack("<I", data[end - 4 : end])
    for ahead in range(last - 14, last + 1):
        put, get = b"r" + struct.pack("<I", ahead), b"j" + struct.pack("<I", last + 1)
        changed = data[: places[0]] + put + data[places[0] : -1] + b"\x94" + get + b"\x86."
        assert outcome(changed) == one_by_one(changed)
        assert "Error" not in str(outcome(changed))
