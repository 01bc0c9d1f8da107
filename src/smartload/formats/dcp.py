"""Open folders of torch.distributed.checkpoint: names and chunks from `.metadata`, a pickle, which is read inertly.

A tensor is saved in chunks, by one rank or by many. Each chunk is a zip of `torch.save` of its own, somewhere in one
of the folder's files, or a tensor in a file of safetensors. `.metadata` says which chunk lies where; all that it says
is compared with the chunks themselves. torch.distributed is not imported: that alone takes more than a second.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

from smartload.errors import UnreadableError
from smartload.formats import safetensors, torch_save
from smartload.formats.sharded import open_beside
from smartload.pickles.arrays import strides
from smartload.pickles.contents import PickleContents
from smartload.pickles.inert import Call, DictNote, Global, parse
from smartload.pickles.storages import WIDEST
from smartload.pickles.tensors import Tensors, is_size, plain_size
from smartload.reading.files import BytesReader, Window, read_bytes
from smartload.reading.opening import open_path
from smartload.reading.shift import shifted
from smartload.reading.state_dicts import StateDicts, TreeValues, article, explore
from smartload.reading.zip import read_directory
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import ITEMSIZE, ByteReader, Entry, Extra, InMemory, Opaque, Span, Tiled, ZipRecord
from smartload.records.problems import Problem
from smartload.records.text import printable

METADATA = ".metadata"
# Bytes of `.metadata`, which is read as a whole. Measured: 280 bytes a tensor of one chunk, so the limit is at millions
# of chunks.
MAX_METADATA = 1 << 30
_PACKAGE = "torch.distributed.checkpoint."
# A value beside the tensors. Its bytes are a pickle, which torch would load and run; they are not even read.
OBJECT = Opaque("an object")
_ENTRIES = (Span, Tiled, InMemory, Extra, Opaque)

Offsets: TypeAlias = tuple[int, ...]
# The name of a tensor and the offset of the chunk in it; None for what is no tensor and has no chunks.
Index: TypeAlias = "tuple[str, Offsets | None]"


class ByteRange(NamedTuple):
    """The bytes in which a chunk lies, and the file of the folder that holds them."""

    file: str
    offset: int
    nbytes: int


def sniff(names: Iterable[str]) -> bool:
    """Tell whether a folder with files of these `names` is one of torch.distributed.checkpoint."""
    return METADATA in names


def open(folder: str) -> Checkpoint:
    """Read the names and spans of `folder`; its files stay open until those of the checkpoint are closed.

    Raises:
        UnreadableError: `.metadata` is not as torch writes it, or a chunk is not what it says.
        UnsafeCheckpointError: `.metadata` names a file outside the folder.
    """
    with contextlib.ExitStack() as stack:
        reader = _FolderReader(folder, stack)
        parts, aside = reader.parts()
        # The span of a tensor without elements names file 0, and where there are no others no file was opened.
        files = tuple(reader.files) or (BytesReader(b"", reader.name),)
        stack.pop_all()  # all is well: from here on the checkpoint owns the files
        return Checkpoint(reader.name, "torch.distributed.checkpoint", parts, files, tuple(reader.records), aside)


class _FolderReader:
    """Reads one folder: the entry of each name in `.metadata`, while it opens the files that the chunks lie in.

    Attributes:
        name: the folder, for messages.
        files: the files that were opened so far; spans refer to them by their index here.
        records: the records of the chunks' zips, for the comparison of checksums.
    """

    def __init__(self, folder: str, stack: contextlib.ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self.name = printable(os.path.basename(os.path.abspath(folder)))
        self.files: list[ByteReader] = []
        self.records: list[ZipRecord] = []
        self._numbers: dict[str, int] = {}  # file name -> index in `files`
        self._read_chunks: set[ByteRange] = set()
        self._read_names: set[tuple[int, str]] = set()
        # Index of a file -> its entries where it is one of safetensors, None where it holds zips.
        self._safetensors: dict[int, Mapping[str, Entry] | None] = {}
        metadata = self._read_metadata()
        self._kinds = self._dict_of(metadata, "state_dict_metadata")
        # A planner that does not flatten writes no paths; a name is then its own path.
        has_paths = _attribute(metadata, "planner_data") is not None
        self._paths = self._dict_of(metadata, "planner_data") if has_paths else {}
        self._ranges = dict(_byte_ranges(_attribute(metadata, "storage_data"), self._damaged))
        self._file_count = len({chunk.file for chunk in self._ranges.values()})

    def parts(self) -> StateDicts:
        """Give the state dicts, by the paths that they had in the dict that was saved."""
        entries = ((self._path(name), self._entry(name, kind)) for name, kind in self._kinds.items())
        return _nest(entries, self.name)

    def _read_metadata(self) -> object:
        """Parse `.metadata` into inert notes; nothing that the pickle names is imported or called."""
        with contextlib.closing(open_path(os.path.join(self._folder, METADATA))) as file:
            if file.size > MAX_METADATA:
                raise UnreadableError(Problem("pickle_large", self.name, {"size": file.size}))
            value, _, _ = parse(read_bytes(file, 0, file.size), 0, f"{self.name}/{METADATA}")
            file.check_unchanged()
        if _class_below(value) != "metadata.Metadata":
            raise self._damaged()
        return value

    def _damaged(self) -> UnreadableError:
        """Make the error for a `.metadata` that is not as torch writes it."""
        return UnreadableError(Problem("dcp_damaged", self.name))

    def _dict_of(self, metadata: object, name: str) -> Mapping[str, object]:
        """Give the attribute `name` of the metadata, which must be a dict whose keys are all strings."""
        value = _attribute(metadata, name)
        if type(value) is not DictNote or value.pairs:
            raise self._damaged()
        return value.data

    def _path(self, name: str) -> tuple[str, ...]:
        """Give the path that a flat name had in the dict that was saved: 'model.fc.weight' -> ('model', 'fc.weight').

        The planner flattens dicts and lists, and writes the path of each name down: by its dots alone, a name does not
        tell which of them are in keys.
        """
        path = self._paths.get(name, (name,))
        if type(path) is not tuple or not path or not all(type(step) in (str, int) for step in path):
            raise self._damaged()
        return tuple(map(str, path))

    def _entry(self, name: str, kind: object) -> Entry:
        """Make the entry of `name` from `kind`, what `state_dict_metadata` says of it: a tensor, or bytes."""
        cls = _class_below(kind)
        if cls == "metadata.BytesStorageMetadata":
            return self._extra_state(name) if name.endswith("_extra_state") else OBJECT
        if cls != "metadata.TensorStorageMetadata":
            raise self._damaged()
        shape, dtype = _size(_attribute(kind, "size")), _dtype(_attribute(kind, "properties"))
        chunks = _attribute(kind, "chunks")
        if shape is None or type(chunks) is not list:
            raise self._damaged()
        if dtype not in ITEMSIZE:
            return Opaque(f"a tensor of {printable(dtype)}", tensor=True)
        if 0 in shape:  # no bytes, so no chunk needs to be there
            return Span(0, 0, 0, dtype, shape, strides(shape, fortran=False))
        # A rank whose share of the rows is empty writes a chunk of no elements all the same.
        filled = (chunk for chunk in chunks if 0 not in (_size(_attribute(chunk, "sizes")) or ()))
        tiles = dict(self._tile(name, chunk, dtype, len(shape)) for chunk in filled)
        if not _covers(list(tiles.items()), shape, 0):
            raise UnreadableError(Problem("dcp_gap", self.name, {"name": printable(name)}))
        if len(tiles) == 1:
            return next(iter(tiles.values()))
        return Tiled(dtype, shape, tuple(sorted(tiles.items(), key=lambda tile: tile[0])))

    def _tile(self, name: str, chunk: object, dtype: str, dims: int) -> tuple[Offsets, Span]:
        """Give the offset of `chunk` in the tensor `name`, and the span of its bytes.

        Refuse a chunk whose own shape or dtype differs from what `.metadata` says of it: its file may be of another
        save into the same folder.
        """
        offset, size = _size(_attribute(chunk, "offsets")), _size(_attribute(chunk, "sizes"))
        byte_range = self._ranges.get((name, offset))
        if offset is None or size is None or len(offset) != dims or len(size) != dims or byte_range is None:
            raise self._damaged()
        span = self._chunk_entry(name, byte_range)
        if not isinstance(span, Span) or (span.shape, span.dtype) != (size, dtype):
            raise UnreadableError(Problem("dcp_chunk", self.name, {"name": printable(name)}))
        return offset, span

    def _chunk_entry(self, name: str, byte_range: ByteRange) -> object:
        """Give the entry of the chunk of `name` that lies in `byte_range`; None where there is no tensor."""
        number = self._file_number(byte_range.file)
        if number not in self._safetensors:
            file = self.files[number]
            self._safetensors[number] = safetensors.open(file).parts[""].entries if safetensors.sniff(file) else None
        entries = self._safetensors[number]
        if entries is not None:
            # By its name: torch writes the offsets of such a file's tensors down before it writes their bytes, so
            # that all of them are one and the same.
            # So a second chunk of that name in this file cannot be told from the first, and would get its values.
            if (number, name) in self._read_names:
                raise UnreadableError(Problem("dcp_chunk", self.name, {"name": printable(name)}))
            self._read_names.add((number, name))
            entry = entries.get(name)
            return entry._replace(file=number) if isinstance(entry, Span) else entry
        root, tensors = self._read_chunk(byte_range)
        entry = tensors.entry(root)
        if not isinstance(entry, Span):
            return entry
        return entry._replace(file=number, offset=entry.offset + byte_range.offset)

    def _extra_state(self, name: str) -> Entry:
        """Give the entry of a module's extra state, which is saved as bytes: a zip of torch.save around any value."""
        byte_range = self._ranges.get((name, None))
        if byte_range is None:
            raise self._damaged()
        root, tensors = self._read_chunk(byte_range)
        entry = PickleContents(tensors, self.name).extra(root)
        return shifted({name: entry}, self._file_number(byte_range.file), byte_range.offset)[name]

    def _read_chunk(self, byte_range: ByteRange) -> tuple[object, Tensors]:
        """Read the zip in `byte_range`: the value in it, and what knows the tensors of it.

        Refuse a range that was read before. No writer gives one chunk to two tensors; a file that does would load one
        tensor's values under the name of another of the same shape, or have one chunk read a million times.
        """
        if byte_range in self._read_chunks:
            raise self._damaged()
        self._read_chunks.add(byte_range)
        number = self._file_number(byte_range.file)
        window = Window(self.files[number], byte_range.offset, byte_range.nbytes)
        saved = torch_save.read_zip(window, read_directory(window))
        self.records += [
            record._replace(file=number, offset=record.offset + byte_range.offset) for record in saved.records
        ]
        return saved.root, saved.tensors

    def _file_number(self, file: str) -> int:
        """Give the index in `files` of a file of the folder; open it when it is first asked for."""
        if file not in self._numbers:
            index = os.path.join(self._folder, METADATA)
            reader = open_beside(self._folder, file, self.name, index, self._file_count)
            self._stack.callback(reader.close)
            self._numbers[file] = len(self.files)
            self.files.append(reader)
        return self._numbers[file]


