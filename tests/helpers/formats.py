"""One state dict in every format that smartload reads, written by the tools that people write it with."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

State = Mapping[str, torch.Tensor]
Written = Path | BinaryIO
Writer = Callable[[State, Path], Written]


class Shadow(nn.Module):
    """A module of any given names: what a class that wrote a checkpoint looks like from outside."""

    def __init__(self, state: State) -> None:
        super().__init__()
        for name, tensor in state.items():
            head, _, rest = name.partition(".")
            if rest:
                if head not in self._modules:
                    without_prefix = {key[len(head) + 1 :]: t for key, t in state.items() if key.startswith(f"{head}.")}
                    self.add_module(head, Shadow(without_prefix))
            elif tensor.is_floating_point():
                self.register_parameter(name, nn.Parameter(tensor.clone()))
            else:
                self.register_buffer(name, tensor.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def _saved(value: object, **kwargs: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **kwargs)
    return file.getvalue()


def _file(name: str, content: Callable[[State], bytes]) -> Writer:
    def write(state: State, folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content(state))
        return path

    return write


def _arrays(state: State) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in state.items()}


def _without_checksums(state: State) -> bytes:
    torch.serialization.set_crc32_options(False)
    try:
        return _saved(dict(state))
    finally:
        torch.serialization.set_crc32_options(True)


def rezipped(data: bytes, change: Callable[[str, bytes], bytes]) -> bytes:
    """A zip with every record changed; its name comes without the folder."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name.partition("/")[2], old.read(name)))
    return out.getvalue()


def _big_endian(state: State) -> bytes:
    widths = [t.element_size() // (2 if t.is_complex() else 1) for t in state.values()]

    def swapped(name: str, data: bytes) -> bytes:
        if name == "byteorder":
            return b"big"
        if not name.startswith("data/"):
            return data
        width = widths[int(name[5:])]
        return b"".join(data[at : at + width][::-1] for at in range(0, len(data), width))

    return rezipped(_saved({name: tensor.clone() for name, tensor in state.items()}), swapped)


def tar_of_2017(state: State) -> bytes:
    """What torch.save of torch 0.1 wrote."""
    storages, tensors = [pickle.dumps(len(state), 2)], [pickle.dumps(len(state), 2)]
    numbers = iter(range(1000, 1000 + 2 * len(state)))
    keys: dict[str, int] = {}
    for name, tensor in state.items():
        storage, keys[name] = next(numbers), next(numbers)
        kind = getattr(torch, tensor.type().rpartition(".")[2].replace("Tensor", "Storage"))
        flat = tensor.contiguous()
        raw = flat.reshape(-1).view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        storages.append(pickle.dumps((storage, "cpu", kind), 2) + struct.pack("<q", flat.numel()) + raw)
        sizes = struct.pack(f"<{2 * flat.dim()}q", *flat.shape, *flat.stride())
        head = pickle.dumps((keys[name], storage, torch.FloatTensor), 2) + struct.pack("<ii", flat.dim(), 0)
        tensors.append(head + sizes + struct.pack("<q", 0))
    storages.append(pickle.dumps([], 2))

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> str | None:
            return str(value.key) if isinstance(value, _Tensor) else None

    top = io.BytesIO()
    Pickler(top, 2).dump({name: _Tensor(key) for name, key in keys.items()})
    out = io.BytesIO()
    members = {"sys_info": pickle.dumps({}, 2), "pickle": top.getvalue()}
    members |= {"tensors": b"".join(tensors), "storages": b"".join(storages)}
    with tarfile.open(fileobj=out, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5
            tar.addfile(info, io.BytesIO(data))
        end = tar.offset
    return out.getvalue()[:end]  # without the zeros that fill the last 10 KiB


class _Tensor:
    def __init__(self, key: int) -> None:
        self.key = key


def _safetensors(state: State, folder: Path) -> Path:
    _save_file(dict(state), folder / "weights.pt")
    return folder / "weights.pt"


def _save_file(state: dict[str, torch.Tensor], path: Path) -> None:
    whole = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    save_file(whole, path, {"format": "pt"})


def _shards(suffix: str, stem: str, save: Callable[[dict[str, torch.Tensor], Path], object]) -> Writer:
    def write(state: State, folder: Path) -> Path:
        names = list(state)
        pieces = [names[i::3] for i in range(3) if names[i::3]]
        files = {f"{stem}-{i + 1:05}-of-{len(pieces):05}{suffix}": piece for i, piece in enumerate(pieces)}
        for file, piece in files.items():
            save({name: state[name].clone() for name in piece}, folder / file)
        index = {"metadata": {"total_size": 1}, "weight_map": {n: f for f, piece in files.items() for n in piece}}
        path = folder / f"{stem}{suffix}.index.json"
        path.write_text(json.dumps(index), encoding="utf-8")
        return path

    return write


def _folder(write: Writer) -> Writer:
    def written(state: State, folder: Path) -> Path:
        write(state, folder)
        (folder / "config.json").write_text('{"architectures": ["Net"]}', encoding="utf-8")
        torch.save({"state": {}, "param_groups": []}, folder / "optimizer.pt")
        return folder

    return written


def _dcp(state: State, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(state), checkpoint_id=folder / "step_10")
    return folder / "step_10"


def dcp_in_chunks(state: State, folder: Path, ways: tuple[int, ...] = (2, 2)) -> Path:
    """A folder as several ranks write it, every tensor cut along its first dimensions."""
    folder = folder / "step_20"
    folder.mkdir()
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    files = [io.BytesIO(), io.BytesIO()]
    turn = itertools.cycle(range(len(files)))
    for name, tensor in state.items():
        chunks = list(_cut(tensor, ways))
        for offset, chunk in chunks:
            number = next(turn)
            data = _saved(chunk.clone())
            place = _StorageInfo(f"__{number}_0.distcp", files[number].tell(), len(data))
            places[MetadataIndex(name, offset)] = place
            files[number].write(data)
        listed = [ChunkStorageMetadata(torch.Size(offset), chunk.shape) for offset, chunk in chunks]
        tensors[name] = TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, listed)
    for number, file in enumerate(files):
        (folder / f"__{number}_0.distcp").write_bytes(file.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(tensors, storage_data=places)))
    return folder


