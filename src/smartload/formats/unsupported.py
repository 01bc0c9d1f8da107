"""Name a file or folder that no format reads: what it is, so that the message can say what to do about it.

Many of them are easily taken for a checkpoint: the pointer that git keeps in place of a large file, the page of a
login under the name of the file that was to be downloaded, weights of another library.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from smartload.reading.files import head, read_bytes
from smartload.reading.opening import base_name
from smartload.records.entries import ByteReader
from smartload.records.problems import Kind, Problem
from smartload.records.text import printable

# The last eight bytes of a table of LevelDB, the form of the .index of a TensorFlow checkpoint. Its footer is 48 bytes.
_TABLE_MAGIC = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"
_TABLE_FOOTER = 48
_TF_DATA = ".data-00000-of-00001"

# What the first bytes of a file say for sure.
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
# Which program unpacks a compressed file, by the first byte; gzip is missing, as it is unpacked before.
_PACKERS = {b"B": "bzip2", b"\xfd": "xz", b"\x28": "zstd", b"\x04": "lz4", b"7": "7z", b"R": "rar"}
# The members that a tar of torch before 0.2 begins with, and the first bytes of a tar in which they are looked for.
_TORCH_TAR = {b"sys_info", b"pickle"}
_TAR_BYTES = 1 << 16


def name_file(file: ByteReader) -> Problem:
    """Name what `file` is, as the problem with which it is refused."""
    start = head(file, 1024)
    kind, facts = _kind_of_file(file, start)
    return Problem(kind, file.name, facts)


def name_zip(file: ByteReader, names: Collection[str]) -> Problem:
    """Name what the zip `file` is, by the `names` of its records, as the problem with which it is refused."""
    return Problem(_kind_of_zip(names), file.name, {"names": ", ".join(printable(name) for name in list(names)[:5])})


def _kind_of_zip(names: Collection[str]) -> Kind:
    """Tell the kind of a zip by the one record that only archives of that kind have."""
    if "model.json" in names:  # torch 1.0 to 1.3
        return "torchscript_json"
    if "bytecode.pkl" in names:  # for mobile devices
        return "torchscript"
    # Before torch.package: an exported program has a `.data/version`, too.
    if "archive_format" in names or "serialized_exported_program.json" in names:
        return "torch_export"
    if "model.weights.h5" in names:
        return "keras"
    if ".data/extern_modules" in names or ".data/version" in names:
        return "torch_package"
    return "zip_other"


def _kind_of_file(file: ByteReader, start: bytes) -> tuple[Kind, dict[str, object]]:
    """Tell the kind of `file` by its first bytes, `start`, and give what the sentence of that kind names.

    In the order of certainty: marks that nothing else begins with, then the forms that are guessed at.
    """
    if not start:
        return "empty", {}
    for beginning, kind in _BEGINNINGS:
        if start.startswith(beginning):
            return kind, {"packer": _PACKERS.get(beginning[:1], "")}
    # A download that was broken off: some programs reserve the whole file before they write to it.
    if not start.strip(b"\0"):
        return "zeros", {}
    if start[257:262] == b"ustar":
        return "torch_tar" if _tar_names(head(file, _TAR_BYTES)) >= _TORCH_TAR else "tar", {}
    is_table = file.size > _TABLE_FOOTER and read_bytes(file, file.size - 8, 8) == _TABLE_MAGIC
    if is_table or file.name.endswith(_TF_DATA):  # the data of TensorFlow has no mark of its own
        return "tensorflow", {}
    text = _kind_of_text(start)
    if text:
        return text, {"start": printable(start[:40].decode("utf-8", "replace").strip())}
    # ONNX is a protobuf without a mark: its version comes first, then the name of the program that wrote it.
    if file.name.endswith(".onnx") or (start[:1] == b"\x08" and re.search(b"onnx|\x12\x07pytorch", start[:200], re.I)):
        return "onnx", {}
    if start[4:8] == b"TFL3":
        return "tflite", {}
    return "unknown", {"start": start[:8].hex(" ")}


def _tar_names(start: bytes) -> set[bytes]:
    """Give the names of the members whose headers lie in `start`, the first bytes of a tar.

    A tar is made of blocks of 512 bytes. The header of a member fills one: its name in the first hundred bytes, and
    the mark "ustar" behind its fields.
    """
    blocks = (start[at : at + 512] for at in range(0, len(start), 512))
    return {block[:100].rstrip(b"\0").removeprefix(b"./") for block in blocks if block[257:262] == b"ustar"}


def _kind_of_text(start: bytes) -> Kind | None:
    r"""Tell what kind of text a file with the first bytes `start` is; None where it is no text.

    >>> _kind_of_text(b"<!DOCTYPE html><p>Sign in"), _kind_of_text(b"Entry not found"), _kind_of_text(b"\x00\x01")
    ('html', 'text', None)
    """
    start = start.removeprefix(b"\xef\xbb\xbf")  # the mark that some editors put before UTF-8
    try:
        text = start.decode()
    except UnicodeDecodeError as error:
        # Only the last character may be broken: `start` may end in the middle of it.
        if error.start < len(start) - 4:
            return None
        text = start[: error.start].decode()
    # Control characters other than white space, and the escape of coloured output, do not occur in text.
    if any(ord(char) < 32 and char not in "\t\n\r\f\x1b" for char in text):
        return None
    lower = text.lstrip().lower()
    if lower.startswith(("<!doctype html", "<html", "<head", "<body")) or "<html" in lower:
        return "html"
    if lower.startswith("<"):
        return "xml"
    return "json" if lower.startswith(("{", "[")) else "text"


def name_folder(path: str, names: Collection[str]) -> Problem:
    """Name what the folder at `path` is, in which no weights were found, by the `names` of its files."""
    listed = ", ".join(printable(name) for name in list(names)[:5]) + (
        f" and {len(names) - 5} more" if len(names) > 5 else ""
    )
    kind: Kind = "folder" if names else "folder_empty"
    if any(name.endswith(".distcp") for name in names):  # .metadata is missing, which is written last
        kind = "folder_unfinished"
    elif any("zero_pp_rank_" in name for name in names) or "zero_to_fp32.py" in names:
        kind = "folder_zero"
    elif "saved_model.pb" in names or any(name.endswith(_TF_DATA) for name in names):
        kind = "tensorflow"
    elif any(re.search(r"-\d+-of-\d+\.(?:safetensors|bin)$", name) for name in names):
        kind = "folder_shards"
    return Problem(kind, base_name(path), {"names": listed})
