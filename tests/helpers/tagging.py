"""Files whose tensors say that they lay on a device that this machine does not have."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import torch

TAGS = ("cuda:1", "cuda:7", "mps", "xpu:0", "npu:0", "xla:0")
_tags: list[str] = []


def _tag(storage: object) -> str | None:
    return _tags[-1] if _tags else None


# Asked before torch's own (10 is the CPU's, 20 that of CUDA); it restores nothing.
torch.serialization.register_package(0, _tag, lambda storage, location: None)


@contextmanager
def tagged(tag: str) -> Iterator[None]:
    """Every storage saved in this block says that it lay on the device `tag`."""
    _tags.append(tag)
    try:
        yield
    finally:
        _tags.pop()


def saved(value: object, tag: str = "cpu", *, legacy: bool = False) -> io.BytesIO:
    """What torch.save writes of a value on that device, zip or legacy."""
    file = io.BytesIO()
    with tagged(tag):
        torch.save(value, file, _use_new_zipfile_serialization=not legacy)
    file.seek(0)
    return file
