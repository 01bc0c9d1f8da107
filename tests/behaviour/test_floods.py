"""Small files that ask for much: shared parts, chosen hashes, deep names. Each ends early, and in little memory."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from formats import dcp_in_chunks
from reading_tools import TWO_FLOATS, checkpoint_of, dict_of, floats, number, rebuilt, text, zipped
from systems import forget_peak, make_sparse, peak_memory
from torch import nn

from smartload import SmartLoadError, smart_load
from smartload.load.transfer import empty_tensor
from smartload.records.entries import Span

HELPERS = str(Path(__file__).parents[1] / "helpers")
PRIME = (1 << 61) - 1
"""Python's hash of a number is what is left of it after division by this."""
GOOD = rebuilt(floats())


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.zeros(2))


def torch_zip(pickle: bytes) -> bytes:
    return checkpoint_of(b"\x80\x02" + pickle + b".", d0=TWO_FLOATS)


def names(count: int, value: bytes, prefix: str = "") -> bytes:
    """A dict of `count` names, all for one value."""
    return b"}(" + b"".join(text(f"{prefix}{i}") + value for i in range(count)) + b"u"


def module(parameters: bytes = b"}", modules: bytes = b"}", rest: bytes = b"") -> bytes:
    body = text("_parameters") + parameters + text("_buffers") + b"}" + text("_modules") + modules + rest
    return b"ctorch.nn\nM\n)\x81}(" + body + b"ub"


def script(pickle: bytes = b"", code: bytes = b"") -> bytes:
    cls = b"c__torch__\nM\n)\x81}" + text("a") + GOOD + b"sb"
    records = {"data.pkl": b"\x80\x02" + (pickle or cls) + b".", "constants.pkl": b"\x80\x02)."}
    return zipped({**records, "data/0": TWO_FLOATS, "code/__torch__.py": code}, compression=zipfile.ZIP_STORED)


def header(content: bytes) -> bytes:
    return len(content).to_bytes(8, "little") + content


def npz_of_dimensions() -> bytes:
    raw = b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b",".join([b"9" * 4300] * 4000) + b"), }\n"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", b"\x93NUMPY\2\0" + struct.pack("<I", len(raw)) + raw)
    return out.getvalue()


def chain(layers: int) -> bytes:
    """A module inside as many others of torch.compile."""
    inner = module()
    for _ in range(layers):
        inner = b"ctorch._dynamo.eval_frame\nOptimizedModule\n" + inner + b"\x85R"
    return inner


def wide(count: int) -> bytes:
    """An object of TorchScript with as many names for one other, twice, below a long chain."""
    cls = b"c__torch__\nM\n)\x81"
    out = cls + b"}bq\x00"
    for level in range(2):
        attributes = b"".join(text(f"a{i}") + b"h" + bytes([level]) for i in range(count))
        out += cls + b"}(" + attributes + b"ubq" + bytes([level + 1])
    for _ in range(800):
        out += b"q\x05" + cls + b"}" + text("c") + b"h\x05sb"
    return out


LEAF = names(10_000, b"N")
FLOODS: dict[str, Callable[[], bytes]] = {
    "numbers of one hash in the memo": lambda: torch_zip(
        b"N" + b"".join(b"p%d\n" % (PRIME * i) for i in range(1, 30_000)) + b"0" + dict_of(a=GOOD)[2:-1]
    ),
    "numbers of one hash in an extra state": lambda: torch_zip(
        b"}(" + text("_extra_state") + b"}("
        + b"".join(number(PRIME * i) + b"N" for i in range(1, 30_000)) + b"u" + text("a") + GOOD + b"u"
    ),
    "a list of pairs in many OrderedDicts": lambda: torch_zip(
        b"](" + b"".join(text(f"{i}") + b"N\x86" for i in range(10_000)) + b"eq\x000ccollections\nOrderedDict\nq\x010("
        + b"h\x01h\x00\x85R" * 10_000 + b"t"
    ),
    "axes of an array that hold themselves": lambda: torch_zip(
        b"}" + text("a") + b"cnumpy.core.numeric\n_frombuffer\n(" + b"B\x04\0\0\0\0\0\0\0"
        + b"cnumpy\ndtype\n(" + text("f4") + b"tR" + b"(" + number(1) + b"t" + text("K")
        + b"(]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60)) + b"0" * 0 + b"ttRs"
    ),
    "arguments in many calls": lambda: torch_zip(
        b"(" + b"N" * 50_000 + b"tq\x000}" + text("a") + b"Nsq\x010(" + b"Nh\x00h\x01\x92" * 20_000 + b"t"
    ),
    "one dict as many parts": lambda: torch_zip(
        GOOD + b"q\x000" + names(3000, b"h\x00") + b"q\x010" + names(3000, b"h\x01", "p")
    ),
    "one dict among many tensors": lambda: torch_zip(
        LEAF + b"q\x010}(" + text("t") + GOOD + b"".join(text(f"p{i}") + b"h\x01" for i in range(5000)) + b"u"
    ),
    "one dict beside many others": lambda: torch_zip(LEAF + b"q\x010" + names(5000, b"h\x01")),
    "a long name above many": lambda: torch_zip(
        GOOD + b"q\x000}" + text("x" * 1_000_000) + names(20_000, b"h\x00") + b"s"
    ),
    "long names above modules": lambda: torch_zip(
        module(b"}" + text("w") + GOOD + b"s") + b"q\x000"
        + b"".join(module(b"}", b"}" + text("x" * 100_000) + b"h\x00s") + b"q\x000" for _ in range(300)) + b"h\x00"
    ),
    "one module as many children": lambda: torch_zip(
        module(LEAF) + b"q\x000" + module(b"}", names(10_000, b"h\x00"))
    ),
    "one long list of buffers that are not saved": lambda: torch_zip(
        module(rest=text("_non_persistent_buffers_set") + b"](" + b"".join(text(f"{i}") for i in range(10_000)) + b"e")
        + b"q\x000" + module(b"}", names(10_000, b"h\x00"))
    ),
    "a module wrapped over and over": lambda: torch_zip(chain(20_000)),
    "classes without end": lambda: script(code=b"class M(Module):\n" * 200_000),
    "objects of TorchScript twice over": lambda: script(wide(1500)),
    "a name twice among many": lambda: header(
        b"{" + b",".join(b'"%d":1' % i for i in range(60_000)) + b',"59999":1}'
    ),
    "dimensions without end": npz_of_dimensions,
    "a gzip with a long name": lambda: b"\x1f\x8b\x08\x08" + bytes(6) + b"a" * 8_000_000,
    "a gzip of empty gzips": lambda: __import__("gzip").compress(b"") * 100_000,
    "one text as many arrays": lambda: pickled_texts(200),
}  # fmt: skip


