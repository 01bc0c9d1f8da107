"""All or nothing at every line: an exception is raised at each line of a load, and at a second one in its undo."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import os
import random
import signal
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from interrupting import PURE, Interrupter
from placing import look
from systems import needs_timer_signals, open_descriptors
from torch import nn

import smartload.formats
import smartload.load.strict
from smartload import UnreadableError, smart_load
from smartload.reading.files import FileReader

# What closes a file that an interrupt has left behind is Python, and it warns of that.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

KINDS = (KeyboardInterrupt, MemoryError, RecursionError)
"""Taken in turn from line to line. With SMARTLOAD_ALL=1 in the environment all of them are raised, at each line of all
of smartload, each time that it is run: that takes an hour."""
ALL = bool(os.environ.get("SMARTLOAD_ALL"))
WITHOUT = () if ALL else PURE


AT_WORK: list[int] = []
"""One item for each other thread that is reading into the model."""


class Net(nn.Sequential):
    """Layers of a few kinds; one of them tied."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(4, 3, bias=False))
        self[2].weight = self[0].weight
        self.register_buffer("order", torch.arange(3) + seed)


class WithExtraState(Net):
    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.steps = [seed]

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": self.steps[0]}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.steps[0] = state["steps"]
        self.newly = True


def hooked(seed: int) -> nn.Module:
    """Its hooks see real values before the load, and change objects after it."""
    net = Net(seed)

    def before(module: nn.Module, state: Any, *_: object) -> None:
        state["order"] = state["order"] + 1

    def after(module: nn.Module, keys: object) -> None:
        module.was_loaded = True  # type: ignore[assignment]
        module[2] = nn.Linear(4, 3, bias=False)  # type: ignore[operator]

    net.register_load_state_dict_pre_hook(before)
    net.register_load_state_dict_post_hook(after)
    return net


def on_meta(seed: int) -> nn.Module:
    with torch.device("meta"):
        return Net(seed)


def trained(net: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


class Road(NamedTuple):
    """A way through the code: the model, and the arguments of the call.

    Attributes:
        make: makes the model.
        given: the other arguments of `smart_load`; "optimizer" is made for each model.
        form: what is given for the path: a file, a file object, or a dict in memory.
        needs: the fixtures that it needs.
    """

    make: Callable[[int], nn.Module] = Net
    given: Mapping[str, Any] = MappingProxyType({})
    form: str = "file"
    needs: Sequence[str] = ()


ROADS = {
    "values": Road(),
    "threads": Road(needs=["threaded"]),
    "file object": Road(form="object"),
    "hooks": Road(hooked),
    "many modules": Road(needs=["by_module"]),
    "assign": Road(given={"assign": True}),
    "assign in memory": Road(given={"assign": True}, form="memory"),
    "extra state": Road(WithExtraState),
    "meta": Road(on_meta),
    "cast": Road(lambda seed: Net(seed).half()),
    "DataParallel": Road(lambda seed: nn.DataParallel(Net(seed)), needs=["cuda2"]),
    "optimizers that follow": Road(given={"optimizer": None, "device": "cuda:1"}, needs=["cuda2"]),
    "memory": Road(form="memory"),
    "rehearsal": Road(form="without counter"),
    "swap": Road(lambda seed: Net(seed).double(), needs=["swapping"]),
    "undo=False": Road(given={"undo": False}),
    "verify": Road(given={"verify": True}),
    "no other thread": Road(needs=["alone"]),
}


@pytest.fixture
def by_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smartload.load.strict, "MAX_FILTER_STEPS", -1)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smartload.formats, "_is_only_thread", lambda: True)


