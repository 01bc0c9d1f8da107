"""TorchScript archives, scripted or traced: the weights, from the names and the data. The program is not run."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from smartload.errors import UnreadableError
from smartload.formats.torch_save import TorchZip
from smartload.pickles.contents import PickleContents
from smartload.pickles.inert import Call, DictNote, Global
from smartload.pickles.modules import MAX_DEPTH, MAX_NAMES, MAX_TEXT, class_name
from smartload.pickles.storages import find_storages
from smartload.pickles.tensors import Tensors
from smartload.reading import zip as archive
from smartload.reading.limits import ITEM_COST, Budget
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import Beside, ByteReader, Entry, Part, ZipRecord
from smartload.records.problems import Problem

MAX_CODE = 1 << 26

_CLASS = re.compile(
    r"^class (\w+)(\(Module\))?.*:\n(?:  __parameters__ = \[(.*)\]\n)?(?:  __buffers__ = \[(.*)\]\n)?", re.MULTILINE
)
_NAME = re.compile(r'"([^"\\]+)"')


def sniff_zip(names: Collection[str]) -> bool:
    """Whether a zip with these records is a program of TorchScript."""
    return "constants.pkl" in names


def open_zip(file: ByteReader, directory: archive.Directory) -> Checkpoint:
    """The names and spans of the program's parameters and buffers."""
    records = TorchZip(file, directory)
    root, persistent_ids, _ = records.pickle("data.pkl")
    known = find_storages(persistent_ids, records.storage, file.name)
    tensors = Tensors(known.storages, file.name)
    classes = _Classes(file, records.entries)
    entries = _state_dict(root, PickleContents(tensors, file.name), classes)
    left = tensors.unseen()
    aside = (Beside("", "tensors that are neither parameters nor buffers of the program", left),) if left else ()
    name = class_name(root) if type(root) is Call else "object"
    part = Part(entries, kind=f"module {name}")
    return Checkpoint(file.name, "TorchScript", {"": part}, (file,), tuple(records.used.values()), aside, known.tags)


class _Classes:
    """What the program's own text says of its classes: the names of their parameters and buffers."""

    def __init__(self, file: ByteReader, entries: Mapping[str, ZipRecord]) -> None:
        self._file, self._entries, self._left = file, entries, MAX_CODE
        self._read: dict[str, dict[str, frozenset[str] | None]] = {}

    def tensors(self, cls: Global) -> frozenset[str] | None:
        """The names that a state dict takes of an object; None where the text does not say."""
        if cls.module not in self._read:
            self._read[cls.module] = dict(self._classes(f"code/{cls.module.replace('.', '/')}.py"))
        return self._read[cls.module].get(cls.name)

    def _classes(self, name: str) -> Iterator[tuple[str, frozenset[str] | None]]:
        entry = self._entries.get(name)
        if entry is None or entry.nbytes > self._left:
            return
        self._left -= entry.nbytes
        text = archive.read_record(self._file, entry).decode("utf-8", "replace")
        known = "  __buffers__ = [" in text  # before torch 1.5 the text named the parameters only
        for cls, is_module, parameters, buffers in _CLASS.findall(text):
            names = frozenset(_NAME.findall(parameters + buffers))
            yield cls, names if known or not is_module else None  # of a class that is no module: none


def _state_dict(root: object, kinds: PickleContents, classes: _Classes) -> dict[str, Entry]:
    """Parameters and buffers by dotted name; an object shared by two names gives both, as in torch."""
    if type(root) is not Call or type(root.state) is not DictNote:
        raise UnreadableError(Problem("no_weights", kinds.file, {"what": kinds.noun(root)}))
    entries: dict[str, Entry] = {}
    large = Problem("module_large", kinds.file, {"limit": MAX_NAMES})
    work = Budget(MAX_TEXT, large)
    path = [("", root.state, _attributes(root, classes))]
    on_path = {id(root.state)}
    while path:
        prefix, state, items = path[-1]
        name, value = next(items, ("", None))
        work.take(ITEM_COST + len(prefix) + len(name))
        if not name:
            on_path.discard(id(state))
            path.pop()
        elif (entry := kinds.tensor(value)) is not None:
            entries[prefix + name] = entry
        elif type(value) is Call and type(value.state) is DictNote:
            if id(value.state) in on_path:
                raise UnreadableError(Problem("module_itself", kinds.file))
            if len(path) >= MAX_DEPTH:
                raise UnreadableError(large)
            on_path.add(id(value.state))
            path.append((f"{prefix}{name}.", value.state, _attributes(value, classes)))
    return entries


def _attributes(value: Call, classes: _Classes) -> Iterator[tuple[str, object]]:
    """What of an object's attributes may go into a state dict: its tensors and the objects below it."""
    assert type(value.state) is DictNote
    known = classes.tensors(value.func) if type(value.func) is Global else None
    for name, item in value.state.data.items():
        if name and (known is None or name in known or (type(item) is Call and type(item.state) is DictNote)):
            yield name, item
