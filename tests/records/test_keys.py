"""How names are written: whole segments, wrappers, renames."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartload.records.keys import (
    Renames,
    WrapperStripper,
    ancestors,
    common_path,
    join,
    leaf,
    only_child_wrappers,
    parent,
    without_prefix,
    without_wrappers,
)
from smartload.records.wrappers import SEGMENTS


def test_parts_of_a_name() -> None:
    assert join("a", "", "b.c") == "a.b.c"
    assert (parent("a.b.c"), leaf("a.b.c"), parent("c"), leaf("c")) == ("a.b", "c", "", "c")
    assert list(ancestors("a.b.c")) == ["a.b.c", "a.b", "a", ""]


@pytest.mark.parametrize(
    ("name", "prefix", "rest"),
    [
        ("a.b", "a", "b"),
        ("a.b", "", "a.b"),
        ("ab.c", "a", None),
        ("a", "a", None),
        ("a..b", "a", ".b"),
        ("a.b", "a.b", None),
    ],
)
def test_below_is_about_whole_segments(name: str, prefix: str, rest: str | None) -> None:
    assert without_prefix(name, prefix) == rest


@pytest.mark.parametrize(
    ("names", "path"),
    [
        ([], ""),
        (["a.b.w"], "a.b"),
        (["a.b.w", "a.c.w"], "a"),
        (["a.w", "a-b.w", "a.c.w"], ""),
        (["a.b.w", "a.b-c.w", "a.b.c.w"], "a"),
        (["w", "a.w"], ""),
        (["ab.w", "ac.w"], ""),
    ],
)
def test_common_path(names: list[str], path: str) -> None:
    assert common_path(names) == path


segments = st.sampled_from(["a", "a-", "b", "module", "a.b"])


@given(st.lists(st.lists(segments, min_size=1, max_size=4).map(".".join), max_size=5))
def test_common_path_is_the_longest_that_all_have(names: list[str]) -> None:
    paths = [set(ancestors(parent(name))) for name in names]
    shared = set.intersection(*paths) if paths else {""}
    assert common_path(names) == max(shared, key=len)


@pytest.mark.parametrize("segment", sorted(SEGMENTS))
def test_wrapper_segments_are_seen_through_anywhere(segment: str) -> None:
    see = WrapperStripper(["", "a", "a.b"])
    for name in (f"{segment}.a.b.w", f"a.{segment}.b.w", f"a.b.{segment}.w", f"{segment}.{segment}.a.b.w"):
        assert see.strip(name) == "a.b.w"
        assert without_wrappers(name) == "a.b.w"
    assert see.strip(segment) == segment
    assert see.strip(f"a.{segment}") == f"a.{segment}"
    assert without_wrappers(f"a.{segment}") == f"a.{segment}"
    assert see.strip(f"x.{segment}.y.w") == "x.y.w"
    assert see.strip(f"a.b.my{segment}.w") == f"a.b.my{segment}.w"
    assert WrapperStripper(["", segment]).strip(f"{segment}.w") == f"{segment}.w"
    assert WrapperStripper(["", segment]).strip(f"{segment}.{segment}.w") == f"{segment}.w"


def test_an_only_child_where_the_model_has_several_is_a_wrapper() -> None:
    names = ["a.module.module.w", "a.module.fc.w", "b.w"]
    only = only_child_wrappers(names, 5)
    assert only == {"a.module"}
    see = WrapperStripper(["", "a", "a.module", "a.fc", "b"], only, frozenset({"a"}))
    assert [see.strip(name) for name in names] == ["a.module.w", "a.fc.w", "b.w"]
    assert only_child_wrappers(["n_averaged", "module.w"], 5) == {"module"}
    assert only_child_wrappers(["module.w", "w"], 5) == frozenset()


def test_renames_take_the_longest_prefix_of_whole_segments() -> None:
    renames = Renames({"a": "x", "a.b": "y", "c.": "z."})
    assert renames.prefix("a.b.w") == ("y.w", "a.b")
    assert renames.prefix("a.c.w") == ("x.c.w", "a")
    assert renames.prefix("ab.w") == ("ab.w", None)
    assert renames.prefix("c.w") == ("z.w", "c")
    assert renames.prefix("a.b") == ("y", "a.b")
    assert renames.unused({"a", "c"}) == ["a.b"]
    assert Renames({"": "m"}).prefix("a.w") == ("m.a.w", "")
    assert Renames({"a": ""}).prefix("a..w") == (".w", "a")
    assert not Renames(None)
    assert not Renames({})
    assert Renames(str.upper).whole("a") == ("A", "the function")
    assert Renames(str.lower).whole("a") == ("a", None)
