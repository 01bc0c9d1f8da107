"""Why a call is refused, as data: the errors carry it, `errors.sentences` and `errors.mismatch` have the words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from smartload.records.entries import TensorSpec

Kind: TypeAlias = Literal[
    # files
    "shorter", "not_found", "no_permission", "io", "not_regular", "changed", "being_written", "folder",
    "folder_two", "folder_unfinished", "keras", "folder_shards", "folder_zero", "zero", "folder_empty",
    "damaged", "empty", "zeros", "git_lfs", "html", "xml", "json", "text", "compressed", "hdf5", "gguf", "onnx",
    "tflite", "unknown", "numpy", "tar", "torch_tar", "tensorflow", "json_damaged", "header_large",
    "header_metadata", "header_entry", "header_gap", "header_end", "gzip_cut", "gzip_damaged", "grows",
    "index_alone", "index_empty", "shard_suffix", "shard_name", "shard_outside", "shard_missing", "shard_case",
    "shard_lacks", "shard_more", "dcp_damaged", "dcp_gap", "dcp_chunk", "dcp_file", "torchscript", "torchscript_json",
    "torch_export", "torch_package", "zip_other", "zip_empty", "zip_split", "zip_cut", "zip_broken",
    "zip_differs", "zip_packed", "zip_roots", "zip_twice", "zip_case", "zip_nul", "crc", "record_missing",
    "record_size", "record_odd",
    "legacy", "legacy_version", "pickle", "pickle_short", "pickle_long", "pickle_grows", "plain_large",
    "pickle_more", "pickle_ids", "pickle_large", "pickle_protocol", "storage_id", "storage_type", "storage_twice",
    "tensor",
    "tensor_outside", "path_twice", "key_twice", "odd_keys", "optimizer", "bare_tensor", "a_list",
    "out_of_reach", "no_weights", "names_long", "names_deep", "tangled", "module_itself", "module_large",
    "unsafe_build", "unsafe_item", "unsafe_storage",
    # names, values and calls
    "select", "select-flat", "rename", "pattern", "twice", "dotted_twice", "overlap", "nested", "cast", "cast-kind",
    "dtype", "memory", "no-memory", "no-descriptors", "too-deep", "module-loop", "grown", "value", "strict",
    "model-code", "half-loaded", "strict-argument",
    # writing
    "own-source", "inside-source", "no-folder", "no-file", "link-loop", "read-only", "hard-links", "not-written",
    "in-use", "read-back", "extra-states", "header-dtype", "cast-dtype", "repeats",
    # devices
    "absent-device", "no-such-device", "meta-device", "device-dtype", "data-parallel", "several-devices",
    "other-devices", "bound", "held-on-to", "meta-buffers", "inference", "move-failed", "meta-missing",
    "meta-values", "fake-mode", "fake", "offloaded",
    # causes of a mismatch that are known by name
    "shard", "lora", "flat", "zero3",
]  # fmt: skip
"""Every kind of problem, each with one sentence in `errors.sentences`. The type checker holds all uses against it."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason: its kind, and the facts that the sentence of that kind names."""

    kind: Kind
    path: str = ""
    facts: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """How a checkpoint and a model differ, counted at the part of the file that came closest."""

    model: str
    path: str
    part: str
    rule: str
    paired: int
    """Model keys that have their tensor in the file, in the right shape."""
    wanted: int
    """Model keys in all."""
    missing: Mapping[str, TensorSpec | None] = field(default_factory=dict)
    """Keys of the model that the file lacks."""
    unexpected: Mapping[str, TensorSpec | None] = field(default_factory=dict)
    """Keys of the file, once adapted, that the model lacks."""
    shapes: Mapping[str, tuple[TensorSpec | None, TensorSpec | None]] = field(default_factory=dict)
    """Model key -> (spec in the file, spec in the model), where the shapes differ."""
    kind: Kind | None = None
    """A cause that is known by name ("lora", "zero3"), None where there is none."""
    hints: tuple[str, ...] = ()
    """Arguments that were tried and work, as they are to be written."""


@dataclass(frozen=True, slots=True)
class Ambiguity:
    """Two or more parts, or tensors, that fit: what each would load, and the arguments that decide for it."""

    model: str
    path: str
    answers: tuple[tuple[str, str], ...]
    """(what would be loaded, the argument that takes it)"""
    key: str = ""
    """The model key that each would fill, where they differ in one key only."""
