"""What a file costs grows no faster than the file: time and memory of files that ask for much, at several sizes."""

from __future__ import annotations

import importlib
import pkgutil
import re
import time
from types import ModuleType
from typing import Any

import pytest
import torch
from growth import GROWTHS, measure

import smartload
from smartload.load.entries import same_extra_state
from smartload.load.transfer import read_extra_state
from smartload.reading.shift import shifted
from smartload.records.entries import Extra

CALLS = ("inspect", "smart_load")
LIMIT = 8 * (64 << 20)
"""Bytes that a file of less than 64 MiB may take, and a tenth for what is measured around it."""


def costs_of(names: list[str]) -> dict[str, list[dict[str, Any]]]:
    """The costs of all files, by few processes: each takes some seconds to start. One that hangs ends its process."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for cost in measure(*names):
        found[cost["name"]].append(cost)
    return found


@pytest.mark.timeout(320)
def test_cost_grows_with_the_file() -> None:
    names = list(GROWTHS)
    for group in (names[: len(names) // 2], names[len(names) // 2 :]):
        for name, costs in costs_of(group).items():
            growth = GROWTHS[name]
            assert [(cost["count"], cost["call"]) for cost in costs] == [
                (size, call) for size in growth.sizes for call in CALLS
            ], f"{name}: the process has ended or hangs"
            for cost in costs:
                assert not cost["words"].startswith("raw"), cost
                assert len(cost["words"]) < 600, cost
                assert cost["seconds"] < 20, cost
                assert cost["memory"] < LIMIT * 1.1 + 2 * cost["size"], cost
            last = costs[-1]["words"]
            assert growth.words in last if growth.words else last == "done", costs[-1]


def doubled(levels: int) -> list[object]:
    tree: list[object] = [1.0]
    for _ in range(levels):
        tree = [tree, tree]
    return tree


def test_walks_over_an_extra_state_go_once_through_what_is_there_twice() -> None:
    tree = doubled(50)
    made = read_extra_state(tree, ())
    moved = shifted({"a": Extra(tree), "b": Extra({"c": tree})}, 1)["b"]
    for copy in (made, moved.tree["c"]):  # type: ignore[union-attr,index]
        assert copy[0] is copy[1]  # type: ignore[index]
        assert same_extra_state(tree, copy)
    assert not same_extra_state(doubled(50), doubled(51))
    assert same_extra_state({"a": [torch.ones(2), float("nan")]}, {"a": [torch.ones(2), float("nan")]})
    assert not same_extra_state({"a": [torch.ones(2)]}, {"a": [torch.zeros(2)]})
    assert not same_extra_state({"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert not same_extra_state([1, 2], [1])
    assert not same_extra_state([1], [True])


def patterns() -> dict[str, re.Pattern[str]]:
    """Every pattern that a module keeps."""
    modules = (importlib.import_module(each.name) for each in pkgutil.walk_packages(smartload.__path__, "smartload."))
    return {
        f"{module.__name__}.{name}": value
        for module in modules
        if isinstance(module, ModuleType)
        for name, value in vars(module).items()
        if isinstance(value, re.Pattern)
    }


# How a module uses its pattern, and texts on which it would be slow.
WORST = {
    "smartload.formats.torchscript._CLASS": (
        "findall",
        "class " + "a" * 10**6,
        "class M(Module)" * 66_000,
        "class M(Module):\n  __parameters__ = [" + "]" * 10**6,
    ),
    "smartload.formats.torchscript._QUOTED_NAME": (
        "findall",
        '"' * 10**6,
        '"a' * 500_000,
        '"' + "a" * 10**6,
        '"a\\' * 300_000,
    ),
    "smartload.formats.torch_export._WEIGHTS": (
        "fullmatch",
        "data/weights/" * 80_000,
        "data/weights/" + "_weights_config.json" * 50_000 + "x",
    ),
    "smartload.formats.sharded._INDEX": (
        "fullmatch",
        ".a" * 500_000,
        "." + "a" * 10**6,
        ".index" * 160_000,
        ".index.a" * 125_000,
    ),
    "smartload.formats.sharded._NO_SET": (
        "search",
        "-1" * 500_000,
        "-1-of-" * 160_000,
        "-" + "1" * 10**6,
        "-1-of-" + "0" * 10**6,
    ),
    "smartload.match.hints._SHARD": (
        "search",
        "-1" * 500_000,
        "-1-of-" * 160_000,
        "-" + "1" * 10**6,
        "-1-of-" + "1" * 10**6,
    ),
    "smartload.reading.files._TEMPORARY": ("fullmatch", ".smartload-" + "0" * 10**6),
    # Its text is cut to 4,096 bytes before.
    "smartload.pickles.arrays._HEADER": (
        "fullmatch",
        *(
            text[:4096]
            for text in ("{" + " " * 10**4, "{'descr': '<f4', 'fortran_order': True, 'shape': (" + "1, " * 10**4)
        ),
    ),
}


def test_every_pattern_is_listed() -> None:
    assert patterns().keys() == WORST.keys()


@pytest.mark.parametrize("name", WORST)
def test_no_pattern_takes_longer_than_the_text_is_long(name: str) -> None:
    use, *texts = WORST[name]
    for text in texts:
        began = time.process_time()
        getattr(patterns()[name], use)(text)
        assert time.process_time() - began < 2, text[:40]
