"""Programs of `torch.export.save`: the state dict by the archive's own list. The graph is not read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from smartload.errors import UnreadableError
from smartload.formats import torch_save, unsupported
from smartload.pickles.tensors import view
from smartload.reading.files import Window
from smartload.reading.json import loads
from smartload.reading.shift import shifted
from smartload.reading.zip import Directory, broken, read_archive, read_directory, read_record
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import Beside, ByteReader, Entry, Opaque, Part, ZipRecord
from smartload.records.problems import Problem

MAX_JSON = 1 << 28
DTYPES: Mapping[int, str] = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
    9: "complex32", 10: "complex64", 11: "complex128", 12: "bool", 13: "bfloat16", 28: "uint16",
    29: "float8_e4m3fn", 30: "float8_e5m2", 31: "float8_e4m3fnuz", 32: "float8_e5m2fnuz", 33: "float8_e8m0fnu",
    34: "uint32", 35: "uint64",
}  # fmt: skip
"""torch._export.serde.schema.ScalarType, whose numbers are part of the format."""
_STRIDED = 7
_WEIGHTS = re.compile(r"data/weights/(.+)_weights_config\.json|data/weights/(.+)\.pt")
_OLD = ("serialized_state_dict.pt", "serialized_state_dict.json")
"""Up to torch 2.7 the state dict was a file of torch.save, at first under the second name."""


def sniff_zip(names: Collection[str]) -> bool:
    """Whether a zip with these records is an exported program."""
    return "archive_format" in names or "serialized_exported_program.json" in names


def open_zip(file: ByteReader, directory: Directory) -> Checkpoint:
    """The names and spans of the program's state dict; of several programs, each by its name."""
    if "archive_format" not in directory.names():
        records = read_archive(file, directory, root=False)
        name = next((name for name in _OLD if name in records), "")
        return _inner(file, records[name], name) if name else _refuse(file, directory)
    archive = torch_save.TorchZip(file, directory)
    found = {match[1] or match[2]: match for name in archive.entries if (match := _WEIGHTS.fullmatch(name))}
    saved = [match[0] for match in found.values() if match[2]]
    if len(found) == 1 and saved:
        return _inner(file, archive.entries[saved[0]], saved[0])
    if not found or saved:
        return _refuse(file, directory)
    tags: Counter[str] = Counter()
    parts = {}
    for name, match in found.items():
        listed = _config(file, archive, match[0])
        entries = {key: _entry(each, archive, file.name) for key, each in listed.items()}
        devices = {each["path_name"]: str(each["tensor_meta"]["device"]["type"]) for each in listed.values()}
        tags.update(devices.values())
        parts["" if len(found) == 1 else name] = Part(entries, kind="state dict")
    constants = sum(name.startswith("data/constants/tensor_") for name in archive.entries)
    what = "constants of the program: buffers that are not saved, and plain tensors"
    aside = (Beside("", what, constants),) if constants else ()
    return Checkpoint(file.name, "torch.export", parts, (file,), tuple(archive.used.values()), aside, tags)


def _refuse(file: ByteReader, directory: Directory) -> Checkpoint:
    raise UnreadableError(unsupported.name_zip(file, directory.names()))


def _inner(file: ByteReader, entry: ZipRecord, name: str) -> Checkpoint:
    """The state dict that is a file of `torch.save` inside of the archive."""
    if entry.packed is not None:
        raise broken(file, "zip_packed", name=name)
    offset, window = entry.offset, Window(file, entry.offset, entry.nbytes)
    found = torch_save.open_zip(window, read_directory(window))
    parts = {
        path: Part(shifted(part.entries, 0, offset), part.metadata, part.kind) for path, part in found.parts.items()
    }
    records = tuple(record._replace(offset=record.offset + offset) for record in found.records)
    return Checkpoint(file.name, "torch.export", parts, (file, *found.files[1:]), records, found.aside, found.tags)


def _config(file: ByteReader, archive: torch_save.TorchZip, name: str) -> dict[str, Any]:
    entry = archive.entries[name]
    if entry.nbytes > MAX_JSON:
        raise UnreadableError(Problem("pickle_large", file.name, {"size": entry.nbytes}))
    found: Any = loads(read_record(file, entry), file.name)
    try:
        listed: dict[str, Any] = found["config"]
        for each in listed.values():
            _ = each["path_name"], each["use_pickle"], each["tensor_meta"]["device"]["type"]
    except (AttributeError, TypeError, KeyError):
        raise broken(file, "record_odd", name=name) from None
    return listed


def _entry(each: Any, archive: torch_save.TorchZip, file: str) -> Entry:
    try:
        meta = each["tensor_meta"]
        dtype = DTYPES.get(meta["dtype"], "") if type(meta["dtype"]) is int else ""
        if each["use_pickle"] or meta["layout"] != _STRIDED or not dtype:
            return Opaque("a tensor subclass", tensor=True)
        storage = archive.raw(f"data/weights/{each['path_name']}")
        shape, stride = (tuple(size["as_int"] for size in meta[field]) for field in ("sizes", "strides"))
        return view(storage, dtype, meta["storage_offset"]["as_int"], shape, stride, file)
    except (TypeError, KeyError):
        raise UnreadableError(Problem("tensor", file)) from None
