"""The dtypes that a file can hold, as far as the torch that is running has them."""

from __future__ import annotations

import torch

from smartload.records.entries import ITEMSIZE

DTYPES: list[str] = [name for name in ITEMSIZE if hasattr(torch, name)]


def dtype(name: str) -> torch.dtype:
    """Give the dtype of this name, which this torch must have."""
    found: torch.dtype = getattr(torch, name)
    return found
