"""Bytes on disk -> memory of tensors, the same way for every format.

Where dtype, layout and device allow, `preadv` fills the tensor's own memory from a few threads; otherwise
the bytes go through one small buffer a thread. Nothing is mapped: a file cut short is an error, not SIGBUS.
"""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from smartload.errors import CastError, UnreadableError
from smartload.load import casts
from smartload.load.threads import Buffer, Piece, in_threads
from smartload.place.memory import TINY, dtype_name, memory_at
from smartload.records.entries import ITEMSIZE, ByteReader, Span, Stored, ZipRecord
from smartload.records.problems import Problem
from smartload.records.text import printable

PIECE = 16 << 20  # bytes a read; 1 to 64 MiB measured equal
CHUNK = 4 << 20  # bytes through a buffer: what is read is still in the processor's cache when it is converted
BLOCK = 1 << 20  # bytes of small tensors, and of what lies between them, that are read at once
Files = Sequence[ByteReader]
_BIG_ENDIAN = sys.byteorder == "big"


class Move(NamedTuple):
    """One tensor to read: where its bytes lie, where they go, and its name for messages."""

    key: str
    span: Span
    target: torch.Tensor


def read_all(
    moves: Sequence[Move], files: Files, begun: set[str] | None = None, done: Callable[[int], None] | None = None
) -> None:
    """Fill every target from its span, in the order of the file.

    Where this raises, the targets whose keys are in `begun` hold a mixture of old and new. It returns or
    raises only after the last thread has stopped writing.
    """
    begun = set() if begun is None else begun
    ordered = sorted(moves, key=lambda move: move.span[:2])  # file, offset
    large = sum(move.span.nbytes for move in ordered if move.span.nbytes > TINY)  # the rest is Python's work
    in_threads(list(_pieces(ordered, files, begun)), large, done)


def moves_of(key: str, stored: Stored, target: torch.Tensor) -> list[Move]:
    """What must be read for one tensor: its span, or every tile into its place in the target."""
    if isinstance(stored, Span):
        return [Move(key, stored, target)]
    moves = []
    for offset, span in stored.tiles:
        part = target.detach()
        for dim, (first, size) in enumerate(zip(offset, span.shape, strict=True)):
            part = part.narrow(dim, first, size)
        moves.append(Move(key, span, part))
    return moves


def read_tensor(stored: Stored, files: Files) -> torch.Tensor:
    """A new CPU tensor with the shape, dtype and values of a stored one and, where it has no holes, its strides."""
    tensor = empty_tensor(stored)
    read_all(moves_of("", stored, tensor), files)
    return tensor


def read_extra_state(tree: object, files: Files) -> object:
    """Read the tensors in an extra state; give it with them."""
    if isinstance(tree, Span):
        return read_tensor(tree, files)
    if isinstance(tree, dict):
        return type(tree)((key, read_extra_state(value, files)) for key, value in tree.items())
    if isinstance(tree, (list, tuple)):
        return type(tree)(read_extra_state(value, files) for value in tree)
    return tree


def empty_tensor(stored: Stored) -> torch.Tensor:
    """The CPU tensor that `read_tensor` fills."""
    dtype, need = dtype_of(stored), math.prod(stored.shape) * ITEMSIZE[stored.dtype]
    try:
        if isinstance(stored, Span) and stored.nbytes == need:
            return torch.empty_strided(stored.shape, stored.stride, dtype=dtype, device="cpu")
        return torch.empty(stored.shape, dtype=dtype, device="cpu")
    except RuntimeError as error:
        raise UnreadableError(Problem("memory", facts={"need": need})) from error


