"""load_state_dict that just loads: any prefix, any wrapper, any device, all or nothing."""

from typing import TYPE_CHECKING

from smartload.api import check, convert, inspect, smart_load
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

__version__: str

# Hidden from type checkers, for whom a module with `__getattr__` has every attribute, misspelt ones too.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> str:
        """Give `__version__` when it is asked for, so that importing smartload does not read the installed metadata."""
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import metadata

        try:
            return metadata.version("torch-smartload")
        except metadata.PackageNotFoundError:
            # A source tree on the path, not installed. This is a valid version, and older than every release.
            return "0+unknown"


def __dir__() -> list[str]:
    """List the public names, and those that every module has. Folders and modules of the package can be imported."""
    return [*__all__, "__version__", *(name for name in globals() if name.startswith("__"))]
