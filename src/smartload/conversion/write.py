"""Write the weights of a checkpoint to a clean file. No other module of the library writes files.

What could be wrong is checked first: the destination, the sizes, the casts, the values. Then the values are gathered in
memory and written to a temporary file beside the destination, which is read back and compared, and only then takes its
name. So after any failure the destination is what it was.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import torch

from smartload.conversion.weights import Value, Weights, check_size, extra_value, size_of, take_weights, tensor_of
from smartload.errors import AmbiguousKeysError, CastError, SmartLoadError, UnreadableError, of_both_types
from smartload.formats import open_checkpoint
from smartload.formats.safetensors import DTYPES
from smartload.load.entries import same_extra_state
from smartload.load.strict import state_dict
from smartload.load.threads import Helper, raise_one
from smartload.load.transfer import (
    Move,
    check_cast,
    check_cast_in_memory,
    cuts,
    dtype_of,
    empty_tensor,
    moves_of,
    read_all,
    read_tensor,
)
from smartload.place.memory import dtype_name, is_ordinary, memory_at, memory_of
from smartload.reading.files import (
    create_file,
    is_in_use,
    kind_of,
    remove_abandoned,
    remove_file,
    replace_file,
    temporary_name,
    write_all,
)
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import ByteReader, Entry, Part, Stored, Tiled
from smartload.records.keys import leaf
from smartload.records.problems import Problem
from smartload.records.report import Conversion, casts_of
from smartload.records.requests import Ignored, Options
from smartload.records.text import LONGEST_PATH, printable

SAFETENSORS = ".safetensors"
# The suffixes of the files that can be written; all but the last are written by torch.save.
SUFFIXES = (".pth", ".pt", ".bin", SAFETENSORS)
# torch's name of a dtype -> the name that the header of a .safetensors file has for it.
_HEADER_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


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
        SmartLoadError: the path is relative, and the working directory was removed.
    """
    path = Path(to)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"the suffix of {os.fspath(to)!r} must be one of {', '.join(SUFFIXES)}")
    # A name can be that of anything in torch, such as "Tensor": so the type is compared.
    torch_dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(torch_dtype, torch.dtype) and torch_dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating dtype of torch or the name of one, not {dtype!r}")
    name = printable(str(path), LONGEST_PATH)
    try:
        real = Path(os.path.realpath(path))
    except FileNotFoundError as gone:
        facts = {"to": name, "folder": "the working directory, which was removed"}
        raise of_both_types(SmartLoadError, Problem("no-folder", facts=facts), gone) from None
    except OSError:  # a device of Windows, such as con.pth: the writing will say what is wrong
        real = path.absolute()
    return CleanFile(real, name, torch_dtype)


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
    _check_place(source, checkpoint.files, clean_file)
    weights = take_weights(checkpoint, options)
    if clean_file.safe:
        _check_fits_safetensors(weights, checkpoint, clean_file)
    _check_sizes(weights, checkpoint, clean_file)
    _check_casts(weights, checkpoint, clean_file)
    content = _Content(
        _values_to_write(weights, checkpoint.files, clean_file),
        weights.metadata,
        # "pt" says that torch wrote it: releases of transformers refuse a file without a format.
        {**checkpoint.header, "format": "pt"} if clean_file.safe else {},
    )
    # After the last read: what was read while another program wrote is a mixture of two checkpoints.
    for reader in checkpoint.files:
        reader.check_unchanged()
    _write_file(content, clean_file)
    return _report(checkpoint, weights, content.values, clean_file)


@dataclass(frozen=True, slots=True)
class _Content:
    """What is to be in the file.

    Attributes:
        values: CPU tensors and extra states, by clean key.
        versions: the versions of the modules, which only torch.save keeps; None where there are none.
        header: the texts in the header of a .safetensors file.
    """

    values: Mapping[str, object]
    versions: Mapping[str, Mapping[str, int]] | None
    header: Mapping[str, str]


