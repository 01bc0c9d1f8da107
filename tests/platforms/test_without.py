"""The plugin that takes names out of `os` does so before smartload looks, and files are read all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

CODE = """
import os, sys
sys.path.insert(0, sys.argv[1])
import without
import torch, smartload
from smartload.reading import files
net = torch.nn.Linear(3, 2)
smartload.smart_load(net, sys.argv[2])
print(net.weight.tolist() == torch.load(sys.argv[2])["weight"].tolist(), files.SHARED_DESCRIPTOR)
"""


@pytest.mark.parametrize("lacks", [None, "O_CLOEXEC"])
def test_a_file_is_read_without_them(lacks: str | None, tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "net.pth")
    settings = {} if lacks is None else {"SMARTLOAD_OS_LACKS": lacks}
    environment = {name: value for name, value in os.environ.items() if name != "SMARTLOAD_OS_LACKS"} | settings
    command = [sys.executable, "-c", CODE, str(Path(__file__).parent), str(tmp_path / "net.pth")]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, check=False)
    shared = lacks is not None and hasattr(os, "preadv")
    assert (done.stdout, done.stderr) == (f"True {shared}\n", "")
