"""The models that are loaded, and the checkpoints that they are loaded from."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.append(str(Path(__file__).parent.parent / "helpers"))  # the tests' own writers

WIDTH = 1024


class Expert(nn.Module):
    """Three small matrices, as in a mixture of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Parameter(torch.empty(8, 8)) for _ in range(3))


def dense(mib: int, dtype: torch.dtype) -> nn.Module:
    """A transformer of so many MiB."""
    layers = max(1, (mib << 20) // (12 * WIDTH * WIDTH * dtype.itemsize))
    return nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, batch_first=True) for _ in range(layers)).to(
        dtype
    )


def many(keys: int) -> nn.Module:
    """About so many small tensors: layers of 128 experts of three each."""
    layers = max(1, keys // 384)
    return nn.ModuleList(nn.ModuleList(Expert() for _ in range(128)) for _ in range(layers))


def wide(children: int) -> nn.Module:
    """One list of so many children."""
    return nn.ModuleList(nn.Linear(4, 4) for _ in range(children))


def build(kind: str, size: int, dtype: str = "float32", meta: bool = False) -> nn.Module:
    """The model, its memory there and touched, or on meta."""
    makers: Mapping[str, Callable[[], nn.Module]] = {
        "dense": lambda: dense(size, getattr(torch, dtype)),
        "many": lambda: many(size),
        "wide": lambda: wide(size),
    }
    with torch.device("meta"):
        model = makers[kind]()
    if not meta:
        model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(1)
    return model


def filled(model: nn.Module) -> dict[str, torch.Tensor]:
    """Its state dict with a value of its own in every tensor."""
    state = model.state_dict()
    for number, value in enumerate(state.values()):
        value.reshape(-1).copy_((torch.arange(value.numel()) % 251 + number % 1000).to(value.dtype))
    return state


def write(state: dict[str, torch.Tensor], folder: Path, form: str) -> Path:
    """The state dict in a format, on the disk; formats that are not written here are those of the tests."""
    folder.mkdir()
    if form in WRITERS:
        path = WRITERS[form](state, folder)
    else:
        from formats import FORMATS

        path = FORMATS[form](state, folder)
    for each in folder.rglob("*"):
        if each.is_file():
            with each.open("rb") as file:
                os.fsync(file.fileno())
    return path


def warm(path: Path, cold: bool = False) -> int:
    """Bring a checkpoint into the page cache, or out of it; its bytes."""
    total = 0
    for each in sorted(path.rglob("*")) if path.is_dir() else [path]:
        with each.open("rb", buffering=0) as file:
            total += each.stat().st_size
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while not cold and file.read(1 << 24):
                pass
    return total


def _zip(state: dict[str, Any], folder: Path) -> Path:
    torch.save(state, path := folder / "zip.pth")
    return path


def _safetensors(state: dict[str, torch.Tensor], folder: Path, name: str = "model.safetensors") -> Path:
    from safetensors.torch import save_file

    save_file(state, path := folder / name)
    return path


def _shards(state: dict[str, torch.Tensor], folder: Path) -> Path:
    names, index = list(state), {}
    for number in range(8):
        part = {key: state[key] for key in names[number * len(names) // 8 : (number + 1) * len(names) // 8]}
        file = _safetensors(part, folder, f"model-{number + 1:05}-of-00008.safetensors")
        index |= dict.fromkeys(part, file.name)
    size = sum(value.nbytes for value in state.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return folder


def _adapted(state: dict[str, torch.Tensor], folder: Path) -> Path:
    """Of a DataParallel, in a training checkpoint, as a process on the second GPU would save it."""
    from tagging import tagged

    wrapped = {f"module.{key}": value for key, value in state.items()}
    with tagged("cuda:1"):
        return _zip({"epoch": 7, "state_dict": wrapped, "optimizer": {"state": {}, "param_groups": []}}, folder)


WRITERS: Mapping[str, Callable[[dict[str, Any], Path], Path]] = {
    "zip": _zip,
    "safetensors": _safetensors,
    "shards": _shards,
    "adapted": _adapted,
}
