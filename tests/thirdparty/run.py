"""Run the pages of docs that need other people's packages: python tests/thirdparty/run.py [arguments for pytest]

The packages go into a folder of their own, .thirdparty, so that the tests proper stay small and quick to set up.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ROOT / ".thirdparty"


def install() -> None:
    """Fill the folder, once."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(PACKAGES)]
    subprocess.run([*pip, "transformers==5.23.0", "scipy"], check=True)
    # Without its dependencies, torch and torchaudio: the first is here, and the second, which pesto needs to read sound
    # files only, is built for CUDA on Linux. An empty module stands in for it.
    subprocess.run([*pip, "--no-deps", "pesto-pitch==2.0.1"], check=True)
    (PACKAGES / "torchaudio.py").touch()


def main() -> int:
    """Install what is missing, and run the pages."""
    if not (PACKAGES / "torchaudio.py").exists():
        install()
    test = [sys.executable, "-m", "pytest", "tests/project/test_docs.py", "-k", "networks.md", *sys.argv[1:]]
    return subprocess.run(test, env=os.environ | {"PYTHONPATH": str(PACKAGES)}, cwd=ROOT).returncode


if __name__ == "__main__":
    raise SystemExit(main())
