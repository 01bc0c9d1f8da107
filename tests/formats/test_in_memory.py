"""Mappings that are already in memory: the same parts as in a file, and nothing of the caller's is touched."""

from __future__ import annotations

import collections
import copy
import types
from typing import Any

import numpy
import pytest
import torch
from reading_tools import read, saved
from torch import nn

from smartload import smart_load
from smartload.errors import UnreadableError
from smartload.formats import open_checkpoint
from smartload.records.entries import Beside, InMemory, Opaque, TensorSpec

T = torch.ones(2, 3)


def parts(value: Any) -> Any:
    with open_checkpoint(value) as checkpoint:
        assert checkpoint.format == "memory"
        return checkpoint.parts


@pytest.mark.parametrize(
    "value",
    [
        nn.BatchNorm1d(3).state_dict(), {}, {"state_dict": {"w": T}, "epoch": 3}, {"a": {"b": {"c": {"d": {"w": T}}}}},
        {"model": {"w": T}, "ema": {"w": T.clone()}, "optimizer": {"state": {0: {"m": T.clone()}}, "param_groups": []}},
        {"net": nn.Linear(2, 1), "lr": 0.1}, {"w": T, "epoch": 3},
    ],
    ids=range(7),
)  # fmt: skip
def test_memory_and_file_hold_the_same(value: Any) -> None:
    theirs = read(saved(value))
    with open_checkpoint(value) as ours:
        assert {path: list(part.entries) for path, part in ours.parts.items()} == {
            path: list(part.entries) for path, part in theirs.parts.items()
        }
        assert ours.aside == theirs.aside
        for path, part in ours.parts.items():
            if part.kind == "state dict":
                assert part.metadata == theirs.parts[path].metadata
            for key, entry in part.entries.items():
                other: Any = theirs.parts[path].entries[key]
                if isinstance(entry, InMemory):
                    assert entry.spec == TensorSpec(other.shape, other.dtype)
                else:
                    assert getattr(entry, "what", entry) == getattr(other, "what", other)


def test_a_whole_module_keeps_its_kind() -> None:
    part = parts({"net": nn.Linear(2, 1)})["net"]
    assert part.kind == "module torch.nn.modules.linear.Linear"
    assert list(part.entries) == ["weight", "bias"]


def test_every_key_of_a_state_dict_is_kept() -> None:
    entries = parts({"w": T, "n": 3, "inner": {"v": T}, "d": {}})[""].entries
    assert entries["n"] == Opaque("an int", 3)
    assert entries["inner"] == Opaque("a dict of 1", {"v": T})
    assert list(entries)[-1] == "d"


def test_the_callers_dict_is_not_touched() -> None:
    state: Any = nn.Sequential(nn.BatchNorm1d(2)).state_dict()
    state._metadata["0"]["assign_to_params_buffers"] = True
    before, metadata = dict(state), copy.deepcopy(state._metadata)
    part = parts(state)[""]
    part.metadata["0"]["version"] = 99
    assert dict(state) == before
    assert state._metadata == metadata
    assert "assign_to_params_buffers" not in part.metadata["0"]


@pytest.mark.parametrize("bad", [3, {"": 3}, {3: {}}, None])
def test_metadata_of_wrong_types_is_ignored(bad: Any) -> None:
    state: Any = collections.OrderedDict(w=T)
    state._metadata = bad
    assert not parts(state)[""].metadata


def test_the_memory_of_tensors_tells_ties() -> None:
    base = torch.arange(6.0)
    entries = parts(
        {"a": base, "b": base, "c": base.clone(), "d": base[1:], "e": base.view(2, 3), "f": nn.Parameter(base)}
    )[""].entries
    place = {key: entry.memory for key, entry in entries.items()}
    assert place["a"] == place["b"] == place["f"] is not None
    assert len({place[key] for key in "acde"}) == 4


