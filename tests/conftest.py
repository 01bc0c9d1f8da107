"""What every test can use: two CUDA devices, real or pretend, and the rule for tests that need a real one."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from fake_devices import cuda2
from formats import FORMATS, State, Written
from hypothesis import HealthCheck

from smartload.errors import SmartLoadError, sentences
from smartload.load import threads, transfer
from smartload.records.problems import Problem

__all__ = ["cuda2"]

collect_ignore = ["benchmarks"]
# How long an example takes says something of the machine, nothing of smartload.
hypothesis.settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis.settings.load_profile("any machine")
os.environ["PYTHONIOENCODING"] = "utf-8"  # what a process that a test starts prints, and the test reads


@pytest.fixture(params=FORMATS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[State], Written]:
    """What writes a state dict in each of the formats, and gives what `smart_load` takes for its path."""

    def write(state: State) -> Written:
        folder = tmp_path / str(next(count))
        folder.mkdir()
        return FORMATS[request.param](state, folder)

    count = itertools.count()
    return write


@pytest.fixture(autouse=True)
def every_refusal_has_its_sentence(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every error that any test raises has a sentence, and the facts for it, however its kind was chosen."""
    if request.node.get_closest_marker("says_no_sentence"):
        return
    real = SmartLoadError.__init__

    def init(self: SmartLoadError, problem: Any) -> None:
        real(self, problem)
        sentences.words(problem)

    def spoilt(problem: Problem) -> str:
        raise AssertionError(f"{problem.kind!r} has no sentence, or not the facts for it: {problem.facts}")

    monkeypatch.setattr(SmartLoadError, "__init__", init)
    monkeypatch.setattr(sentences, "without_a_sentence", spoilt)


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """What makes small files be read as large ones are: in pieces, by several threads, each tensor by itself.

    Args:
        piece: bytes that are read at once, or go through a buffer at once.
        count: how many threads read, however small the file is.
        together: whether small tensors that lie side by side are read at once.
    """

    def change(piece: int | None = None, count: int | None = None, together: bool = True) -> None:
        if piece is not None:
            monkeypatch.setattr(transfer, "READ_BYTES", piece)
            monkeypatch.setattr(transfer, "BUFFER_BYTES", piece)
        if count is not None:
            monkeypatch.setattr(threads, "MIN_BYTES_FOR_THREADS", -1)
            monkeypatch.setattr(torch, "get_num_threads", lambda: count)
        if not together:
            monkeypatch.setattr(transfer, "SMALL_TENSOR_BYTES", -1)

    return change


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    """What interrupts this thread, also where a shell has told its background jobs to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite",
        action="store_true",
        help="write what is printed today into the pages of README and docs, instead of comparing",
    )


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Helpers are imported by the tests; collected for their doctests they would be imported a second time."""
    helper = collection_path.suffix == ".py" and not collection_path.name.startswith("test_")
    return True if helper else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
