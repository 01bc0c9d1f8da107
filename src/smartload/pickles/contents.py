"""How the values of a pickled file look to the walk over it: inert notes, read as dicts, tensors and modules."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping

from smartload.pickles.arrays import plain_data
from smartload.pickles.inert import Call, DictNote, Global, PersistentId, RawBytes, SetNote
from smartload.pickles.modules import class_name, is_module, module_part
from smartload.pickles.tensors import Tensors
from smartload.reading.files import BytesReader
from smartload.reading.state_dicts import TreeValues, article, explore
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import ITEMSIZE, ByteReader, Entry, Extra, Opaque, Part, Span, ZipRecord
from smartload.records.text import printable, with_article

_MAX_EXTRA, _MAX_EXTRA_DEPTH = 200_000, 60
_MAX_GROWTH = 1 << 24
"""Bytes by which a tensor that repeats its data may outgrow it, where no model says how large it has to be."""
_MAX_KEY = 1 << 60
"""Numbers beyond it can be chosen to have one hash."""
_NOUNS = {"_reconstruct": "a numpy array", "scalar": "a numpy scalar", "_frombuffer": "a numpy array"}


class Foreign(Exception):
    """An extra state holds something that is no plain data; `what` says what."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


class PickleContents(TreeValues):
    """The inert notes of a pickle."""

    most = 1 << 19  # the opcodes of one pickle give no more tensors

    def __init__(self, tensors: Tensors, file: str) -> None:
        self.file, self._tensors = file, tensors
        self._modules: dict[int, Part] = {}  # by identity: the notes live as long as this
        self._holders: dict[int, bool] = {}
        self._plain = _Plain(tensors)

    def tensor(self, value: object) -> Entry | None:
        """The entry of a tensor, None for anything else."""
        return self._tensors.entry(value)

    def extra(self, value: object) -> Entry:
        """The entry of a module's extra state: plain data, or what stands in its way."""
        try:
            return Extra(self._plain.of(value, 0))
        except Foreign as foreign:
            return Opaque(foreign.what)

    def module(self, value: object) -> Part | None:
        """The state dict of a module, None for anything else."""
        if type(value) is not Call or not is_module(value):
            return None
        if id(value) not in self._modules:
            self._modules[id(value)] = module_part(value, self.tensor, self.noun, self.file)
        return self._modules[id(value)]

    def items(self, value: object) -> Mapping[str, object] | None:
        """The items of a dict with names for keys, of an object of a dict's subclass, or of one that holds modules."""
        found = _as_map(value)
        if found is None and type(value) is Call and type(value.state) is DictNote:
            if id(value) not in self._holders:
                self._holders[id(value)] = any(
                    type(item) is Call and is_module(item) for item in value.state.data.values()
                )
            found = value.state if self._holders[id(value)] else None
        return None if found is None or found.pairs else found.data

    def odd_key(self, value: object) -> tuple[str, str] | None:
        """Type and text of the first key that is no string."""
        found = _as_map(value)
        if found is None or not found.pairs:
            return None
        key = _bytes_of(found.pairs[0][0])
        if type(key) is bytes:
            return "bytes", printable(ascii(key[:100]))
        if type(key) is int or type(key) is float:
            return type(key).__name__, printable(str(key)) if abs(key) < 1e15 else "..."
        return (class_name(key) if type(key) is Call else type(key).__name__), "..."

    def repeated(self, value: object) -> str | None:
        """A name that a dict gives twice."""
        found = _as_map(value)
        return found.repeated[0] if found is not None and found.repeated else None

    def versions(self, value: object) -> Mapping[str, Mapping[str, object]] | None:
        """The module versions in a state dict's `_metadata`, and nothing else of it."""
        state = value.state if type(value) is DictNote or type(value) is Call else None
        found = state.data.get("_metadata") if type(state) is DictNote else None
        if type(found) is not DictNote:
            return None
        versions: dict[str, Mapping[str, object]] = {}
        for prefix, local in found.data.items():
            version = local.data.get("version") if type(local) is DictNote else None
            if type(version) is int:
                versions[prefix] = {"version": version}
        return versions

    def noun(self, value: object) -> str:
        """What a value is, with its article."""
        if type(value) is RawBytes:
            return "a bytearray" if value.mutable else "a bytes"
        value = _bytes_of(value)
        if type(value) is Call:
            name = value.func.name if type(value.func) is Global and "numpy" in value.func.module else ""
            return _NOUNS.get(name) or with_article(class_name(value))
        if type(value) is DictNote:
            return article("dict", len(value.data) + len(value.pairs or ()))
        if type(value) is list or type(value) is tuple:
            return article(type(value).__name__, len(value))
        if type(value) is SetNote:
            return article("set", len(value.items))
        if type(value) is Global:
            return f"the name {printable(f'{value.module}.{value.name}')}"
        if type(value) is PersistentId:
            return "a bare storage"
        return "None" if value is None else with_article(type(value).__name__)

    def is_list(self, value: object) -> bool:
        """Whether `value` is a list."""
        return type(value) is list

    def inner(self, value: object) -> Iterable[object]:
        """All values directly inside another one."""
        if type(value) is list or type(value) is tuple:
            return value
        if type(value) is SetNote:
            return value.items
        if type(value) is DictNote:
            return _in_map(value)
        if type(value) is Call:
            return (value.func, value.args, value.state, value.items, value.appends)
        return ()

    def unseen(self) -> int | None:
        """How many storages of the file no tensor has been asked of yet."""
        return self._tensors.unseen()


