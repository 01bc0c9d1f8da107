"""Open weights in several files: an index (a JSON of key -> file) that names the shards, or the folder they lie in.

An index is a file from elsewhere like any other: which files it may name, and what they must hold, is checked first.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Mapping

from smartload.errors import AmbiguousKeysError, CheckpointNotFoundError, UnreadableError, UnsafeCheckpointError
from smartload.formats import safetensors, torch_legacy, torch_save, unsupported
from smartload.reading.files import FileReader, head, io_problem, read_bytes
from smartload.reading.json import loads
from smartload.reading.opening import base_name, names_in, open_path
from smartload.reading.shift import shifted
from smartload.reading.zip import read_directory
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import Beside, ByteReader, Entry, Part, ZipRecord
from smartload.records.problems import Kind, Problem
from smartload.records.text import first_few, plural, printable

# Bytes of an index, which is read as a whole. A key takes about a hundred of them, so the limit is at two million keys.
MAX_INDEX = 200_000_000
# Files that are kept open at once; a process is often given 1,024. Of more, each is opened again for every read.
MANY = 200
# 'model.safetensors.index.json', and with a variant 'model.safetensors.index.fp16.json', as transformers writes them.
_INDEX = re.compile(r".*?(?P<suffix>\.\w+)?\.index(?:\.\w+)?\.json")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
# The suffixes of a file that may be the only one with weights in its folder.
_SINGLE = (*_WEIGHTS, ".pth.tar", ".pkl", ".npz")
# Files with such a suffix that are no set of weights by themselves: one shard of several (but '-00001-of-00001' is all
# of them), optimizer states of DeepSpeed, and what trainers such as transformers' and accelerate's put beside the
# weights.
_NO_SET = re.compile(
    r"-\d+-of-(?!0*1\.)\d+\.|_optim_states\.|"
    r"^(?:optimizer|scheduler|scaler|sampler|rng_state|random_states|training_args)"
)


def sniff(file: ByteReader) -> bool:
    """Tell whether `file` is the index of shards."""
    return head(file, 64).lstrip()[:1] == b"{" and _weight_map(file) is not None


def open(file: ByteReader) -> Checkpoint:
    """Read the names and spans of all shards that the index `file` names; every one is opened.

    Raises:
        UnreadableError: the index names nothing, or a shard is damaged, or holds other keys than the index says.
        UnsafeCheckpointError: the index names a file outside its folder, or one of another kind than its own.
        CheckpointNotFoundError: a shard is missing.
    """
    # A file object may have no path: then there is no folder in which to look for the shards.
    path = file.path if isinstance(file, FileReader) else ""
    if not path:
        raise UnreadableError(Problem("index_alone", file.name))
    keys_by_file: dict[str, set[str]] = {}
    for key, name in _file_of_each_key(file).items():
        keys_by_file.setdefault(name, set()).add(key)
    # An index of safetensors promises that there are no pickles: it must not name any. Where the name of the index
    # says no suffix, the shards must agree on one.
    suffixes = {os.path.splitext(name)[1] for name in keys_by_file}
    match = _INDEX.fullmatch(file.name)
    expected = {match["suffix"]} if match and match["suffix"] in _WEIGHTS else suffixes
    if len(suffixes) > 1 or not suffixes <= set(_WEIGHTS) or suffixes != expected:
        raise UnsafeCheckpointError(Problem("shard_suffix", file.name, {"names": first_few(keys_by_file)}))
    with contextlib.ExitStack() as stack:
        merged = _MergedShards(file)
        for name, keys in keys_by_file.items():
            reader = open_beside(os.path.dirname(path), name, file.name, path, len(keys_by_file))
            stack.callback(reader.close)
            merged.add(_open_shard(reader, name), name, keys)
        stack.pop_all()  # all is well: from here on the checkpoint owns the files
        return merged.checkpoint(len(keys_by_file))


class _MergedShards:
    """The shards that have been read so far, merged into one part; the index is file 0 of the checkpoint."""

    def __init__(self, index: ByteReader) -> None:
        self._index = index
        # With the index, so that a load also notices when that file changes meanwhile.
        self._files: list[ByteReader] = [index]
        self._entries: dict[str, Entry] = {}
        self._metadata: dict[str, Mapping[str, object]] = {}
        self._records: list[ZipRecord] = []
        self._tags: Counter[str] = Counter()
        self._header: dict[str, str] = {}
        self._differing: dict[str, Beside] = {}
        self._format = ""

    def add(self, shard: Checkpoint, name: str, keys: set[str]) -> None:
        """Add the shard in the file `name`; raise UnreadableError where it holds other keys than `keys`.

        A key that the index does not name would be dropped in silence, or take the place of another shard's: files of
        two saves are often mixed by a download that was broken off.
        """
        part = shard.parts.get("", Part({}))
        if part.entries.keys() != keys:
            lacks, more = keys - part.entries.keys(), part.entries.keys() - keys
            kind: Kind = "shard_lacks" if lacks else "shard_more"
            raise UnreadableError(
                Problem(kind, self._index.name, {"name": printable(name), "keys": first_few(lacks or more)})
            )
        number = len(self._files)  # the shard counts its own files from 0
        self._entries |= shifted(part.entries, number)
        self._metadata |= part.metadata or {}
        self._records += [record._replace(file=record.file + number) for record in shard.records]
        self._files += shard.files
        self._tags.update(shard.tags)
        for key, text in shard.header.items():
            if self._header.setdefault(key, text) != text:
                self._differing[key] = Beside(f"__metadata__.{key}", "a text that differs from shard to shard")
        self._format = shard.format

    def checkpoint(self, shards: int) -> Checkpoint:
        """Make the checkpoint of all shards that were added; `shards` is their number."""
        parts = {"": Part(self._entries, self._metadata or None)}
        form = f"{plural(shards, 'shard')} of {self._format}"
        return Checkpoint(
            self._index.name,
            form,
            parts,
            tuple(self._files),
            tuple(self._records),
            tuple(self._differing.values()),
            self._tags,
            {key: text for key, text in self._header.items() if key not in self._differing},
        )


def open_beside(folder: str, name: str, checkpoint: str, index: str, count: int) -> FileReader:
    """Open the file `name` that an index names: in the folder of the index, or in that in which the index really lies.

    The second is how a download cache keeps files: names in one folder, all of them links into another.

    Args:
        folder: the folder of the index.
        name: what the index says; from a stranger, so that it may be '../../etc/passwd'.
        checkpoint: the name of the whole, for messages.
        index: the path of the index.
        count: how many files the index names; of very many, none is kept open.

    Raises:
        UnsafeCheckpointError: `name` is no plain name of a file, or a link out of the folder.
        CheckpointNotFoundError: there is no such file.
        UnreadableError: it cannot be opened.
    """
    # A plain name: no separator of any system, no drive ("C:"), no hidden file, "." or "..", no control characters.
    if not name or name[0] == "." or any(char in name for char in "/\\:\0") or not name.isprintable():
        raise UnsafeCheckpointError(Problem("shard_name", checkpoint, {"name": printable(name)}))
    try:
        path = os.path.realpath(os.path.join(folder, name))
    except OSError as error:  # the name of a device of Windows, such as con.bin
        raise io_problem(checkpoint, error) from error
    allowed = {os.path.realpath(folder), os.path.dirname(os.path.realpath(index))}
    # A plain name may still be a link, which an archive or a clone of a repository can bring along.
    if os.path.dirname(path) not in allowed:
        raise UnsafeCheckpointError(Problem("shard_outside", checkpoint, {"name": printable(name)}))
    try:
        reader = open_path(path)
    except CheckpointNotFoundError:
        facts = {"name": printable(name)}
        other_case = [other for other in names_in(folder) if other.casefold() == name.casefold() and other != name]
        if other_case:  # copied from a disk on which it is the same name
            problem = Problem("shard_case", checkpoint, {**facts, "have": printable(other_case[0])})
        else:
            problem = Problem("shard_missing", checkpoint, facts)
        raise CheckpointNotFoundError(problem) from None
    reader.name = printable(name)  # as the index calls it: in a cache the real file is named by its checksum
    if count > MANY:
        reader.release()
    return reader


def _open_shard(file: FileReader, name: str) -> Checkpoint:
    """Read one shard by the suffix of its `name`; raise UnreadableError where its content is of another format.

    Behind .safetensors there is no pickle, and behind the others nothing but what torch.save writes: a shard that was
    itself an index could name shards for ever.
    """
    if name.endswith(".safetensors"):
        if safetensors.sniff(file):
            return safetensors.open(file)
    elif torch_legacy.sniff(file):
        return torch_legacy.open(file)
    elif head(file, 4) == b"PK\3\4":
        directory = read_directory(file)
        if torch_save.sniff_zip(directory.names()):
            return torch_save.open_zip(file, directory)
    raise UnreadableError(unsupported.name_file(file))


def _weight_map(file: ByteReader) -> Mapping[str, object] | None:
    """Give the `weight_map` of an index; None where `file` is no index."""
    if file.size > MAX_INDEX:
        return None
    raw = read_bytes(file, 0, file.size)
    if b'"weight_map"' not in raw:  # any other JSON is not worth parsing
        return None
    index = loads(raw, file.name)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    return weight_map if isinstance(weight_map, dict) else None


def _file_of_each_key(file: ByteReader) -> dict[str, str]:
    """Map each key in the index `file` to the name of its shard; raise UnreadableError where it names none."""
    weight_map = _weight_map(file)
    if not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise UnreadableError(Problem("index_empty", file.name))
    return {key: str(name) for key, name in weight_map.items()}


def choose_file(folder: str) -> str:
    """Choose the one file of `folder` that holds its weights, or the index that names the files that do.

    Raises:
        AmbiguousKeysError: two complete sets of weights lie in it.
        UnreadableError: none does; the error says what the folder is, where it can.
    """
    names = names_in(folder)
    # On many disks of Windows and macOS, 'M-1' is the file 'm-1'; and where it is not, it stands for no other weights.
    folded = {name.casefold() for name in names}
    indexes = {name: _shards_of(os.path.join(folder, name)) for name in names if _INDEX.fullmatch(name)}
    indexes = {name: files for name, files in indexes.items() if files and all(f.endswith(_WEIGHTS) for f in files)}
    shards = {name.casefold() for files in indexes.values() for name in files}
    # An index counts only with all of its shards: repositories offer the weights in two formats, and a download of
    # one of them often brings both indexes along.
    # Only names of the folder's list are asked for: on Windows, others can be a device, or a server far away.
    sets = [
        name
        for name, files in indexes.items()
        if all(f.casefold() in folded and os.path.exists(os.path.join(folder, f)) for f in files)
    ]
    sets += [
        name for name in names if name.endswith(_SINGLE) and name.casefold() not in shards and not _NO_SET.search(name)
    ]
    if len(sets) > 1:  # PEFT puts an adapter beside its base weights; alone in a folder it is what was meant
        sets = [name for name in sets if not name.startswith("adapter_model.")]
    # Where no set is complete, an index all the same: opening it names the shard that is missing. Sorted for the
    # message, which proposes the first: an index, then the shortest name, since variants have longer ones.
    sets = sorted(sets or list(indexes)[:1], key=lambda name: (name not in indexes, len(name)))
    if len(sets) > 1:
        # Every system takes "/", and the message would show each backslash of Windows twice.
        first = os.path.join(base_name(folder), sets[0]).replace(os.sep, "/")
        facts = {"names": first_few(sets), "first": printable(first)}
        raise AmbiguousKeysError(Problem("folder_two", printable(os.path.basename(os.path.abspath(folder))), facts))
    if not sets:
        raise UnreadableError(unsupported.name_folder(folder, names))
    return os.path.join(folder, sets[0])


def _shards_of(path: str) -> set[str]:
    """Give the names of the files that the index at `path` names; none where it cannot be read."""
    with contextlib.suppress(UnreadableError, CheckpointNotFoundError), contextlib.closing(open_path(path)) as file:
        return set(_file_of_each_key(file).values())
    return set()
