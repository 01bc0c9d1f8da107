"""Read a zip archive: the names of its records, and where their bytes lie.

First the directory at the end of the file (`read_directory`), then each record's own header (`read_archive`). A zip
says most things twice or three times: in the directory, in a header before each record, and in a descriptor behind it.
Readers differ in which they believe. So whatever contradicts itself is refused: two readers must not find two sets of
weights in one file, and a flipped bit must not move a record by some bytes.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
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
_NOT_HERE = (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
"""In place of the two counts, the size and the offset in `_END` that only the zip64 end has room for."""
_LOCATOR = struct.Struct("<4sLQL")
"""Before it in a zip64: signature, disk and offset of the zip64 end, number of disks."""
_END64 = struct.Struct("<4sQ2H2L4Q")
"""The zip64 end: signature, length of the rest, two versions, then as in `_END`, with wider numbers."""
_CENTRAL = struct.Struct("<4s6H3L5H2L")
"""An entry of the directory; name, extra fields and comment follow, whose lengths are fields 10 to 12."""
_LOCAL = struct.Struct("<4s5H3L2H")
"""The header before a record's bytes; name and extra fields follow, whose lengths are the last two."""
_DESCRIPTORS = {form.size: form for form in map(struct.Struct, ("<3L", "<4s3L", "<L2Q", "<4sL2Q"))}
"""What follows a record's bytes where its flags say so, by length: CRC and two sizes, with a signature or without."""
_FIELD = struct.Struct("<2H")
"""An extra field: its tag, and the length of what follows."""
_ZIP64 = 1  # the tag of the field that has sizes and offsets of more than 32 bits
_MAX_DIRECTORY = 1 << 28
"""Bytes of a directory: about three million records, where the largest real files have some 100,000."""
_ENCRYPTED = 0x2061  # four flags: encrypted, patch of another file, strongly encrypted, directory encrypted
_HAS_DESCRIPTOR = 8  # the flag of a writer that could not, or would not, seek back to the header
_DEFLATED = 8
_USUAL_TAIL = 256
"""Where the zip has no comment, the three structures of its end (98 bytes) lie in these last bytes of the file."""
_BLOCK = 1 << 17
"""Bytes read at once where headers lie close together: thousands of small reads take longer than the bytes between."""
_SHORT_BLOCK = 512
"""Bytes read at once where they do not: the descriptor of a record, and the next one's header with torch's padding."""
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
        packed: the bytes that it takes in the file.
        method: how it is packed.
        flags: whether it is encrypted, and more.
    """

    name: str
    raw: bytes
    header: int
    nbytes: int
    crc: int
    packed: int
    method: int
    flags: int


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
    """Find the records of a zip by name, and check each against its own header and descriptor.

    Args:
        file: the zip.
        directory: its directory.
        root: whether all records must lie in one folder, as in files of torch; it is then no part of their names.

    Raises:
        UnreadableError: a rule is broken: two names alike, more than one folder, a packing other than deflate, records
            that overlap or do not fill the file, a directory and a header that disagree.
    """
    listed = directory.listed
    names = _record_names(file, listed, root)
    offsets = _offsets(file, directory)
    return {
        name: ZipRecord(0, offset, item.nbytes, item.crc, name, item.packed if item.method else None)
        for name, offset, item in zip(names, offsets, listed, strict=True)
    }


def _record_names(file: ByteReader, listed: Sequence[Listed], root: bool) -> list[str]:
    """Give the names of the records, and refuse what no reader should guess about; see `read_archive`."""
    first = listed[0].name.partition("/")[0]
    names: dict[str, None] = {}
    for item in listed:
        # Without `root` each entry counts as in the same folder, and its whole name is the record's.
        folder, _, name = item.name.partition("/") if root else (first, "", item.name)
        if folder != first or name in names:
            kind: Kind = "zip_roots" if folder != first else "zip_twice"
            raise broken(file, kind, name=printable(item.name), root=printable(first))
        # Python's zipfile ends the name there, so that another record may have the same.
        if "\0" in item.name:
            raise broken(file, "zip_nul", name=printable(item.name))
        if (
            item.flags & _ENCRYPTED
            or item.method not in (0, _DEFLATED)
            or (not item.method and item.packed != item.nbytes)
        ):
            raise broken(file, "zip_packed", name=printable(item.name))
        names[name] = None
    # torch looks a record up in either case, and finds one of the two; numpy, which writes `root=False`, does not.
    if root and len({item.raw.lower() for item in listed}) < len(listed):
        raise broken(file, "zip_case", **_alike_but_for_case(names))
    return list(names)


def _alike_but_for_case(names: Iterable[str]) -> dict[str, str]:
    """Give the first two names that are one where case does not count, as facts for a message."""
    seen: dict[bytes, str] = {}
    # As bytes: torch knows the case of the 26 letters only.
    for name in names:
        other = seen.setdefault(name.encode("utf-8", "surrogateescape").lower(), name)
        if other != name:
            return {"name": printable(other), "other": printable(name)}
    return {}


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
    if at < 0 or len(tail) - at < _END.size:
        raise broken(file, "zip_cut", have=file.size)
    _, disk, first_disk, *fields, comment_size = _END.unpack_from(tail, at)
    # What follows the end, such as a line feed of a careless copy, is ignored.
    if at + _END.size + comment_size > len(tail):
        raise broken(file)
    stop = tail_at + at  # where the directory must end
    if stop >= _LOCATOR.size and tail[max(0, at - _LOCATOR.size) : at][:4] == b"PK\6\7":
        _, disk64, end64_at, disks = _LOCATOR.unpack_from(tail, at - _LOCATOR.size)
        narrow, (stop, *fields) = fields, _read_end64(file, end64_at, stop - _LOCATOR.size)
        # Some readers take the zip64 end wherever there is one, others only for what does not fit into the short end.
        alike = all(short in (wide, none) for short, wide, none in zip(narrow, fields, _NOT_HERE, strict=True))
        if disk64 or disks > 1 or not alike:
            raise broken(file)
    count_on_disk, count, size, offset = fields
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
    # The last one counts, as for Python's zipfile and for torch: the signature may occur in a record, too.
    at = tail.rfind(b"PK\5\6")
    enough = at >= _LOCATOR.size or (at >= 0 and tail_at == 0)
    return (tail_at, tail, at) if enough else None


def _read_end64(file: ByteReader, at: int, stop: int) -> tuple[int, int, int, int, int]:
    """Read the zip64 end at `at`, which must reach up to `stop`.

    Returns its own offset, the entries on this disk and in all, and the directory's size and offset.
    """
    # Python's zipfile looks for it right before `stop`, torch where the locator says: both must find it.
    if at + _END64.size != stop:
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
        wide = _zip64_field(file, data[extra_at : extra_at + extra_size]) if extra_size else b""
        if nbytes == _IS_WIDE or packed == _IS_WIDE or header == _IS_WIDE:
            nbytes, packed, header = _widen(file, wide, nbytes, packed, header)
        # Whatever the encoding, no two names become one: bytes that are no UTF-8 are kept as surrogates.
        name = raw.decode("utf-8", "surrogateescape")
        if disk not in (0, 0xFFFF):  # a zip split over several files; 0xFFFF as above
            raise broken(file)
        # Packing is not refused here: a zip that is no checkpoint at all is to be named as such.
        yield Listed(name, raw, header, nbytes, crc, packed, method, flags)
    if at != size:
        raise broken(file)


def _zip64_field(file: ByteReader, extra: bytes) -> bytes:
    """Give what the zip64 field among the extra fields holds, b"" where there is none.

    Raises:
        UnreadableError: the fields do not fill `extra`, or two of them are of zip64.
    """
    wide, at, stop = b"", 0, len(extra)
    while at < stop:
        if at + _FIELD.size > stop:
            raise broken(file)
        tag, size = _FIELD.unpack_from(extra, at)
        at += _FIELD.size + size
        if at > stop or (tag == _ZIP64 and wide):
            raise broken(file)
        if tag == _ZIP64:
            wide = extra[at - size : at]
    return wide


def _widen(file: ByteReader, wide: bytes, *values: int) -> list[int]:
    """Replace each of `values` that is `_IS_WIDE` by the next number in `wide`, the content of the zip64 field."""
    result, used = list(values), 0
    for i, value in enumerate(values):
        if value == _IS_WIDE:
            if used + 8 > len(wide):
                raise broken(file)
            result[i] = int.from_bytes(wide[used : used + 8], "little")
            used += 8
    return result


class _Headers:
    """Reads the headers before the records, and the descriptors behind them: many at a time where records are small.

    Args:
        file: the zip.
        count: the number of its records.

    Attributes:
        block: the bytes that were read last.
    """

    def __init__(self, file: ByteReader, count: int) -> None:
        self._file, self._at, self.block = file, 0, b""
        # Worth it where a block has eight records or more; beyond, most of what is read is weights.
        self._ahead = _BLOCK if file.size // count < _BLOCK >> 3 else _SHORT_BLOCK

    def find(self, offset: int, size: int) -> int:
        """Give the position in `block` of the `size` bytes from `offset` on; read it anew where it lacks them."""
        start = offset - self._at
        if start < 0 or start + size > len(self.block):
            size_ahead = max(size, min(self._ahead, self._file.size - offset))
            self._at, self.block, start = offset, read_bytes(self._file, offset, size_ahead), 0
        return start


def _offsets(file: ByteReader, directory: Directory) -> list[int]:
    """Give the offset of each record's bytes; check that its own header and descriptor say what the directory says.

    One behind the other, the records must fill the file up to the directory. So no two overlap (a zip bomb lists the
    same bytes under thousands of names), and none hides between them, where a reader that goes from header to header
    would find it.
    """
    listed = directory.listed
    headers, offsets = _Headers(file, len(listed)), [0] * len(listed)
    # The order of the directory need not be that of the records.
    order = sorted(range(len(listed)), key=[item.header for item in listed].__getitem__)
    stops = [*(listed[number].header for number in order[1:]), directory.offset]
    if listed[order[0]].header or listed[order[-1]].header > directory.offset:
        raise broken(file)
    for number, stop in zip(order, stops, strict=True):
        offsets[number] = _offset(file, headers, listed[number], stop)
    return offsets


def _offset(file: ByteReader, headers: _Headers, item: Listed, stop: int) -> int:
    """Give the offset of the bytes of one record.

    Args:
        file: the zip.
        headers: reads its headers.
        item: the entry, as the directory lists it.
        stop: the offset at which the record, with its descriptor, must end.
    """
    raw, said = item.raw, (item.crc, item.packed, item.nbytes)
    # Before the read: the offset comes from the file.
    if item.header + _LOCAL.size + len(raw) > stop:
        raise broken(file)
    at = headers.find(item.header, _LOCAL.size + len(raw))
    signature, _, flags, method, _, _, crc, packed, nbytes, name_size, extra_size = _LOCAL.unpack_from(
        headers.block, at
    )
    # The extra fields are those of this header: torch fills them up so that each tensor begins at a multiple of 64.
    offset: int = item.header + _LOCAL.size + name_size + extra_size
    behind = stop - offset - item.packed
    alike = signature == b"PK\3\4" and flags == item.flags and method == item.method and name_size == len(raw)
    if not (alike and headers.block.startswith(raw, at + _LOCAL.size) and behind >= 0):
        raise broken(file, "zip_differs", name=printable(item.name))
    at = headers.find(offset - extra_size, extra_size)
    wide = _zip64_field(file, headers.block[at : at + extra_size])
    if packed == _IS_WIDE or nbytes == _IS_WIDE:
        nbytes, packed = _widen(file, wide, nbytes, packed)
    if flags & _HAS_DESCRIPTOR:
        # What the writer did not know yet is 0 in the header.
        alike = crc in (0, item.crc) and packed in (0, item.packed) and nbytes in (0, item.nbytes)
        if alike and (form := _DESCRIPTORS.get(behind)) is not None:
            at = headers.find(stop - behind, behind)
            alike = form.unpack_from(headers.block, at) in (said, (b"PK\7\10", *said))
        else:
            alike = False
    else:
        alike = (crc, packed, nbytes) == said and not behind
    if not alike:
        raise broken(file, "zip_differs", name=printable(item.name))
    return offset
