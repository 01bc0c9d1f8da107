"""The story on one page: open, match, place, commit, report."""

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
from smartload.load.commit import LoadJob, commit, keeps_values
from smartload.load.data_checks import DataChecker
from smartload.load.outcome import before_load, load_report
from smartload.load.progress import OnProgress, progress_function
from smartload.load.transfer import check_records
from smartload.place.devices import Device, place
from smartload.place.survey import survey
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
    verify: bool = False,
    strict: Literal[True] = True,
) -> LoadReport:
    """Load a checkpoint into a model, whatever wrapped it and wherever it was saved, or change nothing.

    The checkpoint's names are matched with the model's, prefixes and wrappers seen through; the bytes are read
    into the model's own tensors; torch's `load_state_dict(strict=True)` closes the call. Nothing in the file is run.

    Args:
        model: any module, wrapped or not, on any device, also on meta.
        path: a file or folder in any format that holds PyTorch weights, a binary file object, or a state dict or
            whole checkpoint in memory, which is not changed.
        device: None leaves every tensor where the model has it; a device brings the whole model there first;
            a list must be the `device_ids` of a DataParallel.
        select: dotted path of the part to take, through dicts and prefixes of keys alike ("model_ema",
            "state_dict.backbone"); "" takes the top only.
        rename: prefixes of whole segments, old to new, as the keys read in the file or once adapted; or a function
            of each key in the file.
        allow_missing: glob patterns of model keys that may keep their present values.
        allow_unexpected: glob patterns of the file's keys that may be left out.
        assign: replace the model's tensors by the file's (and their dtypes), as in `load_state_dict`.
        optimizer: one or more optimizers whose state follows the parameters to their device.
        progress: True shows a bar on stderr where that is a terminal, tqdm is installed, and the load takes longer
            than a second; a function is called with the bytes read so far and the bytes of all, from this thread.
            What it raises stops the load, which is undone.
        undo: keep a copy of the model's values for the way back: always, never, or ("auto") where the model brings
            loading code of its own or is no larger than 256 MiB.
        verify: compare the checksum of every tensor record that the file carries, before anything is written.
        strict: accepted for symmetry with `load_state_dict`; only True.

    Returns:
        What was done. It unpacks like torch's result, as in `missing, unexpected = smart_load(...)`.

    Raises:
        SmartLoadError: one of its children; the model is bit for bit what it was.

    >>> import torch
    >>> net = torch.nn.Linear(2, 1)
    >>> report = smart_load(net, {"state_dict": {"module.weight": torch.ones(1, 2), "module.bias": torch.zeros(1)}})
    >>> report.plan.rule, net(torch.ones(1, 2)).item()
    ("removed 'module.'", 2.0)
    """
    started = time.perf_counter()
    if not strict:
        raise SmartLoadError(Problem("strict-argument"))
    if undo not in (True, False, "auto"):
        raise ValueError(f"undo must be True, False or 'auto', not {undo!r}")
    options = _options(select, rename, allow_missing, allow_unexpected)
    model, optimizers = _module(model), _optimizers(optimizer)
    with progress_function(progress) as on_progress, open_checkpoint(path) as checkpoint:
        found = survey(model)
        checks = DataChecker(found, checkpoint)
        plan = checks.match(options)
        job = LoadJob(
            plan=plan,
            placement=place(found, device, plan, assign),
            entries=checks.chosen(plan),
            metadata=checks.metadata(plan.pairs),
            files=checkpoint.files,
            assign=assign,
            undo=keeps_values(found, undo),
            optimizers=optimizers,
            on_progress=on_progress,
        )
        if verify:
            check_records(checkpoint.records, checkpoint.path, checkpoint.files)
        before = before_load(found)
        after = commit(found, job)
        report = load_report(checkpoint, job, before, after, time.perf_counter() - started, verify)
    _log.info("%s", report)
    return report


def check(
    model: nn.Module,
    path: Source,
    *,
    select: str | None = None,
    rename: Rename = None,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
) -> KeyPlan:
    """Whether and how a checkpoint fits a model, without writing anything.

    Args:
        model: as in `smart_load`.
        path: as in `smart_load`.
        select: as in `smart_load`.
        rename: as in `smart_load`.
        allow_missing: as in `smart_load`.
        allow_unexpected: as in `smart_load`.

    Returns:
        The plan that `smart_load` would follow; print it, or look at `.pairs`, `.rule`, `.ignored`.

    Raises:
        SmartLoadError: the refusal that `smart_load` would give for the file and its names.

    >>> import torch
    >>> check(torch.nn.Linear(2, 1), {"net.weight": torch.ones(1, 2), "net.bias": torch.zeros(1)}).rule
    "removed 'net.'"
    """
    options = _options(select, rename, allow_missing, allow_unexpected)
    model = _module(model)
    with open_checkpoint(path) as checkpoint:
        checks = DataChecker(survey(model), checkpoint)
        plan = checks.match(options)
        checks.chosen(plan)
    return plan


