"""Opcodes of containers and calls: all of them only note what the file asks for."""

from __future__ import annotations

from collections.abc import Callable

from smartload.pickles.inert.literals import text
from smartload.pickles.inert.machine import Fault, Handler, Machine
from smartload.pickles.inert.values import Call, DictNote, Global, PersistentId, SetNote, is_ordered_dict


def _fresh(make: Callable[[], object]) -> Handler:
    def op(m: Machine, pos: int) -> int:
        m.stack.append(make())
        return pos

    return op


def _tuple(size: int) -> Handler:
    def op(m: Machine, pos: int) -> int:
        stack = m.stack
        if len(stack) - size < m.marks[-1]:
            raise Fault
        stack[-size:] = [tuple(stack[-size:])]
        return pos

    return op


def _marked(make: Callable[[list[object]], object]) -> Handler:
    def op(m: Machine, pos: int) -> int:
        items = m.pop_mark()
        m.stack.append(make(items))
        return pos

    return op


def _map_of(items: list[object]) -> DictNote:
    made = DictNote()
    _fill(made, items)
    return made


def _fill(target: DictNote, items: list[object]) -> None:
    if len(items) % 2:
        raise Fault
    keys = items[::2]
    if {type(key) for key in keys} == {str}:
        new: dict[str, object] = dict(zip(keys, items[1::2]))  # type: ignore[arg-type]
        if len(new) == len(keys) and target.data.keys().isdisjoint(new):
            target.data.update(new)
            return
    for key, value in zip(keys, items[1::2]):
        target.put(key, value)


def _items(m: Machine) -> DictNote:
    """The dict on top of the stack, or that of the object there."""
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
    _items(m).put(key, value)
    return pos


def _setitems(m: Machine, pos: int) -> int:
    items = m.pop_mark()
    _fill(_items(m), items)
    return pos


def _extend(m: Machine, items: list[object]) -> None:
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
    def op(m: Machine, pos: int) -> int:
        m.stack.append(Global("copyreg extension", str(int.from_bytes(m.take(pos, width), "little"))))
        return pos + width

    return op


def _reduce(m: Machine, pos: int) -> int:
    stack = m.stack
    if len(stack) - 2 < m.marks[-1]:
        raise Fault
    args, func = stack.pop(), stack[-1]
    if type(args) is not tuple:
        raise Fault
    if is_ordered_dict(func):
        stack[-1] = _ordered(m, args) if args else DictNote(ordered=True)
    else:
        stack[-1] = Call(func, args)
    return pos


def _ordered(m: Machine, args: tuple[object, ...]) -> DictNote:
    made = DictNote(ordered=True)
    # Python 2 gave the items as one list of pairs.
    pairs = args[0] if type(args[0]) is list else ()
    m.charge(4 * len(pairs))  # about what the opcodes of a pair take
    for pair in pairs:
        if type(pair) not in (list, tuple) or len(pair) != 2:
            raise Fault
        made.put(*pair)
    return made


def _newobj(m: Machine, pos: int) -> int:
    args, cls = m.pop(), m.pop()
    if type(args) is not tuple:
        raise Fault
    m.stack.append(Call(cls, args))
    return pos


def _newobj_ex(m: Machine, pos: int) -> int:
    kwargs, args, cls = m.pop(), m.pop(), m.pop()
    if type(args) is not tuple or type(kwargs) is not DictNote:
        raise Fault
    m.charge(len(args))
    m.stack.append(Call(cls, (*args, kwargs) if kwargs.data else args))
    return pos


def _obj(m: Machine, pos: int) -> int:
    cls, *args = m.pop_mark() or [None]
    m.stack.append(Call(cls, tuple(args)))
    return pos


def _inst(m: Machine, pos: int) -> int:
    pos = _global(m, pos)
    cls = m.stack.pop()
    m.stack.append(Call(cls, tuple(m.pop_mark())))
    return pos


def _build(m: Machine, pos: int) -> int:
    state, target = m.pop(), m.top()
    if type(target) is not Call and type(target) is not DictNote:
        raise m.refuse("unsafe_build", target)
    if target.state is not None:
        raise Fault
    target.state = state
    return pos


def _binpersid(m: Machine, pos: int) -> int:
    stack = m.stack
    if len(stack) <= m.marks[-1]:
        raise Fault
    stack[-1] = made = PersistentId(stack[-1])
    m.persistent_ids.append(made)
    return pos


def _persid(m: Machine, pos: int) -> int:
    line, pos = m.line(pos)
    m.persistent_ids.append(PersistentId(text(line)))
    m.stack.append(m.persistent_ids[-1])
    return pos


HANDLERS: dict[bytes, Handler] = {
    b"}": _fresh(DictNote), b"]": _fresh(list), b"\x8f": _fresh(lambda: SetNote([])),
    b"\x85": _tuple(1), b"\x86": _tuple(2), b"\x87": _tuple(3),
    b"t": _marked(tuple), b"l": _marked(list), b"d": _marked(_map_of), b"\x91": _marked(SetNote),
    b"s": _setitem, b"u": _setitems, b"a": _append, b"e": _appends, b"\x90": _additems,
    b"c": _global, b"\x93": _stack_global, b"\x82": _extension(1), b"\x83": _extension(2), b"\x84": _extension(4),
    b"R": _reduce, b"\x81": _newobj, b"\x92": _newobj_ex, b"o": _obj, b"i": _inst, b"b": _build,
    b"Q": _binpersid, b"P": _persid,
}  # fmt: skip
