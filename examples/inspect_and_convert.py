"""A file that you know nothing about: look into it, and write its weights clean, without a model and without a GPU.

python examples/inspect_and_convert.py
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from pathlib import Path

import torch
from torch import nn

from smartload import convert, inspect, smart_load


def network() -> nn.Module:
    """Build a small network for sequences."""
    return nn.ModuleDict({"embed": nn.Embedding(100, 16), "read": nn.GRU(16, 16), "say": nn.Linear(16, 100)})


def main() -> None:
    """Inspect, convert, inspect again, load."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trained = network().to(device)
    averaged = torch.optim.swa_utils.AveragedModel(trained)
    with tempfile.TemporaryDirectory() as folder:
        path, clean = Path(folder, "run.pth"), Path(folder, "clean.pth")
        run = {"model": nn.DataParallel(trained).state_dict(), "ema": averaged.state_dict(), "args": Namespace(lr=0.1)}
        torch.save(run, path)
        print("what came:", inspect(path), sep="\n")

        convert(path, clean, select="model")
        print("\nwhat is left:", inspect(clean), sep="\n")
        print(f"\n{path.stat().st_size} bytes before, {clean.stat().st_size} after")

        model = network()
        model.load_state_dict(torch.load(clean))  # plain torch loads it now
        print(smart_load(model, clean))
    assert all(torch.equal(value.cpu(), model.state_dict()[name]) for name, value in trained.state_dict().items())


if __name__ == "__main__":
    main()
