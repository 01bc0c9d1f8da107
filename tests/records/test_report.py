"""The report: what it tells, as words, as data, as html."""

from __future__ import annotations

import json
import logging
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from smartload import LoadReport, check, smart_load


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.fixture
def training_checkpoint(tmp_path: Path) -> Path:
    net = network()
    path = tmp_path / "best.pt"
    state = {f"module.{key}": value.half() if "0." in key else value for key, value in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters()).state_dict()
    torch.save({"epoch": 7, "loss": torch.tensor(0.1), "state_dict": state, "optimizer": optimizer}, path)
    return path


def words(report: object) -> str:
    return re.sub(r"\d\.\d\d s", "N s", str(report))


def test_nothing_adapted_is_one_line(tmp_path: Path) -> None:
    net = network()
    torch.save(net.state_dict(), tmp_path / "plain.pt")
    report = smart_load(network(), tmp_path / "plain.pt")
    assert words(report) == "loaded 9 tensors of plain.pt (torch zip) into Sequential on cpu: 176 bytes in N s"


def test_everything_adapted_is_told(training_checkpoint: Path) -> None:
    report = smart_load(network(), training_checkpoint)
    assert words(report) == "\n".join(
        [
            "loaded 9 tensors of best.pt (torch zip) into Sequential on cpu: 144 bytes in N s",
            "  part:      state_dict",
            "  names:     removed 'module.'",
            "             state_dict.module.0.weight -> 0.weight",
            "  ignored:   epoch, loss: another part of the file",
            "  beside:    optimizer: an optimizer's state",
            "  cast:      float16 -> float32: 0.weight, 0.bias",
        ]
    )


def test_it_unpacks_like_torchs_result(training_checkpoint: Path) -> None:
    report = smart_load(
        nn.Sequential(*network()[:2], nn.Linear(4, 3)),
        training_checkpoint,
        allow_missing=["2.*"],
        allow_unexpected=["module.2.*"],
    )
    missing, unexpected = report
    assert missing == report.missing_keys == report[0] == ["2.weight", "2.bias"]
    assert unexpected == report.unexpected_keys == report[1]
    assert sorted(unexpected) == ["state_dict.module.2.bias", "state_dict.module.2.weight"]
    assert len(report) == 2
    assert "missing:   2.weight, 2.bias: allowed, the model keeps its own" in str(report)
    assert "left out:  " in str(report)


def test_mapping_goes_from_the_file_to_the_model(training_checkpoint: Path) -> None:
    report = smart_load(network(), training_checkpoint)
    assert report.mapping["state_dict.module.0.weight"] == "0.weight"
    assert list(report.plan.pairs) == list(network().state_dict())


def test_plain_data_is_json_and_whole(training_checkpoint: Path) -> None:
    report = smart_load(network(), training_checkpoint, verify=True)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["plan"]["rule"] == "removed 'module.'"
    assert data["plan"]["pairs"]["2.bias"] == "state_dict.module.2.bias"
    assert data["plan"]["ignored"] == [{"key": key, "reason": "another part of the file"} for key in ("epoch", "loss")]
    assert data["casts"] == [{"source": "float16", "target": "float32", "keys": ["0.weight", "0.bias"]}]
    assert data["aside"][0]["path"] == "optimizer"
    assert (data["format"], data["device"], data["undo"], data["verified"]) == ("torch zip", "cpu", True, True)


def test_html_has_one_row_for_each_label(training_checkpoint: Path) -> None:
    page = smart_load(network(), training_checkpoint)._repr_html_()
    labels = re.findall(r"<th[^>]*>(.*?)</th>", page)
    assert labels == list(dict.fromkeys(labels))
    assert {"part", "names", "ignored", "beside", "cast"} <= set(labels)
    assert "removed &#x27;module.&#x27;<br>state_dict.module.0.weight -&gt; 0.weight" in page


def test_html_escapes_what_a_file_says() -> None:
    report = smart_load(nn.Linear(1, 1), {"<script>": nn.Linear(1, 1).state_dict()})
    page = report._repr_html_()
    assert page.startswith("<table>")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_success_is_one_info_record_and_no_print(
    training_checkpoint: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, logger="smartload"):
        report = smart_load(network(), training_checkpoint)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("INFO", str(report))]
    assert capsys.readouterr() == ("", "")


def test_plan_says_what_would_be_done(training_checkpoint: Path) -> None:
    net = network()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    plan = check(net, training_checkpoint)
    assert str(plan).startswith("best.pt fits Sequential: 9 of 9 keys (removed 'module.'; from 'state_dict')")
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_report_survives_pickling(training_checkpoint: Path) -> None:
    report = smart_load(network(), training_checkpoint)
    again = pickle.loads(pickle.dumps(report))
    assert isinstance(again, LoadReport)
    assert str(again) == str(report)


def test_tied_names_share_one_name_of_the_file() -> None:
    net = nn.ModuleDict({"embed": nn.Embedding(4, 2), "head": nn.Linear(2, 4, bias=False)})
    net["head"].weight = net["embed"].weight
    report = smart_load(net, {"embed.weight": torch.arange(8.0).view(4, 2)})
    assert report.plan.pairs == {"embed.weight": "embed.weight", "head.weight": "embed.weight"}
    assert report.mapping == {"embed.weight": "embed.weight"}
