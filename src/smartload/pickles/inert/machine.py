"""The stack, the marks and the memo of the pickle machine, and how opcodes read their operands."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TypeAlias

from smartload.errors import UnreadableError, UnsafeCheckpointError
from smartload.pickles.inert.values import Global, PersistentId
from smartload.records.problems import Kind, Problem

MAX_OPS = 1 << 24
"""Opcodes of one pickle; 370,000 tensors need no more, and a byte of a hostile one buys at most 100 bytes of memory."""


_WORD = struct.Struct("<I")


class Short(Exception):
    """The bytes end before the pickle does."""


class Fault(Exception):
    """The pickle is not one that any pickler writes."""


class Machine:
    """One run over one pickle; a handler gets the machine and the position of its operand and returns the next one."""

    __slots__ = ("copied", "data", "file", "marks", "memo", "persistent_ids", "pos", "sparse", "stack")

    def __init__(self, data: bytes | bytearray, pos: int, file: str) -> None:
        self.data, self.pos, self.file = data, pos, file
        self.stack: list[object] = []
        self.marks: list[int] = [0]
        self.memo: list[object] = []
        self.sparse: dict[int, object] = {}
        self.persistent_ids: list[PersistentId] = []
        self.copied = 0

    def run(self, ops: tuple[Handler, ...]) -> object:
        """Execute until STOP; `pos` is then behind it."""
        data, stack, marks, memo, pos, floor = self.data, self.stack, self.marks, self.memo, self.pos, 0
        word, size, grow, sparse = _WORD.unpack_from, len(self.data), self.stack.append, self.sparse
        try:
            for _ in range(MAX_OPS):
                op = data[pos]
                # What torch writes most is done here, the most frequent first; `floor` is the last mark.
                if op == 0x72 and len(stack) > floor:  # LONG_BINPUT
                    index = word(data, pos + 1)[0]
                    if index == len(memo) and not sparse:
                        memo.append(stack[-1])
                    else:
                        self.put(index, stack[-1])
                    pos += 5
                elif op == 0x68:  # BINGET
                    index = data[pos + 1]
                    grow(memo[index] if index < len(memo) else sparse[index])
                    pos += 2
                elif op == 0x58:  # BINUNICODE
                    pos, end = pos + 5, pos + 5 + word(data, pos + 1)[0]
                    if end > size:
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
            self.pos = pos
        raise UnreadableError(Problem("pickle_long", self.file, {"limit": MAX_OPS}))

    def put(self, index: int, value: object) -> None:
        """Remember a value; picklers count from 0, what lies beyond the count is kept apart."""
        if index == len(self.memo):
            self.memo.append(value)
            self.sparse.pop(index, None)
        elif index < len(self.memo):
            self.memo[index] = value
        else:
            self.sparse[index] = value

    def get(self, index: int) -> object:
        """The value under a number; KeyError where there is none."""
        return self.memo[index] if 0 <= index < len(self.memo) else self.sparse[index]

    def pop(self) -> object:
        """The topmost value, taken; never through a mark."""
        if len(self.stack) <= self.marks[-1]:
            raise Fault
        return self.stack.pop()

    def top(self) -> object:
        """The topmost value above the last mark."""
        if len(self.stack) <= self.marks[-1]:
            raise Fault
        return self.stack[-1]

    def pop_mark(self) -> list[object]:
        """All values above the last mark, taken together with it."""
        if len(self.marks) == 1:
            raise Fault
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def take(self, pos: int, size: int) -> bytes:
        """`size` bytes from `pos` on, checked against what is there before anything is copied."""
        self.check(pos, size)
        return bytes(self.data[pos : pos + size])

    def view(self, pos: int, size: int) -> memoryview:
        """The same without a copy."""
        self.check(pos, size)
        return memoryview(self.data)[pos : pos + size]

    def check(self, pos: int, size: int) -> None:
        """Short where fewer bytes are there, Fault where there cannot be so many."""
        if size < 0:
            raise Fault
        if size > len(self.data) - pos:
            raise Short

    def charge(self, items: int) -> None:
        """Count items that are copied once more, as if each were an opcode of its own."""
        self.copied += items
        if self.copied > MAX_OPS:
            raise UnreadableError(Problem("pickle_long", self.file, {"limit": MAX_OPS}))

    def line(self, pos: int) -> tuple[bytes, int]:
        """The line at `pos` and the position behind it."""
        end = self.data.find(b"\n", pos)
        if end < 0:
            raise Short
        return bytes(self.data[pos:end]), end + 1

    def refuse(self, kind: Kind, target: object) -> Exception:
        """What to raise where a pickle wants to change a thing that cannot be changed: `kind` if it only named it."""
        if type(target) is not Global:
            return Fault()
        name = f"{target.module}.{target.name}"[:100].encode("unicode_escape").decode("ascii")
        return UnsafeCheckpointError(Problem(kind, self.file, {"name": name}))


Handler: TypeAlias = Callable[[Machine, int], int]
