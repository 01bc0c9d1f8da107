"""Clean weights of any checkpoint: what is written, what is refused, and that nothing is lost where it fails."""

from __future__ import annotations

import _thread
import io
import json
import os
import re
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from formats import State, Written, again, dcp_in_chunks, files_of
from reading_tools import watched
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from systems import (
    forget_peak,
    in_use,
    needs_extended_attributes,
    needs_file_size_limits,
    needs_links,
    needs_named_pipes,
    needs_owners,
    peak_memory,
)
from tagging import saved
from torch import nn
from torch.optim.swa_utils import AveragedModel

from smartload import (
    AmbiguousKeysError,
    CastError,
    CheckpointNotFoundError,
    KeyMismatchError,
    SmartLoadError,
    UnreadableError,
    convert,
    smart_load,
)
from smartload.conversion import write as writing
from smartload.conversion.diff import diff
from smartload.formats.safetensors import DTYPES as HEADER_DTYPES
from smartload.load.entries import same_extra_state
from smartload.reading import files

Save = Callable[[State], Written]
HELPERS = str(Path(__file__).parents[1] / "helpers")
SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    net(torch.randn(16, 4))
    return net


def written(path: Path) -> dict[str, torch.Tensor]:
    """What plain torch, or the package of safetensors, finds in a file."""
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def assert_clean(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    found = written(path)
    assert found.keys() == state.keys()
    for name, tensor in found.items():
        assert type(tensor) is torch.Tensor
        assert (tensor.device.type, tensor.is_contiguous(), tensor.requires_grad) == ("cpu", True, False)
        assert (tensor.dtype, tensor.shape) == (state[name].dtype, state[name].shape)
        assert torch.equal(tensor, state[name]), name


def refused(kind: type[BaseException], source: Any, to: Path, **options: Any) -> str:
    """The words of a refusal that leaves the folder of the destination as it was."""
    before = {path: (path.read_bytes(), path.stat().st_ino) for path in to.parent.iterdir() if path.is_file()}
    with pytest.raises(kind) as caught:
        convert(source, to, **options)
    after = {path: (path.read_bytes(), path.stat().st_ino) for path in to.parent.iterdir() if path.is_file()}
    assert after == before
    return str(caught.value)


@pytest.fixture(params=[".pth", ".safetensors"])
def to(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A destination with something in it."""
    folder = tmp_path / "out"
    folder.mkdir()
    path = folder / f"clean{request.param}"
    path.write_bytes(b"what was there")
    return path


@pytest.fixture
def pth(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir(exist_ok=True)
    path = folder / "clean.pth"
    path.write_bytes(b"what was there")
    return path


# ------------------------------------------------------------------------------------------------- what is written


def test_every_format(checkpoint: Save, to: Path) -> None:
    state = network().state_dict() | {"mask": torch.rand(2, 3) > 0.5, "none": torch.empty(0, 3)}
    assert convert(checkpoint({f"module.{name}": tensor for name, tensor in state.items()}), to) == to
    assert_clean(to, state)
    assert [path.name for path in to.parent.iterdir()] == [to.name]


def test_nothing_is_run_and_the_source_stays_as_it_is(checkpoint: Save, to: Path) -> None:
    source = checkpoint(network().state_dict())
    convert(source, to)  # what is imported by a first call is not the file's doing
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files_of(source)}
    source = again(source)
    with watched() as seen:
        convert(source, to)
    assert [event for event in seen if to.parent.name not in str(event)] == []
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files_of(source)} == before


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_training_checkpoint_becomes_its_weights(suffix: str, tmp_path: Path) -> None:
    net, to = network(), tmp_path / f"clean{suffix}"
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(4, 4)).sum().backward()
    optimizer.step()
    whole = {"epoch": 3, "optimizer": optimizer.state_dict(), "state_dict": nn.DataParallel(net).state_dict()}
    convert(saved(whole, "cuda:7"), to)
    assert_clean(to, net.state_dict())
    fresh = network()
    fresh.load_state_dict(written(to), strict=True)
    smart_load(network(), to)


def test_versions_are_kept_under_the_names_that_go_with_them(pth: Path) -> None:
    net = network()
    wrapped = nn.DataParallel(nn.Sequential(net))
    convert({"model": wrapped.state_dict()}, pth, rename={"0": ""})
    assert_clean(pth, net.state_dict())
    assert torch.load(pth)._metadata == net.state_dict()._metadata
    convert(dict(net.state_dict()), pth)
    assert not hasattr(torch.load(pth), "_metadata")


def test_strides_views_and_parameters_are_made_plain(pth: Path, tmp_path: Path) -> None:
    big = torch.arange(1000.0)
    state = {"t": nn.Parameter(torch.randn(3, 5)).t(), "view": big[10:20], "row": big[:100].view(10, 10)[3]}
    torch.save(state, tmp_path / "odd.pt")
    wanted = {name: tensor.detach() for name, tensor in state.items()}
    for source in (tmp_path / "odd.pt", state):
        convert(source, pth)
        assert_clean(pth, wanted)
        assert pth.stat().st_size < 3000


def test_values_in_memory_are_looked_at_only(pth: Path) -> None:
    state = {"w": nn.Parameter(torch.randn(3)), "c": torch.randn(2, dtype=torch.complex64).conj()}
    before = {name: tensor.detach().clone() for name, tensor in state.items()}
    convert(state, pth)
    assert state["w"].requires_grad
    assert_clean(pth, before)
    with torch.inference_mode(), torch.device("meta"):
        convert({"w": state["w"]}, pth)
    assert_clean(pth, {"w": before["w"]})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        self.out.weight = self.embed.weight


@pytest.mark.parametrize("in_memory", [True, False])
def test_tied_names_share_a_storage_where_the_format_can_say_so(in_memory: bool, to: Path) -> None:
    state = Tied().state_dict()
    convert(state if in_memory else saved(state), to)
    assert_clean(to, state)
    found = written(to)
    shared = found["embed.weight"].data_ptr() == found["out.weight"].data_ptr()
    assert shared == (to.suffix == ".pth")
    Tied().load_state_dict(found, strict=True)


def test_two_views_of_one_tensor_are_two_tensors_in_safetensors(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    state = {"a": whole, "b": whole.view(2, 3)}
    for source in (state, saved(state)):
        convert(source, tmp_path / "x.safetensors")
        assert_clean(tmp_path / "x.safetensors", state)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_mode_of_any_new_file(umask: int, to: Path) -> None:
    to.unlink()
    before = os.umask(umask)
    try:
        (to.parent / "other").touch()
        convert(network().state_dict(), to)
    finally:
        os.umask(before)
    assert stat.S_IMODE(to.stat().st_mode) == stat.S_IMODE((to.parent / "other").stat().st_mode)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o755, 0o2664])
def test_the_mode_of_a_file_stays(mode: int, to: Path) -> None:
    to.chmod(mode)
    before = to.stat()
    time.sleep(0.01)
    convert(network().state_dict(), to)
    assert to.stat().st_mode == before.st_mode
    assert to.stat().st_mtime_ns > before.st_mtime_ns, "the time is that of the new content"


def test_nobody_may_read_the_new_file_who_may_not_read_the_old(to: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []
    save = writing._save

    def looked_at(content: Any, file: io.FileIO, safe: bool) -> None:
        save(content, file, safe)
        modes.append(os.fstat(file.fileno()).st_mode)

    monkeypatch.setattr(writing, "_save", looked_at)
    to.chmod(0o600)
    convert(network().state_dict(), to)
    assert modes[0] & 0o077 & ~to.stat().st_mode == 0


@needs_owners
def test_the_owner_of_a_file_stays_where_that_is_permitted(to: Path) -> None:
    if os.getuid() == 0:
        os.chown(to, 12345, 54321)
    to.chmod(0o664)
    before = to.stat()
    convert(network().state_dict(), to)
    after = to.stat()
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)


@needs_extended_attributes
def test_extended_attributes_of_a_file_stay(to: Path) -> None:
    os.setxattr(to, "user.note", b"mine")
    convert(network().state_dict(), to)
    assert os.getxattr(to, "user.note") == b"mine"


# Root, whom nothing is forbidden, becomes somebody else first.
AS_A_USER = """
import os, sys, tempfile, torch, smartload
# Before that, so that all is imported: the environment may be in a folder that only root may read.
with tempfile.TemporaryDirectory() as folder:
    smartload.convert({"w": torch.ones(2)}, folder + "/x" + os.path.splitext(sys.argv[1])[1])
if hasattr(os, "getuid") and os.getuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
try:
    smartload.convert({"w": torch.ones(2)}, sys.argv[1])
except smartload.SmartLoadError as error:
    print(isinstance(error, PermissionError), error)
"""


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder in which every user may write."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_is_read_only_stays(suffix: str, shared_folder: Path) -> None:
    to = shared_folder / f"x{suffix}"
    to.write_bytes(b"what was there")
    to.chmod(0o444)
    done = subprocess.run([sys.executable, "-c", AS_A_USER, str(to)], capture_output=True, encoding="utf-8")
    assert done.stdout == (
        f"True {to} could not be written: it is there, and you may not write to it. "
        "Change its permissions, or write to another path.\n"
    ), done.stderr
    assert to.read_bytes() == b"what was there"
    assert os.listdir(shared_folder) == [to.name]
    to.chmod(0o666)
    before = to.stat().st_mode
    done = subprocess.run([sys.executable, "-c", AS_A_USER, str(to)], capture_output=True, encoding="utf-8")
    assert (done.stdout, done.stderr) == ("", "")
    assert_clean(to, {"w": torch.ones(2)})
    assert to.stat().st_mode == before


def test_a_file_of_several_names_is_refused(to: Path) -> None:
    os.link(to, to.parent / "other")
    words = refused(SmartLoadError, network().state_dict(), to)
    assert words == (
        f"{to} is one of 2 names of one file (hard links), and only this name would get the new file. "
        "Remove this name first if that is meant; else write to another path, and copy that file over this one."
    )
    to.unlink()
    convert(network().state_dict(), to)
    assert (to.parent / "other").read_bytes() == b"what was there"


def test_the_same_weights_are_the_same_bytes(tmp_path: Path) -> None:
    state = network().state_dict()
    files = [convert(state, tmp_path / name) for name in ("a.pth", "b.pth")]
    assert files[0].read_bytes() == files[1].read_bytes()


@needs_links
@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_written_through(there: bool, pth: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.pth"
    link.symlink_to(pth)
    if not there:
        pth.unlink()
    assert convert({"w": torch.ones(2)}, link) == link
    assert link.is_symlink()
    assert_clean(pth, {"w": torch.ones(2)})
    assert os.listdir(pth.parent) == [pth.name]


@needs_links
def test_links_without_an_end(pth: Path) -> None:
    a, b, folder = (pth.with_name(name) for name in ("a.pth", "b.pth", "folder"))
    a.symlink_to(b)
    b.symlink_to(a)
    folder.symlink_to(folder)
    for to, link in ((a, a), (b, b), (folder / "x.pth", folder)):
        with pytest.raises(SmartLoadError) as caught:
            convert(numbered("a"), to)
        assert str(caught.value) == (
            f"{to} could not be written: {link} is a link that leads back to itself. "
            "Remove it, or write to another path."
        )
    assert sorted(os.listdir(pth.parent)) == ["a.pth", "b.pth", "clean.pth", "folder"]
    assert "a.pth: the operating system cannot read it" in refused(UnreadableError, a, pth)


@needs_named_pipes
def test_a_named_pipe_is_no_destination(pth: Path) -> None:
    pth.unlink()
    os.mkfifo(pth)
    with pytest.raises(SmartLoadError, match=r"clean\.pth is a named pipe, not a regular file"):
        convert(numbered("a"), pth)
    assert stat.S_ISFIFO(pth.stat().st_mode)


def test_a_working_directory_that_is_gone(tmp_path: Path, pth: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    try:
        (tmp_path / "gone").rmdir()
    except OSError:  # as on Windows, where nobody can remove it
        return
    for kind in (SmartLoadError, FileNotFoundError):
        with pytest.raises(kind, match=r"^x\.pth could not be written: .* the working directory, which was removed"):
            convert(pth, "x.pth")
    assert "there is no file at this path" in refused(CheckpointNotFoundError, "x.pth", pth)
    convert(numbered("a"), pth)


def test_it_says_what_it_did(pth: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = {"epoch": 3, "net": {**AveragedModel(nn.Linear(2, 1)).state_dict(), "note": "x"}}
    with caplog.at_level("INFO", "smartload"):
        convert(whole, pth, dtype="float16")
    assert caplog.messages == [
        f"wrote 2 tensors of the dict in memory (memory) to {pth}: 6 bytes\n"
        "  part:      net\n"
        "  names:     removed 'module.'\n"
        "  cast:      float32 -> float16: weight, bias\n"
        "  left out:  net.note: not a tensor\n"
        "  left out:  net.n_averaged: bookkeeping of AveragedModel\n"
        "  left out:  epoch: an int"
    ]


# ----------------------------------------------------------------------------------------------------------- names


NAMES: dict[str, tuple[str, str]] = {
    "DataParallel": ("module.a.w module.b", "a.w b"),
    "twice": ("module.module.a.w module.module.b", "a.w b"),
    "Opacus": ("_module.a.w _module.b", "a.w b"),
    "Fabric around compile": ("_forward_module._orig_mod.a.w _forward_module._orig_mod.b", "a.w b"),
    "compile around DDP": ("_orig_mod.module.a.w _orig_mod.module.b", "a.w b"),
    "one layer compiled": ("a._orig_mod.w b", "a.w b"),
    "FSDP": ("_fsdp_wrapped_module.a._fsdp_wrapped_module.w _fsdp_wrapped_module.b", "a.w b"),
    "old FSDP": ("_fpw_module.a._fpw_module.w _fpw_module.b", "a.w b"),
    "checkpointed layers": ("a._checkpoint_wrapped_module.w b", "a.w b"),
    "a layer called module among others": ("module.w b", "module.w b"),
    "a layer inside called module": ("a.module.w b", "a.module.w b"),
    "a tensor called like a wrapper": ("_orig_mod module", "_orig_mod module"),
    "AveragedModel": ("n_averaged module.a.w module.b", "a.w b"),
    "DDP around AveragedModel": ("module.n_averaged module.module.a.w", "a.w"),
    "AveragedModel of a compiled model": ("_orig_mod.n_averaged _orig_mod.module.w", "w"),
    "a counter of one's own": ("n_averaged a.w", "n_averaged a.w"),
    "a counter beside Fabric": ("n_averaged _forward_module.w", "n_averaged _forward_module.w"),
    "a prefix that is none of a wrapper": ("model.a.w model.b", "model.a.w model.b"),
}


def numbered(names: str) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([float(at)]) for at, name in enumerate(names.split())}


@pytest.mark.parametrize("case", NAMES)
def test_names(case: str, pth: Path) -> None:
    there, wanted = NAMES[case]
    source = numbered(there)
    convert(saved(source), pth)
    found = written(pth)
    assert " ".join(found) == wanted
    kept = [tensor for name, tensor in source.items() if not (name.endswith("n_averaged") and name not in wanted)]
    assert all(map(torch.equal, found.values(), kept))


RENAMES: dict[str, tuple[str, Any, str]] = {
    "as in the file": ("module.head.w module.b", {"module.head": "fc"}, "fc.w b"),
    "as in the file, wrapper and all": ("module.head.w module.b", {"module.head": "module.fc"}, "fc.w b"),
    "once adapted": ("module.head._orig_mod.w module.b", {"head": "fc"}, "fc.w b"),
    "whole segments only": ("head.w head2.w", {"head": "fc"}, "fc.w head2.w"),
    "the longest": ("a.b.w a.c.w", {"a": "x", "a.b": "y"}, "y.w x.c.w"),
    "a prefix taken away": ("model.a.w model.b", {"model": ""}, "a.w b"),
    "a prefix put in front": ("a.w b", {"": "module"}, "module.a.w module.b"),
    "a function": ("module.A.w module.b", str.lower, "a.w b"),
    "a function that changes all": ("module.a.w module.b", lambda name: name.replace("module", "net"), "net.a.w net.b"),
}


@pytest.mark.parametrize("case", RENAMES)
def test_renames(case: str, pth: Path) -> None:
    there, rename, wanted = RENAMES[case]
    convert(saved(numbered(there)), pth, rename=rename)
    assert " ".join(written(pth)) == wanted


def test_a_rule_that_fits_nothing_is_a_slip_of_the_pen(pth: Path) -> None:
    words = refused(KeyMismatchError, saved(numbered("module.a.w")), pth, rename={"aa": "b"})
    assert "the rename rule 'aa' matched no key of the file; its keys look like module.a.w" in words
    assert "'the function' matched no key" in refused(KeyMismatchError, numbered("a"), pth, rename=str.lower)


@pytest.mark.parametrize(
    ("names", "rename", "first", "second"),
    [
        ("a.w a._orig_mod.w", None, "a.w", "a._orig_mod.w"),
        ("a.w b.w", {"a": "b"}, "a.w", "b.w"),
        ("a.w b.w", lambda name: "x", "a.w", "b.w"),
        ("a._orig_mod.w b.w", {"b": "a"}, "a._orig_mod.w", "b.w"),
    ],
)
def test_two_names_that_become_one(names: str, rename: Any, first: str, second: str, pth: Path) -> None:
    words = refused(AmbiguousKeysError, saved(numbered(names)), pth, rename=rename)
    assert f"{first} and {second} would get the same name" in words


# ----------------------------------------------------------------------------------------------------------- parts


def test_several_state_dicts_are_a_question(pth: Path) -> None:
    source = saved({"epoch": 1, "model": numbered("a b"), "ema": numbered("b a"), "more": {"deep": numbered("c")}})
    assert refused(AmbiguousKeysError, source, pth) == (
        "the file object is ambiguous: it holds several state dicts, and no model says which is meant:\n"
        "  2 keys of 'model': write select='model'\n"
        "  2 keys of 'ema': write select='ema'\n"
        "  1 key of 'more.deep': write select='more.deep'\n"
        "  all 5 keys, each behind the path of its part: write select=''"
    )
    for select, names in {
        "model": "a b",
        "ema": "b a",
        "more.deep": "c",
        "more": "deep.c",
        "": "model.a model.b ema.b ema.a more.deep.c",
    }.items():
        source.seek(0)
        convert(source, pth, select=select)
        assert " ".join(written(pth)) == names


def test_tensors_at_the_top_are_a_state_dict_too(pth: Path) -> None:
    source = {"best": torch.tensor(0.5), "net": numbered("a b")}
    words = refused(AmbiguousKeysError, source, pth)
    assert words.endswith("1 key at the top: write select=''\n  2 keys of 'net': write select='net'")
    convert(source, pth, select="")
    assert_clean(pth, {"best": source["best"]})


def test_an_argument_that_would_not_work_is_not_proposed(pth: Path) -> None:
    source = saved({"a": {"w": torch.ones(1), "b": {"_orig_mod.w": torch.ones(1), "w": torch.zeros(1)}}})
    words = refused(AmbiguousKeysError, source, pth)
    assert words.endswith("  1 key of 'a'\n  1 key of 'a.b'")
    long = "x" * 400
    words = refused(AmbiguousKeysError, {"a": numbered("w"), long: numbered("w v")}, pth)
    assert words.splitlines()[2] == f"  2 keys of '{'x' * 86}..."


def test_names_of_the_very_same_tensors_are_no_conflict(to: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = network().state_dict()
    with caplog.at_level("INFO", "smartload"):
        convert(saved({"model": state, "state_dict": state}), to)
        assert "left out:  state_dict: the same tensors as 'model'" in caplog.text
    assert_clean(to, state)
    with caplog.at_level("INFO", "smartload"):
        convert(saved({**state, "net": state}), to)
        assert "left out:  net: the same tensors as at the top" in caplog.text
    copied = {f"module.{name}": tensor.clone() for name, tensor in state.items()}
    convert(saved({"model": state, "net": copied}), to)
    assert_clean(to, state)


def test_select_goes_on_through_names_and_says_what_it_left(pth: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "smartload"):
        convert(saved({"state_dict": numbered("backbone.a.w backbone.b head.w")}), pth, select="state_dict.backbone")
    assert " ".join(written(pth)) == "a.w b"
    assert "left out:  state_dict.head.w: not selected" in caplog.text
    words = refused(KeyMismatchError, numbered("a.w b"), pth, select="c")
    assert "there is no 'c' in the file" in words


# ----------------------------------------------------------------------------------------------------------- casts


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", torch.float32, torch.float64])
def test_floating_tensors_are_cast_and_no_others(dtype: Any, checkpoint: Save, to: Path) -> None:
    state = network().state_dict() | {"mask": torch.tensor([[True, False]])}
    convert(checkpoint(state), to, dtype=dtype)
    target = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert_clean(to, {name: t.to(target) if t.is_floating_point() else t for name, t in state.items()})


def test_complex_tensors_and_extra_states_keep_their_dtype(pth: Path) -> None:
    state = {"c": torch.randn(2, dtype=torch.complex64), "w": torch.randn(2), "_extra_state": torch.randn(2)}
    for source in (saved(state), state):
        convert(source, pth, dtype="float16")
        assert_clean(pth, state | {"w": state["w"].half()})


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_value_that_would_become_infinite(in_memory: bool, to: Path) -> None:
    state = {"module.w": torch.tensor([1.0, 1e6]), "module.inf": torch.tensor([float("inf"), float("nan")])}
    words = refused(CastError, state if in_memory else saved(state), to, dtype="float16")
    assert words.endswith(
        "module.w is float32 and holds the value 1000000.0, which float16 cannot hold. "
        "Choose a wider dtype, or leave dtype out."
    )
    convert(state if in_memory else saved(state), to, dtype="bfloat16")


@pytest.mark.parametrize("dtype", ["int8", "half2", "Tensor", torch.int64, torch.complex64, 3])
def test_other_dtypes(dtype: Any, pth: Path) -> None:
    assert "dtype must be a floating dtype of torch" in refused(ValueError, numbered("a"), pth, dtype=dtype)


# ---------------------------------------------------------------------------------------------------- extra states


def test_extra_states_of_plain_data_are_kept(pth: Path) -> None:
    extra = {"scale": [torch.ones(2), (1, None, 2.5, "x", b"y", float("nan"))], "more": OrderedDict(a={1, 2})}
    state = {"module.w": torch.ones(1), "module._extra_state": extra}
    for source in (saved(state), state):
        convert(source, pth)
        found = torch.load(pth, weights_only=True)
        assert list(found) == ["w", "_extra_state"]
        kept = found["_extra_state"]
        assert torch.equal(kept["scale"][0], torch.ones(2))
        assert repr(kept["scale"][1]) == repr(extra["scale"][1])
        assert kept["more"] == extra["more"]


def test_extra_states_that_are_tensors_are_tensors(to: Path) -> None:
    state = {"w": torch.ones(1), "a._extra_state": torch.arange(3, dtype=torch.uint8)}
    for source in (saved(state), state):
        convert(source, to)
        assert_clean(to, state)


def test_safetensors_holds_tensors_only(tmp_path: Path) -> None:
    state = {"w": torch.ones(1), "a._extra_state": {"x": 1}}
    words = refused(SmartLoadError, {"net": state}, tmp_path / "x.safetensors")
    assert (
        "net.a._extra_state: these extra states are not tensors, and safetensors holds nothing else. Write a .pth"
        in words
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (1, 1.0),
        ([1], (1,)),
        ([1], [1, 2]),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, OrderedDict(a=1)),
        (torch.ones(1), 1),
        (torch.zeros(1), -torch.zeros(1)),
        (float("nan"), 1.0),
        ([{"x": torch.ones(1)}], [{"x": torch.zeros(1)}]),
    ],
)
def test_extra_states_that_are_not_alike(one: object, other: object) -> None:
    assert same_extra_state(one, one)
    assert not same_extra_state(one, other)
    assert not same_extra_state(other, one)


def test_state_dicts_with_extra_states_can_be_the_same(pth: Path) -> None:
    state = {"w": torch.ones(1), "_extra_state": {"x": torch.ones(2)}}
    other = {"w": torch.ones(1), "_extra_state": {"x": torch.zeros(2)}}
    convert({"a": state, "b": dict(state)}, pth)
    convert(saved({"a": state, "b": dict(state)}), pth)
    refused(AmbiguousKeysError, saved({"a": state, "b": other}), pth)
    refused(AmbiguousKeysError, {"a": state, "b": {"w": state["w"], "_extra_state": 3}}, pth)


# ------------------------------------------------------------------------------------------------------- refusals


def test_what_is_no_plain_tensor_is_refused_by_name(to: Path) -> None:
    sparse = {"w": torch.eye(3).to_sparse()}
    assert "w is a sparse tensor, not a tensor that can be loaded" in refused(UnreadableError, saved(sparse), to)
    assert "w is a tensor of Tensor in sparse_coo layout" in refused(UnreadableError, sparse, to)
    assert "w is a meta tensor" in refused(UnreadableError, {"w": torch.empty(2, device="meta")}, to)
    foreign = {"w": torch.ones(1), "_extra_state": {"x": Path("y")}}
    assert "_extra_state is a pathlib." in refused(UnreadableError, saved(foreign), to)
    assert "_extra_state is an extra state of dict" in refused(UnreadableError, foreign, to)
    for odd in (torch.eye(2).to_sparse(), torch.empty(2, device="meta")):
        words = refused(UnreadableError, {"w": torch.ones(1), "_extra_state": [odd]}, to)
        assert "_extra_state is an extra state of list" in words


def test_weights_that_lie_elsewhere_are_refused(to: Path) -> None:
    empty = {name: torch.empty(0) for name in "abc"}
    assert "the file was saved under DeepSpeed ZeRO-3" in refused(KeyMismatchError, saved(empty), to)
    flat = numbered("_fsdp_wrapped_module._flat_param")
    assert "FSDP flat parameters" in refused(KeyMismatchError, saved(flat), to)


def test_wrong_files_are_refused_as_in_a_load(to: Path, tmp_path: Path) -> None:
    (tmp_path / "lfs.pth").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 46830571\n", encoding="utf-8"
    )
    assert "git lfs pull" in refused(UnreadableError, tmp_path / "lfs.pth", to)
    assert "there is no file" in refused(CheckpointNotFoundError, tmp_path / "nothing.pth", to)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters()).state_dict()
    assert "this is an optimizer's state" in refused(UnreadableError, saved(optimizer), to)


@pytest.mark.parametrize("name", ["x.ckpt", "x", "x.pth.tar", "x.PTH", ".pth", "x.npz"])
def test_other_suffixes(name: str, tmp_path: Path) -> None:
    assert ".pth, .pt, .bin, .safetensors" in refused(ValueError, numbered("a"), tmp_path / name)


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        convert(numbered("a"), 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rename must map"):
        convert(numbered("a"), tmp_path / "x.pth", rename=3)  # type: ignore[arg-type]


def test_what_a_small_file_repeats_is_not_written(to: Path, tmp_path: Path) -> None:
    one = torch.ones(1)
    bombs: dict[str, State] = {
        "an element": {"small": torch.ones(2), "big": one.expand(1 << 29)},
        "many of them": {f"w{at}": one.expand(1 << 20, 5 + at) for at in range(8)},
        "rows": {"w": torch.ones(1 << 10).expand(1 << 20, 1 << 10)},
        "an extra state": {"w": one, "_extra_state": [torch.ones(1 << 10).expand(1 << 10, 1 << 10)] * 20},
    }
    for what, state in bombs.items():
        if to.suffix == ".safetensors" and what == "an extra state":
            continue
        torch.save(state, tmp_path / "bomb.pth")
        assert (tmp_path / "bomb.pth").stat().st_size < 10_000
        forget_peak()
        before, begun = peak_memory(), time.monotonic()
        words = refused(UnreadableError, tmp_path / "bomb.pth", to, dtype="float16")
        assert "from " in words
        assert time.monotonic() - begun < 5
        assert peak_memory() - before < 64 << 20
        if what == "an element":
            assert words.startswith("bomb.pth: with every tensor by itself it would take 1.07 GB, from 1,")
            assert "the largest is big (1.07 GB). " in words
            with pytest.raises(UnreadableError, match=r"the largest is big \(2\.15 GB\)"):
                diff(tmp_path / "bomb.pth", {"big": one}, values=True)
    assert "the largest is big" in refused(UnreadableError, bombs["an element"], to)


def test_names_of_one_tensor_do_not_multiply_it(tmp_path: Path) -> None:
    state = dict.fromkeys((f"w{at}" for at in range(1000)), torch.ones(1 << 18))
    torch.save(state, tmp_path / "tied.pth")
    for source in (tmp_path / "tied.pth", state):
        words = refused(UnreadableError, source, tmp_path / "x.safetensors")
        assert "it would take 1.05 GB, from 1." in words
        assert "A .pth holds tensors that are tied once." in words
        convert(source, tmp_path / "x.pth")
        assert (tmp_path / "x.pth").stat().st_size < 3 << 20


def test_what_real_checkpoints_repeat_is_written(to: Path) -> None:
    mask = torch.ones(1, 1, 1, 1 << 20).expand(1, 1, 12, 1 << 20)  # 48 MiB of 4
    state = {"w": torch.randn(10), "mask": mask, "table": torch.arange(9).expand(1000, 9)}
    for source in (saved(state), state):
        convert(source, to)
        assert_clean(to, state)


# --------------------------------------------------------------------------------------------- the safetensors format


def test_tensors_lie_where_readers_need_them(tmp_path: Path) -> None:
    to = tmp_path / "x.safetensors"
    dtypes = {name: getattr(torch, dtype) for name, dtype in HEADER_DTYPES.items() if hasattr(torch, dtype)}
    state = {name: torch.ones(3, dtype=dtype) for name, dtype in dtypes.items()}
    state |= {"none": torch.empty(0, 3), "scalar": torch.tensor(2.5), "\u6a21\U0001f600": torch.ones(1)}
    convert(state, to)
    raw = to.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    assert size % 8 == 0
    for name, tensor in state.items():
        begin, end = header[name]["data_offsets"]
        assert (begin % tensor.element_size(), end - begin) == (0, tensor.nbytes)
        assert raw[8 + size + begin : 8 + size + end] == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    assert_clean(to, state)


def test_the_bytes_are_those_of_a_small_machine_on_every_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "byteorder", "big")
    for tensor in (torch.tensor([1, 258]), torch.tensor([1 + 2j]), torch.tensor([[1.5], [2.5]]), torch.tensor([True])):
        swapped = writing._little_endian(tensor).numpy().tobytes()
        assert swapped == tensor.numpy().astype(tensor.numpy().dtype.newbyteorder(">")).tobytes()


def test_a_dtype_that_the_format_lacks(tmp_path: Path) -> None:
    state = {"w": torch.ones(1), "c": torch.ones(1, dtype=torch.complex128)}
    words = refused(SmartLoadError, {"net": state}, tmp_path / "x.safetensors")
    assert words.endswith("net.c is complex128, which safetensors cannot hold. Write a .pth file.")


def with_texts(path: Path, texts: dict[str, str] | None) -> Path:
    save_file({"module.w": torch.arange(3.0)}, path, texts)
    return path


def texts_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_texts_of_the_header_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = {"author": "me", "\u6a21": "\u578b \n", "ss_tag": '{"a": 1}', "format": "mlx"}
    source, to = with_texts(tmp_path / "source.safetensors", texts), tmp_path / "x.safetensors"
    with caplog.at_level("INFO", "smartload"):
        convert(source, to, dtype="float16")
        assert texts_of(to) == texts | {"format": "pt"}
        assert "  left out:  __metadata__.format: 'mlx' there; the new file is written by torch" in caplog.text
        caplog.clear()
        convert(to, tmp_path / "y.safetensors")
        assert "left out" not in caplog.text
        assert to.read_bytes() == (tmp_path / "y.safetensors").read_bytes()
        convert(to, tmp_path / "y.pth")
        for name in ("author", "\u6a21", "ss_tag"):  # in the order of the file, which its writer chose
            assert re.search(rf"  left out:  .*__metadata__\.{name}[,:].* has not", caplog.text)
        assert "__metadata__.format" not in caplog.text
        caplog.clear()
        convert(with_texts(tmp_path / "plain.safetensors", {"format": "pt"}), tmp_path / "y.pth")
        convert(with_texts(tmp_path / "plain.safetensors", None), tmp_path / "z.safetensors")
        assert "left out" not in caplog.text
    assert texts_of(tmp_path / "z.safetensors") == {"format": "pt"}


def test_texts_of_shards_are_kept_where_they_agree(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, text in (("a", "1"), ("b", "2")):
        texts = {"format": "pt", "author": "me", "shard": text, name: "only here"}
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors", texts)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}', encoding="utf-8")
    with caplog.at_level("INFO", "smartload"):
        convert(index, tmp_path / "x.safetensors")
    assert texts_of(tmp_path / "x.safetensors") == {"format": "pt", "author": "me", "a": "only here", "b": "only here"}
    assert "  left out:  __metadata__.shard: a text that differs from shard to shard" in caplog.text


def test_texts_are_compared_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = writing._save
    monkeypatch.setattr(writing, "_save", lambda content, *rest: save(replace(content, header={}), *rest))
    assert "reads back differently" in refused(UnreadableError, numbered("a"), tmp_path / "x.safetensors")


def test_the_source_is_never_overwritten(tmp_path: Path) -> None:
    source = tmp_path / "source.pth"
    torch.save(numbered("a b"), source)
    os.link(source, tmp_path / "hard.pth")
    for to in ("source.pth", "hard.pth", "../" + tmp_path.name + "/source.pth"):
        assert "is the checkpoint itself, or a file of it" in refused(SmartLoadError, source, tmp_path / to)
        with source.open("rb") as file:
            assert "is the checkpoint itself" in refused(SmartLoadError, file, tmp_path / to)


@needs_links
def test_the_source_is_not_overwritten_through_a_link(tmp_path: Path) -> None:
    source, link = tmp_path / "source.pth", tmp_path / "soft.pth"
    torch.save(numbered("a b"), source)
    link.symlink_to(source)
    for checkpoint, to in ((source, link), (link, source)):
        assert "is the checkpoint itself, or a file of it" in refused(SmartLoadError, checkpoint, to)
    with source.open("rb") as file:
        assert "is the checkpoint itself" in refused(SmartLoadError, file, link)


def test_no_file_of_a_folder_is_overwritten_or_added(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save(numbered("a b"), folder / "shard.bin")
    index = folder / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"a": "shard.bin", "b": "shard.bin"}}', encoding="utf-8")
    for to in (folder / "new.pth", folder / "shard.bin"):
        assert "lies in the folder that is read" in refused(SmartLoadError, folder, to)
    assert "or a file of it" in refused(SmartLoadError, index, folder / "shard.bin")
    convert(index, folder / "new.pth")


@needs_links
def test_no_file_is_added_to_a_folder_through_a_link(tmp_path: Path) -> None:
    folder, link = tmp_path / "model", tmp_path / "link"
    folder.mkdir()
    torch.save(numbered("a b"), folder / "model.pth")
    link.symlink_to(folder)
    for source, to in ((folder, link), (link, folder), (link, link)):
        assert "lies in the folder that is read" in refused(SmartLoadError, source, to / "new.pth")


def test_no_file_is_added_to_a_distributed_checkpoint(tmp_path: Path) -> None:
    folder = dcp_in_chunks(network().state_dict(), tmp_path)
    for source in (folder, folder / ".metadata"):
        assert "lies in the folder that is read" in refused(SmartLoadError, source, folder / "new.pth")
        convert(source, tmp_path / "new.pth")


def test_a_destination_that_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder.pth").mkdir()
    assert "folder.pth is a folder, not a regular file" in refused(
        SmartLoadError, numbered("a"), tmp_path / "folder.pth"
    )
    (tmp_path / "file").touch()
    for folder in (tmp_path / "nowhere", tmp_path / "file"):
        for kind in (SmartLoadError, FileNotFoundError):
            with pytest.raises(kind) as caught:
                convert(numbered("a"), folder / "x.pth")
            assert str(caught.value) == (
                f"{folder / 'x.pth'} could not be written: there is no folder {folder}. "
                "Make it first, or write to another one."
            )
    # Too long for a name; each system has its own words for that.
    words = refused(SmartLoadError, numbered("a"), tmp_path / ("x" * 300 + ".pth"))
    assert re.search(r"could not be written: [A-Z][a-z ]+\. Nothing was changed there\.$", words)


# ------------------------------------------------------------------------------------------- failures in the middle


class Failing(io.BytesIO):
    """A file whose bytes cannot all be read."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() > 4_000:
            raise OSError(5, "Input/output error")
        return super().read(size)


def test_a_source_that_fails(to: Path) -> None:
    file = io.BytesIO()
    torch.save({"w": torch.randn(100_000)}, file)
    source = Failing(file.getvalue())
    assert refused(UnreadableError, source, to)


@pytest.mark.parametrize(
    ("step", "failure"),
    [
        ("_save", RuntimeError("no")),
        *(
            (step, failure)
            for step in ("_save", "_check_written", "os.replace", "os.fsync")
            for failure in (OSError(28, "No space left on device"), KeyboardInterrupt(), SystemExit())
        ),
    ],
)
def test_whatever_fails_nothing_is_left_behind(
    step: str, failure: BaseException, to: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        assert len(list(to.parent.iterdir())) == 2, "the new file lies beside the old one"
        raise failure

    monkeypatch.setattr(f"smartload.conversion.write.{step}", fail)
    words = refused(type(failure), network().state_dict(), to)
    if isinstance(failure, Exception):
        reason = getattr(failure, "strerror", "no")
        assert words == f"{to} could not be written: {reason}. Nothing was changed there."
        refused(SmartLoadError, network().state_dict(), to)


@needs_file_size_limits
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys, torch, smartload; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: smartload.convert({'w': torch.randn(100_000)}, sys.argv[1])\n"
        "except smartload.SmartLoadError as error: print(error)"
    )
    for name in ("x.pth", "x.safetensors"):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], capture_output=True, encoding="utf-8")
        assert f"{tmp_path / name} could not be written: " in done.stdout, done.stderr
        assert list(tmp_path.iterdir()) == []


