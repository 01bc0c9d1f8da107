"""The report of a load: what was loaded, and how the model differs from what it was before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import nn

from smartload.load.commit import LoadJob
from smartload.load.strict import loads_each_module
from smartload.place.memory import device_name
from smartload.place.survey import Survey, unregistered_tensors
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import Entry, InMemory, Stored
from smartload.records.report import LoadReport, casts_of
from smartload.records.text import first_few

Devices = Mapping[str, torch.device]


class Before(NamedTuple):
    """The model before the load; the devices apart, because a Parameter object survives a move."""

    survey: Survey
    devices: Devices


def before_load(survey: Survey) -> Before:
    """Note where the model's tensors are."""
    return Before(survey, {key: tensor.device for key, tensor in survey.tensors.items()})


def load_report(
    checkpoint: Checkpoint, job: LoadJob, before: Before, after: Survey, seconds: float, verified: bool
) -> LoadReport:
    """Make the report of a load.

    Args:
        checkpoint: what was opened.
        job: what was loaded.
        before: the model before the load.
        after: the model now; the survey of `before` itself where nothing but values changed.
        seconds: wall time of the whole call.
        verified: whether all that was loaded was compared with checksums.
    """
    changed = after is not before.survey
    now = {key: tensor.device for key, tensor in after.tensors.items()} if changed else before.devices
    devices = dict.fromkeys(device_name(device) for device in dict.fromkeys(now.values()))
    return LoadReport(
        plan=job.plan,
        format=checkpoint.format,
        device=", ".join(devices) or "no device",
        nbytes=sum(entry.nbytes if isinstance(entry, Stored) else _nbytes(entry) for entry in job.entries.values()),
        seconds=seconds,
        casts=() if job.assign else casts_of(_dtypes(job, after)),
        moves=tuple(_moves(before.devices, now)) if changed else (),
        aside=checkpoint.aside,
        notes=tuple(_notes(job, before.survey, after, list(devices))),
        undo=job.undo,
        verified=verified,
    )


def _nbytes(entry: Entry) -> int:
    value = entry.value if isinstance(entry, InMemory) else None
    # Only dense tensors can say it, and those on meta have none.
    return (
        value.nbytes if isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_meta else 0
    )


def _dtypes(job: LoadJob, after: Survey) -> Iterator[tuple[str, str, str]]:
    """Give (key, dtype in the file, dtype in the model) where the two differ."""
    for key, entry in job.entries.items():
        # A stored entry has a dtype of its own; making a spec for each of very many keys takes longer.
        stored, own = entry if isinstance(entry, Stored) else entry.spec, after.keys.specs.get(key)
        if stored is not None and own is not None and stored.dtype != own.dtype:
            yield key, stored.dtype, own.dtype


def _moves(before: Devices, now: Devices) -> Iterator[tuple[str, str, str]]:
    moved: dict[tuple[torch.device, torch.device], list[str]] = {}
    for key, device in now.items():
        if before.get(key, device) != device:
            moved.setdefault((before[key], device), []).append(key)
    for (source, target), keys in moved.items():
        yield "all" if len(keys) == len(now) else first_few(keys), device_name(source), device_name(target)


def _notes(job: LoadJob, before: Survey, after: Survey, devices: list[str]) -> Iterator[str]:
    if loads_each_module(before, job.nkeys):
        yield "each module loaded its own keys, strictly: torch is slow with very many children, and fails very deep"
    replaced = [  # buffers are new objects after every move, and no optimizer holds them
        key
        for key, tensor in (() if job.assign or after is before else after.tensors.items())
        if before.tensors.get(key, tensor) is not tensor and isinstance(tensor, nn.Parameter)
    ]
    if replaced:
        yield f"new Parameter objects for {first_few(replaced)}: rebuild optimizers made before this call"
    if len(devices) == 1:
        # Such tensors stay where they were when the model moves, and the next forward mixes devices.
        elsewhere = {name: str(tensor.device) for name, tensor in unregistered_tensors(after)}
        elsewhere = {name: device for name, device in elsewhere.items() if device != devices[0]}
        for where in dict.fromkeys(elsewhere.values()):
            names = first_few(name for name, device in elsewhere.items() if device == where)
            yield f"{names} on {where}: plain attributes do not follow .to(); make them buffers (register_buffer)"
