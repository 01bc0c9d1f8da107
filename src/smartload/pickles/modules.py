"""Give the state dict of a module that was pickled as a whole: names and tensors, without its class.

An nn.Module pickles as a call of its class, with its `__dict__` as state. The dicts `_parameters`, `_buffers` and
`_modules` in it are what `state_dict()` reads, too, so the class itself is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from smartload.errors import UnreadableError
from smartload.pickles.inert import Call, DictNote, Global, PersistentId, SetNote
from smartload.reading.limits import ITEM_COST, Budget
from smartload.records.entries import Entry, Opaque, Part
from smartload.records.problems import Problem
from smartload.records.text import LONGEST, printable

MAX_DEPTH = 900
"""Levels of modules. torch's own `state_dict()` recurses, and at about 1,000 levels ends in a RecursionError."""
MAX_TEXT = 1 << 26
"""Characters of all dotted names, with `ITEM_COST` for each step. Modules may be shared: 60 levels, each with the next
one twice, take a few kilobytes of a file and give 2^60 names."""


class _Attributes(NamedTuple):
    """What of a module's attributes decides its state dict.

    Attributes:
        parameters: `_parameters`, name -> tensor or None.
        buffers: `_buffers`, likewise.
        modules: `_modules`, name -> module or None.
        non_persistent: `_non_persistent_buffers_set`, in whichever form the file has a set; None in old files.
    """

    parameters: DictNote
    buffers: DictNote
    modules: DictNote
    non_persistent: object


# What is of these modules is no nn.Module. torch would read its attributes as those of a Counter, a storage, a set.
_NO_MODULES = frozenset(
    (
        "collections",
        "builtins",
        "__builtin__",
        "torch",
        "torch.storage",
        "torch._utils",
        "torch._tensor",
        "torch.nn.parameter",
    )
)


def is_module(value: object) -> bool:
    """Tell whether `value` is the note of an nn.Module."""
    return _attributes(value) is not None or _compiled(value) is not None


def class_of(value: Call) -> Global | None:
    """Find the class of the object that `value` makes, however file format and pickle protocol give it; else None."""
    func: object = value.func
    # Protocols 0 and 1 write copyreg._reconstructor(class, base, state).
    if type(func) is Global and func.name == "_reconstructor" and type(value.args) is tuple and value.args:
        func = value.args[0]
    if type(func) is PersistentId and type(func.value) is tuple and len(func.value) == 4:
        func = func.value[1]  # torch before 1.6 writes ("module", class, source file, source)
    return func if type(func) is Global else None


def class_name(value: Call) -> str:
    """Give the dotted name of an object's class for messages: 'collections.deque', 'set' for one of the builtins."""
    cls = class_of(value)
    if cls is None:
        return "object"
    if cls.module == "torch.fx.graph_module":  # a function of it makes the module, so no class is named
        return "torch.fx.GraphModule"
    return printable(cls.name) if cls.module in ("builtins", "__builtin__") else global_name(cls)


def global_name(value: Global) -> str:
    """Give the dotted name of a global for messages."""
    # Cut before they are joined: each may have megabytes, and stand in thousands of places.
    return printable(f"{value.module[: LONGEST + 1]}.{value.name[: LONGEST + 1]}")


def module_part(
    value: Call, tensor: Callable[[object], Entry | None], noun: Callable[[object], str], file: str
) -> Part:
    """Give the state dict of the module that `value` makes. A shared module gives its names once for each place.

    Args:
        value: the note of a module.
        tensor: finds the entry of a tensor, None for anything else.
        noun: says what a value is; of a parameter that is no tensor, for messages.
        file: the file's name, for messages.

    Raises:
        UnreadableError: the module contains itself, or is too deep or too large for any real one.
    """
    entries: dict[str, Entry] = {}
    # One budget for the whole module, as what is shared multiplies through all levels.
    work = Budget(MAX_TEXT, Problem("module_large", file))
    for prefix, attributes in _walk(value, file, work):
        for name, item in _tensors(attributes, prefix, work):
            entries[prefix + name] = tensor(item) or Opaque(noun(item))
        for name, child in attributes.modules.data.items():
            if child is not None and not is_module(child):
                # As a rule its class has a `__getstate__` of its own. It is named, never passed over.
                entries[prefix + name] = Opaque(noun(child))
    return Part(entries, kind=f"module {class_name(value)}")


