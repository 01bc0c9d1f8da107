"""The wrappers that smartload sees through: one line each. To add a wrapper, add its line to `WRAPPERS`."""

from __future__ import annotations

from typing import NamedTuple


class Wrapper(NamedTuple):
    """A module around a module, as `DataParallel(net)`: its keys are those of `net` behind one more segment."""

    type: str
    """Dotted name of its class; classes derived from it are wrappers too. "" where only old files still know it."""
    segment: str
    """The name of the child that it wraps, and so the segment that it puts before every key."""
    plausible: bool
    """Whether a network of one's own may have a child of that name: a file alone does not say then what it is."""


WRAPPERS: tuple[Wrapper, ...] = (
    Wrapper("torch.nn.parallel.data_parallel.DataParallel", "module", True),
    Wrapper("torch.nn.parallel.distributed.DistributedDataParallel", "module", True),
    # Its counter `n_averaged` lies beside the module; see AVERAGED.
    Wrapper("torch.optim.swa_utils.AveragedModel", "module", True),
    # What torch.compile(net) gives.
    Wrapper("torch._dynamo.eval_frame.OptimizedModule", "_orig_mod", False),
    Wrapper(
        "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel", "_fsdp_wrapped_module", False
    ),
    Wrapper("", "_fpw_module", False),  # FSDP before torch 1.13
    # The base class of what checkpoint_wrapper and offload_wrapper give; FSDP users put it around single layers.
    Wrapper(
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper",
        "_checkpoint_wrapped_module",
        False,
    ),
    # One class, in the package `lightning` and in the package of Fabric alone.
    Wrapper("lightning.fabric.wrappers._FabricModule", "_forward_module", True),
    Wrapper("lightning_fabric.wrappers._FabricModule", "_forward_module", True),
    Wrapper("opacus.grad_sample.grad_sample_module.GradSampleModule", "_module", True),
)

CHILD_OF = {wrapper.type: wrapper.segment for wrapper in WRAPPERS if wrapper.type}
"""Class of a wrapper -> the name of the child that it wraps. By name, so that looking for a wrapper imports none."""
SEGMENTS = frozenset(wrapper.segment for wrapper in WRAPPERS)
"""The segments that wrappers put into keys."""
PLAUSIBLE_SEGMENTS = frozenset(wrapper.segment for wrapper in WRAPPERS if wrapper.plausible)
"""Those that a network may use for a child of its own."""

_SHORTEST = tuple(
    segment for segment in SEGMENTS if not any(other in segment for other in SEGMENTS if other != segment)
)
# Those that contain no other one: where "module" is not in a key, "_forward_module" is not either. Most keys have no
# wrapper, and two searches say so instead of one for each.

AVERAGED = "n_averaged"
"""The buffer of torch.optim.swa_utils.AveragedModel, beside the module that it wraps."""


def has_no_wrapper(name: str) -> bool:
    """Tell whether no segment of `name` can be a wrapper's, without splitting it: 'fc.weight' has none.

    False says nothing: 'my_module.weight' contains the letters of one.
    """
    for segment in _SHORTEST:  # noqa: SIM110 - a generator would take twice the time, and this is asked for every key
        if segment in name:
            return False
    return True
