"""What one operating system has and another lacks: reads at an offset, long reads, coarse clocks, open files."""

from __future__ import annotations

import errno
import io
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from reading_tools import saved, wrong_in_threads
from systems import in_use
from torch import nn

from smartload import SmartLoadError, UnreadableError, convert, inspect, smart_load
from smartload.reading import files, opening
from smartload.reading.files import FileReader, create_file, replace_file, temporary_name
from smartload.reading.opening import open_path

STATE = {"a": torch.arange(5.0)}


@pytest.fixture
def without_preadv(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows: a descriptor has one position, which a read moves."""
    monkeypatch.setattr(files, "SHARED_DESCRIPTOR", False)
    monkeypatch.setattr(opening, "SHARED_DESCRIPTOR", False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "bytes"
    target.write_bytes(bytes(range(256)) * 4096)  # every byte, also those that Windows changes in text: 10, 13, 26
    return target


@pytest.fixture
def reader(path: Path) -> Iterator[FileReader]:
    opened = open_path(str(path))
    yield opened
    opened.close()


def in_turn(reader: FileReader, size: int) -> bytes:
    data = bytearray(size)
    reader.read_into(0, memoryview(data))
    return bytes(data)


def test_bytes_are_read_as_they_are(path: Path, reader: FileReader) -> None:
    assert in_turn(reader, reader.size) == path.read_bytes()


def test_without_preadv_threads_do_not_move_each_other(
    without_preadv: None, path: Path, reader: FileReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(io.FileIO):
        def seek(self, offset: int, whence: int = 0, /) -> int:
            found = super().seek(offset, whence)
            time.sleep(0.0005)  # between it and the read, other threads seek
            return found

    monkeypatch.setattr(files, "_open", lambda path, name: Slow(path))
    reader = FileReader(str(path), "file")
    assert wrong_in_threads(reader, path.read_bytes(), size=1000, step=1777) == []
    assert 1 <= len(reader._opened) <= 4
    reader.close()


def test_without_preadv_every_descriptor_is_closed(without_preadv: None, reader: FileReader) -> None:
    (first, _), (second, _) = reader._take(), reader._take()
    numbers = [first.fileno(), second.fileno()]
    assert numbers[0] != numbers[1]
    reader._give_back(first)
    reader.close()
    reader._give_back(second)  # a read that was at work when the file was closed
    for fd in numbers:
        with pytest.raises(OSError, match=r".") as caught:
            os.fstat(fd)
        assert caught.value.errno == errno.EBADF


def test_without_preadv_no_other_file_takes_its_place(without_preadv: None, path: Path, reader: FileReader) -> None:
    mine, _ = reader._take()
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(UnreadableError, match="changed while it was read"):
        in_turn(reader, 10)
    reader._give_back(mine)


def test_without_preadv_a_file_object_that_changes_is_noticed(without_preadv: None, tmp_path: Path) -> None:
    net = nn.Linear(3, 3)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    data = (tmp_path / "w.pth").read_bytes()

    def rewrite(done: int, total: int) -> None:
        (tmp_path / "w.pth").write_bytes(data)  # of the same length

    with (tmp_path / "w.pth").open("rb") as file, pytest.raises(UnreadableError, match="changed while it was read"):
        smart_load(nn.Linear(3, 3), file, progress=rewrite)


def test_without_preadv_a_whole_model_is_loaded(
    without_preadv: None, reading: Callable[..., None], tmp_path: Path
) -> None:
    reading(piece=1000, count=4)
    source, net = (nn.Sequential(*(nn.Linear(50, 50) for _ in range(6))) for _ in range(2))
    torch.save(source.state_dict(), tmp_path / "w.pth")
    smart_load(net, tmp_path / "w.pth")
    with (tmp_path / "w.pth").open("rb") as file:
        smart_load(other := nn.Sequential(*(nn.Linear(50, 50) for _ in range(6))), file)
        assert file.tell() == 0
    for key, value in source.state_dict().items():
        assert torch.equal(value, net.state_dict()[key])
        assert torch.equal(value, other.state_dict()[key])


def test_no_read_is_longer_than_a_system_takes(path: Path, reader: FileReader, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.MAX_READ < 1 << 31
    real = files._read_at

    def refuse_long(fd: int, buffer: memoryview, offset: int) -> int:
        if len(buffer) > 1000:  # as macOS refuses 2 GiB
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, buffer, offset)

    monkeypatch.setattr(files, "_read_at", refuse_long)
    monkeypatch.setattr(files, "MAX_READ", 1000)
    assert in_turn(reader, reader.size) == path.read_bytes()


class Clock:
    """A disk that keeps times in whole steps, and a machine on which time passes only while somebody sleeps."""

    def __init__(self, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.step, self.now, self.start = step, 10_000_700_000_000, 10_000_700_000_000
        self.written = self.now
        monkeypatch.setattr(files.time, "time_ns", lambda: self.now)
        monkeypatch.setattr(files.time, "monotonic_ns", lambda: self.now)
        monkeypatch.setattr(files.time, "sleep", self.sleep)
        monkeypatch.setattr(files, "_stamp", self.stamp)

    def sleep(self, seconds: float) -> None:
        self.now += int(seconds * 1e9)

    def stamp(self, status: os.stat_result) -> files.Stamp:
        return status.st_size, self.written // self.step * self.step, status.st_ino, status.st_dev

    @property
    def slept(self) -> float:
        return (self.now - self.start) / 1e9


@pytest.mark.parametrize("step", [1, 10_000_000, 1_000_000_000, 2_000_000_000])
def test_a_write_after_opening_shows_however_coarse_the_clock(
    path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(step, monkeypatch)
    reader = open_path(str(path))
    assert clock.slept <= (2 if step >= 1_000_000_000 else 0.04)
    reader.check_unchanged()
    clock.written = clock.now  # of the same size, as a training run writes its last checkpoint
    with pytest.raises(UnreadableError, match="changed while it was read"):
        reader.check_unchanged()
    reader.close()


def test_waiting_for_a_coarse_clock_has_an_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(1_000_000_000, monkeypatch)

    def write_all_the_time(seconds: float) -> None:
        clock.now += int(seconds * 1e9)
        clock.written = clock.now

    monkeypatch.setattr(files.time, "sleep", write_all_the_time)
    with pytest.raises(UnreadableError, match="being written"):
        open_path(str(path))
    assert clock.slept <= 6


def test_an_old_file_of_whole_seconds_is_read_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As unpacked from an archive, which keeps whole seconds only.
    os.utime(path, (1_700_000_000, 1_700_000_000))
    monkeypatch.setattr(files.time, "sleep", lambda _: pytest.fail("waited"))
    open_path(str(path)).close()


def test_a_load_from_a_disk_of_whole_seconds_is_of_one_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training run writes its next checkpoint, of the same size, while the last is read."""
    status = files._stamp

    def whole_seconds(of: os.stat_result) -> files.Stamp:
        size, time_, *rest = status(of)
        return size, time_ // 1_000_000_000 * 1_000_000_000, *rest

    monkeypatch.setattr(files, "_stamp", whole_seconds)
    old, new = ({"weight": torch.full((9, 9), value), "bias": torch.full((9,), value)} for value in (1.0, 2.0))
    model = nn.Linear(9, 9)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def rewrite(done: int, total: int) -> None:
        with path.open("r+b") as file:
            file.write(saved(new))

    path = tmp_path / "last.pth"
    path.write_bytes(saved(old))
    with pytest.raises(UnreadableError, match="changed while it was read"):
        smart_load(model, path, progress=rewrite)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_sleep_that_ends_too_early_is_not_a_file_that_is_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Windows wakes up to a tick of its clock too early.
    clock = Clock(1_000_000_000, monkeypatch)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: clock.sleep(max(seconds - 0.015, 0.001)))
    open_path(str(path)).close()
    assert clock.slept < 2.1


