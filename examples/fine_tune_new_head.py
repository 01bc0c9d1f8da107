"""Take a network that was trained for ten classes to a task with three: all but the head is loaded, and checked.

python examples/fine_tune_new_head.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from smartload import SmartLoadError, smart_load


class Classifier(nn.Module):
    """A small convolutional network with a head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.head = nn.Linear(16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One score for each class."""
        return self.head(self.body(x))


def main() -> None:
    """Load without the head, then train the head alone."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Classifier(classes=3)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "ten_classes.pth")
        torch.save({"state_dict": nn.DataParallel(Classifier(classes=10)).state_dict()}, path)
        try:
            smart_load(model, path)
        except SmartLoadError as error:
            print(f"refused, and nothing written:\n{error}\n")
        print(smart_load(model, path, device=device, allow_missing=["head.*"], allow_unexpected=["head.*"]))

    optimizer = torch.optim.Adam(model.head.parameters(), lr=0.05)
    pictures, labels = torch.randn(64, 3, 16, 16, device=device), torch.randint(3, (64,), device=device)
    for step in range(31):
        loss = nn.functional.cross_entropy(model(pictures), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:2}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
