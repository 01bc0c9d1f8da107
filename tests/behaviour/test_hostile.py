"""Files that mean harm, and every kind of damage: a typed error or equal tensors, and nothing is ever run."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from reading_tools import (
    CANARY,
    LEGACY,
    TWO_FLOATS,
    checkpoint_of,
    dict_of,
    floats,
    opened,
    read,
    rebuilt,
    saved,
    tensors_in,
    text,
    watched,
)
from torch import nn

from smartload.errors import SmartLoadError
from smartload.formats import open_checkpoint


def global_of(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


CALLS = {
    "reduce": global_of("os", "system") + text(f"echo > {CANARY}") + b"\x85R",
    "stack global": b"\x8c\x02os\x8c\x06system\x93" + text(f"echo > {CANARY}") + b"\x85R",
    "inst": b"(" + text(f"echo > {CANARY}") + b"ios\nsystem\n",
    "obj": b"(" + global_of("os", "system") + text(f"echo > {CANARY}") + b"o",
    "newobj": global_of("subprocess", "Popen") + text(f"echo > {CANARY}") + b"\x85\x81",
    "newobj_ex": global_of("subprocess", "Popen") + b")}" + text("args") + text(str(CANARY)) + b"s\x92",
    "eval": global_of("builtins", "eval") + text(f"open({str(CANARY)!r}, 'w')") + b"\x85R",
    "getattr": global_of("builtins", "getattr")
    + global_of("os", "path")
    + text("sys")
    + b"\x86R"
    + text("modules")
    + b"\x85R",
    "jit": global_of("torch.jit._script", "unpackage_script_module") + b"NNN\x87R",
    "from bytes": global_of("torch.storage", "_load_from_bytes") + b"C\x04abcd\x85R",
    "from file": global_of("torch", "from_file") + text(str(CANARY)) + b"\x88K\x08\x87R",
    "hub": global_of("torch.hub", "load") + text("x/y") + text("z") + b"\x86R",
    "build": global_of("os", "system") + b")\x81}" + text("__class__") + b"K\x01sb",
    "slots": global_of("torch", "Tensor") + b")\x81N}" + text("data") + b"K\x01s\x86b",
    "hook": b"ccollections\nOrderedDict\n)R}" + text("items") + global_of("os", "system") + b"sb",
    "extension": b"\x82\x01)R",
    "persistent": b"(" + text("module") + global_of("os", "system") + text("/etc/passwd") + text("x") + b"tQ)R",
}


def wrapped(body: bytes) -> dict[str, bytes]:
    """A gadget at every place where a value can stand."""
    good = rebuilt(floats())
    return {
        "beside": dict_of(a=good, b=body),
        "top": b"\x80\x02" + body + b".",
        "popped": b"\x80\x02" + body + b"0" + dict_of(a=good)[2:],
        "key": b"\x80\x02}" + body + good + b"s.",
        "offset": dict_of(a=rebuilt(floats(), offset=body)),
        "size": dict_of(a=rebuilt(floats(), size=body)),
        "storage": dict_of(a=rebuilt(body)),
        "hooks": dict_of(a=good.replace(b"ccollections\nOrderedDict\n)R", body)),
        "extra": dict_of(a=good, _extra_state=body),
    }


def check_message(error: SmartLoadError) -> None:
    assert str(error).isprintable()
    assert len(str(error)) < 2000


@pytest.mark.parametrize("place", wrapped(b"N"))
@pytest.mark.parametrize("call", CALLS)
def test_nothing_runs_wherever_it_is_put(call: str, place: str) -> None:
    data = checkpoint_of(wrapped(CALLS[call])[place], d0=TWO_FLOATS)
    with watched() as seen:
        try:
            read(data)
        except SmartLoadError as error:
            check_message(error)
    assert seen == []
    assert not CANARY.exists()


def test_the_watch_would_see_it() -> None:
    with watched() as seen:
        pickle.loads(b"cbuiltins\neval\n(V1+1\ntR.")
        Path(os.devnull).open("w", encoding="utf-8").close()
    assert any("eval" in event or "exec" in event for event in seen)
    assert any("writing" in event for event in seen)


def bench() -> dict[str, bytes]:
    state = {"state_dict": {"a": torch.arange(6.0), "b": torch.ones(2, 2).half()}, "epoch": 3, "args": nn.Linear(1, 1)}
    return {"zip": saved(state), "zip4": saved(state, pickle_protocol=4), "legacy": saved(state, **LEGACY)}


def survives(data: bytes) -> bool:
    """Read everything; whether it was read at all."""
    try:
        with opened(data) as checkpoint:
            for part in checkpoint.parts.values():
                tensors_in(checkpoint, part)
    except SmartLoadError as error:
        check_message(error)
        return False
    return True


@pytest.mark.parametrize("kind", ["zip", "zip4", "legacy"])
def test_a_file_cut_anywhere_is_a_typed_error(kind: str) -> None:
    data = bench()[kind]
    assert survives(data)
    assert not any(survives(data[:end]) for end in range(0, len(data), 50))


@pytest.mark.parametrize("kind", ["zip", "zip4", "legacy"])
def test_a_changed_byte_is_refused_or_harmless(kind: str) -> None:
    data, chance = bench()[kind], random.Random(1)
    with watched() as seen:
        for _ in range(1500):
            at = chance.randrange(len(data))
            survives(data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :])
    assert seen == []


def test_changed_pickles_with_right_checksums_are_refused_or_harmless() -> None:
    chance = random.Random(2)
    good = dict_of(a=rebuilt(floats()), b=CALLS["reduce"], c=rebuilt(floats(), size=b"K\x01\x85"))
    with watched() as seen:
        for _ in range(3000):
            bad = bytearray(good)
            for _ in range(chance.randrange(1, 6)):
                bad[chance.randrange(len(bad))] = chance.randrange(256)
            survives(checkpoint_of(bytes(bad), d0=TWO_FLOATS))
    assert seen == []


def test_a_message_carries_no_control_characters_of_the_file() -> None:
    odd = "\x1b[31m\n\u202e" + "x" * 100_000
    for data in (
        checkpoint_of(dict_of(a=rebuilt(floats(odd))), d0=TWO_FLOATS),
        checkpoint_of(dict_of(a=rebuilt(floats(kind="X\x1bStorage"))), d0=TWO_FLOATS),
        checkpoint_of(b"\x80\x02" + b"\x8c\x01a" + text(odd) + b"\x93}b.", d0=TWO_FLOATS),
    ):
        with pytest.raises(SmartLoadError) as caught:
            read(data)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 600


def test_the_applications_own_allowlist_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # Pitfall 17.
    for name, value in (("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1"), ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")):
        monkeypatch.setenv(name, value)
        with torch.serialization.safe_globals([exec]):
            test_nothing_runs_wherever_it_is_put("eval", "beside")


def test_odd_surroundings_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, state = tmp_path / "w.pt", {"a": torch.arange(3.0)}
    torch.save(state, path)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    with contextlib.suppress(PermissionError):  # Windows keeps a folder that is some process's own
        gone.rmdir()
    default: Any = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.device("meta"), open_checkpoint(path) as checkpoint:
            assert checkpoint.parts[""].entries["a"].dtype == "float32"  # type: ignore[union-attr]
    finally:
        torch.set_default_dtype(default)
        monkeypatch.chdir(tmp_path)
