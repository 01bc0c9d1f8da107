"""`python -m smartload` as people run it: on real files, in a process of its own, with its exit statuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from systems import needs_a_full_disk, needs_terminals
from torch import nn

MODELS = """
import sys
import torch

def net():
    print("this is my own print")
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))

class Wider(torch.nn.Linear):
    def __init__(self):
        super().__init__(4, 16)

class nested:
    net = net

def broken():
    raise KeyError("no such config")

def leaves():
    sys.exit(0)

def number():
    return 3
"""
# Windows sends no Ctrl-C to one process among several, and a shell has its background jobs ignore it.
STOPPED = """
import signal
import time

def net():
    print("begun")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(signal.SIGINT)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, and code of models, as they lie in a project."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "models.py").write_text(MODELS, encoding="utf-8")
    (folder / "needy.py").write_text("import no_such_package", encoding="utf-8")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    torch.save(net.state_dict(), folder / "plain.pth")
    torch.save({"epoch": 3, "state_dict": nn.DataParallel(net).state_dict()}, folder / "last.ckpt")
    torch.save({"model": net.state_dict(), "ema": nn.Linear(1, 1).state_dict()}, folder / "two.pt")
    old = {"first": net[0].state_dict(), "second": {"weight": net[1].weight, "aux": torch.ones(3)}}
    torch.save({"net": old}, folder / "old.pth")
    torch.save({"é\x1b[31m": torch.ones(1)}, folder / "odd.pth")
    torch.save({"w": torch.tensor([1e30])}, folder / "large.pth")
    (folder / "page.pth").write_text("<!DOCTYPE html><html>404</html>", encoding="utf-8")
    return folder


def run(folder: Path, *arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "smartload", *arguments]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=folder, check=False, **settings)
    assert "\x1b" not in done.stdout + done.stderr
    return done


def outcome(folder: Path, *arguments: str) -> tuple[int, str, str]:
    done = run(folder, *arguments)
    return done.returncode, done.stdout, done.stderr


# ---------------------------------------------------------------------------------------------------------- inspect


def test_inspect(folder: Path) -> None:
    assert outcome(folder, "inspect", "last.ckpt") == (
        0,
        "last.ckpt: torch zip\n"
        "  state_dict: 4 tensors, 58 elements, 232 bytes\n"
        "    dtypes:   float32\n"
        "    prefixes: module.\n"
        "    names:    module.{0...1}.weight, module.{0...1}.bias\n"
        "  beside:\n"
        "    epoch: an int\n"
        "  devices:    cpu (4)\n",
        "",
    )
    done = run(folder, "inspect", "--json", "last.ckpt")
    found = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert found["parts"]["state_dict"]["tensors"]["module.0.weight"] == {"shape": [8, 4], "dtype": "float32"}


def test_refusals_are_their_message_and_nothing_else(folder: Path) -> None:
    status, printed, said = outcome(folder, "inspect", "page.pth")
    assert (status, printed) == (1, "")
    assert said.startswith("page.pth: this is a web page")
    assert said.count("\n") == 1
    assert outcome(folder, "inspect", "nothing.pth")[:2] == (1, "")


