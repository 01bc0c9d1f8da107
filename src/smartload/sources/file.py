"""Open files as readers of bytes at absolute offsets: by descriptor, by file object, or from memory."""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import os
import stat
import threading
import time
from typing import BinaryIO, TypeAlias

from smartload.errors import CheckpointNotFoundError, UnreadableError
from smartload.folding import shown
from smartload.records import ByteReader, Problem
from smartload.sources.naming import base_name

SETTLE_NS = 30_000_000
"""A file written less than this ago may change again within the same tick of the file system's clock."""
PATIENCE_NS = 1_000_000_000

Stamp: TypeAlias = tuple[int, int, int, int]


class FileReader:
    """A regular file, read by one descriptor from first to last."""

    def __init__(self, fd: int, name: str, start: int = 0) -> None:
        self.name, self._fd, self._start = name, fd, start
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableError(Problem("not_regular", name, {"what": _kind(status.st_mode)}))
        self._stamp = _settled(fd, name)
        self.size = max(0, self._stamp[0] - start)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on; UnreadableError where the file ends before."""
        done, at = 0, self._start + offset
        while done < len(buffer):
            try:
                got = os.preadv(self._fd, [buffer[done:]], at + done)
            except OSError as error:
                raise io_problem(self.name, error) from error
            if not got:
                raise shorter(self.name, offset + len(buffer), offset + done)
            done += got

    def check_unchanged(self) -> None:
        """UnreadableError where size, time or inode differ from those at opening."""
        if _stamp(os.fstat(self._fd)) != self._stamp:
            raise UnreadableError(Problem("changed", self.name))

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._fd)


class ObjectReader:
    """A seekable binary file object from its present position on; that position is restored after each read."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.name, self._file, self._lock = name, file, threading.Lock()
        self._start = file.tell()
        self._end = file.seek(0, os.SEEK_END)
        file.seek(self._start)
        self.size = max(0, self._end - self._start)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on; UnreadableError where the file ends before."""
        with self._lock:
            try:
                self._file.seek(self._start + offset)
                done = self._fill(buffer)
            except OSError as error:
                raise io_problem(self.name, error) from error
            finally:
                self._file.seek(self._start)
        if done < len(buffer):
            raise shorter(self.name, offset + len(buffer), offset + done)

    def _fill(self, buffer: memoryview) -> int:
        done = 0
        while done < len(buffer):
            data = self._file.read(min(len(buffer) - done, 1 << 24))
            if not data:
                break
            buffer[done : done + len(data)] = data
            done += len(data)
        return done

    def check_unchanged(self) -> None:
        """UnreadableError where the length differs from that at opening."""
        with self._lock:
            end = self._file.seek(0, os.SEEK_END)
            self._file.seek(self._start)
        if end != self._end:
            raise UnreadableError(Problem("changed", self.name))

    def close(self) -> None:
        """Leave the caller's file open."""


def read_bytes(file: ByteReader, offset: int, size: int) -> bytes:
    """`size` bytes of `file` from `offset` on, checked against its size before anything is allocated."""
    if offset < 0 or size < 0 or offset + size > file.size:
        raise shorter(file.name, offset + size, file.size)
    buffer = bytearray(size)
    file.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def open_path(path: str) -> FileReader:
    """The file at `path`, or CheckpointNotFoundError or UnreadableError with the reason."""
    if "\0" in path:
        raise ValueError("path must not contain a NUL character")
    name = base_name(path)
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointNotFoundError(Problem("not_found", shown(path), {"beside": _beside(path)})) from None
    except OSError as error:
        if os.path.isdir(path):
            raise folder(path) from None
        raise io_problem(name, error) from error
    try:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise folder(path)
        return FileReader(fd, name)
    except BaseException:
        os.close(fd)
        raise


def open_object(file: BinaryIO) -> FileReader | ObjectReader:
    """A reader of a binary file object, from its present position on."""
    name = base_name(file.name) if isinstance(getattr(file, "name", None), str) else "the file object"
    raw = file.raw if type(file) is io.BufferedReader else file
    if type(raw) is io.FileIO and hasattr(os, "preadv"):
        # Only these two are known to show the bytes of their descriptor: a GzipFile has a fileno() as well.
        status = os.fstat(raw.fileno())
        if stat.S_ISREG(status.st_mode):
            return _duplicate(raw.fileno(), name, file.tell())
    if not _seekable(file):
        return ObjectReader(io.BytesIO(file.read()), name)
    return ObjectReader(file, name)


def _duplicate(fd: int, name: str, start: int) -> FileReader:
    own = os.dup(fd)
    try:
        return FileReader(own, name, start)
    except BaseException:
        os.close(own)
        raise


def _seekable(file: BinaryIO) -> bool:
    try:
        file.seek(file.tell())
    except (OSError, AttributeError):
        return False
    return True


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev


def _settled(fd: int, name: str) -> Stamp:
    """The file's stamp, once it is old enough that a later write is bound to change it (git's racily-clean rule)."""
    deadline = time.monotonic_ns() + PATIENCE_NS
    while True:
        stamp = _stamp(os.fstat(fd))
        age = time.time_ns() - stamp[1]
        if not -SETTLE_NS < age < SETTLE_NS:
            return stamp
        if time.monotonic_ns() > deadline:
            raise UnreadableError(Problem("being_written", name))
        time.sleep((SETTLE_NS - age) / 1e9)


def _kind(mode: int) -> str:
    device = dict.fromkeys((stat.S_IFCHR, stat.S_IFBLK), "a device")
    kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", **device}
    return kinds.get(stat.S_IFMT(mode), "no regular file")


def io_problem(name: str, error: OSError) -> UnreadableError:
    """The refusal for an error of the operating system."""
    reason = os.strerror(error.errno) if error.errno else shown(str(error))
    kind = "no_permission" if error.errno in (errno.EACCES, errno.EPERM) else "io"
    return UnreadableError(Problem(kind, name, {"reason": reason}))


def shorter(name: str, need: int, have: int) -> UnreadableError:
    """The refusal for a file that ends before the bytes it was said to hold."""
    return UnreadableError(Problem("shorter", name, {"need": need, "have": have}))


def _names_in(path: str) -> list[str]:
    with contextlib.suppress(OSError):
        return sorted(os.listdir(path))
    return []


def _beside(path: str) -> str:
    parent, wanted = os.path.split(path.rstrip("/"))
    names = _names_in(parent or ".")
    close = difflib.get_close_matches(wanted, names[:10_000], n=5, cutoff=0.5)
    same = [name for name in names if os.path.splitext(name)[1] == os.path.splitext(wanted)[1] and name not in close]
    listed = ", ".join(shown(name) for name in (close + same)[:5])
    if listed:
        return f"Beside it lie: {listed}"
    return "No file of that kind lies beside it" if names else "Its folder is empty or not there"


def folder(path: str) -> UnreadableError:
    """The refusal for a folder, by what lies in it."""
    names = _names_in(path)
    kind = "folder" if names else "folder_empty"
    if ".metadata" in names and any(name.endswith(".distcp") for name in names):
        kind = "folder_dcp"
    listed = ", ".join(map(shown, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return UnreadableError(Problem(kind, base_name(path), {"names": listed}))
