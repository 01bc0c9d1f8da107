"""Errors: data in the exception, words from one place, and every one survives pickling."""

from __future__ import annotations

import ast
import copy
import pickle
from pathlib import Path
from string import Formatter
from typing import get_args

import pytest
import torch
from torch import nn

import smartload
from smartload.errors import sentences
from smartload.records.entries import TensorSpec
from smartload.records.problems import Ambiguity, Kind, Mismatch, Problem

CHILDREN = [
    getattr(smartload, name)
    for name in smartload.__all__
    if isinstance(getattr(smartload, name), type) and issubclass(getattr(smartload, name), Exception)
]
TABLES = sentences.SENTENCES


@pytest.mark.parametrize("kind", CHILDREN, ids=lambda kind: kind.__name__)
def test_every_error_is_a_smart_load_error_and_survives_copies(kind: type[smartload.SmartLoadError]) -> None:
    error = kind(Problem("select", "a.pt", {"select": "ema", "parts": ("model",)}))
    for again in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(again) is kind
        assert again.problem == error.problem
        assert (
            str(again)
            == str(error)
            == ("a.pt: there is no 'ema' in the file. It holds: model. Write one of these as select=...")
        )
    assert issubclass(kind, RuntimeError)


@pytest.mark.parametrize("kind", sorted(TABLES))
def test_no_message_recommends_less_safety_or_less_strictness(kind: str) -> None:
    sentence = TABLES[kind]
    assert "weights_only=False" not in sentence
    assert "strict=False" not in sentence
    assert sentence.rstrip().endswith((".", "}", "that path).", "..."))


@pytest.mark.parametrize("kind", sorted(TABLES))
def test_every_sentence_can_be_filled(kind: str) -> None:
    fields = [(name.partition("!")[0], form) for _, name, form, _ in Formatter().parse(TABLES[kind]) if name]
    facts: dict[str, object] = {name: 3 if form else f"<{name}>" for name, form in fields}
    facts |= {"type": "cuda", "count": 1, "torch": "2", "where": "", "source": "float16", "device": "cuda:9"}
    text = sentences.words(Problem(kind, "f.pt", facts))
    assert text.startswith("f.pt: ")
    assert "{" not in text.replace("{'", "").replace("{...", "")


def test_children_are_also_what_python_calls_them() -> None:
    assert issubclass(smartload.CheckpointNotFoundError, FileNotFoundError)
    assert issubclass(smartload.PlacementError, ValueError)
    assert issubclass(smartload.ShapeMismatchError, smartload.KeyMismatchError)
    assert issubclass(smartload.UnsafeCheckpointError, smartload.UnreadableError)


def test_mismatch_says_what_where_how_close_and_what_to_write() -> None:
    spec = TensorSpec((10, 512), "float32")
    problem = Mismatch(
        model="ResNet",
        path="best.pt",
        part="",
        rule="removed 'module.'",
        paired=318,
        wanted=320,
        missing={"fc.weight": spec, "fc.bias": TensorSpec((10,), "float32")},
        unexpected={"head.weight": spec, "head.bias": TensorSpec((10,), "float32")},
        hints=("rename={'head': 'fc'}",),
    )
    assert sentences.words(problem) == (
        "The keys have the prefix 'module.' of DataParallel, and one layer differs: fc in the model "
        "is head in the file.\n"
        "318 of 320 keys of ResNet are in best.pt (after: removed 'module.')\n"
        "  missing:    fc.weight [10, 512], fc.bias [10]\n"
        "  unexpected: head.weight [10, 512], head.bias [10]\n"
        "write rename={'head': 'fc'}"
    )


def test_ambiguity_names_the_answers_and_the_arguments() -> None:
    problem = Ambiguity("Net", "run.pt", (("4 keys of 'model'", "select='model'"), ("4 keys of 'ema'", "select='ema'")))
    assert sentences.words(problem) == (
        "run.pt is ambiguous: 2 parts fit Net, and they differ:\n"
        "  4 keys of 'model': write select='model'\n"
        "  4 keys of 'ema': write select='ema'"
    )


