"""The ways to bring a checkpoint into a model: smartload, plain torch, its peers, and the floor.

Each is prepared (imports, offsets) before the clock starts, and gives the function that is measured.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Mapping

import torch
from torch import nn

PIECE = 16 << 20
Way = Callable[[nn.Module, str], Callable[[], object]]


def floor(model: nn.Module, path: str) -> Callable[[], object]:
    """The same bytes into memory that is there, offsets known: `preadv` by two threads in pieces of 16 MiB."""
    from smartload.formats import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        (part,) = checkpoint.parts.values()
        files = [os.open(reader.path or path, os.O_RDONLY) for reader in checkpoint.files]
        entries = dict(part.entries)
    targets = model.state_dict(keep_vars=True)
    meta = any(tensor.is_meta for tensor in targets.values())

    def read() -> None:
        own = {key: torch.empty_like(t, device="cpu") for key, t in targets.items()} if meta else targets
        spans = sorted((entry.file, entry.offset, entry.nbytes, own[key].data_ptr()) for key, entry in entries.items())
        work = iter(
            [
                (file, offset + at, min(PIECE, size - at), place + at)
                for file, offset, size, place in spans
                for at in range(0, size, PIECE)
            ]
        )

        def take() -> None:
            for file, offset, size, place in work:
                buffer, done = memoryview((ctypes.c_char * size).from_address(place)).cast("B"), 0
                while done < size:
                    done += os.preadv(files[file], [buffer[done:]], offset + done)

        threads = [threading.Thread(target=take) for _ in range(min(os.cpu_count() or 1, 8))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if meta:
            model.load_state_dict(own, assign=True)

    return read


def smart(model: nn.Module, path: str) -> Callable[[], object]:
    """smartload."""
    from smartload import smart_load

    meta = any(tensor.is_meta for tensor in model.state_dict().values())
    return lambda: smart_load(model, path, device="cpu" if meta else None)


def without_preadv(model: nn.Module, path: str) -> Callable[[], object]:
    """smartload as on Windows: each thread reads by a descriptor of its own."""
    from smartload.reading import files, opening

    files.SHARED_DESCRIPTOR = opening.SHARED_DESCRIPTOR = False
    return smart(model, path)


def plain(model: nn.Module, path: str) -> Callable[[], object]:
    """What everyone writes."""
    return lambda: model.load_state_dict(torch.load(path))


def mapped(model: nn.Module, path: str) -> Callable[[], object]:
    """The same over a mapping of the file."""
    return lambda: model.load_state_dict(torch.load(path, mmap=True))


def assigned(model: nn.Module, path: str) -> Callable[[], object]:
    """A meta model gets the tensors themselves."""
    return lambda: model.load_state_dict(torch.load(path), assign=True)


def emptied(model: nn.Module, path: str) -> Callable[[], object]:
    """A meta model gets memory, which is filled from a mapping."""

    def load() -> None:
        model.to_empty(device="cpu")
        model.load_state_dict(torch.load(path, mmap=True))

    return load


def safetensors(model: nn.Module, path: str) -> Callable[[], object]:
    """safetensors.torch.load_model."""
    from safetensors.torch import load_model

    return lambda: load_model(model, path)


def hub(model: nn.Module, path: str) -> Callable[[], object]:
    """huggingface_hub.load_torch_model."""
    from huggingface_hub import load_torch_model

    return lambda: load_torch_model(model, path, strict=True, safe=not path.endswith(".pth"))


def accelerate(model: nn.Module, path: str) -> Callable[[], object]:
    """accelerate.load_checkpoint_in_model; what its first call imports is not counted."""
    from accelerate import load_checkpoint_in_model

    return lambda: load_checkpoint_in_model(model, path)


WAYS: Mapping[str, Way] = {
    "floor": floor, "smartload": smart, "without preadv": without_preadv,
    "torch.load": plain, "torch.load(mmap)": mapped, "torch.load, assign": assigned,
    "to_empty, torch.load(mmap)": emptied,
    "safetensors": safetensors, "huggingface_hub": hub, "accelerate": accelerate,
}  # fmt: skip
NEEDS = {"safetensors": "safetensors", "huggingface_hub": "huggingface_hub", "accelerate": "accelerate"}
