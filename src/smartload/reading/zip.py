"""Read a zip archive: the names of its records, and where their bytes lie.

First the directory at the end of the file (`read_directory`), then each record's own header (`read_archive`). A zip
says most things twice, in both, and readers differ in which they believe. So whatever contradicts itself is refused:
two readers must not find two sets of weights in one file.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from smartload.errors import UnreadableError
from smartload.reading.files import check_growth, read_bytes
from smartload.records.entries import ByteReader, ZipRecord
from smartload.records.problems import Kind, Problem
from smartload.records.text import printable

_END = struct.Struct("<4s4H2LH")
"""End of the directory: signature, this disk, the directory's disk, entries on this disk, entries, size and offset of
the directory, length of a comment that follows."""
_LOCATOR = struct.Struct("<4sLQL")
"""Before it in a zip64: signature, disk and offset of the zip64 end, number of disks."""
_END64 = struct.Struct("<4sQ2H2L4Q")
"""The zip64 end: signature, length of the rest, two versions, then as in `_END`, with wider numbers."""
_CENTRAL = struct.Struct("<4s6H3L5H2L")
"""An entry of the directory; name, extra fields and comment follow, whose lengths are fields 10 to 12."""
_LOCAL = struct.Struct("<4s5H3L2H")
"""The header before a record's bytes; name and extra fields follow, whose lengths are the last two."""
_MAX_DIRECTORY = 1 << 28
"""Bytes of a directory: about three million records, where the largest real files have some 100,000."""
_ENCRYPTED = 0x2041  # three flags: encrypted, strongly encrypted, directory encrypted
_DEFLATED = 8
_USUAL_TAIL = 256
"""Where the zip has no comment, the three structures of its end (98 bytes) lie in these last bytes of the file."""
_BLOCK = 1 << 17
"""Bytes read at once where headers lie close together: thousands of small reads take longer than the bytes between."""
_IS_WIDE = 0xFFFFFFFF
"""In place of a value that does not fit into 32 bits, or that the writer chose to put into the zip64 field."""


class Listed(NamedTuple):
    """What the directory of a zip says of one entry.

    Attributes:
        name: the whole name.
        raw: the name's bytes in the file.
        header: the offset of the record's own header.
        nbytes: the size of the record, unpacked.
        crc: the CRC32 of the record; torch writes 0 where it was told not to compute it.
        packed: the bytes that the record takes in the file where it is deflated, else None.
        odd: whether it is encrypted, or packed in another way than by deflating.
    """

    name: str
    raw: bytes
    header: int
    nbytes: int
    crc: int
    packed: int | None
    odd: bool


@dataclass(frozen=True, slots=True)
class Directory:
    """The directory of a zip: the entries that it lists, and the offset at which it begins."""

    listed: list[Listed]
    offset: int

    def names(self) -> list[str]:
        """Give the names of the records without the folder that torch puts them in: 'net/data.pkl' -> 'data.pkl'."""
        return [item.name.partition("/")[2] or item.name for item in self.listed]


def read_directory(file: ByteReader) -> Directory:
    """Read the directory of a zip; UnreadableError where it contradicts itself, or is empty.

    Nothing is checked against the records yet: the names are enough to tell what kind of file it is.
    """
    offset, size, count = _find_directory(file)
    listed = list(_entries(file, offset, size, count))
    if not listed:
        raise broken(file, "zip_empty")
    return Directory(listed, offset)


def read_archive(file: ByteReader, directory: Directory, *, root: bool = True) -> dict[str, ZipRecord]:
    """Find the records of a zip by name, and check each against its own header.

    Args:
        file: the zip.
        directory: its directory.
        root: whether all records must lie in one folder, as in files of torch; it is then no part of their names.

    Raises:
        UnreadableError: a rule is broken: two names alike, more than one folder, a packing other than deflate, records
            that overlap, a directory and a header that disagree.
    """
    listed = directory.listed
    first, headers = listed[0].name.partition("/")[0], _Headers(file, len(listed))
    records: dict[str, ZipRecord] = {}
    for item, limit in zip(listed, _limits(directory), strict=True):
        # Without `root` each entry counts as in the same folder, and its whole name is the record's.
        folder, _, name = item.name.partition("/") if root else (first, "", item.name)
        if folder != first or name in records:
            kind: Kind = "zip_roots" if folder != first else "zip_twice"
            raise broken(file, kind, name=printable(item.name), root=printable(first))
        if item.odd:
            raise broken(file, "zip_packed", name=printable(item.name))
        records[name] = _record(file, headers, item, limit, name)
    return records


