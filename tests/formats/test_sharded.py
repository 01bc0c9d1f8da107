"""Rules I1 to I4: an index is hostile input, and so is a folder with more than one answer."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reading_tools import saved
from safetensors.torch import save_file
from systems import needs_links, needs_named_pipes
from torch import nn

from smartload import (
    AmbiguousKeysError,
    CheckpointNotFoundError,
    SmartLoadError,
    UnreadableError,
    UnsafeCheckpointError,
    inspect,
    smart_load,
)

NET = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
STATE = NET.state_dict()
PIECES = ({"0.weight", "0.bias"}, {"1.weight", "1.bias"})
NAMES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards and their index, as save_pretrained writes them."""
    for name, keys in zip(NAMES, PIECES, strict=True):
        save_file({key: STATE[key].clone() for key in keys}, tmp_path / name)
    write_index(tmp_path, {key: name for name, keys in zip(NAMES, PIECES, strict=True) for key in keys})
    return tmp_path


def write_index(folder: Path, weight_map: object, name: str = "model.safetensors.index.json") -> Path:
    path = folder / name
    path.write_text(json.dumps({"metadata": {"total_size": 88}, "weight_map": weight_map}), encoding="utf-8")
    return path


def loads(source: Any) -> str:
    """The format by which the source loads, equal in all bits."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    report = smart_load(net, source)
    assert all(torch.equal(net.state_dict()[key], STATE[key]) for key in STATE)
    return report.format


def problem_of(source: Any, kind: type[SmartLoadError] = UnreadableError) -> Any:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(kind) as caught:
        smart_load(net, source)
    assert all(torch.equal(net.state_dict()[key], before[key]) for key in before)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
    return caught.value.problem


def test_the_index_and_the_folder_load_alike(folder: Path) -> None:
    assert loads(folder) == loads(folder / "model.safetensors.index.json") == "2 shards of safetensors"
    assert loads(str(folder) + "/") == "2 shards of safetensors"


def test_any_name_of_an_index_will_do(folder: Path) -> None:
    text = (folder / "model.safetensors.index.json").read_text(encoding="utf-8")
    for name in ("weights.index.json", "model.safetensors.index.fp16.json", "index", "a.bin"):
        (folder / name).write_text(text, encoding="utf-8")
        assert loads(folder / name) == "2 shards of safetensors"


def test_every_tensor_is_said_to_be_where_it_lies(folder: Path) -> None:
    found = inspect(folder)
    assert found.parts[""].entries.keys() == STATE.keys()
    assert str(found).startswith("model.safetensors.index.json: 2 shards of safetensors\n")


HOSTILE: dict[str, str] = {
    "absolute": "/etc/passwd",
    "above": "../model.safetensors",
    "below": "sub/model.safetensors",
    "drive": "C:model.safetensors",
    "UNC": "\\\\server\\share\\model.safetensors",
    "backslash": "..\\model.safetensors",
    "hidden": ".model.safetensors",
    "NUL": "model\0.safetensors",
    "empty": "",
    "dots": "..",
    "control": "a\x1b[31m.safetensors",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_only_plain_names_beside_the_index_are_opened(folder: Path, name: str) -> None:
    # I2.
    index = write_index(folder, dict.fromkeys(STATE, HOSTILE[name]))
    assert problem_of(index, UnsafeCheckpointError).kind in ("shard_name", "shard_suffix")


@pytest.mark.parametrize(
    ("weight_map", "kind"),
    [
        ({"a": "b.bin"}, "shard_suffix"),
        ({"a": "b.safetensors", "c": "d.bin"}, "shard_suffix"),
        ({"a": "b.py"}, "shard_suffix"),
        ({"a": "training_args.json"}, "shard_suffix"),
    ],
)
def test_shards_are_of_the_kind_of_the_index(folder: Path, weight_map: object, kind: str) -> None:
    assert problem_of(write_index(folder, weight_map), UnsafeCheckpointError).kind == kind


def test_no_pickle_hides_behind_the_name_of_safetensors(folder: Path) -> None:
    # I4.
    torch.save({key: STATE[key] for key in PIECES[0]}, folder / NAMES[0])
    problem_of(folder / "model.safetensors.index.json")


@needs_links
def test_a_link_out_of_the_folder_is_not_followed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "x.safetensors"
    (folder / NAMES[0]).rename(elsewhere)
    (folder / NAMES[0]).symlink_to(elsewhere)
    assert problem_of(folder, UnsafeCheckpointError).kind == "shard_outside"


@needs_links
def test_links_inside_the_folder_are_followed(folder: Path) -> None:
    (folder / NAMES[0]).rename(folder / "blob")
    (folder / NAMES[0]).symlink_to("blob")
    assert loads(folder) == "2 shards of safetensors"


@needs_links
def test_a_download_cache_is_read(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A folder of names, all of them links to one folder of contents."""
    cache = tmp_path_factory.mktemp("cache")
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert loads(snapshot) == "2 shards of safetensors"


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / NAMES[1]).unlink()
    problem = problem_of(folder, CheckpointNotFoundError)
    assert (problem.kind, problem.facts["name"]) == ("shard_missing", NAMES[1])


