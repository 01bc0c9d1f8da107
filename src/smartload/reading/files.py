"""Read bytes at absolute offsets: of a file, a file object, bytes in memory, or a part of another reader.

Each class is a `ByteReader`. Files are never mapped: a mapped file that is truncated while it is read kills the process
by SIGBUS, and one that is written changes weights that were read before. A read gives an error instead.
"""

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
"""A file written less than 30 ms ago may be written again without a change of its time: file systems take the time from
a clock that ticks every 1 to 10 ms. git has the same rule and calls such files racily clean."""
PATIENCE_NS = 1_000_000_000
"""How long to wait for a file that is written again and again."""
UNPACKED = 64 << 20
"""Bytes that any packed file may unpack to: little enough for every machine."""
MAX_GROWTH = 16
"""Beyond that, how many times its size a file may unpack to. Weights shrink by a tenth, or to a tenth where nearly all
are zero; a zip or gzip bomb grows a thousandfold."""

Stamp: TypeAlias = tuple[int, int, int, int]
"""Size, time of the last write, inode and device of a file: equal before and after means the same file, unchanged."""


class FileReader:
    """A regular file, read by one descriptor from first to last, so that no other file can take its place.

    Args:
        fd: the descriptor, which the reader closes.
        name: the file's name, for messages.
        start: where in the file the content begins.
        path: its path, needed for `release` only.

    Raises:
        UnreadableError: it is no regular file, or is being written.
    """

    def __init__(self, fd: int, name: str, start: int = 0, path: str = "") -> None:
        self.name, self.path, self._fd, self._start = name, path, fd, start
        status = os.fstat(fd)
        # A pipe or a device may never end, may wait for ever, and has no offsets.
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableError(Problem("not_regular", name, {"what": _kind(status.st_mode)}))
        self._stamp = _settled_stamp(fd, name)
        self.size = max(0, self._stamp[0] - start)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on; UnreadableError where the file ends before.

        preadv reads at an offset of its own and without the interpreter's lock, so threads share the descriptor.
        """
        done, at, fd = 0, self._start + offset, self._descriptor()
        try:
            while done < len(buffer):  # one call gives at most 2 GiB, and may give less
                got = os.preadv(fd, [buffer[done:]], at + done)
                if not got:  # the file was cut after it was opened
                    raise shorter(self.name, offset + len(buffer), offset + done)
                done += got
        except OSError as error:
            raise io_problem(self.name, error) from error
        finally:
            self._give_back(fd)

    def check_unchanged(self) -> None:
        """Raise UnreadableError where size, time, inode or device differ from those at opening."""
        fd = self._descriptor()
        try:
            if _stamp(os.fstat(fd)) != self._stamp:
                raise UnreadableError(Problem("changed", self.name))
        finally:
            self._give_back(fd)

    def release(self) -> None:
        """Close the descriptor and open the file anew for each read; for checkpoints of very many shards.

        `check_unchanged` compares the inode, so another file that takes its place is noticed.
        """
        self.close()

    def _descriptor(self) -> int:
        """Give the descriptor, or open one where it was released."""
        if self._fd >= 0:
            return self._fd
        try:
            # O_NONBLOCK: by now a named pipe may lie there, whose opening would wait for a writer.
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise io_problem(self.name, error) from error

    def _give_back(self, fd: int) -> None:
        """Close a descriptor that `_descriptor` opened."""
        if fd != self._fd:
            os.close(fd)

    def close(self) -> None:
        """Close the descriptor; a second call does nothing, as the number may be another file's by then."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class ObjectReader:
    """A seekable binary file object, from its present position on; `close` restores that position."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.name, self._file, self._lock = name, file, threading.Lock()
        self._start = file.tell()
        self._end = file.seek(0, os.SEEK_END)
        file.seek(self._start)
        self.size = max(0, self._end - self._start)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on; UnreadableError where the file ends before."""
        with self._lock:  # a file object has one position, and seek and read must not be parted
            try:
                self._file.seek(self._start + offset)
                done = self._fill(buffer)
            except OSError as error:
                raise io_problem(self.name, error) from error
        if done < len(buffer):
            raise shorter(self.name, offset + len(buffer), offset + done)

    def _fill(self, buffer: memoryview) -> int:
        """Read from the present position until `buffer` is full or the file ends, and return the number of bytes.

        By `read`, since not every file object has `readinto`.
        """
        done = 0
        while done < len(buffer):
            # In pieces of 16 MiB, as each is a second copy of the bytes.
            data = self._file.read(min(len(buffer) - done, 1 << 24))
            if not data:
                break
            buffer[done : done + len(data)] = data
            done += len(data)
        return done

    def check_unchanged(self) -> None:
        """Raise UnreadableError where the length differs from that at opening; no more of it can be known."""
        with self._lock:
            end = self._file.seek(0, os.SEEK_END)
        if end != self._end:
            raise UnreadableError(Problem("changed", self.name))

    def close(self) -> None:
        """Restore the position; the file is the caller's and stays open."""
        with contextlib.suppress(ValueError):  # the caller has closed it meanwhile
            self._file.seek(self._start)


