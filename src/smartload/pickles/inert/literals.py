"""Handlers of the opcodes that push plain values (numbers, text, bytes), use the memo, or only move the stack.

The `_push_...` functions make a handler; the other functions that take a machine and a position are handlers.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable

from smartload.errors import UnreadableError
from smartload.pickles.inert.machine import VIEW_BYTES, Fault, Handler, Machine
from smartload.pickles.inert.values import RawBytes
from smartload.records.problems import Problem

# Looked up at import: Python imports a codec's module when the codec is first used, and no file shall cause an import.
_raw_unicode = codecs.getdecoder("raw-unicode-escape")
codecs.lookup("unicode-escape")


def _push_constant(value: object) -> Handler:
    """Make the handler of an opcode without an operand that stands for `value`."""

    def op(m: Machine, pos: int) -> int:
        m.stack.append(value)
        return pos

    return op


def _push_number(form: str) -> Handler:
    """Make the handler of an opcode whose operand is a number in the struct format `form`."""
    layout = struct.Struct(form)

    def op(m: Machine, pos: int) -> int:
        m.stack.append(layout.unpack_from(m.data, pos)[0])
        return pos + layout.size

    return op


def _push_counted(form: str, convert: Callable[[bytes], object]) -> Handler:
    """Make the handler of an opcode whose operand is a length in the struct format `form`, then so many bytes."""
    layout = struct.Struct(form)

    def op(m: Machine, pos: int) -> int:
        size: int = layout.unpack_from(m.data, pos)[0]
        pos += layout.size
        m.stack.append(convert(m.take(pos, size)))
        return pos + size

    return op


def _push_bytes(form: str, mutable: bool = False) -> Handler:
    """Make the handler of an opcode that gives a bytes object, `mutable` a bytearray: a length, then the bytes."""
    layout = struct.Struct(form)

    def op(m: Machine, pos: int) -> int:
        size: int = layout.unpack_from(m.data, pos)[0]
        pos += layout.size
        m.charge(VIEW_BYTES)
        # The position is kept: an array's data can then be read from the file like any tensor's, without a copy.
        m.stack.append(RawBytes(pos, m.view(pos, size), mutable))
        return pos + size

    return op


def _push_line(convert: Callable[[bytes], object]) -> Handler:
    """Make the handler of an opcode of protocol 0, whose operand is a line of text."""

    def op(m: Machine, pos: int) -> int:
        line, pos = m.line(pos)
        m.stack.append(convert(line))
        return pos

    return op


def text(raw: bytes) -> str:
    """Decode `raw` as pickles write text: UTF-8, in which lone surrogates may stand."""
    return raw.decode("utf-8", "surrogatepass")


def _python2_text(raw: bytes) -> str | bytes:
    """Decode a `str` of Python 2, which may be a name or raw data; what is no UTF-8 is data and stays bytes."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw


def _quoted_text(line: bytes) -> str | bytes:
    """Decode a line that holds the `repr` of a Python 2 `str`, such as `'fc.weight'`."""
    line = line.strip()
    if len(line) < 2 or line[:1] not in (b"'", b'"') or line[-1:] != line[:1]:
        raise Fault
    # The decoder that Python's own unpickler uses here; an eval of the literal would run what the file says.
    return _python2_text(codecs.escape_decode(line[1:-1])[0])


def _int_line(line: bytes) -> object:
    # Protocol 0 has no opcode for a bool: it writes one as the int 00 or 01. The other lines go through int(), whose
    # limit of 4,300 digits matters: the time to read a decimal number grows with the square of its digits.
    return {b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line)


def _long(raw: bytes) -> int:
    # Takes linear time, so unlike decimal digits these need no limit of their own.
    return int.from_bytes(raw, "little", signed=True)


def _pop(m: Machine, pos: int) -> int:
    """Drop the top of the stack, or the last mark where nothing lies above it, as Python's unpickler does."""
    if len(m.stack) > m.marks[-1]:
        m.stack.pop()
    else:
        m.pop_mark()
    return pos


def _pop_to_mark(m: Machine, pos: int) -> int:
    m.pop_mark()
    return pos


def _dup(m: Machine, pos: int) -> int:
    m.stack.append(m.top())
    return pos


