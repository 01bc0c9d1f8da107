"""Which dicts of a file are state dicts, and how everything beside them is named."""

from __future__ import annotations

import argparse
import collections
from typing import Any

import pytest
import torch
from reading_tools import LEGACY, TWO_FLOATS, checkpoint_of, dict_of, floats, read, rebuilt, saved, text
from torch import nn

from smartload.errors import AmbiguousKeysError, UnreadableError
from smartload.pickles import contents as noted
from smartload.records.entries import Beside, Extra, Opaque, Span

T = torch.ones(2)


class Settings(dict[str, object]):
    pass


def parts_of(value: object) -> dict[str, list[str]]:
    found = read(saved(value)).parts
    assert {path: list(part.entries) for path, part in read(saved(value, **LEGACY)).parts.items()} == {
        path: list(part.entries) for path, part in found.items()
    }
    return {path: list(part.entries) for path, part in found.items()}


def problem_of(value: object) -> Any:
    with pytest.raises(UnreadableError) as caught:
        read(saved(value))
    assert "{" not in str(caught.value)
    return caught.value.problem


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ({"w": T}, {"": ["w"]}),
        ({}, {"": []}),
        ({"state_dict": {"w": T}}, {"state_dict": ["w"]}),
        ({"state_dict": {}}, {"state_dict": []}),
        ({"state_dict": {}, "model": {"w": T}}, {"model": ["w"]}),
        ({"a": {"b": {"c": {"d": {"w": T}}}}}, {"a.b.c.d": ["w"]}),
        ({"model": {"w": T}, "ema": {"w": T}}, {"model": ["w"], "ema": ["w"]}),
        ({"encoder": {"w": T}, "decoder": {"v": T}}, {"encoder": ["w"], "decoder": ["v"]}),
        ({"w": T, "inner": {"v": T}}, {"": ["w"], "inner": ["v"]}),
        ({"w": T, "epoch": 3}, {"": ["w", "epoch"]}),
        ({"w": T, "args": {"lr": 0.1}}, {"": ["w", "args"]}),
        ({"": T}, {"": [""]}),
        (Settings(w=T), {"": ["w"]}),
        ({"m": Settings(w=T)}, {"m": ["w"]}),
        (collections.defaultdict(list, w=T), {"": ["w"]}),
        ({"_extra_state": {"a": 1}}, {"": ["_extra_state"]}),
    ],
)
def test_state_dicts_are_found_under_names(value: object, parts: dict[str, list[str]]) -> None:
    assert parts_of(value) == parts


def test_five_levels_down_is_too_deep() -> None:
    value = {"w": {"v": T}, "a": {"b": {"c": {"d": {"e": {"w": torch.ones(1)}}}}}}
    checkpoint = read(saved(value))
    assert list(checkpoint.parts) == ["w"]
    assert checkpoint.aside == (Beside("a", "1 tensor in a dict of 1", 1),)


def test_everything_beside_is_named_once() -> None:
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(2))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    optimizer.step()
    value = {
        "state_dict": {"w": T}, "epoch": 3, "best": 0.5, "name": "x", "args": argparse.Namespace(a=1), "none": None,
        "optimizer": optimizer.state_dict(), "scheduler": {"last": {"deep": [1]}}, "history": [1, 2, 3],
        "more": [torch.ones(1), {"a": torch.ones(2)}], "numbers": {0: torch.ones(1)}, "one": {"deep": {1: 2}},
    }  # fmt: skip
    assert read(saved(value)).aside == (
        Beside("epoch", "an int"),
        Beside("best", "a float"),
        Beside("name", "a str"),
        Beside("args", "an argparse.Namespace"),
        Beside("none", "None"),
        Beside("optimizer", "an optimizer's state", 3),
        Beside("scheduler", "a dict of 1"),
        Beside("history", "a list of 3"),
        Beside("more", "2 tensors in a list of 2", 2),
        Beside("numbers", "1 tensor in a dict of 1", 1),
        Beside("one", "a dict of 1"),
    )


def test_no_tensor_is_dropped_in_silence() -> None:
    checkpoint = read(
        saved({"state_dict": {"w": T}, "args": argparse.Namespace(mean=torch.ones(3), deep=[{"std": torch.ones(1)}])})
    )
    assert checkpoint.aside == (Beside("args", "2 tensors in an argparse.Namespace", 2),)


