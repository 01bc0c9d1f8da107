"""A zip archive: its records, and where their bytes lie. Strict: whole, unencrypted, nothing said twice."""

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
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX_DIRECTORY = 1 << 28
_ENCRYPTED = 0x2041
_DEFLATED = 8
_USUAL_TAIL = 256
"""Where the zip carries no comment, its end lies in these last bytes."""
_BLOCK = 1 << 17
_IS_WIDE = 0xFFFFFFFF
"""Stands where a value does not fit into 32 bits."""


class Listed(NamedTuple):
    """What the directory of a zip says of one entry."""

    name: str
    raw: bytes
    header: int
    nbytes: int
    crc: int
    packed: int | None
    odd: bool
    """Whether it is encrypted, or packed in another way than by deflating."""


@dataclass(frozen=True, slots=True)
class Directory:
    """The entries that a zip lists, and where the list begins."""

    listed: list[Listed]
    offset: int

    def names(self) -> list[str]:
        """The names of the records, without the folder that torch puts them in."""
        return [item.name.partition("/")[2] or item.name for item in self.listed]


def read_directory(file: ByteReader) -> Directory:
    """The directory of a zip; UnreadableError where it is broken in itself, or empty."""
    offset, size, count = _directory_place(file)
    listed = list(_entries(file, offset, size, count))
    if not listed:
        raise broken(file, "zip_empty")
    return Directory(listed, offset)


def read_archive(file: ByteReader, directory: Directory, *, root: bool = True) -> dict[str, ZipRecord]:
    """The records of a zip by name, every one checked against the file; UnreadableError where a rule is broken.

    With `root`, all lie below one folder, which is no part of their names.
    """
    listed = directory.listed
    first, headers = listed[0].name.partition("/")[0], _Headers(file, len(listed))
    records: dict[str, ZipRecord] = {}
    for item, limit in zip(listed, _limits(directory), strict=True):
        folder, _, name = item.name.partition("/") if root else (first, "", item.name)
        if folder != first or name in records:
            kind: Kind = "zip_roots" if folder != first else "zip_twice"
            raise broken(file, kind, name=printable(item.name), root=printable(first))
        if item.odd:
            raise broken(file, "zip_packed", name=printable(item.name))
        records[name] = _located(file, headers, item, limit, name)
    return records


def read_record(file: ByteReader, record: ZipRecord) -> bytes:
    """The bytes of a record, inflated where it is deflated, and compared with its CRC."""
    if record.packed is None:
        data = read_bytes(file, record.offset, record.nbytes)
    else:
        check_growth(record.nbytes, file)
        machine = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            data = machine.decompress(read_bytes(file, record.offset, record.packed), record.nbytes + 1)
        except zlib.error:
            raise broken(file, "crc", name=printable(record.name)) from None
        if len(data) != record.nbytes:
            raise broken(file, "crc", name=printable(record.name))
    if record.crc and zlib.crc32(data) != record.crc:
        raise broken(file, "crc", name=printable(record.name))
    return data


def broken(file: ByteReader, kind: Kind = "zip_broken", **facts: object) -> UnreadableError:
    """The refusal for an archive that breaks a rule."""
    return UnreadableError(Problem(kind, file.name, facts))


def _directory_place(file: ByteReader) -> tuple[int, int, int]:
    """Offset, size and number of entries of the central directory."""
    tail_at, tail, at = _end(file, _USUAL_TAIL) or _end(file, _END.size + 0xFFFF) or (0, b"", -1)
    if at < 0:
        raise broken(file, "zip_cut", have=file.size)
    _, disk, first_disk, here, count, size, offset, _ = _END.unpack_from(tail, at)
    stop = tail_at + at
    if stop >= _LOCATOR.size and tail[max(0, at - _LOCATOR.size) : at][:4] == b"PK\6\7":
        _, disk64, place, disks = _LOCATOR.unpack_from(tail, at - _LOCATOR.size)
        stop, here, count, size, offset = _end64(file, place, stop - _LOCATOR.size)
        if disk64 or disks > 1:
            raise broken(file)
    if (disk, first_disk) not in ((0, 0), (0xFFFF, 0xFFFF)) or here != count or offset + size != stop:
        raise broken(file)
    if size > _MAX_DIRECTORY or count * _CENTRAL.size > size:
        raise broken(file)
    return offset, size, count


