"""Compare the CRC32 of a zip's records with the bytes that are read of them for tensors.

No byte is read twice for it, where tensors fill their records: each read of a `CheckedFile` is noted with the CRC32 of
its bytes, in the thread that reads, and those of one record are put together when the reading is done. What of a
record nobody has read, the header of an .npy file say, is read then.
"""

from __future__ import annotations

import itertools
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import NamedTuple

from smartload.errors import UnreadableError
from smartload.load.threads import Buffer, in_threads
from smartload.load.transfer import Files, cuts
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import ByteReader, Entry, Extra, Span, Tiled, ZipRecord
from smartload.records.problems import Problem
from smartload.records.text import printable

AUTO_BYTES = 256 << 20
"""Bytes of records up to which verify="auto" compares checksums: up to there it takes a tenth of a second."""

_POLYNOMIAL = 0xEDB88320
"""That of CRC32. In such numbers the highest bit stands for x to the power of 0, and the lowest for that of 31."""


class _Piece(NamedTuple):
    """A run of bytes that was read of one record: from where up to where in the file, and its CRC32."""

    start: int
    stop: int
    crc: int


class CheckedFile:
    """A file of which every read is held against the checksums of its records.

    Args:
        file: does the reading.
        records: those with a checksum, not deflated.
    """

    def __init__(self, file: ByteReader, records: Iterable[ZipRecord]) -> None:
        self.name, self.size, self._file = file.name, file.size, file
        # For whoever asks whether it is the same file as another.
        self.path = getattr(file, "path", "")
        self._records = sorted(records, key=lambda record: record.offset)
        self._offsets = [record.offset for record in self._records]
        # Both are filled by several threads: adding to a list or a set, and setdefault, are one step each for threads.
        self._pieces: dict[int, list[_Piece]] = {}
        self._compared: set[int] = set()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on, and note the checksum of each record's share of them.

        Raises:
            UnreadableError: the file ends before, or a record that was read as a whole differs from its checksum.
        """
        self._file.read_into(offset, buffer)
        end = offset + len(buffer)
        for number in self._numbers(offset, len(buffer)):
            _, first, nbytes, *_ = self._records[number]
            last = first + nbytes
            if offset <= first and last <= end:  # as a whole, as nearly every tensor is read
                self._compare(number, zlib.crc32(buffer[first - offset : last - offset]))
            elif offset < last:
                start, stop = max(offset, first), min(end, last)
                crc = zlib.crc32(buffer[start - offset : stop - offset])
                self._pieces.setdefault(number, []).append(_Piece(start, stop, crc))

    def want(self, offset: int, nbytes: int) -> int:
        """Have the records that these bytes lie in compared, read or not; give the size of those that are new."""
        ends = (
            (number, self._offsets[number] + self._records[number].nbytes) for number in self._numbers(offset, nbytes)
        )
        new = [number for number, end in ends if offset < end and number not in self._pieces]
        self._pieces.update((number, []) for number in new)
        return sum(self._records[number].nbytes for number in new)

    def compare(self) -> None:
        """Read what is left of each record of which something was read or wanted, and compare the records.

        Raises:
            UnreadableError: a record differs from its checksum, or the file failed.
        """
        parts = {number: pieces for number, pieces in self._pieces.items() if number not in self._compared}
        missing = [
            (start + at, size)
            for number, pieces in parts.items()
            for start, stop in _gaps(self._records[number], pieces)
            for at, size in cuts(stop - start)
        ]
        in_threads([partial(self._read_rest, *gap) for gap in missing], sum(size for _, size in missing))
        for number, pieces in parts.items():
            if number not in self._compared:  # or it was read as a whole just now
                crc = 0
                for piece in _in_a_row(self._records[number], pieces):
                    crc = crc_of_both(crc, piece.crc, piece.stop - piece.start)
                self._compare(number, crc)

    def check_unchanged(self) -> None:
        """Raise UnreadableError where the file has changed, or what was read differs from its checksum."""
        self._file.check_unchanged()
        self.compare()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _numbers(self, offset: int, nbytes: int) -> range:
        """Give the numbers of the records that begin among these bytes, and of the last that begins before them."""
        return range(max(0, bisect_right(self._offsets, offset) - 1), bisect_left(self._offsets, offset + nbytes))

    def _read_rest(self, offset: int, nbytes: int, buffer: Buffer) -> int:
        self.read_into(offset, buffer.take(nbytes))
        return nbytes

    def _compare(self, number: int, crc: int) -> None:
        record = self._records[number]
        if crc != record.crc:
            # A file that is being written anew is not corrupt, and is refused for that.
            self._file.check_unchanged()
            raise UnreadableError(Problem("crc", self.name, {"name": printable(record.name)}))
        self._compared.add(number)


def with_checksums(checkpoint: Checkpoint) -> Checkpoint:
    """Give the checkpoint with files that compare checksums; the same one where it has none to compare."""
    by_file: dict[int, list[ZipRecord]] = {}
    for record in checkpoint.records:
        # torch writes 0 where it was told not to compute it (torch.serialization.set_crc32_options). A deflated record
        # was compared when it was inflated.
        if record.crc and record.packed is None:
            by_file.setdefault(record.file, []).append(record)
    if not by_file:
        return checkpoint
    files = (
        CheckedFile(file, by_file[number]) if number in by_file else file
        for number, file in enumerate(checkpoint.files)
    )
    return replace(checkpoint, files=tuple(files))


def compares(verify: bool | str, checkpoint: Checkpoint, entries: Iterable[Entry]) -> bool:
    """Decide what verify="auto" means for a load of `entries`: to compare where the records are small.

    Args:
        verify: what the caller asked for.
        checkpoint: one of `with_checksums`.
        entries: what is to be loaded.
    """
    if verify != "auto" or sum(record.nbytes for record in checkpoint.records) <= AUTO_BYTES:
        return bool(verify)
    # Beside the weights may lie an optimizer's state, twice as large. By the records, not by the tensors: a tensor may
    # be a small view of a large record, which would have to be read as a whole.
    return want_records(entries, checkpoint.files) <= AUTO_BYTES


def want_records(entries: Iterable[Entry], files: Files) -> int:
    """Have all records compared that `entries` lie in; give the bytes of those that nobody has read from yet."""
    nbytes = 0
    for span in itertools.chain.from_iterable(map(_spans, entries)):
        file = files[span.file]
        if isinstance(file, CheckedFile):
            nbytes += file.want(span.offset, span.nbytes)
    return nbytes


def compare_now(entries: Iterable[Entry], files: Files) -> None:
    """Compare all records that `entries` lie in, before any of them is read for a tensor.

    Raises:
        UnreadableError: a record differs from its checksum, or a file failed.
    """
    want_records(entries, files)
    for file in files:
        if isinstance(file, CheckedFile):
            file.compare()


def all_have_checksums(records: Sequence[ZipRecord]) -> bool:
    """Tell whether there are records, and each that has bytes has a checksum."""
    return bool(records) and all(record.crc or not record.nbytes for record in records)


def crc_of_both(first: int, second: int, nbytes: int) -> int:
    """Give the CRC32 of two runs of bytes, one behind the other, from the CRC32 of each and the size of the second."""
    return _product(first, _shift(nbytes)) ^ second


@lru_cache(maxsize=64)  # most pieces of large records are of one size
def _shift(nbytes: int) -> int:
    """Give x to the power of eight times `nbytes`: by it, `nbytes` more bytes of zeros multiply the remainder."""
    result, power = 1 << 31, 1 << 23  # 1, and x to the power of 8
    while nbytes:
        if nbytes & 1:
            result = _product(result, power)
        power = _product(power, power)
        nbytes >>= 1
    return result


def _product(one: int, other: int) -> int:
    """Multiply two polynomials, modulo that of CRC32."""
    result = 0
    for bit in range(31, -1, -1):
        if one >> bit & 1:
            result ^= other
        other = other >> 1 ^ (_POLYNOMIAL if other & 1 else 0)  # times x
    return result


def _in_a_row(record: ZipRecord, pieces: Sequence[_Piece]) -> Iterator[_Piece]:
    """Give pieces of the record of which none begins before the last one ends.

    Of two that overlap (two tensors share bytes, or one was read twice) the one that begins first counts, or is longer,
    or was read later.
    """
    reached, latest_first = record.offset, pieces[::-1]
    for piece in sorted(latest_first, key=lambda piece: (piece.start, -piece.stop)):
        if piece.start >= reached:
            reached = piece.stop
            yield piece


def _gaps(record: ZipRecord, pieces: Sequence[_Piece]) -> Iterator[tuple[int, int]]:
    """Give (first byte, end) of each run of bytes of the record that is in none of the pieces in a row."""
    reached = record.offset
    for piece in _in_a_row(record, pieces):
        if piece.start > reached:
            yield reached, piece.start
        reached = piece.stop
    if reached < record.offset + record.nbytes:
        yield reached, record.offset + record.nbytes


def _spans(value: object) -> Iterator[Span]:
    """Give the spans in an entry, or in the tree of an extra state, whose depth was limited when it was read."""
    if isinstance(value, Span):
        yield value
    elif isinstance(value, Tiled):
        yield from (span for _, span in value.tiles)
    elif isinstance(value, Extra):
        yield from _spans(value.tree)
    elif isinstance(value, dict):
        yield from _spans(list(value.values()))
    elif type(value) is list or type(value) is tuple:  # no NamedTuple: an entry in memory has no spans
        yield from itertools.chain.from_iterable(map(_spans, value))
