"""What one operating system has and another lacks: marks for tests of it, and questions that every system answers.

A mark asks whether the thing is there, never which system it is.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, NoReturn

import pytest
import torch

STATUS = Path("/proc/self/status")


def _makes_links() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            Path(folder, "target").touch()
            Path(folder, "link").symlink_to("target")
            return Path(folder, "link").is_file()
        except OSError:
            return False


def _keeps_attributes() -> bool:
    with tempfile.NamedTemporaryFile() as file:
        try:
            os.setxattr(file.name, "user.test", b"1")
        except (AttributeError, OSError):
            return False
        return True


needs_extended_attributes = pytest.mark.skipif(
    not _keeps_attributes(), reason="no extended attributes on this system, or on its disk of temporary files"
)
needs_links = pytest.mark.skipif(
    not _makes_links(), reason="Windows makes symbolic links only for administrators and in its developer mode"
)
needs_named_pipes = pytest.mark.skipif(
    not (hasattr(os, "mkfifo") and hasattr(os, "O_NONBLOCK")),
    reason="no named pipes in folders, as on Windows, or no way to open one without waiting",
)
needs_socket_files = pytest.mark.skipif(
    not hasattr(socket, "AF_UNIX"), reason="Python has no sockets in folders on Windows"
)
needs_terminals = pytest.mark.skipif(find_spec("termios") is None, reason="Python opens no terminal on Windows")
needs_file_size_limits = pytest.mark.skipif(
    find_spec("resource") is None, reason="Windows does not limit the size of the files that a process writes"
)
needs_timer_signals = pytest.mark.skipif(
    not hasattr(signal, "setitimer"), reason="Windows has no timers that send signals"
)
needs_memory_limits = pytest.mark.skipif(
    not STATUS.exists(), reason="only Linux lets a process bound its own memory, and says how much it takes"
)
needs_a_full_disk = pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="only Linux has /dev/full, which is always full"
)
needs_locks = pytest.mark.skipif(
    find_spec("fcntl") is None, reason="Windows locks no files by fcntl; there a file that is open cannot be removed"
)
needs_owners = pytest.mark.skipif(not hasattr(os, "chown"), reason="Windows has no numbers for owners of files")
needs_stopping = pytest.mark.skipif(
    not hasattr(signal, "SIGSTOP"), reason="Windows has no signal that stops a process and lets it go on"
)


def leave_group() -> NoReturn:
    """End this process, one of a process group, once all others have come as far.

    At once: gloo's threads abort a process now and then while Python ends, with all its work done.
    """
    torch.distributed.barrier()
    os._exit(0)


def open_descriptors() -> int:
    """How many descriptors this process has open, of the first thousand."""
    count = 0
    for number in range(1000):
        try:
            os.fstat(number)
        except OSError:
            continue
        count += 1
    return count


class _Counters(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS of Windows."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("page_faults", ctypes.c_uint32),
        ("peak_working_set", ctypes.c_size_t),
        ("others", ctypes.c_size_t * 7),
    )


def peak_memory() -> int:
    """The most memory that this process has had, in bytes; on Linux since the last `forget_peak`."""
    if STATUS.exists():
        # Not getrusage: there a process begins with the peak of the one that started it.
        return 1024 * int(STATUS.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0])
    if sys.platform != "win32":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
    kernel, counters = ctypes.WinDLL("kernel32", use_last_error=True), _Counters()
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    counters.size = ctypes.sizeof(counters)
    process = ctypes.c_void_p(kernel.GetCurrentProcess())
    if not kernel.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.size):
        raise ctypes.WinError(ctypes.get_last_error())
    return int(counters.peak_working_set)


def forget_peak() -> None:
    """Begin `peak_memory` anew, where the system can do that; elsewhere the peak of before counts, too."""
    if STATUS.exists():
        STATUS.with_name("clear_refs").write_text("5", encoding="utf-8")


def in_use(*_: object) -> NoReturn:
    """Raise what `os.replace` raises on Windows where somebody has one of the files open."""
    error = PermissionError(errno.EACCES, "Access is denied")
    error.winerror = 5  # type: ignore[attr-defined]
    raise error


def make_sparse(file: BinaryIO) -> None:
    """Let what is skipped in a new file take no room; Windows has to be told, and elsewhere it is so."""
    if sys.platform == "win32":
        import msvcrt

        handle = ctypes.c_void_p(msvcrt.get_osfhandle(file.fileno()))
        told = ctypes.c_uint32()
        set_sparse = 0x900C4
        kernel = ctypes.WinDLL("kernel32", use_last_error=True)
        if not kernel.DeviceIoControl(handle, set_sparse, None, 0, None, 0, ctypes.byref(told), None):
            raise ctypes.WinError(ctypes.get_last_error())


def loopback() -> str:
    """The name of the network interface of this computer alone, for gloo: not every host's own name has an address."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "")
