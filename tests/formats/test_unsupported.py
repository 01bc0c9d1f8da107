"""Rule F6: content decides, and each wrong file has its own sentence."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from formats import script_of_2019, tar_of_2017
from reading_tools import zipped

from smartload.errors import UnreadableError
from smartload.formats import open_checkpoint

OLD = {"fc.weight": torch.arange(6.0).view(2, 3), "fc.bias": torch.ones(2)}


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("weights.bin"), None)
    return file.getvalue()


def safetensors() -> bytes:
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    return len(header).to_bytes(8, "little") + header + b"\0\0\0\0"


FILES: dict[str, tuple[bytes, str, str]] = {
    "empty": (b"", "empty", "empty"),
    "zeros": (b"\0" * 5000, "zeros", "zero bytes"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git_lfs", "git lfs pull"),
    "html": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "html", "web page"),
    "html without doctype": (b"<html lang=en>", "html", "web page"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "xml", "XML"),
    "json": (b'{"error": "Repository not found"}', "json", "JSON"),
    "json with marks": (b'\xef\xbb\xbf{"a": "\xc3\xa9"}', "json", "JSON"),
    "text": ("Entry not found. Voilà".encode(), "text", "text file"),
    "gzip": (gzip.compress(b"<html>"), "html", "web page"),
    "half a gzip": (gzip.compress(b"x" * 100)[:-9], "gzip_cut", "is truncated"),
    "bzip2": (bz2.compress(b"x"), "compressed", "bzip2"),
    "xz": (lzma.compress(b"x"), "compressed", "xz"),
    "zstd": (b"\x28\xb5\x2f\xfd\0\0", "compressed", "zstd"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4", "compressed", "7z"),
    "rar": (b"Rar!\x1a\x07\1\0", "compressed", "rar"),
    "hdf5": (b"\x89HDF\r\n\x1a\n\0\0", "hdf5", "Keras"),
    "gguf": (b"GGUF\3\0\0\0", "gguf", "llama.cpp"),
    "npy": (b"\x93NUMPY\1\0v\0{'descr'", "numpy", "NumPy"),
    "tar": (tar(), "tar", "tar"),
    "tar of torch 0.1": (tar_of_2017(OLD), "torch_tar", "torch before 0.2"),
    "program of torch 1.0 to 1.3": (script_of_2019(OLD), "torchscript_json", "torch 1.0 to 1.3"),
    "half a safetensors": (safetensors()[:-1], "shorter", "65 bytes are there, 66 are needed"),
    "tflite": (b"\x1c\0\0\0TFL3\0\0", "tflite", "TensorFlow Lite"),
    "keras": (zipped({"metadata.json": b"{}", "model.weights.h5": b""}, root="k"), "keras", "Keras"),
    "empty zip": (b"PK\5\6" + b"\0" * 18, "zip_empty", "archive is empty"),
    "split zip": (b"PK\x07\x08PK\3\4", "zip_split", "split"),
    "package": (zipped({".data/extern_modules": b"", "data.py": b""}), "torch_package", "torch.package"),
    "noise": (b"\x07\x99\xfe\x01" * 10, "unknown", "07 99 fe 01"),
    "pickled dict": (pickle.dumps({"a": 1}), "no_weights", "a dict of 1"),
    "pickled list": (pickle.dumps([1, 2, 3], 4), "a_list", "a list of 3"),
    "pickled array": (pickle.dumps(torch.ones(3).numpy()), "bare_tensor", "single tensor"),
    "broken pickle": (b"\x80\x04\xff\xff", "pickle", "corrupt at byte 2"),
}


def message_of(path: Path, kind: str) -> str:
    with pytest.raises(UnreadableError) as caught, open_checkpoint(path):
        pass
    problem: Any = caught.value.problem
    assert problem.kind == kind
    return str(caught.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin", ""])
def test_each_wrong_file_is_named(name: str, suffix: str, tmp_path: Path) -> None:
    data, kind, says = FILES[name]
    path = tmp_path / f"file{suffix}"
    path.write_bytes(data)
    message = message_of(path, kind)
    assert says in message
    assert message.startswith(f"file{suffix}: ")
    assert message.isprintable()
    assert len(message) < 400
    assert "weights_only" not in message
    assert "strict" not in message


def test_onnx_is_known_by_its_beginning_or_its_name(tmp_path: Path) -> None:
    for name, data in (("a.bin", b"\x08\x07\x12\x07pytorch\x1a\x05onnx1"), ("b.onnx", b"\x08\x08\x12\x00")):
        (tmp_path / name).write_bytes(data)
        message_of(tmp_path / name, "onnx")


@pytest.mark.filterwarnings("ignore")
def test_programs_are_named(tmp_path: Path) -> None:
    (tmp_path / "lite.ptl").write_bytes(zipped({"bytecode.pkl": b"", "mobile_debug_handles.pkl": b""}))
    assert "TorchScript" in message_of(tmp_path / "lite.ptl", "torchscript")
    (tmp_path / "compiled.pt2").write_bytes(zipped({"archive_format": b"pt2", "data/aotinductor/model/x.so": b""}))
    assert "exported" in message_of(tmp_path / "compiled.pt2", "torch_export")


def test_a_page_cannot_write_into_the_message(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"<html>\x1b[31m\n{kind}\xe2\x80\xae</html>")
    assert message_of(tmp_path / "x.pt", "html").isprintable()
