"""Files of every format, damaged on purpose, and a judge of what a load makes of them.

    python tests/fuzz.py --seconds 3600 [--seed N] [--format NAME] [--findings FOLDER]
    python tests/fuzz.py --format NAME --case N      # one case again, its files kept

A load may refuse, in words, and leave the model as it was; or give tensors that the file really holds.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import itertools
import json
import multiprocessing
import os
import pickletools
import random
import re
import resource
import shutil
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.append(str(Path(__file__).parent / "sources"))

from formats import FORMATS, _cut
from reading_tools import same, watched

from smartload import SmartLoadError, inspect, smart_load
from smartload.records import ITEMSIZE

CANARY = Path(tempfile.gettempdir()) / "smartload-fuzz-canary"  # never written
SLOWEST, MOST_MEMORY = 5.0, 64 << 20
EXTREMES = (0, 1, -1, 2, 127, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**47, 2**48, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
NASTY = ("", "..", "../x", "/etc/passwd", "a\0b", "\x1b[31m\n", "\u202e", "x" * 300, ".hidden", "module", "\ud800")
JSON = (
    *(b"null", b"NaN", b"-Infinity", b"1e999", b"-0.0", b"1.5", b"true", b"[]", b"{}", b"[[1]]", b"0.0"),
    *(b"9" * 400, b"9" * 4299, b"9" * 5000, b"[" * 2000 + b"]" * 2000, b'{"a":' * 300 + b"1" + b"}" * 300),
    *(str(number).encode() for number in EXTREMES),
    *(json.dumps(text).encode() for text in NASTY),
)
TOUCH = f"touch {CANARY}".encode()
GADGETS = (
    b"cos\nsystem\nX" + struct.pack("<I", len(TOUCH)) + TOUCH + b"\x85R",
    b"csubprocess\nPopen\nX" + struct.pack("<I", len(TOUCH)) + TOUCH + b"\x85\x81",
    b"cbuiltins\neval\n(V__import__('os').system('touch x')\ntR",
    b"ctorch.storage\n_load_from_bytes\nC\x04abcd\x85R",
    b"ctorch\nfrom_file\n(V/tmp/smartload-fuzz-canary\n\x88K\x08tR",
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
    """A record changed, dropped, doubled or renamed, under a right directory and right checksums."""
    records, others = _records(data), _records(donor)
    if not records or "" in records:
        return raw(rng, data, donor)
    names = sorted(records, key=lambda name: (PAYLOAD.fullmatch(name) is not None, rng.random()))
    name = names[0] if rng.random() < 0.4 else rng.choice(names)
    kind, shallow = rng.randrange(8), rng.choice((None, zipfile.ZIP_DEFLATED))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for each, content in records.items():
            if each != name or kind >= 2:
                new = (
                    changed(rng, content, rng.choice([*others.values(), *records.values()]))
                    if each == name
                    else content
                )
                packed = zipfile.ZIP_DEFLATED if kind == 7 and each == name and shallow else None
                archive.writestr(each, new, packed)
            elif kind == 0:
                folder = name.partition("/")[0]
                archive.writestr(
                    rng.choice((f"{folder}/{rng.choice(NASTY[2:4])}", rng.choice(names) + "x", "z/z")), content
                )
    return out.getvalue()


def _records(data: bytes) -> dict[str, bytes]:
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


def of_tar(rng: random.Random, data: bytes, donor: bytes) -> bytes:
    """A field of a header changed under a right checksum, or what a member holds."""
    heads = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    at = rng.choice(heads)
    if rng.random() < 0.5:
        end = next((head for head in heads if head > at), len(data))
        return data[: at + 512] + of_pickle(rng, data[at + 512 : end], donor) + data[end:]
    head = bytearray(data[at : at + 512])
    first, size = rng.choice(((0, 100), (100, 8), (124, 12), (124, 12), (156, 1), (157, 100), (257, 6), (345, 155)))
    numbers = (b"%011o" % (number % 8**11) for number in EXTREMES)
    text = rng.choice((*numbers, b"\x80" + b"\xff" * 11, b"-1", b"../x", b"storages", b"tensors", b"L", b"1", b"x"))
    head[first : first + size] = text[:size].ljust(size, b"\0")
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return data[:at] + bytes(head) + data[at + 512 :]


def of_gzip(rng: random.Random, data: bytes, donor: bytes) -> bytes:
    """What is packed is changed, and packed again."""
    inner = changed(rng, plain(data), donor)
    return gzip.compress(gzip.compress(inner) if rng.random() < 0.02 else inner, 1, mtime=0)


KINDS: tuple[tuple[Callable[[bytes], object], Callable[[random.Random, bytes, bytes], bytes]], ...] = (
    (lambda data: data[:4] == b"PK\3\4", of_zip),
    (lambda data: data[:2] == b"\x1f\x8b", of_gzip),
    (lambda data: data[257:262] == b"ustar", of_tar),
    (lambda data: data[8:9] == b"{" and data[1:8] == bytes(data[1:2]) + bytes(6), of_safetensors),
    (lambda data: data.lstrip()[:1] == b"{", of_json),
    (lambda data: data[:6] == b"\x93NUMPY", lambda rng, data, _: _digits(rng, data)),
    (lambda data: data[:1] in b"\x80(}]c" or b"\x80\2" in data[:99], of_pickle),
)


def changed(rng: random.Random, data: bytes, donor: bytes) -> bytes:
    """One change, mostly one that knows the format."""
    known = next((mutate for is_kind, mutate in KINDS if is_kind(data)), raw) if rng.random() < 0.75 else raw
    return known(rng, data, donor)


# --------------------------------------------------------------------------------------------------------- the judge


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
    made = Case(of, rng, dict(of.files), {key: set(places) for key, places in of.regions.items()})
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


class Judge:
    """Loads damaged checkpoints into one model, and says what of that must not be."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.net, self.before = folder, Net(), {k: t.clone() for k, t in Net().state_dict().items()}
        self.net.load_state_dict(self.before)
        self.objects = [id(parameter) for parameter in self.net.parameters()]

    def write(self, made: Case) -> Any:
        """The files on disk, old enough to be read at once; what `smart_load` takes for the path."""
        if made.base.entry == "object" or (len(made.files) == 1 and made.rng.random() < 0.3):
            (self.folder / "object").write_bytes(data := next(iter(made.files.values())))
            return io.BytesIO(data)
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        for name, data in made.files.items():
            (self.folder / name).write_bytes(data)
            os.utime(self.folder / name, (1e9, 1e9))
        return self.folder / made.base.entry

    def verdict(self, made: Case) -> tuple[str, str]:
        """ "refused", "loaded", or a kind of finding; and the words for it."""
        source, verify = self.write(made), made.rng.random() < 0.3
        calls = (lambda: smart_load(self.net, source, verify=verify), lambda: str(inspect(source)) + "")
        call, outcome, words = calls[made.rng.random() < 0.1], "loaded", ""
        memory, started = _memory(), time.perf_counter()
        with watched() as seen:
            try:
                report: Any = call()
            except SmartLoadError as error:
                outcome, words = "refused", self._words(error)
            except BaseException as error:
                return f"raw {type(error).__name__}", _where(error)
        seconds, more = time.perf_counter() - started, _memory() - memory
        seen = [event for event in seen if not event.startswith("ctypes.cdata")]
        state = {key: tensor.clone() for key, tensor in self.net.state_dict().items()}
        self.net.load_state_dict(self.before)
        problems = (
            ("event", seen or CANARY.exists()),
            ("slow", seconds > SLOWEST and f"{seconds:.1f} s"),
            ("memory", more > MOST_MEMORY + sum(map(len, made.files.values())) and f"{more >> 20} MiB"),
            ("message", words.startswith("!") and words),
            ("objects", [id(parameter) for parameter in self.net.parameters()] != self.objects),
            ("changed", outcome == "refused" and [k for k in state if not same(state[k], self.before[k])]),
            ("wrong", call is calls[0] and outcome == "loaded" and self._wrong(made, state, report)),
        )
        return next(((kind, str(found)) for kind, found in problems if found), (outcome, words))

    def _words(self, error: SmartLoadError) -> str:
        try:
            words = str(error)
        except Exception as failure:
            return f"! the message cannot be written: {_where(failure)}"
        if len(words) >= 2000 or not all(line.isprintable() for line in words.split("\n")):
            return f"! {len(words)} characters: {words[:300]!r}"
        return words

    def _wrong(self, made: Case, state: dict[str, torch.Tensor], report: Any) -> list[str]:
        """Tensors with values that no single tensor of the file has, in whatever dtype it may be read.

        A change may say honestly that a name means another tensor, or that its bytes are another dtype; but what
        lies beside a tensor's bytes is never a value.
        """
        differing = {key: got for key, got in state.items() if not same(got, STATES[0][key])}
        kept = {*report.missing_keys, *(item.key for item in report.plan.kept)}
        pools = list(_pools(made)) if differing else []
        return [
            f"{key} = {got.reshape(-1)[:8].tolist()}"
            for key, got in differing.items()
            if key not in kept and not any(_values(got) <= _seen_as(pool, got.dtype) for pool in pools)
        ]