def test_a_key_in_no_shard_is_named(folder: Path) -> None:
    # I3.
    mapping = {key: NAMES[key.startswith("1")] for key in STATE} | {"2.weight": NAMES[1]}
    assert problem_of(write_index(folder, mapping)).facts == {"name": NAMES[1], "keys": "2.weight"}


def test_a_key_that_the_index_does_not_name_is_named(folder: Path) -> None:
    mapping = {key: NAMES[key.startswith("1")] for key in STATE if key != "1.bias"}
    assert problem_of(write_index(folder, mapping)).kind == "shard_more"


def test_a_key_in_two_shards_is_refused(folder: Path) -> None:
    save_file({key: STATE[key].clone() for key in (*PIECES[0], "1.bias")}, folder / NAMES[0])
    assert problem_of(folder).kind == "shard_more"


def test_an_index_that_names_a_key_twice_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(f'{{"weight_map": {{"0.bias": "{NAMES[0]}", "0.bias": "{NAMES[1]}"}}}}', encoding="utf-8")
    assert problem_of(path).kind == "key_twice"


@pytest.mark.parametrize("weight_map", [{}, {"a": 3}, {"a": None}, {"a": ["b.safetensors"]}])
def test_an_index_without_files_is_refused(folder: Path, weight_map: object) -> None:
    assert problem_of(write_index(folder, weight_map)).kind == "index_empty"


@pytest.mark.parametrize("content", ['{"weight_map": []}', '{"weight_map": "a"}', '{"a": {"weight_map": {}}}'])
def test_other_json_is_no_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    assert problem_of(tmp_path / "config.json").kind == "json"


def test_an_index_that_names_itself_is_refused(folder: Path) -> None:
    path = write_index(folder, {"a": "self.safetensors"}, "self.safetensors")
    problem_of(path)


def test_an_index_from_an_open_file_is_refused_with_the_reason(folder: Path) -> None:
    with (folder / "model.safetensors.index.json").open("rb") as file:
        assert problem_of(file).kind == "index_alone"
    assert problem_of(io.BytesIO((folder / "model.safetensors.index.json").read_bytes())).kind == "index_alone"


@needs_named_pipes
def test_a_named_pipe_among_the_shards_is_refused_at_once(folder: Path) -> None:
    (folder / NAMES[0]).unlink()
    os.mkfifo(folder / NAMES[0])
    assert problem_of(folder).kind == "not_regular"


def test_a_folder_among_the_shards_is_refused(folder: Path) -> None:
    (folder / NAMES[0]).unlink()
    (folder / NAMES[0]).mkdir()
    assert problem_of(folder).facts["what"] == "a folder"


def test_a_shard_that_changes_while_it_is_read_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from smartload.load import commit

    def touched(*args: Any) -> None:
        os.utime(folder / NAMES[1])
        original(*args)

    original: Callable[..., None] = commit.read_all
    monkeypatch.setattr(commit, "read_all", touched)
    assert problem_of(folder).kind == "changed"


def test_versions_of_modules_survive_in_shards_of_torch(tmp_path: Path) -> None:
    norm = nn.BatchNorm1d(2)
    state = norm.state_dict()
    torch.save(state, tmp_path / "m-00001-of-00001.bin")
    index = write_index(tmp_path, dict.fromkeys(state, "m-00001-of-00001.bin"), "m.bin.index.json")
    assert inspect(index).parts[""].metadata == {"": {"version": 2}}
    smart_load(nn.BatchNorm1d(2), index)


