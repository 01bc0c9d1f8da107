"""Rules F1 to F7: what may be given as a path, and files that are missing, odd, growing or shrinking."""

from __future__ import annotations

import contextlib
import gc
import gzip
import io
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from reading_tools import assert_same, saved, tensors_in, watched, wrong_in_threads
from systems import needs_links, needs_named_pipes, needs_socket_files, open_descriptors

from smartload import formats, smart_load
from smartload.errors import CheckpointNotFoundError, SmartLoadError, UnreadableError
from smartload.formats import open_checkpoint
from smartload.reading import files as readers

STATE = {"a": torch.arange(5.0)}
DATA = saved(STATE)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "weights.pt"
    target.write_bytes(DATA)
    return target


def check(source: Any) -> None:
    with open_checkpoint(source) as checkpoint:
        assert_same(tensors_in(checkpoint, checkpoint.parts[""]), STATE)


def problem_of(source: Any) -> Any:
    with pytest.raises(SmartLoadError) as caught, open_checkpoint(source):
        pass
    assert "{" not in str(caught.value)
    return caught.value.problem


class Unseekable(io.RawIOBase):
    def __init__(self) -> None:
        self.rest = io.BytesIO(DATA)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self.rest.readinto(buffer)


class Stingy(io.BytesIO):
    """Gives three bytes at a time."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(size if size is None or size < 0 else min(3, size))


def test_paths_of_all_kinds(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(path)
    check(str(path))
    monkeypatch.chdir(path.parent)
    check("weights.pt")


@needs_links
def test_a_link_is_the_file_that_it_leads_to(path: Path) -> None:
    os.symlink(path, path.parent / "link.pt")
    check(path.parent / "link.pt")


def test_file_objects_of_all_kinds(path: Path) -> None:
    with open(path, "rb") as buffered, open(path, "rb", buffering=0) as raw, open(path, "r+b") as both:
        for opened in (buffered, raw, both):
            check(opened)
            assert opened.tell() == 0
            assert not opened.closed
    check(io.BytesIO(DATA))
    check(Stingy(DATA))
    check(Unseekable())
    (path.parent / "w.gz").write_bytes(gzip.compress(DATA))
    with gzip.open(path.parent / "w.gz") as packed:
        check(packed)


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_file_object_begins_where_it_stands(path: Path, kind: str) -> None:
    path.write_bytes(b"header" + DATA)
    with open(path, "rb") if kind == "disk" else io.BytesIO(b"header" + DATA) as opened:
        opened.seek(6)
        check(opened)
        assert opened.tell() == 6


@pytest.mark.parametrize("source", [3, None, 2.5, (1, 2), b"weights.pt", [STATE], torch.nn.Linear(1, 1), open])
def test_other_types_are_a_type_error(source: Any) -> None:
    with (
        pytest.raises(TypeError, match=r"path must be a path, a binary file or a dict-like state dict, got <class"),
        open_checkpoint(source),
    ):
        pass


def test_text_and_closed_files_are_named(path: Path) -> None:
    with open(path, encoding="utf-8") as text, pytest.raises(TypeError, match="opened as text"), open_checkpoint(text):  # type: ignore[arg-type]
        pass
    with pytest.raises(TypeError, match="opened as text"), open_checkpoint(io.StringIO("x")):  # type: ignore[arg-type]
        pass
    closed = io.BytesIO(DATA)
    closed.close()
    with pytest.raises(ValueError, match="closed"), open_checkpoint(closed):
        pass


def test_a_nul_in_the_path_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="NUL"), open_checkpoint("a\0b"):
        pass


def test_a_missing_file_names_what_lies_beside(path: Path) -> None:
    (path.parent / "other.pt").touch()
    (path.parent / "notes.txt").touch()
    problem = problem_of(path.parent / "weigths.pt")
    assert problem.kind == "not_found"
    assert problem.facts["beside"] == "Beside it lie: weights.pt, other.pt"
    with pytest.raises(FileNotFoundError), open_checkpoint(path.parent / "no" / "such.pt"):
        pass
    with pytest.raises(CheckpointNotFoundError), open_checkpoint(path / "below"):
        pass
    with pytest.raises(CheckpointNotFoundError), open_checkpoint(""):
        pass


def test_names_in_messages_are_on_one_line(tmp_path: Path) -> None:
    (tmp_path / "w\u202e.pt").touch()
    with contextlib.suppress(OSError):  # Windows has no such names, and says so instead of "not found"
        (tmp_path / "w\x1b[31m\n\u202e.pt").touch()
    for name in ("w\n.pt", "w\u202d.pt"):
        with pytest.raises(SmartLoadError) as caught, open_checkpoint(tmp_path / name):
            pass
        assert str(caught.value).isprintable()


def test_a_folder_says_what_lies_in_it(tmp_path: Path) -> None:
    assert problem_of(tmp_path).kind == "folder_empty"
    for i in range(7):
        (tmp_path / f"{i}.txt").touch()
    assert problem_of(tmp_path).facts["names"] == "0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 2 more"


@needs_named_pipes
def test_no_named_pipe_is_read(tmp_path: Path) -> None:
    # F2: nothing waits for a writer that never comes.
    os.mkfifo(tmp_path / "pipe")
    start = time.monotonic()
    assert problem_of(tmp_path / "pipe").facts["what"] == "a named pipe"
    assert time.monotonic() - start < 1


@needs_socket_files
def test_no_socket_is_read(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
        assert problem_of(tmp_path / "socket").kind in ("io", "not_regular")


def test_no_device_is_read() -> None:
    assert problem_of(os.devnull).facts["what"] == "a device"


@needs_links
def test_a_loop_of_links_is_our_error(tmp_path: Path) -> None:
    os.symlink(tmp_path / "b", tmp_path / "a")
    os.symlink(tmp_path / "a", tmp_path / "b")
    assert problem_of(tmp_path / "a").kind == "io"


def test_a_name_that_is_too_long_is_our_error(tmp_path: Path) -> None:
    assert problem_of(tmp_path / ("x" * 5000)).kind in ("io", "not_found")  # the second is what Windows says of it


def test_a_file_that_changed_is_refused(path: Path) -> None:
    # F4.
    with open_checkpoint(path) as checkpoint:
        checkpoint.files[0].check_unchanged()
        with open(path, "ab") as more:
            more.write(b"x")
        with pytest.raises(UnreadableError, match="changed"):
            checkpoint.files[0].check_unchanged()


def test_a_file_that_shrank_is_refused(path: Path) -> None:
    # F3: a read that ends early is an error, never a signal.
    with open_checkpoint(path) as checkpoint:
        os.truncate(path, 100)
        with pytest.raises(UnreadableError, match="is truncated"):
            checkpoint.files[0].read_into(50, memoryview(bytearray(100)))


def test_a_replaced_file_is_read_to_its_end(path: Path) -> None:
    with open_checkpoint(path) as checkpoint:
        other = path.parent / "new"
        other.write_bytes(b"other")
        with contextlib.suppress(PermissionError):  # Windows replaces no file that somebody has open
            other.replace(path)
        assert_same(tensors_in(checkpoint, checkpoint.parts[""]), STATE)
        checkpoint.files[0].check_unchanged()


def test_a_file_written_just_now_is_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # F5: a second write within one tick of the clock would not show.
    path.write_bytes(DATA)
    with open_checkpoint(path):
        assert time.time_ns() - path.stat().st_mtime_ns >= readers.SETTLE_NS
    monkeypatch.setattr(readers, "PATIENCE_NS", 50_000_000)
    stamp = readers._stamp
    # As if it were written all the time.
    monkeypatch.setattr(readers, "_stamp", lambda status: (stamp(status)[0], time.time_ns(), *stamp(status)[2:]))
    assert problem_of(path).kind == "being_written"


def test_many_threads_read_one_file(path: Path) -> None:
    for source in (path, io.BytesIO(DATA)):
        with open_checkpoint(source) as checkpoint:
            assert wrong_in_threads(checkpoint.files[0], DATA, size=64, step=64) == []


def test_descriptors_are_given_back(path: Path) -> None:
    (path.parent / "bad.pt").write_bytes(DATA[:-3])
    before = open_descriptors()
    for _ in range(5):
        check(path)
        with pytest.raises(UnreadableError), open_checkpoint(path.parent / "bad.pt"):
            pass
        with pytest.raises(SmartLoadError), open_checkpoint(path.parent):
            pass
    assert open_descriptors() == before


def test_an_error_in_the_block_is_not_the_files_fault(path: Path) -> None:
    with pytest.raises(KeyError), open_checkpoint(path):
        raise KeyError("of the caller")


def test_reading_writes_and_runs_nothing(path: Path) -> None:
    check(path)
    with watched() as seen:
        check(path)
    assert seen == []
    assert os.listdir(path.parent) == ["weights.pt"]


@pytest.mark.parametrize("alone", [True, False])
def test_the_collector_rests_while_names_are_read_and_no_thread_is_beside(
    alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touched: list[str] = []
    for name in ("disable", "enable", "set_threshold", "freeze", "collect"):
        monkeypatch.setattr(gc, name, lambda *given, name=name: touched.append(name))
    monkeypatch.setattr(formats, "_is_only_thread", lambda: alone)
    torch.save({"weight": torch.ones(1, 2), "bias": torch.ones(1)}, tmp_path / "w.pt")
    with open_checkpoint(tmp_path / "w.pt"):
        assert touched == (["disable", "enable", "enable"] if alone else [])
        touched.clear()
    smart_load(torch.nn.Linear(2, 1), {"weight": torch.ones(1, 2), "bias": torch.ones(1)}, verify=True)
    assert touched == (["disable", "enable", "enable"] if alone else [])


def test_another_thread_counts_whoever_started_it() -> None:
    script = (
        "import _thread, smartload.formats as formats, time\n"
        "assert formats._is_only_thread()\n"
        "_thread.start_new_thread(lambda: time.sleep(60), ()); time.sleep(0.1)\n"
        "assert not formats._is_only_thread()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("on", [True, False])
def test_the_collector_is_as_it_was(on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_is_only_thread", lambda: True)
    torch.save({"a": torch.ones(2)}, tmp_path / "w.pt")
    try:
        if not on:
            gc.disable()
        with open_checkpoint(tmp_path / "w.pt"):
            assert gc.isenabled() is on
        with pytest.raises(CheckpointNotFoundError), open_checkpoint(tmp_path / "absent.pt"):
            pass
        assert gc.isenabled() is on
    finally:
        gc.enable()
