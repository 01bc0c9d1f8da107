"""Hold what a checkpoint has: its state dicts, and what lies beside them; as data, as words, as html. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from smartload.records.entries import (
    ITEMSIZE,
    Beside,
    ByteReader,
    Entry,
    Extra,
    FileKey,
    InMemory,
    Opaque,
    Part,
    Span,
    Tiled,
    ZipRecord,
)
from smartload.records.keys import common_path, join
from smartload.records.text import beside_line, first_few, for_console, html_table, plural, printable, size_text
from smartload.records.wrappers import SEGMENTS

_LISTED = 12
"""Names of one part, and things beside the parts, that are printed; `to_dict` has all."""


# Two views of the same keys: `match` works on the keys of parts, `load` looks entries up by dotted key.
class _Index(NamedTuple):
    """The keys of a checkpoint, by part, and its entries by dotted name."""

    keys: Mapping[str, tuple[FileKey, ...]]
    entries: Mapping[str, Entry]
    twice: frozenset[str]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint holds, as `inspect` returns it; no tensor data was read for it, and nothing was run.

    Print it for people, show it in a notebook, or take `to_dict()` for programs.

    Attributes:
        path: the name of the file or folder, printable.
        format: which format it has ("torch zip", "safetensors", "2 shards of safetensors").
        parts: its state dicts, by dotted path in the file; "" is the top. Each has `entries` by
            key; the `spec` of an entry is a tensor's shape and dtype, None for what is no tensor.
        aside: everything beside them (an optimizer's state, arguments, other objects): its path, what it is, and how
            many tensors are in it.
        tags: device on which tensors were saved -> number of their storages. Loading does not need these devices.
        header: the texts in the header of a .safetensors file, its `__metadata__`; of shards, those that do not differ.
        files: the open files while a load reads them; empty in what `inspect` returns.
        records: the records of zips that hold tensors, with their checksums; likewise. Those of deflated ones were
            compared when they were inflated.

    >>> import torch, smartload
    >>> print(smartload.inspect({"epoch": 3, "model": torch.nn.Linear(2, 1).state_dict()}))
    the dict in memory: memory
      model: 2 tensors, 3 elements, 12 bytes
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
    records: tuple[ZipRecord, ...] = field(default=(), repr=False)
    aside: tuple[Beside, ...] = ()
    tags: Mapping[str, int] = field(default_factory=dict)
    header: Mapping[str, str] = field(default_factory=dict)
    # A list, because a frozen dataclass with slots has no other place for what is computed later.
    _index: list[_Index] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def keys(self) -> Mapping[str, tuple[FileKey, ...]]:
        """Path of each part -> its keys."""
        return self._indexed().keys

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Dotted name of each key -> its entry."""
        return self._indexed().entries

    @property
    def twice(self) -> frozenset[str]:
        """Dotted names that two entries have: a key 'm.w' at the top, and the key 'w' of a dict 'm'.

        Which of the two such a name means nobody can say: `entries` has one of them, and no load may take it.
        """
        return self._indexed().twice

    def _indexed(self) -> _Index:
        """Make the dotted names of all keys, once, when they are first asked for; no other function makes them."""
        # Not sooner: a hostile file may have a million keys below a path of a million characters. It is refused by the
        # length of its names, which is known without making them.
        if not self._index:
            keys: dict[str, tuple[FileKey, ...]] = {}
            entries: dict[str, Entry] = {}
            twice: set[str] = set()
            for path, part in self.parts.items():
                prefix, part_keys = f"{path}." if path else "", []
                for key, entry in part.entries.items():
                    dotted = prefix + key
                    part_keys.append(FileKey(dotted, path, key, entry.spec))
                    if dotted in entries:
                        twice.add(dotted)
                    entries[dotted] = entry
                keys[path] = tuple(part_keys)
            self._index.append(_Index(keys, entries, frozenset(twice)))
        return self._index[0]

    def metadata(self) -> dict[str, Mapping[str, object]]:
        """Map the dotted path of each module to its entry in the parts' `_metadata`: its version, in most cases."""
        # Modules of different parts differ in their dotted paths, so that no entry replaces another.
        parts = self.parts.items()
        return {join(path, module): entry for path, part in parts for module, entry in (part.metadata or {}).items()}

    def __str__(self) -> str:
        return for_console("\n".join([f"{self.path}: {self.format}", *self._lines()]))

    def _lines(self) -> Iterator[str]:
        for path, part in self.parts.items():
            yield f"  {printable(path) or 'at the top'}: {_headline(part)}"
            yield from (f"    {label + ':':9} {text}" for label, text in _details(part))
        if self.aside:
            yield "  beside:"
            yield from (f"    {beside_line(item)}" for item in self.aside[:_LISTED])
            if len(self.aside) > _LISTED:
                yield f"    ... ({len(self.aside):,} in all)"
        if self.tags:
            yield f"  devices:    {_devices(self.tags)}"
        if self.header:
            yield f"  metadata:   {_texts(self.header)}"

    def to_dict(self) -> dict[str, object]:
        """Give everything as plain data (for JSON): nested dicts and lists of str and int.

        >>> import torch, smartload
        >>> smartload.inspect(torch.nn.Linear(2, 1).state_dict()).to_dict()["parts"][""]["elements"]
        3
        """
        return {
            "path": self.path,
            "format": self.format,
            "parts": {path: _plain(part) for path, part in self.parts.items()},
            "aside": [item._asdict() for item in self.aside],
            "devices": dict(self.tags),
            "metadata": dict(self.header),
        }

    def _repr_html_(self) -> str:
        # The printed lines again, those of one part as one row.
        rows = []
        for path, part in self.parts.items():
            details = [f"{label}: {text}" for label, text in _details(part)]
            rows.append((printable(path) or "at the top", [_headline(part), *details]))
        if self.aside:
            rows.append(("beside", [beside_line(item) for item in self.aside[:_LISTED]]))
        if self.tags:
            rows.append(("devices", [_devices(self.tags)]))
        if self.header:
            rows.append(("metadata", [_texts(self.header)]))
        return html_table(f"{self.path}: {self.format}", rows)


