"""Models that torch.distributed has cut up: whole names and values outside, this rank's share inside.

Every rank reads the file and keeps its own share, so nothing is sent and no rank waits for another that refused.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def is_sharded(tensor: object) -> bool:
    """Whether the tensor is a DTensor; the package is not imported for the question."""
    package = sys.modules.get("torch.distributed.tensor")
    return package is not None and isinstance(tensor, package.DTensor)


def is_flat(module: nn.Module) -> bool:
    """Whether the module is a FullyShardedDataParallel, which keeps its parameters in one flat tensor."""
    package = sys.modules.get("torch.distributed.fsdp")
    return package is not None and isinstance(module, package.FullyShardedDataParallel)


def own_shard(full: torch.Tensor, own: Any) -> torch.Tensor:
    """This rank's share of a full tensor, laid out as the model's own sharded one."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, own.device_mesh, own.placements, src_data_rank=None)


@contextmanager
def full_state_dicts(model: nn.Module) -> Iterator[None]:
    """While it lasts, a FullyShardedDataParallel names and takes full tensors on every rank, whatever was set."""
    if not any(map(is_flat, model.modules())):
        yield
        return
    from torch.distributed.fsdp import FullStateDictConfig, StateDictType

    before = _set(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig(rank0_only=False))
    try:
        yield
    finally:
        _set(model, before.state_dict_type, before.state_dict_config, before.optim_state_dict_config)


def _set(model: nn.Module, *settings: Any) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch points to a newer function, which leaves strictness to its caller
        return FullyShardedDataParallel.set_state_dict_type(model, *settings)
