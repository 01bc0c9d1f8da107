"""Files packed as a whole by gzip: unpacked into memory, as far as weights can have shrunk, and read from there."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from smartload.errors import UnreadableError
from smartload.reading.files import BytesReader, check_growth, head, read_bytes
from smartload.records.entries import ByteReader
from smartload.records.problems import Problem

_MAGIC = b"\x1f\x8b"
_PIECE = 1 << 14
_GZIP = zlib.MAX_WBITS | 16


def sniff(file: ByteReader) -> bool:
    """Whether the file begins as gzip does."""
    return head(file, 2) == _MAGIC


def unpacked(file: ByteReader) -> BytesReader:
    """The content of the file, in memory; its checksums are compared."""
    data = bytearray()
    try:
        for piece in _pieces(file):
            data += piece
            check_growth(len(data), file)
    except zlib.error:
        raise UnreadableError(Problem("gzip_damaged", file.name)) from None
    return BytesReader(data, file.name)


def _pieces(file: ByteReader) -> Iterator[bytes]:
    """What the file holds, through all of its members; zeros may follow behind them."""
    machine = zlib.decompressobj(_GZIP)
    for at in range(0, file.size, _PIECE):
        packed = read_bytes(file, at, min(_PIECE, file.size - at))
        while packed:
            if machine.eof:
                packed = packed.lstrip(b"\0")
                if not packed:
                    break
                machine = zlib.decompressobj(_GZIP)
            yield machine.decompress(packed)
            packed = machine.unused_data
    if not machine.eof:
        raise UnreadableError(Problem("gzip_cut", file.name))
