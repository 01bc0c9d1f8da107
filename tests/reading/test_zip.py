"""Rules Z1 to Z5 of the reading rules: the zip that torch writes, and every way to bend one."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from reading_tools import (
    TWO_FLOATS,
    assert_same,
    dict_of,
    floats,
    number,
    read,
    rebuilt,
    saved,
    tensors,
    unzipped,
    zipped,
)
from systems import make_sparse

from smartload import smart_load
from smartload.errors import UnreadableError
from smartload.formats import open_checkpoint
from smartload.reading import zip as archive
from smartload.reading.files import ObjectReader
from smartload.records.entries import ZipRecord

STATE = {"a": torch.arange(6.0).view(2, 3), "empty": torch.zeros(0, 4), "b": torch.tensor(7)}
GOOD = saved(STATE)


def kind_of(data: bytes) -> str:
    with pytest.raises(UnreadableError) as caught:
        read(data)
    return caught.value.problem.kind  # type: ignore[union-attr]


def records_of(data: bytes) -> dict[str, ZipRecord]:
    file = ObjectReader(io.BytesIO(data), "file")
    return archive.read_archive(file, archive.read_directory(file))


def change(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def central(data: bytes, name: str) -> int:
    """Where the directory lists a record."""
    at = data.index(b"PK\1\2")
    while True:
        size, extra, comment = struct.unpack_from("<3H", data, at + 28)
        if data[at + 46 : at + 46 + size].endswith(name.encode()):
            return at
        at += 46 + size + extra + comment


def local(data: bytes, name: str) -> int:
    return int(struct.unpack_from("<I", data, central(data, name) + 42)[0])


def behind(data: bytes, name: str) -> int:
    """Where the bytes of a record end, and its descriptor begins."""
    entry = records_of(data)[name.lstrip("/")]
    return entry.offset + (entry.nbytes if entry.packed is None else entry.packed)


WIDE = 0xFFFFFFFF
UNKNOWN = (0, 0, 0)


def made(
    records: dict[str, bytes],
    *,
    flags: int = 0,
    known: tuple[int, int, int] | None = None,
    extra: bytes = b"",
    listed_extra: bytes = b"",
    descriptor: str = "",
    between: bytes = b"",
) -> bytes:
    """A zip written by hand: the same flags, numbers in the header and descriptor for each record of the folder 'm'.

    `known` is what the header says of CRC, packed and whole size, where that is not the truth.
    """
    out, directory = b"", b""
    for name, data in records.items():
        raw, truth = f"m/{name}".encode(), (zlib.crc32(data), len(data), len(data))
        numbers = known or truth
        directory += struct.pack(
            "<4s6H3L5H2L",
            b"PK\1\2",
            20,
            20,
            flags,
            0,
            0,
            33,
            *truth,
            len(raw),
            len(listed_extra),
            *(0, 0, 0),
            0,
            len(out),
        )
        directory += raw + listed_extra
        out += (
            struct.pack("<4s5H3L2H", b"PK\3\4", 20, flags, 0, 0, 33, *numbers, len(raw), len(extra))
            + raw
            + extra
            + data
        )
        if descriptor:
            out += struct.pack(descriptor, *([b"PK\7\10"] if "s" in descriptor else []), *truth)
        out += between
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(records), len(records), len(directory), len(out), 0)
    return out + directory + end


def zip64(*numbers: int) -> bytes:
    return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers)


ONE = {"data.pkl": dict_of(a=rebuilt(floats())), "data/0": TWO_FLOATS, "version": b"3\n"}
SIXTEEN = {"data.pkl": b"N.              ", "data/0": bytes(range(16))}


def test_records_lie_where_zipfile_finds_them() -> None:
    found = records_of(GOOD)
    for name, content in unzipped(GOOD).items():
        entry = found[name]
        assert GOOD[entry.offset : entry.offset + entry.nbytes] == content
        assert entry.crc == zlib.crc32(content)
    assert all(entry.offset % 64 == 0 for entry in found.values() if entry.nbytes)


def test_torch_files_are_read_with_equal_bytes() -> None:
    assert_same(tensors(GOOD), STATE)


@pytest.mark.parametrize("name", ["archive", "best model", "résumé", "模型", "a" * 200])
def test_the_folder_inside_has_the_name_of_the_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name[:60]}.pt"
    torch.save(STATE, path)
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint.parts[""].entries) == list(STATE)


def test_checksums_that_were_not_computed_are_not_compared() -> None:
    # CRC 0 means "not computed".
    torch.serialization.set_crc32_options(False)
    try:
        data = saved(STATE)
    finally:
        torch.serialization.set_crc32_options(True)
    checkpoint = read(data)
    assert {record.crc for record in checkpoint.records} == {0}
    assert_same(tensors(data), STATE)


def test_the_checksums_of_tensors_are_kept_for_those_who_want_them() -> None:
    checkpoint, content = read(GOOD), unzipped(GOOD)
    assert {record.name: record.crc for record in checkpoint.records} == {
        name: zlib.crc32(data) for name, data in content.items() if name.startswith("data/") or name == "data.pkl"
    }


@pytest.mark.parametrize("name", ["data.pkl", "byteorder", "version"])
def test_small_records_must_have_their_checksum(name: str) -> None:
    # Z3.
    entry = records_of(GOOD)[name]
    assert kind_of(change(GOOD, entry.offset, bytes([GOOD[entry.offset] ^ 1]))) == "crc"


@pytest.mark.parametrize("order", ["little", "big"])
def test_byte_order_is_carried(order: str) -> None:
    # Z5.
    records = unzipped(GOOD) | {"byteorder": order.encode()}
    spans = read(zipped(records)).parts[""].entries.values()
    assert {span.big_endian for span in spans} == {order == "big"}  # type: ignore[union-attr]


def test_big_endian_numbers_come_out_right() -> None:
    data = zipped({"data.pkl": dict_of(a=rebuilt(floats())), "byteorder": b"big", "data/0": struct.pack(">2f", 1, 2)})
    assert_same(tensors(data), {"a": torch.tensor([1.0, 2.0])})


@pytest.mark.parametrize("order", [b"middle", b"", b"little\n", b"l" * 17])
def test_other_byte_orders_are_refused(order: bytes) -> None:
    assert kind_of(zipped(unzipped(GOOD) | {"byteorder": order})) == "record_odd"


def test_small_records_are_small() -> None:
    assert kind_of(zipped(unzipped(GOOD) | {"version": b"3" * 17})) == "record_odd"


def test_a_file_without_byte_order_is_little_endian() -> None:
    records = unzipped(GOOD)
    del records["byteorder"]
    assert_same(tensors(zipped(records)), STATE)


def test_every_cut_is_a_typed_error() -> None:
    # Z1: nothing but the whole file has a directory at its end.
    for end in range(0, len(GOOD), 50):
        with pytest.raises(UnreadableError):
            read(GOOD[:end])
    assert kind_of(GOOD[:-1]) == "zip_cut"


def test_what_follows_the_archive_is_no_part_of_it() -> None:
    assert_same(tensors(GOOD + b"\n"), STATE)


def test_a_comment_may_follow_the_directory() -> None:
    end = GOOD.rindex(b"PK\5\6")
    assert_same(tensors(GOOD[: end + 20] + struct.pack("<H", 5) + b"hello"), STATE)


@pytest.mark.parametrize(
    ("offset", "new"),
    [(4, b"\1\0"), (6, b"\1\0"), (8, b"\1\0"), (10, b"\1\0"), (12, b"\1\0\0\0"), (16, b"\1\0\0\0")],
    ids=["disk", "first disk", "entries here", "entries", "size", "offset"],
)
def test_a_directory_that_contradicts_itself_is_refused(offset: int, new: bytes) -> None:
    data = zipped(unzipped(GOOD))  # without zip64
    at = data.rindex(b"PK\5\6")
    assert kind_of(change(data, at + offset, new)) == "zip_broken"


@pytest.mark.parametrize("offset", [4, 16, 20, 24, 32, 40, 48])
def test_a_zip64_directory_that_contradicts_itself_is_refused(offset: int) -> None:
    at = GOOD.rindex(b"PK\6\6")
    assert kind_of(change(GOOD, at + offset, b"\x05")) == "zip_broken"


@pytest.mark.parametrize("offset", [4, 8, 16])
def test_a_zip64_locator_that_points_elsewhere_is_refused(offset: int) -> None:
    at = GOOD.rindex(b"PK\6\7")
    assert kind_of(change(GOOD, at + offset, b"\x07")) == "zip_broken"


def test_a_directory_of_absurd_size_is_refused_before_it_is_read() -> None:
    data = zipped(unzipped(GOOD))
    at = data.rindex(b"PK\5\6")
    count = struct.pack("<2H", 60_000, 60_000)
    assert kind_of(change(data, at + 8, count)) == "zip_broken"


def test_compressed_records_are_refused() -> None:
    # Z2.
    assert kind_of(zipped(unzipped(GOOD), compression=zipfile.ZIP_DEFLATED)) == "zip_packed"


@pytest.mark.parametrize(
    ("offset", "new", "kind"),
    [
        (8, b"\x01\x08", "zip_packed"),  # encrypted
        (8, b"\x40\x08", "zip_packed"),  # strongly encrypted
        (10, b"\x08", "zip_differs"),  # compressed, by the directory's word only
        (10, b"\x0c", "zip_packed"),  # compressed otherwise
        (20, b"\x01\0\0\0", "zip_packed"),  # two sizes
        (34, b"\1\0", "zip_broken"),  # another disk
        (42, b"\1\0\0\0", "zip_broken"),  # inside another record
        (42, b"\xf0\xff\xff\x7f", "zip_broken"),  # beyond the directory
        (0, b"XX", "zip_broken"),
    ],
)
def test_an_entry_that_breaks_a_rule_is_refused(offset: int, new: bytes, kind: str) -> None:
    assert kind_of(change(GOOD, central(GOOD, "/data/0") + offset, new)) == kind


def test_a_size_that_runs_into_the_next_record_is_refused() -> None:
    at = central(GOOD, "/data/0")
    size = struct.pack("<2I", 10_000, 10_000)
    assert kind_of(change(GOOD, at + 20, size)) == "zip_differs"


def test_names_in_the_directory_and_in_the_file_must_agree() -> None:
    data = change(GOOD, local(GOOD, "/data/0") + 30, b"Archive")
    assert kind_of(data) == "zip_differs"


def test_two_records_may_not_share_bytes() -> None:
    first, second = central(GOOD, "/data/0"), central(GOOD, "/data/2")
    assert kind_of(change(GOOD, second + 42, GOOD[first + 42 : first + 46])) in ("zip_differs", "zip_broken")


def test_a_name_given_twice_is_refused() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("a/data.pkl", b"N.")
        with pytest.warns(UserWarning, match="Duplicate"):
            made.writestr("a/data.pkl", b"N.")
    assert kind_of(file.getvalue()) == "zip_twice"


def test_two_folders_are_refused() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("a/data.pkl", b"}.")
        made.writestr("b/data.pkl", b"}.")
    assert kind_of(file.getvalue()) == "zip_roots"


class Streamed(io.RawIOBase):
    """A file that cannot seek: the writer says sizes and checksum behind each record."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.data += bytes(data)
        return len(data)


