"""Bytes on disk -> memory of tensors: the straight road and every detour end in the same values."""

from __future__ import annotations

import io
import itertools
import math
import struct
import threading
import time
from collections.abc import Callable

import pytest
import torch
from dtypes import DTYPES
from torch import nn

from smartload import UnreadableError, smart_load
from smartload.load import transfer
from smartload.load.entries import same_entry, same_values
from smartload.load.transfer import Move, read_all, read_tensor
from smartload.records.entries import ITEMSIZE, Span

pytestmark = pytest.mark.filterwarnings("ignore:B?Complex(Half|32) support")


class Bytes:
    """A reader of bytes in memory that keeps a list of what was asked of it."""

    name = "w.pt"

    def __init__(self, data: bytes) -> None:
        self.data, self.size = data, len(data)
        self.reads: list[tuple[int, int, int]] = []

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.reads.append((offset, len(buffer), threading.get_ident()))
        assert offset + len(buffer) <= self.size
        buffer[:] = self.data[offset : offset + len(buffer)]

    def check_unchanged(self) -> None: ...


def written(tensor: torch.Tensor, big_endian: bool = False, before: int = 3) -> tuple[Bytes, Span]:
    """A file with the tensor's whole reach of memory in it, behind a few other bytes."""
    name, reach = str(tensor.dtype)[6:], 0
    if tensor.numel():
        reach = 1 + sum((count - 1) * step for count, step in zip(tensor.shape, tensor.stride()))
    flat = tensor.as_strided((reach,), (1,))
    raw = bytes(flat.view(torch.uint8).tolist())
    width = ITEMSIZE[name] // (2 if tensor.is_complex() else 1)
    if big_endian:
        raw = b"".join(raw[at : at + width][::-1] for at in range(0, len(raw), width))
    span = Span(0, before, len(raw), name, tuple(tensor.shape), tensor.stride(), big_endian)
    return Bytes(b"x" * before + raw + b"y"), span


def some(dtype: str, *shape: int) -> torch.Tensor:
    torch.manual_seed(1)
    count = math.prod(shape) * ITEMSIZE[dtype]
    if dtype == "bool":
        return torch.rand(shape) > 0.5
    return torch.randint(0, 60, (count,), dtype=torch.uint8).view(getattr(torch, dtype)).reshape(shape)


SOURCES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dense": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t(),
    "every other": lambda t: torch.stack([t, t], 2)[:, :, 0],
    "backed off": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
}
TARGETS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dense": torch.zeros_like,
    "transposed": lambda t: torch.zeros_like(t.t().contiguous()).t(),
    "every other": lambda t: torch.zeros_like(torch.stack([t, t], 2))[:, :, 0],
    "a column": lambda t: torch.zeros_like(torch.cat([t, t], 1))[:, : t.shape[1]],
}
FAIR = [
    "float32",
    "float64",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
    "complex64",
    "complex128",
]
ODD = [name for name in DTYPES if name not in FAIR]


@pytest.mark.parametrize("dtype", FAIR)
@pytest.mark.parametrize("piece", [16, 40, 1 << 20])
def test_every_road_ends_in_the_same_values(dtype: str, piece: int, reading: Callable[..., None]) -> None:
    reading(piece=piece)
    for source, target, big in itertools.product(SOURCES.values(), TARGETS.values(), (False, True)):
        value = source(some(dtype, 6, 5))
        file, span = written(value, big)
        there = target(value.contiguous())
        read_all([Move("k", span, there)], [file])
        assert same_values(there, value)


@pytest.mark.parametrize("dtype", [*FAIR, *ODD])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 4), (3, 0, 2), (7, 3), (1, 1, 9)])
@pytest.mark.parametrize("big", [False, True])
def test_every_dtype_and_shape(dtype: str, shape: tuple[int, ...], big: bool) -> None:
    value = torch.empty(shape, dtype=getattr(torch, dtype)) if 0 in shape else some(dtype, *shape)
    file, span = written(value, big)
    assert same_values(read_tensor(span, [file]), value)
    there = torch.empty(shape, dtype=value.dtype)
    read_all([Move("k", span, there)], [file])
    assert same_values(there, value)


@pytest.mark.parametrize("target", ["float16", "float64", "bfloat16", "complex64", "int32"])
@pytest.mark.parametrize("shape", ["dense", "transposed"])
@pytest.mark.parametrize("piece", [16, 1 << 20])
def test_casts_are_torchs(target: str, shape: str, piece: int, reading: Callable[..., None]) -> None:
    reading(piece=piece)
    value = torch.arange(30.0).reshape(6, 5)
    file, span = written(value)
    there = TARGETS[shape](value.to(getattr(torch, target)))
    read_all([Move("k", span, there)], [file])
    assert torch.equal(there, value.to(there.dtype))


def test_a_parameter_is_filled_without_a_graph() -> None:
    value = torch.arange(4.0)
    file, span = written(value)
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    read_all([Move("k", span, parameter)], [file])
    assert parameter.tolist() == [0, 1, 2, 3]
    assert parameter.grad_fn is None