def test_extra_states_in_shards_bring_their_tensors(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        got: Any = None

        def get_extra_state(self) -> object:
            return {"scales": [torch.arange(3.0), (torch.ones(2),)], "steps": 3}

        def set_extra_state(self, state: object) -> None:
            self.got = state

    net = Extra(2, 1)
    state = net.state_dict()
    torch.save({"weight": state["weight"]}, tmp_path / "a.bin")
    torch.save({"bias": state["bias"], "_extra_state": state["_extra_state"]}, tmp_path / "b.bin")
    index = {"weight": "a.bin", "bias": "b.bin", "_extra_state": "b.bin"}
    smart_load(net, write_index(tmp_path, index, "m.bin.index.json"))
    assert net.got["steps"] == 3
    assert net.got["scales"][0].tolist() == [0.0, 1.0, 2.0]
    assert net.got["scales"][1][0].tolist() == [1.0, 1.0]


# ------------------------------------------------------------------------------------------------------- folders


def test_two_complete_sets_are_refused_by_name(folder: Path) -> None:
    torch.save(STATE, folder / "pytorch_model.bin")
    problem = problem_of(folder, AmbiguousKeysError)
    assert problem.kind == "folder_two"
    assert "model.safetensors.index.json, pytorch_model.bin" in problem.facts["names"]
    assert problem.facts["first"] == f"{folder.name}/model.safetensors.index.json"
    assert loads(folder / "pytorch_model.bin") == "torch zip"


def test_a_set_that_is_not_whole_is_not_taken_for_one(folder: Path) -> None:
    """A download of one kind often brings the index of the other along."""
    write_index(folder, {"a": "pytorch_model-00001-of-00001.bin"}, "pytorch_model.bin.index.json")
    assert loads(folder) == "2 shards of safetensors"
    (folder / NAMES[0]).unlink()
    torch.save(STATE, folder / "pytorch_model.bin")
    assert loads(folder) == "torch zip"


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "model.fp16.safetensors", "diffusion_pytorch_model.safetensors", "anything.safetensors"],
)
def test_the_one_file_of_weights_is_taken(tmp_path: Path, name: str) -> None:
    save_file(STATE, tmp_path / name)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "training_args.bin").write_bytes(saved({"lr": 0.1}))
    (tmp_path / "optimizer.pt").write_bytes(saved({"state": {}, "param_groups": []}))
    (tmp_path / "rng_state_0.pth").write_bytes(saved({"cpu": torch.get_rng_state()}))
    (tmp_path / "sub").mkdir()
    assert loads(tmp_path) == "safetensors"


@pytest.mark.parametrize(
    "names",
    [
        ["model.safetensors", "model_1.safetensors"],
        ["model.safetensors", "model_ema.safetensors"],
        ["model.safetensors", "best.ckpt"],
        ["a.pt", "b.pt"],
    ],
)
def test_two_files_of_weights_are_a_question(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (save_file if name.endswith(".safetensors") else torch.save)(dict(STATE), tmp_path / name)
    problem = problem_of(tmp_path, AmbiguousKeysError)
    assert problem.facts["names"] == ", ".join(sorted(names, key=len))
    assert problem.facts["first"].endswith(min(names, key=len))


@pytest.mark.parametrize(
    "names",
    [
        ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"],
        ["pytorch_model.bin", "adapter_model.bin"],
        ["model-00001-of-00001.safetensors"],
        ["best.pth.tar", "optimizer.bin"],
    ],
)
def test_what_lies_beside_the_weights_is_no_set_of_its_own(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (save_file if name.endswith(".safetensors") else torch.save)(dict(STATE), tmp_path / name)
    assert loads(tmp_path) in ("torch zip", "safetensors")


@pytest.mark.parametrize(
    ("names", "kind", "says"),
    [
        (["a.txt"], "folder", "it holds a.txt"),
        (["model-00001-of-00002.safetensors", "x"], "folder_shards", "Download the .index.json, too"),
        (["bf16_zero_pp_rank_0_mp_rank_00_optim_states.x"], "folder_zero", "zero_to_fp32.py"),
        (["latest", "zero_to_fp32.py"], "folder_zero", "zero_to_fp32.py"),
        (["saved_model.pb"], "tensorflow", "TensorFlow"),
        (["model.ckpt.index", "model.ckpt.data-00000-of-00001"], "tensorflow", "TensorFlow"),
    ],
)
def test_a_folder_without_weights_says_what_it_is(tmp_path: Path, names: list[str], kind: str, says: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(saved(STATE))
    with pytest.raises(UnreadableError, match=says) as caught:
        smart_load(NET, tmp_path)
    assert caught.value.problem.kind == kind  # type: ignore[union-attr]
