"""Files that are no checkpoint, or one that is read elsewhere: each gets a name and what to do about it."""

from __future__ import annotations

from collections.abc import Collection

from smartload.errors import SmartLoadError
from smartload.folding import shown
from smartload.records import ByteReader, Problem
from smartload.sources.file import read_bytes
from smartload.sources.inert import parse

HEAD = 1024
_PLAIN_PICKLE_MAX = 1 << 26

_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "git_lfs"),
    (b"\x89HDF\r\n\x1a\n", "hdf5"),
    (b"GGUF", "gguf"),
    (b"\x93NUMPY", "numpy"),
    (b"\x1f\x8b", "compressed"),
    (b"BZh", "compressed"),
    (b"\xfd7zXZ\0", "compressed"),
    (b"\x28\xb5\x2f\xfd", "compressed"),
    (b"\x04\x22\x4d\x18", "compressed"),
    (b"7z\xbc\xaf\x27\x1c", "compressed"),
    (b"Rar!\x1a\x07", "compressed"),
    (b"PK\x05\x06", "zip_empty"),
    (b"PK\x07\x08", "zip_split"),
)
_PACKERS = {b"\x1f": "gzip", b"B": "bzip2", b"\xfd": "xz", b"\x28": "zstd", b"\x04": "lz4", b"7": "7z", b"R": "rar"}


def head(file: ByteReader, size: int = HEAD) -> bytes:
    """The first bytes of a file, as many as there are."""
    return read_bytes(file, 0, min(size, file.size))


def name(file: ByteReader) -> Problem:
    """What a file is that no source reads."""
    start = head(file)
    kind, facts = _kind(file, start)
    return Problem(kind, file.name, facts)


def name_zip(file: ByteReader, names: Collection[str]) -> Problem:
    """What a zip is that is no file of `torch.save`, by the names of its records."""
    return Problem(_zip_kind(names), file.name, {"names": ", ".join(shown(each) for each in list(names)[:5])})


def _zip_kind(names: Collection[str]) -> str:
    tops = {each.partition("/")[0] for each in names}
    if "constants.pkl" in names or "bytecode.pkl" in names:
        return "torchscript"
    if "archive_format" in names or ("models" in tops and "archive_version" in names):
        return "torch_export"
    if ".data/extern_modules" in names or ".data/version" in names:
        return "torch_package"
    return "zip_other"


def _kind(file: ByteReader, start: bytes) -> tuple[str, dict[str, object]]:
    if not start:
        return "empty", {}
    for beginning, kind in _BEGINNINGS:
        if start.startswith(beginning):
            return kind, {"packer": _PACKERS.get(beginning[:1], "")}
    if not start.strip(b"\0"):
        return "zeros", {}
    if start[257:262] == b"ustar":
        return "tar", {}
    if _is_safetensors(file, start):
        return "safetensors", {}
    if start[:1] == b"\x80" and start[1:2] <= b"\5":
        return _pickle_kind(file)
    text = _text_kind(start)
    if text:
        return text, {"start": shown(start[:40].decode("utf-8", "replace").strip())}
    if file.name.endswith(".onnx") or (start[:1] == b"\x08" and b"onnx" in start[:200].lower()):
        return "onnx", {}
    if start[4:8] == b"TFL3":
        return "tflite", {}
    return "unknown", {"start": start[:8].hex(" ")}


def _is_safetensors(file: ByteReader, start: bytes) -> bool:
    size = int.from_bytes(start[:8], "little")
    return len(start) > 9 and start[8:9] == b"{" and 2 <= size <= max(file.size, 1 << 27)


def _text_kind(start: bytes) -> str:
    start = start.removeprefix(b"\xef\xbb\xbf")
    try:
        text = start.decode()
    except UnicodeDecodeError as error:
        if error.start < len(start) - 4:
            return ""
        text = start[: error.start].decode()
    if any(ord(char) < 32 and char not in "\t\n\r\f\x1b" for char in text):
        return ""
    lower = text.lstrip().lower()
    if lower.startswith(("<!doctype html", "<html", "<head", "<body")) or "<html" in lower:
        return "html"
    if lower.startswith("<"):
        return "xml"
    return "json" if lower.startswith(("{", "[")) else "text"


def _pickle_kind(file: ByteReader) -> tuple[str, dict[str, object]]:
    """A pickle that `torch.save` did not write: what lies at its top."""
    try:
        value, _, _ = parse(head(file, _PLAIN_PICKLE_MAX), 0, file.name)
    except SmartLoadError:
        return "pickle_other", {"what": "something that cannot be read"}
    from smartload.sources.noted import describe

    return "pickle_other", {"what": describe(value)}
