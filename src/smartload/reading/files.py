"""Open files as readers of bytes at absolute offsets: by descriptor, by file object, from memory, a part of another."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import time
from typing import BinaryIO, TypeAlias

from smartload.errors import UnreadableError
from smartload.records.entries import ByteReader
from smartload.records.problems import Kind, Problem
from smartload.records.text import printable, size_text

SETTLE_NS = 30_000_000
"""A file written less than this ago may change again within the same tick of the file system's clock."""
PATIENCE_NS = 1_000_000_000
UNPACKED, MOST = 64 << 20, 16
"""Weights shrink by a tenth, or to a tenth where nearly all are zero; what grows by more is no checkpoint."""

Stamp: TypeAlias = tuple[int, int, int, int]


class FileReader:
    """A regular file, read by one descriptor from first to last."""

    def __init__(self, fd: int, name: str, start: int = 0, path: str = "") -> None:
        self.name, self.path, self._fd, self._start = name, path, fd, start
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableError(Problem("not_regular", name, {"what": _kind(status.st_mode)}))
        self._stamp = _settled(fd, name)
        self.size = max(0, self._stamp[0] - start)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on; UnreadableError where the file ends before."""
        done, at, fd = 0, self._start + offset, self._descriptor()
        try:
            while done < len(buffer):
                got = os.preadv(fd, [buffer[done:]], at + done)
                if not got:
                    raise shorter(self.name, offset + len(buffer), offset + done)
                done += got
        except OSError as error:
            raise io_problem(self.name, error) from error
        finally:
            self._give_back(fd)

    def check_unchanged(self) -> None:
        """UnreadableError where size, time or inode differ from those at opening."""
        fd = self._descriptor()
        try:
            if _stamp(os.fstat(fd)) != self._stamp:
                raise UnreadableError(Problem("changed", self.name))
        finally:
            self._give_back(fd)

    def release(self) -> None:
        """Keep no descriptor from now on: the file is opened for each read, and in the end must be the same."""
        self.close()

    def _descriptor(self) -> int:
        if self._fd >= 0:
            return self._fd
        try:
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise io_problem(self.name, error) from error

    def _give_back(self, fd: int) -> None:
        if fd != self._fd:
            os.close(fd)

    def close(self) -> None:
        """Give the descriptor back, once."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class ObjectReader:
    """A seekable binary file object from its present position on; that position is restored in the end."""

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
        if end != self._end:
            raise UnreadableError(Problem("changed", self.name))

    def close(self) -> None:
        """Leave the caller's file open, where it was."""
        with contextlib.suppress(ValueError):  # the caller has closed it meanwhile
            self._file.seek(self._start)


class BytesReader:
    """Bytes in memory, as a file: what a file holds packed, or what could not be read at any place in it."""

    def __init__(self, data: bytes | bytearray, name: str) -> None:
        self.name, self.size, self._data = name, len(data), memoryview(data)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on; UnreadableError where they end before."""
        if offset + len(buffer) > self.size:
            raise shorter(self.name, offset + len(buffer), self.size)
        buffer[:] = self._data[offset : offset + len(buffer)]

    def check_unchanged(self) -> None:
        """Nobody else has these bytes."""

    def close(self) -> None:
        """Memory needs no closing."""


class Window:
    """A part of a file, as a file of its own; the caller goes on to close the whole."""

    def __init__(self, file: ByteReader, start: int, size: int) -> None:
        if start < 0 or size < 0 or start + size > file.size:
            raise shorter(file.name, start + size, file.size)
        self.name, self.size, self._file, self._start = file.name, size, file, start

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on; UnreadableError where the part ends before."""
        if offset + len(buffer) > self.size:
            raise shorter(self.name, offset + len(buffer), self.size)
        self._file.read_into(self._start + offset, buffer)

    def check_unchanged(self) -> None:
        """UnreadableError where the whole file has changed."""
        self._file.check_unchanged()

    def close(self) -> None:
        """Leave the whole file open."""


def head(file: ByteReader, size: int) -> bytes:
    """The first bytes of a file, as many as there are."""
    return read_bytes(file, 0, min(size, file.size))


def read_bytes(file: ByteReader, offset: int, size: int) -> bytes:
    """`size` bytes of `file` from `offset` on, checked against its size before anything is allocated."""
    return bytes(read_buffer(file, offset, size))


def read_buffer(file: ByteReader, offset: int, size: int) -> bytearray:
    """The same without the copy that makes them unchangeable."""
    if offset < 0 or size < 0 or offset + size > file.size:
        raise shorter(file.name, offset + size, file.size)
    buffer = bytearray(size)
    file.read_into(offset, memoryview(buffer))
    return buffer


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
    kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder", **device}
    return kinds.get(stat.S_IFMT(mode), "no regular file")


def check_growth(nbytes: int, file: ByteReader) -> None:
    """UnreadableError where unpacking a file takes far more memory than weights do."""
    if nbytes > max(UNPACKED, MOST * file.size):
        raise UnreadableError(Problem("grows", file.name, {"have": size_text(file.size), "more": size_text(nbytes)}))


def io_problem(name: str, error: OSError) -> UnreadableError:
    """The refusal for an error of the operating system."""
    reason = os.strerror(error.errno) if error.errno else printable(str(error))
    kind: Kind = "no_permission" if error.errno in (errno.EACCES, errno.EPERM) else "io"
    return UnreadableError(Problem(kind, name, {"reason": reason}))


def shorter(name: str, need: int, have: int) -> UnreadableError:
    """The refusal for a file that ends before the bytes it was said to hold."""
    return UnreadableError(Problem("shorter", name, {"need": need, "have": have}))
