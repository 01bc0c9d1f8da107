"""What the tests of devices share: a network with every kind of tensor, and a look at all that a load may change."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import nn


class Scaled(nn.Module):
    """A buffer of each kind, used in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(3))
        self.register_buffer("scale", torch.full((3,), 2.0), persistent=False)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value * self.scale + self.shift


def network(seed: int = 0) -> nn.Sequential:
    """Equal for equal seeds, in values too; in evaluation mode."""
    torch.manual_seed(seed)
    layers = OrderedDict(fc=nn.Linear(4, 3), norm=nn.BatchNorm1d(3), scaled=Scaled(), out=nn.Linear(3, 2))
    model = nn.Sequential(layers).eval()
    model.get_submodule("scaled").shift = torch.randn(3)  # type: ignore[assignment]
    return model


def devices(model: nn.Module) -> set[str]:
    """Of all parameters and buffers, persistent or not."""
    return {str(tensor.device) for tensor in (*model.parameters(), *model.buffers())}


def look(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()) -> list[object]:
    """Everything that a refused load must leave as it was: objects, devices, bits, gradients, optimizer state."""
    seen: list[object] = [
        (name, id(tensor), type(tensor), str(tensor.device), tensor.requires_grad, bits(tensor), grad(tensor))
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    ]
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            seen += [(id(parameter), name, id(value), str(value.device), bits(value)) for name, value in state.items()]
    return seen


def grad(tensor: torch.Tensor) -> object:
    return None if tensor.grad is None else (id(tensor.grad), str(tensor.grad.device), bits(tensor.grad))


def bits(tensor: torch.Tensor) -> object:
    return None if tensor.is_meta else tensor.detach().cpu().reshape(-1).view(torch.uint8).tolist()


def same_values(model: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same state dict, names aside."""
    mine, theirs = model.state_dict().values(), other.state_dict().values()
    return list(map(bits, mine)) == list(map(bits, theirs))
