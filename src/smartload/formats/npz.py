"""Archives of numpy.savez: one .npy a name, stored or deflated."""

from __future__ import annotations

import math
from collections.abc import Collection

from smartload.errors import UnreadableError
from smartload.pickles.arrays import MAX_HEADER, Array, described, header_of, strides
from smartload.reading import zip as archive
from smartload.reading.files import BytesReader, check_growth, read_bytes
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import ITEMSIZE, ByteReader, Entry, Opaque, Part, Span
from smartload.records.problems import Problem
from smartload.records.text import printable

_SUFFIX = ".npy"


def sniff_zip(names: Collection[str]) -> bool:
    """Whether a zip with these records holds arrays and nothing else."""
    return all(name.endswith(_SUFFIX) for name in names)


def open_zip(file: ByteReader, directory: archive.Directory) -> Checkpoint:
    """The names and spans of the arrays."""
    records = archive.read_archive(file, directory, root=False)
    check_growth(sum(record.nbytes for record in records.values() if record.packed is not None), file)
    files: list[ByteReader] = [file]
    entries: dict[str, Entry] = {}
    for name, record in records.items():
        if record.packed is None:
            start, place, at = read_bytes(file, record.offset, min(MAX_HEADER, record.nbytes)), 0, record.offset
        else:
            start = archive.read_record(file, record)
            place, at = len(files), 0
            files.append(BytesReader(start, file.name))
        entries[name.removesuffix(_SUFFIX)] = _entry(start, record.nbytes, place, at, name, file.name)
    checks = tuple(record for record in records.values() if record.packed is None)
    return Checkpoint(file.name, "numpy npz", {"": Part(entries)}, tuple(files), checks)


def _entry(start: bytes, nbytes: int, place: int, at: int, name: str, file: str) -> Entry:
    found = header_of(start)
    if found is None:
        is_array = start[:6] == b"\x93NUMPY"
        return Opaque("a numpy array that torch cannot hold" if is_array else "no numpy array", tensor=is_array)
    array, first = found
    if not array.dtype:
        return Opaque(described(array), tensor=True)
    return _span(array, nbytes - first, place, at + first, name, file)


def _span(array: Array, nbytes: int, place: int, at: int, name: str, file: str) -> Span:
    shape = array.shape
    assert isinstance(shape, tuple)
    need = math.prod(shape) * ITEMSIZE[array.dtype]
    if need != nbytes:
        raise UnreadableError(Problem("record_size", file, {"name": printable(name), "have": nbytes, "need": need}))
    return Span(place, at, nbytes, array.dtype, shape, strides(shape, array.fortran), array.big_endian)