def _devices(tags: Mapping[str, int]) -> str:
    """List the devices on which tensors were saved, with the number of storages."""
    return ", ".join(f"{printable(tag) or 'unknown'} ({count:,})" for tag, count in sorted(tags.items()))


def _texts(header: Mapping[str, str]) -> str:
    """List the texts in a header, the first few of them, each cut: 'format=pt, author=me'."""
    texts = [printable(f"{key}={text}") for key, text in list(header.items())[:_LISTED]]
    return ", ".join(texts) + (f", ... ({len(header):,} in all)" if len(header) > _LISTED else "")


def _tensors(part: Part) -> dict[str, tuple[tuple[int, ...], str]]:
    """Map each key of a tensor to its shape and dtype."""
    tensors: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, entry in part.entries.items():
        if isinstance(entry, (Span, Tiled)):
            tensors[name] = entry.shape, entry.dtype
        elif isinstance(entry, InMemory) and entry.spec is not None:
            tensors[name] = entry.spec.shape or (), entry.spec.dtype
    return tensors


def _memory(entry: Entry) -> object:
    """Give what is equal for two keys of one tensor; None where that cannot be told."""
    # Two empty tensors may begin at one byte without being one.
    if isinstance(entry, Tiled) or (isinstance(entry, Span) and entry.nbytes):
        return entry
    return entry.memory if isinstance(entry, InMemory) else None


def _tied(part: Part) -> list[list[str]]:
    """Give the groups of keys that are one tensor."""
    groups: dict[object, list[str]] = {}
    for name, entry in part.entries.items():
        if (memory := _memory(entry)) is not None:
            groups.setdefault(memory, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _others(part: Part) -> dict[str, str]:
    """Map each key of a value that is no tensor to what it is."""
    others: dict[str, str] = {}
    for name, entry in part.entries.items():
        if isinstance(entry, Opaque):
            others[name] = entry.what
        elif isinstance(entry, Extra) or (isinstance(entry, InMemory) and entry.spec is None):
            others[name] = "an extra state"
    return others


def _totals(part: Part) -> tuple[int, int]:
    """Count the elements and bytes of a part, those of tied tensors once."""
    # All but the first key of each group.
    twice = {name for group in _tied(part) for name in group[1:]}
    tensors = [spec for name, spec in _tensors(part).items() if name not in twice]
    # By shape, not by the bytes in the file: these are what a model takes, whatever views or padding the file has.
    return (
        sum(math.prod(shape) for shape, _ in tensors),
        sum(math.prod(shape) * ITEMSIZE.get(dtype, 0) for shape, dtype in tensors),
    )


def _prefixes(part: Part) -> list[str]:
    """Give the prefix that all keys have, and the wrappers' segments elsewhere in keys."""
    segments = {segment for name in part.entries for segment in name.split(".")[:-1]}
    common = common_path(part.entries)
    return [*([f"{common}."] if common else []), *sorted((segments & SEGMENTS) - set(common.split(".")))]


def _headline(part: Part) -> str:
    """Sum a part up: '2 tensors, 3 elements, 12 bytes'."""
    elements, nbytes = _totals(part)
    kind = "" if part.kind == "state dict" else f"{part.kind}, "
    return f"{kind}{plural(len(_tensors(part)), 'tensor')}, {plural(elements, 'element')}, {size_text(nbytes)}"


def _details(part: Part) -> Iterator[tuple[str, str]]:
    """Give the lines on a part, each as its label and its text."""
    # The count only where there are several: the headline has it already.
    dtypes = Counter(dtype for _, dtype in _tensors(part).values())
    counted = [f"{dtype} ({count:,})" if len(dtypes) > 1 else dtype for dtype, count in dtypes.most_common()]
    if counted:
        yield "dtypes", ", ".join(counted)
    # What `smart_load` sees through or removes, for people who load by hand.
    if prefixes := _prefixes(part):
        yield "prefixes", ", ".join(map(printable, prefixes))
    if part.entries:
        yield "names", first_few(part.entries, _LISTED)
    if tied := _tied(part):
        groups = [" = ".join(map(printable, group[:4])) + (" = ..." if len(group) > 4 else "") for group in tied[:3]]
        yield "tied", "; ".join(groups) + (f"; ... ({len(tied):,} groups)" if len(tied) > 3 else "")
    # By what they are: a file may hold a thousand extra states.
    reasons: dict[str, list[str]] = {}
    for name, what in _others(part).items():
        reasons.setdefault(what, []).append(name)
    for what, names in reasons.items():
        yield "no tensor", f"{first_few(names)}: {what}"


def _plain(part: Part) -> dict[str, object]:
    """Give a part as plain data, for `to_dict`."""
    elements, nbytes = _totals(part)
    tensors = {name: {"shape": list(shape), "dtype": dtype} for name, (shape, dtype) in _tensors(part).items()}
    return {
        "kind": part.kind,
        "elements": elements,
        "nbytes": nbytes,
        "tensors": tensors,
        "no_tensors": _others(part),
        "prefixes": _prefixes(part),
        "tied": _tied(part),
    }