@pytest.fixture
def threaded(reading: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads read as well, and so slowly that they are at work when this one is interrupted."""
    reading(piece=16, count=3, together=False)
    real, main = FileReader.read_into, threading.current_thread()

    def slow(self: FileReader, offset: int, buffer: memoryview) -> None:
        if threading.current_thread() is main:
            real(self, offset, buffer)
        else:
            AT_WORK.append(1)
            time.sleep(0.002)
            real(self, offset, buffer)
            AT_WORK.pop()

    monkeypatch.setattr(FileReader, "read_into", slow)


@pytest.fixture
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


class World:
    """A model, and all around it that a load that failed must leave as it was."""

    def __init__(self, road: Road, state: dict[str, Any], path: Path) -> None:
        self.model = road.make(1)
        self.given, self.optimizers = dict(road.given), []
        if "optimizer" in road.given:
            self.optimizers = [trained(self.model)]
            self.given["optimizer"] = self.optimizers
        self.path: Any = {"file": path, "without counter": path.with_suffix(".old"), "memory": state}.get(road.form)
        if road.form == "object":
            self.path = io.BytesIO(b"before" + path.read_bytes())
            self.path.seek(6)
        self.state, self.in_state = state, {key: (id(value), value.requires_grad) for key, value in state.items()}
        self.before, self.around = self.look(), self.look_around()

    def load(self) -> None:
        smart_load(self.model, self.path, **self.given)

    def look(self) -> list[object]:
        seen = look(self.model, self.optimizers)
        for module in self.model.modules():
            seen.append([(name, id(value)) for name, value in vars(module).items()])
            for group in (module._parameters, module._buffers, module._modules):
                seen.append([(name, id(value)) for name, value in group.items()])
            seen.append(copy.copy(getattr(module, "steps", None)))
        return seen

    def look_around(self) -> list[object]:
        position = self.path.tell() if isinstance(self.path, io.BytesIO) else 0
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), gc.isenabled(), list(warnings.filters)
        held = {key: (id(value), value.requires_grad) for key, value in self.state.items()} == self.in_state
        until = time.monotonic() + 5
        while helpers() and time.monotonic() < until:
            time.sleep(0.001)  # an interrupt while a thread starts: it finds nothing to do, and ends
        return [position, held, *modes, open_descriptors(), helpers()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    state = Net(2).state_dict()
    torch.save(state, tmp_path / "w.pt")
    state["1.weight"] = state.pop("1.weight").double()  # torch before 0.4.1 had no counter, and wrote no versions
    del state["1.num_batches_tracked"], state._metadata
    torch.save(state, tmp_path / "w.old")
    for name in ("w.pt", "w.old"):
        os.utime(tmp_path / name, (1, 1))
    return tmp_path / "w.pt"


def helpers() -> int:
    """How many threads of a load there are."""
    return sum(thread.is_alive() and thread.name.endswith("(_work)") for thread in threading.enumerate())


def same_tensors(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models hold the same values, beside extra states."""
    pairs = zip(*([*model.parameters(), *model.buffers()] for model in (one, other)), strict=True)
    return all(a.is_meta is b.is_meta and (a.is_meta or torch.equal(a, b)) for a, b in pairs)


def without_values(seen: Sequence[Any]) -> list[object]:
    """What `look` has seen of each tensor, but for its bits."""
    return [(*item[:5], *item[6:]) if isinstance(item, tuple) and len(item) == 7 else item for item in seen]


class Case(NamedTuple):
    """One road, ready to be taken again and again."""

    name: str
    road: Road
    path: Path

    def world(self) -> World:
        state = self.road.make(2).state_dict() if self.road.form == "memory" else {}
        if self.path.with_suffix(".extra").exists():
            return World(self.road, state, self.path.with_suffix(".extra"))
        return World(self.road, state, self.path)

    def interrupted(self, at: Sequence[int], kind: type[BaseException]) -> Interrupter:
        """Load, interrupted at these lines; check that the load was whole, or that nothing has changed."""
        world, interrupter = self.world(), Interrupter(at, kind, WITHOUT)
        failure, at_work = interrupter.run(world.load), len(AT_WORK)
        where = f"{self.name}, {kind.__name__} at {[interrupter.lines[i] for i in at if i < len(interrupter.lines)]}"
        assert not at_work, where  # no thread that could still write to the model
        assert world.look_around() == world.around, where
        after = world.look()
        if failure is None:
            # Where the model's own code cannot be asked whether it takes the keys, the exception is an answer.
            assert not interrupter.raised or same_tensors(world.model, self.loaded()), f"swallowed: {where}"
        elif world.given.get("undo", True) or after == world.before:
            assert after == world.before, where
        else:  # no copy of the values: these are other ones, and the exception names them
            assert without_values(after) == without_values(world.before), where
            said, changed = "", {new[0] for new, old in zip(after, world.before, strict=True) if new != old}  # type: ignore[index]
            while failure is not None:  # what Python prints: the last one, and those before it
                said += " ".join(map(str, [failure, *failure.args, *getattr(failure, "__notes__", ())]))
                if isinstance(failure, UnreadableError):
                    assert changed <= set(failure.problem.facts["keys"]), where  # type: ignore[union-attr]
                failure = failure.__context__
            assert "no copy of the old values was kept" in said, where
        return interrupter

    def loaded(self) -> nn.Module:
        world = self.world()
        world.load()
        return world.model


@pytest.fixture(params=ROADS)
def case(request: pytest.FixtureRequest, path: Path) -> Case:
    road = ROADS[request.param]
    for fixture in road.needs:
        request.getfixturevalue(fixture)
    if road.make is WithExtraState:
        torch.save(WithExtraState(2).state_dict(), path.with_suffix(".extra"))
        os.utime(path.with_suffix(".extra"), (1, 1))
    case = Case(request.param, road, path)
    assert Interrupter().run(case.world().load) is None  # all imports are done, all caches filled
    return case


def lines_of(case: Case) -> list[tuple[str, int]]:
    interrupter = Interrupter(without=WITHOUT)
    assert interrupter.run(case.world().load) is None
    return interrupter.lines


def chosen(lines: Sequence[tuple[str, int]]) -> Iterable[int]:
    """The numbers of the lines to raise at: of one that is run often, the first and the last time."""
    first, last = {line: i for i, line in reversed(list(enumerate(lines)))}, {line: i for i, line in enumerate(lines)}
    return range(len(lines)) if ALL else sorted({*first.values(), *last.values()})


def kinds(number: int) -> Sequence[type[BaseException]]:
    return KINDS if ALL else KINDS[number % len(KINDS) :][:1]


def test_one_exception_at_each_line(case: Case) -> None:
    raised = 0
    for number in chosen(lines_of(case)):
        for kind in kinds(number):
            raised += case.interrupted([number], kind).raised
    assert raised > 300


def test_a_second_exception_at_each_line_of_the_undo(case: Case) -> None:
    lines = lines_of(case)
    count = len(lines)
    reading = max((number for number, (file, _) in enumerate(lines) if file == "transfer.py"), default=count - 50)
    for first in (count - 1, count - 100, reading):
        while not (interrupter := case.interrupted([first], KeyboardInterrupt)).raised:
            first -= 10  # with other threads, this one does not always run as many lines
        undone = interrupter.lines[first + 1 :]
        assert len(undone) > 20
        for second in chosen(undone):
            for kind in kinds(second):
                case.interrupted([first, first + 1 + second], kind)


@pytest.fixture
def alarms() -> Iterator[Callable[..., None]]:
    """What has signals come, each of them a Ctrl-C: after how many seconds, and how many, half a millisecond apart."""
    left = 0

    def interrupt(*_: object) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            signal.setitimer(signal.ITIMER_REAL, 0)
        raise KeyboardInterrupt

    def arm(after: float, count: int) -> None:
        nonlocal left
        left = count
        signal.setitimer(signal.ITIMER_REAL, after, 0.0005)

    before = signal.signal(signal.SIGALRM, interrupt)
    yield arm
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@needs_timer_signals
@pytest.mark.timeout(method="thread")  # or pytest would use the same signal
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Python drops one in its own callbacks
@pytest.mark.parametrize("case", [name for name in ROADS if "cuda2" not in ROADS[name].needs], indirect=True)
def test_signals(case: Case, alarms: Callable[..., None]) -> None:
    """2,000 in all these roads together, at any instruction, in torch's code as well.

    Pretend devices call Python functions from C++, where Python drops a Ctrl-C; real ones do not.
    """
    chance, outcomes = random.Random(case.name), Counter[str]()
    started = time.perf_counter()
    for _ in range(5):
        case.world().load()
    usual = (time.perf_counter() - started) / 5
    expected = case.loaded()
    for _ in range(2000 if ALL else 140):
        world, where, returned = case.world(), __file__, False
        with contextlib.suppress(KeyboardInterrupt):  # a second one, in the lines below
            try:
                alarms(chance.uniform(1e-6, 1.3 * usual), chance.choice((1, 1, 2)))
                world.load()
                returned = True
            except KeyboardInterrupt as failure:
                where = traceback.extract_tb(failure.__traceback__)[-2].filename  # the last is the handler's
                del failure
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        assert world.look_around() == world.around
        after = world.look()
        is_loaded, is_old = same_tensors(world.model, expected), after == world.before
        if case.road.given.get("undo", True) is False and not returned:
            outcomes["without a copy"] += 1
        elif returned or where == __file__:  # in this test's own lines: before the call, or once it has returned
            assert is_loaded or (is_old and not returned)
            outcomes["loaded" if is_loaded else "not begun"] += 1
        else:
            assert is_old
            outcomes["undone"] += 1
    assert outcomes["undone"] + outcomes["without a copy"] > 10, outcomes
