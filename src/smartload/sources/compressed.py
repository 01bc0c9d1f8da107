"""Files packed as a whole by gzip: unpacked into memory, as far as weights can have shrunk, and read from there."""

from __future__ import annotations

import gzip
import zlib

from smartload.errors import UnreadableError
from smartload.records import ByteReader, Problem
from smartload.sources.readers import BytesReader, Stream, check_growth, read_bytes

_PIECE = 1 << 20


def sniff(file: ByteReader) -> bool:
    """Whether the file begins as gzip does."""
    return read_bytes(file, 0, min(2, file.size)) == b"\x1f\x8b"


def unpacked(file: ByteReader) -> BytesReader:
    """The content of the file, in memory; its checksum is compared."""
    data = bytearray()
    try:
        with gzip.GzipFile(fileobj=Stream(file)) as stream:
            while piece := stream.read(_PIECE):
                data += piece
                check_growth(len(data), file)
    except EOFError:
        raise UnreadableError(Problem("gzip_cut", file.name)) from None
    except (gzip.BadGzipFile, zlib.error):
        raise UnreadableError(Problem("gzip_damaged", file.name)) from None
    return BytesReader(data, file.name)