@pytest.mark.parametrize("ahead", [-1.0, 0.5, 1.9])
def test_the_wait_does_not_depend_on_the_clock_of_the_disk(
    path: Path, ahead: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(1_000_000_000, monkeypatch)
    skew = int(ahead * 1e9)
    clock.written = clock.now + skew
    reader = open_path(str(path))
    assert clock.slept <= 2.001
    clock.written = clock.now + skew
    with pytest.raises(UnreadableError, match="changed while it was read"):
        reader.check_unchanged()
    reader.close()


def test_windows_tries_again_to_replace_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = create_file(temporary_name(tmp_path / "old"), 0o666)
    file.write(b"new")
    (tmp_path / "old").write_bytes(b"old")
    replace, tries = os.replace, iter([in_use, in_use, os.replace])
    monkeypatch.setattr(files, "_WINDOWS", True)
    monkeypatch.setattr(files.os, "replace", lambda new, to: next(tries, replace)(new, to))
    replace_file(file, tmp_path / "old")
    assert (tmp_path / "old").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["old"]


def test_other_systems_do_not_try_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_WINDOWS", False)
    monkeypatch.setattr(files.os, "replace", in_use)
    monkeypatch.setattr(files.time, "sleep", lambda _: pytest.fail("waited"))
    with create_file(temporary_name(tmp_path / "old"), 0o666) as file, pytest.raises(PermissionError):
        replace_file(file, tmp_path / "old")


# On Linux and macOS these are names of files that are not there.
@pytest.mark.parametrize(
    "name", ["nul", "con", "NUL.pth", "C:", "C:w.pth", "w.pth:stream", r"\\host\share\w.pth", "a?b", "x" * 400]
)
def test_names_that_windows_reads_in_its_own_way_are_typed_errors(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SmartLoadError):
        inspect(name)
    if not os.path.isdir(name):  # as a drive of Windows is
        with pytest.raises(SmartLoadError):
            convert({"a": torch.ones(2)}, f"{name}/w.pth")
    assert os.listdir(tmp_path) == []


def test_a_path_too_long_and_one_of_other_letters(tmp_path: Path) -> None:
    with pytest.raises(SmartLoadError):
        inspect(tmp_path / "/".join(["folder" * 8] * 100) / "w.pth")
    folder = tmp_path / "\u6a21\u578b"
    folder.mkdir()
    (folder / "\u6743\u91cd.pth").write_bytes(saved(STATE))
    assert inspect(folder / "\u6743\u91cd.pth").format == "torch zip"
    convert(folder / "\u6743\u91cd.pth", folder / "\u5e72\u51c0.pth")
    with pytest.raises(SmartLoadError) as caught:
        inspect(folder / "\u65e0.pth")
    assert cast("Any", caught.value.problem).facts["beside"] == "Beside it lie: \u6743\u91cd.pth, \u5e72\u51c0.pth"


@pytest.mark.parametrize("name", ["con.pth", "nul.pth", "aux.safetensors"])
def test_a_device_of_windows_is_no_destination(name: str, tmp_path: Path) -> None:
    # Older releases of Windows refuse such names, the newest takes them as all other systems do.
    try:
        assert convert({"a": torch.ones(2)}, tmp_path / name).read_bytes()
    except SmartLoadError:
        assert os.name == "nt"
        assert os.listdir(tmp_path) == []