@pytest.mark.parametrize(
    "value",
    [torch.empty(2, device="meta"), torch.empty(0), torch.eye(2).to_sparse(), torch.nn.UninitializedParameter()],
)
def test_tensors_without_memory_have_no_place(value: torch.Tensor) -> None:
    entry = parts({"a": value, "b": T})[""].entries["a"]
    assert isinstance(entry, InMemory)
    assert entry.memory is None


def test_open_shapes_are_open() -> None:
    lazy = nn.LazyLinear(3)
    assert parts(dict(lazy.named_parameters()))[""].entries["weight"].spec == TensorSpec(None, "float32")


def test_views_that_differ_in_a_flag_differ_in_place() -> None:
    base = torch.ones(2, dtype=torch.complex64)
    entries = parts({"a": base, "b": base.conj()})[""].entries
    assert entries["a"].memory != entries["b"].memory


class Like:
    """What torch takes for a tensor."""

    dtype, shape = torch.float32, (2,)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("looked at too closely")


class Broken:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


def test_tensor_likes_are_tensors_and_classes_are_not() -> None:
    entries = parts(
        {
            "w": T,
            "like": Like(),
            "class": torch.Tensor,
            "likes": Like,
            "net": nn.Linear,
            "array": T.numpy(),
            "broken": Broken(),
        }
    )[""].entries
    assert entries["like"].spec == TensorSpec((2,), "float32")
    assert entries["like"].memory is None
    assert all(isinstance(entries[key], Opaque) for key in ("class", "likes", "net", "broken"))


@pytest.mark.parametrize("order", ["=", ">"])
@pytest.mark.parametrize("step", [1, -1])
@pytest.mark.parametrize("writable", [True, False])
def test_arrays_are_tensors(order: str, step: int, writable: bool) -> None:
    array = numpy.arange(6, dtype=f"{order}f4").reshape(2, 3)[::step]
    array.flags.writeable = writable
    held: Any = parts({"w": array})[""].entries["w"]
    assert torch.equal(held.value, torch.tensor(array.tolist()))
    assert held.original is array
    assert held.value.untyped_storage().data_ptr() != array.ctypes.data or (writable and step == 1 and order == "=")


def test_arrays_that_torch_cannot_hold_are_named() -> None:
    entries: Any = parts({"w": T, "names": numpy.array(["a", "b"]), "objects": numpy.array([None])})[""].entries
    assert entries["names"].what == "a numpy array of type <U1"
    assert entries["objects"].what == "a numpy array of type object"


def test_a_module_that_keeps_arrays_in_its_state_dict_gets_its_arrays() -> None:
    class Keeper(nn.Module):
        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            destination[prefix + "table"] = numpy.arange(3)

        def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
            self.got = state_dict[prefix + "table"]

    table = numpy.arange(3)
    net = Keeper()
    smart_load(net, {"table": table})
    assert net.got is table


def test_an_extra_state_is_held_as_it_is() -> None:
    state = object()
    assert parts({"w": T, "x._extra_state": state})[""].entries["x._extra_state"] == InMemory(state, None)


@pytest.mark.parametrize("value", [{0: T}, {"a": T, 1: T}, {b"w": T}])
def test_keys_that_are_no_names_are_refused(value: Any) -> None:
    with pytest.raises(UnreadableError, match="its keys are of type"):
        parts(value)


@pytest.mark.parametrize("value", [{"epoch": 3}, {"state": {}, "param_groups": []}, {"a": [T]}])
def test_a_dict_without_weights_is_refused(value: Any) -> None:
    with pytest.raises(UnreadableError):
        parts(value)


def test_any_mapping_will_do() -> None:
    assert list(parts(types.MappingProxyType({"w": T}))[""].entries) == ["w"]


def test_a_dict_that_contains_itself_ends() -> None:
    loop: dict[str, Any] = {"w": T}
    loop["self"] = loop
    assert "" in parts(loop)


def test_lists_beside_are_counted() -> None:
    with open_checkpoint({"m": {"w": T}, "l": [T, (T.clone(),)]}) as checkpoint:
        assert checkpoint.aside == (Beside("l", "2 tensors in a list of 2", 2),)
