"""Files that are no checkpoint, or one that is read elsewhere: each gets a name and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Collection

from smartload.reading.files import head, read_bytes
from smartload.reading.opening import base_name
from smartload.records.entries import ByteReader
from smartload.records.problems import Kind, Problem
from smartload.records.text import printable

_SSTABLE = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"
_TF_DATA = ".data-00000-of-00001"

_BEGINNINGS: tuple[tuple[bytes, Kind], ...] = (
    (b"version https://git-lfs", "git_lfs"),
    (b"\x89HDF\r\n\x1a\n", "hdf5"),
    (b"GGUF", "gguf"),
    (b"\x93NUMPY", "numpy"),
    (b"BZh", "compressed"),
    (b"\xfd7zXZ\0", "compressed"),
    (b"\x28\xb5\x2f\xfd", "compressed"),
    (b"\x04\x22\x4d\x18", "compressed"),
    (b"7z\xbc\xaf\x27\x1c", "compressed"),
    (b"Rar!\x1a\x07", "compressed"),
    (b"PK\x05\x06", "zip_empty"),
    (b"PK\x07\x08", "zip_split"),
)
_TORCH_TAR = {b"sys_info", b"pickle"}
_TAR_BYTES = 1 << 16
"""The members that a tar of torch before 0.2 begins with, and the bytes in which they are looked for."""
_PACKERS = {b"B": "bzip2", b"\xfd": "xz", b"\x28": "zstd", b"\x04": "lz4", b"7": "7z", b"R": "rar"}


def name(file: ByteReader) -> Problem:
    """What a file is that no source reads."""
    start = head(file, 1024)
    kind, facts = _kind(file, start)
    return Problem(kind, file.name, facts)


def name_zip(file: ByteReader, names: Collection[str]) -> Problem:
    """What a zip is that is no file of `torch.save`, by the names of its records."""
    return Problem(_zip_kind(names), file.name, {"names": ", ".join(printable(each) for each in list(names)[:5])})


def _zip_kind(names: Collection[str]) -> Kind:
    if "model.json" in names:
        return "torchscript_json"
    if "bytecode.pkl" in names:
        return "torchscript"
    if "archive_format" in names or "serialized_exported_program.json" in names:
        return "torch_export"
    if "model.weights.h5" in names:
        return "keras"
    if ".data/extern_modules" in names or ".data/version" in names:
        return "torch_package"
    return "zip_other"


def _kind(file: ByteReader, start: bytes) -> tuple[Kind, dict[str, object]]:
    if not start:
        return "empty", {}
    for beginning, kind in _BEGINNINGS:
        if start.startswith(beginning):
            return kind, {"packer": _PACKERS.get(beginning[:1], "")}
    if not start.strip(b"\0"):
        return "zeros", {}
    if start[257:262] == b"ustar":
        return "torch_tar" if _tar_names(head(file, _TAR_BYTES)) >= _TORCH_TAR else "tar", {}
    if (file.size > 48 and read_bytes(file, file.size - 8, 8) == _SSTABLE) or file.name.endswith(_TF_DATA):
        return "tensorflow", {}
    text = _text_kind(start)
    if text:
        return text, {"start": printable(start[:40].decode("utf-8", "replace").strip())}
    if file.name.endswith(".onnx") or (start[:1] == b"\x08" and re.search(b"onnx|\x12\x07pytorch", start[:200], re.I)):
        return "onnx", {}
    if start[4:8] == b"TFL3":
        return "tflite", {}
    return "unknown", {"start": start[:8].hex(" ")}


def _tar_names(start: bytes) -> set[bytes]:
    """The names of the members whose headers lie in the first bytes of a tar."""
    blocks = (start[at : at + 512] for at in range(0, len(start), 512))
    return {block[:100].rstrip(b"\0").removeprefix(b"./") for block in blocks if block[257:262] == b"ustar"}


def _text_kind(start: bytes) -> Kind | None:
    start = start.removeprefix(b"\xef\xbb\xbf")
    try:
        text = start.decode()
    except UnicodeDecodeError as error:
        if error.start < len(start) - 4:
            return None
        text = start[: error.start].decode()
    if any(ord(char) < 32 and char not in "\t\n\r\f\x1b" for char in text):
        return None
    lower = text.lstrip().lower()
    if lower.startswith(("<!doctype html", "<html", "<head", "<body")) or "<html" in lower:
        return "html"
    if lower.startswith("<"):
        return "xml"
    return "json" if lower.startswith(("{", "[")) else "text"


def name_folder(path: str, names: Collection[str]) -> Problem:
    """What a folder is in which there are no weights, by the names of its files."""
    listed = ", ".join(printable(each) for each in list(names)[:5]) + (
        f" and {len(names) - 5} more" if len(names) > 5 else ""
    )
    kind: Kind = "folder" if names else "folder_empty"
    if any(each.endswith(".distcp") for each in names):
        kind = "folder_unfinished"
    elif any("zero_pp_rank_" in each for each in names) or "zero_to_fp32.py" in names:
        kind = "folder_zero"
    elif "saved_model.pb" in names or any(each.endswith(_TF_DATA) for each in names):
        kind = "tensorflow"
    elif any(re.search(r"-\d+-of-\d+\.(?:safetensors|bin)$", each) for each in names):
        kind = "folder_shards"
    return Problem(kind, base_name(path), {"names": listed})
