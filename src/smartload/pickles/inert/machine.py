"""The pickle machine: a stack, its marks, a memo, the loop over the opcodes, and how handlers read operands.

A handler is a function `(machine, position of the operand) -> position of the next opcode`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TypeAlias

from smartload.errors import UnreadableError, UnsafeCheckpointError
from smartload.pickles.inert.values import Global, PersistentId
from smartload.reading.limits import most_memory
from smartload.records.problems import Kind, Problem

MAX_OPS = 1 << 24
"""The most opcodes that one pickle may have.

torch.save writes 32 to 45 for each tensor, so 370,000 tensors fit. The limit bounds the time that a hostile file costs,
and the memory of the opcodes that are not charged for: a mark or a tuple of one byte takes up to 64.
"""
FEW_OPS = 1 << 22
"""The most opcodes of a pickle that has fewer than two bytes for each; torch.save writes three."""
DICT_BYTES, LIST_BYTES, SET_BYTES, VIEW_BYTES = 328, 96, 128, 424
"""Bytes of memory that a container or a view takes, with its first item. In the file it may be a single one."""

_WORD = struct.Struct("<I")


class Short(Exception):
    """Raised where the bytes end before the pickle does."""


class Fault(Exception):
    """Raised where the pickle is one that no pickler writes."""


class Machine:
    """One run over one pickle.

    Attributes:
        data: the bytes in which the pickle lies.
        pos: where the pickle begins; after `run`, the position behind it, or where it failed.
        file: the file's name, for messages.
        stack: the values, all frames in one list.
        marks: where in `stack` each frame begins; the first, 0, is no mark of the file's. Positions in a flat list
            keep a million marks cheap, where a list for each would take 56 bytes and more.
        memo: the values under 0, 1, 2, ... in the order in which picklers store them.
        sparse: values under any other index: a dict, since a list up to the index would let 5 bytes of a file take
            gigabytes.
        persistent_ids: those met so far.
        room: the bytes that may still be taken from `charge`.
    """

    __slots__ = ("data", "file", "marks", "memo", "persistent_ids", "pos", "room", "sparse", "stack")

    def __init__(self, data: bytes | bytearray, pos: int, file: str) -> None:
        self.data, self.pos, self.file = data, pos, file
        self.stack: list[object] = []
        self.marks: list[int] = [0]
        self.memo: list[object] = []
        self.sparse: dict[int, object] = {}
        self.persistent_ids: list[PersistentId] = []
        # Honest pickles take six times their size.
        self.room = 4 * most_memory(len(data))

    def run(self, ops: tuple[Handler, ...]) -> object:
        """Execute opcodes up to STOP, and return the value on top of the stack.

        `ops` has the handler of each byte. The loop holds everything in local names, and does the opcodes that torch
        writes most itself, the most frequent first: a call of a handler takes as long as its work.
        """
        data, stack, marks, memo, pos, floor = self.data, self.stack, self.marks, self.memo, self.pos, 0
        word, size, grow, sparse = _WORD.unpack_from, len(self.data), self.stack.append, self.sparse
        most = min(MAX_OPS, max(FEW_OPS, size // 2))
        try:
            for _ in range(most):  # an end that the file cannot move
                op = data[pos]
                # `floor` is the last mark, below which nothing may be taken. Where nothing lies above it, LONG_BINPUT
                # goes to its handler, which refuses it.
                if op == 0x72 and len(stack) > floor:  # LONG_BINPUT
                    index = word(data, pos + 1)[0]
                    if index == len(memo) and not sparse:  # as picklers count; `put` does all other cases
                        memo.append(stack[-1])
                    else:
                        self.put(index, stack[-1])
                    pos += 5
                elif op == 0x68:  # BINGET
                    index = data[pos + 1]
                    grow(memo[index] if index < len(memo) else sparse[index])  # KeyError: nothing was stored there
                    pos += 2
                elif op == 0x58:  # BINUNICODE
                    pos, end = pos + 5, pos + 5 + word(data, pos + 1)[0]
                    if end > size:  # a slice would silently be shorter
                        raise Short
                    grow(str(data[pos:end], "utf-8", "surrogatepass"))
                    pos = end
                elif op == 0x28:  # MARK
                    floor = len(stack)
                    marks.append(floor)
                    pos += 1
                elif op == 0x2E:  # STOP
                    pos += 1
                    return self.pop()
                else:
                    pos = ops[op](self, pos + 1)
                    floor = marks[-1]
        finally:
            self.pos = pos  # after an error, too: `parse` asks how near to the end it happened
        raise UnreadableError(Problem("pickle_long", self.file, {"limit": most}))

    def put(self, index: int, value: object) -> None:
        """Store `value` in the memo under `index`."""
        if index == len(self.memo):
            self.memo.append(value)
            self.sparse.pop(index, None)  # `get` asks the list first; one left here would count twice for MEMOIZE
        elif index < len(self.memo):
            self.memo[index] = value
        else:
            self.sparse[index] = value

    def get(self, index: int) -> object:
        """Return the value that the memo has under `index`; KeyError where there is none."""
        return self.memo[index] if 0 <= index < len(self.memo) else self.sparse[index]

    def pop(self) -> object:
        """Take the value on top of the stack; Fault where it lies below the last mark."""
        if len(self.stack) <= self.marks[-1]:
            raise Fault
        return self.stack.pop()

    def top(self) -> object:
        """Return the value on top of the stack; Fault where it lies below the last mark."""
        if len(self.stack) <= self.marks[-1]:
            raise Fault
        return self.stack[-1]

    def pop_mark(self) -> list[object]:
        """Take the last mark and all values above it, and return these; Fault where there is no mark."""
        if len(self.marks) == 1:
            raise Fault
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def take(self, pos: int, size: int) -> bytes:
        """Return the `size` bytes from `pos` on; Short where `data` ends before."""
        self.check(pos, size)
        return bytes(self.data[pos : pos + size])

    def view(self, pos: int, size: int) -> memoryview:
        """Return a view of the `size` bytes from `pos` on; Short where `data` ends before."""
        self.check(pos, size)
        return memoryview(self.data)[pos : pos + size]

    def check(self, pos: int, size: int) -> None:
        """Raise Short where `data` has fewer than `size` bytes from `pos` on, Fault where `size` is negative.

        It is asked before anything is allocated: a length of 8 bytes can claim exabytes.
        """
        if size < 0:
            raise Fault
        if size > len(self.data) - pos:
            raise Short

    def charge(self, nbytes: int) -> None:
        """Count bytes of memory that a handler takes, where these are many more than the opcode has.

        Two bytes of a pickle can fetch one large value from the memo and have it copied again, without end.
        """
        self.room -= nbytes
        if self.room < 0:
            raise UnreadableError(Problem("pickle_grows", self.file))

    def line(self, pos: int) -> tuple[bytes, int]:
        """Return the line at `pos`, without its end, and the position behind it."""
        end = self.data.find(b"\n", pos)
        if end < 0:
            raise Short
        return bytes(self.data[pos:end]), end + 1

    def refuse(self, kind: Kind, target: object) -> Exception:
        """Give the exception for a pickle that writes into `target`, which is no container and no result of a call.

        Into a `Global`: UnsafeCheckpointError of the given `kind`. Python's unpickler would change the module or class
        itself, without calling anything. Into any other value: Fault, since no pickler does that.
        """
        if type(target) is not Global:
            return Fault()
        # Escaped and cut, since it goes into a message and may hold control characters or a megabyte of text.
        name = f"{target.module}.{target.name}"[:100].encode("unicode_escape").decode("ascii")
        return UnsafeCheckpointError(Problem(kind, self.file, {"name": name}))


Handler: TypeAlias = Callable[[Machine, int], int]
