"""Files made to order for the reading tests, and what was read from them as tensors again."""

from __future__ import annotations

import importlib
import io
import pkgutil
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from smartload import formats
from smartload.formats import open_checkpoint
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import ByteReader, Part, Span

# The readers of a format are imported when a file is of it. Here they are there already, so that whatever is imported
# while a file is read is imported because of what the file says.
for module in pkgutil.walk_packages(formats.__path__, "smartload.formats."):
    importlib.import_module(module.name)

CANARY = Path(tempfile.gettempdir()) / "smartload-canary"
"""What the gadgets of the tests would write, if one were ever run."""
LEGACY = {"_use_new_zipfile_serialization": False}


def saved(value: object, tag: str | None = None, **kwargs: Any) -> bytes:
    """What torch.save writes, with every storage tagged as lying on the device `tag`."""
    file = io.BytesIO()
    with mock.patch("torch.serialization.location_tag", return_value=tag) if tag else nullcontext():
        torch.save(value, file, **kwargs)
    return file.getvalue()


def zipped(records: Mapping[str, bytes], root: str = "archive", compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of records below one folder."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(f"{root}/{name}", data)
    return file.getvalue()


def unzipped(data: bytes) -> dict[str, bytes]:
    """The records of a zip without their common folder."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def checkpoint_of(pickle: bytes, **records: bytes) -> bytes:
    """A torch zip around a pickle, with the storages given as d0=..., d1=..."""
    data = {f"data/{name[1:]}": content for name, content in records.items()}
    return zipped({"data.pkl": pickle, "byteorder": b"little", **data, "version": b"3\n"})


@contextmanager
def opened(data: bytes) -> Iterator[Checkpoint]:
    """What is read from bytes in memory."""
    with open_checkpoint(io.BytesIO(data)) as checkpoint:
        yield checkpoint


def read(data: bytes) -> Checkpoint:
    """What is read from bytes in memory, where nothing more is read from it later."""
    with opened(data) as checkpoint:
        return checkpoint


def tensor(checkpoint: Checkpoint, span: Span) -> torch.Tensor:
    """The tensor that a span stands for."""
    dtype = getattr(torch, span.dtype)
    if 0 in span.shape:
        return torch.empty(span.shape, dtype=dtype)
    buffer = bytearray(span.nbytes)
    checkpoint.files[span.file].read_into(span.offset, memoryview(buffer))
    flat = torch.frombuffer(buffer, dtype=dtype)
    if span.big_endian:
        width = flat.element_size()
        flat = torch.frombuffer(
            bytearray(flat.view(torch.uint8).view(-1, width).flip(1).numpy().tobytes()), dtype=dtype
        )
    return flat.as_strided(span.shape, span.stride)


def tensors(data: bytes, part: str = "") -> dict[str, torch.Tensor]:
    """All tensors of one part of a file."""
    with opened(data) as checkpoint:
        return tensors_in(checkpoint, checkpoint.parts[part])


def tensors_in(checkpoint: Checkpoint, part: Part) -> dict[str, torch.Tensor]:
    """All tensors of one part of an open file."""
    return {key: tensor(checkpoint, entry) for key, entry in part.entries.items() if isinstance(entry, Span)}


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    left, right = (each.detach().contiguous().reshape(-1).view(torch.uint8) for each in (ours, theirs))
    return torch.equal(left, right)


def assert_same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    """Equal names, in the same order, with equal tensors."""
    assert list(ours) == list(theirs)
    assert [key for key in ours if not same(ours[key], theirs[key])] == []


_HARMLESS = {
    "ctypes.cdata",
    "open",
    "os.listdir",
    "os.scandir",
    "time.sleep",
    "object.__getattr__",
    "sys._getframe",
    "gc.get_objects",
}
_watching: list[Callable[[str, tuple[Any, ...]], None]] = []
_hooked = False


def _hook(event: str, args: tuple[Any, ...]) -> None:
    for watcher in _watching:
        watcher(event, args)


def wrong_in_threads(reader: ByteReader, data: bytes, size: int, step: int) -> list[int]:
    """Read pieces of `size` bytes by four threads at once; give the offsets at which they are not those of `data`."""
    wrong: list[int] = []
    together = threading.Barrier(4)

    def read(start: int) -> None:
        together.wait()
        for at in range(start, len(data) - size, step):
            buffer = bytearray(size)
            reader.read_into(at, memoryview(buffer))
            if buffer != data[at : at + size]:
                wrong.append(at)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


@contextmanager
def watched() -> Iterator[list[str]]:
    """Every audit event that reading has no business to raise: code run, modules, files written, processes, sockets."""
    global _hooked
    seen: list[str] = []
    suspicious = (
        "exec",
        "compile",
        "import",
        "subprocess",
        "os.",
        "socket",
        "shutil",
        "pickle",
        "marshal",
        "ctypes",
        "code.",
    )

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[2], int) and args[2] & 0o3:
            seen.append(f"open for writing: {args[0]}")
        elif event.startswith(suspicious) and event not in _HARMLESS:
            seen.append(f"{event} {args!r:.1000}")

    if not _hooked:  # an audit hook cannot be taken off again
        sys.addaudithook(_hook)
        _hooked = True
    _watching.append(watch)
    try:
        yield seen
    finally:
        _watching.remove(watch)


def floats(key: str = "0", numel: int = 2, kind: str = "FloatStorage") -> bytes:
    """Opcodes of a persistent id of a storage."""
    return (
        b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text(key) + text("cpu") + number(numel) + b"tQ"
    )


def rebuilt(
    storage: bytes, offset: bytes = b"K\x00", size: bytes = b"K\x02\x85", stride: bytes = b"K\x01\x85"
) -> bytes:
    """Opcodes of `_rebuild_tensor_v2`."""
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + size + stride + b"\x89" + hooks + b"tR"


def text(value: str) -> bytes:
    """BINUNICODE."""
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + len(raw).to_bytes(4, "little") + raw


def number(value: int) -> bytes:
    """LONG1."""
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def dict_of(**items: bytes) -> bytes:
    """A whole protocol-2 pickle of a dict."""
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in items.items()) + b"u."


TWO_FLOATS = b"\x00\x00\x80\x3f\x00\x00\x00\x40"
