"""Open archives of `numpy.savez`: a zip with one .npy file a name, stored as it is or deflated."""

from __future__ import annotations

import math
from collections.abc import Collection

from smartload.errors import UnreadableError
from smartload.pickles.arrays import MAX_HEADER, described, header_of, strides
from smartload.reading import zip as archive
from smartload.reading.files import BytesReader, check_growth, read_bytes
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import ITEMSIZE, ByteReader, Entry, Opaque, Part, Span
from smartload.records.problems import Problem
from smartload.records.text import printable

_SUFFIX = ".npy"


def sniff_zip(names: Collection[str]) -> bool:
    """Tell whether a zip with records of these `names` holds arrays and nothing else."""
    return all(name.endswith(_SUFFIX) for name in names)


def open_zip(file: ByteReader, directory: archive.Directory) -> Checkpoint:
    """Read the names and spans of the arrays in the zip `file`.

    A stored array is a span of the file itself. A deflated one has no bytes there that could be read at an offset: it
    is inflated into memory, as a file of its own.

    Raises:
        UnreadableError: the zip is broken, inflates to far more than weights do, or an array's size is not what its
            header says.
    """
    records = archive.read_archive(file, directory, root=False)
    # All together: a zip bomb is made of very many records of which none is too large by itself.
    check_growth(sum(record.nbytes for record in records.values() if record.packed is not None), file)
    files: list[ByteReader] = [file]
    entries: dict[str, Entry] = {}
    for name, record in records.items():
        if record.packed is None:
            start = read_bytes(file, record.offset, min(MAX_HEADER, record.nbytes))
            number, offset = 0, record.offset
        else:
            start = archive.read_record(file, record)
            number, offset = len(files), 0
            files.append(BytesReader(start, file.name))
        entries[name.removesuffix(_SUFFIX)] = _entry(start, record.nbytes, number, offset, name, file.name)
    return Checkpoint(file.name, "numpy npz", {"": Part(entries)}, tuple(files), tuple(records.values()))


def _entry(start: bytes, nbytes: int, number: int, offset: int, name: str, file: str) -> Entry:
    """Give the entry of one .npy file; raise UnreadableError where its size is not what its header says.

    Args:
        start: its first bytes, with the whole header.
        nbytes: its size.
        number: the number of the file that holds it, among the files of the checkpoint.
        offset: where it begins there.
        name: its name in the zip, for messages.
        file: the zip, for messages.
    """
    header = header_of(start)
    if header is None:
        is_array = start[:6] == b"\x93NUMPY"
        return Opaque("a numpy array that torch cannot hold" if is_array else "no numpy array", tensor=is_array)
    array, header_size = header
    if not array.dtype:
        return Opaque(described(array), tensor=True)
    shape, have = array.shape, nbytes - header_size
    assert isinstance(shape, tuple)  # it is of any type only where a pickle gave it
    need = math.prod(shape) * ITEMSIZE[array.dtype]
    if need != have:
        raise UnreadableError(Problem("record_size", file, {"name": printable(name), "have": have, "need": need}))
    layout = strides(shape, array.fortran)
    return Span(number, offset + header_size, have, array.dtype, shape, layout, array.big_endian)