def test_values_that_are_no_tensors_say_what_they_are() -> None:
    value = {"w": T, "i": 1, "s": "x", "l": [1], "n": None, "o": argparse.Namespace(), "d": {}, "z": (1, 2), "f": {1}}
    entries = read(saved(value)).parts[""].entries
    assert {key: entry.what for key, entry in entries.items() if isinstance(entry, Opaque)} == {
        "i": "an int", "s": "a str", "l": "a list of 1", "n": "None", "o": "an argparse.Namespace", "d": "a dict of 0",
        "z": "a tuple of 2", "f": "a set",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ([T], "a_list"),
        ([], "a_list"),
        (T, "bare_tensor"),
        (nn.Parameter(T), "bare_tensor"),
        (torch.optim.SGD([nn.Parameter(T)], lr=0.1).state_dict(), "optimizer"),
        (argparse.Namespace(a=1), "no_weights"),
        (argparse.Namespace(a=T), "out_of_reach"),
        ((T, T), "out_of_reach"),
        (3, "no_weights"),
        ("text", "no_weights"),
        (None, "no_weights"),
        ({"epoch": 3}, "no_weights"),
        ({"a": argparse.Namespace(a=T)}, "out_of_reach"),
        ({0: T}, "odd_keys"),
        ({"model": {b"w": T}}, "odd_keys"),
        ({("a", 1): T}, "odd_keys"),
    ],
)
def test_a_file_without_a_state_dict_says_what_it_is(value: object, kind: str) -> None:
    assert problem_of(value).kind == kind


def test_the_first_odd_key_is_shown() -> None:
    assert problem_of({0: T}).facts == {"type": "int", "key": "0"}
    assert problem_of({b"w\n": T}).facts == {"type": "bytes", "key": "b'w\\n'"}


def test_odd_keys_beside_a_state_dict_are_set_aside() -> None:
    assert read(saved({"model": {"w": T}, "lookup": {0: torch.ones(1)}})).aside == (
        Beside("lookup", "1 tensor in a dict of 1", 1),
    )


@pytest.mark.parametrize("form", [{}, LEGACY, {"pickle_protocol": 4}])
def test_versions_are_all_that_survives_of_the_metadata(form: dict[str, Any]) -> None:
    # T3.
    state: Any = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1)).state_dict()
    state._metadata[""]["assign_to_params_buffers"] = True
    assert read(saved(state, **form)).parts[""].metadata == {
        "": {"version": 1},
        "0": {"version": 2},
        "1": {"version": 1},
    }


@pytest.mark.parametrize(
    "bad", [3, [], {"": 3}, {"": {"version": "2"}}, {"": {"version": True}}, {3: {"version": 1}}, {"": None}]
)
def test_metadata_of_wrong_types_is_ignored(bad: object) -> None:
    state: Any = collections.OrderedDict(w=T)
    state._metadata = bad
    assert not read(saved(state)).parts[""].metadata


def test_a_plain_dict_has_no_metadata() -> None:
    assert read(saved({"w": T})).parts[""].metadata is None


def test_a_file_cannot_shadow_the_methods_of_a_dict() -> None:
    state = b"ccollections\nOrderedDict\n)R" + text("a") + rebuilt(floats()) + b"s}" + text("items") + b"K\x03sb."
    assert list(read(checkpoint_of(b"\x80\x02" + state, d0=TWO_FLOATS)).parts[""].entries) == ["a"]


@pytest.mark.parametrize("form", [{}, LEGACY, {"pickle_protocol": 4}, {"pickle_protocol": 5}])
def test_an_extra_state_is_plain_data_again(form: dict[str, Any]) -> None:
    shared: list[object] = [1, "a"]
    tree = {
        "list": [1, 2.5, None, True, shared, shared], "tuple": (1, (2,)), "bytes": b"\x00\xff", 3: "odd", "set": {1, 2},
        "ordered": collections.OrderedDict(b=1, a=2), "big": 2**100, "empty": b"",
    }  # fmt: skip
    entry = read(saved({"w": T, "sub._extra_state": tree}, **form)).parts[""].entries["sub._extra_state"]
    assert isinstance(entry, Extra)
    found: Any = entry.tree
    assert found == tree
    assert type(found["ordered"]) is collections.OrderedDict
    assert found["list"][4] is found["list"][5]


