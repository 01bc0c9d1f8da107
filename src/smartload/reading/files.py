"""Read bytes at absolute offsets: of a file, a file object, bytes in memory, or a part of another reader.

Each class is a `ByteReader`. Files are never mapped: a mapped file that is truncated while it is read kills the process
by SIGBUS, and one that is written changes weights that were read before. A read gives an error instead.

What one operating system has and another lacks is met here: reads at an offset, flags of an open file, the length of a
read, the clock of a disk, a file that another program has open, the lock that tells the file of a living process from
that of a dead one.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import secrets
import shutil
import stat
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeAlias

try:
    import fcntl
except ImportError:  # Windows: there nobody can remove a file that a process has open
    fcntl = None  # type: ignore[assignment]

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
"""Bytes that one call of the system is asked for, to read or to write: macOS refuses more than 2**31 - 1, and Linux
moves no more."""
REPLACE_PATIENCE = 1.0
"""Seconds to try to replace a file of Windows that somebody has open: virus scanners and search indexers look at every
new file, for a moment."""
CLOSED_FOR = 10.0
"""Seconds in which a file without a lock may belong to a process that lives: on Windows it is closed before it is
replaced, and `REPLACE_PATIENCE` is a part of that."""
FORGOTTEN_FOR = 86_400.0
"""Seconds in which another host's file may: some network drives lock a file on one host alone."""
UNPACKED = 64 << 20
"""Bytes that any packed file may unpack to: little enough for every machine."""
MAX_GROWTH = 16
"""Beyond that, how many times its size a file may unpack to. Weights shrink by a tenth, or to a tenth where nearly all
are zero; a zip or gzip bomb grows a thousandfold."""

Stamp: TypeAlias = tuple[int, int, int, int]
"""Size, time of the last write, inode and device of a file: equal before and after means the same file, unchanged."""

SHARED_DESCRIPTOR = hasattr(os, "preadv")
"""Whether threads can share a descriptor, as each read has an offset of its own. Windows lacks such reads, and so do
builds of Python for an old macOS."""
_WINDOWS = os.name == "nt"


def _read_at(file: io.FileIO, buffer: memoryview, offset: int) -> int:
    """Read bytes from `offset` on into `buffer`; return how many. Python's lock is released meanwhile."""
    if SHARED_DESCRIPTOR:
        return os.preadv(file.fileno(), [buffer], offset)
    file.seek(offset)
    return file.readinto(buffer) or 0  # None stands for "nothing yet", which a regular file does not say


def _open(path: str, name: str) -> io.FileIO:
    """Open the regular file at `path`; raise UnreadableError, with its `name`, where it is something else."""
    # Asked before: to open a named pipe would wait for a writer, maybe for ever.
    _check_regular(os.stat(path), name)
    # An object, which has the descriptor from the first moment and closes it when nobody refers to it any more: Ctrl-C
    # may come at any time.
    return io.FileIO(path)


def _check_regular(status: os.stat_result, name: str) -> None:
    # A pipe or a device may never end, may wait for ever, and has no offsets.
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableError(Problem("not_regular", name, {"what": kind_of(status.st_mode)}))


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
        opened = _open(file, name) if isinstance(file, str) else io.FileIO(os.dup(file))
        try:
            _check_regular(os.fstat(opened.fileno()), name)  # it need not be the one of which this was asked before
            self._stamp = _settled_stamp(opened.fileno(), name)
        except BaseException:
            opened.close()
            raise
        self.size = max(0, self._stamp[0] - start)
        self._kept = True  # whether descriptors stay open between reads
        # Those that nobody reads by now. To pop one, and to append it again, is one step each for threads.
        self._opened = [opened]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on; UnreadableError where the file ends before."""
        done, at = 0, self._start + offset
        file, alone = self._take()
        try:
            while done < len(buffer):  # one call may give less than it was asked for
                got = _read_at(file, buffer[done : done + MAX_READ], at + done)
                if not got:  # the file was cut after it was opened
                    raise shorter(self.name, offset + len(buffer), offset + done)
                done += got
        except OSError as error:
            raise io_problem(self.name, error) from error
        finally:
            if alone:
                self._give_back(file)

    def check_unchanged(self) -> None:
        """Raise UnreadableError where size, time, inode or device differ from those at opening."""
        file, alone = self._take()
        try:
            self._check_stamp(file)
        finally:
            if alone:
                self._give_back(file)

    def _check_stamp(self, file: io.FileIO) -> None:
        if _stamp(os.fstat(file.fileno())) != self._stamp:
            raise UnreadableError(Problem("changed", self.name))

    def release(self) -> None:
        """Close the descriptor and open the file anew for each read; for checkpoints of very many shards."""
        self.close()

    def _take(self) -> tuple[io.FileIO, bool]:
        """Give the file to read by, and whether it is this read's alone until `_give_back`."""
        if self._kept:
            try:
                return (self._opened[0], False) if SHARED_DESCRIPTOR else (self._opened.pop(), True)
            except IndexError:  # all are in use
                pass
        return self._open_again(), True

    def _open_again(self) -> io.FileIO:
        """Open the file once more; raise UnreadableError where another one, or another content, lies there now."""
        try:
            file = _open(self.path, self.name)
        except OSError as error:
            raise io_problem(self.name, error) from error
        try:
            self._check_stamp(file)
        except UnreadableError:
            file.close()
            raise
        return file

    def _give_back(self, file: io.FileIO) -> None:
        """Keep an open file for the next read, or close it where none is kept by now."""
        self._opened.append(file)
        if not self._kept:
            self._close_opened()

    def close(self) -> None:
        """Close the descriptors, but for those that are read by; these are closed when the read ends."""
        self._kept = False
        self._close_opened()

    def _close_opened(self) -> None:
        while self._opened:
            with contextlib.suppress(IndexError):  # another thread took the last one
                self._opened.pop().close()


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
        # Twice, should Ctrl-C come before the first: the caller's file would stay at its end.
        try:
            try:
                self._end = file.seek(0, os.SEEK_END)
            finally:
                file.seek(self._start)
        finally:
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


