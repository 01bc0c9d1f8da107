"""Run every command of `python -m smartload` on a small file, and exit with 1 where one does not do what it should."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

MODEL = """from torch import nn

def net():
    return nn.Linear(3, 2)
"""
# What is run, and its exit status.
COMMANDS = {
    "--help": 0,
    "inspect a.pth": 0,
    "check a.pth models:net": 0,
    "convert a.pth c.pth": 0,
    "diff a.pth c.pth --values": 0,
    "diff a.pth b.pth": 1,
    "check b.pth models:net": 1,
    "inspect absent.pth": 1,
}


def main() -> int:
    """Write files and a model, and run the commands in their folder."""
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "models.py").write_text(MODEL, encoding="utf-8")
        torch.save({"epoch": 1, "model": nn.DataParallel(nn.Linear(3, 2)).state_dict()}, f"{folder}/a.pth")
        torch.save(nn.Linear(4, 2).state_dict(), f"{folder}/b.pth")
        for command, status in COMMANDS.items():
            done = subprocess.run([sys.executable, "-m", "smartload", *command.split()], cwd=folder, check=False)
            if done.returncode != status:
                print(f"{command}: {done.returncode}, not {status}")
                wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
