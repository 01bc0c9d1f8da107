"""Rules "Pickle VM (inert)" of the reading rules, and the pitfalls of pickles."""

from __future__ import annotations

import collections
import contextlib
import datetime
import pickle
import pickletools
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reading_tools import watched

from smartload.errors import UnreadableError, UnsafeCheckpointError
from smartload.pickles.inert import Call, DictNote, Global, PersistentId, RawBytes, SetNote, Short, parse


def value(data: bytes) -> Any:
    return parse(data, 0, "file")[0]


def plain(found: Any) -> Any:
    """Notes of plain containers as the containers themselves."""
    if type(found) is DictNote:
        return {key: plain(item) for key, item in found.data.items()} | {
            plain(k): plain(v) for k, v in found.pairs or ()
        }
    if type(found) is RawBytes:
        return bytearray(found.raw) if found.mutable else bytes(found.raw)
    if type(found) is SetNote:
        return {plain(item) for item in found.items}
    if type(found) in (list, tuple):
        return type(found)(plain(item) for item in found)
    if type(found) is Call and type(found.func) is Global and found.func.name in ("set", "frozenset"):
        return set(found.args[0])
    if type(found) is Call and type(found.func) is Global and found.func.name == "encode":
        return found.args[0].encode(found.args[1])
    if type(found) is Call and type(found.func) is Global and found.func.name == "bytes" and not found.args:
        return b""
    if type(found) is Call and type(found.func) is Global and found.func.name == "bytearray":
        return bytearray(plain(found.args[0]) if found.args else b"")
    return found


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.binary().map(bytearray)
)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.sets(st.integers())
    ),
    max_leaves=20,
)


@pytest.mark.parametrize("protocol", range(6))
@given(tree=TREES)
def test_plain_data_comes_back_in_every_protocol(protocol: int, tree: object) -> None:
    assert plain(value(pickle.dumps(tree, protocol))) == tree


@given(tree=TREES)
def test_the_python_pickler_counts_its_memo_the_same_way(tree: object) -> None:
    # Pitfall 1: FRAME and MEMOIZE differ between the two picklers of Python.
    assert plain(value(pickletools.optimize(pickle.dumps(tree, 4)))) == tree
    assert plain(value(pickle._dumps(tree, 4))) == tree  # type: ignore[attr-defined]


@given(data=st.binary(max_size=60))
def test_any_bytes_give_a_value_or_a_typed_error(data: bytes) -> None:
    for start in (b"", b"\x80\x04", b"(]}", b"cos\nsystem\n"):
        with contextlib.suppress(UnreadableError):
            value(start + data)


@given(tree=TREES, cut=st.integers(0, 10_000))
def test_a_pickle_cut_short_asks_for_more(tree: object, cut: int) -> None:
    data = pickle.dumps(tree, 4)
    part = data[: cut % len(data)]
    with pytest.raises(Short):
        parse(part, 0, "file", whole=False)
    with pytest.raises(UnreadableError):
        parse(part, 0, "file")


class Gadget:
    def __init__(self, how: Any) -> None:
        self.how = how

    def __reduce__(self) -> Any:
        return self.how


def test_nothing_is_imported_or_called() -> None:
    import os

    data = pickle.dumps([Gadget((os.system, ("true",))), Gadget((eval, ("1/0",))), Gadget((print, ("x",)))], 2)
    data += b"" if data.endswith(b".") else b"."
    for body in (data, b"cno.such.module\nname\n.", b"(S'true'\nios\nsystem\n.", b"(cos\nsystem\nS'true'\no."):
        with watched() as seen:
            value(body)
        assert seen == []


@pytest.mark.parametrize(
    ("data", "func", "args"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "system", ("true",)),
        (b"(S'true'\nios\nsystem\n.", "system", ("true",)),
        (b"(cos\nsystem\nS'true'\no.", "system", ("true",)),
        (b"cos\nsystem\nS'true'\n\x85\x81.", "system", ("true",)),
        (b"\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.", "system", ("true",)),
        (b"\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85}\x92.", "system", ("true",)),
        (b"\x82\x07).", None, None),
    ],
)
def test_every_call_is_only_noted(data: bytes, func: str | None, args: object) -> None:
    with watched() as seen:
        found = value(data)
    assert seen == []
    if func:
        assert type(found) is Call
        assert type(found.func) is Global
        assert found.func.name == func
        assert found.args == args