def _tensors(attributes: _Attributes, prefix: str, work: Budget) -> Iterator[tuple[str, object]]:
    """Give names and values of a module's parameters and persistent buffers, in torch's order, without None."""
    for name, value in attributes.parameters.data.items():
        work.take(ITEM_COST + len(prefix) + len(name))
        if value is not None:
            yield name, value
    non_persistent = _names(attributes.non_persistent, work) if attributes.buffers.data else frozenset()
    for name, value in attributes.buffers.data.items():
        work.take(ITEM_COST + len(prefix) + len(name))
        if value is not None and name not in non_persistent:
            yield name, value


def _walk(root: object, file: str, work: Budget) -> Iterator[tuple[str, _Attributes]]:
    """Give the prefix and attributes of every module from `root` down, parents first, in torch's order.

    With a stack instead of recursion, since a file may nest far deeper than Python recurses.
    """
    path: list[tuple[int, Iterator[tuple[str, object]]]] = []  # of each module from the root: its id, children to come
    on_path: set[int] = set()
    module: object = root
    prefix = ""
    while True:
        # A loop, since a compiled module can be compiled again; a chain of them is paid for step by step.
        while (inner := _compiled(module)) is not None:
            prefix, module = f"{prefix}_orig_mod.", inner
            work.take(ITEM_COST + len(prefix))
        attributes = _attributes(module)
        if attributes is not None:
            # Only the modules above it matter: one that two parents share is no cycle.
            if id(module) in on_path:
                raise UnreadableError(Problem("module_itself", file))
            if len(path) >= MAX_DEPTH:
                raise UnreadableError(Problem("module_large", file))
            yield prefix, attributes
            on_path.add(id(module))
            path.append((id(module), _children(prefix, attributes, work)))
        child = _next_child(path, on_path)
        if child is None:
            return
        prefix, module = child


def _children(prefix: str, attributes: _Attributes, work: Budget) -> Iterator[tuple[str, object]]:
    """Give the prefix and note of each child of the module at `prefix`."""
    for name, child in attributes.modules.data.items():
        work.take(ITEM_COST + len(prefix) + len(name))  # before the name is made: it may be long, and used often
        yield f"{prefix}{name}.", child


def _next_child(path: list[tuple[int, Iterator[tuple[str, object]]]], on_path: set[int]) -> tuple[str, object] | None:
    """Give the next child of the deepest module on `path` that has one left, and drop the modules that have none."""
    while path:
        child = next(path[-1][1], None)
        if child is not None:
            return child
        on_path.discard(path.pop()[0])
    return None


def _compiled(value: object) -> object:
    """Give the module inside an `OptimizedModule`, which torch.compile returns; None where `value` is none.

    It pickles as a call of its class, whose first argument is the module; its state dict begins with `_orig_mod.`.
    """
    if type(value) is not Call or type(value.args) is not tuple or not value.args:
        return None
    cls = class_of(value)
    is_compiled = cls is not None and cls.module == "torch._dynamo.eval_frame" and cls.name == "OptimizedModule"
    return value.args[0] if is_compiled else None


def _attributes(value: object) -> _Attributes | None:
    """Find the attributes of a module: of any object that has all three dicts in its state; None for other values.

    The class tells nothing, as it may be the user's own.
    """
    if type(value) is not Call or (type(value.func) is Global and value.func.module in _NO_MODULES):
        return None
    state: object = value.state
    if type(value.func) is Global and value.func.module == "torch.fx.graph_module" and type(value.args) is tuple:
        # A GraphModule of torch.fx pickles as reduce_graph_module(attributes, code), without a state.
        maps = [arg for arg in value.args if type(arg) is DictNote]
        state = maps[0] if maps else state
    if type(state) is not DictNote:
        return None
    # All three must be there: a user's object may well have one dict of such a name.
    attributes = state.data
    parameters, buffers = attributes.get("_parameters"), attributes.get("_buffers")
    modules = attributes.get("_modules")
    if type(parameters) is not DictNote or type(buffers) is not DictNote or type(modules) is not DictNote:
        return None
    return _Attributes(parameters, buffers, modules, attributes.get("_non_persistent_buffers_set"))


def _names(value: object, work: Budget) -> frozenset[str]:
    """Read a set of names, however its pickle protocol wrote it: from 4 as a set, before as the call `set([...])`."""
    items = value.items if type(value) is SetNote else value
    if type(value) is Call and class_name(value) in ("set", "frozenset") and type(value.args) is tuple and value.args:
        items = value.args[0]
    if type(items) is not list:
        return frozenset()
    work.take(len(items))  # one set may belong to any number of modules
    return frozenset(name for name in items if type(name) is str)
