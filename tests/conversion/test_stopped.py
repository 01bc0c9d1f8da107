"""A conversion that is stopped at any line, or by force: the old file or the new one, nothing half, nothing beside."""

from __future__ import annotations

import errno
import gc
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from systems import needs_locks, needs_stopping, open_descriptors
from tagging import saved

from smartload import SmartLoadError, conversion, convert, inspect
from smartload.reading import files

SOURCES = (str(Path(conversion.__file__).parent),)
HELPERS_OF_FILES = {
    "temporary_name", "create_file", "remove_abandoned", "_remove_if_abandoned", "write_all", "replace_file",
    "_keep_attributes", "remove_file", "_try_for_a_while",
}  # fmt: skip
STATE = {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(3), "half": torch.ones(2, dtype=torch.float16)}


def is_ours(frame: FrameType) -> bool:
    """Whether a frame belongs to the code that writes."""
    code = frame.f_code
    if code.co_filename == files.__file__:
        return code.co_name in HELPERS_OF_FILES
    return code.co_filename.startswith(SOURCES)


class Stopper:
    """Raises at one line of the code that writes, the one that is executed as number `at`; counts them all."""

    def __init__(self, at: int, failure: type[BaseException]) -> None:
        self.at, self.failure, self.count, self.where = at, failure, 0, ""
        self.in_main = True

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if not is_ours(frame):
            return None
        if event == "line":
            self.count += 1
            if self.count == self.at:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
                self.in_main = threading.current_thread() is threading.main_thread()
                raise self.failure
        return self

    def run(self, act: Callable[[], object]) -> BaseException | None:
        """Do `act` and give what it raised, without the frames that would keep files open."""
        before = sys.gettrace(), threading.gettrace()  # of what measures the coverage of the tests
        if self.failure is not KeyboardInterrupt:  # which comes to the main thread alone
            threading.settrace(self)
        sys.settrace(self)
        try:
            act()
        except BaseException as failure:
            sys.settrace(None)
            failure.__traceback__ = None
            return failure
        finally:
            sys.settrace(before[0])
            threading.settrace(before[1])  # type: ignore[arg-type]
        return None


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Gets an item when a new file has got its name."""
    names: list[object] = []
    real = os.replace

    def replace(new: Any, to: Any) -> None:
        real(new, to)
        names.append(to)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(files, "SETTLE_NS", 0)  # or each of some thousand runs waits for the clock of the disk
    return names


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::pytest.PytestUnhandledThreadExceptionWarning",
    "ignore::ResourceWarning",
)
@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_at_every_line(
    suffix: str, there: bool, failure: type[BaseException], tmp_path: Path, placed: list[object]
) -> None:
    to, source = tmp_path / f"x{suffix}", saved(STATE)

    def act() -> None:
        source.seek(0)
        convert(source, to)

    act()
    new = to.read_bytes()
    if not there:
        to.unlink()
    lines = Stopper(0, failure)
    assert lines.run(act) is None
    assert lines.count > 200
    descriptors, threads = open_descriptors(), threading.active_count()
    for at in range(1, lines.count + 1):
        to.unlink(missing_ok=True)
        if there:
            to.write_bytes(b"old")
            to.chmod(0o640)
        placed.clear()
        stopper = Stopper(at, failure)
        raised = stopper.run(act)
        said = f"stopped at {stopper.where}: {raised!r}"
        # In the thread in which torch writes, between two lines of it, the failure may be lost; the refusal is not.
        assert isinstance(raised, failure if stopper.in_main else (failure, SmartLoadError)), said
        assert os.listdir(tmp_path) == ([to.name] if there or placed else []), said
        if there or placed:
            assert to.read_bytes() == (new if placed else b"old"), said
        if there:
            assert stat.S_IMODE(to.stat().st_mode) == 0o640, said
        # A lack of memory may be told even then; what says that nothing was written may not.
        told = isinstance(raised, SmartLoadError) and not isinstance(raised, MemoryError)
        assert not (placed and told), f"{said}, though it was written"
        del raised
        if open_descriptors() != descriptors:  # that of a file object which a cycle of frames still holds
            gc.collect()
        assert (open_descriptors(), threading.active_count()) == (descriptors, threads), said


# ---------------------------------------------------------------------------------------------------- other processes


CONVERT_FOR_EVER = (
    "import sys, torch, smartload\n"
    "state = {str(at): torch.full((1 << 20,), float(at)) for at in range(8)}\n"
    "for at in range(int(sys.argv[2])): smartload.convert(state, sys.argv[1])"
)


def converting(to: Path, times: int = 10**9) -> subprocess.Popen[bytes]:
    """A process that writes 32 MiB to `to`, again and again."""
    return subprocess.Popen([sys.executable, "-c", CONVERT_FOR_EVER, str(to), str(times)], stderr=subprocess.PIPE)


def temporary_files(folder: Path) -> list[Path]:
    return list(folder.glob(".smartload-*"))


def size_of(path: Path) -> int:
    """The size of a file, 0 for one that is gone."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def wait_for_writing(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Return in the middle of what `process` writes into `folder`, as a rule, or when it has ended."""
    while not any(map(size_of, temporary_files(folder))) and process.poll() is None:
        pass


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_a_killed_process_leaves_the_next_one_removes(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CLOSED_FOR", 0)  # or Windows would have to wait for ten seconds
    to = tmp_path / f"x{suffix}"
    convert(STATE, to)
    before = to.read_bytes()
    for _ in range(10):  # it may have been killed when the file had its name already
        with converting(tmp_path / f"killed{suffix}") as process:
            wait_for_writing(process, tmp_path)
            assert process.poll() is None, process.communicate()
            process.kill()
        if left := temporary_files(tmp_path):
            break
    assert left
    convert(STATE, tmp_path / "other.pth")
    assert temporary_files(tmp_path) == []
    assert to.read_bytes() == before


@needs_stopping
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_a_living_process_writes_is_left_alone(suffix: str, tmp_path: Path) -> None:
    to = tmp_path / f"x{suffix}"
    for _ in range(10):
        with converting(to, times=1) as process:
            wait_for_writing(process, tmp_path)
            process.send_signal(signal.SIGSTOP)
            held = temporary_files(tmp_path)
            convert(STATE, tmp_path / "other.pth")
            kept = temporary_files(tmp_path)
            process.send_signal(signal.SIGCONT)
            assert kept == held
            assert process.wait(60) == 0, process.communicate()
        if held:
            break
    assert held
    assert sorted(os.listdir(tmp_path)) == ["other.pth", to.name]


def test_two_at_once_in_one_folder(tmp_path: Path) -> None:
    names = ["a.pth", "b.safetensors", "a.pth"]  # two of them write the same file
    processes = [converting(tmp_path / name, times=8) for name in names]
    for process in processes:
        with process:
            assert process.wait(120) == 0, process.communicate()
    assert sorted(os.listdir(tmp_path)) == sorted(set(names))
    for name in set(names):
        assert len(inspect(tmp_path / name).parts[""].entries) == 8


def left_by(host: str, folder: Path, age: float) -> Path:
    """A file that looks as if a process on `host` had left it `age` seconds ago."""
    path = folder / f".smartload-{host}-0123456789abcdef.tmp"
    path.write_bytes(b"half of it")
    os.utime(path, (time.time() - age,) * 2)
    return path


@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.parametrize(
    ("own", "age", "removed"),
    [
        (True, 0, "with locks"),
        (True, 60, "always"),
        (False, 0, "never"),
        (False, 3600, "never"),
        (False, 1e6, "always"),
    ],
)
def test_files_of_another_host_and_disks_without_locks(
    own: bool, age: float, removed: str, locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not locks:
        monkeypatch.setattr(files, "fcntl", None)
    locks = files.fcntl is not None
    path = left_by(files._host() if own else "00000000", tmp_path, age)
    convert(STATE, tmp_path / "x.pth")
    assert path.exists() != (removed == "always" or (removed == "with locks" and locks))


@needs_locks
def test_where_nothing_can_be_locked_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    path = left_by(files._host(), tmp_path, 1e6)
    convert(STATE, tmp_path / "x.pth")
    assert path.exists()


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    names = [".smartload-x.tmp", "smartload-0-1.tmp", f".smartload-{files._host()}-0123456789abcdef.tmp.pth"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / f".smartload-{files._host()}-0123456789abcdef.tmp").mkdir()
    convert(STATE, tmp_path / "x.pth")
    assert len(os.listdir(tmp_path)) == 5
