"""Open TorchScript archives, scripted or traced: their parameters and buffers. The program in them is not run.

`data.pkl` holds the objects of the program, read as inert notes. Which of an object's tensors are its parameters and
buffers stands in the text of its class, below `code/`; the text is searched for those lists, nothing more.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from smartload.errors import UnreadableError
from smartload.formats.torch_save import TorchZip
from smartload.pickles.contents import PickleContents
from smartload.pickles.inert import Call, DictNote, Global
from smartload.pickles.modules import MAX_DEPTH, MAX_TEXT, class_name
from smartload.pickles.storages import find_storages
from smartload.pickles.tensors import Tensors
from smartload.reading import zip as archive
from smartload.reading.limits import ITEM_COST, Budget
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import Beside, ByteReader, Entry, Part, ZipRecord
from smartload.records.problems import Problem

# Bytes of the texts of all classes together. The text may be deflated, so that a small archive can hold a flood of it.
MAX_CODE = 1 << 26

# The head of a class as torch writes it: its name, whether it is a module, and the two lists where it has them. No two
# parts of the pattern match the same letters: a name that each cut of was tried with every end would take the square.
_CLASS = re.compile(
    r"^class (\w+)(?!\w)(\(Module\))?.*:\n(?:  __parameters__ = \[(.*)\]\n)?(?:  __buffers__ = \[(.*)\]\n)?",
    re.MULTILINE,
)
_QUOTED_NAME = re.compile(r'"([^"\\]+)"')


def sniff_zip(names: Collection[str]) -> bool:
    """Tell whether a zip with records of these `names` is a program of TorchScript: only those have `constants.pkl`."""
    return "constants.pkl" in names


def open_zip(file: ByteReader, directory: archive.Directory) -> Checkpoint:
    """Read the names and spans of the parameters and buffers of the program in the zip `file`.

    Raises:
        UnreadableError: the archive is damaged, its root is no object, or the object contains itself or is too large.
    """
    records = TorchZip(file, directory)
    root, persistent_ids, _ = records.pickle("data.pkl")
    storages, tags = find_storages(persistent_ids, records.storage, file.name)
    tensors = Tensors(storages, file.name)
    classes = _ClassTexts(file, records.entries)
    entries = _state_dict(root, PickleContents(tensors, file.name), classes)
    left = tensors.unseen()
    aside = (Beside("", "tensors that are neither parameters nor buffers of the program", left),) if left else ()
    name = class_name(root) if type(root) is Call else "object"
    part = Part(entries, kind=f"module {name}")
    return Checkpoint(file.name, "TorchScript", {"": part}, (file,), tuple(records.used.values()), aside, tags)


class _ClassTexts:
    """The texts of the program's classes: which attributes of an object are its parameters and buffers.

    A text is read when the first object of a class in it is met, and then kept.
    """

    def __init__(self, file: ByteReader, entries: Mapping[str, ZipRecord]) -> None:
        self._file, self._entries, self._left = file, entries, MAX_CODE
        # Module of the class -> name of the class -> names of its parameters and buffers.
        self._names: dict[str, dict[str, frozenset[str] | None]] = {}

    def tensor_names(self, cls: Global) -> frozenset[str] | None:
        """Give the names of the tensors that a state dict takes of an object of `cls`; None where no text says them."""
        if cls.module not in self._names:
            self._names[cls.module] = dict(self._read_text(f"code/{cls.module.replace('.', '/')}.py"))
        return self._names[cls.module].get(cls.name)

    def _read_text(self, name: str) -> Iterator[tuple[str, frozenset[str] | None]]:
        """Read the record `name`: give each class in it with the names of its parameters and buffers.

        A text that is missing, or too long, gives no class. Then all tensors of the objects are taken: one too many is
        refused by its name when it does not fit the model, one too few would be left out in silence.
        """
        entry = self._entries.get(name)
        if entry is None or entry.nbytes > self._left:
            return
        self._left -= entry.nbytes
        text = archive.read_record(self._file, entry).decode("utf-8", "replace")
        # Before torch 1.5 the text named the parameters only, and any other tensor of a module may be a buffer.
        names_buffers = "  __buffers__ = [" in text
        for cls, is_module, parameters, buffers in _CLASS.findall(text):
            names = frozenset(_QUOTED_NAME.findall(parameters + buffers))
            # A class that is no module lists nothing, and nothing of it belongs into a state dict.
            yield cls, names if names_buffers or not is_module else None


def _state_dict(root: object, values: PickleContents, classes: _ClassTexts) -> dict[str, Entry]:
    """Give the entries of the program's parameters and buffers by dotted name.

    An object under two names gives the tensors of both, as in torch. The walk keeps its own stack: recursion would end
    in a RecursionError where a file nests its objects deeply.

    Raises:
        UnreadableError: `root` is no object with attributes, or an object contains itself, or is too deep or large.
    """
    if type(root) is not Call or type(root.state) is not DictNote:
        raise UnreadableError(Problem("no_weights", values.file, {"what": values.noun(root)}))
    entries: dict[str, Entry] = {}
    large = Problem("module_large", values.file)
    # Sixty objects, each twice in the next, are a small file with more names than could ever be made.
    work = Budget(MAX_TEXT, large)
    # The objects from the root to the present one: prefix of the names, attributes, and those not yet visited.
    path = [("", root.state, _attributes(root, classes))]
    on_path = {id(root.state)}
    while path:
        prefix, state, items = path[-1]
        name, value = next(items, ("", None))  # `_attributes` gives no empty name, so "" is the end
        work.take(ITEM_COST + len(prefix) + len(name))
        if not name:
            on_path.discard(id(state))
            path.pop()
        elif (entry := values.tensor(value)) is not None:
            entries[prefix + name] = entry
        elif type(value) is Call and type(value.state) is DictNote:
            if id(value.state) in on_path:
                raise UnreadableError(Problem("module_itself", values.file))
            if len(path) >= MAX_DEPTH:
                raise UnreadableError(large)
            on_path.add(id(value.state))
            path.append((f"{prefix}{name}.", value.state, _attributes(value, classes)))
    return entries


def _attributes(value: Call, classes: _ClassTexts) -> Iterator[tuple[str, object]]:
    """Give the attributes of an object that may go into a state dict: its listed tensors, and the objects in it."""
    assert type(value.state) is DictNote
    names = classes.tensor_names(value.func) if type(value.func) is Global else None
    for name, item in value.state.data.items():
        if name and (names is None or name in names or (type(item) is Call and type(item.state) is DictNote)):
            yield name, item
