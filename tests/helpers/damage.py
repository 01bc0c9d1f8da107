"""Valid checkpoints of every format, and changes to them that know the format: what a fuzzer feeds to the readers."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import pickletools
import random
import re
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from formats import FORMATS, _cut
from reading_tools import CANARY
from torch import nn

EXTREMES = (0, 1, -1, 2, 127, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**47, 2**48, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
NASTY = ("", "..", "../x", "/etc/passwd", "a\0b", "\x1b[31m\n", "\u202e", "x" * 300, ".hidden", "module", "\ud800")
JSON = (
    *(b"null", b"NaN", b"-Infinity", b"1e999", b"-0.0", b"1.5", b"true", b"[]", b"{}", b"[[1]]", b"0.0"),
    *(b"9" * 400, b"9" * 4299, b"9" * 5000, b"[" * 2000 + b"]" * 2000, b'{"a":' * 300 + b"1" + b"}" * 300),
    *(str(number).encode() for number in EXTREMES),
    *(json.dumps(text).encode() for text in NASTY),
)
TOUCH = f"echo > {CANARY}".encode()
GADGETS = (
    b"cos\nsystem\nX" + struct.pack("<I", len(TOUCH)) + TOUCH + b"\x85R",
    b"csubprocess\nPopen\nX" + struct.pack("<I", len(TOUCH)) + TOUCH + b"\x85\x81",
    b"cbuiltins\neval\n(V__import__('os').system('touch x')\ntR",
    b"ctorch.storage\n_load_from_bytes\nC\x04abcd\x85R",
    b"ctorch\nfrom_file\n(V" + CANARY.as_posix().encode("raw_unicode_escape") + b"\n\x88K\x08tR",
    b"cbuiltins\ngetattr\n(cos\npath\nV__class__\ntR",
    b"(cbuiltins\nexec\nVraise SystemExit\no",
    *(b"N", b"}", b"]", b")", b"(", b"0", b"2", b"\x8f", b"b", b"s", b"u", b"a", b"e", b"t", b"l", b"\x92", b"Q"),
)
PAYLOAD = re.compile(r"(?:.*/)?(?:data/(?:constants/|weights/weight_|tensors/)?\w+|tensors/\d+|.*\.npy)")


class Net(nn.Module):
    """Tensors of every kind that all formats can hold; several have one shape, so that they can be confused."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
        self.head = nn.Linear(8, 5)
        self.register_buffer("mask", torch.rand(5, 9) > 0.5)
        self.register_buffer("scale", torch.rand(()))
        self.register_buffer("nothing", torch.empty(0, 3))


