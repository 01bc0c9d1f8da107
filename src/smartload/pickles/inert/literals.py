"""Opcodes of plain values: numbers, text, bytes, the memo, and what merely moves the stack."""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable

from smartload.errors import UnreadableError
from smartload.pickles.inert.machine import Fault, Handler, Machine
from smartload.pickles.inert.values import RawBytes
from smartload.records.problems import Problem

# Looked up now: a codec is imported when it is first used, and nothing shall be imported because of a file.
_raw_unicode = codecs.getdecoder("raw-unicode-escape")
codecs.lookup("unicode-escape")


def _constant(value: object) -> Handler:
    def op(m: Machine, pos: int) -> int:
        m.stack.append(value)
        return pos

    return op


def _number(form: str) -> Handler:
    layout = struct.Struct(form)

    def op(m: Machine, pos: int) -> int:
        m.stack.append(layout.unpack_from(m.data, pos)[0])
        return pos + layout.size

    return op


def _counted(form: str, convert: Callable[[bytes], object]) -> Handler:
    layout = struct.Struct(form)

    def op(m: Machine, pos: int) -> int:
        size: int = layout.unpack_from(m.data, pos)[0]
        pos += layout.size
        m.stack.append(convert(m.take(pos, size)))
        return pos + size

    return op


def _blob(form: str, mutable: bool = False) -> Handler:
    layout = struct.Struct(form)

    def op(m: Machine, pos: int) -> int:
        size: int = layout.unpack_from(m.data, pos)[0]
        pos += layout.size
        m.stack.append(RawBytes(pos, m.view(pos, size), mutable))
        return pos + size

    return op


def _lined(convert: Callable[[bytes], object]) -> Handler:
    def op(m: Machine, pos: int) -> int:
        line, pos = m.line(pos)
        m.stack.append(convert(line))
        return pos

    return op


def text(raw: bytes) -> str:
    """Text as pickles hold it: UTF-8 in which lone surrogates may stand."""
    return raw.decode("utf-8", "surrogatepass")


def _old_text(raw: bytes) -> str | bytes:
    # Python 2 wrote names and raw bytes alike; what is no UTF-8 cannot be a name.
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw


def _quoted(line: bytes) -> str | bytes:
    line = line.strip()
    if len(line) < 2 or line[:1] not in (b"'", b'"') or line[-1:] != line[:1]:
        raise Fault
    return _old_text(codecs.escape_decode(line[1:-1])[0])


def _int_line(line: bytes) -> object:
    return {b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line)


def _long(raw: bytes) -> int:
    return int.from_bytes(raw, "little", signed=True)


def _pop(m: Machine, pos: int) -> int:
    if len(m.stack) > m.marks[-1]:
        m.stack.pop()
    else:
        m.pop_mark()  # POP on an empty frame takes the mark, as in Python's own
    return pos


def _pop_to_mark(m: Machine, pos: int) -> int:
    m.pop_mark()
    return pos


def _dup(m: Machine, pos: int) -> int:
    m.stack.append(m.top())
    return pos


def _put(width: int) -> Handler:
    def op(m: Machine, pos: int) -> int:
        m.put(int.from_bytes(m.take(pos, width), "little"), m.top())
        return pos + width

    return op


def _get(width: int) -> Handler:
    def op(m: Machine, pos: int) -> int:
        m.stack.append(m.get(int.from_bytes(m.take(pos, width), "little")))
        return pos + width

    return op


def _index(line: bytes) -> int:
    number = int(line)
    if number >> 32:  # picklers count; numbers beyond it can be chosen to have one hash
        raise Fault
    return number


def _put_line(m: Machine, pos: int) -> int:
    line, pos = m.line(pos)
    m.put(_index(line), m.top())
    return pos


def _get_line(m: Machine, pos: int) -> int:
    line, pos = m.line(pos)
    m.stack.append(m.get(int(line)))
    return pos


def _memoize(m: Machine, pos: int) -> int:
    m.put(len(m.memo) + len(m.sparse), m.top())
    return pos


def _proto(m: Machine, pos: int) -> int:
    if m.data[pos] > 5:
        raise UnreadableError(Problem("pickle_protocol", m.file, {"protocol": m.data[pos]}))
    return pos + 1


def _frame(m: Machine, pos: int) -> int:
    return pos + 8


def unknown(m: Machine, pos: int) -> int:
    """What every byte means that is no opcode, and the two opcodes whose data lies outside the file."""
    raise Fault


HANDLERS: dict[bytes, Handler] = {
    b"N": _constant(None), b"\x88": _constant(True), b"\x89": _constant(False), b")": _constant(()),
    b"J": _number("<i"), b"K": _number("<B"), b"M": _number("<H"), b"G": _number(">d"),
    b"U": _counted("<B", _old_text), b"T": _counted("<i", _old_text),
    b"\x8c": _counted("<B", text), b"X": _counted("<I", text), b"\x8d": _counted("<Q", text),
    b"C": _blob("<B"), b"B": _blob("<I"), b"\x8e": _blob("<Q"), b"\x96": _blob("<Q", mutable=True),
    b"\x8a": _counted("<B", _long), b"\x8b": _counted("<i", _long),
    b"I": _lined(_int_line), b"L": _lined(lambda line: int(line.removesuffix(b"L"))), b"F": _lined(float),
    b"S": _lined(_quoted), b"V": _lined(lambda line: _raw_unicode(line)[0]),
    b"0": _pop, b"1": _pop_to_mark, b"2": _dup,
    b"q": _put(1), b"r": _put(4), b"p": _put_line, b"j": _get(4), b"g": _get_line, b"\x94": _memoize,
    b"\x80": _proto, b"\x95": _frame,
}  # fmt: skip
