"""TorchScript of torch 1.0 to 1.3: a model.json that names modules and tensors, and the tensors' bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from smartload.errors import UnreadableError
from smartload.formats.torch_save import Records
from smartload.pickles.modules import MAX_NAMES, MAX_TEXT
from smartload.pickles.tensors import view
from smartload.reading.json import loads
from smartload.reading.limits import STEP, Budget
from smartload.reading.zip import read_record
from smartload.records.checkpoint import Checkpoint
from smartload.records.data import Aside, ByteReader, Entry, Opaque, Part, Problem
from smartload.records.text import shown

MAX_JSON = 1 << 28
DTYPES: Mapping[str, str] = {
    "FLOAT": "float32", "DOUBLE": "float64", "FLOAT16": "float16", "BFLOAT16": "bfloat16",
    "INT8": "int8", "UINT8": "uint8", "BYTE": "uint8", "INT16": "int16", "INT32": "int32", "INT64": "int64",
    "BOOL": "bool",
}  # fmt: skip
"""Names of caffe2's TensorProto.DataType, which these archives use."""


def open(file: ByteReader, archive: Records) -> Checkpoint:
    """The names and spans of the program's parameters and buffers."""
    entry = archive.entries["model.json"]
    if entry.nbytes > MAX_JSON:
        raise UnreadableError(Problem("pickle_large", file.name, {"size": entry.nbytes}))
    model: Any = loads(read_record(file, entry), file.name)
    try:
        return _read(file, archive, model)
    except (AttributeError, TypeError, KeyError, IndexError, ValueError):
        raise UnreadableError(Problem("record_odd", file.name, {"name": "model.json"})) from None


def _read(file: ByteReader, archive: Records, model: Any) -> Checkpoint:
    tensors = [_tensor(each, archive, file.name) for each in model.get("tensors", ())]
    entries: dict[str, Entry] = {}
    taken: set[int] = set()
    for name, number in _named(model["mainModule"], file.name):
        if name in entries or number < 0:
            raise UnreadableError(Problem("key_twice", file.name, {"name": shown(name)}))
        entries[name] = tensors[number]
        taken.add(number)
    left = len(tensors) - len(taken)
    aside = (Aside("", "tensors that are neither parameters nor buffers of the program", left),) if left else ()
    tags = Counter(str(each.get("device", "")) for each in model.get("tensors", ()))
    return Checkpoint(file.name, "TorchScript", {"": Part(entries)}, (file,), tuple(archive.used.values()), aside, tags)


def _tensor(each: Mapping[str, Any], archive: Records, file: str) -> Entry:
    if each.get("isQuantized"):
        return Opaque("a quantized tensor", tensor=True)
    dtype = DTYPES[each["dataType"]]
    shape, stride = (tuple(map(_integer, each.get(field, ()))) for field in ("dims", "strides"))
    return view(archive.raw(each["data"]["key"]), dtype, _integer(each.get("offset", 0)), shape, stride, file)


def _integer(value: object) -> int:
    """A number, which these files write as text too."""
    if type(value) is int or (type(value) is str and len(value) < 20):
        return int(value)
    raise ValueError


def _named(root: Mapping[str, Any], file: str) -> Iterator[tuple[str, int]]:
    """Every parameter and buffer by dotted name, with the number of its tensor."""
    work = Budget(MAX_TEXT, Problem("module_large", file, {"limit": MAX_NAMES}))
    todo = [("", root)]
    while todo:
        prefix, module = todo.pop()
        for each in module.get("parameters", ()):
            work.take(STEP + len(prefix) + len(each["name"]))
            yield prefix + each["name"], _integer(each.get("tensorId", 0))
        for each in reversed(module.get("submodules", ())):
            work.take(STEP + len(prefix) + len(each["name"]))
            todo.append((f"{prefix}{each['name']}.", each))
