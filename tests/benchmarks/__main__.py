"""How fast, and in how much memory: `python tests/benchmarks [WORKLOAD ...]`, smartload beside its peers in one run.

Every figure comes from fresh processes, the contenders in turn, round after round; seconds are medians. What was loaded
is compared with what was written, bit for bit.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from pathlib import Path

import torch
from ways import NEEDS
from workloads import WORKLOADS, Bench


def main() -> None:
    """Measure, and print each line as soon as it is known."""
    listed = "\n".join(f"  {name:10} {work.__doc__}" for name, work in WORKLOADS.items())
    parser = argparse.ArgumentParser("benchmarks", description=__doc__, epilog=f"workloads:\n{listed}")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("workloads", nargs="*", choices=[*WORKLOADS, []], metavar="WORKLOAD", help="default: all")
    parser.add_argument("--full", action="store_true", help="the sizes of the documentation: 20 GiB of disk, an hour")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where checkpoints are kept; default: a temporary folder")
    given = parser.parse_args()
    absent = [name for name, package in NEEDS.items() if importlib.util.find_spec(package) is None]
    if absent:
        print(f'not installed and left out: {", ".join(absent)}; pip install -e ".[bench]" has them')
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {given.rounds} rounds")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(given.folder or Path(folder), given.rounds, given.full)
        for name in given.workloads or WORKLOADS:
            print(f"\n{name}: {WORKLOADS[name].__doc__}")
            for row in WORKLOADS[name](bench):
                print(
                    f"{row.what:44}{''.join(f'{cell:>14}' for cell in row.cells)}  {row.verdict}".rstrip(), flush=True
                )


if __name__ == "__main__":
    main()
