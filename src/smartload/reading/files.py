"""Read bytes at absolute offsets: of a file, a file object, bytes in memory, or a part of another reader.

Each class is a `ByteReader`. Files are never mapped: a mapped file that is truncated while it is read kills the process
by SIGBUS, and one that is written changes weights that were read before. A read gives an error instead.

What one operating system has and another lacks is met here: reads at an offset, flags of an open file, the length of a
read, the clock of a disk, a file that another program has open.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import threading
import time
from collections.abc import Callable
from typing import BinaryIO, TypeAlias

from smartload.errors import UnreadableError
from smartload.records.entries import ByteReader
from smartload.records.problems import Kind, Problem
from smartload.records.text import printable, size_text

SETTLE_NS = 30_000_000
"""A file written less than 30 ms ago may be written again without a change of its time: Linux and macOS take the time
from a clock that ticks every 1 to 10 ms, Windows from one that ticks every 16. git has the same rule and calls such
files racily clean."""
COARSE_SETTLE_NS = 2_000_000_000
"""The same for a time in whole seconds, as FAT (which counts two at a time), HFS+, ext3 and many network drives keep
it."""
PATIENCE_NS = 1_000_000_000
"""How long to wait, beyond that, for a file that is written again and again."""
MAX_READ = 1 << 30
"""Bytes that one call of the system is asked for: macOS refuses more than 2**31 - 1, and Linux gives no more."""
REPLACE_PATIENCE = 1.0
"""Seconds to try to replace a file of Windows that somebody has open: virus scanners and search indexers look at every
new file, for a moment."""
UNPACKED = 64 << 20
"""Bytes that any packed file may unpack to: little enough for every machine."""
MAX_GROWTH = 16
"""Beyond that, how many times its size a file may unpack to. Weights shrink by a tenth, or to a tenth where nearly all
are zero; a zip or gzip bomb grows a thousandfold."""

Stamp: TypeAlias = tuple[int, int, int, int]
"""Size, time of the last write, inode and device of a file: equal before and after means the same file, unchanged."""

# O_NONBLOCK: opening a named pipe would wait for a writer, maybe for ever. O_BINARY: or Windows takes \r out of what is
# read, and ends it at a byte 26. Neither is on every system. Python itself keeps descriptors from child processes.
_READ_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)

SHARED_DESCRIPTOR = hasattr(os, "preadv")
"""Whether threads can share a descriptor, as each read has an offset of its own. Windows lacks such reads, and so do
builds of Python for an old macOS."""
_WINDOWS = os.name == "nt"


def _read_at(fd: int, buffer: memoryview, offset: int) -> int:
    """Read bytes from `offset` on into `buffer`; return how many. Python's lock is released meanwhile."""
    if SHARED_DESCRIPTOR:
        return os.preadv(fd, [buffer], offset)
    os.lseek(fd, offset, os.SEEK_SET)
    # os.read would give a copy of the bytes. None stands for "nothing yet", which a regular file does not say.
    return io.FileIO(fd, closefd=False).readinto(buffer) or 0


class _Descriptor:
    """An open file of the system, closed when nobody refers to it any more: an interrupt may come before `close`.

    Args:
        opened: opens it, and gives its number. Called here, so that there is no moment in which nobody has the number.
    """

    def __init__(self, opened: Callable[[], int]) -> None:
        self.number = -1
        self.number = opened()

    def close(self) -> None:
        """Close it once: as soon as it is closed, its number may be another file's."""
        number, self.number = self.number, -1
        if number >= 0:
            os.close(number)

    __del__ = close


def _open(path: str) -> _Descriptor:
    """Open the file at `path` to read its bytes, as they are."""
    return _Descriptor(lambda: os.open(path, _READ_FLAGS))