def kind_of(mode: int) -> str:
    """Say what kind of thing has this mode: 'a named pipe'."""
    device = dict.fromkeys((stat.S_IFCHR, stat.S_IFBLK), "a device")
    kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder", **device}
    return kinds.get(stat.S_IFMT(mode), "no regular file")


_TEMPORARY = re.compile(r"\.smartload-([0-9a-f]{8})-[0-9a-f]{16}\.tmp")


def _host() -> str:
    """Give eight letters that stand for this computer, as the names of its temporary files have them."""
    name = os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "")
    return f"{zlib.crc32(name.encode()):08x}"


def temporary_name(to: Path) -> Path:
    """Give a new name for a file that is to take the place of `to`.

    In the same folder, so that it is on the same disk: there a file takes another's name in one step. Hidden, and of no
    suffix of weights: nobody takes it for a checkpoint while it is there.
    """
    return to.with_name(f".smartload-{_host()}-{secrets.token_hex(8)}.tmp")


def create_file(path: Path, mode: int) -> io.FileIO:
    """Create a file, and keep it from `remove_abandoned` as long as it is open.

    Args:
        path: its path, which `temporary_name` gave.
        mode: its mode, less the umask.

    Raises:
        OSError: it cannot be created.
    """
    while True:
        # "x" follows no link that somebody put there. A file object and no descriptor: it is closed with its last
        # reference, so that an interrupt between two lines leaves none open.
        file = io.FileIO(path, "x+", opener=lambda name, flags: os.open(name, flags, mode))
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a disk without locks: there `remove_abandoned` removes nothing
                fcntl.flock(file, fcntl.LOCK_EX)
        # Between the two another process may have locked it first, and removed it.
        if os.path.exists(path):
            return file


def remove_abandoned(folder: Path) -> None:
    """Remove the files of `create_file` in `folder` whose process has ended and left them: by `kill -9`, say."""
    with contextlib.suppress(OSError), os.scandir(folder) as items:
        for item in items:
            match = _TEMPORARY.fullmatch(item.name)
            if match and item.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError):  # somebody else's, or removed meanwhile
                    _remove_if_abandoned(item.path, match[1] == _host())


def _remove_if_abandoned(path: str, own: bool) -> None:
    """Remove the temporary file at `path` unless its process may live; `own` says that it would run on this host.

    Raises:
        OSError: it lives, or the file cannot be locked or removed.
    """
    if not own or fcntl is None:
        quiet = time.time() - os.stat(path).st_mtime
        if quiet < (CLOSED_FOR if own else FORGOTTEN_FOR):
            return
    if fcntl is None:
        os.unlink(path)  # PermissionError where a process has it open
        return
    with io.FileIO(path, "r+") as file:  # network drives lock only what may be written
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)


def write_all(file: io.FileIO, data: memoryview) -> None:
    """Write all of `data`: one call may take less than it was given."""
    done = 0
    while done < len(data):
        done += file.write(data[done : done + MAX_READ])


def replace_file(file: io.FileIO, to: Path) -> None:
    """Give a file of `create_file` the name `to` in one step, in place of a file that has this name.

    It gets the mode of that file, its extended attributes, and its owner where that is permitted.

    Raises:
        OSError: `to` is what it was. PermissionError on Windows: somebody has it open.
    """
    new = str(file.name)
    _keep_attributes(new, to)
    if _WINDOWS:  # where no file that is open gets another name
        file.close()
    _try_for_a_while(lambda: os.replace(new, to))
    # Or the folder may have the old file again after a power cut. Windows opens no folder, some disks sync none, and
    # the file is there in any case.
    folder: list[int] = []
    with contextlib.suppress(OSError):
        try:
            folder.append(os.open(to.parent, os.O_RDONLY))
            os.fsync(folder[0])
            os.close(folder.pop())
        finally:  # an interrupt may come before any of these lines
            if folder:
                os.close(folder.pop())


def _keep_attributes(new: str, to: Path) -> None:
    """Give the file `new` what a program that writes into the file `to`, if it is there, would leave as it is."""
    try:
        old = os.stat(to)
    except FileNotFoundError:
        return
    if hasattr(os, "chown"):
        for uid, gid in ((-1, old.st_gid), (old.st_uid, -1)):  # each by itself: a group of one's own is permitted
            with contextlib.suppress(OSError):
                os.chown(new, uid, gid)
    shutil.copystat(to, new)  # after the owner: a new owner takes bits of the mode away
    os.utime(new)  # not its time


def remove_file(path: Path) -> None:
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