def _put(width: int) -> Handler:
    """Make the handler that stores the top of the stack in the memo, under an index of `width` bytes."""

    def op(m: Machine, pos: int) -> int:
        m.put(int.from_bytes(m.take(pos, width), "little"), m.top())
        return pos + width

    return op


def _get(width: int) -> Handler:
    """Make the handler that pushes what the memo has under an index of `width` bytes."""

    def op(m: Machine, pos: int) -> int:
        m.stack.append(m.get(int.from_bytes(m.take(pos, width), "little")))
        return pos + width

    return op


def _put_line(m: Machine, pos: int) -> int:
    """Store the top of the stack in the memo, under an index written as a line of digits."""
    line, pos = m.line(pos)
    index = int(line)
    # Picklers count from 0, and their binary opcodes end at 32 bits. Far larger ints can be chosen to have one hash,
    # which makes the dict behind the memo take a time that grows with the square of their number.
    if index >> 32:
        raise Fault
    m.put(index, m.top())
    return pos


def _get_line(m: Machine, pos: int) -> int:
    line, pos = m.line(pos)
    m.stack.append(m.get(int(line)))
    return pos


def _memoize(m: Machine, pos: int) -> int:
    # The opcode has no index: the pickler that wrote it counted how many values the memo has.
    m.put(len(m.memo) + len(m.sparse), m.top())
    return pos


def _proto(m: Machine, pos: int) -> int:
    """Check the number of the protocol: 5 is the newest that Python has."""
    if m.data[pos] > 5:
        raise UnreadableError(Problem("pickle_protocol", m.file, {"protocol": m.data[pos]}))
    return pos + 1


def _frame(m: Machine, pos: int) -> int:
    # The length of a frame, 8 bytes, only tells a reader of a stream how much to read ahead.
    return pos + 8


def unknown(m: Machine, pos: int) -> int:
    """Refuse the byte: it is no opcode, or one of the two opcodes for buffers that the pickle's writer kept outside."""
    raise Fault


# BINSTRING and LONG4 (b"T", b"\x8b") have a signed length; `Machine.take` refuses a negative one.
HANDLERS: dict[bytes, Handler] = {
    # NONE, NEWTRUE, NEWFALSE, EMPTY_TUPLE
    b"N": _push_constant(None), b"\x88": _push_constant(True), b"\x89": _push_constant(False),
    b")": _push_constant(()),
    # BININT, BININT1, BININT2, BINFLOAT
    b"J": _push_number("<i"), b"K": _push_number("<B"), b"M": _push_number("<H"), b"G": _push_number(">d"),
    # SHORT_BINSTRING, BINSTRING
    b"U": _push_counted("<B", _python2_text), b"T": _push_counted("<i", _python2_text),
    # SHORT_BINUNICODE, BINUNICODE, BINUNICODE8
    b"\x8c": _push_counted("<B", text), b"X": _push_counted("<I", text), b"\x8d": _push_counted("<Q", text),
    # SHORT_BINBYTES, BINBYTES, BINBYTES8, BYTEARRAY8
    b"C": _push_bytes("<B"), b"B": _push_bytes("<I"), b"\x8e": _push_bytes("<Q"),
    b"\x96": _push_bytes("<Q", mutable=True),
    # LONG1, LONG4
    b"\x8a": _push_counted("<B", _long), b"\x8b": _push_counted("<i", _long),
    # INT, LONG, FLOAT, STRING, UNICODE: protocol 0
    b"I": _push_line(_int_line), b"L": _push_line(lambda line: int(line.removesuffix(b"L"))), b"F": _push_line(float),
    b"S": _push_line(_quoted_text), b"V": _push_line(lambda line: _raw_unicode(line)[0]),
    # POP, POP_MARK, DUP
    b"0": _pop, b"1": _pop_to_mark, b"2": _dup,
    # BINPUT, LONG_BINPUT, PUT, LONG_BINGET, GET, MEMOIZE
    b"q": _put(1), b"r": _put(4), b"p": _put_line, b"j": _get(4), b"g": _get_line, b"\x94": _memoize,
    # PROTO, FRAME
    b"\x80": _proto, b"\x95": _frame,
}  # fmt: skip
"""The handler of each opcode. BINGET, MARK and STOP are missing: `Machine.run` handles them itself."""
