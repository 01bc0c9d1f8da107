"""The only room that writes files: clean weights, read back and compared before they get their name."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import torch

from smartload.conversion.weights import Value, Weights, extra_value, take_weights, tensor_of
from smartload.errors import CastError, MissingExtraError, SmartLoadError, UnreadableError, of_both_types
from smartload.formats import open_checkpoint
from smartload.load.entries import same_extra_state
from smartload.load.strict import state_dict
from smartload.load.transfer import (
    Move,
    check_cast,
    check_cast_in_memory,
    dtype_of,
    empty_tensor,
    moves_of,
    read_all,
    read_tensor,
)
from smartload.place.memory import dtype_name, is_ordinary, memory_of
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import ByteReader, Entry, Part, Stored, Tiled
from smartload.records.keys import leaf
from smartload.records.problems import Problem
from smartload.records.report import Conversion, casts_of
from smartload.records.requests import Options
from smartload.records.text import printable

SAFETENSORS = ".safetensors"
SUFFIXES = (".pth", ".pt", ".bin", SAFETENSORS)
"""Of the files that can be written; all but the last as torch.save writes them."""


@dataclass(frozen=True, slots=True)
class CleanFile:
    """A file that is to be written."""

    to: Path
    """Where it will be; a link is written through, as by any program that opens the file to write into it."""
    name: str
    """The path as the caller wrote it, for messages."""
    dtype: torch.dtype | None
    """The dtype of all floating tensors; None leaves them as they are."""

    @property
    def safe(self) -> bool:
        """Whether it is to be a .safetensors file."""
        return self.to.suffix == SAFETENSORS


def check_destination(to: str | os.PathLike[str], dtype: torch.dtype | str | None) -> CleanFile:
    """What the caller wants, if it can be had.

    Raises:
        ValueError: for another suffix, or for a dtype that is none of floats.
        MissingExtraError: the package that writes .safetensors is not there.
    """
    path = Path(to)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"the suffix of {os.fspath(to)!r} must be one of {', '.join(SUFFIXES)}")
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"dtype must be a floating dtype of torch or the name of one, not {dtype!r}")
    if path.suffix == SAFETENSORS:
        try:
            import safetensors.torch  # noqa: F401 - needed here only, and missed before anything was read
        except ImportError as error:
            raise MissingExtraError(Problem("no-safetensors")) from error
    return CleanFile(Path(os.path.realpath(path)), printable(str(path)), found)


def write_clean_file(checkpoint: Checkpoint, source: object, options: Options, clean_file: CleanFile) -> Conversion:
    """Write the one state dict of a checkpoint, or what `select` takes, to a file of its own; or change nothing.

    Args:
        checkpoint: what was opened.
        source: what the caller gave for it, so that it is not overwritten.
        options: `select` and `rename`.
        clean_file: where to, and how.

    Raises:
        SmartLoadError: one of its children; what was at the destination is there as it was.
    """
    _check_apart(source, checkpoint.files, clean_file)
    found = take_weights(checkpoint, options)
    if clean_file.safe and found.extras:
        names = [found.names.pairs[key] for key in found.extras]
        raise SmartLoadError(Problem("extra-states", checkpoint.path, {"keys": names}))
    _check_casts(found, checkpoint, clean_file)
    values = _values(found, checkpoint.files, clean_file)
    for reader in checkpoint.files:
        reader.check_unchanged()
    _write(values, found.metadata, clean_file)
    return _conversion(checkpoint, found, values, clean_file)


def _check_apart(source: object, files: Sequence[ByteReader], clean_file: CleanFile) -> None:
    """SmartLoadError where the destination is part of the source, by whatever name, or no file."""
    to, facts = clean_file.to, {"to": clean_file.name}
    folder = _folder(source)
    if folder is not None and folder in to.parents:
        raise SmartLoadError(Problem("inside-source", facts=facts))
    try:
        there = to.stat()
    except OSError:  # nothing is there, or the writing will say what is wrong
        return
    if not stat.S_ISREG(there.st_mode):
        raise SmartLoadError(Problem("no-file", facts=facts))
    if any(os.path.samestat(there, each) for each in _stats(source, files)):
        raise SmartLoadError(Problem("own-source", facts=facts))


def _folder(source: object) -> Path | None:
    """The folder that is read; None where it is one file, or an index of files."""
    if not isinstance(source, (str, os.PathLike)):
        return None
    path = Path(os.path.realpath(source))
    return path if path.is_dir() else path.parent if path.name == ".metadata" else None


def _stats(source: object, files: Sequence[ByteReader]) -> Iterator[os.stat_result]:
    """The identities of all that is read."""
    for each in (source, *(getattr(reader, "path", "") for reader in files)):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a file object need not have a descriptor
            yield os.stat(each if isinstance(each, (str, os.PathLike)) else cast("BinaryIO", each).fileno())


def _dtype(key: str, value: Value, clean_file: CleanFile) -> torch.dtype:
    """The dtype that a tensor is to have; an extra state that is one keeps its own."""
    dtype = value.dtype if isinstance(value, torch.Tensor) else dtype_of(value)
    return clean_file.dtype if clean_file.dtype and dtype.is_floating_point and leaf(key) != "_extra_state" else dtype


def _check_casts(found: Weights, checkpoint: Checkpoint, clean_file: CleanFile) -> None:
    """CastError where the dtype that was asked for cannot hold a value."""
    for key, value in found.tensors.items():
        cast_to = torch.empty(value.shape, dtype=_dtype(key, value, clean_file), device="meta")
        name = found.names.pairs[key]
        try:
            if isinstance(value, torch.Tensor):
                check_cast_in_memory(name, value, cast_to, checkpoint.path)
            else:
                for move in moves_of(name, value, cast_to):
                    check_cast(move, checkpoint.path, checkpoint.files)
        except CastError as loss:
            facts = cast("Problem", loss.problem).facts
            raise CastError(Problem("cast-dtype", checkpoint.path, facts)) from None


def _values(found: Weights, files: Sequence[ByteReader], clean_file: CleanFile) -> dict[str, object]:
    """What is to be written: contiguous CPU tensors, names of one tensor as one, and extra states."""
    values: dict[str, object] = dict.fromkeys(found.names.pairs)
    made: dict[object, torch.Tensor] = {}
    moves: list[Move] = []
    for key, value in found.tensors.items():
        dtype = _dtype(key, value, clean_file)
        memory = (_memory(value, clean_file) if isinstance(value, torch.Tensor) else value), dtype
        if memory not in made or clean_file.safe:  # a .safetensors file has tied values twice
            if isinstance(value, torch.Tensor):
                made[memory] = _copy(value, dtype) if memory in made else _owner(value, dtype)
            else:
                made[memory] = empty_tensor(Tiled(dtype_name(dtype), value.shape, ()))
                moves += moves_of(key, value, made[memory])
        values[key] = made[memory]
    read_all(moves, files)
    return values | {key: extra_value(entry, files) for key, entry in found.extras.items()}


def _memory(value: torch.Tensor, clean_file: CleanFile) -> object:
    """Equal for tensors in memory that cannot be written side by side without a copy, or need not be written twice."""
    return value.untyped_storage().data_ptr() if clean_file.safe else memory_of(value)


def _owner(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in memory as one on the CPU that has its storage to itself; the same one where it is that already."""
    ready = value.is_cpu and value.dtype == dtype and value.is_contiguous() and is_ordinary(value)
    alone = ready and value.untyped_storage().nbytes() == value.nbytes
    return value.detach() if alone else _copy(value, dtype)