def test_names_that_the_terminal_has_no_letters_for(folder: Path) -> None:
    done = run(folder, "inspect", "odd.pth", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "names:    \\xe9\\x1b[31m" in done.stdout


# ------------------------------------------------------------------------------------------------------------ check


def test_check_fits(folder: Path) -> None:
    assert outcome(folder, "check", "last.ckpt", "models:net") == (
        0,
        "last.ckpt fits Sequential: 4 of 4 keys (removed 'module.'; from 'state_dict')\n",
        "this is my own print\n",
    )
    done = run(folder, "check", "last.ckpt", "models:nested.net", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["fits"], found["part"]) == (0, True, "state_dict")
    assert found["pairs"]["0.weight"] == "state_dict.module.0.weight"


def test_check_does_not_fit(folder: Path) -> None:
    status, printed, said = outcome(folder, "check", "plain.pth", "models:Wider")
    assert (status, printed) == (1, "")
    assert said.startswith(
        "The same names, but every shape differs: the model was built with another configuration "
        "(width, number of classes).\n0 of 2 keys of Wider"
    )
    done = run(folder, "check", "plain.pth", "models:Wider", "--json")
    assert (done.returncode, done.stderr) == (1, "")
    assert json.loads(done.stdout) == {"fits": False, "error": "ShapeMismatchError", "message": said.rstrip("\n")}
    found = json.loads(run(folder, "check", "page.pth", "models:net", "--json").stdout)
    assert (found["fits"], found["error"]) == (False, "UnreadableError")


def test_check_with_wishes(folder: Path) -> None:
    options = ["--select", "net", "--rename", "first=0", "--rename", "second=1"]
    status, printed, said = outcome(folder, "check", "old.pth", "models:net", *options)
    assert (status, printed) == (1, "")
    assert "missing:    1.bias [2]" in said
    allowed = ["--allow-missing", "1.bias", "--allow-unexpected", "net.second.aux"]
    found = json.loads(run(folder, "check", "old.pth", "models:net", "--json", *options, *allowed).stdout)
    assert (found["fits"], found["missing_keys"], found["unexpected_keys"]) == (True, ["1.bias"], ["net.second.aux"])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("no_such:net", "there is no module 'no_such' in the current folder, and none is installed.\n"),
        ("models:nett", "there is no 'nett' in the module 'models'.\n"),
        ("models:number", "models:number gave int, not a torch.nn.Module.\n"),
        ("models:broken", "KeyError: 'no such config'\nthe model could not be built: models:broken raised the error"),
        ("models:leaves", "the model could not be built: models:leaves raised the error above."),
        ("needy:net", "ModuleNotFoundError: No module named 'no_such_package'\nthe model could not be built"),
        ("models", "'models' is not of the form MODULE:FACTORY"),
        (":net", "':net' is not of the form MODULE:FACTORY"),
    ],
)
def test_check_of_a_model_that_cannot_be_built(model: str, words: str, folder: Path) -> None:
    status, printed, said = outcome(folder, "check", "plain.pth", model, "--json")
    assert (status, printed) == (2, "")
    assert words in said


# ------------------------------------------------------------------------------------------------------------- diff


def test_diff(folder: Path) -> None:
    same = "A: last.ckpt (torch zip): removed 'module.'; from 'state_dict'\nB: plain.pth (torch zip)\nsame: 4 names, "
    status, printed, said = outcome(folder, "diff", "last.ckpt", "plain.pth", "--values")
    assert (status, said) == (0, "")
    assert printed == same + "equal in names, shapes, dtypes and values\n"
    done = run(folder, "diff", "plain.pth", "two.pt", "--select-b", "ema", "--json")
    assert (done.returncode, done.stderr) == (1, "")
    found = json.loads(done.stdout)
    assert (found["same"], found["only_b"], found["values"]) == (False, ["weight", "bias"], None)


def test_diff_has_a_status_of_its_own_for_trouble(folder: Path) -> None:
    status, printed, said = outcome(folder, "diff", "plain.pth", "two.pt")
    assert (status, printed) == (2, "")
    assert "two.pt is ambiguous: it holds several state dicts" in said
    assert said.endswith("Here select=... is written --select-a or --select-b ...\n")
    assert outcome(folder, "diff", "plain.pth", "nothing.pth", "--json")[:2] == (2, "")


# ---------------------------------------------------------------------------------------------------------- convert


def test_convert(folder: Path, tmp_path: Path) -> None:
    to = tmp_path / "clean.pth"
    names = ["--rename", "0=first", "--rename", "1=", "--dtype", "bfloat16"]
    status, printed, said = outcome(folder, "convert", "two.pt", str(to), "--select", "model", *names)
    assert (status, said) == (0, "")
    assert printed.startswith(f"wrote 4 tensors of two.pt (torch zip) to {to}: 116 bytes\n  part:      model\n")
    found = torch.load(to, weights_only=True)
    assert list(found) == ["first.weight", "first.bias", "weight", "bias"]
    assert found["weight"].dtype == torch.bfloat16