@pytest.mark.parametrize("seekable", [True, False])
@pytest.mark.parametrize("wide", [True, False])
def test_what_zipfile_writes_is_read(seekable: bool, wide: bool) -> None:
    file = io.BytesIO() if seekable else Streamed()
    with zipfile.ZipFile(file, "w") as out:  # type: ignore[arg-type]
        for name, data in ONE.items():
            with out.open(f"m/{name}", "w", force_zip64=wide) as record:
                record.write(data)
    assert_same(tensors(file.getvalue() if seekable else bytes(file.data)), {"a": torch.tensor([1.0, 2.0])})  # type: ignore[attr-defined]


# What Info-ZIP, torch and Python write, and what else the format allows.
WRITTEN: dict[str, dict[str, Any]] = {
    "the same twice": {},
    "fields of a time": {"extra": b"UT\11\0\3" + bytes(8), "listed_extra": b"UT\5\0\3" + bytes(4)},
    "padding of torch": {"extra": b"FB\2\0ZZ"},
    "empty padding of torch": {"extra": b"FB\0\0"},
    "descriptor": {"flags": 8, "known": UNKNOWN, "descriptor": "<4s3L"},
    "descriptor without a signature": {"flags": 8, "known": UNKNOWN, "descriptor": "<3L"},
    "wide descriptor": {"flags": 8, "known": UNKNOWN, "descriptor": "<4sL2Q"},
    "wide descriptor without a signature": {"flags": 8, "known": UNKNOWN, "descriptor": "<L2Q"},
    "descriptor, and the same in the header": {"flags": 8, "descriptor": "<4s3L"},
    "wide sizes that are not known yet": {
        "flags": 8, "known": (0, WIDE, WIDE), "extra": zip64(0, 0), "descriptor": "<4sL2Q",
    },
    "a wide offset, as torch writes it beyond four gigabytes": {
        "flags": 8, "known": UNKNOWN, "extra": zip64(1 << 33) + b"FB\0\0", "descriptor": "<4sL2Q",
    },
}  # fmt: skip


