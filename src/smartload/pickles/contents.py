"""Read the inert notes of a pickle as dicts, tensors, modules and plain data, and find the state dicts among them.

`PickleContents` answers the questions that the walk in `reading.state_dicts` asks of each value.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping

from smartload.pickles.arrays import plain_data
from smartload.pickles.inert import Call, DictNote, Global, PersistentId, RawBytes, SetNote
from smartload.pickles.modules import MAX_DEPTH, class_name, global_name, is_module, module_part
from smartload.pickles.tensors import Tensors
from smartload.reading.files import BytesReader
from smartload.reading.limits import most_memory
from smartload.reading.state_dicts import TreeValues, article, explore
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import ITEMSIZE, ByteReader, Entry, Extra, Opaque, Part, Span, ZipRecord
from smartload.records.text import printable, with_article

_MAX_EXTRA = 200_000
"""Values in one module's extra state: usually a dict of a few numbers."""
_MAX_EXTRA_DEPTH = 60
"""Levels of containers in it: each takes up to three calls, and Python stops at 1,000 calls in all."""
_MAX_KEY = 1 << 60
"""A number that becomes a dict key must be smaller: the hash of an int is its remainder by 2^61 - 1, so larger ones can
be chosen to have one hash, and a dict of them takes quadratic time."""
_MAX_ARGS = 8
"""Arguments of a class of dicts that are looked at; a real one has none or one, as `collections.defaultdict`."""
_NOUNS = {"_reconstruct": "a numpy array", "scalar": "a numpy scalar", "_frombuffer": "a numpy array"}


class NotPlainError(Exception):
    """Raised where an extra state holds a value that is no plain data; `what` says what it is."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


class PickleContents(TreeValues):
    """The values of one pickle, as inert notes.

    Args:
        tensors: the tensors of the file.
        file: the file's name, for messages.
        nbytes: the size of the file.
    """

    most = 1 << 19  # torch writes at least 32 opcodes a tensor, so what it writes within MAX_OPS has no more

    def __init__(self, tensors: Tensors, file: str, nbytes: int = 0) -> None:
        self.file, self._tensors = file, tensors
        # Both by id of a note; the root of the pickle keeps all notes alive, so an id stays that of one note.
        self._modules: dict[int, Part] = {}
        self._holds_modules: dict[int, bool] = {}
        self._plain_data = _PlainData(tensors, most_memory(nbytes))

    def tensor(self, value: object) -> Entry | None:
        """Give the entry of a tensor or NumPy array, None for anything else."""
        return self._tensors.entry(value)

    def extra(self, value: object) -> Entry:
        """Give the entry of a module's extra state: an `Extra` where it is plain data, else an `Opaque`."""
        try:
            return Extra(self._plain_data.extra_state(value))
        except NotPlainError as error:
            return Opaque(error.what)

    def module(self, value: object) -> Part | None:
        """Give the state dict of a module, None for anything else."""
        if type(value) is not Call or not is_module(value):
            return None
        if id(value) not in self._modules:
            self._modules[id(value)] = module_part(value, self.tensor, self.noun, self.file)
        return self._modules[id(value)]

    def items(self, value: object) -> Mapping[str, object] | None:
        """Give the items of a dict whose keys are strings, None for anything else.

        An object counts as a dict if its class is a dict's, with its items, or if an attribute of it is a module (a
        trainer, say), with its attributes.
        """
        note = _dict_note(value)
        if note is None and type(value) is Call and type(value.state) is DictNote:
            if id(value) not in self._holds_modules:
                self._holds_modules[id(value)] = any(
                    type(item) is Call and is_module(item) for item in value.state.data.values()
                )
            note = value.state if self._holds_modules[id(value)] else None
        # With a single key that is no string it is no state dict; `odd_key` gives that key for the message.
        return None if note is None or note.pairs else note.data

    def odd_key(self, value: object) -> tuple[str, str] | None:
        """Give type and text of the first key of a dict that is no string: ('int', '7'); None where there is none."""
        note = _dict_note(value)
        if note is None or not note.pairs:
            return None
        key = _start_of_bytes(note.pairs[0][0])
        if type(key) is bytes:
            return "bytes", printable(ascii(key))
        if type(key) is int or type(key) is float:
            # An int of more than 4,300 digits has no str(): Python raises ValueError.
            return type(key).__name__, printable(str(key)) if abs(key) < 1e15 else "..."
        return (class_name(key) if type(key) is Call else type(key).__name__), "..."

    def repeated(self, value: object) -> str | None:
        """Give a key that a dict has twice, None where there is none."""
        note = _dict_note(value)
        return note.repeated[0] if note is not None and note.repeated else None

    def versions(self, value: object) -> Mapping[str, Mapping[str, object]] | None:
        """Give the module versions in the `_metadata` of a state dict: {'fc': {'version': 1}}; None without any.

        Nothing else of it is passed on: with `assign_to_params_buffers` in it, torch's `load_state_dict` would replace
        the model's Parameters, against `assign=False`.
        """
        state = value.state if type(value) is DictNote or type(value) is Call else None
        metadata = state.data.get("_metadata") if type(state) is DictNote else None
        if type(metadata) is not DictNote:
            return None
        versions: dict[str, Mapping[str, object]] = {}
        for prefix, local in metadata.data.items():
            version = local.data.get("version") if type(local) is DictNote else None
            # torch compares it with numbers; whatever else would raise there. No model has modules so deep.
            if type(version) is int and prefix.count(".") <= MAX_DEPTH:
                versions[prefix] = {"version": version}
        return versions

    def noun(self, value: object) -> str:
        """Say what a value is, with its article: 'a dict of 3'."""
        if type(value) is RawBytes:
            return "a bytearray" if value.mutable else "a bytes"
        value = _start_of_bytes(value)
        if type(value) is Call:
            # NumPy's values are made by functions whose names mean nothing to a reader of the message.
            name = value.func.name if type(value.func) is Global and value.func.module.startswith("numpy") else ""
            return _NOUNS.get(name) or with_article(class_name(value))
        if type(value) is DictNote:
            return article("dict", len(value.data) + len(value.pairs or ()))
        if type(value) is list or type(value) is tuple:
            return article(type(value).__name__, len(value))
        if type(value) is SetNote:
            return article("set", len(value.items))
        if type(value) is Global:
            return f"the name {global_name(value)}"
        if type(value) is PersistentId:
            return "a bare storage"
        return "None" if value is None else with_article(type(value).__name__)

    def is_list(self, value: object) -> bool:
        """Tell whether `value` is a list."""
        return type(value) is list

    def inner(self, value: object) -> Iterable[object]:
        """Give all values directly inside another one."""
        if type(value) is list or type(value) is tuple:
            return value
        if type(value) is SetNote:
            return value.items
        if type(value) is DictNote:
            return _in_dict(value)
        if type(value) is Call:
            # All five: a tensor may be an argument, an attribute, an item, or belong to the object that is called.
            return (value.func, value.args, value.state, value.items, value.appends)
        return ()

    def unseen(self) -> int | None:
        """Count the storages of the file of which no tensor has been asked for yet; None where that is not known."""
        return self._tensors.unseen()