def _cut(tensor: torch.Tensor, ways: tuple[int, ...]) -> Iterator[tuple[list[int], torch.Tensor]]:
    pieces = [([0] * tensor.dim(), tensor)]
    for dim, count in enumerate(ways[: tensor.dim()]):
        cut = []
        for offset, piece in pieces:
            for part in piece.tensor_split(count, dim):
                cut.append((offset[:], part))
                offset[dim] += part.shape[dim]
        pieces = cut
    yield from pieces


def _torchscript(state: State, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Shadow(state)), folder / "script.pt")
    return folder / "script.pt"


def script_of_2019(state: State) -> bytes:
    """What torch.jit.save of torch 1.0 to 1.3 wrote, without the code."""
    kinds = {torch.float32: "FLOAT", torch.float64: "DOUBLE", torch.int64: "INT64", torch.bool: "BOOL"}
    tensors: list[dict[str, Any]] = []
    records: dict[str, bytes] = {}
    root: dict[str, Any] = {"name": "", "optimize": True}
    for number, (name, tensor) in enumerate(state.items()):
        key, flat = f"tensors/{number}", tensor.contiguous()
        records[key] = flat.reshape(-1).view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        sizes = {"dims": list(map(str, flat.shape)), "strides": list(map(str, flat.stride())), "offset": "0"}
        tensors.append({**sizes, "dataType": kinds[flat.dtype], "data": {"key": key}, "device": "cpu"})
        *path, leaf = name.split(".")
        module = root
        for step in path:
            without_prefix = module.setdefault("submodules", [])
            module = (
                next((m for m in without_prefix if m["name"] == step), None)
                or without_prefix.append({"name": step})
                or without_prefix[-1]
            )
        entry = {"isBuffer": not tensor.is_floating_point(), "tensorId": str(number), "name": leaf}
        module.setdefault("parameters", []).append(entry)
    model = {"protoVersion": "1", "mainModule": root, "producerName": "pytorch", "tensors": tensors}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in {"version": b"1\n", "model.json": json.dumps(model).encode(), **records}.items():
            archive.writestr(f"script/{name}", data)
    return out.getvalue()


def _exported(state: State, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(Shadow(state), (torch.ones(1),)), folder / "program.pt2")
    return folder / "program.pt2"


def _exported_before_2_8(state: State) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("version", "8.9")
        archive.writestr("serialized_exported_program.json", "{}")
        archive.writestr("serialized_state_dict.pt", _saved(dict(state)))
        archive.writestr("serialized_constants.pt", _saved({}))
    return out.getvalue()


def _npz(state: State, folder: Path) -> Path:
    numpy.savez(folder / "weights.npz", **_arrays(state))
    return folder / "weights.npz"