def test_eight_hundred_keys_are_folded() -> None:
    names = {f"layers.{i}.attn.{leaf}": TensorSpec((1,), "float32") for i in range(400) for leaf in ("weight", "bias")}
    text = sentences.words(Mismatch("Net", "x.pt", "", "", 0, 800, missing=names, unexpected=names))
    assert "layers.{0...399}.attn.weight" in text
    assert len(text) < 600


def test_a_file_cannot_write_lines_into_a_message(tmp_path: Path) -> None:
    evil = "\x1b[31mred\nsmartload: all good\u202e"
    torch.save({evil: torch.ones(1), "x" * 10_000: torch.ones(1)}, tmp_path / "evil.pt")
    with pytest.raises(smartload.KeyMismatchError) as caught:
        smartload.smart_load(nn.Linear(1, 1), tmp_path / "evil.pt")
    text = str(caught.value)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert not any(line.startswith("smartload: all good") for line in text.splitlines())
    assert len(text) < 2000


def _raised() -> list[tuple[str, str, set[str] | None]]:
    """Every `Problem("kind", path, {facts})` of the source: where, its kind, and the facts where they are literal."""
    found: list[tuple[str, str, set[str] | None]] = []
    for path in sorted(Path(smartload.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Problem"):
                continue
            if not (node.args and isinstance(node.args[0], ast.Constant)):
                continue
            given = [*node.args[2:3], *(word.value for word in node.keywords if word.arg == "facts")]
            keys: set[str] | None = set()
            if given:
                literal = isinstance(given[0], ast.Dict) and all(isinstance(k, ast.Constant) for k in given[0].keys)
                keys = {k.value for k in given[0].keys if isinstance(k, ast.Constant)} if literal else None
            found.append((f"{path.name}:{node.lineno}", str(node.args[0].value), keys))
    return found


@pytest.mark.parametrize(
    ("where", "kind", "facts"), _raised(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_is_raised_has_words_and_the_facts_for_them(where: str, kind: str, facts: set[str] | None) -> None:
    assert kind in TABLES, where
    if facts is not None:
        needed = {name.partition("!")[0] for _, name, _, _ in Formatter().parse(TABLES[kind]) if name}
        assert needed <= facts | {"source_dtype"}, where


def test_every_kind_has_one_sentence_and_every_sentence_a_kind() -> None:
    """The type checker holds every use of a kind, literal or not, against `Kind`; here `Kind` meets the tables."""
    assert set(get_args(Kind)) - set(TABLES) == set(), "a kind without a sentence"
    assert set(TABLES) - set(get_args(Kind)) == set(), "a sentence of a kind that is not in Kind"
    tables = (sentences.FILES, sentences.NAMES, sentences.PLACES, sentences.WRITING, sentences.CAUSES)
    assert sum(map(len, tables)) == len(TABLES)


def test_no_sentence_is_spare() -> None:
    """Every kind stands as a literal somewhere beside the tables: in a call, or where a variable gets its value."""
    package = Path(smartload.__file__).parent
    own = {package / "records" / "problems.py", package / "errors" / "sentences.py"}
    used = set[str]()
    for path in {*package.rglob("*.py")} - own:
        used |= {
            node.value
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant)
        }
    assert [kind for kind in TABLES if kind not in used] == []


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (Problem("typo", "f.pt"), "f.pt: refused (typo)."),  # type: ignore[arg-type]
        (Problem("shorter", "f.pt", {"have": 1}), "f.pt: refused (shorter: have=1)."),
        (Problem("absent-device", facts={"type": "cuda"}), "refused (absent-device: type='cuda')."),
        (Problem("crc", "f.pt", {"nam\x1b": "x" * 500}), "f.pt: refused (crc: nam\\x1b='" + "x" * 96 + "...)."),
    ],
)
@pytest.mark.says_no_sentence
def test_a_refusal_without_its_sentence_still_says_kind_and_facts(problem: Problem, text: str) -> None:
    error = smartload.UnreadableError(problem)
    assert str(error) == text
    assert str(pickle.loads(pickle.dumps(error))) == text
