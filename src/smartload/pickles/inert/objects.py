"""Handlers of the opcodes of containers and calls: all of them only note what the file asks for."""

from __future__ import annotations

from collections.abc import Callable

from smartload.pickles.inert.literals import text
from smartload.pickles.inert.machine import DICT_BYTES, LIST_BYTES, SET_BYTES, Fault, Handler, Machine
from smartload.pickles.inert.values import (
    Call,
    DictNote,
    Global,
    PersistentId,
    SetNote,
    copies_its_list,
    is_ordered_dict,
)


def _push_new(make: Callable[[], object], nbytes: int) -> Handler:
    """Make the handler that pushes a new empty container, which takes `nbytes` bytes of memory."""

    def op(m: Machine, pos: int) -> int:
        m.charge(nbytes)
        m.stack.append(make())
        return pos

    return op


def _tuple(size: int) -> Handler:
    """Make the handler that puts the last `size` values into a tuple."""

    def op(m: Machine, pos: int) -> int:
        stack = m.stack
        if len(stack) - size < m.marks[-1]:
            raise Fault
        stack[-size:] = [tuple(stack[-size:])]
        return pos

    return op


def _collect(make: Callable[[list[object]], object], nbytes: int = 0) -> Handler:
    """Make the handler that makes a container of all values above the last mark; it takes `nbytes` bytes of memory."""

    def op(m: Machine, pos: int) -> int:
        items = m.pop_mark()
        if nbytes:  # not for tuples, which take less and are two of every tensor
            m.charge(nbytes)
        m.stack.append(make(items))
        return pos

    return op


def _dict(items: list[object]) -> DictNote:
    made = DictNote()
    _fill(made, items)
    return made


def _fill(target: DictNote, items: list[object]) -> None:
    """Add `items`, a key and its value in turn, to `target`."""
    if len(items) % 2:
        raise Fault
    keys = items[::2]
    # The usual case, nothing but new string keys, takes a fraction of the time of one `put` an item.
    if {type(key) for key in keys} == {str}:
        new: dict[str, object] = dict(zip(keys, items[1::2]))  # type: ignore[arg-type]
        if len(new) == len(keys) and target.data.keys().isdisjoint(new):
            target.data.update(new)
            return
    for key, value in zip(keys, items[1::2]):
        target.put(key, value)


def _dict_on_top(m: Machine) -> DictNote:
    """Give the dict on top of the stack, or the items of the call there: its result may be a dict of any class."""
    target = m.top()
    if type(target) is Call:
        if target.items is None:
            target.items = DictNote()
        target = target.items
    if type(target) is not DictNote:
        raise m.refuse("unsafe_item", target)
    return target


def _setitem(m: Machine, pos: int) -> int:
    value, key = m.pop(), m.pop()
    _dict_on_top(m).put(key, value)
    return pos


def _setitems(m: Machine, pos: int) -> int:
    items = m.pop_mark()
    _fill(_dict_on_top(m), items)
    return pos


def _extend(m: Machine, items: list[object]) -> None:
    """Append `items` to the list on top of the stack, or to the call there: its result may be a list of any class."""
    target = m.top()
    if type(target) is Call:
        if target.appends is None:
            target.appends = []
        target = target.appends
    if type(target) is not list:
        raise m.refuse("unsafe_item", target)
    target.extend(items)


def _append(m: Machine, pos: int) -> int:
    _extend(m, [m.pop()])
    return pos


def _appends(m: Machine, pos: int) -> int:
    _extend(m, m.pop_mark())
    return pos


def _additems(m: Machine, pos: int) -> int:
    items, target = m.pop_mark(), m.top()
    if type(target) is not SetNote:
        raise m.refuse("unsafe_item", target)
    target.items.extend(items)
    return pos


def _global(m: Machine, pos: int) -> int:
    """Push a global, given as two lines; its name is not looked up, so it need not even exist."""
    module, pos = m.line(pos)
    name, pos = m.line(pos)
    m.stack.append(Global(text(module), text(name)))
    return pos


def _stack_global(m: Machine, pos: int) -> int:
    name, module = m.pop(), m.pop()
    if type(name) is not str or type(module) is not str:
        raise Fault
    m.stack.append(Global(module, name))
    return pos


def _extension(width: int) -> Handler:
    """Make the handler of a number of the `copyreg` registry: it becomes a global that no real one equals.

    The registry is not asked: what it holds depends on the program that reads.
    """

    def op(m: Machine, pos: int) -> int:
        m.stack.append(Global("copyreg extension", str(int.from_bytes(m.take(pos, width), "little"))))
        return pos + width

    return op


def _reduce(m: Machine, pos: int) -> int:
    """Note the call of a function with a tuple of arguments; a call of OrderedDict gives the dict itself.

    The stack is used without `Machine.pop`, as this handler runs twice for each tensor.
    """
    stack = m.stack
    if len(stack) - 2 < m.marks[-1]:
        raise Fault
    args, func = stack.pop(), stack[-1]
    if type(args) is not tuple:
        raise Fault
    if is_ordered_dict(func):
        m.charge(DICT_BYTES)
        stack[-1] = _ordered_dict(m, args) if args else DictNote(ordered=True)
    else:
        if args and type(args[0]) is list and copies_its_list(func):
            # The file may append to the list later on, and what was made of it does not grow.
            m.charge(8 * len(args[0]))
            args = (args[0][:], *args[1:])
        stack[-1] = Call(func, args)
    return pos