def _check_place(source: object, files: Sequence[ByteReader], clean_file: CleanFile) -> None:
    """Refuse a destination that is part of the source, by whatever name, or that could not be replaced as it should.

    Before anything is read: a file of many gigabytes need not be read to learn that its folder is not there.
    """
    to, facts = clean_file.to, {"to": clean_file.name}
    # All links were followed, so that one that is left has no end.
    for path in (to, *to.parents):
        if os.path.islink(path):
            raise SmartLoadError(Problem("link-loop", facts={**facts, "link": printable(str(path), LONGEST_PATH)}))
    if not os.path.isdir(to.parent):
        missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        facts["folder"] = printable(str(to.parent), LONGEST_PATH)
        raise of_both_types(SmartLoadError, Problem("no-folder", facts=facts), missing)
    # A new file in the folder of a checkpoint would be one set of weights more: the folder could not be read again.
    folder = _source_folder(source)
    if folder is not None and any(_is_same(folder, parent) for parent in to.parents):
        raise SmartLoadError(Problem("inside-source", facts=facts))
    try:
        status = os.stat(to)
    except OSError:  # nothing is there, or the writing will say what is wrong
        return
    if not stat.S_ISREG(status.st_mode):
        raise SmartLoadError(Problem("no-file", facts={**facts, "what": kind_of(status.st_mode)}))
    # By identity, not by path: a hard link is the same file under another name.
    if status.st_ino and any(os.path.samestat(status, source_status) for source_status in _source_stats(source, files)):
        raise SmartLoadError(Problem("own-source", facts=facts))
    # The new file takes the place of the old one, for which only the folder need be writable: no program that opens
    # the file to write into it would get so far.
    if not os.access(to, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        raise of_both_types(SmartLoadError, Problem("read-only", facts=facts), denied)
    # To replace one name would part it from the others in silence; to write into the file is not done in one step.
    if status.st_nlink > 1:
        raise SmartLoadError(Problem("hard-links", facts={**facts, "count": status.st_nlink}))


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


def _check_fits_safetensors(weights: Weights, checkpoint: Checkpoint, clean_file: CleanFile) -> None:
    """Refuse what a .safetensors file cannot hold, by the names that the caller knows."""
    pairs = weights.names.pairs
    if weights.extras:
        raise SmartLoadError(Problem("extra-states", checkpoint.path, {"keys": [pairs[key] for key in weights.extras]}))
    for key, value in weights.tensors.items():
        dtype = dtype_name(_target_dtype(key, value, clean_file))
        if dtype not in _HEADER_DTYPES:
            raise SmartLoadError(Problem("header-dtype", checkpoint.path, {"key": pairs[key], "dtype": dtype}))


def _check_sizes(weights: Weights, checkpoint: Checkpoint, clean_file: CleanFile) -> None:
    """Refuse tensors that take far more memory, or room in the file, than where they are now."""
    sizes: dict[str, int] = {}
    seen: set[object] = set()
    for key, value in weights.tensors.items():
        dtype = _target_dtype(key, value, clean_file)
        memory = _memory(value, dtype, clean_file)
        # One tensor under several names is written once where the format can say so.
        sizes[key] = 0 if memory in seen and not clean_file.safe else size_of(value, dtype)
        seen.add(memory)
    check_size(sizes, weights, checkpoint)


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
        memory = _memory(value, dtype, clean_file)
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


def _memory(value: Value, dtype: torch.dtype, clean_file: CleanFile) -> object:
    """Give what is equal for two names that can be one tensor in the file, or share memory where that must not be.

    Spans are equal where they are the same bytes, read in the same way. For a tensor in memory and safetensors it is
    the storage, since two views of one storage may overlap. torch.save keeps any views apart; there it is the memory
    and the way it is looked at.
    """
    if not isinstance(value, torch.Tensor):
        return value, dtype
    return value.untyped_storage().data_ptr() if clean_file.safe else memory_of(value), dtype


def _with_its_storage(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Give `value` as a CPU tensor that has a storage to itself: without a copy where it is one already."""
    ready = value.is_cpu and value.dtype == dtype and value.is_contiguous() and is_ordinary(value)
    alone = ready and value.untyped_storage().nbytes() == value.nbytes
    return value.detach() if alone else _copy(value, dtype)


def _copy(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Copy `value` to a new contiguous CPU tensor of `dtype`."""
    return empty_tensor(Tiled(dtype_name(dtype), tuple(value.shape), ())).copy_(value.detach())


def _write_file(content: _Content, clean_file: CleanFile) -> None:
    """Write the file and put it at its destination, or raise SmartLoadError and leave nothing behind."""
    remove_abandoned(clean_file.to.parent)
    path = temporary_name(clean_file.to)
    try:
        # 0o666 less the umask is the mode of any new file. One that others may not read is not shown to them before its
        # time either.
        with create_file(path, 0o600 if os.path.exists(clean_file.to) else 0o666) as file:
            _save(content, file, clean_file.safe)
            os.fsync(file.fileno())  # or the file could have its name but no content after a power cut
            _check_written(content, file, clean_file)
            replace_file(file, clean_file.to)
    except BaseException as failure:
        gone = not os.path.lexists(path)  # it is at its place already, or could not be created
        with contextlib.suppress(OSError):
            remove_file(path)
        if isinstance(failure, SmartLoadError) or not isinstance(failure, OSError if gone else Exception):
            raise
        raise _not_written(clean_file, failure) from failure


def _not_written(clean_file: CleanFile, failure: Exception) -> SmartLoadError:
    """Make the error for a file that could not be written; it is of the type of `failure`, too."""
    if is_in_use(failure, clean_file.to):
        return of_both_types(SmartLoadError, Problem("in-use", facts={"to": clean_file.name}), failure)
    reason = failure.strerror if isinstance(failure, OSError) and failure.strerror else str(failure).strip()
    reason = reason or type(failure).__name__
    problem = Problem("not-written", facts={"to": clean_file.name, "reason": printable(reason)})
    return of_both_types(SmartLoadError, problem, failure)


class _Output:
    """A file for torch.save that keeps errors instead of raising them; after the first nothing is written any more.

    Args:
        file: where to write.
        failures: gets the errors.
    """

    def __init__(self, file: io.FileIO, failures: list[BaseException]) -> None:
        self._file, self._failures = file, failures

    def write(self, data: memoryview) -> int:
        """Write `data`; say that it was written in any case."""
        try:
            if not self._failures:
                write_all(self._file, memoryview(data))
        except BaseException as failure:  # noqa: BLE001 - raised when torch.save has returned
            self._failures.append(failure)
        return len(data)

    def flush(self) -> None:
        """Do nothing: nothing is kept back."""


def _torch_save(state: object, file: io.FileIO) -> None:
    """Write `state` by torch.save, and raise what went wrong once its writer is done.

    An error must not cross torch's writer. It writes the end of its zip all the same, and where that fails, too, its
    message hides the first, and on Windows the whole process ends. So errors of the file are kept; and Ctrl-C, which
    comes between any two lines of Python, comes to the main thread alone, so that torch writes in another.
    """
    failures: list[BaseException] = []

    def save() -> None:
        try:
            torch.save(state, cast("BinaryIO", _Output(file, failures)))
        except BaseException as failure:  # noqa: BLE001 - raised by the caller's thread
            failures.append(failure)

    writer = Helper(save)
    try:
        writer.start()
        writer.wait(failures)
    except BaseException as failure:  # noqa: BLE001 - raised when the thread has ended, if it has begun
        failures.append(failure)
    writer.wait(failures)  # where Ctrl-C came before the first wait, or between two lines of it
    if failures:  # Ctrl-C stays Ctrl-C
        raise_one(failures, next((i for i, failure in enumerate(failures) if not isinstance(failure, Exception)), 0))


def _save(content: _Content, file: io.FileIO, safe: bool) -> None:
    """Write `content` into the empty `file`, as safetensors where `safe`, else by torch.save."""
    if safe:
        _save_safetensors(cast("Mapping[str, torch.Tensor]", content.values), content.header, file)
    else:
        # To an open file: given a path, torch names the folder in the zip after the file, here at random.
        _torch_save(state_dict(content.values, content.versions), file)


def _save_safetensors(tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str], file: io.FileIO) -> None:
    """Write contiguous CPU tensors by the format: the length of the header, the header, the bytes of all tensors.

    Not by the package of that name. It writes a file of its own, which takes the place of the one that is given: that
    one is not locked, it has another mode, and remains after `kill -9`.
    """
    # Those of the widest elements come first: so each begins at a multiple of its element's size, as some readers need.
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    header: dict[str, object] = {"__metadata__": dict(texts)}
    end = 0
    for name in names:
        tensor = tensors[name]
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {
            "dtype": _HEADER_DTYPES[dtype_name(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of eight, too
    write_all(file, memoryview(len(text).to_bytes(8, "little") + text))
    for name in names:
        tensor = _little_endian(tensors[name])
        for at, size in cuts(tensor.nbytes):  # Ctrl-C comes between two of them
            write_all(file, memory_at(tensor.data_ptr() + at, size))


def _little_endian(tensor: torch.Tensor) -> torch.Tensor:
    """Give a tensor whose bytes are those of `tensor` on a little-endian machine, as the format has them."""
    size = tensor.element_size() // (2 if tensor.is_complex() else 1)  # of the two numbers each by itself
    if sys.byteorder == "little" or size == 1:
        return tensor
    return tensor.reshape(-1).view(torch.uint8).view(-1, size).flip(1)


def _check_written(content: _Content, file: io.FileIO, clean_file: CleanFile) -> None:
    """Raise UnreadableError unless smartload reads exactly this content in the file, one tensor at a time."""
    cause: SmartLoadError | None = None  # other ones say nothing of the file: there is no memory left, say
    file.seek(0)
    try:
        # By the open file, not by its path: on some network drives, a locked file can be read by the lock's owner only.
        with open_checkpoint(cast("BinaryIO", file)) as written:
            part = written.parts.get("", Part({}))
            values, versions = content.values, None if clean_file.safe else content.versions
            same = part.entries.keys() == values.keys() and part.metadata == versions
            same = same and written.header == content.header
            if same and all(_same_value(entry, values[key], written.files) for key, entry in part.entries.items()):
                return
    except (UnreadableError, AmbiguousKeysError) as failure:
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
        ignored=(*weights.names.ignored, *_texts_left_out(checkpoint.header, clean_file)),
        aside=checkpoint.aside,
    )


def _texts_left_out(header: Mapping[str, str], clean_file: CleanFile) -> Iterator[Ignored]:
    """Name the texts of a .safetensors header that the new file has not; "pt" says no more than that torch wrote it."""
    for key, text in header.items():
        if key == "format":
            if text != "pt":
                yield Ignored("__metadata__.format", f"{printable(repr(text))} there; the new file is written by torch")
        elif not clean_file.safe:
            yield Ignored(f"__metadata__.{key}", f"a text of the header, which a {clean_file.to.suffix} has not")
