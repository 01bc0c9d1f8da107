"""load_state_dict that just loads: any prefix, any wrapper, any device, all or nothing."""

from smartload.api import check, inspect, smart_load
from smartload.checkpoint import Checkpoint
from smartload.errors import (
    AmbiguousKeysError,
    CastError,
    CheckpointNotFoundError,
    KeyMismatchError,
    ModelCodeError,
    PlacementError,
    ShapeMismatchError,
    SmartLoadError,
    UnreadableError,
    UnsafeCheckpointError,
)
from smartload.report import KeyPlan, LoadReport
from smartload.survey import unwrap

__all__ = [
    "AmbiguousKeysError",
    "CastError",
    "Checkpoint",
    "CheckpointNotFoundError",
    "KeyMismatchError",
    "KeyPlan",
    "LoadReport",
    "ModelCodeError",
    "PlacementError",
    "ShapeMismatchError",
    "SmartLoadError",
    "UnreadableError",
    "UnsafeCheckpointError",
    "check",
    "inspect",
    "smart_load",
    "unwrap",
]