def read_record(file: ByteReader, record: ZipRecord) -> bytes:
    """Read the bytes of a record, inflated where it is deflated; UnreadableError where its CRC differs."""
    if record.packed is None:
        data = read_bytes(file, record.offset, record.nbytes)
    else:
        check_growth(record.nbytes, file)
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)  # negative: a bare stream, without zlib's own header
        try:
            # One byte more than it should hold, so that a longer one is noticed without being inflated to its end.
            data = inflater.decompress(read_bytes(file, record.offset, record.packed), record.nbytes + 1)
        except zlib.error:
            raise broken(file, "crc", name=printable(record.name)) from None
        if len(data) != record.nbytes:
            raise broken(file, "crc", name=printable(record.name))
    # CRC 0: not computed. Of a record whose real CRC is 0, the bytes are not compared.
    if record.crc and zlib.crc32(data) != record.crc:
        raise broken(file, "crc", name=printable(record.name))
    return data


def broken(file: ByteReader, kind: Kind = "zip_broken", **facts: object) -> UnreadableError:
    """Give the exception for a zip that breaks the rule `kind`."""
    return UnreadableError(Problem(kind, file.name, facts))


def _find_directory(file: ByteReader) -> tuple[int, int, int]:
    """Find offset, size and number of entries of the directory."""
    # Nearly always a short read is enough; the long one is for a comment, which has at most 65,535 bytes.
    tail_at, tail, at = _end(file, _USUAL_TAIL) or _end(file, _END.size + 0xFFFF) or (0, b"", -1)
    if at < 0:
        raise broken(file, "zip_cut", have=file.size)
    _, disk, first_disk, count_on_disk, count, size, offset, _ = _END.unpack_from(tail, at)
    stop = tail_at + at  # where the directory must end
    if stop >= _LOCATOR.size and tail[max(0, at - _LOCATOR.size) : at][:4] == b"PK\6\7":
        _, disk64, end64_at, disks = _LOCATOR.unpack_from(tail, at - _LOCATOR.size)
        stop, count_on_disk, count, size, offset = _read_end64(file, end64_at, stop - _LOCATOR.size)
        if disk64 or disks > 1:
            raise broken(file)
    # One disk (0xFFFF: the zip64 end says it), and the directory fills the space up to its end: bytes in between could
    # be a second directory, and bytes put before the zip would move every offset.
    if (disk, first_disk) not in ((0, 0), (0xFFFF, 0xFFFF)) or count_on_disk != count or offset + size != stop:
        raise broken(file)
    # More entries than fit into the directory are refused before the loop over them.
    if size > _MAX_DIRECTORY or count * _CENTRAL.size > size:
        raise broken(file)
    return offset, size, count


def _end(file: ByteReader, reach: int) -> tuple[int, bytes, int] | None:
    """Find the end of the directory (`_END`) in the last `reach` bytes of the file.

    Returns where these bytes begin, the bytes, and the position in them; None where it is not found, or lies so near to
    their beginning that a zip64 locator before it may be cut off.
    """
    tail_at = max(0, file.size - reach)
    tail = read_bytes(file, tail_at, file.size - tail_at)
    at = tail.rfind(b"PK\5\6")
    # Searched from the back, as Python's zipfile does: the signature may occur in a record, and the last one counts.
    # Where its comment would go beyond the file, it is no end. What follows the end, such as a line feed of a careless
    # copy, is ignored.
    while at >= 0 and (len(tail) - at < _END.size or at + _END.size + _END.unpack_from(tail, at)[7] > len(tail)):
        at = tail.rfind(b"PK\5\6", 0, at)
    enough = at >= _LOCATOR.size or (at >= 0 and tail_at == 0)
    return (tail_at, tail, at) if enough else None


def _read_end64(file: ByteReader, at: int, stop: int) -> tuple[int, int, int, int, int]:
    """Read the zip64 end at `at`, which must reach up to `stop`.

    Returns its own offset, the entries on this disk and in all, and the directory's size and offset.
    """
    if at + _END64.size > stop:
        raise broken(file)
    fields = _END64.unpack(read_bytes(file, at, _END64.size))
    signature, length, disk, first_disk = fields[0], fields[1], fields[4], fields[5]
    if signature != b"PK\6\6" or at + 12 + length != stop or disk or first_disk:  # 12: the first two fields
        raise broken(file)
    count_on_disk, count, size, offset = fields[6:]
    return at, count_on_disk, count, size, offset