class FileReader:
    """A regular file, read from first to last as the one that was opened, so that no other file can take its place.

    Args:
        file: its path, or the number of a descriptor; of this the reader has a duplicate, since the caller may close
            the file while it is read. By the path the file is opened again: after `release`, and where threads cannot
            share a descriptor.
        name: the file's name, for messages.
        start: where in the file the content begins.

    Raises:
        OSError: it cannot be opened.
        UnreadableError: it is no regular file, or is being written.
    """

    def __init__(self, file: str | int, name: str, start: int = 0) -> None:
        # Absolute, since the working directory may change before it is opened again.
        self.path = os.path.abspath(file) if isinstance(file, str) else ""
        self.name, self._start = name, start
        descriptor = _open(file) if isinstance(file, str) else _Descriptor(lambda: os.dup(file))
        status = os.fstat(descriptor.number)
        # A pipe or a device may never end, may wait for ever, and has no offsets.
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableError(Problem("not_regular", name, {"what": _kind(status.st_mode)}))
        self._stamp = _settled_stamp(descriptor.number, name)
        self.size = max(0, self._stamp[0] - start)
        self._kept = True  # whether descriptors stay open between reads
        # Those that nobody reads by now. To pop one, and to append it again, is one step each for threads.
        self._descriptors = [descriptor]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on; UnreadableError where the file ends before."""
        done, at = 0, self._start + offset
        descriptor, alone = self._take()
        try:
            while done < len(buffer):  # one call may give less than it was asked for
                got = _read_at(descriptor.number, buffer[done : done + MAX_READ], at + done)
                if not got:  # the file was cut after it was opened
                    raise shorter(self.name, offset + len(buffer), offset + done)
                done += got
        except OSError as error:
            raise io_problem(self.name, error) from error
        finally:
            if alone:
                self._give_back(descriptor)

    def check_unchanged(self) -> None:
        """Raise UnreadableError where size, time, inode or device differ from those at opening."""
        descriptor, alone = self._take()
        try:
            self._check_stamp(descriptor)
        finally:
            if alone:
                self._give_back(descriptor)

    def _check_stamp(self, descriptor: _Descriptor) -> None:
        if _stamp(os.fstat(descriptor.number)) != self._stamp:
            raise UnreadableError(Problem("changed", self.name))

    def release(self) -> None:
        """Close the descriptor and open the file anew for each read; for checkpoints of very many shards."""
        self.close()

    def _take(self) -> tuple[_Descriptor, bool]:
        """Give a descriptor to read by, and whether it is this read's alone until `_give_back`."""
        if self._kept:
            try:
                return (self._descriptors[0], False) if SHARED_DESCRIPTOR else (self._descriptors.pop(), True)
            except IndexError:  # all are in use
                pass
        return self._open_again(), True

    def _open_again(self) -> _Descriptor:
        """Open the file once more; raise UnreadableError where another one, or another content, lies there now."""
        try:
            descriptor = _open(self.path)
        except OSError as error:
            raise io_problem(self.name, error) from error
        self._check_stamp(descriptor)
        return descriptor

    def _give_back(self, descriptor: _Descriptor) -> None:
        """Keep a descriptor for the next read, or close it where none is kept by now."""
        self._descriptors.append(descriptor)
        if not self._kept:
            self._close_descriptors()

    def close(self) -> None:
        """Close the descriptors, but for those that are read by; these are closed when the read ends."""
        self._kept = False
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        while self._descriptors:
            with contextlib.suppress(IndexError):  # another thread took the last one
                self._descriptors.pop().close()


