"""The models that are loaded, and the checkpoints that they are loaded from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

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


def write(state: dict[str, torch.Tensor], path: Path, form: str) -> None:
    """The state dict in a format, on the disk."""
    WRITERS[form](state, path)
    for each in path.iterdir() if path.is_dir() else [path]:
        with each.open("rb") as file:
            os.fsync(file.fileno())


def warm(path: Path, cold: bool = False) -> int:
    """Bring a checkpoint into the page cache, or out of it; its bytes."""
    total = 0
    for each in sorted(path.iterdir()) if path.is_dir() else [path]:
        with each.open("rb", buffering=0) as file:
            total += each.stat().st_size
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while not cold and file.read(1 << 24):
                pass
    return total


def _safetensors(state: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(state, path)


def _shards(state: dict[str, torch.Tensor], path: Path) -> None:
    path.mkdir()
    names, index = list(state), {}
    for number in range(8):
        file = f"model-{number + 1:05}-of-00008.safetensors"
        part = {key: state[key] for key in names[number * len(names) // 8 : (number + 1) * len(names) // 8]}
        _safetensors(part, path / file)
        index |= dict.fromkeys(part, file)
    size = sum(value.nbytes for value in state.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    (path / "model.safetensors.index.json").write_text(text)


def _adapted(state: dict[str, torch.Tensor], path: Path) -> None:
    wrapped = {f"module.{key}": value for key, value in state.items()}
    torch.save({"epoch": 7, "state_dict": wrapped, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}, path)


def _tagged(state: dict[str, torch.Tensor], path: Path) -> None:
    """As a process on the second GPU would save it."""
    original = torch.serialization.location_tag
    torch.serialization.location_tag = lambda storage: "cuda:1"
    try:
        _adapted(state, path)
    finally:
        torch.serialization.location_tag = original


def _dcp(state: dict[str, torch.Tensor], path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save(state, checkpoint_id=path, no_dist=True)


def _script(state: dict[str, torch.Tensor], path: Path) -> None:
    tree = nn.Module()
    for key, value in state.items():
        *above, last = key.split(".")
        module = tree
        for name in above:
            if name not in module._modules:
                module.add_module(name, nn.Module())
            module = module.get_submodule(name)
        module.register_buffer(last, value)
    torch.jit.script(tree).save(str(path))


def _npz(state: dict[str, torch.Tensor], path: Path) -> None:
    import numpy

    numpy.savez(path, **{key: value.numpy() for key, value in state.items()})


WRITERS: Mapping[str, Callable[[dict[str, torch.Tensor], Path], None]] = {
    "zip": torch.save,
    "legacy": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "safetensors": _safetensors,
    "shards": _shards,
    "adapted": _tagged,
    "dcp": _dcp,
    "torchscript": _script,
    "npz": _npz,
}
SUFFIXES = {
    "zip": ".pth",
    "legacy": ".legacy.pth",
    "safetensors": ".safetensors",
    "shards": "-shards",
    "adapted": ".adapted.pth",
    "dcp": "-dcp",
    "torchscript": ".jit.pt",
    "npz": ".npz",
}
