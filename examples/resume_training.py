"""Stop a training and go on in a new process, wrapped or not: the losses are those of a training without a break.

python examples/resume_training.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from smartload import smart_load

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def network() -> nn.Module:
    """Build a small transformer layer with an output; no dropout, so that two runs can be compared."""
    return nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), nn.Linear(16, 1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Give the loss of each step, on data that depends on the step alone."""
    losses = []
    for step in steps:
        data = torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(step)).to(DEVICE)
        loss = (model(data) - data.mean(-1, keepdim=True)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Train for ten steps, save, train on; resume from the file, and compare."""
    torch.manual_seed(0)
    first = nn.DataParallel(network().to(DEVICE))
    adam = torch.optim.Adam(first.parameters(), lr=1e-2)
    train(first, adam, range(10))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.pth")
        torch.save({"step": 10, "model": first.state_dict(), "optimizer": adam.state_dict()}, path)
        unbroken = train(first, adam, range(10, 20))

        second = network()  # without DataParallel this time
        print(smart_load(second, path, device=DEVICE))
        optimizer = torch.optim.Adam(second.parameters(), lr=1e-2)
        optimizer.load_state_dict(torch.load(path, map_location="cpu")["optimizer"])
    resumed = train(second, optimizer, range(10, 20))
    for step, (one, other) in enumerate(zip(unbroken, resumed), start=10):
        print(f"step {step}: {one:.6f} without a break, {other:.6f} resumed")
    assert torch.allclose(torch.tensor(unbroken), torch.tensor(resumed), rtol=1e-2)


if __name__ == "__main__":
    main()