class ObjectReader:
    """A seekable binary file object, from its present position on; `close` restores that position.

    Args:
        file: the file object.
        name: what messages call it.
        fd: its descriptor, where it is a regular file; then a change while it is read is noticed.
    """

    def __init__(self, file: BinaryIO, name: str, fd: int | None = None) -> None:
        self.name, self._file, self._lock, self._fd = name, file, threading.Lock(), fd
        self._stamp = None if fd is None else _settled_stamp(fd, name)
        self._start = file.tell()
        # In one line, so that Ctrl-C hardly ever comes between the two, and leaves the caller's file at its end.
        self._end, _ = file.seek(0, os.SEEK_END), file.seek(self._start)
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
        """Raise UnreadableError where the length differs from that at opening or, of a regular file, its time."""
        with self._lock:
            end = self._file.seek(0, os.SEEK_END)
        if end != self._end or (self._fd is not None and _stamp(os.fstat(self._fd)) != self._stamp):
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
        UnreadableError: it is written again and again, longer than `PATIENCE_NS`.
    """
    begun = since = time.monotonic_ns()
    stamp = _stamp(os.fstat(fd))
    while True:
        settle = SETTLE_NS if stamp[1] % 1_000_000_000 else COARSE_SETTLE_NS
        now, age = time.monotonic_ns(), time.time_ns() - stamp[1]
        # Old by the clock; far in the future, by another machine's clock; or seen for so long, whatever any clock says.
        if not -settle < age < settle or now - since >= settle:
            return stamp
        if now > begun + settle + PATIENCE_NS:
            raise UnreadableError(Problem("being_written", name))
        time.sleep((settle - max(age, now - since)) / 1e9)
        if (seen := _stamp(os.fstat(fd))) != stamp:
            stamp, since = seen, time.monotonic_ns()


def _kind(mode: int) -> str:
    """Say what kind of thing has this mode: 'a named pipe'."""
    device = dict.fromkeys((stat.S_IFCHR, stat.S_IFBLK), "a device")
    kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder", **device}
    return kinds.get(stat.S_IFMT(mode), "no regular file")


def replace_file(new: str | os.PathLike[str], to: str | os.PathLike[str]) -> None:
    """Give the file `new` the name `to` in one step, in place of a file that has this name.

    Raises:
        OSError: `to` is what it was. PermissionError on Windows: somebody has one of the files open.
    """
    _try_for_a_while(lambda: os.replace(new, to))
    # Or the folder may have the old file again after a power cut. Windows opens no folder, some disks sync none, and
    # the file is there in any case.
    with contextlib.suppress(OSError):
        folder = os.open(os.path.dirname(to) or ".", os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_file(path: str | os.PathLike[str]) -> None:
    """Remove the file at `path`; on Windows, wait for a moment until nobody has it open."""
    _try_for_a_while(lambda: os.unlink(path))


def _try_for_a_while(act: Callable[[], None]) -> None:
    """Do `act`; on Windows again and again, for `REPLACE_PATIENCE`, where somebody has the file open."""
    deadline = time.monotonic() + REPLACE_PATIENCE
    while True:
        try:
            return act()
        except PermissionError:
            if not _WINDOWS or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def is_in_use(error: BaseException, path: str | os.PathLike[str]) -> bool:
    """Tell whether Windows gave this error because somebody has the file at `path` open."""
    # `winerror` comes from replacing, not from opening. A file that is read-only cannot be replaced there either.
    refused = isinstance(error, PermissionError) and getattr(error, "winerror", None) is not None
    return refused and os.path.exists(path) and os.access(path, os.W_OK)


def check_growth(nbytes: int, file: ByteReader) -> None:
    """Raise UnreadableError where a file unpacks to `nbytes`, far more than weights shrink by."""
    if nbytes > max(UNPACKED, MAX_GROWTH * file.size):
        raise UnreadableError(Problem("grows", file.name, {"have": size_text(file.size), "more": size_text(nbytes)}))


def io_problem(name: str, error: OSError) -> UnreadableError:
    """Give the exception for an error of the operating system."""
    # Not str(error) where it can be helped: it holds the whole path.
    reason = printable(error.strerror or str(error))
    kind: Kind = "io"
    if error.errno in (errno.EACCES, errno.EPERM):
        kind = "no_permission"
        if _WINDOWS:  # it has the same number for both
            reason += ", or another program has it open"
    return UnreadableError(Problem(kind, name, {"reason": reason}))


def shorter(name: str, need: int, have: int) -> UnreadableError:
    """Give the exception for a file of `have` bytes that should have `need`."""
    return UnreadableError(Problem("shorter", name, {"need": need, "have": have}))
