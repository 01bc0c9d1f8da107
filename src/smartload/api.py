"""Offer the public functions, which share their stages: open a checkpoint, match its keys, place, load, report.

`check` stops after matching, `inspect` after opening, and `convert` writes a file where `smart_load` writes to a model.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias

import torch
from torch import nn

from smartload.errors import SmartLoadError
from smartload.formats import open_checkpoint
from smartload.load.checksums import all_have_checksums, compare_now, compares, with_checksums
from smartload.load.commit import Changes, LoadJob, all_or_nothing, commit, keeps_values
from smartload.load.data_checks import DataChecker
from smartload.load.outcome import before_load, load_report
from smartload.load.progress import OnProgress, progress_function
from smartload.place.devices import Device, place
from smartload.place.survey import survey
from smartload.reading.exhaustion import exhaustion_told
from smartload.records.checkpoint import Checkpoint
from smartload.records.problems import Problem
from smartload.records.report import KeyPlan, LoadReport
from smartload.records.requests import Options

Source: TypeAlias = "str | os.PathLike[str] | BinaryIO | Mapping[str, object]"
Rename: TypeAlias = "Mapping[str, str] | Callable[[str], str] | None"

_log = logging.getLogger("smartload")


def smart_load(
    model: nn.Module,
    path: Source,
    device: Device = None,
    *,
    select: str | None = None,
    rename: Rename = None,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    assign: bool = False,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
    progress: bool | OnProgress | None = None,
    undo: bool | Literal["auto"] = "auto",
    verify: bool | Literal["auto"] = "auto",
    strict: Literal[True] = True,
) -> LoadReport:
    """Load a checkpoint into a model, whatever wrapped it and wherever it was saved, or change nothing.

    The keys of the checkpoint are matched with those of the model: `'module.fc.weight' -> 'fc.weight'`. The bytes are
    read into the model's own tensors, so that Parameter objects stay, and the call ends with torch's own
    `load_state_dict(strict=True)`. Nothing in the file is run.

    Args:
        model: any module, wrapped or not, on any device or on meta.
        path: a file or folder in any format that holds PyTorch weights, a binary file object, or a state dict or
            whole checkpoint in memory, which is not changed.
        device: None leaves every tensor on its device; a device moves the whole model there first; a list must be the
            `device_ids` of a DataParallel.
        select: dotted path of the part to load, through dicts and prefixes of keys alike ("model_ema",
            "state_dict.backbone"); "" takes the top only.
        rename: key prefixes of whole segments, old to new, as the keys are in the file or once adapted; or a function
            of each key in the file.
        allow_missing: glob patterns of model keys that may keep their present values.
        allow_unexpected: glob patterns of file keys that may be left out.
        assign: replace the model's tensors by the file's, and take their dtypes, as in `load_state_dict`.
        optimizer: one or more optimizers whose state moves with the parameters.
        progress: True shows a bar on stderr if that is a terminal, tqdm is installed, and the load takes longer than a
            second. A function is called with the bytes read so far and the bytes of all, in this thread; if it raises,
            the load is undone.
        undo: whether to keep a copy of the model's values until the load has succeeded. "auto" keeps one if the model
            has loading code of its own, or is no larger than 256 MiB. Without a copy, a file that cannot be read to its
            end may leave a part of the model written; the error then names the keys.
        verify: whether to compare the bytes that are loaded with the checksums that zip files carry (`.pth`, `.npz`,
            TorchScript). "auto" compares where the records that are read take up to 256 MiB. Where `undo` keeps a copy
            they are compared as they are read; otherwise all are read once before anything is written.
        strict: only True; accepted for symmetry with `load_state_dict`.

    Returns:
        What was loaded and how. It unpacks like torch's result: `missing, unexpected = smart_load(...)`.

    Raises:
        SmartLoadError: the checkpoint was refused, or the load failed and was undone; the children of this class say
            why. The model is bit for bit what it was.
        TypeError: an argument has a wrong type.
        ValueError: `undo` or `verify` has a wrong value.

    >>> import torch
    >>> net = torch.nn.Linear(2, 1)
    >>> report = smart_load(net, {"state_dict": {"module.weight": torch.ones(1, 2), "module.bias": torch.zeros(1)}})
    >>> report.plan.rule, net(torch.ones(1, 2)).item()
    ("removed 'module.'", 2.0)
    """
    started = time.perf_counter()
    # The arguments first: a misspelt call costs no time and opens no file.
    if not strict:
        raise SmartLoadError(Problem("strict-argument"))
    if undo not in (True, False, "auto"):
        raise ValueError(f"undo must be True, False or 'auto', not {undo!r}")
    if verify not in (True, False, "auto"):
        raise ValueError(f"verify must be True, False or 'auto', not {verify!r}")
    options = _options(select, rename, allow_missing, allow_unexpected)
    _check_module(model)
    optimizers = _optimizers(optimizer)

    def load(changes: Changes) -> LoadReport:
        with progress_function(progress) as on_progress, open_checkpoint(path) as opened:
            surveyed = survey(model)
            # From the first byte on: that two tensors are equal, say, decides what is loaded.
            checkpoint = with_checksums(opened) if verify else opened
            checks = DataChecker(surveyed, checkpoint)
            plan = checks.match(options)
            entries = checks.chosen(plan)
            verifies, keeps = compares(verify, checkpoint, entries.values()), keeps_values(surveyed, undo)
            # All that can be decided is decided here: from `commit` on, the model is written to.
            job = LoadJob(
                plan=plan,
                placement=place(surveyed, device, plan, assign, entries),
                entries=entries,
                metadata=checks.metadata(plan.pairs),
                files=checkpoint.files if verifies and keeps else opened.files,
                assign=assign,
                undo=keeps,
                optimizers=optimizers,
                on_progress=on_progress,
            )
            if verifies and not keeps:
                compare_now(entries.values(), checkpoint.files)
            before = before_load(surveyed)
            after = commit(surveyed, job, changes)
            verified = verifies and all_have_checksums(checkpoint.records)
            report = load_report(checkpoint, job, before, after, time.perf_counter() - started, verified)
        _log.info("%s", report)
        return report

    # To the last line, the report and the closing of files included: an error there must not leave a loaded model.
    return all_or_nothing(load)


def check(
    model: nn.Module,
    path: Source,
    *,
    select: str | None = None,
    rename: Rename = None,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
) -> KeyPlan:
    """Tell whether and how a checkpoint fits a model, without writing anything.

    Args:
        model: as in `smart_load`.
        path: as in `smart_load`.
        select: as in `smart_load`.
        rename: as in `smart_load`.
        allow_missing: as in `smart_load`.
        allow_unexpected: as in `smart_load`.

    Returns:
        The plan that `smart_load` would follow: print it, or look at `.pairs`, `.rule`, `.ignored`.

    Raises:
        SmartLoadError: the error that `smart_load` would raise for this file and its keys. Devices and casts are not
            checked.
        TypeError: an argument has a wrong type.

    >>> import torch
    >>> check(torch.nn.Linear(2, 1), {"net.weight": torch.ones(1, 2), "net.bias": torch.zeros(1)}).rule
    "removed 'net.'"
    """
    options = _options(select, rename, allow_missing, allow_unexpected)
    _check_module(model)
    with open_checkpoint(path) as checkpoint:
        checks = DataChecker(survey(model), checkpoint)
        plan = checks.match(options)
        checks.chosen(plan)  # for its refusal of entries that cannot be loaded
    return plan


def inspect(path: Source) -> Checkpoint:
    """List what a checkpoint holds, without reading weights or running anything in it.

    Args:
        path: as in `smart_load`.

    Returns:
        The keys, shapes, dtypes and devices of each part, and the other values beside them: print it, or take
        `.to_dict()`.

    Raises:
        SmartLoadError: the error that `smart_load` would raise for this file.
        TypeError: `path` has a wrong type.

    >>> import torch
    >>> checkpoint = inspect({"model": torch.nn.Linear(2, 1).state_dict(), "args": None})
    >>> list(checkpoint.parts), [item.path for item in checkpoint.aside]
    (['model'], ['args'])
    """
    with open_checkpoint(path) as checkpoint:
        # What is returned outlives the block, after which the files are closed.
        return replace(checkpoint, files=(), records=())


def convert(
    path: Source,
    to: str | os.PathLike[str],
    *,
    select: str | None = None,
    rename: Rename = None,
    dtype: torch.dtype | str | None = None,
) -> Path:
    """Write the weights of a checkpoint to a clean file that plain torch loads, or change nothing.

    The file holds one flat dict of CPU tensors: the only state dict of the checkpoint, or the part that `select` takes,
    without optimizer state, objects and devices. Prefixes of wrappers (`module.`) are removed where all keys begin with
    them; other keys stay, as there is no model here to say what they should be. Checksums that the checkpoint carries
    are compared. The new file is read back and compared bit for bit before it replaces an old one, whose mode, owner
    (where that is permitted) and extended attributes it gets. Links are followed.

    Args:
        path: as in `smart_load`.
        to: the file to write: `.pth`, `.pt` or `.bin` as torch.save writes it, or `.safetensors`.
        select: dotted path of the part to take, with all that is below it; "" takes the top only, or everything if
            there are no tensors at the top.
        rename: as in `smart_load`.
        dtype: a float dtype for all float tensors, or its name ("float16"); None leaves them as they are.

    Returns:
        The path of the file.

    Raises:
        AmbiguousKeysError: the checkpoint holds several state dicts, or two keys would become one.
        CastError: a finite value would become infinite.
        UnreadableError: the tensors would take far more room than the file, because elements are repeated in it.
        SmartLoadError: the checkpoint was refused as by `smart_load`, writing failed, or `to` is a part of the
            checkpoint, is read-only, has several hard links, is no regular file or not in a folder that is there.
        TypeError: an argument has a wrong type.
        ValueError: `to` has another suffix, or `dtype` is not a float dtype.

    >>> import tempfile, torch
    >>> net = torch.nn.DataParallel(torch.nn.Linear(2, 1))
    >>> file = convert({"epoch": 3, "state_dict": net.state_dict()}, tempfile.mkdtemp() + "/clean.pth")
    >>> torch.nn.Linear(2, 1).load_state_dict(torch.load(file))
    <All keys matched successfully>
    """
    with exhaustion_told(path):  # an import opens files
        # Here, so that whoever only loads does not wait for the import.
        from smartload.conversion.write import check_destination, write_clean_file

    options, destination = _options(select, rename, (), ()), check_destination(to, dtype)
    with open_checkpoint(path) as checkpoint:
        report = write_clean_file(with_checksums(checkpoint), path, options, destination)
    _log.info("%s", report)
    return Path(to)


def _check_module(model: nn.Module) -> None:
    """Raise TypeError where `model` is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _options(select: str | None, rename: Rename, missing: Iterable[str], unexpected: Iterable[str]) -> Options:
    """Collect the arguments that decide about keys; raise TypeError for one that could only be misunderstood."""
    rules = rename.items() if isinstance(rename, Mapping) else ()
    if not (rename is None or callable(rename) or isinstance(rename, Mapping)) or any(
        not isinstance(name, str) for rule in rules for name in rule
    ):
        raise TypeError(f"rename must map key prefixes to key prefixes, or be a function of a key, not {rename!r}")
    if not (select is None or isinstance(select, str)):
        raise TypeError(f"select must be the dotted path of a part, not {select!r}")
    for name, patterns in (("allow_missing", missing), ("allow_unexpected", unexpected)):
        if isinstance(patterns, str):  # a string is iterable too: each of its letters would be a pattern
            raise TypeError(f"{name} takes a list of patterns: write {name}=[{patterns!r}]")
    return Options(select, rename, tuple(missing), tuple(unexpected))


def _optimizers(
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None,
) -> Sequence[torch.optim.Optimizer]:
    """Give the optimizers as a sequence; raise TypeError for anything that is none."""
    if optimizer is None:
        return ()
    optimizers = (optimizer,) if not isinstance(optimizer, Iterable) else tuple(optimizer)
    for each in optimizers:
        # By what it has, not by its class: Lightning's optimizers are torch's in all but the class.
        if not (hasattr(each, "param_groups") and hasattr(each, "state")):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer or several of them, got {type(each).__name__}")
    return optimizers
