"""A file made by torch.save(model): take its weights, without its class and without running anything of it.

python examples/whole_model_pickle.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from smartload import inspect, smart_load


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add what the block has learned."""
        return x + self.norm(self.conv(x)).relu()


def network() -> nn.Module:
    """Build a small ResNet for 8 x 8 pictures."""
    return nn.Sequential(nn.Conv2d(3, 16, 1), Block(16), Block(16), nn.Flatten(), nn.Linear(16 * 8 * 8, 10))


def main() -> None:
    """Save a whole model, lose its class, and load its weights."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trained, fresh = network().eval(), network().eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "whole.pth")
        torch.save(nn.DataParallel(trained.to(device)), path)

        del sys.modules[__name__].Block  # the class was renamed since
        try:
            torch.load(path, map_location="cpu", weights_only=False)
        except AttributeError as error:
            print("torch.load:", error, "\n")

        print(inspect(path), "\n")
        print(smart_load(fresh, path, device="cpu"))
    pictures = torch.randn(4, 3, 8, 8)
    assert torch.allclose(fresh(pictures), trained(pictures.to(device)).cpu(), atol=1e-2)
    print("\nthe same outputs as the trained network")


if __name__ == "__main__":
    main()