def _copy(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(value.shape, dtype=dtype, device="cpu").copy_(value.detach())


def _write(
    values: Mapping[str, object], metadata: Mapping[str, Mapping[str, int]] | None, clean_file: CleanFile
) -> None:
    before = sys.exc_info()[1]  # what the caller may be about to handle
    try:
        with _beside(clean_file.to) as path:
            try:
                _save(values, metadata, path, clean_file.safe)
            except Exception as failure:  # torch and safetensors have errors of their own for a full disk
                first = _first(failure, before)
                if not isinstance(first, Exception):
                    raise first from None
                raise _not_written(clean_file, first) from failure
            _check_written(values, metadata, path, clean_file)
    except SmartLoadError:
        raise
    except OSError as failure:
        raise _not_written(clean_file, failure) from failure


def _first(failure: BaseException, before: BaseException | None) -> BaseException:
    """What went wrong first: after a full disk or Ctrl-C, torch complains of the file that is not complete."""
    while failure.__context__ not in (None, before):
        failure = failure.__context__
    return failure


def _not_written(clean_file: CleanFile, failure: Exception) -> SmartLoadError:
    reason = failure.strerror if isinstance(failure, OSError) and failure.strerror else str(failure).strip()
    problem = Problem("not-written", facts={"to": clean_file.name, "reason": printable(reason)})
    return of_both_types(SmartLoadError, problem, failure)


@contextlib.contextmanager
def _beside(to: Path) -> Iterator[Path]:
    """A new file in the same folder that takes the place of `to` in the end; after a failure it is gone."""
    path = to.with_name(f".smartload-{secrets.token_hex(8)}.tmp")
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield path
        os.replace(path, to)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def _save(
    values: Mapping[str, object], metadata: Mapping[str, Mapping[str, int]] | None, path: Path, safe: bool
) -> None:
    if safe:
        from safetensors.torch import save_file

        mode = stat.S_IMODE(path.stat().st_mode)
        save_file(cast("dict[str, torch.Tensor]", values), path, {"format": "pt"})
        path.chmod(mode)  # some versions put a file there that nobody else may read
    with path.open("r+b") as file:
        if not safe:
            torch.save(state_dict(values, metadata), file)
        file.flush()
        os.fsync(file.fileno())


def _check_written(
    values: Mapping[str, object], metadata: Mapping[str, Mapping[str, int]] | None, path: Path, clean_file: CleanFile
) -> None:
    """UnreadableError unless smartload reads exactly these values in the file, one tensor at a time."""
    odd: SmartLoadError | None = None
    try:
        with open_checkpoint(path) as back:
            part = back.parts.get("", Part({}))
            names = part.entries.keys() == values.keys() and (clean_file.safe or part.metadata == metadata)
            if names and all(_same(entry, values[key], back.files) for key, entry in part.entries.items()):
                return
    except SmartLoadError as failure:
        odd = failure
    raise UnreadableError(Problem("read-back", facts={"to": clean_file.name})) from odd


def _same(entry: Entry, value: object, files: Sequence[ByteReader]) -> bool:
    found = tensor_of(entry)
    return same_extra_state(
        extra_value(entry, files) if found is None else read_tensor(cast("Stored", found), files), value
    )


def _conversion(
    checkpoint: Checkpoint, found: Weights, values: Mapping[str, object], clean_file: CleanFile
) -> Conversion:
    tensors = {key: value for key, value in values.items() if isinstance(value, torch.Tensor)}
    before = {
        key: dtype_name(value.dtype) if isinstance(value, torch.Tensor) else value.dtype
        for key, value in found.tensors.items()
    }
    return Conversion(
        path=checkpoint.path,
        format=checkpoint.format,
        to=clean_file.name,
        part=found.names.part,
        rule=found.names.rule,
        tensors=len(tensors),
        nbytes=sum(value.nbytes for value in {id(value): value for value in tensors.values()}.values()),
        casts=casts_of((key, dtype, dtype_name(tensors[key].dtype)) for key, dtype in before.items()),
        ignored=found.names.ignored,
        aside=checkpoint.aside,
    )
