"""What is printed survives every console: the one of a Chinese Windows, a Western one, and ASCII."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from smartload import check, inspect, smart_load
from smartload.records.text import for_console

NAME = "\u6a21\u578b \u2192.pth"  # the arrow is in cp936, the word in neither of the others


@pytest.fixture
def path(tmp_path: Path) -> Path:
    net = nn.Linear(2, 1)
    with (tmp_path / NAME).open("wb") as file:
        torch.save({"model": net.state_dict(), "\u8f6e\u6b21": 3}, file)
    return tmp_path / NAME


PROGRAM = """
import sys
from torch import nn
from smartload import SmartLoadError, check, inspect, smart_load
from smartload.__main__ import main
path = sys.argv[1]
for answer in (inspect(path), check(nn.Linear(2, 1), path), smart_load(nn.Linear(2, 1), path)):
    print(answer)
try:
    smart_load(nn.Linear(3, 1), path)
except SmartLoadError as refusal:
    print(refusal)
for command in (["inspect", path], ["diff", path, path], ["convert", path, path + ".bin"]):
    assert main(command) == 0
"""


@pytest.mark.parametrize("encoding", ["utf-8", "cp936", "cp1252", "ascii"])
def test_whatever_is_printed_survives_the_console(path: Path, encoding: str) -> None:
    shown = NAME.encode(encoding, "backslashreplace").decode(encoding)
    env = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(path)], capture_output=True, env=env, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    out = done.stdout.decode(encoding)
    assert out.count(shown) == 9  # once for each answer, and two each for `diff` and `convert`
    for words in ("loaded 2 tensors of ", "1 of 2 keys", "beside:", "same: 2 names", "wrote 2 tensors"):
        assert words in out


def test_a_console_without_an_encoding_takes_every_letter(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for console in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stdout", console)
        assert NAME in str(inspect(path))
    monkeypatch.undo()


@pytest.mark.parametrize("encoding", ["", "unknown-8bit", "hex", "idna", None, 3])
def test_an_encoding_that_is_none_does_no_harm(encoding: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(encoding=encoding))
    text = for_console(NAME)
    monkeypatch.undo()
    assert text == NAME


def test_what_is_not_printed_keeps_its_letters(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    report = smart_load(net := nn.Linear(2, 1), path)
    assert (report.plan.path, check(net, path).path, inspect(path).path) == (NAME, NAME, NAME)
    assert NAME in str(report.to_dict())
    assert NAME in report._repr_html_()
    assert for_console(NAME) == "\\u6a21\\u578b \\u2192.pth"
    monkeypatch.undo()