def _in_dict(value: DictNote) -> Iterator[object]:
    """Give the values of a dict, its keys that are no strings, and its attributes."""
    yield from value.data.values()
    for pair in value.pairs or ():
        yield from pair
    yield value.state


def _dict_note(value: object) -> DictNote | None:
    """Give the dict that `value` is, or the items of an object whose class is a dict's; None for anything else."""
    if type(value) is not Call or value.items is None:
        return value if type(value) is DictNote else None
    # A class may take items as arguments, too: collections.Counter({"a": 1}). All of them, only the class knows.
    args = value.args if type(value.args) is tuple else ()
    if len(args) > _MAX_ARGS or any(type(arg) in (DictNote, list, tuple, SetNote, Call) for arg in args):
        return None
    return value.items


def _as_bytes(value: object) -> object:
    """Give bytes or a bytearray where `value` stands for them, in any protocol; else `value` itself."""
    if type(value) is RawBytes:
        return bytearray(value.raw) if value.mutable else bytes(value.raw)
    data = plain_data(value) if type(value) is Call else None
    # A text with other characters is written by nobody, and not worth an error where values are only named.
    return value if data is None else data.encode("latin1", "replace") if isinstance(data, str) else data


def _start_of_bytes(value: object) -> object:
    """Give the first bytes where `value` stands for bytes; else `value` itself.

    For messages, which one value may be named in many times: a copy of all of it would be made each time.
    """
    if type(value) is RawBytes:
        return bytearray(value.raw[:100]) if value.mutable else bytes(value.raw[:100])
    data = plain_data(value) if type(value) is Call else None
    return value if data is None else data[:100].encode("latin1", "replace") if isinstance(data, str) else data[:100]  # type: ignore[index]


