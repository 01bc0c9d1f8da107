"""What a process runs out of is told as that: never as damage to a whole file, never as an error of Python's."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reading_tools import LEGACY, assert_same, saved
from systems import needs_memory_limits
from torch import nn

from smartload import SmartLoadError, smart_load


class Starved(io.BytesIO):
    """A file whose reading takes more memory than there is, after some reads."""

    reads = 3

    def read(self, size: int | None = -1) -> bytes:
        self.reads -= bool(size)
        if self.reads < 0:
            raise MemoryError
        return super().read(size)


def test_a_reader_without_memory_is_no_damage() -> None:
    net = nn.Linear(3, 2)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(SmartLoadError, match="there was not enough memory") as caught:
        smart_load(net, Starved(saved(net.state_dict())))
    assert caught.value.problem.kind == "no-memory"
    assert isinstance(caught.value, MemoryError)
    assert isinstance(caught.value.__cause__, MemoryError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert_same(net.state_dict(), before)


LIMITED = """
import resource, sys, torch
from torch import nn
from smartload import SmartLoadError, inspect, smart_load
small, path, act, keys, size = sys.argv[1:]
net = nn.Module()
for i in range(int(keys)): net.register_buffer(f"layer{i}", torch.ones(int(size)))
inspect(small)  # imports what is imported late
for slack in (1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 23):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + slack, -1))
    try:
        smart_load(net, path) if act == "load" else inspect(path)
        print("done")
        net = None
    except SmartLoadError as error:
        print(error.problem.kind)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    if net is None: break
    assert all(bool((value == 1).all()) for value in net.buffers())
"""


@needs_memory_limits
@pytest.mark.parametrize(
    ("kind", "act"),
    [("many", "inspect"), ("many", "load"), ("legacy", "inspect"), ("legacy", "load"), ("large", "load")],
)
def test_a_small_machine_is_no_damage(tmp_path: Path, kind: str, act: str) -> None:
    """Of an honest file: too many names for the memory that is left, or a model too large to keep a copy of."""
    keys, size = (1, 6_000_000) if kind == "large" else (20_000, 1)
    kwargs = LEGACY if kind == "legacy" else {}
    torch.save({f"layer{i}": torch.zeros(size) for i in range(keys)}, tmp_path / "net.pth", **kwargs)
    torch.save({"layer0": torch.zeros(1)}, tmp_path / "small.pth", **kwargs)
    arguments = [tmp_path / "small.pth", tmp_path / "net.pth", act, str(keys), str(size)]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments], capture_output=True, encoding="utf-8", check=True
    )
    # With the most memory it may succeed, as Python may still have some from before.
    told = done.stdout.split()
    assert set(told[:3]) == {"no-memory"}
    assert set(told[3:]) <= {"no-memory", "done"}