def _ordered_dict(m: Machine, args: tuple[object, ...]) -> DictNote:
    """Make the OrderedDict that Python 2 wrote: its items as one argument, a list of pairs."""
    made, pairs = DictNote(ordered=True), args[0]
    if type(pairs) is not list or len(args) > 1:
        raise Fault  # it may be made of a dict or of any other items, which no pickler writes
    m.charge(64 * len(pairs))  # of a dict's table, or a pair and its place
    for pair in pairs:
        if type(pair) not in (list, tuple) or len(pair) != 2:
            raise Fault
        made.put(*pair)
    return made


def _newobj(m: Machine, pos: int) -> int:
    """Note the call of `cls.__new__` with a tuple of arguments; that of OrderedDict gives an empty dict."""
    args, cls = m.pop(), m.pop()
    if type(args) is not tuple:
        raise Fault
    if args and copies_its_list(cls):
        raise Fault  # of sets, `__new__` ignores the arguments; picklers write all of these as calls
    m.stack.append(DictNote(ordered=True) if is_ordered_dict(cls) else Call(cls, args))
    return pos


def _newobj_ex(m: Machine, pos: int) -> int:
    """Note the call of `cls.__new__` with arguments and keyword arguments; these become the last argument."""
    kwargs, args, cls = m.pop(), m.pop(), m.pop()
    if type(args) is not tuple or type(kwargs) is not DictNote:
        raise Fault
    m.charge(8 * len(args))  # they are copied below, and a file may use one tuple many times
    m.stack.append(Call(cls, (*args, kwargs) if kwargs.data else args))
    return pos


def _obj(m: Machine, pos: int) -> int:
    """Note the call of a class, given above the last mark together with its arguments (protocol 1)."""
    cls, *args = m.pop_mark() or [None]  # without even a class: a call of None, which stands for nothing later on
    m.stack.append(Call(cls, tuple(args)))
    return pos


def _inst(m: Machine, pos: int) -> int:
    """Note the call of a class, given as two lines, with the values above the last mark (protocol 0)."""
    pos = _global(m, pos)
    cls = m.stack.pop()
    m.stack.append(Call(cls, tuple(m.pop_mark())))
    return pos


def _build(m: Machine, pos: int) -> int:
    """Note the state of the object on top of the stack: of the result of a call, or of an OrderedDict."""
    state, target = m.pop(), m.top()
    if type(target) is not Call and type(target) is not DictNote:
        raise m.refuse("unsafe_build", target)
    if target.state is not None:  # picklers give a state once; a second one would hide the first from a reader
        raise Fault
    target.state = state
    return pos


def _binpersid(m: Machine, pos: int) -> int:
    stack = m.stack  # without `Machine.pop`, as this handler runs once for each tensor
    if len(stack) <= m.marks[-1]:
        raise Fault
    stack[-1] = made = PersistentId(stack[-1])
    m.persistent_ids.append(made)
    return pos


def _persid(m: Machine, pos: int) -> int:
    """Push a persistent id given as a line (protocol 0): text, where torch's own ids are tuples, so no storage."""
    line, pos = m.line(pos)
    m.persistent_ids.append(PersistentId(text(line)))
    m.stack.append(m.persistent_ids[-1])
    return pos


HANDLERS: dict[bytes, Handler] = {
    # EMPTY_DICT, EMPTY_LIST, EMPTY_SET
    b"}": _push_new(DictNote, DICT_BYTES), b"]": _push_new(list, LIST_BYTES),
    b"\x8f": _push_new(lambda: SetNote([]), SET_BYTES),
    # TUPLE1, TUPLE2, TUPLE3
    b"\x85": _tuple(1), b"\x86": _tuple(2), b"\x87": _tuple(3),
    # TUPLE, LIST, DICT, FROZENSET
    b"t": _collect(tuple), b"l": _collect(list, LIST_BYTES), b"d": _collect(_dict, DICT_BYTES),
    b"\x91": _collect(SetNote, SET_BYTES),
    # SETITEM, SETITEMS, APPEND, APPENDS, ADDITEMS
    b"s": _setitem, b"u": _setitems, b"a": _append, b"e": _appends, b"\x90": _additems,
    # GLOBAL, STACK_GLOBAL, EXT1, EXT2, EXT4
    b"c": _global, b"\x93": _stack_global, b"\x82": _extension(1), b"\x83": _extension(2), b"\x84": _extension(4),
    # REDUCE, NEWOBJ, NEWOBJ_EX, OBJ, INST, BUILD
    b"R": _reduce, b"\x81": _newobj, b"\x92": _newobj_ex, b"o": _obj, b"i": _inst, b"b": _build,
    # BINPERSID, PERSID
    b"Q": _binpersid, b"P": _persid,
}  # fmt: skip
"""The handler of each opcode; `literals.HANDLERS` has the others."""