def _pools(made: Case) -> Iterator[list[bytes]]:
    """For each tensor that can be in the files, the runs of bytes that are its own."""
    contents = {name: plain(data) for name, data in made.files.items()}
    for key, places in made.regions.items():
        yield [raw_of(STATES[0][key]), *(contents[file][at : at + size] for file, at, size in places)]
    yield from ([raw_of(tensor)] for tensor in STATES[1].values())
    for data in contents.values():
        yield from ([content] for content in _payloads(data))


def _payloads(data: bytes) -> Iterator[bytes]:
    """The records of a zip that are tensors, and the strings of a pickle, which may stand for their bytes."""
    for name, content in _records(data).items():
        if name.endswith((".pt", ".pkl")):
            yield from _payloads(content)
        elif PAYLOAD.fullmatch(name):
            yield content[content.find(b"\n") + 1 :] if name.endswith(".npy") else content
    with contextlib.suppress(Exception):
        for _, value, _ in pickletools.genops(data):
            if isinstance(value, (str, bytes)) and len(value) > 3:
                yield value.encode("latin1", "ignore") if isinstance(value, str) else value


def _values(tensor: torch.Tensor) -> set[bytes]:
    raw, width = raw_of(tensor), tensor.element_size()
    return {raw[at : at + width] for at in range(0, len(raw), width)}