@pytest.mark.parametrize("data", [b"\x82\x07.", b"\x83\x07\x00.", b"\x84\x07\x00\x00\x00."])
def test_extension_codes_never_ask_the_registry(data: bytes) -> None:
    import copyreg

    copyreg.add_extension("os", "system", 7)
    try:
        found = value(data)
    finally:
        copyreg.remove_extension("os", "system", 7)
    assert (type(found), found.module, found.name) == (Global, "copyreg extension", "7")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.", "unsafe_build"),
        (b"csys\nmodules\nX\x01\x00\x00\x00aK\x01s.", "unsafe_item"),
        (b"csys\nmodules\n(X\x01\x00\x00\x00aK\x01u.", "unsafe_item"),
        (b"csys\npath\nX\x01\x00\x00\x00aa.", "unsafe_item"),
        (b"csys\npath\n(X\x01\x00\x00\x00ae.", "unsafe_item"),
        (b"cbuiltins\nset\n(K\x01\x90.", "unsafe_item"),
    ],
)
def test_what_is_only_named_cannot_be_changed(data: bytes, kind: str) -> None:
    with pytest.raises(UnsafeCheckpointError) as caught:
        value(data)
    assert caught.value.problem.kind == kind  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "data", [b"]}b.", b"N}b.", b"K\x01}b.", b"(I1\nt}b.", b"]K\x00K\x01s.", b"}K\x01a.", b"]K\x01\x90."]
)
def test_plain_values_take_only_what_is_theirs(data: bytes) -> None:
    with pytest.raises(UnreadableError):
        value(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"0.",
        b"R.",
        b"(.",
        b"(0.0.",
        b"((1.1.",
        b"1.",
        b"t.",
        b"u.",
        b"e.",
        b"q\x00.",
        b"(q\x00.",
        b"h\x00.",
        b"2.",
        b"(2.",
        b"K\x01(\x85.",
        b"K\x01(R.",
        b"K\x01(K\x02a.",
        b"K\x01(s.",
        b"K\x01K\x02R.",
        b"(K\x01d.",
        b"(K\x01u.",
        b"K\x01\x93.",
        b"K\x01K\x02\x93.",
        b"cx\n",
        b"cx",
        b"\xff.",
        b"\x97.",
        b"\x98.",
        b"\x80\x06N.",
        b"I1_\n.",
        b"Ix\n.",
        b"L1\xb2\n.",
        b"Fx\n.",
        b"S'a\n.",
        b"Sa\n.",
        b"V\\ud\n.",
        b"C\x05ab.",
        b"\x8c\x05ab.",
        b"X\xff\xff\xff\xffa.",
        b"T\xff\xff\xff\xffa.",
        b"\x8b\xff\xff\xff\xffa.",
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffa.",
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fa.",
        b"\x96\xff\xff\xff\xff\xff\xff\xff\x7fa.",
        b"p-1\n.",
        b"g9\n.",
        b"gx\n.",
        b"I" + b"9" * 5000 + b"\n.",
        b"\x8c\x01\xffN.",
        b"N)}\x92",
        b"NN\x81.",
        b"N)N\x92.",
        b"NNR.",
        b"cx\ny\n)R}b}b.",
        b"cx\ny\n)(R.",
        b"cx\ny\n)(\x81.",
        b"K\x01(Q.",
        b"\x8c\x01a\x8c\x01b(\x93.",
    ],
)
def test_what_no_pickler_writes_is_damage(data: bytes) -> None:
    with pytest.raises(UnreadableError):
        value(data)


def test_a_length_is_checked_before_anything_is_allocated() -> None:
    import tracemalloc

    tracemalloc.start()
    try:
        for data in (b"\x8e" + (1 << 40).to_bytes(8, "little"), b"\x8b\xff\xff\xff\x7f", b"B\xff\xff\xff\x7f"):
            with pytest.raises(UnreadableError):
                value(b"N" + data + b".")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_memo_bomb_costs_nothing() -> None:
    assert value(b"Nr\xff\xff\xff\xffp4294967295\n.") is None
    for number in (b"4294967296", b"-1", b"9" * 4000):  # multiples of 2**61 - 1 would all have one hash
        with pytest.raises(UnreadableError):
            value(b"Np" + number + b"\n.")


