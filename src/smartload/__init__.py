"""load_state_dict that just loads: any prefix, any wrapper, any device, all or nothing."""

from smartload.api import check, convert, inspect, smart_load
from smartload.errors import (
    AmbiguousKeysError,
    CastError,
    CheckpointNotFoundError,
    KeyMismatchError,
    MissingExtraError,
    ModelCodeError,
    PlacementError,
    ShapeMismatchError,
    SmartLoadError,
    UnreadableError,
    UnsafeCheckpointError,
)
from smartload.place.survey import unwrap
from smartload.records.checkpoint import Checkpoint
from smartload.records.report import KeyPlan, LoadReport

__all__ = [
    "AmbiguousKeysError",
    "CastError",
    "Checkpoint",
    "CheckpointNotFoundError",
    "KeyMismatchError",
    "KeyPlan",
    "LoadReport",
    "MissingExtraError",
    "ModelCodeError",
    "PlacementError",
    "ShapeMismatchError",
    "SmartLoadError",
    "UnreadableError",
    "UnsafeCheckpointError",
    "check",
    "convert",
    "inspect",
    "smart_load",
    "unwrap",
]