def _class_below(value: object) -> str:
    """Name the class of an object by its path in torch.distributed.checkpoint: 'metadata.Metadata'; "" for the rest."""
    func = value.func if type(value) is Call else None
    return f"{func.module}.{func.name}".removeprefix(_PACKAGE) if type(func) is Global else ""


def _attribute(value: object, name: str) -> object:
    """Give the attribute `name` of an object of the pickle; None where it has none, as in files of other releases."""
    state = value.state if type(value) is Call else None
    return state.data.get(name) if type(state) is DictNote else None


def _size(value: object) -> Offsets | None:
    """Give the sizes in the note of a `torch.Size`, None where it is none."""
    sizes = plain_size(value)
    return sizes if is_size(sizes) else None


def _dtype(properties: object) -> str:
    """Name the dtype in the `TensorProperties` of a tensor: 'float32'; 'no dtype' where none is named."""
    state = properties.state if type(properties) is Call else None
    # The class pickles itself as a tuple that begins with the dtype; without its own method it would be a dict.
    if type(state) is tuple and state:
        dtype: object = state[0]
    else:
        dtype = state.data.get("dtype") if type(state) is DictNote else None
    return dtype.name if type(dtype) is Global and dtype.module == "torch" else "no dtype"


def _byte_ranges(storage_data: object, damaged: Callable[[], UnreadableError]) -> Iterator[tuple[Index, ByteRange]]:
    """Give for each chunk in `storage_data` its index and its range; raise what `damaged` makes where it is odd."""
    # The keys are objects, so all items are pairs; a string among the keys was not written by torch.
    if type(storage_data) is not DictNote or storage_data.data:
        raise damaged()
    for index, info in storage_data.pairs or ():
        name, file = _attribute(index, "fqn"), _attribute(info, "relative_path")
        offset, nbytes = _attribute(info, "offset"), _attribute(info, "length")
        # The writer's extensions have transformed the bytes, compressed them say; what lies there is no zip.
        transforms = _attribute(info, "transform_descriptors")
        if _class_below(index) != "metadata.MetadataIndex" or transforms:
            raise damaged()
        if type(name) is not str or type(file) is not str:
            raise damaged()
        # Whether the range lies in the file is seen when it is opened. A number of thousands of digits is refused
        # here: Python would not print it in the message.
        if type(offset) is not int or type(nbytes) is not int or not (abs(offset) < WIDEST and abs(nbytes) < WIDEST):
            raise damaged()
        yield (name, _size(_attribute(index, "offset"))), ByteRange(file, offset, nbytes)


