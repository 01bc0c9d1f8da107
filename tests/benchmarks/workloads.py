"""What is measured, and the goal of each."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import WRITERS, warm
from ways import NEEDS

MIB = 1 << 20
ALLOWED = 0.02, 64 * MIB
"""Anonymous memory that a load may take beside the model's own: a part of the checkpoint, and bytes."""


@dataclass(frozen=True)
class Row:
    """One line of a table: what did it, what it took, and the verdict where there is a goal."""

    what: str
    cells: tuple[str, ...] = ()
    verdict: str = ""


@dataclass(frozen=True)
class Bench:
    """One run of the benchmarks: where files lie, how often, and how large."""

    folder: Path
    rounds: int
    full: bool

    def child(self, task: str, **job: Any) -> dict[str, Any]:
        """What a fresh process measured."""
        command = [sys.executable, str(Path(__file__).with_name("measure.py")), json.dumps({"task": task, **job})]
        # Compiled modules are kept, as they are where a package is installed.
        env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        env["PYTHONPYCACHEPREFIX"] = str(self.folder)
        done = subprocess.run(command, capture_output=True, encoding="utf-8", env=env)
        if done.returncode:
            raise SystemExit(f"{task} {job}\n{done.stderr[-3000:]}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        if not found.get("right", True):
            raise SystemExit(f"{task} {job}: the values are not those that were written")
        return found

    def file(self, form: str, *model: Any) -> str:
        """The checkpoint of a model in a format; written once."""
        folder = self.folder / "-".join(map(str, (*model, form)))
        known = folder.with_suffix(".path")
        if not known.exists():  # it is written last
            shutil.rmtree(folder, ignore_errors=True)
            known.write_text(
                self.child("written", model=model, form=form, folder=str(folder))["path"], encoding="utf-8"
            )
        return known.read_text(encoding="utf-8")

    def seconds(self, ways: Sequence[str], cold: bool = False, **job: Any) -> dict[str, float]:
        """Medians, the ways in turn."""
        took: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(self.rounds):
            for way in ways:
                warm(Path(job["path"]), cold)
                took[way].append(self.child("loaded", way=way, **job)["seconds"])
        return {way: statistics.median(values) for way, values in took.items()}

    def compared(
        self, title: str, ways: Sequence[str], goal: Callable[[float, float], str], cold: bool = False, **job: Any
    ) -> Iterator[Row]:
        """A table: seconds, ratios to the floor and to the best peer, memory. The goal judges the two ratios."""
        ways = [way for way in ways if way not in NEEDS or importlib.util.find_spec(NEEDS[way])]
        nbytes = warm(Path(job["path"]))
        seconds = self.seconds(ways, cold, **job)
        best = min(took for way, took in seconds.items() if way not in ("floor", "smartload"))
        yield Row(f"{title}, {nbytes / MIB:,.0f} MiB", ("s", "x floor", "x best peer", "added MiB"))
        for way, took in seconds.items():
            added = self.child("loaded", way=way, memory=True, **job)["added"]
            ratios = took / seconds.get("floor", best), took / best
            cells = f"{took:.3f}", f"{ratios[0]:.2f}", f"{ratios[1]:.2f}", f"{added / MIB:,.0f}"
            yield Row(f"  {way}", cells, goal(*ratios) if way == "smartload" else "")


def verdict(good: bool, goal: str) -> str:
    """In words."""
    return f"{'PASS' if good else 'MISS'} ({goal})"


PEERS = "torch.load", "torch.load(mmap)", "huggingface_hub", "accelerate"
SAFE_PEERS = "safetensors", "huggingface_hub", "accelerate"


def _near_floor(floor: float, best: float) -> str:
    return verdict(floor <= 1.35 and best <= 1.05, "1.35 x floor, 1.05 x best peer")


def dense(bench: Bench) -> Iterator[Row]:
    """A large transformer into a model that is there, from the page cache."""
    sizes = (1536, 4096) if bench.full else (512,)
    for mib in sizes:
        for dtype in ("float32", "bfloat16"):
            model = "dense", mib, dtype
            reference = bench.file("zip", *model)
            for form, peers in (("zip", PEERS), ("safetensors", SAFE_PEERS), ("shards", SAFE_PEERS[1:])):
                path = bench.file(form, *model)
                ways = "floor", "smartload", *peers
                yield from bench.compared(
                    f"{dtype}, {form}", ways, _near_floor, model=model, path=path, reference=reference
                )


def adapted(bench: Bench) -> Iterator[Row]:
    """The same with a wrapper's prefix, a container and another machine's device; and from another float width."""
    model = "dense", 1536 if bench.full else 512, "float32"
    reference = bench.file("zip", *model)
    jobs = {"nothing to adapt": reference, "everything to adapt": bench.file("adapted", *model)}
    halves = {name: list[float]() for name in jobs}
    for _ in range(3 * bench.rounds):
        for name, path in jobs.items():
            warm(Path(path))
            job = {"way": "smartload", "model": model, "path": path, "reference": reference}
            halves[name].append(bench.child("loaded", **job)["seconds"])
    took = {name: statistics.median(values) for name, values in halves.items()}
    yield Row("prefix, container, cuda:1", ("s", "x"))
    ratio = took["everything to adapt"] / took["nothing to adapt"]
    yield Row("  nothing to adapt", (f"{took['nothing to adapt']:.3f}", "1.00"))
    yield Row(
        "  everything to adapt",
        (f"{took['everything to adapt']:.3f}", f"{ratio:.2f}"),
        verdict(ratio <= 1.05, "1.05 x"),
    )
    half = bench.file("zip", "dense", model[1] // 2, "bfloat16")
    yield from bench.compared(
        "bfloat16 into float32", ("smartload", *PEERS[:2]), lambda *_: "", model=model, path=half, reference=half
    )


def meta(bench: Bench) -> Iterator[Row]:
    """Into a model on meta, which gets memory of its own."""
    model = "dense", 1536 if bench.full else 512, "float32"
    path = bench.file("zip", *model)
    ways = "floor", "smartload", "torch.load, assign", "to_empty, torch.load(mmap)"
    yield from bench.compared(
        "meta model, zip",
        ways,
        lambda floor, best: verdict(best <= 1.0, "not slower than the best peer"),
        model=model,
        path=path,
        reference=path,
        built={"meta": True},
    )


def systems(bench: Bench) -> Iterator[Row]:
    """smartload where the system has no `preadv`, as Windows, beside where it has."""
    model = "dense", 1536 if bench.full else 512, "float32"
    ways = "smartload", "without preadv"
    for form in ("zip", "safetensors", "shards"):
        job = {"model": model, "path": bench.file(form, *model), "reference": bench.file("zip", *model)}
        nbytes = warm(Path(job["path"]))
        took = bench.seconds(ways, **job)
        added = {way: bench.child("loaded", way=way, memory=True, **job)["added"] for way in ways}
        part, more = ALLOWED
        good = took["without preadv"] <= 1.3 * took["smartload"] and max(added.values()) <= part * nbytes + more
        yield Row(f"{form}, {nbytes / MIB:,.0f} MiB", ("s", "x", "added MiB"))
        for way in ways:
            cells = f"{took[way]:.3f}", f"{took[way] / took['smartload']:.2f}", f"{added[way] / MIB:,.1f}"
            yield Row(f"  {way}", cells, verdict(good, "1.3 x, 2 % + 64 MiB") if way != "smartload" else "")


def memory(bench: Bench) -> Iterator[Row]:
    """Anonymous memory beyond the model's own, format by format."""
    model = "dense", 512, "float32"
    reference = bench.file("zip", *model)
    yield Row("512 MiB", ("added MiB",))
    for form in (*WRITERS, "torch legacy", "distributed checkpoint", "torchscript", "npz"):
        path = bench.file(form, *model)
        nbytes = warm(Path(path))
        added = bench.child("loaded", way="smartload", model=model, path=path, reference=reference, memory=True)[
            "added"
        ]
        part, more = ALLOWED
        yield Row(f"  {form}", (f"{added / MIB:,.1f}",), verdict(added <= part * nbytes + more, "2 % + 64 MiB"))


def many(bench: Bench) -> Iterator[Row]:
    """Many small tensors: experts in nested lists."""
    per_key: dict[tuple[str, int], float] = {}
    for keys in (10_000, 100_000) if bench.full else (1_000, 10_000):
        model = "many", keys
        reference = bench.file("zip", *model)
        for form, peers in (("zip", PEERS[:2]), ("safetensors", SAFE_PEERS[:1])):
            job = {"model": model, "path": bench.file(form, *model), "reference": reference}
            took = bench.seconds(("smartload", *peers), **job)
            plain = took.get("torch.load") or bench.seconds(("torch.load",), **{**job, "path": reference})["torch.load"]
            yield Row(f"{keys:,} tensors, {form}", ("s", "us a key", "x plain torch"))
            per_key[form, keys] = took["smartload"] / keys
            for way, seconds in {"torch.load, zip": plain, **took}.items():
                ratio = plain / seconds
                judged = verdict(ratio >= 5, "5 x") if way == "smartload" else ""
                yield Row(f"  {way}", (f"{seconds:.2f}", f"{seconds / keys * 1e6:.0f}", f"{ratio:.1f}"), judged)
    for form in ("zip", "safetensors"):
        small, large = (value for (which, _), value in sorted(per_key.items()) if which == form)
        yield Row(
            f"  time a key, {form}: ten times as many",
            (f"{large / small:.2f}",),
            verdict(large <= 1.5 * small, "1.5 x"),
        )


def wide(bench: Bench) -> Iterator[Row]:
    """One list with 12,000 children: torch's own load looks at all keys for each."""
    model = "wide", 12_000 if bench.full else 3_000
    path = bench.file("zip", *model)
    yield Row(f"{model[1]:,} children", ("smartload s", "plain torch s", "x"))
    for what, task in (("a state dict in memory", "in memory"), ("from a file", "loaded")):
        job = {"model": model, "path": path, "reference": path}
        ours, plain = (bench.child(task, way=way, **job)["seconds"] for way in ("smartload", "torch.load"))
        yield Row(
            f"  {what}", (f"{ours:.2f}", f"{plain:.2f}", f"{plain / ours:.0f}"), verdict(plain >= 50 * ours, "50 x")
        )


def planning(bench: Bench) -> Iterator[Row]:
    """Matching names, without reading: processor time for each key."""
    sizes = (1_000, 10_000, 100_000, 1_000_000) if bench.full else (1_000, 10_000)
    cases: Mapping[str, tuple[str, str]] = {
        "equal names": ("", ""),
        "'module.' removed": ("module.", ""),
        "'model.' removed": ("model.", ""),
        "'backbone.' added": ("", "backbone"),
    }
    yield Row("us a key", tuple(f"{size:,}" for size in sizes))
    for name, (prefix, added) in cases.items():
        found = []
        for size in sizes:
            runs = [bench.child("planned", keys=size, prefix=prefix, added=added) for _ in range(bench.rounds)]
            found.append(statistics.median(run["seconds"] / run["keys"] * 1e6 for run in runs))
        yield Row(f"  {name}", tuple(f"{each:.1f}" for each in found), verdict(max(found) < 10, "10 us"))


def imports(bench: Bench) -> Iterator[Row]:
    """What `import smartload` takes beyond `import torch`."""
    took = statistics.median(bench.child("imported")["seconds"] for _ in range(2 * bench.rounds))
    yield Row("import smartload", (f"{took * 1000:.0f} ms",), verdict(took < 0.04, "40 ms"))


def cold(bench: Bench) -> Iterator[Row]:
    """From the disk: the page cache does not have the file."""
    model = "dense", 1536 if bench.full else 512, "float32"
    reference = bench.file("zip", *model)
    for form, peers in (("zip", PEERS[:2]), ("safetensors", SAFE_PEERS[:1])):
        yield from bench.compared(
            f"cold, {form}",
            ("floor", "smartload", *peers),
            lambda floor, best: verdict(best <= 1.05, "1.05 x best peer"),
            cold=True,
            model=model,
            path=bench.file(form, *model),
            reference=reference,
        )


def lowmemory(bench: Bench) -> Iterator[Row]:
    """512 MiB of memory are left beside the model."""
    model = "dense", 4096 if bench.full else 1024, "float32"
    path = bench.file("zip", *model)
    took = bench.child("loaded", way="smartload", model=model, path=path, reference=path, free=512 * MIB)["seconds"]
    yield Row(f"{model[1]:,} MiB with 512 MiB left", (f"{took:.2f} s",), verdict(True, "loads"))


WORKLOADS: Mapping[str, Callable[[Bench], Iterator[Row]]] = {
    each.__name__: each
    for each in (dense, adapted, meta, systems, memory, many, wide, planning, imports, cold, lowmemory)
}