def dtype_of(span: Stored) -> torch.dtype:
    """The dtype of a stored tensor as torch has it."""
    dtype = getattr(torch, span.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise UnreadableError(Problem("dtype", facts={"dtype": span.dtype, "torch": torch.__version__}))
    return dtype


def check_cast(move: Move, path: str, files: Files) -> None:
    """CastError where a value of the span cannot be held by the target's dtype; reads only if the values decide."""
    target = dtype_name(move.target.dtype)
    verdict = casts.verdict(move.span.dtype, target)
    facts = {"key": move.key, "source": move.span.dtype, "target": target}
    if verdict == "never":
        raise CastError(Problem("cast-kind", path, facts))
    if verdict == "check":
        for values, _ in _chunks(move.span, torch.empty(move.span.shape, device="meta"), files, Buffer()):
            if (loss := casts.first_loss(values, move.target.dtype)) is not None:
                raise CastError(Problem("cast", path, {**facts, "value": loss}))


def check_cast_in_memory(key: str, value: torch.Tensor, target: torch.Tensor, path: str) -> None:
    """The same for a tensor in memory."""
    source, wanted = dtype_name(value.dtype), dtype_name(target.dtype)
    verdict = casts.verdict(source, wanted)
    facts = {"key": key, "source": source, "target": wanted}
    if verdict == "never":
        raise CastError(Problem("cast-kind", path, facts))
    if verdict == "check" and not value.is_meta:
        flat = value.detach().reshape(-1)
        for first in range(0, flat.numel(), PIECE):
            values = flat[first : first + PIECE].resolve_conj().resolve_neg()
            if (loss := casts.first_loss(values, target.dtype)) is not None:
                raise CastError(Problem("cast", path, {**facts, "value": loss}))


def check_records(records: Sequence[ZipRecord], path: str, files: Files) -> None:
    """UnreadableError for the first record whose bytes do not have the CRC32 that the archive gives for it."""

    def check(record: ZipRecord, buffer: Buffer) -> int:
        crc = 0
        for at, size in cuts(record.nbytes):
            files[record.file].read_into(record.offset + at, view := buffer.take(size))
            crc = zlib.crc32(view, crc)
        if crc != record.crc:
            raise UnreadableError(Problem("crc", path, {"name": printable(record.name)}))
        return record.nbytes

    known = [record for record in records if record.crc]  # 0 means that torch was told not to compute it
    in_threads([partial(check, record) for record in known], sum(record.nbytes for record in known))


def _pieces(ordered: Sequence[Move], files: Files, begun: set[str]) -> Iterator[Piece]:
    """The work in the order of the file: large tensors in pieces, small ones that lie close together at once."""
    run: list[Move] = []
    for move in ordered:
        span, straight = move.span, _straight(move.span, move.target)
        small = straight and span.nbytes <= TINY
        if run and not (small and _close(run, span)):
            yield _run(run, files, begun)
            run = []
        if small:
            run.append(move)
        elif straight:
            yield from (partial(_straight_in, move, at, size, files, begun) for at, size in cuts(span.nbytes))
        else:
            yield partial(_through_buffer, move, files, begun)
    if run:
        yield _run(run, files, begun)


def _run(run: list[Move], files: Files, begun: set[str]) -> Piece:
    if len(run) == 1:
        return partial(_straight_in, run[0], 0, run[0].span.nbytes, files, begun)
    return partial(_together, run, files, begun)


def _close(run: list[Move], span: Span) -> bool:
    """Whether a tensor lies so close behind the others that it is worth reading what is between them."""
    first, last = run[0].span, run[-1].span
    near = span.offset - last.offset - last.nbytes <= TINY and span.offset - first.offset <= BLOCK
    return span.file == first.file and near


def _straight(span: Span, target: torch.Tensor) -> bool:
    """Whether the span's bytes are, as they lie, the target's memory. A bool may be any byte in a file, so never."""
    return (
        target.is_cpu
        and span.dtype == dtype_name(target.dtype) != "bool"
        and span.big_endian == _BIG_ENDIAN
        and span.nbytes == target.nbytes
        and (
            (span.stride == target.stride() and span.shape == target.shape)
            or (target.is_contiguous() and is_contiguous(span))
        )
        and not (target.is_conj() or target.is_neg())
    )


def is_contiguous(span: Span) -> bool:
    """Tell whether the elements lie one behind the other, the last index running fastest."""
    expected = 1
    for size, stride in zip(reversed(span.shape), reversed(span.stride)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def cuts(nbytes: int) -> Iterator[tuple[int, int]]:
    """Give (first byte, size) of each piece in which so many bytes are read."""
    return ((at, min(PIECE, nbytes - at)) for at in range(0, nbytes, PIECE))


def _straight_in(move: Move, at: int, size: int, files: Files, begun: set[str], buffer: Buffer) -> int:
    memory = memory_at(move.target.data_ptr() + at, size)
    begun.add(move.key)
    files[move.span.file].read_into(move.span.offset + at, memoryview(memory).cast("B"))
    return size


def _together(run: list[Move], files: Files, begun: set[str], buffer: Buffer) -> int:
    start, stop = run[0].span.offset, max(span.offset + span.nbytes for _, span, _ in run)
    files[run[0].span.file].read_into(start, block := buffer.take(stop - start))
    for key, span, target in run:
        begun.add(key)
        at = span.offset - start
        memory_at(target.data_ptr(), span.nbytes).raw = block[at : at + span.nbytes]
    return sum(span.nbytes for _, span, _ in run)


def _through_buffer(move: Move, files: Files, begun: set[str], buffer: Buffer) -> int:
    for values, part in _chunks(move.span, move.target.detach(), files, buffer):
        begun.add(move.key)
        part.copy_(values)
    return move.span.nbytes


def _chunks(
    span: Span, target: torch.Tensor, files: Files, buffer: Buffer
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The span's values, some rows at a time, each with the rows of the target that they belong to."""
    shape = span.shape
    if 0 in shape:
        return
    if not is_contiguous(span):
        yield from _spread(span, target, files, buffer)
        return
    if target.is_contiguous() or shape == ():
        shape, target = (math.prod(shape),), target.reshape(-1)
    row = math.prod(shape[1:]) * ITEMSIZE[span.dtype]
    rows = max(1, CHUNK // row)
    for first in range(0, shape[0], rows):
        count = min(rows, shape[0] - first)
        values = _values(span, first * row, count * row, files, buffer)
        yield values.view(count, *shape[1:]), target[first : first + count]


def _spread(
    span: Span, target: torch.Tensor, files: Files, buffer: Buffer
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same for values that do not lie in a row: as many along the widest stride as the buffer holds."""
    itemsize = ITEMSIZE[span.dtype]
    if span.nbytes <= CHUNK or not any(size > 1 and step for size, step in zip(span.shape, span.stride)):
        yield _values(span, 0, span.nbytes, files, buffer).as_strided(span.shape, span.stride), target
        return
    dim = max(range(len(span.shape)), key=lambda i: span.stride[i] if span.shape[i] > 1 else -1)
    size, step = span.shape[dim], span.stride[dim] * itemsize
    inner = span.nbytes - (size - 1) * step  # what one index along this dimension reaches
    rows = max(1, (CHUNK - inner) // step + 1)
    for first in range(0, size, rows):
        count = min(rows, size - first)
        shape = (*span.shape[:dim], count, *span.shape[dim + 1 :])
        part = span._replace(offset=span.offset + first * step, nbytes=inner + (count - 1) * step, shape=shape)
        yield from _spread(part, target.narrow(dim, first, count), files, buffer)


def read_raw(span: Span, at: int, size: int, files: Files, buffer: Buffer) -> memoryview:
    """Read `size` bytes of the span, from byte `at` of it on, into the buffer."""
    files[span.file].read_into(span.offset + at, view := buffer.take(size))
    return view


def _values(span: Span, at: int, size: int, files: Files, buffer: Buffer) -> torch.Tensor:
    """Elements of the span in a row, in the machine's byte order."""
    raw = torch.frombuffer(read_raw(span, at, size, files, buffer), dtype=torch.uint8)
    dtype = dtype_of(span)
    if span.dtype == "bool":
        return raw.ne(0)
    if span.big_endian != _BIG_ENDIAN:
        width = dtype.itemsize // (2 if dtype.is_complex else 1)
        raw = raw.view(-1, width).flip(1).reshape(-1)
    return raw.view(dtype)
