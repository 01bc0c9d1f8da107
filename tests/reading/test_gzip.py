"""Files inside of other containers: gzip around anything, and the tar archives of 2017."""

from __future__ import annotations

import gzip
import tracemalloc

import pytest
import torch
from formats import tar_of_2017
from reading_tools import assert_same, read, saved, tensors

from smartload import UnreadableError
from smartload.reading import files as readers

STATE = {"0.weight": torch.randn(2, 3), "0.bias": torch.ones(2), "count": torch.tensor(3)}
TAR = tar_of_2017(STATE)


def kind_of(data: bytes) -> str:
    with pytest.raises(UnreadableError) as caught:
        read(data)
    assert str(caught.value).isprintable()
    return caught.value.problem.kind  # type: ignore[union-attr]


@pytest.mark.parametrize("level", [0, 1, 9])
def test_gzip_of_a_checkpoint_is_read(level: int) -> None:
    data = gzip.compress(saved(STATE), level)
    assert_same(tensors(data), STATE)
    assert read(data).format == "torch zip, gzip"


def test_gzip_in_several_members_is_read() -> None:
    whole = saved(STATE)
    assert_same(tensors(gzip.compress(whole[:500]) + gzip.compress(whole[500:])), STATE)


def test_gzip_of_what_is_no_checkpoint_says_what_that_is() -> None:
    assert kind_of(gzip.compress(b"<!DOCTYPE html><html></html>")) == "html"
    assert kind_of(gzip.compress(b"")) == "empty"
    assert kind_of(gzip.compress(gzip.compress(saved(STATE)))) == "unknown"


@pytest.mark.parametrize("zeros", [1, 100, 20_000])
def test_zeros_behind_a_gzip_are_padding(zeros: int) -> None:
    data = gzip.compress(saved(STATE)) + bytes(zeros)
    assert_same(tensors(data), STATE)
    assert_same(tensors(data + gzip.compress(b"") + bytes(zeros)), STATE)


def test_damaged_gzip_is_refused() -> None:
    data = gzip.compress(saved(STATE))
    assert kind_of(data[:-1]) == "gzip_cut"
    assert kind_of(data[:100]) == "gzip_cut"
    assert kind_of(data + b"junk") == "gzip_damaged"
    for at in (len(data) // 2, len(data) - 6, 3):
        assert kind_of(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]) in ("gzip_damaged", "gzip_cut")


def test_a_flood_is_stopped_before_it_takes_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "UNPACKED", 1 << 20)
    data = gzip.compress(b"\0" * (200 << 20), 1)
    tracemalloc.start()
    assert kind_of(data) == "grows"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 << 20


def test_a_gzip_of_nothing_but_zeros_may_still_be_weights() -> None:
    data = gzip.compress(saved({"w": torch.zeros(1_000_000)}))
    assert tensors(data)["w"].sum() == 0
