"""One .safetensors file: a header of names, then the bytes. Read by its format, not by the package of that name."""

from __future__ import annotations

import math
from collections.abc import Mapping

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

DTYPES: Mapping[str, str] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
"""https://github.com/huggingface/safetensors#format; those narrower than a byte are refused by name."""
MAX_HEADER = 100_000_000
"""The limit of the package too."""


def sniff(file: ByteReader) -> bool:
    """Whether the file begins with the size of a header and the header's brace."""
    start = head(file, 9)
    return start[8:9] == b"{" and 2 <= int.from_bytes(start[:8], "little") < WIDEST


def open(file: ByteReader) -> Checkpoint:
    """The names and spans of the file, every byte of it accounted for."""
    size = int.from_bytes(read_bytes(file, 0, 8), "little")
    if size > MAX_HEADER:
        raise UnreadableError(Problem("header_large", file.name, {"size": size}))
    if 8 + size > file.size:
        raise shorter(file.name, 8 + size, file.size)
    header = loads(read_bytes(file, 8, size), file.name)
    if not isinstance(header, dict):
        raise UnreadableError(Problem("json_damaged", file.name))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise UnreadableError(Problem("header_metadata", file.name))
    spans = {key: _placed(key, entry, file.name) for key, entry in header.items()}
    _check_cover(spans, 8 + size, file)
    entries = {key: _entry(found, 8 + size) for key, found in spans.items()}
    return Checkpoint(file.name, "safetensors", {"": Part(entries)}, (file,))


def _placed(key: str, entry: object, file: str) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, first byte and the byte behind the last of one entry."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise UnreadableError(Problem("header_entry", file, {"name": printable(key)}))
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    sizes = isinstance(shape, list) and isinstance(offsets, list) and is_size(tuple(shape)) and is_size(tuple(offsets))
    if not (sizes and isinstance(dtype, str) and len(offsets) == 2):
        raise UnreadableError(Problem("header_entry", file, {"name": printable(key)}))
    first, stop = offsets
    known = DTYPES.get(dtype)
    if known is not None and stop - first != math.prod(shape) * ITEMSIZE[known]:
        facts = {"name": printable(key), "have": stop - first, "need": math.prod(shape) * ITEMSIZE[known]}
        raise UnreadableError(Problem("record_size", file, facts))
    return dtype, tuple(shape), first, stop


def _check_cover(spans: Mapping[str, tuple[str, tuple[int, ...], int, int]], start: int, file: ByteReader) -> None:
    """UnreadableError unless the tensors lie side by side, from the header to the end of the file."""
    end = 0
    for key, (_, _, first, stop) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if first != end or stop < first:
            raise UnreadableError(Problem("header_gap", file.name, {"name": printable(key)}))
        end = stop
    if start + end > file.size:
        raise shorter(file.name, start + end, file.size)
    if start + end < file.size:
        raise UnreadableError(Problem("header_end", file.name, {"left": file.size - start - end}))


def _entry(found: tuple[str, tuple[int, ...], int, int], start: int) -> Entry:
    dtype, shape, first, stop = found
    if dtype not in DTYPES:
        return Opaque(f"a tensor of {printable(dtype)}", tensor=True)
    return Span(0, start + first, stop - first, DTYPES[dtype], shape, strides(shape, fortran=False))
