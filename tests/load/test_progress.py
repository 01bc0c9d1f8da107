"""Who is told how far a load is, when, and what comes of it where that fails."""

from __future__ import annotations

import copy
import io
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from formats import State, Written
from systems import needs_terminals
from torch import nn

from smartload import UnreadableError, smart_load
from smartload.load import commit, progress

Save = Callable[[State], Written]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(40, 50), nn.BatchNorm1d(50), nn.Linear(50, 60), nn.Linear(60, 70))


@pytest.fixture
def pieces(reading: Callable[..., None]) -> None:
    """Files are read in many small pieces."""
    reading(piece=1 << 10, together=False)


@pytest.fixture
def helpers(reading: Callable[..., None]) -> None:
    """Other threads read, too."""
    reading(count=3)


class Recorder:
    """A function for `progress=` that keeps what it was told."""

    def __init__(self, stop: int | None = None, failure: BaseException | None = None) -> None:
        self.calls: list[tuple[int, int]] = []
        self.threads: set[int] = set()
        self._stop, self._failure = stop, failure

    def __call__(self, done: int, total: int) -> None:
        self.calls.append((done, total))
        self.threads.add(threading.get_ident())
        if self._failure is not None and len(self.calls) == self._stop:
            raise self._failure


@pytest.mark.usefixtures("pieces")
def test_it_goes_up_to_the_end(checkpoint: Save) -> None:
    source, recorder = network(), Recorder()
    smart_load(network(), checkpoint(source.state_dict()), progress=recorder)
    done = [call[0] for call in recorder.calls]
    assert done == sorted(set(done))
    assert {call[1] for call in recorder.calls} == {done[-1]} == {sum(t.nbytes for t in source.state_dict().values())}
    assert len(done) > 3


@pytest.mark.usefixtures("pieces", "helpers")
def test_it_is_told_in_the_callers_thread(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "x.pth")
    for _ in range(20):
        recorder = Recorder()
        smart_load(network(), tmp_path / "x.pth", progress=recorder)
        done = [call[0] for call in recorder.calls]
        assert done == sorted(set(done))
        assert recorder.calls[-1] == (done[-1], done[-1])
        assert recorder.threads == {threading.get_ident()}


@pytest.mark.usefixtures("pieces")
def test_tied_and_cast_tensors_count_what_is_read() -> None:
    net = nn.Sequential(nn.Linear(30, 30, bias=False), nn.Linear(30, 30, bias=False)).double()
    net[1].weight = net[0].weight
    file, recorder = io.BytesIO(), Recorder()
    torch.save({name: tensor.float() for name, tensor in net.state_dict().items()}, file)
    file.seek(0)
    smart_load(net, file, progress=recorder, allow_unexpected=())
    assert recorder.calls[-1] == (30 * 30 * 4, 30 * 30 * 4)


def test_a_function_may_count_as_nothing(tmp_path: Path) -> None:
    class Empty(Recorder):
        def __len__(self) -> int:
            return 0

    torch.save(network().state_dict(), tmp_path / "x.pth")
    recorder = Empty()
    smart_load(network(), tmp_path / "x.pth", progress=recorder)
    assert recorder.calls[-1][0] == recorder.calls[-1][1] > 0


def test_of_what_is_in_memory_nothing_is_read() -> None:
    recorder = Recorder()
    smart_load(network(), network().state_dict(), progress=recorder)
    assert recorder.calls == [(0, 0)]


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("stop", [1, 2, 10])
@pytest.mark.parametrize("failure", [ValueError("enough"), KeyboardInterrupt()])
@pytest.mark.parametrize("undo", [True, "auto"])
def test_what_it_raises_stops_the_load_which_is_undone(
    undo: Any, failure: BaseException, stop: int, tmp_path: Path
) -> None:
    torch.save(network().state_dict(), tmp_path / "x.pth")
    net, recorder = network(), Recorder(stop, failure)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(type(failure)) as caught:
        smart_load(net, tmp_path / "x.pth", progress=recorder, undo=undo)
    assert caught.value is failure
    assert len(recorder.calls) == stop
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.usefixtures("pieces")
def test_without_undo_the_error_says_what_is_left(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "x.pth")
    with pytest.raises(UnreadableError, match="the load stopped") as caught:
        smart_load(network(), tmp_path / "x.pth", progress=Recorder(3, ValueError("enough")), undo=False)
    assert isinstance(caught.value.__cause__, ValueError)


def test_the_last_call_can_still_stop_it(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "x.pth")

    def full(done: int, total: int) -> None:
        if done == total:
            raise ValueError("at the end")

    net = network()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="at the end"):
        smart_load(net, tmp_path / "x.pth", progress=full)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("nobody", [None, False])
def test_nobody_is_told_at_no_cost(nobody: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(commit, "read_all", lambda moves, files, begun, done: given.append(done))
    smart_load(network(), network().state_dict(), progress=nobody)
    assert given == [None]


@pytest.mark.parametrize("wrong", ["bar", 3, [1]])
def test_anything_else_is_a_mistake(wrong: Any) -> None:
    with pytest.raises(TypeError, match="progress must be True or a function"):
        smart_load(network(), "nowhere.pth", progress=wrong)


# ------------------------------------------------------------------------------------------------------------- bar


RUN = """
import sys, time, torch, smartload
from smartload.load import progress, transfer
transfer.READ_BYTES = transfer.SMALL_TENSOR_BYTES = 100
progress.BAR_DELAY = float(sys.argv[2])
net = torch.nn.Linear(100, 100)
smartload.smart_load(net, sys.argv[1], progress=True)
print("loaded")
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.save(nn.Linear(100, 100).state_dict(), tmp_path / "x.pth")
    return tmp_path / "x.pth"


def terminal(*arguments: str, code: str = RUN) -> tuple[str, str]:
    """What a program writes to stdout, and to its stderr, which is a terminal."""
    import fcntl
    import pty
    import termios

    own, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    run = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                part = os.read(own, 4096)
            except OSError:  # how Linux says that nobody holds the other end any more
                break
            seen += part
        os.close(own)
        assert process.stdout is not None
        return process.stdout.read().decode().strip(), seen.decode()


@needs_terminals
def test_a_bar_in_a_terminal(file: Path) -> None:
    printed, seen = terminal(str(file), "-1")
    assert printed == "loaded"
    assert "100%" in seen
    assert "40.4k/40.4k" in seen
    assert "\x1b" not in seen


@needs_terminals
def test_no_bar_for_a_load_that_is_quick(file: Path) -> None:
    assert progress.BAR_DELAY == 1.0
    assert terminal(str(file), "60") == ("loaded", "")


def test_no_bar_where_nobody_looks(file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(file), "-1"], capture_output=True, encoding="utf-8", check=True
    )
    assert (done.stdout, done.stderr) == ("loaded\n", "")


@needs_terminals
def test_without_tqdm_nothing_is_shown(file: Path) -> None:
    hidden = RUN.replace("net = ", "sys.modules['tqdm'] = None; net = ")
    assert terminal(str(file), "-1", code=hidden) == ("loaded", "")


@pytest.mark.usefixtures("pieces")
def test_a_bar_is_closed_where_the_load_fails(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bar:
        n, closed = 0, False

        def update(self, n: int) -> None:
            raise ValueError("enough")

        def close(self) -> None:
            self.closed = True

    bar = Bar()
    monkeypatch.setattr(progress, "BAR_DELAY", -1)
    monkeypatch.setattr(progress, "_new_bar", lambda done, total: bar)
    with pytest.raises(ValueError, match="enough"):
        smart_load(nn.Linear(100, 100), file, progress=True)
    assert bar.closed
