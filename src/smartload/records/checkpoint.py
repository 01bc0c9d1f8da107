"""What a file holds: as the paper that is carried, as data, as words, as html. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from smartload.records.data import ITEMSIZE, Aside, ByteReader, Entry, Extra, Held, Opaque, Part, Record, Span, Tiled
from smartload.records.keys import WRAPPER_SEGMENTS, common_path
from smartload.records.text import beside, plural, shown, size, some, table

_LISTED = 12


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint holds; what `inspect` returns. Print it, or take `to_dict()`.

    Attributes:
        path: the name of the file or folder.
        format: what kind it is.
        parts: its state dicts, by dotted path; "" is the top.
        aside: everything beside them (an optimizer, arguments, foreign objects), by path.
        tags: device on which tensors lay when they were saved -> number of storages; loading does not need it.

    >>> import torch, smartload
    >>> print(smartload.inspect({"epoch": 3, "model": torch.nn.Linear(2, 1).state_dict()}))
    the dict in memory: memory
      model: 2 tensors, 3 numbers, 12 bytes
        dtypes:   float32
        names:    weight, bias
      beside:
        epoch: an int
      devices:    cpu (2)
    """

    path: str
    format: str
    parts: Mapping[str, Part]
    files: tuple[ByteReader, ...] = field(default=(), repr=False)
    records: tuple[Record, ...] = field(default=(), repr=False)
    aside: tuple[Aside, ...] = ()
    tags: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join([f"{self.path}: {self.format}", *self._lines()])

    def _lines(self) -> Iterator[str]:
        for path, part in self.parts.items():
            yield f"  {shown(path) or 'at the top'}: {_headline(part)}"
            yield from (f"    {label + ':':9} {text}" for label, text in _details(part))
        if self.aside:
            yield "  beside:"
            yield from (f"    {beside(item)}" for item in self.aside[:_LISTED])
            if len(self.aside) > _LISTED:
                yield f"    ... ({len(self.aside):,} in all)"
        if self.tags:
            yield f"  devices:    {_devices(self.tags)}"

    def to_dict(self) -> dict[str, object]:
        """Everything as plain data (for JSON): nested dicts and lists of str, int and float."""
        return {
            "path": self.path,
            "format": self.format,
            "parts": {path: _plain(part) for path, part in self.parts.items()},
            "aside": [item._asdict() for item in self.aside],
            "devices": dict(self.tags),
        }

    def _repr_html_(self) -> str:
        rows = []
        for path, part in self.parts.items():
            details = [f"{label}: {text}" for label, text in _details(part)]
            rows.append((shown(path) or "at the top", [_headline(part), *details]))
        if self.aside:
            rows.append(("beside", [beside(item) for item in self.aside[:_LISTED]]))
        if self.tags:
            rows.append(("devices", [_devices(self.tags)]))
        return table(f"{self.path}: {self.format}", rows)


def _devices(tags: Mapping[str, int]) -> str:
    return ", ".join(f"{shown(tag) or 'not said'} ({count:,})" for tag, count in sorted(tags.items()))


def _tensors(part: Part) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor by name."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, entry in part.entries.items():
        if isinstance(entry, (Span, Tiled)):
            found[name] = entry.shape, entry.dtype
        elif isinstance(entry, Held) and entry.spec is not None:
            found[name] = entry.spec.shape or (), entry.spec.dtype
    return found


def _place(entry: Entry) -> object:
    """Equal for two names of one tensor; None where that cannot be told."""
    return (
        entry
        if isinstance(entry, Tiled) or (isinstance(entry, Span) and entry.nbytes)
        else getattr(entry, "place", None)
    )


def _tied(part: Part) -> list[list[str]]:
    groups: dict[object, list[str]] = {}
    for name, entry in part.entries.items():
        if (place := _place(entry)) is not None:
            groups.setdefault(place, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _others(part: Part) -> dict[str, str]:
    """What the entries are that are no tensors."""
    found: dict[str, str] = {}
    for name, entry in part.entries.items():
        if isinstance(entry, Opaque):
            found[name] = entry.what
        elif isinstance(entry, Extra) or (isinstance(entry, Held) and entry.spec is None):
            found[name] = "an extra state"
    return found


def _totals(part: Part) -> tuple[int, int]:
    """Numbers and bytes, tied tensors counted once."""
    twice = {name for group in _tied(part) for name in group[1:]}
    tensors = [spec for name, spec in _tensors(part).items() if name not in twice]
    return (
        sum(math.prod(shape) for shape, _ in tensors),
        sum(math.prod(shape) * ITEMSIZE.get(dtype, 0) for shape, dtype in tensors),
    )


def _prefixes(part: Part) -> list[str]:
    """The path that all names begin with, and the wrappers' segments in names."""
    segments = {segment for name in part.entries for segment in name.split(".")[:-1]}
    whole = common_path(part.entries)
    return [*([f"{whole}."] if whole else []), *sorted((segments & WRAPPER_SEGMENTS) - set(whole.split(".")))]


def _headline(part: Part) -> str:
    numbers, nbytes = _totals(part)
    kind = "" if part.kind == "state dict" else f"{part.kind}, "
    return f"{kind}{plural(len(_tensors(part)), 'tensor')}, {plural(numbers, 'number')}, {size(nbytes)}"


def _details(part: Part) -> Iterator[tuple[str, str]]:
    dtypes = Counter(dtype for _, dtype in _tensors(part).values())
    counted = [f"{dtype} ({count:,})" if len(dtypes) > 1 else dtype for dtype, count in dtypes.most_common()]
    if counted:
        yield "dtypes", ", ".join(counted)
    if prefixes := _prefixes(part):
        yield "prefixes", ", ".join(map(shown, prefixes))
    if part.entries:
        yield "names", some(part.entries, _LISTED)
    if tied := _tied(part):
        groups = [" = ".join(map(shown, group[:4])) + (" = ..." if len(group) > 4 else "") for group in tied[:3]]
        yield "tied", "; ".join(groups) + (f"; ... ({len(tied):,} groups)" if len(tied) > 3 else "")
    reasons: dict[str, list[str]] = {}
    for name, what in _others(part).items():
        reasons.setdefault(what, []).append(name)
    for what, names in reasons.items():
        yield "no tensor", f"{some(names)}: {what}"


def _plain(part: Part) -> dict[str, object]:
    numbers, nbytes = _totals(part)
    tensors = {name: {"shape": list(shape), "dtype": dtype} for name, (shape, dtype) in _tensors(part).items()}
    return {
        "kind": part.kind,
        "numbers": numbers,
        "nbytes": nbytes,
        "tensors": tensors,
        "no_tensors": _others(part),
        "prefixes": _prefixes(part),
        "tied": _tied(part),
    }
