"""What every test can use: two CUDA devices, real or pretend, and the rule for tests that need a real one."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fake_devices import cuda2
from formats import FORMATS, State, Written

from smartload.load import commit
from smartload.load import strict as rehearse

__all__ = ["cuda2"]

collect_ignore = ["benchmarks"]


@pytest.fixture(params=FORMATS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[State], Written]:
    """What writes a state dict in each of the formats, and gives what `smart_load` takes for its path."""

    def write(state: State) -> Written:
        folder = tmp_path / str(next(count))
        folder.mkdir()
        return FORMATS[request.param](state, folder)

    count = itertools.count()
    return write


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
    parser.addoption(
        "--apart",
        action="store_true",
        help="give each module its own keys in every load, as in models with very many children",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--apart"):
        rehearse._MANY = -1
        strict_load = rehearse.strict_load
        # Reports read as ever: they do not say which road was taken.
        commit.strict_load = lambda *arguments: strict_load(*arguments) and False


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Helpers are imported by the tests; collected for their doctests they would be imported a second time."""
    helper = collection_path.suffix == ".py" and not collection_path.name.startswith("test_")
    return True if helper else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
