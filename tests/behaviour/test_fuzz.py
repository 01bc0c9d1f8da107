"""Damaged files of every format: a refusal in words, or the tensors that the file holds; never anything else.

SMARTLOAD_FUZZ_SECONDS says for how long all of it may search, 60 unless told. `tests/helpers/fuzz.py` does the same
for hours, in processes of its own, and repeats one case by its number.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import pytest
import torch
from damage import Base, Bases, Case, Net, case
from formats import FORMATS
from fuzz import Judge
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from smartload.records.problems import Problem

SECONDS = max(5, float(os.environ.get("SMARTLOAD_FUZZ_SECONDS", "60")) - 40)  # the rest goes into the valid files


@pytest.fixture(scope="module")
def bases() -> Bases:
    return Bases()


@pytest.fixture
def judge(tmp_path: Path) -> Judge:
    folder = tmp_path / "files"
    folder.mkdir()
    return Judge(folder)


def whole(base: Base) -> Case:
    return Case(base, random.Random(0), dict(base.files), {})


@pytest.mark.timeout(2 * SECONDS + 120)
@pytest.mark.parametrize("name", FORMATS)
def test_damage_is_refused_or_harmless(name: str, bases: Bases, judge: Judge) -> None:
    of, donors = bases.of(name)
    assert judge.verdict(whole(of))[0] in (
        "loaded",
        "refused",
    )  # what is imported by a first load is not the file's doing
    started = time.perf_counter()
    for number in range(8):
        judge.verdict(case(of, donors, number))
    examples = max(10, int(SECONDS / len(FORMATS) / (time.perf_counter() - started) * 8))

    @settings(
        max_examples=examples,
        deadline=None,
        print_blob=True,
        phases=(Phase.explicit, Phase.reuse, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    @given(number=st.integers(0, 2**40))
    def search(number: int) -> None:
        kind, words = judge.verdict(case(of, donors, number))
        if kind not in ("loaded", "refused"):
            pytest.fail(
                f"{kind}: {words}\nagain: python tests/helpers/fuzz.py --format {name!r} --case {number}", pytrace=False
            )

    search()


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_number_is_the_same_damage(name: str, bases: Bases) -> None:
    of, donors = bases.of(name)
    for number in range(20):
        assert case(of, donors, number).files == case(of, donors, number).files


def _garbage(net: nn.Module) -> None:
    with torch.no_grad():
        net.get_parameter("head.weight")[2, 3] = 0.123


def _twice(net: nn.Module) -> None:
    net.body[1].bias = nn.Parameter(net.body[1].bias.detach())  # type: ignore[index]


def _written(net: nn.Module) -> None:
    Path(os.devnull).open("w", encoding="utf-8").close()


def _endless(net: nn.Module) -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("deed", "kind"), [(_garbage, "wrong"), (_twice, "objects"), (_written, "event"), (_endless, "hang")]
)
def test_the_judge_would_see_it(
    deed: Callable[[nn.Module], None], kind: str, bases: Bases, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = fuzz.smart_load

    def faulty(net: Net, source: Any, **options: Any) -> Any:
        report = load(net, source, **options)
        deed(net)
        return report

    made = whole(bases.of("torch zip")[0])
    assert judge.verdict(made)[0] == "loaded"
    monkeypatch.setattr(fuzz, "smart_load", faulty)
    assert judge.verdict(made)[0] == kind


def test_the_judge_would_see_a_refusal_that_is_none(
    bases: Bases, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changing(net: nn.Module, source: Any, **options: Any) -> Any:
        _garbage(net)
        raise fuzz.SmartLoadError(Problem("damaged", "x"))

    made = whole(bases.of("torch zip")[0])
    monkeypatch.setattr(fuzz, "smart_load", changing)
    # Of several: now and then it inspects the file instead.
    assert {judge.verdict(made)[0] for _ in range(9)} == {"changed", "loaded"}
    monkeypatch.setattr(fuzz, "smart_load", lambda *args, **options: [][1])
    assert {judge.verdict(made)[0] for _ in range(9)} == {"raw IndexError", "loaded"}
