"""What a call took, it gives back: the model, its tensors and the file's are gone as soon as nobody else has them."""

from __future__ import annotations

import gc
import io
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from smartload import check, convert, inspect, smart_load, unwrap
from smartload.conversion import write as writing

HERE = Path(__file__).parent
Model = Callable[[], nn.Module]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 2)))


def large() -> nn.Module:
    """So large that several threads read it."""
    return nn.Sequential(nn.Linear(1500, 1500), nn.Linear(1500, 1500))


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return net()


def refusing() -> nn.Module:
    made = net()

    def refuse(module: nn.Module, keys: object) -> None:
        raise ValueError("no")

    made.register_load_state_dict_post_hook(refuse)
    return made


class WithExtraState(nn.Linear):
    def get_extra_state(self) -> dict[str, torch.Tensor]:
        return {"a": torch.ones(2)}

    def set_extra_state(self, state: dict[str, torch.Tensor]) -> None:
        self.got = state["a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    state = net().state_dict()
    torch.save({f"module.{key}": value for key, value in state.items()}, folder / "w.pth")
    torch.save({"model": net(), "epoch": 3}, folder / "whole.pth")
    torch.save(state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save(nn.Linear(2, 2).state_dict(), folder / "other.pth")
    torch.save({**state, "0.weight": torch.full((4, 3), 1e300, dtype=torch.float64)}, folder / "cast.pth")
    torch.save(large().state_dict(), folder / "large.pth")
    torch.save(WithExtraState(3, 4).state_dict(), folder / "extra.pth")
    (folder / "cut.pth").write_bytes((folder / "w.pth").read_bytes()[:-200])
    return folder


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Failing(io.BytesIO):
    """A file object whose large reads fail."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > 100_000:
            raise OSError(5, "broken")
        return super().read(size)


class Stop(Exception):
    pass


def stopping(done: int, total: int) -> None:
    raise Stop


def interrupting(done: int, total: int) -> None:
    raise KeyboardInterrupt


def interrupted_writing(model: nn.Module, folder: Path) -> None:
    def interrupt(*given: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(writing, "write_all", interrupt)
        convert(model.state_dict(), folder / "out.pth")


Call = Callable[[nn.Module, Path], object]
SUCCEEDS: dict[str, tuple[Model, Call]] = {
    "smart_load": (net, lambda model, folder: smart_load(model, folder / "w.pth")),
    "its report": (net, lambda model, folder: str(smart_load(model, folder / "w.pth"))),
    "whole": (net, lambda model, folder: smart_load(model, folder / "whole.pth")),
    "legacy": (net, lambda model, folder: smart_load(model, folder / "legacy.pth")),
    "memory": (net, lambda model, folder: smart_load(model, net().state_dict())),
    "meta": (on_meta, lambda model, folder: smart_load(model, folder / "w.pth")),
    "assign": (net, lambda model, folder: smart_load(model, folder / "w.pth", assign=True)),
    "half": (lambda: net().half(), lambda model, folder: smart_load(model, folder / "w.pth")),
    "DataParallel": (lambda: nn.DataParallel(net()), lambda model, folder: smart_load(model, folder / "w.pth")),
    "extra state": (lambda: WithExtraState(3, 4), lambda model, folder: smart_load(model, folder / "extra.pth")),
    "optimizer": (
        net,
        lambda model, folder: smart_load(model, folder / "w.pth", optimizer=torch.optim.SGD(model.parameters())),
    ),
    "large": (large, lambda model, folder: smart_load(model, folder / "large.pth")),
    "verify": (large, lambda model, folder: smart_load(model, folder / "large.pth", verify=True)),
    "check": (net, lambda model, folder: check(model, folder / "w.pth")),
    "inspect": (net, lambda model, folder: str(inspect(folder / "whole.pth"))),
    "convert": (net, lambda model, folder: convert(folder / "w.pth", folder / "out.safetensors")),
    "unwrap": (lambda: nn.DataParallel(net()), lambda model, folder: unwrap(model)),
}
RAISES: dict[str, tuple[Model, Call]] = {
    "mismatch": (net, lambda model, folder: smart_load(model, folder / "other.pth")),
    "mismatch in check": (net, lambda model, folder: check(model, folder / "other.pth")),
    "two parts": (net, lambda model, folder: smart_load(model, {"a": net().state_dict(), "b": net().state_dict()})),
    "cast": (net, lambda model, folder: smart_load(model, folder / "cast.pth")),
    "truncated": (net, lambda model, folder: smart_load(model, folder / "cut.pth")),
    "absent": (net, lambda model, folder: smart_load(model, folder / "no.pth")),
    "device": (net, lambda model, folder: smart_load(model, folder / "w.pth", "cuda:99")),
    "no path": (net, lambda model, folder: smart_load(model, 3)),  # type: ignore[arg-type]
    "hook": (refusing, lambda model, folder: smart_load(model, folder / "w.pth")),
    "read": (large, lambda model, folder: smart_load(model, Failing((folder / "large.pth").read_bytes()))),
    "read, no copy": (
        large,
        lambda model, folder: smart_load(model, Failing((folder / "large.pth").read_bytes()), undo=False),
    ),
    "progress": (large, lambda model, folder: smart_load(model, folder / "large.pth", progress=stopping)),
    "Ctrl-C": (large, lambda model, folder: smart_load(model, folder / "large.pth", progress=interrupting)),
    "convert": (net, lambda model, folder: convert(folder / "w.pth", folder / "no" / "out.pth")),
    "convert, Ctrl-C": (net, lambda model, folder: interrupted_writing(model, folder)),
}


def left_of(make: Model, call: Call, folder: Path) -> tuple[int, list[str], str]:
    """Call; give how many modules and tensors of the model live on, what only the collector frees, what was raised."""
    model, raised = make(), ""
    references: list[weakref.ref[Any]] = [weakref.ref(module) for module in model.modules()]
    references += [weakref.ref(tensor) for tensor in (*model.parameters(), *model.buffers())]
    gc.collect()
    try:
        call(model, folder)
    except BaseException as failure:
        raised = type(failure).__name__
    del model
    living = sum(reference() is not None for reference in references)
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    gc.set_debug(0)
    garbage = [type(item).__name__ for item in gc.garbage]
    held = [name for name, item in zip(garbage, gc.garbage) if isinstance(item, (torch.Tensor, nn.Module))]
    gc.garbage.clear()
    assert not held
    return living, garbage, raised


@pytest.mark.parametrize("name", SUCCEEDS)
def test_nothing_is_left_of_a_call(name: str, folder: Path, no_collector: None) -> None:
    make, call = SUCCEEDS[name]
    call(make(), folder)  # what is imported and cached now stays
    assert left_of(make, call, folder) == (0, [], "")


@pytest.mark.parametrize("name", RAISES)
def test_no_model_is_left_of_a_refusal(name: str, folder: Path, no_collector: None) -> None:
    make, call = RAISES[name]
    left_of(make, call, folder)
    living, garbage, raised = left_of(make, call, folder)
    assert living == 0
    assert raised
    # Where a hook raises, torch's load_state_dict leaves a function that refers to itself; torch.save leaves a class.
    assert garbage == [] or name in ("hook", "convert, Ctrl-C")


def test_a_thread_beside_finds_the_collector_at_work(folder: Path) -> None:
    seen, done = set[bool](), threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.add(gc.isenabled())

    thread = threading.Thread(target=watch)
    thread.start()
    for _ in range(20):
        smart_load(net(), folder / "w.pth")
    done.set()
    thread.join()
    assert seen == {True}


def test_the_memory_of_a_process_does_not_grow(folder: Path) -> None:
    """200 loads of 18 MiB each, the collector off: 3.5 GiB, if every model stayed."""
    script = (
        "import gc, sys; gc.disable()\n"
        f"sys.path[:0] = {[str(HERE), str(HERE.parent / 'helpers')]}\n"
        "from test_memory import large; from systems import peak_memory; from pathlib import Path\n"
        "from smartload import check, smart_load\n"
        f"path = Path({str(folder)!r}) / 'large.pth'\n"
        "for i in range(200):\n"
        "    model = large(); check(model, path); smart_load(model, path); del model\n"
        "    if i == 20: before = peak_memory()\n"
        "print(peak_memory() - before)"
    )
    grown = subprocess.check_output([sys.executable, "-c", script], encoding="utf-8")
    assert int(grown) < 40 << 20
