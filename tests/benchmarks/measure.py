"""One way, one file, one fresh process: seconds, anonymous memory above the model's own, and whether all is there."""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from models import build, filled, write
from torch import nn
from ways import WAYS


def anonymous(field: str = "RssAnon") -> int:
    """Bytes of anonymous memory of this process now."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))


class Peak:
    """The most anonymous memory while it lasts, beyond what was there before."""

    def __enter__(self) -> Peak:
        self.before = self.most = anonymous()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.stopped.wait(0.001):
            self.most = max(self.most, anonymous())

    def __exit__(self, *_: object) -> None:
        self.most = max(self.most, anonymous())
        self.stopped.set()
        self.thread.join()


def right(model: nn.Module, reference: str) -> bool:
    """Whether every tensor of the model is what was written."""
    expected = torch.load(reference, mmap=True)
    state = model.state_dict()
    return expected.keys() == state.keys() and all(
        torch.equal(state[key], value.to(state[key].dtype)) for key, value in expected.items()
    )


def loaded(job: dict[str, Any]) -> dict[str, Any]:
    """Load once, and tell."""
    model = build(*job["model"], **job.get("built", {}))
    load = WAYS[job["way"]](model, job["path"])
    free = resource.getrlimit(resource.RLIMIT_DATA)
    if "free" in job:
        resource.setrlimit(resource.RLIMIT_DATA, (anonymous("VmData") + job["free"], free[1]))
    if job.get("memory"):
        own = sum(t.nbytes for t in model.state_dict().values() if t.is_meta)
        with Peak() as peak:
            load()
        return {"added": peak.most - peak.before - own, "right": right(model, job["reference"])}
    started = time.perf_counter()
    load()
    seconds = time.perf_counter() - started
    resource.setrlimit(resource.RLIMIT_DATA, free)
    return {"seconds": seconds, "right": right(model, job["reference"])}


def written(job: dict[str, Any]) -> dict[str, Any]:
    """Write the checkpoint of a model."""
    return {"path": str(write(filled(build(*job["model"])), Path(job["folder"]), job["form"]))}


def planned(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the processor to match a file's names with a model's."""
    from smartload.formats import open_checkpoint
    from smartload.load.data_checks import DataChecker
    from smartload.place.survey import survey
    from smartload.records.requests import Options

    model: nn.Module = build("many", job["keys"], meta=True)
    value = torch.empty(8, 8)
    state = {job["prefix"] + key: value.view(8, 8) for key in model.state_dict()}
    if job["added"]:
        model = nn.ModuleDict({job["added"]: model})
    with open_checkpoint(state) as checkpoint:
        checks = DataChecker(survey(model), checkpoint)
        started = time.process_time()
        checks.match(Options())
        return {"seconds": time.process_time() - started, "keys": len(state)}


def imported(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the processor that `import smartload` adds to `import torch`."""
    started = time.process_time()
    import smartload  # noqa: F401

    return {"seconds": time.process_time() - started}


def in_memory(job: dict[str, Any]) -> dict[str, Any]:
    """A state dict that is in memory already: nothing but the strict load."""
    from smartload import smart_load

    model, state = build(*job["model"]), build(*job["model"]).state_dict()
    started = time.perf_counter()
    if job["way"] == "smartload":
        smart_load(model, state)
    else:
        model.load_state_dict(state)
    return {"seconds": time.perf_counter() - started, "right": True}


if __name__ == "__main__":
    tasks = {"written": written, "loaded": loaded, "planned": planned, "imported": imported, "in memory": in_memory}
    job = json.loads(sys.argv[1])
    print(json.dumps(tasks[job["task"]](job)))