@pytest.mark.parametrize("how", WRITTEN)
def test_every_way_to_write_headers_is_read(how: str) -> None:
    data = made(ONE, **WRITTEN[how])
    assert_same(tensors(data), {"a": torch.tensor([1.0, 2.0])})
    with zipfile.ZipFile(io.BytesIO(data)) as theirs:
        assert theirs.read("m/data/0") == TWO_FLOATS


def test_wide_sizes_in_the_header_are_those_of_the_directory() -> None:
    crcs = {zlib.crc32(data) for data in SIXTEEN.values()}
    right = made(
        {"data.pkl": SIXTEEN["data.pkl"]},
        known=(*crcs - {zlib.crc32(SIXTEEN["data/0"])}, WIDE, WIDE),
        extra=zip64(16, 16),
    )
    assert list(records_of(right)) == ["data.pkl"]
    for at in range(8):
        with pytest.raises(UnreadableError):
            records_of(change(right, right.index(zip64(16, 16)) + 4 + at, b"\7"))


# Each contradicts the directory, or is no zip.
BENT: dict[str, dict[str, Any]] = {
    "no checksum in the header, nor behind": {"known": (0, 16, 16)},
    "another checksum": {"known": (1, 16, 16)},
    "no sizes": {"known": UNKNOWN},
    "another checksum before a descriptor": {"flags": 8, "known": (1, 0, 0), "descriptor": "<4s3L"},
    "another size before a descriptor": {"flags": 8, "known": (0, 0, 15), "descriptor": "<4s3L"},
    "another packed size before a descriptor": {"flags": 8, "known": (0, 17, 0), "descriptor": "<4s3L"},
    "no descriptor": {"flags": 8, "known": UNKNOWN},
    "a descriptor that no flag announces": {"descriptor": "<4s3L"},
    "bytes behind a descriptor": {"flags": 8, "known": UNKNOWN, "descriptor": "<4s3L", "between": b"x"},
    "bytes between records": {"between": b"PK"},
    "wide sizes that no field has": {"known": (0, WIDE, WIDE), "flags": 8, "descriptor": "<4s3L"},
    "half a field": {"extra": b"FB"},
    "a field that goes beyond": {"extra": b"FB\5\0ZZZZ"},
    "a field that ends before": {"extra": b"FB\3\0ZZZZ"},
    "two wide fields": {"extra": zip64(16, 16) * 2},
    "half a field in the directory": {"listed_extra": b"FB\0"},
    "a field in the directory that goes beyond": {"listed_extra": b"FB\2\0Z"},
    "two wide fields in the directory": {"listed_extra": zip64(1) * 2},
    "a patch of another file": {"flags": 0x20},
}  # fmt: skip