def test_tensors_in_an_extra_state_are_spans() -> None:
    entries = read(saved({"_extra_state": {"scale": T, "more": [T]}, "x._extra_state": T})).parts[""].entries
    tree: Any = entries["_extra_state"].tree  # type: ignore[union-attr]
    assert isinstance(tree["scale"], Span)
    assert isinstance(tree["more"][0], Span)
    assert isinstance(entries["x._extra_state"].tree, Span)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "tree", [argparse.Namespace(), [argparse.Namespace()], {"a": torch.eye(2).to_sparse()}, {(1,): 2}, print]
)
def test_an_extra_state_of_foreign_things_is_named(tree: object) -> None:
    assert isinstance(read(saved({"w": T, "_extra_state": tree})).parts[""].entries["_extra_state"], Opaque)


def test_an_extra_state_that_contains_itself_is_named() -> None:
    loop: list[object] = []
    loop.append([[loop]])
    assert isinstance(read(saved({"w": T, "_extra_state": loop})).parts[""].entries["_extra_state"], Opaque)


def test_a_key_given_twice_is_refused() -> None:
    data = dict_of(a=rebuilt(floats())).removesuffix(b"u.") + text("a") + rebuilt(floats()) + b"u."
    with pytest.raises(UnreadableError, match="'a' twice"):
        read(checkpoint_of(data, d0=TWO_FLOATS))


def test_two_dicts_of_one_path_are_two_answers() -> None:
    with pytest.raises(AmbiguousKeysError, match=r"two of its dicts have the same dotted path 'a\.b'"):
        read(saved({"a.b": {"w": T}, "a": {"b": {"v": T}}}))


def test_keys_may_be_any_text() -> None:
    # Pitfall 15.
    odd = ["\x1b[31mred", "new\nline", "\u202ebidi", "\ud800", "k" * 1_000_000, "ключ"]
    assert parts_of(dict.fromkeys(odd, T)) == {"": odd}
    checkpoint = read(saved({"m": {"w": T}, "\x1b[31m\n": 3}))
    assert checkpoint.aside[0].path.isprintable()


def test_a_large_thing_beside_is_no_reason_to_refuse() -> None:
    vocabulary = {f"word{i}": i for i in range(300_000)}
    checkpoint = read(saved({"state_dict": {"w": T}, "vocabulary": vocabulary}))
    assert checkpoint.aside == (Beside("vocabulary", "a dict of 300,000"),)


def test_a_web_of_dicts_is_given_up_early() -> None:
    leaf: Any = {"x": [1]}
    for _ in range(3):
        leaf = {str(i): leaf for i in range(1000)}
    with pytest.raises(UnreadableError, match="refer to each other"):
        read(saved(leaf))


def test_a_dict_that_contains_itself_ends() -> None:
    loop: dict[str, object] = {"w": T}
    loop["self"] = loop
    assert next(iter(read(saved(loop)).parts[""].entries)) == "w"
    bare: dict[str, object] = {}
    bare["self"] = bare
    with pytest.raises(UnreadableError):
        read(saved(bare))


def test_one_ranks_piece_of_zero_is_named() -> None:
    """What DeepSpeed writes beside the weights: partitions of the optimizer, without names."""
    for groups in ("single_partition_of_fp32_groups", "fp32_flat_groups"):
        state = {
            "zero_stage": 2,
            "partition_count": 2,
            groups: [T],
            "base_optimizer_state": {"state": {0: {"step": T}}},
        }
        problem = problem_of({"optimizer_state_dict": state, "ds_config": {}, "ds_version": "0.14.0"})
        assert problem.kind == "zero"


def test_a_module_under_many_names_is_walked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    walks = []
    original = noted.module_part
    monkeypatch.setattr(noted, "module_part", lambda *args: walks.append(1) or original(*args))
    net = nn.Linear(2, 2)
    assert read(saved({"a": net, "b": net, "c": {"d": net}})).parts.keys() == {"a", "b", "c.d"}
    assert len(walks) == 1
