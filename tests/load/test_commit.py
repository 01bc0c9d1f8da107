"""All or nothing: after every refusal and every injected failure the model is bit for bit what it was."""

from __future__ import annotations

import copy
import io
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from placing import look
from torch import nn

import smartload.load.commit
import smartload.load.threads
import smartload.load.transfer
from smartload import (
    AmbiguousKeysError,
    CastError,
    KeyMismatchError,
    ModelCodeError,
    PlacementError,
    ShapeMismatchError,
    SmartLoadError,
    UnreadableError,
    smart_load,
)


class Net(nn.Module):
    """A network with everything that a load may change."""

    def __init__(self, seed: int, state: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 4)
        self.tied = self.second
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("counts", torch.randint(0, 99, (5,)))
        self.register_buffer("mask", torch.rand(7) > 0.5)
        self.register_buffer("scratch", torch.randn(2), persistent=False)
        self.wide = nn.Parameter(torch.randn(3, 4).t())
        self.note = {"a": [1, 2]}

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.norm(self.second(self.first(value)))
        return (hidden * self.wide.sum()).sum()


class World:
    """A model that has been trained a little, its optimizer, and how both look."""

    def __init__(self, make: Callable[[int], nn.Module] = Net) -> None:
        self.model = make(1)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)
        self.model(torch.randn(8, 4)).backward()
        self.optimizer.step()
        self.before = self.look()
        self.identities = [id(parameter) for parameter in self.model.parameters()]

    def look(self) -> list[object]:
        seen = look(self.model, [self.optimizer])
        for name, module in self.model.named_modules():
            things = {key: value for key, value in vars(module).items() if not isinstance(value, torch.Tensor)}
            seen.append((name, list(things), id(module), copy.deepcopy(things.get("note")), module.training))
            seen.append([(key, id(value)) for key, value in (*module._parameters.items(), *module._buffers.items())])
        return seen

    def unchanged(self) -> bool:
        return self.look() == self.before


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.save(Net(2).state_dict(), tmp_path / "w.pt")
    os.utime(tmp_path / "w.pt", (1, 1))
    return tmp_path / "w.pt"


@pytest.fixture
def threaded(reading: Callable[..., None]) -> None:
    reading(piece=16, count=4, together=False)


def changed(state: dict[str, Any], **new: Any) -> dict[str, Any]:
    made = {**state, **{key.replace("__", "."): value for key, value in new.items()}}
    return {key: value for key, value in made.items() if value is not None}


