"""The words of refusals about names: what, where, how close, what to write; whole messages, as they are printed."""

from __future__ import annotations

import pytest
import torch
from naming import matched, model_keys
from torch import nn

from smartload import KeyMismatchError, smart_load

GOLDEN = {
    "a renamed head": (
        " ".join(f"layer{i}.{j}.conv.weight:8x8" for i in range(4) for j in range(3)) + " fc.weight:10x8 fc.bias:10",
        " ".join(f"module.layer{i}.{j}.conv.weight:8x8" for i in range(4) for j in range(3))
        + " module.head.weight:10x8 module.head.bias:10",
        """
The keys have the prefix 'module.' of DataParallel, and one layer differs: fc in the model is head in the file.
12 of 14 keys of Net are in f.pt (after: removed 'module.')
  missing:    fc.weight [10, 8], fc.bias [10]
  unexpected: head.weight [10, 8], head.bias [10]
write rename={'head': 'fc'} or allow_missing=['fc.*'], allow_unexpected=['head.*'] \
(what is missing stays as initialised)""",
    ),
    "another number of classes": (
        "body.weight:8x8 fc.weight:10x8 fc.bias:10",
        "body.weight:8x8 fc.weight:1000x8 fc.bias:1000",
        """
fc has 10 classes in the model, 1,000 in the file.
1 of 3 keys of Net are in f.pt
  shapes:     fc.weight [1000, 8] in the file, [10, 8] in the model; fc.bias [1000] in the file, [10] in the model
write allow_missing=['fc.*'], allow_unexpected=['fc.*'] (what is missing stays as initialised)""",
    ),
    "a deeper network": (
        " ".join(f"layers.{i}.attn.weight" for i in range(24)),
        " ".join(f"layers.{i}.attn.weight" for i in range(12)),
        """
12 of 24 keys of Net are in f.pt
  missing:    12: layers.{12...23}.attn.weight""",
    ),
    "another network": (
        " ".join(f"layers.{i}.attn.weight" for i in range(24)),
        " ".join(f"blocks.{i}.mlp.weight" for i in range(24)),
        """
Another architecture: no name in common.
0 of 24 keys of Net are in f.pt
  missing:    24: layers.{0...23}.attn.weight
  unexpected: 24: blocks.{0...23}.mlp.weight""",
    ),
    "a few names by chance": (
        " ".join(f"layers.{i}.attn.weight" for i in range(24)) + " norm.weight norm.bias",
        " ".join(f"blocks.{i}.mlp.weight" for i in range(24)) + " norm.weight norm.bias",
        """
Another architecture: 2 of 26 names in common.
2 of 26 keys of Net are in f.pt
  missing:    24: layers.{0...23}.attn.weight
  unexpected: 24: blocks.{0...23}.mlp.weight""",
    ),
    "three renamed layers": (
        "stem.conv.weight:8x3 stem.norm.weight:8 body.0.weight:8x8 body.1.weight:8x8 head.weight:2x8 head.bias:2",
        "conv1.conv.weight:8x3 conv1.norm.weight:8 trunk.0.weight:8x8 trunk.1.weight:8x8 head.weight:2x8 head.bias:2",
        """
2 of 6 keys of Net are in f.pt
  missing:    4: stem.conv.weight, stem.norm.weight, body.{0...1}.weight
  unexpected: 4: conv1.conv.weight, conv1.norm.weight, trunk.{0...1}.weight
write rename={'conv1': 'stem', 'trunk': 'body'}""",
    ),
    "another width": (
        "a.weight:8x8 b.weight:8x8",
        "a.weight:16x16 b.weight:16x16",
        """
The same names, but every shape differs: the model was built with another configuration (width, number of classes).
0 of 2 keys of Net are in f.pt
  shapes:     a.weight [16, 16] in the file, [8, 8] in the model; b.weight [16, 16] in the file, [8, 8] in the model""",
    ),
    "another vocabulary": (
        "embed.weight:100x8 body.weight:8x8",
        "module.embed.weight:128x8 module.body.weight:8x8",
        """
The keys have the prefix 'module.' of DataParallel, and embed has 100 rows in the model, 128 in the file.
1 of 2 keys of Net are in f.pt (after: removed 'module.')
  shapes:     embed.weight [128, 8] in the file, [100, 8] in the model
write allow_missing=['embed.weight'], allow_unexpected=['embed.weight'] (what is missing stays as initialised)""",
    ),
    "the backbone alone": (
        "backbone.conv.weight:8x8 backbone.conv.bias:8 head.weight:2x8 head.bias:2 neck.weight:2",
        "conv.weight:8x8 conv.bias:8",
        """
0 of 5 keys of Net are in f.pt
  missing:    backbone.conv.weight, backbone.conv.bias, head.weight, ... (5 in all)
  unexpected: conv.weight [8, 8], conv.bias [8]
write smart_load(model.backbone, path) or allow_missing=['head.*', 'neck.*'] (what is missing stays as initialised)""",
    ),
    "one layer of a list": (
        "layers.0.weight:4 layers.0.bias:4 layers.1.weight:4 layers.1.bias:5 head.weight:2",
        "model.weight:4 model.bias:5",
        """
0 of 5 keys of Net are in f.pt
  missing:    5: layers.{0...1}.weight, layers.{0...1}.bias, head.weight
  unexpected: model.weight [4], model.bias [5]
write smart_load(model.get_submodule('layers.1'), path)""",
    ),
    "counters of batch norm, which say nothing": (
        "a.weight a.num_batches_tracked b.weight b.num_batches_tracked c.weight c.num_batches_tracked",
        "a.weight b.weight",
        """
2 of 6 keys of Net are in f.pt
  missing:    c.weight, a.num_batches_tracked, b.num_batches_tracked, ... (4 in all)""",
    ),
    "in a dict, with a prefix": (
        "fc.weight fc.bias",
        {"state_dict": "net.fc.weight"},
        """
One layer differs: fc.
1 of 2 keys of Net are in f.pt, part 'state_dict' (after: removed 'net.')
  missing:    fc.bias [2]
write allow_missing=['fc.bias'] (what is missing stays as initialised)""",
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_whole_messages(case: str) -> None:
    model, file, words = GOLDEN[case]
    with pytest.raises(KeyMismatchError) as caught:
        matched(model, file)  # type: ignore[arg-type]
    assert f"\n{caught.value}" == words


def test_eight_thousand_wrong_keys_are_a_few_lines() -> None:
    model = model_keys(" ".join(f"layers.{i}.{'abcdefgh'[i % 8]}.weight{i % 5}" for i in range(8000)))
    file = " ".join(f"blocks.{i}.{'abcdefgh'[i % 8]}.w{i % 7}" for i in range(8000))
    with pytest.raises(KeyMismatchError) as caught:
        matched(model, file)
    assert str(caught.value).count("\n") <= 5
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "key", ["\x1b[2J", "a\nb", "x\u202ey", "half\udc80", "", ".", "..", "a..b", "x" * 10_000, "{0}", "%s", "[*"]
)
def test_keys_that_would_do_harm_on_a_terminal_are_escaped(key: str) -> None:
    net = nn.Linear(2, 2)
    for state in (
        {**net.state_dict(), key: torch.ones(3)},
        {f"{key}.{k}": v + 1 for k, v in net.state_dict().items()} | {key + ".z": torch.ones(1)},
    ):
        with pytest.raises(KeyMismatchError) as caught:
            smart_load(net, state)
        assert all(line.isprintable() for line in str(caught.value).split("\n"))
        assert len(str(caught.value)) < 2000
        str(caught.value).encode()


def test_a_prefix_with_such_characters_is_escaped_in_the_report() -> None:
    net = nn.Linear(2, 2)
    report = smart_load(net, {f"\x1b[2J\n.{key}": value for key, value in net.state_dict().items()})
    assert all(line.isprintable() for line in str(report).split("\n"))
    assert all(line.isprintable() for line in str(report.plan).split("\n"))


def test_a_backbone_saved_by_itself_is_recognised() -> None:
    body = [f"layers.{i}.w" for i in range(3)]
    model = model_keys(" ".join([*(f"bert.{name}" for name in body), "classifier.weight", "classifier.bias"]))
    with pytest.raises(KeyMismatchError, match=r"allow_missing=\['classifier\.\*'\]"):
        matched(model, " ".join(body))
    assert len(matched(model, " ".join(body), allow_missing=("classifier.*",)).pairs) == 3