def test_bytes_that_are_no_bool_become_true_or_false() -> None:
    file = Bytes(bytes([0, 1, 2, 255]))
    span = Span(0, 0, 4, "bool", (4,), (1,))
    there = torch.zeros(4, dtype=torch.bool)
    read_all([Move("k", span, there)], [file])
    assert there.view(torch.uint8).tolist() == [0, 1, 1, 1]


def test_a_straight_read_goes_into_the_tensor_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer.Buffer, "take", lambda self, nbytes: pytest.fail("a buffer was used"))
    for value in (some("float32", 6, 5), some("float32", 6, 5).t(), some("int64", 3)):
        file, span = written(value)
        there = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
        read_all([Move("k", span, there)], [file])
        assert same_values(there, value)


def test_the_holes_of_a_target_are_left_alone() -> None:
    base = torch.full((4, 4), 7.0)
    file, span = written(torch.arange(8.0).reshape(4, 2))
    read_all([Move("k", span, base[:, :2])], [file])
    assert base[:, 2:].unique().tolist() == [7.0]
    assert base[:, :2].flatten().tolist() == list(range(8))


def test_conjugated_targets_hold_the_values() -> None:
    value = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    file, span = written(value)
    there = torch.zeros(2, dtype=torch.complex64).conj()
    read_all([Move("k", span, there)], [file])
    assert there.tolist() == value.tolist()


def test_reads_are_in_the_order_of_the_file_and_small_ones_in_one_thread() -> None:
    values = [torch.arange(5.0) + at for at in range(6)]
    data, moves = b"", []
    for at, value in enumerate(values):
        moves.append(Move(str(at), Span(0, len(data), 20, "float32", (5,), (1,)), torch.zeros(5)))
        data += struct.pack("5f", *value.tolist())
    file = Bytes(data)
    told: list[int] = []
    read_all(moves[::-1], [file], done=told.append)
    assert [offset for offset, *_ in file.reads] == sorted(offset for offset, *_ in file.reads)
    assert {thread for *_, thread in file.reads} == {threading.get_ident()}
    assert sum(told) == len(data)
    assert all(torch.equal(move.target, values[int(move.key)]) for move in moves)


def _scattered(sizes: list[int], gaps: list[int]) -> tuple[Bytes, list[Move]]:
    """One tensor of floats for each size, each behind a gap."""
    data, moves = b"", []
    for at, (size, gap) in enumerate(zip(sizes, gaps, strict=True)):
        data += b"x" * gap
        span = Span(0, len(data), 4 * size, "float32", (size,), (1,))
        moves.append(Move(str(at), span, torch.full((size,), -1.0)))
        data += struct.pack(f"{size}f", *[float(at)] * size)
    return Bytes(data), moves


@pytest.mark.parametrize(
    ("sizes", "gaps", "reads"),
    [
        ([1, 2, 0, 3], [7, 0, 64, 12], 1),
        ([1, 2, 5000, 3, 4], [7, 0, 0, 0, 9], 3),  # a large one ends the block, and is read straight
        ([1, 2, 3], [0, 20_000, 0], 2),  # what lies between them would cost more than another read
        ([4096] * 70, [0] * 70, 2),  # a block has its limit
        ([5], [3], 1),
    ],
)
def test_small_tensors_that_lie_together_are_one_read(sizes: list[int], gaps: list[int], reads: int) -> None:
    file, moves = _scattered(sizes, gaps)
    told: list[int] = []
    read_all(moves[::-1], [file], begun := set[str](), told.append)
    assert len(file.reads) == reads
    assert all((move.target == float(move.key)).all() for move in moves)
    assert begun == {move.key for move in moves}
    assert sum(told) == 4 * sum(sizes)


def test_the_same_bytes_and_those_of_another_file_may_be_read_together() -> None:
    file, moves = _scattered([4, 4, 4], [0, 0, 0])
    other, more = _scattered([4, 4], [0, 0])
    again = [Move("again", moves[1].span, torch.zeros(4)), Move("part", moves[1].span, torch.zeros(4))]
    more = [move._replace(key=f"other{move.key}", span=move.span._replace(file=1)) for move in more]
    read_all([*moves, *again, *more], [file, other])
    assert (len(file.reads), len(other.reads)) == (1, 1)
    assert [move.target[0].item() for move in (*again, *more)] == [1.0, 1.0, 0.0, 1.0]


def test_a_block_that_cannot_be_read_has_written_nothing() -> None:
    _, moves = _scattered([4, 4], [0, 0])

    class Failing(Bytes):
        def read_into(self, offset: int, buffer: memoryview) -> None:
            raise OSError("stop")

    with pytest.raises(OSError, match="stop"):
        read_all(moves, [Failing(b"")], begun := set[str]())
    assert not begun
    assert all((move.target == -1).all() for move in moves)


def test_small_tensors_that_do_not_lie_as_the_model_has_them_are_read_by_themselves() -> None:
    file, moves = _scattered([4, 4, 4], [0, 0, 0])
    moves[1] = moves[1]._replace(target=torch.zeros(4, dtype=torch.float64))
    read_all(moves, [file])
    assert len(file.reads) == 3
    assert [move.target[0].item() for move in moves] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("dtype", ["float32", "bool"])
