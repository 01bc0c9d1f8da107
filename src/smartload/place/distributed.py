"""Handle models that torch.distributed has cut up: full names and values outside, this rank's shards inside.

Every rank reads the file and keeps its own shards. So nothing is sent, and no rank waits for another that refused:
`set_model_state_dict` of torch communicates, and hangs where one rank raises.
"""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def is_sharded(tensor: object) -> bool:
    """Tell whether the tensor is a DTensor."""
    # No DTensor exists before its package is imported; importing it takes as long as many a load.
    package = sys.modules.get("torch.distributed.tensor")
    return package is not None and isinstance(tensor, package.DTensor)


def is_flat(module: nn.Module) -> bool:
    """Tell whether the module is a FullyShardedDataParallel, which keeps its parameters in one flat tensor."""
    package = sys.modules.get("torch.distributed.fsdp")  # as above: not imported for the question
    return package is not None and isinstance(module, package.FullyShardedDataParallel)


def own_shard(full: torch.Tensor, sharded: Any) -> torch.Tensor:
    """Cut this rank's shard out of a full tensor, with the mesh and placements of the model's `sharded` one."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    mesh, placements = sharded.device_mesh, sharded.placements
    # With a rank for src_data_rank, torch would send that rank's values; None has every rank cut its own.
    if _takes_src_data_rank():
        return distribute_tensor(full, mesh, placements, src_data_rank=None)
    # Up to 2.6 it always sends. To cut a tensor that every rank has in full, torch sends nothing there.
    everywhere = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=placements)


@functools.cache  # asked for every tensor, and a signature takes as long as to cut a small one
def _takes_src_data_rank() -> bool:
    from torch.distributed.tensor import distribute_tensor

    return "src_data_rank" in inspect.signature(distribute_tensor).parameters


@contextmanager
def full_state_dicts(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Have every FullyShardedDataParallel in a model save and load full tensors, on every rank, in this block.

    Afterwards the user's own setting holds again. A model without one is left alone.

    Args:
        modules: all modules of the model by path.
    """
    if not any(map(is_flat, modules.values())):
        yield
        return
    from torch.distributed.fsdp import FullStateDictConfig, StateDictType

    model = modules[""]
    # rank0_only would leave the other ranks without a value.
    before = _set_state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig(rank0_only=False))
    try:
        yield
    finally:
        _set_state_dict_type(model, before.state_dict_type, before.state_dict_config, before.optim_state_dict_config)


def _set_state_dict_type(model: nn.Module, *settings: Any) -> Any:
    """Set the kind of state dicts that the model's FullyShardedDataParallel give; return the settings before."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch points to a newer function, which leaves strictness to its caller
        return FullyShardedDataParallel.set_state_dict_type(model, *settings)
