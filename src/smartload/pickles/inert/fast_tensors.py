"""What torch writes for every tensor, read at once instead of opcode by opcode.

A tensor takes some 30 opcodes, the same ones each time but for a few numbers. Nothing is decided here: where a pickle
has exactly these opcodes, and counts its memo as picklers do, the result is the one that they have one by one.
"""

from __future__ import annotations

import re
import sys
from array import array
from collections.abc import Callable
from typing import TypeVar

from smartload.pickles.inert.values import Map, Obj, Pid, Ref, is_ordered_dict

OPCODES = 27
"""About so many does a phrase stand for."""

# Every repetition has its limit and one end only, so that bytes that are no phrase after all take no time to speak of.
_GET, _PUT, _NUMBER = rb"(?:h.|j....)", rb"r(....)", rb"(?:K.|M..|J....)"
_SIZE = rb"(\(?" + _NUMBER + rb"{0,64}[t\x85\x86\x87])" + _PUT
_KIND = rb"\(\((" + _GET + _GET + rb")"
_STORAGE = rb"X(.)\0\0\0([0-9]{1,20})" + _PUT + rb"(" + _GET + rb")(" + _NUMBER + rb")(N?)t" + _PUT + rb"Q"
_TENSOR = rb"(" + _NUMBER + rb")" + _SIZE + _SIZE + rb"\x89(" + _GET + rb")\)R" + _PUT + rb"t" + _PUT + rb"R" + _PUT
_phrase = re.compile(_KIND + _STORAGE + _TENSOR, re.DOTALL).match
_pieces = re.compile(_GET + rb"|" + _NUMBER, re.DOTALL).findall
_PUTS = 7
_COUNTED = 4 * _PUTS

_T = TypeVar("_T")


class _Known(dict[bytes, _T]):
    """What pieces of a pickle mean; one that occurs again is not taken apart again."""

    def __init__(self, meaning: Callable[[bytes], _T]) -> None:
        self._meaning = meaning

    def __missing__(self, raw: bytes) -> _T:
        self[raw] = meaning = self._meaning(raw)
        return meaning


class Phrases:
    """Reads the phrases of one pickle, and remembers in its memo what they remember."""

    def __init__(self, data: bytes | bytearray, memo: list[object]) -> None:
        self._data, self._memo = data, memo
        self._number, self._size = _Known(_number), _Known(_size)
        self._got: dict[bytes, tuple[object, ...]] = {}
        self._counts = b""

    def read(self, pos: int, func: object) -> tuple[int, Pid, Obj] | None:
        """The position behind the phrase that begins at `pos` with two marks, its storage, and its call of `func`.

        None, and nothing is done, where something else stands there.
        """
        found = _phrase(self._data, pos)
        if found is None or type(func) is not Ref or is_ordered_dict(func):
            return None
        kind, length, name, a, place, count, no, b, first, size, c, step, d, hooks, e, f, g = found.groups()
        memo, got = self._memo, self._got
        at, shape, stride = 4 * len(memo), self._size[size], self._size[step]
        if at + _COUNTED > len(self._counts):
            self._counts = _counts(2 * len(memo) + 1000)
        if a + b + c + d + e + f + g != self._counts[at : at + _COUNTED] or length[0] != len(name):
            return None
        try:
            (word, storage), (device,), (called,) = got[kind], got[place], got[hooks]
        except KeyError:
            return self.read(pos, func) if self._fetch(kind, place, hooks) else None
        if shape is None or stride is None or not is_ordered_dict(called):
            return None
        key, number = str(name, "ascii"), self._number
        said = (word, storage, key, device, number[count], None) if no else (word, storage, key, device, number[count])
        pid, ordered = Pid(said), Map(ordered=True)
        args = (pid, number[first], shape, stride, False, ordered)
        tensor = Obj(func, args)
        memo += (key, said, shape, stride, ordered, args, tensor)
        return found.end(), pid, tensor

    def forget(self) -> None:
        """What the memo holds is no longer what it was."""
        self._got.clear()

    def _fetch(self, *gets: bytes) -> bool:
        """Look in the memo for what opcodes get from it; False where it is not there."""
        for raw in gets:
            places = [_number(each) for each in _pieces(raw)]
            if max(places) >= len(self._memo):
                return False
            self._got[raw] = tuple(self._memo[place] for place in places)
        return True


def _counts(most: int) -> bytes:
    """All numbers below `most`, as a pickle spells them."""
    numbers = array("I", range(most))
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def _number(raw: bytes) -> int:
    """The number, or the place in the memo, that an opcode with its operand stands for."""
    return int.from_bytes(raw[1:], "little", signed=raw[:1] == b"J")


def _size(raw: bytes) -> tuple[int, ...] | None:
    """The tuple of numbers that opcodes make; None where they would take something else into it, or leave a mark."""
    marked, numbers = raw[:1] == b"(", tuple(map(_number, _pieces(raw)))
    right = raw[-1:] == b"t" if marked else raw[-1] - 0x84 == len(numbers)
    return numbers if right else None