@pytest.mark.parametrize("inference", [False, True])
def test_threads(dtype: str, inference: bool, reading: Callable[..., None]) -> None:
    reading(piece=64, count=5, together=False)
    value = some(dtype, 40, 40)
    file, span = written(value)
    slow = threading.Barrier(2, timeout=20)
    real, seen = file.read_into, set()

    def read_into(offset: int, buffer: memoryview) -> None:
        if threading.get_ident() not in seen and len(seen) < 2:
            seen.add(threading.get_ident())
            slow.wait()
        real(offset, buffer)

    file.read_into = read_into  # type: ignore[method-assign]
    with torch.inference_mode(inference):
        targets = [torch.empty(40, 40, dtype=value.dtype) for _ in range(9)]
        told: list[int] = []
        read_all([Move(str(at), span, target) for at, target in enumerate(targets)], [file], done=told.append)
    assert len(seen) == 2
    assert all(same_values(target, value) for target in targets)
    assert sum(told) == 9 * span.nbytes


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("at", [0, 1, 5, 19])
def test_a_failure_stops_the_rest_and_names_what_was_begun(threads: int, at: int, reading: Callable[..., None]) -> None:
    reading(count=threads, together=False)
    data = b"".join(struct.pack("4f", *[float(n)] * 4) for n in range(20))
    moves = [Move(str(n), Span(0, 16 * n, 16, "float32", (4,), (1,)), torch.full((4,), -1.0)) for n in range(20)]

    class Failing(Bytes):
        def read_into(self, offset: int, buffer: memoryview) -> None:
            if offset == 16 * at:
                raise OSError("stop")
            super().read_into(offset, buffer)

    begun: set[str] = set()
    running = threading.active_count()
    with pytest.raises(OSError, match="stop"):
        read_all(moves, [Failing(data)], begun)
    assert threading.active_count() == running
    written_ = {move.key for move in moves if move.target[0] != -1}
    assert written_ <= begun
    assert str(at) in begun
    if threads == 1:
        assert begun == {str(n) for n in range(at + 1)}


def test_after_a_failure_helpers_begin_nothing_new(reading: Callable[..., None]) -> None:
    reading(count=4, together=False)
    moves = [Move(str(n), Span(0, 4 * n, 4, "float32", (1,), (1,)), torch.zeros(1)) for n in range(200)]
    main, begun = threading.get_ident(), set[str]()

    class Failing(Bytes):
        def read_into(self, offset: int, buffer: memoryview) -> None:
            if threading.get_ident() == main:
                raise OSError("stop")
            time.sleep(0.02)

    with pytest.raises(OSError, match="stop"):
        read_all(moves, [Failing(bytes(800))], begun)
    assert len(begun) < 100


def test_same_values_looks_at_bits() -> None:
    assert same_values(torch.tensor([math.nan]), torch.tensor([math.nan]))
    assert not same_values(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_values(torch.zeros(2), torch.zeros(2, 1))
    assert not same_values(torch.zeros(2), torch.zeros(2, dtype=torch.int32))


def test_same_in_the_file(reading: Callable[..., None]) -> None:
    reading(piece=8)
    value = some("float32", 4, 3)
    one, span = written(value)
    other, _ = written(value.t().contiguous().t())
    third, _ = written(value + 1)
    swapped, big = written(value, big_endian=True)
    files = [one, other, third, swapped, one]
    assert same_entry(span, span, files)
    assert same_entry(span, span._replace(file=4), files)
    assert same_entry(span, span._replace(file=1, stride=(1, 4)), files)
    assert same_entry(span, big._replace(file=3), files)
    assert not same_entry(span, span._replace(file=2), files)
    assert not same_entry(span, span._replace(dtype="int32"), files)
    assert not same_entry(span, span._replace(shape=(3, 4), stride=(4, 1)), files)


def test_unknown_dtypes_are_named() -> None:
    with pytest.raises(UnreadableError, match="float3"):
        read_tensor(Span(0, 0, 4, "float3", (1,), (1,)), [Bytes(b"1234")])


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(50)), nn.Parameter(torch.zeros(50))


def test_a_file_object_is_read_from_where_it_stands() -> None:
    buffer = io.BytesIO()
    buffer.write(b"before")
    torch.save({"a": torch.ones(50), "b": torch.ones(50)}, buffer)
    buffer.seek(6)
    model = Two()
    smart_load(model, buffer)
    assert buffer.tell() == 6
    assert model.a[3].item() == 1.0


def test_without_threads_this_one_reads_alone(reading: Callable[..., None]) -> None:
    reading(piece=16, count=4, together=False)
    value, target = torch.arange(100.0), torch.zeros(100)
    file, span = written(value)
    before = threading.stack_size(1 << 46)  # more than any system has: no thread can be started
    try:
        read_all([Move("a", span, target)], [file])
    finally:
        threading.stack_size(before)
    assert torch.equal(target, value)
    assert {thread for *_, thread in file.reads} == {threading.get_ident()}
