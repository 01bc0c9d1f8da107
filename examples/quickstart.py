"""Train a small network under DataParallel, save it the way people do, and load it into two other models.

python examples/quickstart.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from smartload import smart_load


def network() -> nn.Module:
    """Build a small image classifier for 3 x 16 x 16 pictures and ten classes."""
    return nn.Sequential(
        nn.Conv2d(3, 16, kernel_size=3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 10),
    )


def train(model: nn.Module, steps: int = 20) -> torch.optim.Optimizer:
    """Train a few steps on random pictures."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        pictures, labels = torch.randn(32, 3, 16, 16), torch.randint(10, (32,))
        loss = nn.functional.cross_entropy(model(pictures), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return optimizer


def main() -> None:
    """Train, save, load twice, compare."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trained = nn.DataParallel(network().to(device))
    optimizer = train(trained)
    pictures = torch.randn(8, 3, 16, 16)
    wanted = trained.eval()(pictures.to(device)).cpu()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "checkpoint.pth")
        torch.save({"epoch": 20, "state_dict": trained.state_dict(), "optimizer": optimizer.state_dict()}, path)

        print("into a plain model on the CPU:")
        plain = network()
        print(smart_load(plain, path, device="cpu"))
        assert torch.allclose(plain.eval()(pictures), wanted, atol=1e-2)

        print("\nback into a DataParallel:")
        parallel = nn.DataParallel(network().to(device))
        print(smart_load(parallel, path))
        assert torch.allclose(parallel.eval()(pictures.to(device)).cpu(), wanted, atol=1e-2)

    print("\nall three give the same outputs")


if __name__ == "__main__":
    main()
