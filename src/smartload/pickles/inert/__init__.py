"""Parse a pickle into plain data and inert notes of what it names. Nothing is imported, called, hashed or printed.

The parts: `values` are the notes, `machine` is the stack and the memo, `literals` and `objects` are the handlers of
the opcodes: of plain values and of containers and calls. `parse` puts them together.
"""

from __future__ import annotations

import struct

from smartload.errors import UnreadableError
from smartload.pickles.inert import literals, objects
from smartload.pickles.inert.machine import Fault, Machine, Short
from smartload.pickles.inert.values import Call, DictNote, Global, PersistentId, RawBytes, SetNote
from smartload.records.problems import Kind, Problem

__all__ = ["Call", "DictNote", "Global", "PersistentId", "RawBytes", "SetNote", "Short", "parse"]

_HANDLERS = literals.HANDLERS | objects.HANDLERS
# A tuple with a handler for every byte, so that the machine finds one by index and needs no check.
_OPS = tuple(_HANDLERS.get(bytes([code]), literals.unknown) for code in range(256))


def parse(
    data: bytes | bytearray, start: int, file: str, *, whole: bool = True
) -> tuple[object, int, list[PersistentId]]:
    """Parse the pickle that begins at `start` in `data`.

    Args:
        data: the file, or the first bytes of it.
        start: where the pickle begins.
        file: the file's name, for messages.
        whole: whether `data` is the whole file.

    Returns:
        The value of the pickle, the position behind it, and the persistent ids in it, in their order.

    Raises:
        Short: `data` ends within the pickle, and is not the whole file: give more of it.
        UnreadableError: the pickle is damaged.
        UnsafeCheckpointError: it tries to change a class or module that it merely names.
    """
    machine = Machine(data, start, file)
    try:
        return machine.run(_OPS), machine.pos, machine.persistent_ids
    except (Short, IndexError, struct.error) as error:
        # Handlers read operands unchecked, which is faster: one that ends behind the data raises IndexError or
        # struct.error. Opcode and operand take at most 9 bytes, so farther from the end the cause is another.
        cut = isinstance(error, Short) or machine.pos + 16 > len(data)
        if cut and not whole:
            raise Short from None
        kind: Kind = "pickle_short" if cut else "pickle"
        raise UnreadableError(Problem(kind, file, {"at": machine.pos})) from None
    except (Fault, KeyError, ValueError, OverflowError, TypeError):
        # What a handler does not check itself: a memo index that was never stored (KeyError), text that is not UTF-8,
        # a number of too many digits (ValueError), a length that no index holds.
        raise UnreadableError(Problem("pickle", file, {"at": machine.pos})) from None
