"""Take from `os` what other systems lack: Python imports this file at its start where the folder is on PYTHONPATH.

PYTHONPATH=tests/platforms/without python -m pytest
"""

import os

# Windows has none of them, macOS no posix_fadvise, and builds of Python for an old macOS no preadv.
for _name in ("preadv", "pread", "O_NONBLOCK", "O_CLOEXEC", "posix_fadvise", "mkfifo"):
    if hasattr(os, _name):
        delattr(os, _name)
