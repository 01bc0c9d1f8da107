"""Disks on which `W.pth` is `w.pth`, and files that were copied from one to a disk where it is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from disks import ignore_case
from safetensors.torch import save_file
from torch import nn

from smartload import CheckpointNotFoundError, SmartLoadError, convert, smart_load

STATE = nn.Linear(3, 2).state_dict()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two shards, whose index writes their names with capitals."""
    run = tmp_path / "run"
    run.mkdir()
    shards = {"weight": "m-1.safetensors", "bias": "m-2.safetensors"}
    for key, name in shards.items():
        save_file({key: STATE[key].clone()}, run / name)
    index = {"weight_map": {key: name.replace("m", "M", 1) for key, name in shards.items()}}
    (run / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return run


def loads(path: Path) -> None:
    net = nn.Linear(3, 2)
    smart_load(net, path)
    assert all(torch.equal(value, STATE[key]) for key, value in net.state_dict().items())


def refused(path: Path, kind: type[SmartLoadError] = SmartLoadError) -> str:
    net = nn.Linear(3, 2)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(kind) as caught:
        smart_load(net, path)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    return str(caught.value)


def test_shards_in_another_case_load_by_folder_and_by_index(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ignore_case(folder.parent, monkeypatch)
    loads(folder)
    loads(folder.parent / "RUN")
    loads(folder / "MODEL.safetensors.index.json")


def test_where_case_counts_the_refusal_says_so(folder: Path) -> None:
    if (folder / "M-1.safetensors").exists():
        loads(folder)
        return
    for path in (folder, folder / "model.safetensors.index.json"):
        assert refused(path, CheckpointNotFoundError) == (
            "model.safetensors.index.json: 'M-1.safetensors', one of the files that it names, lies in its folder as "
            "'m-1.safetensors'. Rename that file: on this disk, upper and lower case make two names."
        )
    for name in ("m-1.safetensors", "m-2.safetensors"):  # what the message says
        (folder / name).rename(folder / name.replace("m", "M", 1))
    loads(folder)


def test_a_shard_that_is_nowhere_is_named_by_the_folder_as_by_the_index(folder: Path) -> None:
    index = {"weight_map": {"weight": "m-1.safetensors", "bias": "m-9.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "m-2.safetensors").unlink()
    for path in (folder, folder / "model.safetensors.index.json"):
        assert "'m-9.safetensors', one of the files that it names, is not in its folder" in refused(path)


def test_convert_sees_that_the_destination_is_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ignore_case(tmp_path, monkeypatch)
    torch.save(STATE, tmp_path / "a.pth")
    before = (tmp_path / "a.pth").read_bytes()
    with pytest.raises(SmartLoadError, match="is the checkpoint itself"):
        convert(tmp_path / "a.pth", tmp_path / "A.pth")
    with (tmp_path / "a.pth").open("rb") as file, pytest.raises(SmartLoadError, match="is the checkpoint itself"):
        convert(file, tmp_path / "A.pth")
    assert (tmp_path / "a.pth").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_convert_does_not_write_into_the_folder_that_it_reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ignore_case(folder.parent, monkeypatch)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(SmartLoadError, match="lies in the folder that is read"):
        convert(folder, folder.parent / "RUN" / "out.safetensors")
    assert sorted(path.name for path in folder.iterdir()) == before
