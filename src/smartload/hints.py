"""Arguments worth trying when names do not pair off. Pure; nothing here is applied, `match` tries each first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from smartload.fit import FileNames, Fit
from smartload.records import Wishes
from smartload.spelling import common_path


def cause(file: FileNames) -> str:
    """A reason that is known by name: the kind of file that is no full set of weights."""
    if any("lora_A." in name for name in file.spec):
        return "lora"
    if any(name.rpartition(".")[2] == "_flat_param" for name in file.spec):
        return "flat"
    specs = [spec for spec in file.spec.values() if spec is not None]
    if len(specs) > 1 and all(spec.shape == (0,) for spec in specs):
        return "zero3"
    return ""


def proposals(nearest: Fit, wishes: Wishes) -> Iterator[tuple[str, Wishes]]:
    """Changes of the call that may make it work: as they are to be written, and as wishes to try."""
    plain = nearest.model.plain
    extra = [nearest.names[name] for name in nearest.left_over]
    lost = [plain(key) for key in nearest.missing]
    old, new = common_path(extra), common_path(lost)
    if old and new and old != new and wishes.rename is None:
        yield f"rename={{{old!r}: {new!r}}}", replace(wishes, rename={old: new})
    if not nearest.pairs or len(nearest.shapes) == len(nearest.pairs):
        return
    wanted = _patterns([*nearest.missing, *nearest.shapes])
    left = _patterns([*extra, *(nearest.names[nearest.pairs[key]] for key in nearest.shapes)])
    arguments = {"allow_missing": wanted, "allow_unexpected": left}
    yield (
        ", ".join(f"{name}={list(value)!r}" for name, value in arguments.items() if value),
        replace(wishes, allow_missing=wishes.allow_missing + wanted, allow_unexpected=wishes.allow_unexpected + left),
    )


def _patterns(names: list[str]) -> tuple[str, ...]:
    """One glob for names that lie under one module; the names themselves where they are few."""
    path = common_path(names)
    if path and len(names) > 1:
        return (f"{path}.*",)
    return tuple(names) if len(names) <= 3 else ()


def choices(name: str, other: str, file: FileNames, wishes: Wishes) -> Iterator[tuple[str, Wishes]]:
    """Ways to say that `name` is meant and not `other`, where both would fill one key."""
    for taken in (name, other):
        head = taken.partition(".")[0]
        if taken == name and not other.startswith(f"{head}."):
            yield f"select={head!r}", replace(wishes, select=head if not wishes.select else f"{wishes.select}.{head}")
    head = other.partition(".")[0]
    for pattern in (f"{head}.*", file.stored[other]):
        allowed = (*wishes.allow_unexpected, pattern)
        yield f"allow_unexpected={list(allowed)!r}", replace(wishes, allow_unexpected=allowed)
