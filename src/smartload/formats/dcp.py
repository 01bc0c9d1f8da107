"""Folders of torch.distributed.checkpoint: names from `.metadata`, read inertly; each chunk is a small torch zip."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

from smartload.errors import UnreadableError
from smartload.formats import safetensors, torch_save
from smartload.formats.sharded import beside
from smartload.pickles.arrays import strides
from smartload.pickles.contents import PickleContents
from smartload.pickles.inert import Call, DictNote, Global, parse
from smartload.pickles.storages import WIDEST
from smartload.pickles.tensors import Tensors, is_size, plain_size
from smartload.reading.files import Window, read_bytes
from smartload.reading.opening import open_path
from smartload.reading.shift import shifted
from smartload.reading.state_dicts import StateDicts, TreeValues, article, explore
from smartload.reading.zip import read_directory
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import ITEMSIZE, ByteReader, Entry, Extra, InMemory, Opaque, Span, Tiled, ZipRecord
from smartload.records.problems import Problem
from smartload.records.text import printable

METADATA = ".metadata"
MAX_METADATA = 1 << 30
_CLASSES = "torch.distributed.checkpoint."

Offsets: TypeAlias = tuple[int, ...]
Index: TypeAlias = "tuple[str, Offsets | None]"


class Place(NamedTuple):
    """Where a chunk lies: a file of the folder, and the bytes in it."""

    file: str
    offset: int
    nbytes: int


def sniff(names: Iterable[str]) -> bool:
    """Whether a folder with these files is one of torch.distributed.checkpoint."""
    return METADATA in names


def open(folder: str) -> Checkpoint:
    """The names and spans of the folder; its files stay open until the checkpoint's are closed."""
    with contextlib.ExitStack() as stack:
        reader = _Reader(folder, stack)
        parts, aside = reader.parts()
        files = tuple(reader.files)
        stack.pop_all()
        return Checkpoint(reader.name, "torch.distributed.checkpoint", parts, files, tuple(reader.records), aside)


