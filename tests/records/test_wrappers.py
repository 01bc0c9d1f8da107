"""The table of wrappers: a line of it is all that a wrapper needs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import smartload
from smartload import smart_load
from smartload.place.survey import wrapped_child
from smartload.records import wrappers
from smartload.records.keys import WrapperStripper, without_wrappers
from smartload.records.wrappers import WRAPPERS, Wrapper, has_no_wrapper

TABLE = Path(wrappers.__file__)


@pytest.mark.parametrize("wrapper", WRAPPERS, ids=lambda wrapper: wrapper.type or wrapper.segment)
def test_every_line_of_the_table_is_seen_through(wrapper: Wrapper) -> None:
    key = f"{wrapper.segment}.fc.weight"
    assert not has_no_wrapper(key)
    assert without_wrappers(key) == "fc.weight"
    assert WrapperStripper(["fc"]).strip(key) == "fc.weight"
    net = nn.ModuleDict({"fc": nn.Linear(2, 1)})
    state = {f"{wrapper.segment}.{name}": torch.ones_like(value) for name, value in net.state_dict().items()}
    assert smart_load(net, state).plan.rule == f"removed '{wrapper.segment}.'"
    assert net["fc"].weight.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("wrapper", [each for each in WRAPPERS if each.type], ids=lambda wrapper: wrapper.type)
def test_every_type_of_the_table_is_known_by_its_name(wrapper: Wrapper) -> None:
    module, _, name = wrapper.type.rpartition(".")
    kind = type(name, (nn.Module,), {"__module__": module})
    assert wrapped_child(kind) == wrapper.segment
    assert wrapped_child(type("Own", (kind,), {})) == wrapper.segment
    assert wrapped_child(type(name, (nn.Module,), {"__module__": "somewhere.else"})) is None


def with_a_line_more(line: str) -> ModuleType:
    """The module of the table, as it would be with one line more."""
    text = TABLE.read_text(encoding="utf-8")
    end = "\n)\n\nCHILD_OF"
    assert text.count(end) == 1
    spec = importlib.util.spec_from_loader("with_a_line_more", loader=None)
    assert spec is not None
    made = importlib.util.module_from_spec(spec)
    exec(compile(text.replace(end, f"\n    {line}{end}"), str(TABLE), "exec"), made.__dict__)
    return made


def test_one_line_is_enough_for_a_new_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that follows from the table is written beside it: `_inner` holds no letters of another segment."""
    more = with_a_line_more('Wrapper("mine.Wrapped", "_inner", False),')
    assert not more.has_no_wrapper("_inner.fc.weight")
    assert more.CHILD_OF["mine.Wrapped"] == "_inner"
    assert "_inner" in more.SEGMENTS - more.PLAUSIBLE_SEGMENTS
    for name, module in list(sys.modules.items()):
        if name.startswith("smartload."):
            for constant in ("SEGMENTS", "CHILD_OF", "PLAUSIBLE_SEGMENTS", "has_no_wrapper"):
                if hasattr(module, constant):
                    monkeypatch.setattr(module, constant, getattr(more, constant))
    wrapped = type("Wrapped", (nn.Module,), {"__module__": "mine"})()
    wrapped._inner = nn.Linear(2, 1)
    assert smartload.unwrap(wrapped) is wrapped._inner
    smart_load(wrapped, {"weight": torch.ones(1, 2), "bias": torch.ones(1)})
    assert wrapped._inner.weight.tolist() == [[1.0, 1.0]]
    plain = nn.Linear(2, 1)
    smart_load(plain, wrapped.state_dict())
    assert plain.weight.tolist() == [[1.0, 1.0]]