@pytest.mark.parametrize("how", BENT)
def test_headers_that_contradict_the_directory_are_refused(how: str) -> None:
    records_of(made(SIXTEEN))
    with pytest.raises(UnreadableError) as caught:
        records_of(made(SIXTEEN, **BENT[how]))
    assert caught.value.problem.kind in ("zip_broken", "zip_differs", "zip_packed")  # type: ignore[union-attr]


@pytest.mark.parametrize("at", range(16))
def test_a_descriptor_says_what_the_directory_says(at: int) -> None:
    place = behind(GOOD, "data/0")
    assert GOOD[place : place + 4] == b"PK\7\10"
    assert kind_of(change(GOOD, place + at, bytes([GOOD[place + at] ^ 1]))) == "zip_differs"


def test_the_length_of_the_padding_of_torch_moves_no_weight() -> None:
    place = local(GOOD, "/data/0")
    for at in (28, 29):
        for bit in range(8):
            assert kind_of(change(GOOD, place + at, bytes([GOOD[place + at] ^ 1 << bit]))) in (
                "zip_broken",
                "zip_differs",
            )


@pytest.mark.parametrize("name", ["/data.pkl", "/data/0", "/version", "/.data/serialization_id"])
def test_a_record_that_the_directory_hides_is_refused(name: str) -> None:
    # A reader that goes from header to header would find it: the first, one between two, or the last.
    at = central(GOOD, name)
    size = 46 + sum(struct.unpack_from("<3H", GOOD, at + 28))
    end64, end = GOOD.rindex(b"PK\6\6"), GOOD.rindex(b"PK\5\6")
    count, length = (
        number - less for number, less in zip(struct.unpack_from("<HL", GOOD, end + 10), (1, size), strict=True)
    )
    data = change(GOOD, end + 8, struct.pack("<2HL", count, count, length))
    data = change(data, end64 + 24, struct.pack("<3Q", count, count, length))
    data = change(data, end - 12, struct.pack("<Q", end64 - size))
    data = data[:at] + data[at + size :]
    assert name[1:] not in {each.partition("/")[2] for each in zipfile.ZipFile(io.BytesIO(data)).namelist()}
    with pytest.raises(UnreadableError) as caught:
        records_of(data)
    assert caught.value.problem.kind in ("zip_broken", "zip_differs")  # type: ignore[union-attr]