class Interrupted(io.FileIO):
    """A file on which writing fails in the middle of a tensor."""

    failure: BaseException = KeyboardInterrupt()

    def write(self, data: Any) -> int:
        if len(data) > 1000:
            super().write(data[:999])
            raise self.failure
        return super().write(data)


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_stops_torch_while_it_writes_is_what_is_said(
    failure: BaseException, pth: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Interrupted, "failure", failure)
    monkeypatch.setattr(io, "FileIO", Interrupted)
    try:
        raise ValueError("what the caller handles already")
    except ValueError:
        words = refused(type(failure), {"w": torch.ones(1000)}, pth)
    said = f"{pth} could not be written: No space left on device. Nothing was changed there."
    assert words == (said if isinstance(failure, OSError) else "")


def test_a_destination_that_somebody_has_open(to: Path) -> None:
    convert(network().state_dict(), to)
    before = to.read_bytes()
    with to.open("rb") as file:
        if os.name == "nt":
            words = refused(PermissionError, {"w": torch.ones(3)}, to)
            assert words.startswith(f"{to} could not be replaced: a program has it open, or it may not be written.")
        else:
            convert({"w": torch.ones(3)}, to)
        assert file.read() == before  # whoever has it open goes on reading what it opened
    convert({"w": torch.ones(3)}, to)
    smart_load(net := nn.ParameterDict({"w": nn.Parameter(torch.zeros(3))}), to)
    assert net["w"].tolist() == [1, 1, 1]


