"""A plugin of pytest that takes names out of `os`, so that the tests run as on a system that lacks them.

    PYTHONPATH=src:tests/platforms python -m pytest -p without
    SMARTLOAD_OS_LACKS="preadv" PYTHONPATH=src:tests/platforms python -m pytest -p without tests/reading

pytest imports a plugin of `-p` before anything else, and so before smartload, which looks once at what there is.
SMARTLOAD_OS_LACKS has the names, with spaces between; unless told, they are those that Windows lacks.
"""

from __future__ import annotations

import os

WINDOWS = "preadv pread O_NONBLOCK O_CLOEXEC posix_fadvise"

for name in os.environ.get("SMARTLOAD_OS_LACKS", WINDOWS).split():
    if hasattr(os, name):
        delattr(os, name)