def _npz_compressed(state: State, folder: Path) -> Path:
    numpy.savez_compressed(folder / "weights.npz", **_arrays(state))
    return folder / "weights.npz"


def _object(state: State, folder: Path) -> BinaryIO:
    return io.BytesIO(_saved(dict(state)))


class _Pipe(io.RawIOBase):
    """A stream that can only be read once, from the beginning to the end."""

    def __init__(self, data: bytes) -> None:
        self._inner = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._inner.readinto(buffer)


def _pipe(state: State, folder: Path) -> BinaryIO:
    return io.BufferedReader(_Pipe(_saved(dict(state))))  # type: ignore[return-value]


FORMATS: dict[str, Writer] = {
    "torch zip": _file("zip.pt", lambda state: _saved(dict(state))),
    "torch zip, pickle protocol 4": _file("zip4.pt", lambda state: _saved(dict(state), pickle_protocol=4)),
    "torch zip without checksums": _file("unchecked.pt", _without_checksums),
    "torch zip of a big-endian machine": _file("big.pt", _big_endian),
    "torch legacy": _file("legacy.pth", lambda state: _saved(dict(state), _use_new_zipfile_serialization=False)),
    "whole module": _file("module.pt", lambda state: _saved(Shadow(state))),
    "whole module, legacy": _file(
        "module.pkl", lambda state: _saved(Shadow(state), _use_new_zipfile_serialization=False)
    ),
    "training checkpoint": _file(
        "last.ckpt", lambda state: _saved({"epoch": 3, "state_dict": dict(state), "hparams": Path("x")})
    ),
    "deepspeed": _file(
        "mp_rank_00_model_states.pt",
        lambda state: _saved({"module": dict(state), "buffer_names": [], "ds_version": "0.14", "ds_config": {}}),
    ),
    "pickle 0": _file("0.pkl", lambda state: pickle.dumps(dict(state), 0)),
    "pickle 2": _file("2.pkl", lambda state: pickle.dumps(dict(state), 2)),
    "pickle 5": _file("5.pkl", lambda state: pickle.dumps(dict(state), 5)),
    "pickled module": _file("module.pickle", lambda state: pickle.dumps(Shadow(state))),
    "pickled arrays 2": _file("arrays2.pkl", lambda state: pickle.dumps(_arrays(state), 2)),
    "pickled arrays 5": _file("arrays5.pkl", lambda state: pickle.dumps(_arrays(state), 5)),
    "arrays in a torch zip": _file("arrays.pt", lambda state: _saved(_arrays(state))),
    "arrays in a torch zip, protocol 4": _file("arrays4.pt", lambda s: _saved(_arrays(s), pickle_protocol=4)),
    "npz": _npz,
    "npz compressed": _npz_compressed,
    "safetensors": _safetensors,
    "safetensors shards": _shards(".safetensors", "model", _save_file),
    "torch shards": _shards(".bin", "pytorch_model", torch.save),
    "folder of shards": _folder(_shards(".safetensors", "model", _save_file)),
    "folder of one file": _folder(_file("pytorch_model.bin", lambda state: _saved(dict(state)))),
    "distributed checkpoint": _dcp,
    "distributed checkpoint in chunks": dcp_in_chunks,
    "torchscript": _torchscript,
    "exported program": _exported,
    "exported program before 2.8": _file("program.pt2", _exported_before_2_8),
    "gzip of a torch zip": _file("zip.pt.gz", lambda state: gzip.compress(_saved(dict(state)))),
    "gzip of a pickle": _file("arrays.pkl.gz", lambda state: gzip.compress(pickle.dumps(_arrays(state)))),
    "file object": _object,
    "pipe": _pipe,
}
"""Name -> what writes it; the state dict holds float32, int64 and bool tensors of two dimensions at most."""


def again(written: Written) -> Written:
    """The same checkpoint for another reading."""
    if isinstance(written, io.BufferedReader):
        raw: Any = written.raw
        return io.BufferedReader(_Pipe(raw._inner.getvalue()))  # type: ignore[return-value]
    return written


def files_of(written: Written) -> list[Path]:
    """The files that a checkpoint on disk consists of; none for file objects."""
    if not isinstance(written, Path):
        return []
    if written.is_dir():
        return sorted(path for path in written.iterdir() if path.suffix in (".safetensors", ".bin", ".distcp"))
    if written.name.endswith(".index.json"):
        return sorted(path for path in written.parent.iterdir() if "-of-" in path.name)
    return [written]