def test_a_destination_that_windows_keeps_is_refused_by_name(to: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(network().state_dict(), to)
    monkeypatch.setattr(files, "_WINDOWS", True)
    monkeypatch.setattr(files, "REPLACE_PATIENCE", 0.1)
    monkeypatch.setattr(os, "replace", in_use)
    assert refused(PermissionError, {"w": torch.ones(3)}, to) == (
        f"{to} could not be replaced: a program has it open, or it may not be written. Nothing was changed there. "
        "A tensor of torch.load(mmap=True) or of safetensors keeps its file open, too: delete it, or write to another "
        "path."
    )


# Ctrl-C may come when Python has opened a file and not yet given it to the block that closes it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_control_c_at_any_moment_of_the_writing_is_control_c(pth: Path, ctrl_c: Callable[[], None]) -> None:
    state = {str(i): torch.ones(300) for i in range(2000)}
    convert(state, pth)
    timers = []  # kept: Python drops a Ctrl-C that comes while it frees a thread
    for moment in (0.002, 0.01, 0.03, 0.05, 0.07, 0.09, 0.11, 0.13):
        timers.append(threading.Timer(moment, _thread.interrupt_main))
        timers[-1].start()
        with pytest.raises(KeyboardInterrupt):
            any(convert(state, pth) is None for _ in iter(int, 1))  # again and again, until it is interrupted
        assert [path.name for path in pth.parent.iterdir()] == [pth.name]
        assert len(written(pth)) == 2000


def test_control_c_once_the_file_is_written(
    to: Path, monkeypatch: pytest.MonkeyPatch, ctrl_c: Callable[[], None]
) -> None:
    save = writing._save

    def interrupted(*args: Any) -> None:
        save(*args)
        ctrl_c()

    monkeypatch.setattr(writing, "_save", interrupted)
    refused(KeyboardInterrupt, network().state_dict(), to)


@pytest.mark.parametrize("how", ["a bit", "cut", "empty", "another"])
def test_what_does_not_read_back_as_it_was_meant(how: str, to: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = writing._save

    def spoiled(content: Any, file: io.FileIO, safe: bool) -> None:
        save(replace(content, values={}) if how == "another" else content, file, safe)
        file.seek(0)
        data = bytearray(file.read())
        if how == "a bit":
            at = data.index(content.values["w"].numpy().tobytes())
            data[at] ^= 1
        file.seek(0)
        file.truncate()
        file.write({"cut": data[:-10], "empty": b""}.get(how, data))

    monkeypatch.setattr(writing, "_save", spoiled)
    words = refused(UnreadableError, {"w": torch.randn(50)}, to)
    assert words.startswith(f"what was written for {to} reads back differently.")


def test_versions_are_compared_too(pth: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = writing._save
    monkeypatch.setattr(writing, "_save", lambda content, *rest: save(replace(content, versions=None), *rest))
    assert "reads back differently" in refused(UnreadableError, network().state_dict(), pth)


def test_a_source_that_changes_meanwhile(tmp_path: Path, to: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source.pth"
    torch.save(numbered("a b"), source)
    read_all = writing.read_all

    def changing(*args: Any) -> None:
        read_all(*args)
        source.write_bytes(source.read_bytes())

    monkeypatch.setattr(writing, "read_all", changing)
    assert "the file changed while it was read" in refused(UnreadableError, source, to)


def test_memory_is_about_one_checkpoint(tmp_path: Path) -> None:
    """Read and written in a process of its own: the peak is the imports and the tensors once, and a buffer."""
    torch.save({f"w{at}": torch.randn(1 << 20) for at in range(64)}, tmp_path / "big.pth")
    code = (
        f"import sys, torch, smartload, safetensors.torch; sys.path.append({HELPERS!r})\n"
        "from systems import peak_memory\n"
        "smartload.convert({'w': torch.ones(1)}, sys.argv[2]); before = peak_memory()\n"
        "smartload.convert(*sys.argv[1:]); print(peak_memory() - before)"
    )
    for name in ("x.pth", "x.safetensors"):
        run = [sys.executable, "-c", code, str(tmp_path / "big.pth"), str(tmp_path / name)]
        done = subprocess.run(run, capture_output=True, encoding="utf-8", check=True)
        assert int(done.stdout) < 1.5 * (256 << 20)
