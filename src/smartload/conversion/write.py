"""Write the weights of a checkpoint to a clean file. No other module of the library writes files.

What could be wrong is checked first: the destination, the casts, the values. Then the values are gathered in memory and
written to a temporary file beside the destination, which is read back and compared, and only then takes its name. So
after any failure the destination is what it was.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import threading
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
from smartload.load.threads import wait_for
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
from smartload.reading.files import is_in_use, remove_file, replace_file
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import ByteReader, Entry, Part, Stored, Tiled
from smartload.records.keys import leaf
from smartload.records.problems import Problem
from smartload.records.report import Conversion, casts_of
from smartload.records.requests import Options
from smartload.records.text import LONGEST_PATH, printable

SAFETENSORS = ".safetensors"
# The suffixes of the files that can be written; all but the last are written by torch.save.
SUFFIXES = (".pth", ".pt", ".bin", SAFETENSORS)


@dataclass(frozen=True, slots=True)
class CleanFile:
    """A file that is to be written.

    Attributes:
        to: where it will be. Links are followed: a link is written through, as by any program that opens the file to
            write into it.
        name: the path as the caller wrote it, for messages.
        dtype: the dtype of all floating tensors; None leaves them as they are.
    """

    to: Path
    name: str
    dtype: torch.dtype | None

    @property
    def safe(self) -> bool:
        """Whether it is to be a .safetensors file."""
        return self.to.suffix == SAFETENSORS


def check_destination(to: str | os.PathLike[str], dtype: torch.dtype | str | None) -> CleanFile:
    """Check the arguments of `convert` that say what to write, before the checkpoint is opened.

    Args:
        to: the path of the file to write.
        dtype: a floating dtype or its name; None leaves all tensors as they are.

    Raises:
        ValueError: for another suffix, or for a dtype that is none of floats.
        MissingExtraError: the package that writes .safetensors is not there.
    """
    path = Path(to)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"the suffix of {os.fspath(to)!r} must be one of {', '.join(SUFFIXES)}")
    # A name can be that of anything in torch, such as "Tensor": so the type is compared.
    torch_dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(torch_dtype, torch.dtype) and torch_dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating dtype of torch or the name of one, not {dtype!r}")
    if path.suffix == SAFETENSORS:
        try:
            import safetensors.torch  # noqa: F401 - needed here only, and missed before anything was read
        except ImportError as error:
            raise MissingExtraError(Problem("no-safetensors")) from error
    try:
        real = Path(os.path.realpath(path))
    except OSError:  # a device of Windows, such as con.pth: the writing will say what is wrong
        real = path.absolute()
    return CleanFile(real, printable(str(path), LONGEST_PATH), torch_dtype)


def write_clean_file(checkpoint: Checkpoint, source: object, options: Options, clean_file: CleanFile) -> Conversion:
    """Write the one state dict of `checkpoint`, or what `select` takes, to a file of its own; or change nothing.

    Args:
        checkpoint: what was opened.
        source: what the caller gave for it, so that it is not overwritten.
        options: `select` and `rename`.
        clean_file: where to, and how.

    Returns:
        What was done, for the log and the command line.

    Raises:
        SmartLoadError: one of its children; what was at the destination is there as it was.
    """
    _check_apart_from_source(source, checkpoint.files, clean_file)
    weights = take_weights(checkpoint, options)
    # safetensors holds tensors only. Asked before any of them is read, and by the names that the caller knows.
    if clean_file.safe and weights.extras:
        names = [weights.names.pairs[key] for key in weights.extras]
        raise SmartLoadError(Problem("extra-states", checkpoint.path, {"keys": names}))
    _check_casts(weights, checkpoint, clean_file)
    values = _values_to_write(weights, checkpoint.files, clean_file)
    # After the last read: what was read while another program wrote is a mixture of two checkpoints.
    for reader in checkpoint.files:
        reader.check_unchanged()
    _write_file(values, weights.metadata, clean_file)
    return _report(checkpoint, weights, values, clean_file)


def _check_apart_from_source(source: object, files: Sequence[ByteReader], clean_file: CleanFile) -> None:
    """Refuse a destination that is part of the source, by whatever name, or that is no regular file."""
    to, facts = clean_file.to, {"to": clean_file.name}
    # A new file in the folder of a checkpoint would be one set of weights more: the folder could not be read again.
    folder = _source_folder(source)
    if folder is not None and any(_is_same(folder, parent) for parent in to.parents):
        raise SmartLoadError(Problem("inside-source", facts=facts))
    try:
        status = os.stat(to)
    except OSError:  # nothing is there, or the writing will say what is wrong
        return
    if not stat.S_ISREG(status.st_mode):
        raise SmartLoadError(Problem("no-file", facts=facts))
    # By identity, not by path: a hard link is the same file under another name.
    if status.st_ino and any(os.path.samestat(status, source_status) for source_status in _source_stats(source, files)):
        raise SmartLoadError(Problem("own-source", facts=facts))


def _is_same(one: Path, other: Path) -> bool:
    """Tell whether two paths lead to one folder: on many disks 'Run' and 'run' do."""
    try:
        # Some network drives number no files: there all would be one.
        return os.stat(one).st_ino != 0 and os.path.samefile(one, other)
    except OSError:  # one of them is not there
        return False


def _source_folder(source: object) -> Path | None:
    """Give the folder that is read as a whole; None where `source` is one file, an index of files, or in memory."""
    if not isinstance(source, (str, os.PathLike)):
        return None
    path = Path(os.path.realpath(source))
    return path if path.is_dir() else path.parent if path.name == ".metadata" else None


def _source_stats(source: object, files: Sequence[ByteReader]) -> Iterator[os.stat_result]:
    """Give the status of every file that is read: of `source`, and of those that it led to."""
    for origin in (source, *(getattr(reader, "path", "") for reader in files)):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a file object need not have a descriptor
            yield os.stat(origin if isinstance(origin, (str, os.PathLike)) else cast("BinaryIO", origin).fileno())


def _target_dtype(key: str, value: Value, clean_file: CleanFile) -> torch.dtype:
    """Give the dtype that the tensor `key` is to have in the file.

    An extra state that is a tensor keeps its own: only the module knows what its numbers stand for.
    """
    dtype = value.dtype if isinstance(value, torch.Tensor) else dtype_of(value)
    return clean_file.dtype if clean_file.dtype and dtype.is_floating_point and leaf(key) != "_extra_state" else dtype


def _check_casts(weights: Weights, checkpoint: Checkpoint, clean_file: CleanFile) -> None:
    """Raise CastError where the dtype that was asked for cannot hold a value."""
    for key, value in weights.tensors.items():
        # On meta it takes no memory: only its dtype and shape are asked for.
        cast_to = empty_tensor(Tiled(dtype_name(_target_dtype(key, value, clean_file)), value.shape, ()), "meta")
        name = weights.names.pairs[key]
        try:
            if isinstance(value, torch.Tensor):
                check_cast_in_memory(name, value, cast_to, checkpoint.path)
            else:
                for move in moves_of(name, value, cast_to):
                    check_cast(move, checkpoint.path, checkpoint.files)
        except CastError as loss:
            # The same facts with another sentence: here the caller chose the dtype, not a model.
            facts = cast("Problem", loss.problem).facts
            raise CastError(Problem("cast-dtype", checkpoint.path, facts)) from None


def _values_to_write(weights: Weights, files: Sequence[ByteReader], clean_file: CleanFile) -> dict[str, object]:
    """Gather what is to be written: contiguous CPU tensors, names of one tensor as one, and extra states.

    torch.save writes the whole storage of a tensor, so that none may be a view of something larger. safetensors refuses
    tensors that share memory: there each name gets a tensor of its own, and tied values are written twice.
    """
    values: dict[str, object] = dict.fromkeys(weights.names.pairs)  # in the order of the file
    made: dict[object, torch.Tensor] = {}
    moves: list[Move] = []
    for key, value in weights.tensors.items():
        dtype = _target_dtype(key, value, clean_file)
        # Equal for two names that can be one tensor in the file. Spans are equal where they are the same bytes, read in
        # the same way.
        memory = (_shared_memory(value, clean_file) if isinstance(value, torch.Tensor) else value), dtype
        if memory not in made or clean_file.safe:
            if isinstance(value, torch.Tensor):
                # The first name may keep the caller's tensor, the others must not share its storage.
                made[memory] = _copy(value, dtype) if memory in made else _with_its_storage(value, dtype)
            else:
                made[memory] = empty_tensor(Tiled(dtype_name(dtype), value.shape, ()))
                moves += moves_of(key, value, made[memory])
        values[key] = made[memory]
    read_all(moves, files)  # together, in the order of the file
    return values | {key: extra_value(entry, files) for key, entry in weights.extras.items()}


def _shared_memory(value: torch.Tensor, clean_file: CleanFile) -> object:
    """Give what is equal for two tensors in memory of which the file can hold only one.

    For safetensors that is the storage, since it refuses tensors whose memory overlaps, and two views of one storage
    may. torch.save keeps any views apart; there it is the memory and the way it is looked at.
    """
    return value.untyped_storage().data_ptr() if clean_file.safe else memory_of(value)


def _with_its_storage(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Give `value` as a CPU tensor that has a storage to itself: without a copy where it is one already."""
    ready = value.is_cpu and value.dtype == dtype and value.is_contiguous() and is_ordinary(value)
    alone = ready and value.untyped_storage().nbytes() == value.nbytes
    return value.detach() if alone else _copy(value, dtype)


