"""The pickle machine: plain data and inert notes of what a file names. It imports, calls, hashes and prints nothing."""

from __future__ import annotations

import struct

from smartload.errors import UnreadableError
from smartload.pickles.inert import literals
from smartload.pickles.inert import objects as building
from smartload.pickles.inert.machine import Fault, Machine, Short
from smartload.pickles.inert.values import Call, DictNote, Global, PersistentId, RawBytes, SetNote
from smartload.records.problems import Kind, Problem

__all__ = ["Call", "DictNote", "Global", "PersistentId", "RawBytes", "SetNote", "Short", "parse"]

_KNOWN = literals.HANDLERS | building.HANDLERS
_OPS = tuple(_KNOWN.get(bytes([code]), literals.unknown) for code in range(256))


def parse(
    data: bytes | bytearray, start: int, file: str, *, whole: bool = True
) -> tuple[object, int, list[PersistentId]]:
    """The value of the pickle at `start`, the position behind it, and the persistent ids in it.

    Raises `Short` where `data` is not the whole file and the pickle goes on behind its end; UnreadableError for a
    damaged pickle, UnsafeCheckpointError for one that tries to change what it merely names.
    """
    machine = Machine(data, start, file)
    try:
        return machine.run(_OPS), machine.pos, machine.persistent_ids
    except (Short, IndexError, struct.error) as error:
        # An operand that ends behind the data shows as one of these, and only there.
        cut = isinstance(error, Short) or machine.pos + 16 > len(data)
        if cut and not whole:
            raise Short from None
        kind: Kind = "pickle_short" if cut else "pickle"
        raise UnreadableError(Problem(kind, file, {"at": machine.pos})) from None
    except (Fault, KeyError, ValueError, OverflowError, TypeError, MemoryError):
        raise UnreadableError(Problem("pickle", file, {"at": machine.pos})) from None