def state_of(seed: int) -> dict[str, torch.Tensor]:
    """A state dict of `Net` in which hardly a value occurs twice."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state = Net().state_dict()
        for tensor in state.values():
            if tensor.is_floating_point():
                tensor.normal_()
            elif tensor.dtype == torch.int64:
                tensor.random_(1 << 40, 1 << 41)
    return state


STATES = state_of(1), state_of(2)


@dataclass
class Base:
    """A valid checkpoint: its files by name, which of them is loaded ("": the folder), and where its tensors lie."""

    name: str
    entry: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    regions: dict[str, list[tuple[str, int, int]]] = field(default_factory=dict)
    """Tensor -> file, first byte and size of each of its pieces, where they lie there as they are."""


def base(name: str, number: int = 0) -> Base:
    """A state dict in one format."""
    with tempfile.TemporaryDirectory() as folder:
        written: Any = FORMATS[name](STATES[number], Path(folder))
        if not isinstance(written, Path):
            return _mapped(Base(name, "object", {"object": written.read()}), STATES[number])
        root = written if written.is_dir() else written.parent
        files = {path.name: path.read_bytes() for path in sorted(root.iterdir()) if path.is_file()}
        return _mapped(Base(name, "" if written.is_dir() else written.name, files), STATES[number])


def _mapped(made: Base, state: dict[str, torch.Tensor]) -> Base:
    for key, tensor in state.items():
        pieces = [tensor, *(chunk for _, chunk in _cut(tensor, (2, 2)))]
        for content in map(raw_of, pieces):
            found = [(file, plain(data).find(content), len(content)) for file, data in made.files.items()]
            made.regions.setdefault(key, []).extend(place for place in found if place[1] >= 0 and len(content) > 3)
    return made


def plain(data: bytes) -> bytes:
    """What gzip packed, unpacked; anything else as it is."""
    with contextlib.suppress(OSError, EOFError, zlib.error):
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    return data


def raw_of(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


# ------------------------------------------------------------------------------------------------------ the mutators


def raw(rng: random.Random, data: bytes, donor: bytes) -> bytes:
    """A change that knows nothing of the format."""
    at, size = rng.randrange(len(data) + 1), min(len(data), 1 << rng.randrange(10))
    here, there = (rng.randrange(max(1, len(data) - size)) for _ in range(2))
    kind = rng.randrange(10)
    if kind <= 1:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :] if at < len(data) else data
    if kind == 2:
        return data[:at] + bytes([rng.choice((0, 0xFF, 0x2E, rng.randrange(256)))]) + data[at + 1 :]
    if kind == 3:
        return (
            data[:at] if rng.random() < 0.5 else data + rng.choice((b"\0" * size, data[:size], b"PK\5\6" + b"\0" * 18))
        )
    if kind == 4:
        return data[:here] + data[here + size :]
    if kind == 5:
        return data[:here] + data[there : there + size] + data[here:]
    if kind == 6:
        first, second = sorted((here, there))
        one, other = data[first : first + size], data[second : second + size]
        return (
            data[:first] + other + data[first + size : second] + one + data[second + size :]
            if second > first + size
            else data
        )
    if kind == 7:
        other = rng.randrange(len(donor) + 1) if rng.random() < 0.5 else min(at, len(donor))
        return (
            data[:at] + donor[other : other + size] + data[at + size :]
            if rng.random() < 0.6
            else data[:at] + donor[other:]
        )
    if kind == 8:
        width = rng.choice((1, 2, 4, 8))
        number = rng.choice(EXTREMES) % (1 << 8 * width)
        return data[:at] + number.to_bytes(width, rng.choice(("little", "big"))) + data[at + width :]
    return _digits(rng, data)


def _digits(rng: random.Random, data: bytes) -> bytes:
    found = list(re.finditer(rb"\d+", data[: 1 << 16]))
    if not found:
        return data
    spot = rng.choice(found)
    number = str(rng.choice((*EXTREMES, 10**300, 10**4299, int(rng.choice(found)[0][:300]))))
    text = number[-len(spot[0]) :].zfill(len(spot[0])) if rng.random() < 0.5 else number
    return data[: spot.start()] + text.encode() + data[spot.end() :]


def of_json(rng: random.Random, data: bytes, donor: bytes) -> bytes:
    """One token of a JSON text replaced by a hostile one, or by another of the same text."""
    tokens = list(re.finditer(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?|true|false|null|\[[^\[\]]*\]|\{[^{}]*\}', data))
    if not tokens:
        return raw(rng, data, donor)
    spot, other = rng.choice(tokens), rng.choice(tokens)
    new = other[0] if rng.random() < 0.5 else rng.choice(JSON)
    return data[: spot.start()] + new + data[spot.end() :]


def of_pickle(rng: random.Random, data: bytes, donor: bytes) -> bytes:
    """One opcode of a pickle changed, doubled, dropped, exchanged for another one or for a call."""
    start = rng.choice([0, *(match.start() for match in re.finditer(rb"\x80[\2-\5]", data))])
    ops: list[tuple[Any, Any, int]] = []
    with contextlib.suppress(Exception):
        for op, value, at in pickletools.genops(data[start:]):
            ops.append((op, value, start + at))
    if len(ops) < 2:
        return raw(rng, data, donor)
    spans = [(op, value, at, end) for (op, value, at), (_, _, end) in itertools.pairwise(ops)]
    op, value, at, end = rng.choice(spans)
    _, _, first, last = rng.choice(spans)
    kind = rng.randrange(8)
    if kind == 0:
        return data[:at] + rng.choice(GADGETS) + data[rng.choice((at, end)) :]
    if kind == 1:
        return data[:at] + data[end:]
    if kind == 2:
        return data[:at] + bytes([rng.choice(pickletools.opcodes).code.encode("latin1")[0]]) + data[at + 1 :]
    if kind in (3, 4):
        same_kind = [s for s in spans if s[0].name == op.name and s[1] != value] or spans
        _, _, first, last = rng.choice(same_kind)
        return data[:at] + data[first:last] + data[end:]
    if kind == 5:
        return data[:at] + data[first:last] + data[at:]
    if isinstance(value, int) and not isinstance(value, bool):
        number = rng.choice((*EXTREMES, value + 1, value - 1, -value, value * 2, 1 << 40000))
        width = number.bit_length() // 8 + 1
        new = b"\x8b" + struct.pack("<i", width) + number.to_bytes(width, "little", signed=True)
    else:
        text = rng.choice(NASTY).encode("utf-8", "surrogatepass")
        new = b"X" + struct.pack("<I", len(text)) + text
    return data[:at] + new + data[end:]


def of_zip(rng: random.Random, data: bytes, donor: bytes) -> bytes:
    """A record changed, packed, dropped or renamed, under a right directory and right checksums."""
    found = records(data)
    if not found or "" in found:
        return raw(rng, data, donor)
    names = sorted(found, key=lambda name: (PAYLOAD.fullmatch(name) is not None, rng.random()))
    name = names[0] if rng.random() < 0.4 else rng.choice(names)
    other = rng.choice([*records(donor).values(), *found.values()])
    kind, out = rng.randrange(8), io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w") as archive:
        warnings.simplefilter("ignore")  # a name may be given twice
        for each, content in found.items():
            if each != name:
                archive.writestr(zipfile.ZipInfo(each), content)
            elif kind == 0:
                renamed = (f"{name.partition('/')[0]}/{rng.choice(NASTY[2:4])}", rng.choice(names) + "x", "z/z")
                archive.writestr(zipfile.ZipInfo(rng.choice(renamed)), content)
            elif kind > 1:
                packing = zipfile.ZIP_DEFLATED if kind == 7 else zipfile.ZIP_STORED
                archive.writestr(zipfile.ZipInfo(each), changed(rng, content, other), packing)
    return out.getvalue()


def records(data: bytes) -> dict[str, bytes]:
    """The records of a zip by what its directory says, whether or not their checksums are right."""
    found: dict[str, bytes] = {}
    with contextlib.suppress(Exception), zipfile.ZipFile(io.BytesIO(data)) as archive:
        for item in archive.infolist():
            names = struct.unpack_from("<2H", data, item.header_offset + 26)
            at = item.header_offset + 30 + sum(names)
            content = data[at : at + item.compress_size]
            packed = item.compress_type == zipfile.ZIP_DEFLATED
            found[item.filename] = zlib.decompressobj(-15).decompress(content, 1 << 20) if packed else content
    return found


def of_safetensors(rng: random.Random, data: bytes, donor: bytes) -> bytes:
    """The header changed as JSON, under the right size; at times filled up so that the data stay in place."""
    size = int.from_bytes(data[:8], "little")
    header = of_json(rng, data[8 : 8 + size], donor)
    if rng.random() < 0.5:
        header = header.ljust(size)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def of_gzip(rng: random.Random, data: bytes, donor: bytes) -> bytes:
    """What is packed is changed, and packed again."""
    inner = changed(rng, plain(data), donor)
    return gzip.compress(gzip.compress(inner) if rng.random() < 0.02 else inner, 1, mtime=0)


KINDS: tuple[tuple[Callable[[bytes], object], Callable[[random.Random, bytes, bytes], bytes]], ...] = (
    (lambda data: data[:4] == b"PK\3\4", of_zip),
    (lambda data: data[:2] == b"\x1f\x8b", of_gzip),
    (lambda data: data[8:9] == b"{" and data[1:8] == bytes(data[1:2]) + bytes(6), of_safetensors),
    (lambda data: data.lstrip()[:1] == b"{", of_json),
    (lambda data: data[:6] == b"\x93NUMPY", lambda rng, data, _: _digits(rng, data)),
    (lambda data: data[:1] in b"\x80(}]c" or b"\x80\2" in data[:99], of_pickle),
)


def changed(rng: random.Random, data: bytes, donor: bytes) -> bytes:
    """One change, mostly one that knows the format."""
    known = next((mutate for is_kind, mutate in KINDS if is_kind(data)), raw) if rng.random() < 0.75 else raw
    return known(rng, data, donor)


@dataclass
class Case:
    """A damaged checkpoint, made from a number."""

    base: Base
    rng: random.Random
    files: dict[str, bytes]
    regions: dict[str, set[tuple[str, int, int]]]


def case(of: Base, donors: list[Base], number: int) -> Case:
    """The damaged checkpoint of a number: up to three changes in one file of it, rarely of the folder."""
    rng = random.Random(f"{of.name} {number}")
    twin = donors[0].regions  # the same format may hold another state in another order, and be spliced in as a whole
    made = Case(of, rng, dict(of.files), {key: {*places, *twin[key]} for key, places in of.regions.items()})
    names = [name for name in of.files if name not in ("config.json", "optimizer.pt")]
    donor = rng.choice(donors)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice(names)
        before, other = made.files[name], donor.files.get(name) or rng.choice(list(donor.files.values()))
        if len(names) > 1 and rng.random() < 0.03:
            made.files[rng.choice(names)] = made.files[rng.choice(names)]
        elif before:
            made.files[name] = changed(rng, before, other)
            _follow(made, name, before)
    return made


def _follow(made: Case, name: str, before: bytes) -> None:
    """Where tensors lie after a change of one file: where they lay, or moved with what follows the change."""
    delta = len(plain(made.files[name])) - len(plain(before))
    for places in made.regions.values() if delta else ():
        places |= {(file, start + delta, size) for file, start, size in places if file == name and start + delta >= 0}


class Bases:
    """The valid checkpoints, written when they are first asked for."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, int], Base] = {}

    def of(self, name: str) -> tuple[Base, list[Base]]:
        """One format, and what it is spliced with: another state in the same format, and other formats."""
        wanted = [(name, 0), (name, 1), ("torch zip", 1), ("safetensors", 1), ("pickle 2", 1)]
        for each in wanted:
            if each not in self._made:
                self._made[each] = base(*each)
        return self._made[wanted[0]], [self._made[each] for each in wanted[1:]]