def _entries(file: ByteReader, offset: int, size: int, count: int) -> Iterator[Listed]:
    """Read the entries of the directory, which must fill it exactly."""
    data, at = read_bytes(file, offset, size), 0
    for _ in range(count):
        fields = _CENTRAL.unpack_from(data, at)
        flags, method, crc, packed, nbytes = fields[3], fields[4], fields[7], fields[8], fields[9]
        name_size, extra_size, comment_size, disk, header = *fields[10:14], fields[16]
        name_at = at + _CENTRAL.size
        at = name_at + name_size + extra_size + comment_size
        if fields[0] != b"PK\1\2" or at > size:
            raise broken(file)
        extra_at = name_at + name_size
        raw = data[name_at:extra_at]
        if nbytes == _IS_WIDE or packed == _IS_WIDE or header == _IS_WIDE:
            nbytes, packed, header = _widen(file, data[extra_at : extra_at + extra_size], nbytes, packed, header)
        # Whatever the encoding, no two names become one: bytes that are no UTF-8 are kept as surrogates.
        name = raw.decode("utf-8", "surrogateescape")
        if disk not in (0, 0xFFFF):  # a zip split over several files; 0xFFFF as above
            raise broken(file)
        # Not refused here: a zip that is no checkpoint at all is to be named as such.
        odd = method not in (0, _DEFLATED) or (method == 0 and packed != nbytes) or flags & _ENCRYPTED != 0
        yield Listed(name, raw, header, nbytes, crc, packed if method else None, odd)
    if at != size:
        raise broken(file)


def _widen(file: ByteReader, extra: bytes, *values: int) -> list[int]:
    """Replace each of `values` that is `_IS_WIDE` by the next number in the zip64 field among the extra fields."""
    wide, at = b"", 0
    while at + 4 <= len(extra):
        tag, size = struct.unpack_from("<2H", extra, at)
        if tag == 1:  # zip64
            wide = extra[at + 4 : at + 4 + size]
        at += 4 + size
    result, used = list(values), 0
    for i, value in enumerate(values):
        if value == _IS_WIDE:
            if used + 8 > len(wide):
                raise broken(file)
            result[i] = int.from_bytes(wide[used : used + 8], "little")
            used += 8
    return result


def _limits(directory: Directory) -> list[int]:
    """Give for each entry the offset before which its bytes must end: the next header, or the directory.

    So no two records overlap: a zip bomb lists the same bytes under thousands of names.
    """
    headers = [item.header for item in directory.listed]
    # The order of the directory need not be that of the records.
    order = sorted(range(len(headers)), key=headers.__getitem__)
    limits = [directory.offset] * len(headers)
    for entry, following in itertools.pairwise(order):
        limits[entry] = headers[following]
    return limits


class _Headers:
    """Reads the headers before the records: many at a time where the records are small.

    Args:
        file: the zip.
        count: the number of its records.
    """

    def __init__(self, file: ByteReader, count: int) -> None:
        self._file, self._at, self._block = file, 0, b""
        # Worth it where a block has eight records or more; beyond, most of what is read is weights.
        self._ahead = _BLOCK if file.size // count < _BLOCK >> 3 else 0

    def read(self, offset: int, size: int) -> bytes:
        """Read `size` bytes from `offset` on, from the block read last where they lie in it."""
        start = offset - self._at
        if start < 0 or start + size > len(self._block):
            size_ahead = max(size, min(self._ahead, self._file.size - offset))
            self._at, self._block, start = offset, read_bytes(self._file, offset, size_ahead), 0
        return self._block[start : start + size]


def _record(file: ByteReader, headers: _Headers, item: Listed, limit: int, name: str) -> ZipRecord:
    """Find where the bytes of an entry begin, and check that its own header says what the directory says.

    Args:
        file: the zip.
        headers: reads its headers.
        item: the entry, as the directory lists it.
        limit: the offset before which the record must end.
        name: the name that the record is to have.
    """
    # Before the read: the offset comes from the file.
    if item.header + _LOCAL.size + len(item.raw) > limit:
        raise broken(file)
    head = headers.read(item.header, _LOCAL.size + len(item.raw))
    signature, _, flags, method, _, _, crc, _, _, name_size, extra_size = _LOCAL.unpack_from(head)
    # The extra fields are those of this header: torch fills them up so that each tensor begins at a multiple of 64.
    offset = item.header + _LOCAL.size + name_size + extra_size
    if signature != b"PK\3\4" or name_size != len(item.raw) or head[_LOCAL.size :] != item.raw:
        raise broken(file, "zip_differs", name=printable(item.name))
    taken = item.nbytes if item.packed is None else item.packed
    # The sizes here are not compared: a writer that could not seek back leaves 0, and says them and the CRC behind the
    # record. Which bytes are read, the directory alone decides.
    alike = (method == 0) == (item.packed is None) and not flags & _ENCRYPTED and crc in (0, item.crc)
    if not alike or offset + taken > limit:
        raise broken(file, "zip_differs", name=printable(item.name))
    return ZipRecord(0, offset, item.nbytes, item.crc, name, item.packed)
