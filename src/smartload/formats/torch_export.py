"""Open programs of `torch.export.save`: the state dict, from the list of weights in the archive. The graph is not read.

The archive has one JSON a program that lists its weights, and the bytes of each storage as a record. Those of older
releases have one file of `torch.save` instead, with the whole state dict.
"""

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

# Bytes of the list of weights, which is read as a whole. Measured: 290 of them a weight.
MAX_JSON = 1 << 28
# torch._export.serde.schema.ScalarType, whose numbers are part of the format.
DTYPES: Mapping[int, str] = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
    9: "complex32", 10: "complex64", 11: "complex128", 12: "bool", 13: "bfloat16", 28: "uint16",
    29: "float8_e4m3fn", 30: "float8_e5m2", 31: "float8_e4m3fnuz", 32: "float8_e5m2fnuz", 33: "float8_e8m0fnu",
    34: "uint32", 35: "uint64",
}  # fmt: skip
# The number of the strided layout in torch._export.serde.schema.Layout; the others are sparse or of a library.
_STRIDED = 7
# The weights of one program, by its name: their list, or the file of torch.save that older releases write.
_WEIGHTS = re.compile(r"data/weights/(.+)_weights_config\.json|data/weights/(.+)\.pt")
# Up to torch 2.7 the archive has no `archive_format`, and one of these: a file of torch.save, in spite of ".json".
_OLD_STATE_DICTS = ("serialized_state_dict.pt", "serialized_state_dict.json")


def sniff_zip(names: Collection[str]) -> bool:
    """Tell whether a zip with records of these `names` is an exported program."""
    return "archive_format" in names or "serialized_exported_program.json" in names


def open_zip(file: ByteReader, directory: Directory) -> Checkpoint:
    """Read the names and spans of the program's state dict; of several programs in `file`, each is a part by its name.

    Raises:
        UnreadableError: there are no weights in the archive, or their list is not as torch writes it.
    """
    if "archive_format" not in directory.names():
        records = read_archive(file, directory, root=False)
        name = next((name for name in _OLD_STATE_DICTS if name in records), "")
        return _open_state_dict(file, records[name], name) if name else _refuse(file, directory)
    archive = torch_save.TorchZip(file, directory)
    programs = {match[1] or match[2]: match for name in archive.entries if (match := _WEIGHTS.fullmatch(name))}
    saved = [match[0] for match in programs.values() if match[2]]
    if len(programs) == 1 and saved:
        return _open_state_dict(file, archive.entries[saved[0]], saved[0])
    # No release of torch writes several programs of which one is a file of torch.save.
    if not programs or saved:
        return _refuse(file, directory)
    tags: Counter[str] = Counter()
    parts = {}
    for name, match in programs.items():
        weights = _read_config(file, archive, match[0])
        entries = {key: _entry(weight, archive, file.name) for key, weight in weights.items()}
        # By record: two names of one storage are one storage on that device.
        devices = {weight["path_name"]: str(weight["tensor_meta"]["device"]["type"]) for weight in weights.values()}
        tags.update(devices.values())
        parts["" if len(programs) == 1 else name] = Part(entries, kind="state dict")
    constants = sum(name.startswith("data/constants/tensor_") for name in archive.entries)
    what = "constants of the program: buffers that are not saved, and plain tensors"
    aside = (Beside("", what, constants),) if constants else ()
    return Checkpoint(file.name, "torch.export", parts, (file,), tuple(archive.used.values()), aside, tags)


def _refuse(file: ByteReader, directory: Directory) -> Checkpoint:
    """Refuse the archive `file`, with the name of what it is."""
    raise UnreadableError(unsupported.name_zip(file, directory.names()))


def _open_state_dict(file: ByteReader, entry: ZipRecord, name: str) -> Checkpoint:
    """Read the state dict that is a file of `torch.save` inside the archive `file`: the record `entry`, called `name`.

    Its spans count from its own beginning; here they are moved to where it lies in the archive.
    """
    if entry.packed is not None:  # the bytes of its tensors do not lie in the archive as they are
        raise broken(file, "zip_packed", name=name)
    offset, window = entry.offset, Window(file, entry.offset, entry.nbytes)
    inner = torch_save.open_zip(window, read_directory(window))
    parts = {
        path: Part(shifted(part.entries, 0, offset), part.metadata, part.kind) for path, part in inner.parts.items()
    }
    records = tuple(record._replace(offset=record.offset + offset) for record in inner.records)
    return Checkpoint(file.name, "torch.export", parts, (file, *inner.files[1:]), records, inner.aside, inner.tags)


def _read_config(file: ByteReader, archive: torch_save.TorchZip, name: str) -> dict[str, Any]:
    """Read the list of weights in the record `name`: each key with its record, dtype, shape, strides and device.

    Raises:
        UnreadableError: it is too large, or a field that `open_zip` needs of each weight is missing.
    """
    entry = archive.entries[name]
    if entry.nbytes > MAX_JSON:
        raise UnreadableError(Problem("pickle_large", file.name, {"size": entry.nbytes}))
    content: Any = loads(read_record(file, entry), file.name)
    try:
        weights: dict[str, Any] = content["config"]
        for weight in weights.values():
            _ = weight["path_name"], weight["use_pickle"], weight["tensor_meta"]["device"]["type"]
    except (AttributeError, TypeError, KeyError):
        raise broken(file, "record_odd", name=name) from None
    return weights


def _entry(weight: Any, archive: torch_save.TorchZip, file: str) -> Entry:
    """Give the entry of one weight of the list; raise UnreadableError where the list is not as torch writes it."""
    try:
        meta = weight["tensor_meta"]
        # `type`, not isinstance: JSON's true and 7.0 would find a dtype as well.
        dtype = DTYPES.get(meta["dtype"], "") if type(meta["dtype"]) is int else ""
        # A tensor of a subclass is pickled by itself, and would need its class.
        if weight["use_pickle"] or meta["layout"] != _STRIDED or not dtype:
            return Opaque("a tensor subclass", tensor=True)
        # Looked up among the records of the archive: a path such as "../x" is no record, and nothing else is opened.
        storage = archive.storage_record(f"data/weights/{weight['path_name']}")
        # A size can also be a symbol ("as_expr"), which no weight has.
        shape, stride = (tuple(size["as_int"] for size in meta[field]) for field in ("sizes", "strides"))
        return view(storage, dtype, meta["storage_offset"]["as_int"], shape, stride, file)
    except (TypeError, KeyError):
        raise UnreadableError(Problem("tensor", file)) from None