def _copy(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Copy `value` to a new contiguous CPU tensor of `dtype`."""
    # The device is named because the caller may have set another default.
    return torch.empty(value.shape, dtype=dtype, device="cpu").copy_(value.detach())


def _write_file(
    values: Mapping[str, object], metadata: Mapping[str, Mapping[str, int]] | None, clean_file: CleanFile
) -> None:
    """Write the file and put it at its destination, or raise SmartLoadError and leave nothing behind."""
    try:
        with _temporary_file(clean_file.to) as path:
            try:
                _save(values, metadata, path, clean_file.safe)
            except Exception as failure:  # safetensors has an error of its own for a full disk
                raise _not_written(clean_file, failure) from failure
            _check_written(values, metadata, path, clean_file)
    except SmartLoadError:
        raise
    except OSError as failure:  # of the temporary file itself: no such folder, no permission
        raise _not_written(clean_file, failure) from failure


def _not_written(clean_file: CleanFile, failure: Exception) -> SmartLoadError:
    """Make the error for a file that could not be written; it is of the type of `failure`, too."""
    if is_in_use(failure, clean_file.to):
        return of_both_types(SmartLoadError, Problem("in-use", facts={"to": clean_file.name}), failure)
    reason = failure.strerror if isinstance(failure, OSError) and failure.strerror else str(failure).strip()
    problem = Problem("not-written", facts={"to": clean_file.name, "reason": printable(reason)})
    return of_both_types(SmartLoadError, problem, failure)


@contextlib.contextmanager
def _temporary_file(to: Path) -> Iterator[Path]:
    """Create an empty file beside `to`, which takes its place when the block ends; after a failure it is removed.

    In the same folder, so that it is on the same disk: there a file takes another's name in one step.
    """
    # Hidden, and of no suffix of weights: nobody takes it for a checkpoint while it is there.
    path = to.with_name(f".smartload-{secrets.token_hex(8)}.tmp")
    try:
        # O_EXCL follows no link that somebody put there. 0o666 less the umask is the mode of any new file.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield path
        replace_file(path, to)
    except BaseException:
        with contextlib.suppress(OSError):
            remove_file(path)
        raise


class _Output:
    """A file for torch.save that keeps errors instead of raising them; after the first nothing is written any more.

    Args:
        file: where to write.
        failures: gets the errors.
    """

    def __init__(self, file: BinaryIO, failures: list[BaseException]) -> None:
        self._file, self._failures = file, failures

    def write(self, data: memoryview) -> int:
        """Write `data`; say that it was written in any case."""
        if not self._failures:
            try:
                self._file.write(data)
            except BaseException as failure:  # noqa: BLE001 - raised when torch.save has returned
                self._failures.append(failure)
        return len(data)

    def flush(self) -> None:
        """Do nothing: whoever opened the file flushes it, where an error can be raised."""


def _torch_save(content: object, file: BinaryIO) -> None:
    """Write `content` by torch.save, and raise what went wrong once its writer is done.

    An error must not cross torch's writer. It writes the end of its zip all the same, and where that fails, too, its
    message hides the first, and on Windows the whole process ends. So errors of the file are kept; and Ctrl-C, which
    comes between any two lines of Python, comes to the main thread alone, so that torch writes in another.
    """
    failures: list[BaseException] = []

    def save() -> None:
        try:
            torch.save(content, cast("BinaryIO", _Output(file, failures)))
        except BaseException as failure:  # noqa: BLE001 - raised by the caller's thread
            failures.append(failure)

    writer = threading.Thread(target=save)
    try:
        writer.start()
    except BaseException as failure:  # noqa: BLE001 - raised when the thread has ended, if it has begun
        failures.append(failure)
    wait_for(writer, failures)
    if failures:  # Ctrl-C stays Ctrl-C
        raise next((failure for failure in failures if not isinstance(failure, Exception)), failures[0])


def _save(
    values: Mapping[str, object], metadata: Mapping[str, Mapping[str, int]] | None, path: Path, safe: bool
) -> None:
    """Write `values` into the file at `path`, by safetensors where `safe`, else by torch.save with `metadata`."""
    if safe:
        from safetensors.torch import save_file

        mode = stat.S_IMODE(path.stat().st_mode)
        # {"format": "pt"} says that torch wrote it: releases of transformers refuse a file without a format.
        save_file(cast("dict[str, torch.Tensor]", values), path, {"format": "pt"})
        path.chmod(mode)  # some versions put a file there that nobody else may read
    with path.open("r+b") as file:
        if not safe:
            # To an open file: given a path, torch names the folder in the zip after the file, here at random.
            _torch_save(state_dict(values, metadata), file)
        file.flush()
        os.fsync(file.fileno())  # or the file could have its name but no content after a power cut


def _check_written(
    values: Mapping[str, object], metadata: Mapping[str, Mapping[str, int]] | None, path: Path, clean_file: CleanFile
) -> None:
    """Raise UnreadableError unless smartload reads exactly these values in the file, one tensor at a time."""
    cause: SmartLoadError | None = None
    try:
        with open_checkpoint(path) as written:
            part = written.parts.get("", Part({}))
            # A .safetensors file has no versions of modules.
            names = part.entries.keys() == values.keys() and (clean_file.safe or part.metadata == metadata)
            if names and all(_same_value(entry, values[key], written.files) for key, entry in part.entries.items()):
                return
    except SmartLoadError as failure:
        cause = failure
    raise UnreadableError(Problem("read-back", facts={"to": clean_file.name})) from cause


def _same_value(entry: Entry, value: object, files: Sequence[ByteReader]) -> bool:
    """Tell whether the file holds under `entry` what `value` is, bit for bit."""
    stored = tensor_of(entry)
    return same_extra_state(
        extra_value(entry, files) if stored is None else read_tensor(cast("Stored", stored), files), value
    )


def _report(
    checkpoint: Checkpoint, weights: Weights, values: Mapping[str, object], clean_file: CleanFile
) -> Conversion:
    """Report what was written, of which checkpoint, and what was left out."""
    tensors = {key: value for key, value in values.items() if isinstance(value, torch.Tensor)}
    dtypes = {
        key: dtype_name(value.dtype) if isinstance(value, torch.Tensor) else value.dtype
        for key, value in weights.tensors.items()
    }
    distinct = {id(value): value for value in tensors.values()}  # tied names are one tensor
    return Conversion(
        path=checkpoint.path,
        format=checkpoint.format,
        to=clean_file.name,
        part=weights.names.part,
        rule=weights.names.rule,
        tensors=len(tensors),
        nbytes=sum(value.nbytes for value in distinct.values()),
        casts=casts_of((key, dtype, dtype_name(tensors[key].dtype)) for key, dtype in dtypes.items()),
        ignored=weights.names.ignored,
        aside=checkpoint.aside,
    )