REFUSALS: dict[str, tuple[dict[str, Any], type[SmartLoadError]]] = {
    "missing": ({"norm__weight": None}, KeyMismatchError),
    "unexpected": ({"more": torch.ones(1)}, KeyMismatchError),
    "shape": ({"wide": torch.ones(3, 4)}, ShapeMismatchError),
    "fraction": ({"counts": torch.full((5,), 0.5)}, CastError),
    "too large": ({"first__bias": torch.full((3,), 1e300, dtype=torch.float64)}, CastError),
    "complex": ({"norm__bias": torch.ones(4, dtype=torch.complex64)}, CastError),
    "no tensor": ({"first__bias": "text"}, SmartLoadError),
    "conflict": ({"tied__bias": torch.full((4,), 9.0)}, SmartLoadError),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("from_file", [True, False])
def test_refusals(name: str, from_file: bool, tmp_path: Path) -> None:
    new, kind = REFUSALS[name]
    state: Any = changed(Net(2).state_dict(), **new)
    held = {key: (id(value), copy.deepcopy(value)) for key, value in state.items()}
    world, given = World(), state
    if from_file:
        torch.save(state, tmp_path / "w.pt")
        given = tmp_path / "w.pt"
    for assign in (False, True):
        if assign and kind is CastError:
            continue
        with pytest.raises(kind):
            smart_load(world.model, given, optimizer=world.optimizer, assign=assign)
        assert world.unchanged()
    assert [(key, id(value)) for key, value in state.items()] == [(key, i) for key, (i, _) in held.items()]


class Flaky(io.BytesIO):
    """A file object that fails at its n-th read."""

    def __init__(self, data: bytes, at: int, failure: BaseException) -> None:
        super().__init__(data)
        self.left, self.failure = at, failure

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise self.failure
        return super().read(size)


@pytest.mark.parametrize(
    "failure", [OSError(5, "broken"), MemoryError(), KeyboardInterrupt(), RuntimeError("out of memory")]
)
@pytest.mark.parametrize("threads", [False, True])
def test_every_read_may_fail(failure: BaseException, threads: bool, path: Path, request: pytest.FixtureRequest) -> None:
    if threads:
        request.getfixturevalue("threaded")
    world, data, at = World(), path.read_bytes(), 0
    while True:
        file = Flaky(data, at, failure)
        try:
            smart_load(world.model, file)
        except (UnreadableError, type(failure)):
            assert world.unchanged(), at
            at += 1
        else:
            break
    assert file.left >= 0
    assert at > (20 if threads else 8)  # small tensors that lie together are one read
    assert not world.unchanged()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("failure", [ValueError("no"), KeyboardInterrupt()])
def test_every_tensor_written_may_be_the_last(assign: bool, failure: BaseException) -> None:
    """From memory torch copies: a hook of the interpreter stops it at the n-th step of the load itself."""
    world = World()
    state = Net(2).state_dict()

    class Stop(torch.overrides.TorchFunctionMode):
        left = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.left -= func in (torch.Tensor.copy_, torch.Tensor.requires_grad_)
            if self.left == 0:
                self.left -= 1
                raise failure
            return func(*args, **(kwargs or {}))

    for at in range(1, 60):
        mode = Stop()
        mode.left = at
        try:
            with mode:
                smart_load(world.model, state, assign=assign)
        except (SmartLoadError, KeyboardInterrupt, ValueError):
            assert world.unchanged(), at
        else:
            break
    assert at > 3 or assign


@pytest.mark.parametrize("change", ["cut", "overwritten", "grown"])
def test_a_file_that_changes_meanwhile(change: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, data = World(), path.read_bytes()
    read = smartload.load.commit.read_all

    def meanwhile(*args: Any) -> None:
        if change != "cut":
            read(*args)
        with path.open("r+b") as file:
            if change == "cut":
                file.truncate(len(data) // 2)
            elif change == "grown":
                file.seek(0, 2)
                file.write(b"more")
            else:
                file.write(bytes(len(data)))
        if change == "cut":
            read(*args)

    monkeypatch.setattr(smartload.load.commit, "read_all", meanwhile)
    with pytest.raises(UnreadableError):
        smart_load(world.model, path)
    assert world.unchanged()


def broken(kind: str, failure: BaseException) -> Callable[[int], nn.Module]:
    class Broken(Net):
        if kind == "set_extra_state":

            def get_extra_state(self) -> object:
                return 1

            def set_extra_state(self, state: object) -> None:
                raise failure

        if kind == "load_state_dict":

            def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
                super().load_state_dict(*args, **kwargs)
                raise failure

        if kind == "_load_from_state_dict":

            def _load_from_state_dict(self, *args: Any) -> None:
                super()._load_from_state_dict(*args)
                self.note["a"].append(3)
                raise failure

    def fail(*args: Any) -> None:
        raise failure

    def make(seed: int) -> nn.Module:
        model = Broken(seed)
        if kind == "pre":
            model.norm.register_load_state_dict_pre_hook(fail)
        if kind == "post":
            model.register_load_state_dict_post_hook(fail)
        if kind == "vandal":

            def wreck(module: Any, keys: object) -> None:
                module.wide.data = torch.zeros(1)
                module.first.weight.grad = None
                module.first.weight.requires_grad_(False)
                module.train(False)
                module.extra = 1
                module.first = None
                del module._buffers["mask"]
                module.register_buffer("mask2", torch.ones(1))
                raise failure

            model.register_load_state_dict_post_hook(wreck)
        return model

    return make


CODE = ["pre", "post", "vandal", "set_extra_state", "load_state_dict", "_load_from_state_dict"]


class TwoArguments(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(one, two)


FAILURES = [
    ValueError("no"),
    KeyError("x"),
    MemoryError(),
    torch.OutOfMemoryError("CUDA"),
    TwoArguments(1, 2),
    OSError(5, "io"),
]


@pytest.mark.parametrize("kind", CODE)
@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("assign", [False, True])
def test_code_of_the_model_that_raises(kind: str, failure: Exception, assign: bool, tmp_path: Path) -> None:
    world = World(broken(kind, failure))
    torch.save(world.model.state_dict(), tmp_path / "w.pt")
    given = {key: value + 1 if isinstance(value, torch.Tensor) and value.is_floating_point() else value
             for key, value in world.model.state_dict().items()}  # fmt: skip
    for source in (given, tmp_path / "w.pt"):
        with pytest.raises(ModelCodeError) as caught:
            smart_load(world.model, source, assign=assign)
        error = caught.value
        assert error.__cause__ is failure
        assert isinstance(error, type(failure)) or isinstance(failure, (TwoArguments, OSError))
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is ModelCodeError
        assert str(again) == str(error)
        assert type(failure).__name__ in str(error)
        assert world.unchanged()


@pytest.mark.parametrize("kind", CODE)
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), SystemExit(3)])
def test_an_exit_stays_an_exit(kind: str, failure: BaseException) -> None:
    world = World(broken(kind, failure))
    with pytest.raises(type(failure)) as caught:
        smart_load(world.model, world.model.state_dict())
    assert caught.value is failure
    assert world.unchanged()


def test_a_model_that_cannot_move(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, moved = World(), []

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        moved.append(self)
        if len(moved) > 3:
            raise torch.OutOfMemoryError("no room")
        return self.clone()

    def bring(module: nn.Module, device: str) -> None:
        module._apply(lambda tensor: to(tensor))

    real = smartload.load.commit.materialise_and_move

    def moving(survey: Any, placement: Any, plan: Any, assign: bool, log: Any) -> None:
        real(survey, placement, plan, assign, log)
        bring(survey.model, "cpu")

    monkeypatch.setattr(smartload.load.commit, "materialise_and_move", moving)
    with pytest.raises(torch.OutOfMemoryError, match="could not be brought to its device") as caught:
        smart_load(world.model, path, optimizer=world.optimizer)
    assert isinstance(caught.value, PlacementError)
    assert type(pickle.loads(pickle.dumps(caught.value))) is PlacementError
    assert len(moved) == 4
    assert world.unchanged()


def test_no_thread_writes_after_the_undo(
    path: Path, threaded: None, monkeypatch: pytest.MonkeyPatch, ctrl_c: Callable[[], None]
) -> None:
    """Ctrl-C comes while this thread waits; the helpers are slow, and must be done before the old values come back."""
    import time

    from smartload.reading.opening import FileReader

    world, real, main = World(), FileReader.read_into, threading.main_thread()
    state, interrupted = {"armed": False}, threading.Event()

    def slow(self: Any, offset: int, buffer: memoryview) -> None:
        if state["armed"] and threading.current_thread() is main:
            state["armed"] = False
            interrupted.set()
            ctrl_c()
        elif threading.current_thread() is not main:
            interrupted.wait(10)  # so that they do not take all the work
            time.sleep(0.05)
        real(self, offset, buffer)

    read = smartload.load.commit.read_all

    def armed(*args: Any) -> None:
        state["armed"] = True
        interrupted.clear()
        read(*args)

    monkeypatch.setattr(FileReader, "read_into", slow)
    monkeypatch.setattr(smartload.load.commit, "read_all", armed)
    running = threading.active_count()
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            smart_load(world.model, path)
        assert threading.active_count() == running
        assert world.unchanged()


def test_a_second_interrupt_does_not_stop_the_undo(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(broken("post", KeyboardInterrupt()))
    real, calls = smartload.load.commit.Undo._restore, []

    def interrupted(self: Any) -> None:
        calls.append(1)
        if len(calls) < 4:
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(smartload.load.commit.Undo, "_restore", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smart_load(world.model, path)
    assert len(calls) == 4
    assert world.unchanged()


# ------------------------------------------------------------------------------------------------- without a copy


@pytest.mark.parametrize("undo", [True, False, "auto"])
@pytest.mark.parametrize("small", [0, 1 << 40])
def test_what_undo_means(undo: bool | str, small: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smartload.load.commit, "AUTO_UNDO_BYTES", small)
    report = smart_load(Net(1), path, undo=undo)  # type: ignore[arg-type]
    assert report.undo is (undo is True or (undo == "auto" and small > 0))


def test_code_of_its_own_is_reason_enough_for_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smartload.load.commit, "AUTO_UNDO_BYTES", 0)
    for kind in CODE:
        world = World(broken(kind, ValueError("no")))
        with pytest.raises(ModelCodeError):
            smart_load(world.model, Net(2).state_dict() | world.model.state_dict())
        assert world.unchanged()


@pytest.mark.parametrize("reads", range(16))
def test_tensors_that_are_not_the_models_are_no_mixture(reads: int, path: Path) -> None:
    """With `assign` new tensors are filled: a read that fails leaves the model as it was, and no key to name."""
    world, file = World(), Flaky(path.read_bytes(), reads, OSError(5, "broken"))
    words = ""
    try:
        smart_load(world.model, file, undo=False, assign=True)
    except (UnreadableError, OSError) as error:
        words = str(error)
    assert "mixture" not in words
    assert world.unchanged() == bool(words)


@pytest.mark.parametrize("undo", [False, "auto"])
def test_half_loaded_names_the_keys(
    undo: bool | str, path: Path, monkeypatch: pytest.MonkeyPatch, reading: Callable[..., None]
) -> None:
    monkeypatch.setattr(smartload.load.commit, "AUTO_UNDO_BYTES", 0)
    reading(together=False)
    world, data = World(), path.read_bytes()
    reads = 0
    while True:  # the last read of all
        file = Flaky(data, reads, OSError(5, "broken"))
        try:
            smart_load(Net(1), file)
        except (UnreadableError, OSError):
            reads += 1
        else:
            break
    with pytest.raises(UnreadableError, match=r"first\.weight") as caught:
        smart_load(world.model, Flaky(data, reads - 1, OSError(5, "broken")), undo=undo)  # type: ignore[arg-type]
    assert "may hold a mixture" in str(caught.value)
    assert caught.value.problem.kind == "half-loaded"  # type: ignore[union-attr]
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert [id(p) for p in world.model.parameters()] == world.identities


def test_half_loaded_from_memory_names_what_torch_wrote() -> None:
    world = World(broken("post", ValueError("no")))
    with pytest.raises(UnreadableError, match=r"first\.weight") as caught:
        smart_load(world.model, Net(2).state_dict(), undo=False)
    assert isinstance(caught.value.__cause__, ModelCodeError)


def test_nothing_written_is_not_half_loaded() -> None:
    world = World(broken("pre", ValueError("no")))
    state = Net(2).state_dict()
    model = nn.Sequential(world.model.norm)
    with pytest.raises(ModelCodeError):
        smart_load(
            model, {f"0.{key[5:]}": value for key, value in state.items() if key.startswith("norm.")}, undo=False
        )
    assert world.unchanged()


def test_ctrl_c_without_a_copy_stays_ctrl_c(path: Path) -> None:
    model = Net(1)
    data = path.read_bytes()
    notes: list[list[str]] = []
    for at in range(200):
        try:
            smart_load(model, Flaky(data, at, KeyboardInterrupt()), undo=False)
        except KeyboardInterrupt as stopped:
            # Before Python 3.11 exceptions take no notes; the text is among the arguments.
            notes.append(list(getattr(stopped, "__notes__", stopped.args)))
        else:
            break
    assert notes[0] == []
    assert "may hold a mixture" in notes[-1][0]


@pytest.mark.filterwarnings("ignore:Casting complex")
def test_a_cast_that_the_models_code_leaves_to_torch_is_still_refused() -> None:
    class Passing(Net):
        def _load_from_state_dict(self, *args: Any) -> None:
            super()._load_from_state_dict(*args)

    world = World(Passing)
    for value in (torch.full((5,), 0.5), torch.ones(5, dtype=torch.complex64) * 1j):
        with pytest.raises(CastError, match="counts"):
            smart_load(world.model, {**Net(2).state_dict(), "counts": value})
        assert world.unchanged()


def test_the_callers_parameters_keep_their_flags_after_a_failure() -> None:
    world = World(broken("post", ValueError("no")))
    state = {key: nn.Parameter(value, False) if value.is_floating_point() else value
             for key, value in Net(2).state_dict().items()}  # fmt: skip
    with pytest.raises(ModelCodeError):
        smart_load(world.model, state, assign=True)
    assert not any(value.requires_grad for value in state.values())
    assert world.unchanged()


def test_the_closing_load_copies_nothing(path: Path) -> None:
    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        copied = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.copy_.default and args[0].data_ptr() != args[1].data_ptr():
                self.copied += args[0].nbytes
            return func(*args, **(kwargs or {}))

    model = Net(1)
    with Counting() as mode:
        smart_load(model, path, undo=False)
    assert mode.copied <= model.mask.nbytes + model.wide.nbytes  # through a buffer: a bool, and other strides
    assert [torch.equal(a, b) for a, b in zip(model.state_dict().values(), Net(2).state_dict().values())].count(
        False
    ) == 0


def test_views_that_overlap_are_filled_one_after_the_other(tmp_path: Path, threaded: None) -> None:
    def views() -> nn.Module:
        base = torch.zeros(1000)
        model = nn.Module()
        model.b, model.a = nn.Parameter(base[300:]), nn.Parameter(base[:700])
        return model

    both = torch.arange(1000.0)
    torch.save({"a": both[:700].clone(), "b": both[300:].clone()}, tmp_path / "w.pt")
    torch.save({"a": torch.full((700,), 1.0), "b": torch.full((700,), 2.0)}, tmp_path / "two.pt")
    for _ in range(20):
        model = views()
        smart_load(model, tmp_path / "w.pt")
        assert torch.equal(model.a, both[:700])
        assert torch.equal(model.b, both[300:])
        with pytest.raises(AmbiguousKeysError, match="share a part of their memory"):
            smart_load(model, tmp_path / "two.pt")
        assert torch.equal(model.b, both[300:])


def test_without_a_copy_a_doubtful_cast_is_refused_before_the_load() -> None:
    class Passing(Net):
        def _load_from_state_dict(self, *args: Any) -> None:
            super()._load_from_state_dict(*args)

    world = World(Passing)
    with pytest.raises(CastError, match="counts"):
        smart_load(world.model, {**Net(2).state_dict(), "counts": torch.full((5,), 0.5)}, undo=False)
    assert world.unchanged()
