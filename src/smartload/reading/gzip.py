"""Unpack files that were packed as a whole by gzip.

They are unpacked into memory, since gzip has no offsets to read at, and no further than weights can have shrunk.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from smartload.errors import UnreadableError
from smartload.reading.files import BytesReader, check_growth, head, read_bytes
from smartload.records.entries import ByteReader
from smartload.records.problems import Problem

_MAGIC = b"\x1f\x8b"
_PIECE = 1 << 14
"""Packed bytes at a time. They unpack to at most 16 MiB, so a bomb is noticed before it takes much memory."""
_GZIP = zlib.MAX_WBITS | 16  # the 16 lets zlib read gzip's header, and compare the checksum and size behind the data


def sniff(file: ByteReader) -> bool:
    """Tell whether the file begins as gzip does."""
    return head(file, 2) == _MAGIC


def unpacked(file: ByteReader) -> BytesReader:
    """Unpack the file into memory; UnreadableError where it is damaged, ends too early, or grows too far."""
    data = bytearray()
    try:
        for piece in _pieces(file):
            data += piece
            check_growth(len(data), file)
    except zlib.error:
        raise UnreadableError(Problem("gzip_damaged", file.name)) from None
    return BytesReader(data, file.name)


def _pieces(file: ByteReader) -> Iterator[bytes]:
    """Give the content piece by piece, through all members of the file.

    gzip files may be joined, each then being a member; some tools fill up the end with zeros.
    """
    unpacker = zlib.decompressobj(_GZIP)
    for at in range(0, file.size, _PIECE):
        packed = read_bytes(file, at, min(_PIECE, file.size - at))
        # Small members lie several to a piece, so a piece may be the end of one and more.
        while packed:
            if unpacker.eof:  # the member is read; what follows is the next one, or zeros
                packed = packed.lstrip(b"\0")
                if not packed:
                    break
                unpacker = zlib.decompressobj(_GZIP)
            yield unpacker.decompress(packed)
            packed = unpacker.unused_data
    if not unpacker.eof:
        raise UnreadableError(Problem("gzip_cut", file.name))