def test_convert_refuses(folder: Path, tmp_path: Path) -> None:
    to = str(tmp_path / "clean.safetensors")
    status, printed, said = outcome(folder, "convert", "two.pt", to)
    assert (status, printed) == (1, "")
    assert "write select='ema'" in said
    assert said.endswith("Here select=... is written --select ...\n")
    status, printed, said = outcome(folder, "convert", "large.pth", to, "--dtype", "float16")
    assert (status, printed) == (1, "")
    assert "which float16 cannot hold" in said
    assert outcome(folder, "convert", "plain.pth", "plain.pth")[0] == 1
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------ usage


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["load"], "invalid choice: 'load'"),
        (["inspect"], "the following arguments are required: PATH"),
        (["inspect", "a", "--js"], "unrecognized arguments: --js"),
        (["convert", "a", "b.ckpt"], "the suffix of 'b.ckpt' is none of .pth, .pt, .bin, .safetensors"),
        (["convert", "a", "b.pth", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["convert", "a", "b.pth", "--rename", "a"], "'a' is not of the form OLD=NEW"),
        (["convert", "a", "b.pth", "--rename", "a=b", "--rename", "a=c"], "two rules for 'a'"),
    ],
)
def test_usage(arguments: list[str], words: str, tmp_path: Path) -> None:
    status, printed, said = outcome(tmp_path, *arguments)
    assert (status, printed) == (2, "")
    assert words in said


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("inspect", "List what a checkpoint holds: its state dicts, keys, dtypes, devices, and other values."),
        ("check", "The exit status is 0 if it fits, 1 if it does not, 2 if the model could not be built."),
        ("diff", "The exit status is 0 if they are the same, 1 if they differ, 2 if one of them was refused."),
        ("convert", "The exit status is 0 if it was written, 1 if it was refused."),
    ],
)
def test_help(command: str, words: str, tmp_path: Path) -> None:
    status, printed, said = outcome(tmp_path, command, "--help")
    assert (status, said) == (0, "")
    assert words in " ".join(printed.split())


def test_help_says_that_the_callers_code_is_run(tmp_path: Path) -> None:
    status, printed, _ = outcome(tmp_path, "check", "--help")
    assert status == 0
    assert "Your code is imported, from the current folder too, and CALLED" in " ".join(printed.split())


def test_control_c(folder: Path) -> None:
    (folder / "stopped.py").write_text(STOPPED, encoding="utf-8")
    assert outcome(folder, "check", "plain.pth", "stopped:net") == (130, "", "begun\n")


@pytest.mark.parametrize("arguments", [("inspect", "plain.pth"), ("convert", "plain.pth", "clean.pth")])
def test_a_reader_that_goes_away(folder: Path, arguments: tuple[str, ...]) -> None:
    own, theirs = os.pipe()
    os.close(own)
    command = [sys.executable, "-m", "smartload", *arguments]
    done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, cwd=folder, check=False)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (141, b"")


@needs_terminals
def test_in_a_terminal(folder: Path) -> None:
    import pty

    own, theirs = pty.openpty()
    command = [sys.executable, "-m", "smartload", "inspect", "odd.pth"]
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    done = subprocess.run(command, stdout=theirs, stderr=theirs, cwd=folder, check=False, env=environment)
    os.close(theirs)
    seen = os.read(own, 1 << 16).decode()
    os.close(own)
    assert done.returncode == 0
    assert "names:    é\\x1b[31m\r\n" in seen
    assert "\x1b" not in seen


@needs_a_full_disk
def test_output_that_cannot_be_written(folder: Path) -> None:
    command = [sys.executable, "-m", "smartload", "inspect", "plain.pth"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, encoding="utf-8", cwd=folder, check=False)
    assert (done.returncode, done.stderr) == (2, "the output cannot be written: No space left on device.\n")
