"""Open one .safetensors file: eight bytes of length, a JSON header of names, then the bytes of all tensors in a row.

It is read by its format, without the package of that name: names, shapes and places are needed before any tensor is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

from smartload.errors import UnreadableError
from smartload.pickles.arrays import strides
from smartload.pickles.storages import WIDEST
from smartload.pickles.tensors import is_size
from smartload.reading.files import head, read_bytes, shorter
from smartload.reading.json import loads
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import ITEMSIZE, ByteReader, Entry, Opaque, Part, Span
from smartload.records.problems import Problem
from smartload.records.text import printable

# https://github.com/huggingface/safetensors#format; dtypes narrower than a byte (F4, say) are missing on purpose: torch
# has no tensors whose elements share a byte, and a tensor of such a dtype is refused by its name.
DTYPES: Mapping[str, str] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
# Bytes of the header. The package refuses longer ones too, so that no file in use has one.
MAX_HEADER = 100_000_000

# One tensor of the header: its dtype as the header spells it, its shape, its first byte and the byte behind its last,
# both counted from the end of the header. A plain tuple, as a file may have very many.
_HeaderEntry: TypeAlias = tuple[str, tuple[int, ...], int, int]


def sniff(file: ByteReader) -> bool:
    """Tell whether `file` begins with the length of a header, and the header with a brace."""
    start = head(file, 9)
    # The least header is "{}". Eight bytes of other content, of text say, are as a rule a number beyond any file.
    return start[8:9] == b"{" and 2 <= int.from_bytes(start[:8], "little") < WIDEST


def open(file: ByteReader) -> Checkpoint:
    """Read the names and spans of `file`.

    Raises:
        UnreadableError: the file is too short, the header is no JSON of the format, or the tensors do not cover the
            file from the header to its end.
    """
    size = int.from_bytes(read_bytes(file, 0, 8), "little")
    if size > MAX_HEADER:
        raise UnreadableError(Problem("header_large", file.name, {"size": size}))
    if 8 + size > file.size:  # before anything is allocated: the length is the file's word alone
        raise shorter(file.name, 8 + size, file.size)
    header = loads(read_bytes(file, 8, size), file.name)
    if not isinstance(header, dict):
        raise UnreadableError(Problem("json_damaged", file.name))
    # Free text about the file. The format allows strings only, and the package refuses the rest.
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise UnreadableError(Problem("header_metadata", file.name))
    tensors = {key: _header_entry(key, entry, file.name) for key, entry in header.items()}
    _check_cover(tensors, 8 + size, file)
    entries = {key: _entry(tensor, 8 + size) for key, tensor in tensors.items()}
    return Checkpoint(file.name, "safetensors", {"": Part(entries)}, (file,), header=metadata)


def _header_entry(key: str, entry: object, file: str) -> _HeaderEntry:
    """Check what the header says of the tensor `key`, and give it as a tuple.

    Raises:
        UnreadableError: other fields than the three of the format, numbers that are none, or a length that is not that
            of the shape. The product is one of Python's integers, so no shape can overflow to a small one.
    """
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise UnreadableError(Problem("header_entry", file, {"name": printable(key)}))
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    sizes = isinstance(shape, list) and isinstance(offsets, list) and is_size(tuple(shape)) and is_size(tuple(offsets))
    if not (sizes and isinstance(dtype, str) and len(offsets) == 2):
        raise UnreadableError(Problem("header_entry", file, {"name": printable(key)}))
    first, stop = offsets
    name = DTYPES.get(dtype)
    if name is not None and stop - first != math.prod(shape) * ITEMSIZE[name]:
        facts = {"name": printable(key), "have": stop - first, "need": math.prod(shape) * ITEMSIZE[name]}
        raise UnreadableError(Problem("record_size", file, facts))
    return dtype, tuple(shape), first, stop


def _check_cover(tensors: Mapping[str, _HeaderEntry], start: int, file: ByteReader) -> None:
    """Refuse `file` unless its tensors lie side by side, from `start`, the end of the header, to the end of the file.

    The format allows neither holes nor overlaps: a hole could hold a second file, which other programs read, and one
    run of bytes under many names would make a small file take any amount of memory. There is no checksum either, so a
    file that is truncated or has grown shows here or nowhere.
    """
    end = 0
    # By first and last byte: a tensor without elements comes before the one that begins at the same byte.
    for key, (_, _, first, stop) in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if first != end or stop < first:
            raise UnreadableError(Problem("header_gap", file.name, {"name": printable(key)}))
        end = stop
    if start + end > file.size:
        raise shorter(file.name, start + end, file.size)
    if start + end < file.size:
        raise UnreadableError(Problem("header_end", file.name, {"left": file.size - start - end}))


def _entry(tensor: _HeaderEntry, start: int) -> Entry:
    """Give the entry of a tensor of the header; `start` is where the tensors' bytes begin in the file."""
    dtype, shape, first, stop = tensor
    if dtype not in DTYPES:
        return Opaque(f"a tensor of {printable(dtype)}", tensor=True)
    return Span(0, start + first, stop - first, DTYPES[dtype], shape, strides(shape, fortran=False))