@pytest.mark.parametrize(
    "data",
    [
        b"(" * 1_000_000 + b".",
        b"]" * 500_000 + b"a" * 499_999 + b".",
        b"N" + b"\x85" * 500_000 + b".",
        b"}" + b"N" + b"\x85" * 300_000 + b"K\x01s.",
        b"Nq\x00" + b"h\x00h\x00\x86q\x00" * 60 + b".",
        b"}Nq\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"0h\x00K\x01s.",
        b"(Nq\x00" + b"(h\x00h\x00\x91q\x00" * 60 + b".",
        b"]q\x00h\x00a.",
        b"}q\x00(K\x01h\x00u.",
    ],
    ids=[
        "marks",
        "lists",
        "tuples",
        "deep key",
        "doubled tuples",
        "doubled key",
        "doubled frozensets",
        "cycle",
        "dict cycle",
    ],
)
def test_shapes_that_break_other_readers_are_quick(data: bytes) -> None:
    start = time.process_time()
    with contextlib.suppress(UnreadableError):
        value(data)
    assert time.process_time() - start < 20


def test_a_pickle_has_a_last_step() -> None:
    from smartload.pickles.inert import machine

    limit, machine.MAX_OPS = machine.MAX_OPS, 1000
    try:
        with pytest.raises(UnreadableError, match="more than 1,000 steps"):
            value(b"N0" * 600 + b"N.")
    finally:
        machine.MAX_OPS = limit


def test_only_text_is_hashed() -> None:
    found = value(pickle.dumps({"a": 1, b"b": 2, 3: 3, (4,): 4, 5.0: 5, None: 6}, 4))
    assert found.data == {"a": 1}
    assert [item for _, item in found.pairs] == [2, 3, 4, 5, 6]


def test_a_key_given_twice_is_remembered() -> None:
    first, second = b"X\x01\x00\x00\x00aK\x01", b"X\x01\x00\x00\x00aK\x02"
    assert value(b"}(" + first + second + b"u.").repeated == ["a"]
    found = value(b"}(" + first + b"u(" + second + b"u.")
    assert (found.repeated, found.data) == (["a"], {"a": 2})


def test_an_ordered_dict_is_a_map_with_its_attributes() -> None:
    made: Any = collections.OrderedDict(b=1, a=2)
    made._metadata = {"": {"version": 1}}
    for protocol in range(6):
        found = value(pickle.dumps(made, protocol))
        assert type(found) is DictNote
        assert found.ordered
        assert list(found.data) == ["b", "a"]
        assert type(found.state) is DictNote
        assert "_metadata" in found.state.data


def test_an_ordered_dict_of_python_2_gave_its_items_at_once() -> None:
    found = value(b"ccollections\nOrderedDict\n((lp0\n(lp1\nS'a'\naI1\naa(lp2\nS'b'\naI2\naatR.")
    assert type(found) is DictNote
    assert found.data == {"a": 1, "b": 2}


def test_pop_on_an_empty_frame_takes_the_mark() -> None:
    # Pitfall 2.
    assert value(b"K\x01(0.") == 1
    assert pickle.loads(b"K\x01(0.") == 1


def test_strings_of_python_2_are_text_where_they_can_be() -> None:
    # Pitfall 3.
    assert value(b"U\x04nameU\x02\xff\xfe\x86.") == ("name", b"\xff\xfe")
    assert value(b"S'na\\x6de'\n.") == "name"


def test_objects_of_all_kinds_are_noted_without_their_classes() -> None:
    data = pickle.dumps(
        [datetime.datetime(2020, 1, 1), collections.deque([1]), collections.defaultdict(list, a=[1]), 2**100], 2
    )
    moment, deque, default, number = value(data)
    assert type(moment) is Call
    assert moment.func.name == "datetime"
    assert deque.appends == [1]
    assert default.items.data == {"a": [1]}
    assert number == 2**100


def test_persistent_ids_are_listed_in_order() -> None:
    found, end, persistent_ids = parse(b"(K\x01QK\x02QPid\nt.", 0, "file")
    assert [pid.value for pid in persistent_ids] == [1, 2, "id"]
    assert found == tuple(persistent_ids)
    assert end == 13
    assert all(type(pid) is PersistentId for pid in persistent_ids)


def test_a_pickle_ends_where_it_ends() -> None:
    first, second = pickle.dumps("a", 4), pickle.dumps("b", 2)
    found, end, _ = parse(first + second + b"rest", 0, "file")
    assert (found, end) == ("a", len(first))
    assert parse(first + second + b"rest", end, "file")[:2] == ("b", len(first) + len(second))