def _in_map(value: DictNote) -> Iterator[object]:
    yield from value.data.values()
    for pair in value.pairs or ():
        yield from pair
    yield value.state


def _as_map(value: object) -> DictNote | None:
    return value if type(value) is DictNote else value.items if type(value) is Call else None


def _bytes_of(value: object) -> object:
    """Bytes where `value` holds them, or is the call by which protocol 2 writes them; else `value`."""
    if type(value) is RawBytes:
        return bytearray(value.raw) if value.mutable else bytes(value.raw)
    found = plain_data(value) if type(value) is Call else None
    return value if found is None else found.encode("latin1", "replace") if isinstance(found, str) else found


class _Plain:
    """Turns notes into the plain data that they stand for; shared values stay shared."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors, self._made, self._count = tensors, dict[int, object](), 0

    def of(self, value: object, depth: int) -> object:
        """The plain form of `value`; Foreign where it has none."""
        if type(value) is RawBytes:
            return _bytes_of(value)
        if value is None or type(value) in (bool, int, float, str, bytes):
            return value
        if id(value) in self._made:
            return self._made[id(value)]
        self._count += 1
        if depth > _MAX_EXTRA_DEPTH or self._count > _MAX_EXTRA:  # also where a value contains itself
            raise Foreign("a value nested too deep or too large")
        self._made[id(value)] = made = self._new(value, depth + 1)
        return made

    def _new(self, value: object, depth: int) -> object:
        if type(value) is list:
            return [self.of(item, depth) for item in value]
        if type(value) is tuple:
            return tuple(self.of(item, depth) for item in value)
        if type(value) is DictNote:
            return self._dict(value, depth)
        if type(value) is SetNote:
            return {self._key(item) for item in value.items}
        if type(value) is not Call:
            raise Foreign("a reference to a name" if type(value) is Global else "a bare storage")
        entry = self._tensors.tensor(value)
        if isinstance(entry, Span):
            if math.prod(entry.shape) * ITEMSIZE[entry.dtype] > entry.nbytes + _MAX_GROWTH:
                raise Foreign("a tensor that is far larger than its data")
            return entry
        if isinstance(entry, Opaque):
            raise Foreign(entry.what)
        return self._called(value)

    def _called(self, value: Call) -> object:
        raw = _bytes_of(value)
        if type(raw) is bytes:
            return raw
        args = value.args if type(value.args) is tuple else ()
        if class_name(value) == "set" and len(args) == 1 and type(args[0]) is list:
            return {self._key(item) for item in args[0]}
        raise Foreign(with_article(class_name(value)))

    def _dict(self, value: DictNote, depth: int) -> object:
        made: dict[object, object] = OrderedDict() if value.ordered else {}
        for key, item in value.data.items():
            made[key] = self.of(item, depth)
        for odd, item in value.pairs or ():
            made[self._key(odd)] = self.of(item, depth)
        return made

    def _key(self, value: object) -> object:
        value = _bytes_of(value)
        if value is None or type(value) in (bool, str, bytes):
            return value
        if (type(value) is int or type(value) is float) and abs(value) < _MAX_KEY:
            return value
        raise Foreign("a dict with keys that are no plain values")


def pickle_checkpoint(
    file: ByteReader,
    form: str,
    root: object,
    tensors: Tensors,
    records: Iterable[ZipRecord] = (),
    tags: Mapping[str, int] | None = None,
) -> Checkpoint:
    """What lies below the root of a pickle."""
    parts, aside = explore(root, PickleContents(tensors, file.name))
    used = {entry.file for part in parts.values() for entry in part.entries.values() if isinstance(entry, Span)}
    held = [BytesReader(raw, file.name) for raw in tensors.held(used)]
    return Checkpoint(file.name, form, parts, (file, *held), tuple(records), aside, dict(tags or {}))
