"""Read bytes of files into the memory of tensors, for all formats.

`read_all` makes tasks for a few threads. A tensor whose memory must hold the bytes of the file as they are is read
straight into it; small ones that lie close together are read at once and then copied; any other
goes through a buffer, some rows at a time, and is cast, reordered or sent to its device from there. So reading needs
no second copy of a tensor.

Nothing is mapped. A mapped file that is truncated ends the process with SIGBUS, and weights that stay mapped change
when the file is written anew.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from smartload.errors import CastError, UnreadableError
from smartload.load import casts
from smartload.load.threads import Buffer, Task, in_threads
from smartload.place.memory import SMALL_TENSOR_BYTES, check_makes_tensors, dtype_name, memory_at
from smartload.records.entries import ITEMSIZE, ByteReader, Span, Stored
from smartload.records.problems import Problem

READ_BYTES = 16 << 20
"""Bytes of one read of a large tensor, which threads share and report one by one; 1 to 64 MiB measured equal."""

BUFFER_BYTES = 4 << 20
"""Bytes that go through a buffer at once: few enough to be in the processor's cache still when they are converted."""

RUN_BYTES = 1 << 20
"""Bytes of small tensors, and of the gaps between them, that are read at once."""

Files = Sequence[ByteReader]
"""The open files of a checkpoint; a span names its file by the index."""

_BIG_ENDIAN = sys.byteorder == "big"


class Move(NamedTuple):
    """One tensor, or tile of one, to read: its key (for messages), where its bytes lie, and the tensor to fill."""

    key: str
    span: Span
    target: torch.Tensor


def read_all(
    moves: Sequence[Move], files: Files, begun: set[str] | None = None, done: Callable[[int], None] | None = None
) -> None:
    """Fill the target of every move from its span; return or raise only when the last thread has stopped writing.

    Args:
        moves: what to read, in any order. No two targets may share memory: threads fill them in any order.
        files: the files that the spans refer to.
        begun: is given each key before its target is written to. Where this raises, these targets may hold a mixture of
            old and new values.
        done: is called, in this thread, with the bytes read since its last call.

    Raises:
        UnreadableError: a file failed or ended early.
    """
    begun = set() if begun is None else begun
    # By file and offset: disks read ahead, and small tensors that lie together meet.
    ordered = sorted(moves, key=lambda move: move.span[:2])
    # Only large tensors make threads worth it: the time of small ones is Python's, which holds its lock for it.
    large = sum(move.span.nbytes for move in ordered if move.span.nbytes > SMALL_TENSOR_BYTES)
    in_threads(list(_tasks(ordered, files, begun)), large, done)


def moves_of(key: str, stored: Stored, target: torch.Tensor) -> list[Move]:
    """Give what must be read to fill `target` from a stored tensor: its one span, or each tile into its own slice."""
    if isinstance(stored, Span):
        return [Move(key, stored, target)]
    moves = []
    for offset, span in stored.tiles:
        tile = target.detach()  # a view of a Parameter that requires a gradient could not be written to
        for dim, (first, size) in enumerate(zip(offset, span.shape, strict=True)):
            tile = tile.narrow(dim, first, size)
        moves.append(Move(key, span, tile))
    return moves


def read_tensor(stored: Stored, files: Files) -> torch.Tensor:
    """Read a stored tensor into a new CPU tensor of its shape and dtype and, where it has no gaps, its strides.

    Raises:
        UnreadableError: a file failed, this torch lacks the dtype, or there is not enough memory.
    """
    tensor = empty_tensor(stored)
    read_all(moves_of("", stored, tensor), files)
    return tensor


def read_extra_state(tree: object, files: Files) -> object:
    """Give an extra state with every span in it read into a tensor; dicts and lists are made anew.

    What is there twice, by identity, is made once, as it was when it was saved.
    """
    return _read_tree(tree, files, {})


def _read_tree(tree: object, files: Files, made: dict[int, object]) -> object:
    """Do the same for a part of it; `made` has what was made so far, by the identity of what it was made of."""
    if not isinstance(tree, (Span, dict, list, tuple)):
        return tree
    if id(tree) not in made:
        if isinstance(tree, Span):
            made[id(tree)] = read_tensor(tree, files)
        elif isinstance(tree, dict):
            made[id(tree)] = type(tree)((key, _read_tree(item, files, made)) for key, item in tree.items())
        else:
            made[id(tree)] = type(tree)(_read_tree(item, files, made) for item in tree)
    return made[id(tree)]


def empty_tensor(stored: Stored, device: str = "cpu") -> torch.Tensor:
    """Make the tensor that `read_tensor` fills; on meta, what stands for it where only shape and dtype are asked for.

    Raises:
        PlacementError: a mode is active in which torch makes no tensors with memory.
        UnreadableError: this torch lacks the dtype, or there is not enough memory.
    """
    dtype, need = dtype_of(stored), math.prod(stored.shape) * ITEMSIZE[stored.dtype]
    check_makes_tensors()
    try:
        # Strides are kept only where they need no more memory than the elements: a hostile file may spread two
        # elements over gigabytes. The device is named, because the user may have set another default.
        if isinstance(stored, Span) and stored.nbytes == need:
            return torch.empty_strided(stored.shape, stored.stride, dtype=dtype, device=device)
        return torch.empty(stored.shape, dtype=dtype, device=device)
    except RuntimeError as error:
        raise UnreadableError(Problem("memory", facts={"need": need})) from error