def inspect(path: Source) -> Checkpoint:
    """What a checkpoint holds, without reading a weight or running anything of it.

    Args:
        path: as in `smart_load`.

    Returns:
        Names, shapes, dtypes and devices by part, and what lies beside them; print it, or take `.to_dict()`.

    Raises:
        SmartLoadError: the refusal that `smart_load` would give for the file.

    >>> import torch
    >>> found = inspect({"model": torch.nn.Linear(2, 1).state_dict(), "args": None})
    >>> list(found.parts), [item.path for item in found.aside]
    (['model'], ['args'])
    """
    with open_checkpoint(path) as checkpoint:
        return replace(checkpoint, files=(), records=())


def convert(
    path: Source,
    to: str | os.PathLike[str],
    *,
    select: str | None = None,
    rename: Rename = None,
    dtype: torch.dtype | str | None = None,
) -> Path:
    """Write the weights of a checkpoint to a clean file of their own, which any plain torch loads, or change nothing.

    What is written is one flat dict of CPU tensors: the only state dict that the checkpoint holds, or what `select`
    takes, without the optimizer, objects, devices and the names of wrappers. `module.` and its like go where they lead
    all names; other names stay, as no model says here what they should be. The file is read back and compared bit for
    bit before it takes the place of what was there.

    Args:
        path: as in `smart_load`.
        to: the file to write: `.pth`, `.pt` or `.bin` as torch.save writes it, or `.safetensors`.
        select: dotted path of the part to take, with all that lies below it; "" takes the top only, or everything
            where there are no tensors at the top.
        rename: as in `smart_load`.
        dtype: a floating dtype for all floating tensors, or its name ("float16"); None leaves them as they are.

    Returns:
        The path of the file.

    Raises:
        AmbiguousKeysError: there are several state dicts, or two names would become one.
        CastError: a finite value would become infinite.
        MissingExtraError: `.safetensors` needs the package of that name.
        SmartLoadError: what `smart_load` would refuse, a destination that is part of the source, or a failed write.
        ValueError: for another suffix, or a dtype that is none of floats.

    >>> import tempfile, torch
    >>> net = torch.nn.DataParallel(torch.nn.Linear(2, 1))
    >>> file = convert({"epoch": 3, "state_dict": net.state_dict()}, tempfile.mkdtemp() + "/clean.pth")
    >>> torch.nn.Linear(2, 1).load_state_dict(torch.load(file))
    <All keys matched successfully>
    """
    from smartload.conversion.write import check_destination, write_clean_file

    options, wanted = _options(select, rename, (), ()), check_destination(to, dtype)
    with open_checkpoint(path) as checkpoint:
        report = write_clean_file(checkpoint, path, options, wanted)
    _log.info("%s", report)
    return Path(to)


def _module(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return model


def _options(select: str | None, rename: Rename, missing: Iterable[str], unexpected: Iterable[str]) -> Options:
    rules = rename.items() if isinstance(rename, Mapping) else ()
    if not (rename is None or callable(rename) or isinstance(rename, Mapping)) or any(
        not isinstance(name, str) for rule in rules for name in rule
    ):
        raise TypeError(f"rename must map key prefixes to key prefixes, or be a function of a key, not {rename!r}")
    if not (select is None or isinstance(select, str)):
        raise TypeError(f"select must be the dotted path of a part, not {select!r}")
    for name, patterns in (("allow_missing", missing), ("allow_unexpected", unexpected)):
        if isinstance(patterns, str):
            raise TypeError(f"{name} takes a list of patterns: write {name}=[{patterns!r}]")
    return Options(select, rename, tuple(missing), tuple(unexpected))


def _optimizers(
    given: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None,
) -> Sequence[torch.optim.Optimizer]:
    if given is None:
        return ()
    several = (given,) if not isinstance(given, Iterable) else tuple(given)
    for each in several:
        # By what it has, not by its class: Lightning's optimizers are torch's in all but the class.
        if not (hasattr(each, "param_groups") and hasattr(each, "state")):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer or several of them, got {type(each).__name__}")
    return several
