"""What a process runs out of is told as that: never as damage to a whole file, never as an error of Python's."""

from __future__ import annotations

import gzip
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from formats import FORMATS
from reading_tools import assert_same, saved
from systems import needs_file_size_limits, needs_memory_limits
from torch import nn

from smartload import SmartLoadError, smart_load
from smartload.pickles.inert import parse


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


@pytest.mark.parametrize("way", ["in the machine", "of a part"])
def test_a_parser_without_memory_is_no_damage(way: str) -> None:
    class Full(bytearray):
        def __getitem__(self, at: Any) -> Any:
            if isinstance(at, slice):
                raise MemoryError
            return super().__getitem__(at)

    data = pickle.dumps({"weight": b"x" * 1000}, 2)
    assert parse(data, 0, "net.pkl")[1] == len(data)
    with pytest.raises(MemoryError):
        parse(Full(data), 0, "net.pkl", whole=way == "in the machine")


FULL = """
import os, resource, sys, torch
from torch import nn
from smartload import SmartLoadError, convert, inspect, smart_load
path, act, free = sys.argv[1:]
net = nn.Linear(3, 2)
before = [value.clone() for value in net.state_dict().values()]
source = {key: value + 1 for key, value in net.state_dict().items()} if path == "memory" else path
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
held = []
try:
    while True: held.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    pass
for _ in range(int(free)): os.close(held.pop())
try:
    {"load": lambda: smart_load(net, source), "convert": lambda: convert(source, path + ".pth")}[act]()
except SmartLoadError as error:
    message = str(error).lower()
    assert all(map(torch.equal, net.state_dict().values(), before))
    print("too many open files" in message, error.problem.kind, message)
"""


@needs_file_size_limits
@pytest.mark.parametrize(
    ("kind", "act", "free"),
    [
        ("memory", "load", 0),
        ("torch zip", "load", 0),
        ("torch zip", "convert", 0),
        ("pickle 2", "load", 1),
        ("npz", "load", 1),
        ("torchscript", "load", 1),
        ("folder of shards", "load", 0),
        ("folder of shards", "load", 1),
        ("distributed checkpoint", "load", 0),
    ],
)
def test_a_process_without_descriptors_is_told_so(tmp_path: Path, kind: str, act: str, free: int) -> None:
    """Also where a late import is what finds none."""
    path = kind if kind == "memory" else str(FORMATS[kind](nn.Linear(3, 2).state_dict(), tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", FULL, path, act, str(free)], capture_output=True, encoding="utf-8", check=True
    )
    assert done.stdout.startswith("True"), done.stdout


LIMITED = """
import resource, sys, torch
from torch import nn
from smartload import SmartLoadError, smart_load
net = nn.Linear(2500, 2500)
with torch.no_grad(): net.weight.fill_(1)
smart_load(nn.Linear(1, 1), sys.argv[1])  # imports what is imported late
limits = resource.getrlimit(resource.RLIMIT_AS)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (8 << 20), limits[1]))
try:
    smart_load(net, sys.argv[2])
except SmartLoadError as error:
    print(error.problem.kind, error, bool((net.weight == 1).all()))
"""


@needs_memory_limits
@pytest.mark.parametrize("packed", [False, True])
def test_a_small_machine_is_no_damage(tmp_path: Path, packed: bool) -> None:
    """Of an honest file: the copy for the undo finds no memory, or the gzip archive none to be unpacked into."""
    pack = gzip.compress if packed else bytes
    for name, size in (("small", 1), ("large", 2500)):
        (tmp_path / name).write_bytes(pack(saved(nn.Linear(size, size).state_dict())))
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path / "small", tmp_path / "large"],
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert done.stdout.startswith("no-memory large: there was not enough memory (")
    assert done.stdout.endswith("undo=False, which keeps no copy of the model's values. True\n")
