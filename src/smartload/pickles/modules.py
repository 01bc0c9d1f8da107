"""A whole pickled module as its `state_dict()` would have been: names and tensors, without its class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from smartload.errors import UnreadableError
from smartload.pickles.inert import Call, DictNote, Global, PersistentId, SetNote
from smartload.reading.limits import ITEM_COST, Budget
from smartload.records.entries import Entry, Opaque, Part
from smartload.records.problems import Problem
from smartload.records.text import printable

MAX_DEPTH = 900
"""Beyond about a thousand levels a `state_dict()` of torch itself gives up."""
MAX_NAMES = 200_000
MAX_TEXT = 1 << 26
"""Characters of all dotted names, and a few for each step."""


class _Body(NamedTuple):
    parameters: DictNote
    buffers: DictNote
    modules: DictNote
    transient: object


def is_module(value: object) -> bool:
    """Whether `value` is the note of an nn.Module."""
    return _body(value) is not None or _inside(value) is not None


def class_of(value: Call) -> Global | None:
    """The name of an object's class, however its file format and pickle protocol give it."""
    func: object = value.func
    if type(func) is Global and func.name == "_reconstructor" and type(value.args) is tuple and value.args:
        func = value.args[0]
    if type(func) is PersistentId and type(func.value) is tuple and len(func.value) == 4:
        func = func.value[1]  # the old stream puts the source of a module's class beside it
    return func if type(func) is Global else None


def class_name(value: Call) -> str:
    """The dotted name of an object's class, for messages."""
    cls = class_of(value)
    if cls is None:
        return "object"
    if cls.module == "torch.fx.graph_module":
        return "torch.fx.GraphModule"
    return printable(cls.name if cls.module in ("builtins", "__builtin__") else f"{cls.module}.{cls.name}")


def module_part(
    value: Call, tensor: Callable[[object], Entry | None], noun: Callable[[object], str], file: str
) -> Part:
    """The state dict of a module; shared modules give repeated names, as in torch.

    Raises UnreadableError for a module that contains itself, or is too deep or too large for any real one.
    """
    entries: dict[str, Entry] = {}
    work = Budget(MAX_TEXT, Problem("module_large", file, {"limit": MAX_NAMES}))
    for prefix, body in _walk(value, file, work):
        for name, found in _own(body, prefix, work):
            entries[prefix + name] = tensor(found) or Opaque(noun(found))
        for name, child in body.modules.data.items():
            if child is not None and not is_module(child):
                entries[prefix + name] = Opaque(noun(child))
    return Part(entries, kind=f"module {class_name(value)}")


def _own(body: _Body, prefix: str, work: Budget) -> Iterator[tuple[str, object]]:
    for name, found in body.parameters.data.items():
        work.take(ITEM_COST + len(prefix) + len(name))
        if found is not None:
            yield name, found
    transient = _names(body.transient, work) if body.buffers.data else frozenset()
    for name, found in body.buffers.data.items():
        work.take(ITEM_COST + len(prefix) + len(name))
        if found is not None and name not in transient:
            yield name, found


def _walk(root: object, file: str, work: Budget) -> Iterator[tuple[str, _Body]]:
    """Every module below `root` with its prefix, parents first, in the order in which torch visits them."""
    path: list[tuple[int, Iterator[tuple[str, object]]]] = []
    on_path: set[int] = set()
    here: object = root
    prefix = ""
    while True:
        while (inner := _inside(here)) is not None:
            prefix, here = f"{prefix}_orig_mod.", inner
            work.take(ITEM_COST + len(prefix))
        body = _body(here)
        if body is not None:
            if id(here) in on_path:
                raise UnreadableError(Problem("module_itself", file))
            if len(path) >= MAX_DEPTH:
                raise UnreadableError(Problem("module_large", file, {"limit": MAX_NAMES}))
            yield prefix, body
            on_path.add(id(here))
            path.append((id(here), _children(prefix, body, work)))
        step = _next(path, on_path)
        if step is None:
            return
        prefix, here = step


def _children(prefix: str, body: _Body, work: Budget) -> Iterator[tuple[str, object]]:
    for name, child in body.modules.data.items():
        work.take(ITEM_COST + len(prefix) + len(name))
        yield f"{prefix}{name}.", child


def _next(path: list[tuple[int, Iterator[tuple[str, object]]]], on_path: set[int]) -> tuple[str, object] | None:
    while path:
        step = next(path[-1][1], None)
        if step is not None:
            return step
        on_path.discard(path.pop()[0])
    return None


def _inside(value: object) -> object:
    """The module that torch.compile wrapped, or None."""
    if type(value) is not Call or type(value.args) is not tuple or not value.args:
        return None
    cls = class_of(value)
    known = cls is not None and cls.module == "torch._dynamo.eval_frame" and cls.name == "OptimizedModule"
    return value.args[0] if known else None


def _body(value: object) -> _Body | None:
    if type(value) is not Call:
        return None
    state: object = value.state
    if type(value.func) is Global and value.func.module == "torch.fx.graph_module" and type(value.args) is tuple:
        # A traced module is written as a call on its attributes.
        maps = [arg for arg in value.args if type(arg) is DictNote]
        state = maps[0] if maps else state
    if type(state) is not DictNote:
        return None
    attributes = state.data
    parameters, buffers = attributes.get("_parameters"), attributes.get("_buffers")
    modules = attributes.get("_modules")
    if type(parameters) is not DictNote or type(buffers) is not DictNote or type(modules) is not DictNote:
        return None
    return _Body(parameters, buffers, modules, attributes.get("_non_persistent_buffers_set"))


def _names(value: object, work: Budget) -> frozenset[str]:
    """A set of names, however its pickle protocol wrote it."""
    items = value.items if type(value) is SetNote else value
    if type(value) is Call and class_name(value) in ("set", "frozenset") and type(value.args) is tuple and value.args:
        items = value.args[0]
    if type(items) is not list:
        return frozenset()
    work.take(len(items))
    return frozenset(name for name in items if type(name) is str)