def _end(file: ByteReader, reach: int) -> tuple[int, bytes, int] | None:
    """The last bytes of the file, where they begin, and where in them the end of the directory is written."""
    tail_at = max(0, file.size - reach)
    tail = read_bytes(file, tail_at, file.size - tail_at)
    at = tail.rfind(b"PK\5\6")
    # What follows the end, a line feed of a careless copy say, is no part of the archive and is not looked at.
    while at >= 0 and (len(tail) - at < _END.size or at + _END.size + _END.unpack_from(tail, at)[7] > len(tail)):
        at = tail.rfind(b"PK\5\6", 0, at)
    enough = at >= _LOCATOR.size or (at >= 0 and tail_at == 0)  # what may lie before it is looked at too
    return (tail_at, tail, at) if enough else None


def _end64(file: ByteReader, place: int, stop: int) -> tuple[int, int, int, int, int]:
    if place + _END64.size > stop:
        raise broken(file)
    fields = _END64.unpack(read_bytes(file, place, _END64.size))
    signature, length, disk, first_disk = fields[0], fields[1], fields[4], fields[5]
    if signature != b"PK\6\6" or place + 12 + length != stop or disk or first_disk:
        raise broken(file)
    here, count, size, offset = fields[6:]
    return place, here, count, size, offset


def _entries(file: ByteReader, offset: int, size: int, count: int) -> Iterator[Listed]:
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
            nbytes, packed, header = _wide(file, data[extra_at : extra_at + extra_size], nbytes, packed, header)
        name = raw.decode("utf-8", "surrogateescape")
        if disk not in (0, 0xFFFF):
            raise broken(file)
        odd = method not in (0, _DEFLATED) or (method == 0 and packed != nbytes) or flags & _ENCRYPTED != 0
        yield Listed(name, raw, header, nbytes, crc, packed if method else None, odd)
    if at != size:
        raise broken(file)


def _wide(file: ByteReader, extra: bytes, *values: int) -> list[int]:
    """The values with those that did not fit into 32 bits taken from the zip64 field."""
    wide, at = b"", 0
    while at + 4 <= len(extra):
        tag, size = struct.unpack_from("<2H", extra, at)
        if tag == 1:
            wide = extra[at + 4 : at + 4 + size]
        at += 4 + size
    found, used = list(values), 0
    for i, value in enumerate(values):
        if value == _IS_WIDE:
            if used + 8 > len(wide):
                raise broken(file)
            found[i] = int.from_bytes(wide[used : used + 8], "little")
            used += 8
    return found


def _limits(directory: Directory) -> list[int]:
    """For each entry the offset before which its bytes must end: the next header, or the directory."""
    headers = [item.header for item in directory.listed]
    order = sorted(range(len(headers)), key=headers.__getitem__)
    limits = [directory.offset] * len(headers)
    for here, following in itertools.pairwise(order):
        limits[here] = headers[following]
    return limits


class _Headers:
    """Reads the headers between the records: many at a time where the records are small."""

    def __init__(self, file: ByteReader, count: int) -> None:
        self._file, self._at, self._block = file, 0, b""
        self._ahead = _BLOCK if file.size // count < _BLOCK >> 3 else 0

    def read(self, offset: int, size: int) -> bytes:
        start = offset - self._at
        if start < 0 or start + size > len(self._block):
            size_ahead = max(size, min(self._ahead, self._file.size - offset))
            self._at, self._block, start = offset, read_bytes(self._file, offset, size_ahead), 0
        return self._block[start : start + size]


def _located(file: ByteReader, headers: _Headers, item: Listed, limit: int, name: str) -> ZipRecord:
    if item.header + _LOCAL.size + len(item.raw) > limit:
        raise broken(file)
    head = headers.read(item.header, _LOCAL.size + len(item.raw))
    signature, _, flags, method, _, _, crc, _, _, name_size, extra_size = _LOCAL.unpack_from(head)
    offset = item.header + _LOCAL.size + name_size + extra_size
    if signature != b"PK\3\4" or name_size != len(item.raw) or head[_LOCAL.size :] != item.raw:
        raise broken(file, "zip_differs", name=printable(item.name))
    taken = item.nbytes if item.packed is None else item.packed
    alike = (method == 0) == (item.packed is None) and not flags & _ENCRYPTED and crc in (0, item.crc)
    if not alike or offset + taken > limit:
        raise broken(file, "zip_differs", name=printable(item.name))
    return ZipRecord(0, offset, item.nbytes, item.crc, name, item.packed)