def pickled_texts(count: int) -> bytes:
    """Arrays as Python 2 wrote them, all of one long text."""
    dtype = b"cnumpy\ndtype\n(S'i1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"
    size = 2_000_000
    out = b"X" + struct.pack("<I", size) + b"a" * size + b"q\x000}("
    for i in range(count):
        array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        out += text(f"{i}") + array + b"(I1\n(I%d\nt" % size + dtype + b"I00\nh\x00tb"
    return b"\x80\x02" + out + b"u."


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_ends_early_and_in_little_memory(name: str) -> None:
    data = FLOODS[name]()
    forget_peak()
    before, began = peak_memory(), time.process_time()
    words = ""
    try:
        smart_load(Tiny(), io.BytesIO(data))
    except SmartLoadError as error:
        words = str(error)
    assert len(words) < 2000
    assert time.process_time() - began < 40  # a quarter of it where nobody traces the lines
    assert peak_memory() - before < (512 << 20) + 2 * len(data)


def test_chunks_that_are_one_chunk_are_read_once(tmp_path: Path) -> None:
    source = dcp_in_chunks({f"{i}": torch.ones(2) for i in range(400)}, tmp_path, (1,))
    metadata = pickle.loads((source / ".metadata").read_bytes())
    heavy = checkpoint_of(b"\x80\x02" + b"N0" * 300_000 + GOOD + b".", d0=TWO_FLOATS)
    for info in metadata.storage_data.values():
        info.relative_path, info.offset, info.length = "__0_0.distcp", 0, len(heavy)
    (source / "__0_0.distcp").write_bytes(heavy)
    (source / ".metadata").write_bytes(pickle.dumps(metadata))
    began = time.process_time()
    with pytest.raises(SmartLoadError):
        smart_load(Tiny(), source)
    assert time.process_time() - began < 10


def test_numbers_too_long_to_print_are_not_printed(tmp_path: Path) -> None:
    source = dcp_in_chunks({"a": torch.ones(2)}, tmp_path, (1,))
    metadata = pickle.loads((source / ".metadata").read_bytes())
    metadata.state_dict_metadata["a"].size = (1 << 20_000,)
    (source / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(SmartLoadError) as caught:
        smart_load(Tiny(), source)
    assert len(str(caught.value)) < 500


def expanded(count: int) -> bytes:
    return rebuilt(floats(), size=number(count) + b"\x85", stride=b"K\x00\x85")


@pytest.mark.parametrize("count", [1 << 30, 1 << 46])
def test_an_extra_state_cannot_grow_without_end(count: int) -> None:
    class Extra(Tiny):
        def get_extra_state(self) -> object:
            return {}

        def set_extra_state(self, state: object) -> None:
            pass

    data = checkpoint_of(dict_of(a=GOOD, _extra_state=expanded(count)), d0=TWO_FLOATS)
    with pytest.raises(SmartLoadError, match="far larger than its data"):
        smart_load(Extra(), io.BytesIO(data))


def test_memory_that_cannot_be_had_is_a_typed_error() -> None:
    with pytest.raises(SmartLoadError, match="of memory, which could not be allocated"):
        empty_tensor(Span(0, 0, 4, "float32", (2, 1 << 45), (0, 0)))


def test_a_tensor_spread_over_a_vast_file_is_read_by_its_rows(tmp_path: Path) -> None:
    """Two numbers, six gigabytes apart: they take two reads and no memory."""
    gap = 3 << 29
    size = (gap + 1) * 4
    state = dict_of(a=rebuilt(floats(numel=gap + 1), stride=number(gap) + b"\x85"))
    path = tmp_path / "spread.pt"
    with path.open("wb") as file:
        make_sparse(file)
        file.write(_legacy_head(state))
        file.write(struct.pack("<q", gap + 1) + struct.pack("<f", 1.5))
        file.seek(size - 8, os.SEEK_CUR)
        file.write(struct.pack("<f", 2.5))
    code = (
        f"import sys, torch, smartload; from torch import nn; sys.path.append({HELPERS!r}); net = nn.Module()\n"
        "from systems import peak_memory\n"
        "net.register_buffer('a', torch.zeros(2))\n"
        "before = peak_memory()\n"
        "smartload.smart_load(net, sys.argv[1])\n"
        "print(net.a.tolist(), peak_memory() - before < 100 << 20)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout == "[1.5, 2.5] True\n"


def _legacy_head(state: bytes) -> bytes:
    """The five pickles of a file of before torch 1.6 with one storage."""
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    return magic + pickle.dumps(1001, 2) + pickle.dumps({}, 2) + state + pickle.dumps(["0"], 2)
