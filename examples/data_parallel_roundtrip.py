"""Weights trained on several GPUs, loaded on the CPU, on one device, on several, and compiled: always the same line.

python examples/data_parallel_roundtrip.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from smartload import smart_load, unwrap

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"


def network() -> nn.Module:
    """Build a small transformer."""
    layer = nn.TransformerEncoderLayer(32, nhead=4, dim_feedforward=64, batch_first=True)
    return nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)


def main() -> None:
    """Save under DataParallel and without, and load both files everywhere."""
    torch.manual_seed(0)
    trained = nn.DataParallel(network().to(DEVICE)).eval()  # trained, let us say
    plain = unwrap(trained)
    tokens = torch.randn(6, 10, 32)
    wanted = plain(tokens.to(DEVICE)).cpu()

    with tempfile.TemporaryDirectory() as folder:
        files = {"DataParallel": Path(folder, "parallel.pth"), "plain": Path(folder, "plain.pth")}
        torch.save(trained.state_dict(), files["DataParallel"])
        torch.save(plain.state_dict(), files["plain"])
        for kind, path in files.items():
            targets = {
                "the CPU": (network(), "cpu"),
                "one device": (network(), DEVICE),
                "DataParallel": (nn.DataParallel(network()), None),  # brought to its first GPU, where there is one
                "torch.compile": (torch.compile(network()), DEVICE),
            }
            for name, (model, device) in targets.items():
                report = smart_load(model, path, device=device)
                inside = unwrap(model).eval()
                found = inside(tokens.to(next(inside.parameters()).device)).cpu()
                assert torch.allclose(found, wanted, atol=1e-4)
                print(f"{kind:12} file -> {name:13}  on {report.device}, names: {report.plan.rule or 'as they are'}")


if __name__ == "__main__":
    main()