def _covers(tiles: list[tuple[Offsets, Span]], shape: Offsets, dim: int) -> bool:
    """Tell whether `tiles` fill `shape` from dimension `dim` on, each element once.

    The tiles are cut into bands of equal extent in `dim`, which must lie one behind the other; then each band must be
    filled in the dimensions that follow. This fits the grids in which torch shards a tensor. To count elements would
    not do: a gap and an overlap of one size cancel out.
    """
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


def _nest(entries: Iterable[tuple[tuple[str, ...], Entry]], file: str) -> StateDicts:
    """Find the state dicts in `entries`, which are given with their paths.

    Raises:
        UnreadableError: two entries have one path, or the path of one goes on through another, so that the dict that
            was saved cannot be made again.
    """
    root: dict[str, object] = {}
    for path, entry in entries:
        parent = root
        for name in path[:-1]:
            child = parent.setdefault(name, {})
            if not isinstance(child, dict):
                raise UnreadableError(Problem("key_twice", file, {"name": printable(".".join(path))}))
            parent = child
        if path[-1] in parent:
            raise UnreadableError(Problem("key_twice", file, {"name": printable(".".join(path))}))
        parent[path[-1]] = entry
    return explore(root, _NestedEntries(file))


class _NestedEntries(TreeValues):
    """The values of nested dicts whose leaves are entries, as `explore` asks for them."""

    def __init__(self, file: str) -> None:
        self.file = file

    def tensor(self, value: object) -> Entry | None:
        """Give `value` where it is an entry; None for a dict, and for an object that is no tensor."""
        return value if isinstance(value, _ENTRIES) and value != OBJECT else None

    def extra(self, value: object) -> Entry:
        """Give `value`, the entry of an extra state; for a dict under such a name, say that it is one."""
        return value if isinstance(value, _ENTRIES) else Opaque(self.noun(value))

    def items(self, value: object) -> Mapping[str, object] | None:
        """Give the items of a dict, None for an entry."""
        return value if isinstance(value, dict) else None

    def noun(self, value: object) -> str:
        """Say what `value` is, with its article: 'a dict of 3'."""
        if isinstance(value, dict):
            return article("dict", len(value))
        return value.what if isinstance(value, Opaque) else "a tensor"

    def is_list(self, value: object) -> bool:
        """Tell whether `value` is a list: the planner flattens it like a dict with the keys 0, 1, 2."""
        return isinstance(value, dict) and bool(value) and all(name.isdecimal() for name in value)

    def inner(self, value: object) -> Iterable[object]:
        """Give all values directly inside a dict, nothing for an entry."""
        return value.values() if isinstance(value, dict) else ()