class _PlainData:
    """Converts notes into the plain data that they stand for. A value that is shared in an extra state stays shared.

    Args:
        tensors: the tensors of the file.
        room: the bytes that all extra states of the file may take.
    """

    def __init__(self, tensors: Tensors, room: int) -> None:
        self._tensors, self._room = tensors, room
        self._made: dict[int, object] = {}  # by id of the note; a shared value is converted once, or it could multiply
        self._count = 0

    def extra_state(self, value: object) -> object:
        """Convert a whole extra state; NotPlainError where it holds anything else."""
        self._made.clear()  # each extra state is read by itself, so that what two of them share is there twice
        return self.convert(value, 0)

    def convert(self, value: object, depth: int) -> object:
        """Convert `value`, which lies `depth` levels down; a tensor gives its span. NotPlainError for all else."""
        if value is None or type(value) in (bool, int, float, str, bytes):
            return value
        if id(value) in self._made:
            return self._made[id(value)]
        self._count += 1
        if depth > _MAX_EXTRA_DEPTH or self._count > _MAX_EXTRA:  # also ends at a value that contains itself
            raise NotPlainError("a value nested too deep or too large")
        self._made[id(value)] = made = self._container(value, depth + 1)
        return made

    def _take(self, nbytes: int, what: str) -> None:
        """Count bytes that the value will take in memory; NotPlainError where the extra states would take too many."""
        self._room -= nbytes
        if self._room < 0:
            raise NotPlainError(what)

    def _container(self, value: object, depth: int) -> object:
        """Convert a container whose items lie `depth` levels down, or find the span of a tensor."""
        if type(value) is RawBytes:
            self._take(len(value.raw), "more bytes than the file has")
            return _as_bytes(value)
        if type(value) is list:
            return [self.convert(item, depth) for item in value]
        if type(value) is tuple:
            return tuple(self.convert(item, depth) for item in value)
        if type(value) is DictNote:
            return self._dict(value, depth)
        if type(value) is SetNote:
            return {self._key(item, depth) for item in value.items}
        if type(value) is not Call:
            raise NotPlainError("a reference to a name" if type(value) is Global else "a bare storage")
        entry = self._tensors.tensor(value)
        if isinstance(entry, Span):
            # A stride of 0 repeats an element without end, and here no model's shape limits it.
            self._take(math.prod(entry.shape) * ITEMSIZE[entry.dtype], "a tensor that is far larger than its data")
            return entry
        if isinstance(entry, Opaque):
            raise NotPlainError(entry.what)
        return self._result(value, depth)

    def _result(self, value: Call, depth: int) -> object:
        """Convert a call of which the result is known, without the call: one that gives bytes or a set."""
        raw = _as_bytes(value)
        if type(raw) is bytes:
            self._take(len(raw), "more bytes than the file has")
            return raw
        args = value.args if type(value.args) is tuple else ()
        # Protocols before 4 have no opcode for a set.
        if class_name(value) == "set" and len(args) == 1 and type(args[0]) is list:
            return {self._key(item, depth) for item in args[0]}
        raise NotPlainError(with_article(class_name(value)))

    def _dict(self, value: DictNote, depth: int) -> object:
        made: dict[object, object] = OrderedDict() if value.ordered else {}
        for key, item in value.data.items():
            made[key] = self.convert(item, depth)
        for other, item in value.pairs or ():
            made[self._key(other, depth)] = self.convert(item, depth)
        return made

    def _key(self, value: object, depth: int) -> object:
        """Convert a dict key or an element of a set: only values whose hash is harmless, so no tuple."""
        if type(value) is RawBytes or type(value) is Call:
            value = self.convert(value, depth)
        if value is None or type(value) in (bool, str, bytes):
            return value
        if (type(value) is int or type(value) is float) and abs(value) < _MAX_KEY:
            return value
        raise NotPlainError("a dict with keys that are no plain values")


def pickle_checkpoint(
    file: ByteReader,
    form: str,
    root: object,
    tensors: Tensors,
    records: Iterable[ZipRecord] = (),
    tags: Mapping[str, int] | None = None,
) -> Checkpoint:
    """Find the state dicts below the root of a pickle, and make the checkpoint of them.

    Args:
        file: the file that the pickle is part of.
        form: the name of its format.
        root: the value of the pickle.
        tensors: the tensors of the file.
        records: the zip records that hold storages.
        tags: device -> number of storages that lay on it when they were saved.

    Raises:
        UnreadableError: nothing in it can be loaded; the reason says what it is instead.
    """
    parts, aside = explore(root, PickleContents(tensors, file.name, file.size))
    # Latin-1 text that stands for bytes is encoded only now, and only where a tensor under a key lies in it.
    used = {entry.file for part in parts.values() for entry in part.entries.values() if isinstance(entry, Span)}
    held = [BytesReader(raw, file.name) for raw in tensors.held(used)]
    return Checkpoint(file.name, form, parts, (file, *held), tuple(records), aside, dict(tags or {}))
