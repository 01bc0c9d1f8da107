"""One flipped bit in a file with checksums: a refusal, or the very values that were saved; never others.

SMARTLOAD_EVERY_BIT=1 flips every bit of every file, which takes minutes; else those of large files are sampled.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from formats import dcp_in_chunks
from reading_tools import assert_same, saved
from torch import nn

from smartload import SmartLoadError, smart_load

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore:`torch.jit.[a-z_]*` is deprecated"),
]

STATE = {"a": torch.tensor([5.0, -6.0]), "b": torch.tensor([[1 << 40, 7], [-1, 0]])}


class Net(nn.Module):
    """Two buffers, which every format can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.tensor([1.0, 2.0]))
        self.register_buffer("b", torch.tensor([[3, 4], [5, 6]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.a


def holding() -> Net:
    """A network with the values of `STATE`."""
    net = Net()
    net.load_state_dict(STATE)
    return net


def arrays(save: Callable[..., None]) -> bytes:
    file = io.BytesIO()
    save(file, **{key: value.numpy() for key, value in STATE.items()})
    return file.getvalue()


def program() -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(holding()), file)
    return file.getvalue()


def exported() -> bytes:
    file = io.BytesIO()
    torch.export.save(torch.export.export(holding(), (torch.ones(2),)), file)
    return file.getvalue()


def views() -> bytes:
    """Tensors that share a storage which holds more."""
    whole = torch.cat([torch.zeros(3, dtype=torch.int64), STATE["b"].reshape(-1), torch.zeros(2, dtype=torch.int64)])
    return saved({"a": STATE["a"], "b": whole[3:7].view(2, 2)})


FILES: dict[str, tuple[Callable[[], bytes], int]] = {
    "torch zip": (lambda: saved(STATE), 1),
    "torch zip with more in a storage": (views, 3),
    "training checkpoint": (lambda: saved({"epoch": 1, "model": dict(STATE), "optimizer": {"m": torch.ones(3)}}), 3),
    "npz": (lambda: arrays(numpy.savez), 1),
    "npz compressed": (lambda: arrays(numpy.savez_compressed), 1),
    "torchscript": (program, 3),
    "exported program": (exported, 13),
}
"""Name -> what writes the file, and which bits of it are flipped: every first, second, third."""


def flip_all(content: bytearray, step: int, load: Callable[[Net], Any]) -> int:
    """Flip every `step`-th bit by itself, and load; give how many loads were refused."""
    net, refused = Net(), 0
    before = {key: value.clone() for key, value in net.state_dict().items()}
    for bit in range(0, 8 * len(content), step):
        content[bit >> 3] ^= 1 << (bit & 7)
        try:
            load(net)
        except SmartLoadError:
            refused += 1
            assert_same(net.state_dict(), before)
        else:
            assert_same(net.state_dict(), STATE)
            net.load_state_dict(before)
        content[bit >> 3] ^= 1 << (bit & 7)
    return refused


def chosen(step: int) -> int:
    return 1 if os.environ.get("SMARTLOAD_EVERY_BIT") else step


@pytest.mark.parametrize("undo", ["auto", False])
@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_refused_or_harmless(name: str, undo: Any) -> None:
    make, step = FILES[name]
    # Without a copy, the same is compared at another moment: a part of the bits is enough.
    step = chosen(step) * (1 if undo == "auto" else 11)
    content = bytearray(make())
    smart_load(net := Net(), io.BytesIO(content), undo=undo)
    assert_same(net.state_dict(), STATE)
    refused = flip_all(content, step, lambda net: smart_load(net, io.BytesIO(bytes(content)), undo=undo))
    # Harmless are the dates in headers, and records that no load reads.
    assert refused > (0.2 if name == "exported program" else 0.5) * 8 * len(content) / step


def test_one_flipped_bit_of_a_ranks_file_is_refused_or_harmless(tmp_path: Path) -> None:
    folder = dcp_in_chunks(STATE, tmp_path)
    for path in folder.glob("*.distcp"):
        whole = path.read_bytes()
        content = bytearray(whole)

        def load(net: Net, path: Path = path, content: bytearray = content) -> None:
            path.write_bytes(content)
            os.utime(path, (1, 1))
            smart_load(net, folder)

        assert flip_all(content, chosen(97), load)
        path.write_bytes(whole)
