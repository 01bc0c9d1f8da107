"""Weights in several files: an index that names them, or their folder. What an index says is not trusted."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Mapping

from smartload.errors import AmbiguousKeysError, CheckpointNotFoundError, UnreadableError, UnsafeCheckpointError
from smartload.formats import safetensors, torch_legacy, torch_save, unsupported
from smartload.reading.files import FileReader, head, read_bytes
from smartload.reading.json import loads
from smartload.reading.opening import base_name, names_in, open_path
from smartload.reading.shift import shifted
from smartload.reading.zip import read_directory
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import ByteReader, Entry, Part, ZipRecord
from smartload.records.problems import Kind, Problem
from smartload.records.text import first_few, plural, printable

MAX_INDEX = 200_000_000
MANY = 200
"""Files that may be open at once; a process is often given 1,024."""
_INDEX = re.compile(r".*?(?P<suffix>\.\w+)?\.index(?:\.\w+)?\.json")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_SINGLE = (*_WEIGHTS, ".pth.tar", ".pkl", ".npz")
_NO_SET = re.compile(
    r"-\d+-of-(?!0*1\.)\d+\.|_optim_states\.|"
    r"^(?:optimizer|scheduler|scaler|sampler|rng_state|random_states|training_args)"
)
"""Shards, and what a trainer puts beside the weights."""


def sniff(file: ByteReader) -> bool:
    """Whether the file is the index of shards."""
    return head(file, 64).lstrip()[:1] == b"{" and _weight_map(file) is not None


def open(file: ByteReader) -> Checkpoint:
    """The names and spans of all shards of an index, every one opened and compared with what the index says of it."""
    path = file.path if isinstance(file, FileReader) else ""
    if not path:
        raise UnreadableError(Problem("index_alone", file.name))
    by_file: dict[str, set[str]] = {}
    for key, name in _index(file).items():
        by_file.setdefault(name, set()).add(key)
    suffixes = {os.path.splitext(name)[1] for name in by_file}
    named = _INDEX.fullmatch(file.name)
    said = {named["suffix"]} if named and named["suffix"] in _WEIGHTS else suffixes
    if len(suffixes) > 1 or not suffixes <= set(_WEIGHTS) or suffixes != said:
        raise UnsafeCheckpointError(Problem("shard_suffix", file.name, {"names": first_few(by_file)}))
    with contextlib.ExitStack() as stack:
        whole = _Whole(file)
        for name, keys in by_file.items():
            reader = beside(os.path.dirname(path), name, file.name, path, len(by_file))
            stack.callback(reader.close)
            whole.add(_shard(reader, name), name, keys)
        stack.pop_all()
        return whole.checkpoint(len(by_file))


class _Whole:
    """The shards that have been read so far, as one."""

    def __init__(self, index: ByteReader) -> None:
        self._index = index
        self._files: list[ByteReader] = [index]
        self._entries: dict[str, Entry] = {}
        self._metadata: dict[str, Mapping[str, object]] = {}
        self._records: list[ZipRecord] = []
        self._tags: Counter[str] = Counter()
        self._format = ""

    def add(self, shard: Checkpoint, name: str, keys: set[str]) -> None:
        """Take in one shard; UnreadableError where it holds other keys than the index says."""
        part = shard.parts.get("", Part({}))
        if part.entries.keys() != keys:
            lacks, more = keys - part.entries.keys(), part.entries.keys() - keys
            kind: Kind = "shard_lacks" if lacks else "shard_more"
            raise UnreadableError(
                Problem(kind, self._index.name, {"name": printable(name), "keys": first_few(lacks or more)})
            )
        number = len(self._files)
        self._entries |= shifted(part.entries, number)
        self._metadata |= part.metadata or {}
        self._records += [record._replace(file=record.file + number) for record in shard.records]
        self._files += shard.files
        self._tags.update(shard.tags)
        self._format = shard.format

    def checkpoint(self, shards: int) -> Checkpoint:
        """All of them."""
        parts = {"": Part(self._entries, self._metadata or None)}
        form = f"{plural(shards, 'shard')} of {self._format}"
        return Checkpoint(self._index.name, form, parts, tuple(self._files), tuple(self._records), tags=self._tags)


def beside(folder: str, name: str, whole: str, index: str, count: int) -> FileReader:
    """A file that an index names: in the folder of the index, or in the one in which the index really lies.

    The second is how a download cache keeps files: names in one folder, all of them links into another.

    Args:
        folder: the folder of the index.
        name: what the index says.
        whole: the checkpoint, for messages.
        index: the path of the index.
        count: how many files it names; of very many, none is kept open.
    """
    if not name or name[0] == "." or any(char in name for char in "/\\:\0") or not name.isprintable():
        raise UnsafeCheckpointError(Problem("shard_name", whole, {"name": printable(name)}))
    path = os.path.realpath(os.path.join(folder, name))
    homes = {os.path.realpath(folder), os.path.dirname(os.path.realpath(index))}
    if os.path.dirname(path) not in homes:
        raise UnsafeCheckpointError(Problem("shard_outside", whole, {"name": printable(name)}))
    try:
        reader = open_path(path)
    except CheckpointNotFoundError:
        raise CheckpointNotFoundError(Problem("shard_missing", whole, {"name": printable(name)})) from None
    reader.name = printable(name)
    if count > MANY:
        reader.release()
    return reader


def _shard(file: FileReader, name: str) -> Checkpoint:
    """One shard by its suffix; behind .safetensors nothing else is accepted."""
    if name.endswith(".safetensors"):
        if safetensors.sniff(file):
            return safetensors.open(file)
    elif torch_legacy.sniff(file):
        return torch_legacy.open(file)
    elif head(file, 4) == b"PK\3\4":
        directory = read_directory(file)
        if torch_save.sniff_zip(directory.names()):
            return torch_save.open_zip(file, directory)
    raise UnreadableError(unsupported.name(file))


def _weight_map(file: ByteReader) -> Mapping[str, object] | None:
    if file.size > MAX_INDEX:
        return None
    raw = read_bytes(file, 0, file.size)
    if b'"weight_map"' not in raw:
        return None
    found = loads(raw, file.name)
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    return weight_map if isinstance(weight_map, dict) else None


def _index(file: ByteReader) -> dict[str, str]:
    """Key -> the name of its file."""
    weight_map = _weight_map(file)
    if not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise UnreadableError(Problem("index_empty", file.name))
    return {key: str(name) for key, name in weight_map.items()}


def choose(folder: str) -> str:
    """The one file of a folder that holds its weights, or names the files that do.

    Raises:
        AmbiguousKeysError: two complete sets of weights lie in it.
        UnreadableError: none does; the error says what the folder is, where it can.
    """
    names = names_in(folder)
    indexes = {name: _named_by(os.path.join(folder, name)) for name in names if _INDEX.fullmatch(name)}
    indexes = {name: files for name, files in indexes.items() if files and all(f.endswith(_WEIGHTS) for f in files)}
    shards = set().union(*indexes.values())
    sets = [name for name, files in indexes.items() if files <= set(names)]
    sets += [name for name in names if name.endswith(_SINGLE) and name not in shards and not _NO_SET.search(name)]
    if len(sets) > 1:
        sets = [name for name in sets if not name.startswith("adapter_model.")]
    sets = sorted(sets or list(indexes)[:1], key=lambda name: (name not in indexes, len(name)))
    if len(sets) > 1:
        facts = {"names": first_few(sets), "first": printable(os.path.join(base_name(folder), sets[0]))}
        raise AmbiguousKeysError(Problem("folder_two", printable(os.path.basename(os.path.abspath(folder))), facts))
    if not sets:
        raise UnreadableError(unsupported.name_folder(folder, names))
    return os.path.join(folder, sets[0])


def _named_by(path: str) -> set[str]:
    """The files that an index names, none where it cannot be read."""
    with contextlib.suppress(UnreadableError, CheckpointNotFoundError), contextlib.closing(open_path(path)) as file:
        return set(_index(file).values())
    return set()
