"""What `inspect` tells: for eyes, for notebooks and for machines, of files that nobody has looked into before."""

from __future__ import annotations

import argparse
import io
import json
import re

import pytest
import torch
from tagging import saved
from torch import nn

from smartload import UnreadableError, inspect


def training_file(tag: str = "cuda:1") -> io.BytesIO:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    net[1].weight = net[0].weight
    parallel = nn.DataParallel(nn.Sequential(*(nn.Linear(4, 4) for _ in range(12))))
    content = {
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1),
        "model": parallel.state_dict(),
        "tied": net.state_dict(),
        "half": {"w": torch.ones(2).half(), "n": torch.tensor(3), "labels": ["a"]},
        "optimizer": torch.optim.Adam(net.parameters()).state_dict(),
    }
    return saved(content, tag)


def test_the_whole_picture() -> None:
    assert str(inspect(training_file())) == (
        "the file object: torch zip\n"
        "  model: 24 tensors, 240 elements, 960 bytes\n"
        "    dtypes:   float32\n"
        "    prefixes: module.\n"
        "    names:    module.{0...11}.weight, module.{0...11}.bias\n"
        "  tied: 2 tensors, 40 elements, 160 bytes\n"
        "    dtypes:   float32\n"
        "    names:    {0...1}.weight\n"
        "    tied:     0.weight = 1.weight\n"
        "  half: 2 tensors, 3 elements, 12 bytes\n"
        "    dtypes:   float16 (1), int64 (1)\n"
        "    names:    w, n, labels\n"
        "    no tensor: labels: a list of 1\n"
        "  beside:\n"
        "    epoch: an int\n"
        "    args: an argparse.Namespace\n"
        "    optimizer: an optimizer's state\n"
        "  devices:    cuda:1 (27)"
    )


def test_it_is_plain_data() -> None:
    found = json.loads(json.dumps(inspect(training_file()).to_dict()))
    assert found["format"] == "torch zip"
    assert found["devices"] == {"cuda:1": 27}
    part = found["parts"]["tied"]
    assert part == {
        "kind": "state dict",
        "elements": 40,
        "nbytes": 160,
        "tensors": {name: {"shape": [10, 4], "dtype": "float32"} for name in ("0.weight", "1.weight")},
        "no_tensors": {},
        "prefixes": [],
        "tied": [["0.weight", "1.weight"]],
    }
    assert found["parts"]["half"]["no_tensors"] == {"labels": "a list of 1"}
    assert found["aside"][0] == {"path": "epoch", "what": "an int", "tensors": 0}


def test_it_is_a_table_in_a_notebook() -> None:
    page = inspect(training_file())._repr_html_()
    plain = re.sub(' style="[^"]*"', "", page)
    assert plain.startswith("<table><caption>the file object: torch zip</caption><tr><th>model</th><td>")
    assert page.count("<tr>") == 5


def test_a_file_cannot_write_into_the_page_or_the_terminal() -> None:
    evil = "<script>\x1b[31m\n</td>"
    file = saved({evil: {evil: torch.ones(1), "w": torch.ones(1)}, "x": evil, f"{evil}2": 3}, "<b>")
    found = inspect(file)
    assert "<script>" not in found._repr_html_()
    assert "<b>" not in found._repr_html_()
    assert all(line.isprintable() for line in str(found).split("\n"))
    json.dumps(found.to_dict())


def test_a_whole_module_says_its_class() -> None:
    file = io.BytesIO()
    torch.save(nn.Sequential(nn.BatchNorm1d(2)), file)
    file.seek(0)
    assert "at the top: module torch.nn.modules.container.Sequential, 5 tensors, 9 elements" in str(inspect(file))


def test_vast_files_are_short_pages() -> None:
    found = inspect({f"{chr(97 + i % 26)}{i}.w": torch.ones(1) for i in range(5000)} | {f"x{i}": i for i in range(50)})
    assert len(str(found)) < 2500
    assert "(5,050 in all)" in str(found)


def test_nothing_is_kept_open() -> None:
    found = inspect(training_file())
    assert found.files == ()
    assert found.records == ()


def test_what_cannot_be_read_is_refused_as_in_a_load() -> None:
    with pytest.raises(UnreadableError, match="the file is empty"):
        inspect(io.BytesIO())