class BytesReader:
    """Bytes in memory: the content of a packed file, of one that cannot seek, or what a file does not hold as it is."""

    def __init__(self, data: bytes | bytearray, name: str) -> None:
        # A slice of a view is no copy of the bytes, which may be a whole checkpoint.
        self.name, self.size, self._data = name, len(data), memoryview(data)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Copy the bytes from `offset` on into `buffer`; UnreadableError where they end before."""
        if offset + len(buffer) > self.size:
            raise shorter(self.name, offset + len(buffer), self.size)
        buffer[:] = self._data[offset : offset + len(buffer)]

    def check_unchanged(self) -> None:
        """Do nothing: no one else has these bytes."""

    def close(self) -> None:
        """Do nothing: memory needs no closing."""


class Window:
    """A part of another reader, `size` bytes from `start` on, with offsets of its own.

    It does not close the other reader. UnreadableError where the part is not inside it.
    """

    def __init__(self, file: ByteReader, start: int, size: int) -> None:
        if start < 0 or size < 0 or start + size > file.size:
            raise shorter(file.name, start + size, file.size)
        self.name, self.size, self._file, self._start = file.name, size, file, start

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on; UnreadableError where the part ends before."""
        # Or bytes that belong to the next part would be read.
        if offset + len(buffer) > self.size:
            raise shorter(self.name, offset + len(buffer), self.size)
        self._file.read_into(self._start + offset, buffer)

    def check_unchanged(self) -> None:
        """Raise UnreadableError where the whole file has changed."""
        self._file.check_unchanged()

    def close(self) -> None:
        """Do nothing: whoever opened the whole file closes it."""


def head(file: ByteReader, size: int) -> bytes:
    """Read the first `size` bytes of a file, fewer where it is shorter."""
    return read_bytes(file, 0, min(size, file.size))


def read_bytes(file: ByteReader, offset: int, size: int) -> bytes:
    """Read `size` bytes of `file` from `offset` on; UnreadableError where the file ends before."""
    return bytes(read_buffer(file, offset, size))


def read_buffer(file: ByteReader, offset: int, size: int) -> bytearray:
    """Do the same as `read_bytes`, without the copy that makes a `bytes` object of the buffer."""
    # Before the buffer is allocated: sizes come from the file, and may be anything.
    if offset < 0 or size < 0 or offset + size > file.size:
        raise shorter(file.name, offset + size, file.size)
    buffer = bytearray(size)
    file.read_into(offset, memoryview(buffer))
    return buffer


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev


def _settled_stamp(fd: int, name: str) -> Stamp:
    """Give the file's stamp once it is so old that a later write must change it; see `SETTLE_NS`.

    Raises:
        UnreadableError: it is still being written after `PATIENCE_NS`.
    """
    deadline = time.monotonic_ns() + PATIENCE_NS
    while True:
        stamp = _stamp(os.fstat(fd))
        age = time.time_ns() - stamp[1]
        # A time in the future is another machine's clock, on a network drive, and waiting would not help.
        if not -SETTLE_NS < age < SETTLE_NS:
            return stamp
        if time.monotonic_ns() > deadline:
            raise UnreadableError(Problem("being_written", name))
        time.sleep((SETTLE_NS - age) / 1e9)


def _kind(mode: int) -> str:
    """Say what kind of thing has this mode: 'a named pipe'."""
    device = dict.fromkeys((stat.S_IFCHR, stat.S_IFBLK), "a device")
    kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder", **device}
    return kinds.get(stat.S_IFMT(mode), "no regular file")


def check_growth(nbytes: int, file: ByteReader) -> None:
    """Raise UnreadableError where a file unpacks to `nbytes`, far more than weights shrink by."""
    if nbytes > max(UNPACKED, MAX_GROWTH * file.size):
        raise UnreadableError(Problem("grows", file.name, {"have": size_text(file.size), "more": size_text(nbytes)}))


def io_problem(name: str, error: OSError) -> UnreadableError:
    """Give the exception for an error of the operating system."""
    # Not str(error): it holds the whole path.
    reason = os.strerror(error.errno) if error.errno else printable(str(error))
    kind: Kind = "no_permission" if error.errno in (errno.EACCES, errno.EPERM) else "io"
    return UnreadableError(Problem(kind, name, {"reason": reason}))


def shorter(name: str, need: int, have: int) -> UnreadableError:
    """Give the exception for a file of `have` bytes that should have `need`."""
    return UnreadableError(Problem("shorter", name, {"need": need, "have": have}))