def _seen_as(pool: list[bytes], dtype: torch.dtype) -> set[bytes]:
    """Every element of `dtype` that the bytes hold, read as whatever dtype and in either order, and cast."""
    found: set[bytes] = set()
    for content in pool:
        for name in ITEMSIZE:
            kind = getattr(torch, name)
            if kind.is_complex or len(content) < kind.itemsize:
                continue
            flat = torch.frombuffer(
                bytearray(content[: len(content) // kind.itemsize * kind.itemsize]), dtype=torch.uint8
            )
            for each in (flat, flat.view(-1, kind.itemsize).flip(1).reshape(-1)):
                found |= _values(
                    (each.ne(0) if kind is torch.bool else each.view(kind)).to(
                        torch.float64 if dtype is None else dtype
                    )
                )
    return found


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _where(error: BaseException) -> str:
    """An error with the innermost line of the package that it came through."""
    at, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        at = f"{Path(code.co_filename).name}:{trace.tb_lineno}" if "smartload" in code.co_filename else at
        trace = trace.tb_next
    return f"{type(error).__name__}: {str(error)[:200]} at {at}"


# ------------------------------------------------------------------------------------------------------- the command


def worker(pipe: Connection, folder: Path) -> None:
    """Answers (format, number) with a verdict, in a process of its own."""
    judge, bases = Judge(folder), Bases()
    while (asked := pipe.recv()) is not None:
        of, donors = bases.of(asked[0])
        pipe.send(("ready", ""))
        pipe.send(judge.verdict(case(of, donors, asked[1])))


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


class Crew:
    """A worker, and another one when it has crashed or hangs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._start()

    def _start(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=worker, args=(theirs, self._folder), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, name: str, number: int) -> tuple[str, str]:
        """The verdict on one case."""
        try:
            self._pipe.send((name, number))
            verdict: tuple[str, str] = ("ready", "")
            for patience in (120, SLOWEST * 4):
                verdict = self._pipe.recv() if self._pipe.poll(patience) else ("hang", "")
                if verdict[0] == "hang":
                    break
            return verdict
        except (EOFError, OSError):
            self._process.join(5)
            return "crash", f"exit code {self._process.exitcode}"

    def again(self) -> None:
        """End this worker and begin with a new one."""
        self._process.kill()
        self._process.join()
        self._start()


def main() -> None:
    """Fuzz for a while, or repeat one case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--case", type=int)
    parser.add_argument("--format", choices=list(FORMATS), action="append")
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()) / "smartload-findings")
    told = parser.parse_args()
    work = told.findings / "work"
    crew = Crew(work)
    if told.case is not None:
        print(*crew.ask(told.format[0], told.case), f"(files in {work})", sep="\n")
        return
    counts: dict[str, Counter[str]] = {name: Counter() for name in told.format or FORMATS}
    kinds: Counter[str] = Counter()
    end, rounds = time.monotonic() + told.seconds, itertools.count(told.seed * 1_000_000, 25)
    while time.monotonic() < end:
        first = next(rounds)
        for name, number in itertools.product(counts, range(first, first + 25)):
            kind, words = crew.ask(name, number)
            counts[name][kind if kind in ("refused", "loaded") else "findings"] += 1
            if kind not in ("refused", "loaded"):
                kinds[f"{kind} {words[:120]}"] += 1
                if kinds[f"{kind} {words[:120]}"] <= 3:
                    print(f"{name!r} {number}: {kind} {words}", flush=True)
                    shutil.copytree(work, told.findings / f"{name}-{number}", dirs_exist_ok=True)
                crew.again()
    print(f"{'':36}{'files':>9}{'refused':>9}{'loaded':>9}{'findings':>9}   (seed {told.seed})")
    for name, count in counts.items():
        print(f"{name:36}{count.total():9}{count['refused']:9}{count['loaded']:9}{count['findings']:9}")
    print(f"{'all':36}{sum(count.total() for count in counts.values()):9}", *kinds.most_common(40), sep="\n")


if __name__ == "__main__":
    main()