def test_names_that_differ_in_case_only_are_refused() -> None:
    # torch looks names up in either case, and of two finds one or the other.
    records = unzipped(saved({"a": torch.tensor([1.0, 2.0])}))
    upper = {name.replace("data/0", "DATA/0"): content for name, content in records.items()}
    assert torch.load(io.BytesIO(zipped(upper)))["a"].tolist() == [1.0, 2.0]
    data = zipped(records | {"DATA/0": struct.pack("<2f", 7, 8)})
    with pytest.raises(UnreadableError, match=r"this zip holds 'data/0' and 'DATA/0', which torch takes for one name"):
        read(data)


def test_names_of_arrays_may_differ_in_case_only(tmp_path: Path) -> None:
    numpy.savez(tmp_path / "w.npz", w=numpy.float32([1]), W=numpy.float32([2]))
    with open_checkpoint(tmp_path / "w.npz") as checkpoint:
        assert list(checkpoint.parts[""].entries) == ["w", "W"]


def test_a_nul_in_a_name_is_refused() -> None:
    # Python's zipfile ends the name there, so that there are two of one name.
    data = zipped(unzipped(GOOD) | {"data/0Xx": b""}).replace(b"data/0Xx", b"data/0\0x")
    assert zipfile.ZipFile(io.BytesIO(data)).namelist().count("archive/data/0") == 2
    with pytest.raises(UnreadableError, match="there is a NUL byte in the name 'archive/data/0"):
        read(data)


@pytest.mark.parametrize("offset", [8, 10, 12, 16])
def test_two_ends_that_contradict_each_other_are_refused(offset: int) -> None:
    # Some readers take the zip64 end wherever there is one, others only where the short one has no room.
    end = GOOD.rindex(b"PK\5\6")
    assert kind_of(change(GOOD, end + offset, bytes([GOOD[end + offset] ^ 1]))) == "zip_broken"
    wide = b"\xff" * (2 if offset < 12 else 4)
    assert_same(tensors(change(GOOD, end + offset, wide)), STATE)


def test_a_second_directory_behind_the_first_is_refused() -> None:
    # The comment of the one end holds the other.
    other = saved(STATE)
    at, end = other.index(b"PK\1\2"), other.rindex(b"PK\5\6")
    directory = other[at : other.rindex(b"PK\6\6")]
    first = zipped(unzipped(other))
    new_end = struct.pack(
        "<4s4H2LH", b"PK\5\6", 0, 0, *(struct.unpack_from("<H", other, end + 10) * 2), len(directory), len(first), 0
    )
    data = change(first, len(first) - 2, struct.pack("<H", len(directory + new_end))) + directory + new_end
    assert zipfile.ZipFile(io.BytesIO(data)).namelist() == zipfile.ZipFile(io.BytesIO(other)).namelist()
    assert kind_of(data) in ("zip_broken", "zip_differs")


