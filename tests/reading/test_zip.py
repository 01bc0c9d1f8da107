"""Rules Z1 to Z5 of the reading rules: the zip that torch writes, and every way to bend one."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

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


def test_the_checksum_of_each_tensor_is_kept_for_those_who_want_it() -> None:
    checkpoint, content = read(GOOD), unzipped(GOOD)
    assert {record.name: record.crc for record in checkpoint.records} == {
        name: zlib.crc32(data) for name, data in content.items() if name.startswith("data/")
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