class _Reader:
    """One folder while it is read."""

    def __init__(self, folder: str, stack: contextlib.ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self.name = printable(os.path.basename(os.path.abspath(folder)))
        self.files: list[ByteReader] = []
        self._numbers: dict[str, int] = {}
        self._taken: set[Place] = set()
        self._tables: dict[int, Mapping[str, Entry] | None] = {}
        self.records: list[ZipRecord] = []
        metadata = self._metadata()
        self._tensors = self._items(metadata, "state_dict_metadata")
        self._names = self._items(metadata, "planner_data") if _state(metadata, "planner_data") is not None else {}
        self._places = dict(_places(_state(metadata, "storage_data"), self._damaged))
        self._count = len({place.file for place in self._places.values()})

    def parts(self) -> StateDicts:
        """The state dicts by the paths that the planner had."""
        found = ((self._path(name), self._entry(name, said)) for name, said in self._tensors.items())
        return nested(found, self.name)

    def _metadata(self) -> object:
        with contextlib.closing(open_path(os.path.join(self._folder, METADATA))) as file:
            if file.size > MAX_METADATA:
                raise UnreadableError(Problem("pickle_large", self.name, {"size": file.size}))
            value, _, _ = parse(read_bytes(file, 0, file.size), 0, f"{self.name}/{METADATA}")
            file.check_unchanged()
        if _class(value) != "metadata.Metadata":
            raise self._damaged()
        return value

    def _damaged(self) -> UnreadableError:
        return UnreadableError(Problem("dcp_damaged", self.name))

    def _items(self, metadata: object, name: str) -> Mapping[str, object]:
        found = _state(metadata, name)
        if type(found) is not DictNote or found.pairs:
            raise self._damaged()
        return found.data

    def _path(self, name: str) -> tuple[str, ...]:
        path = self._names.get(name, (name,))
        if type(path) is not tuple or not path or not all(type(each) in (str, int) for each in path):
            raise self._damaged()
        return tuple(map(str, path))

    def _entry(self, name: str, said: object) -> Entry:
        kind = _class(said)
        if kind == "metadata.BytesStorageMetadata":
            return self._extra(name) if name.endswith("_extra_state") else OBJECT
        if kind != "metadata.TensorStorageMetadata":
            raise self._damaged()
        shape, dtype = _size(_state(said, "size")), _dtype(_state(said, "properties"))
        chunks = _state(said, "chunks")
        if shape is None or type(chunks) is not list:
            raise self._damaged()
        if dtype not in ITEMSIZE:
            return Opaque(f"a tensor of {printable(dtype)}", tensor=True)
        if 0 in shape:
            return Span(0, 0, 0, dtype, shape, strides(shape, fortran=False))
        filled = (chunk for chunk in chunks if 0 not in (_size(_state(chunk, "sizes")) or ()))
        tiles = dict(self._tile(name, chunk, dtype, len(shape)) for chunk in filled)
        if not _covers(list(tiles.items()), shape, 0):
            raise UnreadableError(Problem("dcp_gap", self.name, {"name": printable(name)}))
        if len(tiles) == 1:
            return next(iter(tiles.values()))
        return Tiled(dtype, shape, tuple(sorted(tiles.items(), key=lambda tile: tile[0])))

    def _tile(self, name: str, chunk: object, dtype: str, dims: int) -> tuple[Offsets, Span]:
        offset, size = _size(_state(chunk, "offsets")), _size(_state(chunk, "sizes"))
        place = self._places.get((name, offset))
        if offset is None or size is None or len(offset) != dims or len(size) != dims or place is None:
            raise self._damaged()
        span = self._span(name, place)
        if not isinstance(span, Span) or (span.shape, span.dtype) != (size, dtype):
            raise UnreadableError(Problem("dcp_chunk", self.name, {"name": printable(name)}))
        return offset, span

    def _span(self, name: str, place: Place) -> object:
        """Where the tensor of a chunk lies: in a file of safetensors by its name, else in a torch zip of its own."""
        number = self._number(place.file)
        if number not in self._tables:
            reader = self.files[number]
            self._tables[number] = safetensors.open(reader).parts[""].entries if safetensors.sniff(reader) else None
        table = self._tables[number]
        if table is not None:
            entry = table.get(name)
            return entry._replace(file=number) if isinstance(entry, Span) else entry
        root, tensors = self._chunk(place)
        entry = tensors.entry(root)
        if not isinstance(entry, Span):
            return entry
        return entry._replace(file=number, offset=entry.offset + place.offset)

    def _extra(self, name: str) -> Entry:
        place = self._places.get((name, None))
        if place is None:
            raise self._damaged()
        root, tensors = self._chunk(place)
        entry = PickleContents(tensors, self.name).extra(root)
        return shifted({name: entry}, self._number(place.file), place.offset)[name]

    def _chunk(self, place: Place) -> tuple[object, Tensors]:
        """The value that a chunk holds, and its tensors; no writer lets two tensors have one chunk."""
        if place in self._taken:
            raise self._damaged()
        self._taken.add(place)
        number = self._number(place.file)
        window = Window(self.files[number], place.offset, place.nbytes)
        saved = torch_save.read_zip(window, read_directory(window))
        self.records += [each._replace(file=number, offset=each.offset + place.offset) for each in saved.records]
        return saved.root, saved.tensors

    def _number(self, file: str) -> int:
        """The number of a file of the folder, which is opened when it is first asked for."""
        if file not in self._numbers:
            index = os.path.join(self._folder, METADATA)
            reader = beside(self._folder, file, self.name, index, self._count)
            self._stack.callback(reader.close)
            self._numbers[file] = len(self.files)
            self.files.append(reader)
        return self._numbers[file]


def _class(value: object) -> str:
    """The class of an object of torch.distributed.checkpoint, below that package."""
    func = value.func if type(value) is Call else None
    return f"{func.module}.{func.name}".removeprefix(_CLASSES) if type(func) is Global else ""


def _state(value: object, name: str) -> object:
    state = value.state if type(value) is Call else None
    return state.data.get(name) if type(state) is DictNote else None


def _size(value: object) -> Offsets | None:
    found = plain_size(value)
    return found if is_size(found) else None


def _dtype(value: object) -> str:
    """The dtype of the properties of a tensor, however the release of torch wrote them."""
    state = value.state if type(value) is Call else None
    said = state[0] if type(state) is tuple and state else state.data.get("dtype") if type(state) is DictNote else None
    return said.name if type(said) is Global and said.module == "torch" else "no dtype"


def _places(value: object, damaged: Callable[[], UnreadableError]) -> Iterator[tuple[Index, Place]]:
    """(name, offset of the chunk) -> where its bytes lie."""
    if type(value) is not DictNote or value.data:
        raise damaged()
    for index, info in value.pairs or ():
        name, file = _state(index, "fqn"), _state(info, "relative_path")
        offset, nbytes = _state(info, "offset"), _state(info, "length")
        packed = _state(info, "transform_descriptors")
        if _class(index) != "metadata.MetadataIndex" or type(name) is not str or type(file) is not str or packed:
            raise damaged()
        if type(offset) is not int or type(nbytes) is not int or not (abs(offset) < WIDEST and abs(nbytes) < WIDEST):
            raise damaged()
        yield (name, _size(_state(index, "offset"))), Place(file, offset, nbytes)


def _covers(tiles: list[tuple[Offsets, Span]], shape: Offsets, dim: int) -> bool:
    """Whether the tiles fill the shape from `dim` on, each element once: cut into bands, and each band filled."""
    if dim == len(shape):
        return len(tiles) == 1
    bands: dict[tuple[int, int], list[tuple[Offsets, Span]]] = {}
    for offset, span in tiles:
        bands.setdefault((offset[dim], offset[dim] + span.shape[dim]), []).append((offset, span))
    end = 0
    for first, stop in sorted(bands):
        if first != end:
            return False
        end = stop
    return end == shape[dim] and all(_covers(band, shape, dim + 1) for band in bands.values())


OBJECT = Opaque("an object")
"""A value beside the tensors of which no more is known."""
_ENTRIES = (Span, Tiled, InMemory, Extra, Opaque)


def nested(entries: Iterable[tuple[tuple[str, ...], Entry]], file: str) -> StateDicts:
    """The state dicts in entries whose paths are given; UnreadableError where a path is also the way to another."""
    root: dict[str, object] = {}
    for path, entry in entries:
        here = root
        for name in path[:-1]:
            without_prefix = here.setdefault(name, {})
            if not isinstance(without_prefix, dict):
                raise UnreadableError(Problem("key_twice", file, {"name": printable(".".join(path))}))
            here = without_prefix
        if path[-1] in here:
            raise UnreadableError(Problem("key_twice", file, {"name": printable(".".join(path))}))
        here[path[-1]] = entry
    return explore(root, _NestedEntries(file))


class _NestedEntries(TreeValues):
    """Nested dicts of entries."""

    def __init__(self, file: str) -> None:
        self.file = file

    def tensor(self, value: object) -> Entry | None:
        """The entry itself; an object that is no tensor is none."""
        return value if isinstance(value, _ENTRIES) and value != OBJECT else None

    def extra(self, value: object) -> Entry:
        """The entry itself."""
        return value if isinstance(value, _ENTRIES) else Opaque(self.noun(value))

    def items(self, value: object) -> Mapping[str, object] | None:
        """The items of a dict."""
        return value if isinstance(value, dict) else None

    def noun(self, value: object) -> str:
        """What a value is, with its article."""
        if isinstance(value, dict):
            return article("dict", len(value))
        return value.what if isinstance(value, Opaque) else "a tensor"

    def is_list(self, value: object) -> bool:
        """Whether `value` is a list: here, a dict by numbers."""
        return isinstance(value, dict) and bool(value) and all(name.isdecimal() for name in value)

    def inner(self, value: object) -> Iterable[object]:
        """All values directly inside a dict."""
        return value.values() if isinstance(value, dict) else ()