@pytest.mark.parametrize("comment", [b"", b"hello"])
@pytest.mark.parametrize("more", [1, 40_000])
def test_a_comment_that_goes_beyond_the_file_is_refused(comment: bytes, more: int) -> None:
    end = GOOD.rindex(b"PK\5\6")
    assert_same(tensors(GOOD[: end + 20] + struct.pack("<H", len(comment)) + comment), STATE)
    assert kind_of(GOOD[: end + 20] + struct.pack("<H", len(comment) + more) + comment) == "zip_broken"


@pytest.mark.parametrize(
    ("numel", "content"), [(2, b"1234567"), (2, b"123456789"), (3, TWO_FLOATS), (1, TWO_FLOATS), (0, b"1")]
)
def test_a_storage_has_exactly_the_bytes_that_are_said(numel: int, content: bytes) -> None:
    # Z4.
    pickle = dict_of(a=rebuilt(floats(numel=numel), size=b")", stride=b")"))
    assert kind_of(zipped({"data.pkl": pickle, "data/0": content})) == "record_size"


def test_a_storage_that_is_not_there_is_named() -> None:
    with pytest.raises(UnreadableError, match=r"record 'data/7' is missing"):
        read(zipped({"data.pkl": dict_of(a=rebuilt(floats("7")))}))


def test_a_storage_key_is_any_text() -> None:
    # Pitfall 8.
    for key in ("../x", "ключ", "a/b", "0\n"):
        data = zipped({"data.pkl": dict_of(a=rebuilt(floats(key))), f"data/{key}": TWO_FLOATS})
        assert_same(tensors(data), {"a": torch.tensor([1.0, 2.0])})


def test_records_beyond_four_gigabytes_are_found(tmp_path: Path) -> None:
    # A sparse file: the numbers are zip64, nothing is written.
    path = tmp_path / "big.pt"
    with torch.serialization.skip_data():
        torch.save({"big": torch.empty(1 << 30, 5, dtype=torch.uint8), "small": torch.arange(3.0)}, path)
    with open_checkpoint(path) as checkpoint, zipfile.ZipFile(path) as theirs:
        spans = checkpoint.parts[""].entries
        assert path.stat().st_size > 5 << 30
        assert spans["big"].nbytes == 5 << 30  # type: ignore[union-attr]
        small = spans["small"]
        assert small.offset > 5 << 30  # type: ignore[union-attr]
        assert small.offset - theirs.getinfo("big/data/1").header_offset in range(30, 200)  # type: ignore[union-attr]


ZEROS = bytes(64 << 20)


class Sparse(io.FileIO):
    """A file in which `ZEROS` take no room."""

    def write(self, data: Any) -> int:
        if data is not ZEROS:
            return super().write(data)
        self.seek(len(data), io.SEEK_CUR)
        return len(data)


def test_an_archive_of_more_than_four_gigabytes(tmp_path: Path) -> None:
    """zip64: a record that is larger than 32 bits can say, and one that begins behind it."""
    numel = (1 << 30) + (1 << 24)
    pickle = dict_of(big=rebuilt(floats("0", numel), size=number(numel) + b"\x85"), w=rebuilt(floats("1")))
    path = tmp_path / "big.pt"
    with Sparse(path, "w") as file, zipfile.ZipFile(file, "w") as out:
        make_sparse(file)
        out.writestr("big/data.pkl", pickle)
        with out.open("big/data/0", "w", force_zip64=True) as record:
            for _ in range(4 * numel // len(ZEROS)):
                record.write(ZEROS)
        out.writestr("big/data/1", TWO_FLOATS)
        out.writestr("big/version", b"3\n")
    assert path.stat().st_size > 4 << 30
    assert getattr(path.stat(), "st_blocks", 0) * 512 < 1 << 20
    net = torch.nn.Module()
    net.register_buffer("w", torch.zeros(2))
    smart_load(net, path, allow_unexpected=["big"])
    assert net.w.tolist() == [1.0, 2.0]