def dtype_of(span: Stored) -> torch.dtype:
    """Give the torch.dtype of a stored tensor.

    Raises:
        UnreadableError: this torch is too old to have it.
    """
    dtype = getattr(torch, span.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise UnreadableError(Problem("dtype", facts={"dtype": span.dtype, "torch": torch.__version__}))
    return dtype


def check_cast(move: Move, path: str, files: Files) -> None:
    """Refuse a cast that would lose a value of the span; the file is read only where the values decide.

    Raises:
        CastError: the target's dtype cannot hold a value, or no value of this kind.
        UnreadableError: the file failed.
    """
    target = dtype_name(move.target.dtype)
    verdict = casts.verdict(move.span.dtype, target)
    facts = {"key": move.key, "source": move.span.dtype, "target": target}
    if verdict == "never":
        raise CastError(Problem("cast-kind", path, facts))
    if verdict == "check":
        # _chunks gives each chunk with its slice of a target; none is written here, so one without memory serves.
        for values, _ in _chunks(move.span, torch.empty(move.span.shape, device="meta"), files, Buffer()):
            if (loss := casts.first_loss(values, move.target.dtype)) is not None:
                raise CastError(Problem("cast", path, {**facts, "value": loss}))


def check_cast_in_memory(key: str, value: torch.Tensor, target: torch.Tensor, path: str) -> None:
    """Refuse a cast that would lose a value of a tensor in memory.

    Raises:
        CastError: the dtype of `target` cannot hold a value, or no value of this kind.
    """
    source, target_name = dtype_name(value.dtype), dtype_name(target.dtype)
    verdict = casts.verdict(source, target_name)
    facts = {"key": key, "source": source, "target": target_name}
    if verdict == "never":
        raise CastError(Problem("cast-kind", path, facts))
    if verdict == "check" and not value.is_meta:
        flat = value.detach().reshape(-1)
        # Some elements at a time, because the check makes several tensors of a wider dtype. Pending conjugation and
        # negation are carried out: not every operation of the check knows them.
        for first in range(0, flat.numel(), READ_BYTES):
            values = flat[first : first + READ_BYTES].resolve_conj().resolve_neg()
            if (loss := casts.first_loss(values, target.dtype)) is not None:
                raise CastError(Problem("cast", path, {**facts, "value": loss}))


def _tasks(ordered: Sequence[Move], files: Files, begun: set[str]) -> Iterator[Task]:
    """Make the tasks in the order of the file: a large tensor in several, small ones that lie close together in one."""
    run: list[Move] = []  # small tensors that lie close together, up to the present one
    for move in ordered:
        span, direct = move.span, _has_bytes_of_file(move.span, move.target)
        small = direct and span.nbytes <= SMALL_TENSOR_BYTES
        if run and not (small and _is_near(run, span)):
            yield _task_of_run(run, files, begun)
            run = []
        if small:
            run.append(move)
        elif direct:
            yield from (partial(_read_directly, move, at, size, files, begun) for at, size in cuts(span.nbytes))
        else:
            yield partial(_read_through_buffer, move, files, begun)
    if run:
        yield _task_of_run(run, files, begun)


def _task_of_run(run: list[Move], files: Files, begun: set[str]) -> Task:
    if len(run) == 1:  # nothing to share the read with, so that it needs no buffer
        return partial(_read_directly, run[0], 0, run[0].span.nbytes, files, begun)
    return partial(_read_run, run, files, begun)


def _is_near(run: list[Move], span: Span) -> bool:
    """Tell whether a span lies so close behind a run that reading the gap as well is cheaper than a read more."""
    first, last = run[0].span, run[-1].span
    # Between two tensors of torch.save stand the headers and the padding of a zip: some hundred bytes.
    small_gap = span.offset - last.offset - last.nbytes <= SMALL_TENSOR_BYTES
    return span.file == first.file and small_gap and span.offset - first.offset <= RUN_BYTES


def _has_bytes_of_file(span: Span, target: torch.Tensor) -> bool:
    """Tell whether the target's memory must hold just the span's bytes, in the same order."""
    return (
        target.is_cpu
        # A bool must be 0 or 1 in memory, and in a file may be any byte: each is compared with 0.
        and span.dtype == dtype_name(target.dtype) != "bool"
        and span.big_endian == _BIG_ENDIAN
        and not (span.conj or span.neg)
        # Of equal size, so that a file cannot ask for more bytes than the target has memory.
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
        # No step is ever taken along a dimension of size 1: torch allows any stride there.
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def cuts(nbytes: int) -> Iterator[tuple[int, int]]:
    """Give (first byte, size) of each of the reads by which `nbytes` bytes are read."""
    return ((at, min(READ_BYTES, nbytes - at)) for at in range(0, nbytes, READ_BYTES))


def _read_directly(move: Move, at: int, size: int, files: Files, begun: set[str], buffer: Buffer) -> int:
    """Read `size` bytes of the span, from byte `at` of it on, into the same bytes of the target's memory."""
    memory = memory_at(move.target.data_ptr() + at, size)
    begun.add(move.key)  # before the first byte: from here on the target may hold a mixture
    files[move.span.file].read_into(move.span.offset + at, memory)
    return size


def _read_run(run: list[Move], files: Files, begun: set[str], buffer: Buffer) -> int:
    """Read a run of small tensors, and the gaps between them, at once; copy each into its target."""
    # Spans may overlap (views of one storage), so that the last one need not end last.
    start, stop = run[0].span.offset, max(span.offset + span.nbytes for _, span, _ in run)
    files[run[0].span.file].read_into(start, block := buffer.take(stop - start))
    for key, span, target in run:
        begun.add(key)
        at = span.offset - start
        memory_at(target.data_ptr(), span.nbytes)[:] = block[at : at + span.nbytes]
    return sum(span.nbytes for _, span, _ in run)


def _read_through_buffer(move: Move, files: Files, begun: set[str], buffer: Buffer) -> int:
    """Read the span chunk by chunk; torch copies each into the target, with all casts, strides and devices."""
    for values, rows in _chunks(move.span, move.target.detach(), files, buffer):
        begun.add(move.key)
        rows.copy_(values)
    return move.span.nbytes


def _chunks(
    span: Span, target: torch.Tensor, files: Files, buffer: Buffer
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Give the span's values some rows at a time, each with the rows of the target that they belong to.

    The values are in the buffer: they are gone when the next chunk is asked for.
    """
    shape = span.shape
    if 0 in shape:
        return
    if not is_contiguous(span):
        yield from _strided_chunks(span, target, files, buffer)
        return
    # In one dimension, chunks need not be whole rows, which may be longer than the buffer.
    if target.is_contiguous() or shape == ():
        shape, target = (math.prod(shape),), target.reshape(-1)
    row = math.prod(shape[1:]) * ITEMSIZE[span.dtype]
    rows = max(1, BUFFER_BYTES // row)
    for first in range(0, shape[0], rows):
        count = min(rows, shape[0] - first)
        values = _values(span, first * row, count * row, files, buffer)
        yield values.view(count, *shape[1:]), target[first : first + count]


def _strided_chunks(
    span: Span, target: torch.Tensor, files: Files, buffer: Buffer
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Give the values of a span whose elements do not lie in a row, as `_chunks` does.

    The dimension of the largest stride is cut into as many indices as the buffer holds, and each cut again until it
    fits: so every read is one run of bytes, however the elements are spread in it.
    """
    itemsize = ITEMSIZE[span.dtype]
    # Where every dimension repeats its elements (stride 0), nothing is left to cut.
    if span.nbytes <= BUFFER_BYTES or not any(size > 1 and step for size, step in zip(span.shape, span.stride)):
        yield _values(span, 0, span.nbytes, files, buffer).as_strided(span.shape, span.stride), target
        return
    dim = max(range(len(span.shape)), key=lambda i: span.stride[i] if span.shape[i] > 1 else -1)
    size, step = span.shape[dim], span.stride[dim] * itemsize
    inner = span.nbytes - (size - 1) * step  # bytes from the first to the last element of one index
    rows = max(1, (BUFFER_BYTES - inner) // step + 1)
    for first in range(0, size, rows):
        count = min(rows, size - first)
        shape = (*span.shape[:dim], count, *span.shape[dim + 1 :])
        cut = span._replace(offset=span.offset + first * step, nbytes=inner + (count - 1) * step, shape=shape)
        yield from _strided_chunks(cut, target.narrow(dim, first, count), files, buffer)


def read_raw(span: Span, at: int, size: int, files: Files, buffer: Buffer) -> memoryview:
    """Read `size` bytes of the span, from byte `at` of it on, into the buffer."""
    files[span.file].read_into(span.offset + at, view := buffer.take(size))
    return view


def _values(span: Span, at: int, size: int, files: Files, buffer: Buffer) -> torch.Tensor:
    """Read some bytes of the span, and give the elements in them as a flat tensor in this machine's byte order."""
    raw = torch.frombuffer(read_raw(span, at, size, files, buffer), dtype=torch.uint8)
    dtype = dtype_of(span)
    if span.dtype == "bool":
        return raw.ne(0)
    if span.big_endian != _BIG_ENDIAN:
        # The bytes of each number are turned round; of a complex one its two components stay in order.
        width = dtype.itemsize // (2 if dtype.is_complex else 1)
        raw = raw.view(-1, width).flip(1).reshape(-1)
    values = raw.view(dtype)
    # At once, not as a pending flag: not every operation of a check or a copy knows those.
    if span.conj:
        values = values.conj_physical()
    return values.neg() if span.neg else values
