"""A disk on which upper and lower case are one, as on most of Windows and macOS; pretended where it is not so."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest

OF_THE_SYSTEM = ("stat", "lstat", "open", "listdir", "replace", "access", "unlink", "readlink")


def ignore_case(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the names below `folder` be found in any case, until the test ends."""
    (folder / "case").touch()
    already = (folder / "CASE").exists()
    (folder / "case").unlink()
    if already:
        return
    listdir = os.listdir

    def real_name(path: Any) -> Any:
        """Give the path as its names are written on the disk."""
        if not isinstance(path, (str, os.PathLike)) or not os.path.abspath(path).startswith(str(folder)):
            return path
        found = str(folder)
        for name in Path(os.path.abspath(path)).relative_to(folder).parts:
            try:
                names = listdir(found)
            except OSError:
                names = []
            found = os.path.join(found, next((n for n in names if n.casefold() == name.casefold()), name))
        return found

    for module, name in [(io, "FileIO"), *((os, name) for name in OF_THE_SYSTEM)]:
        real = getattr(module, name)

        def found_in_any_case(path: Any = ".", *args: Any, real: Any = real, **settings: Any) -> Any:
            return real(real_name(path), *map(real_name, args), **settings)

        monkeypatch.setattr(module, name, found_in_any_case)
