"""Pickles of real state dicts, changed by their grammar, read by smartload and by `torch.load(weights_only=True)`.

    python tests/helpers/fuzz.py --against-torch 100000 [--seed N]

Each case is one of five: both read and give equal values, one of them refuses, both do, or they differ, which may not
be. All runs in a process of its own, because some of the pickles end torch itself.
"""

from __future__ import annotations

import contextlib
import io
import math
import multiprocessing
import pickle
import pickletools
import random
import re
import struct
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

import torch
from reading_tools import floats, number, rebuilt, saved, text, unzipped
from torch import nn

from smartload import SmartLoadError
from smartload.formats import open_checkpoint
from smartload.formats.torch_legacy import MAGIC
from smartload.load.transfer import read_tensor
from smartload.pickles.inert import parse
from smartload.records.checkpoint import Checkpoint
from smartload.records.entries import Extra, Span
from smartload.records.text import printable

MEMORY = 6 << 30
"""Bytes of address space of the process: a storage of a changed size is asked for before it is found to be absent."""
MOST_ELEMENTS = 1 << 16
"""Elements of a tensor whose values are compared: a stride of 0 repeats one without end."""
CRASH = 20.0
"""Seconds without a verdict, after which the process is taken for dead."""


# ------------------------------------------------------------------------------------------------------- the pickles


def states(legacy: bool) -> dict[str, object]:
    """What real files hold, small: each kind of tensor that both readers give."""
    shared = torch.arange(6.0)
    tagged, parameter = torch.ones(2), nn.Parameter(torch.arange(2.0))
    tagged.note, parameter.note = "seen", "seen"  # type: ignore[attr-defined]
    module = nn.BatchNorm1d(2).state_dict()  # an OrderedDict with `_metadata`
    return {
        "module": module,
        "views": {"a": shared, "b": shared[2:4], "c": shared.view(2, 3).t(), "d": torch.empty(0, 3)},
        "training": {
            "model": {"w": torch.arange(2.0)},
            "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []},
            "epoch": 3,
        },
        "parameters": {"p": parameter, "t": tagged, "q": nn.Parameter(torch.arange(3), requires_grad=False)},
        "dtypes": {
            "u": torch.ones(3, dtype=torch.int16 if legacy else torch.uint16),
            "h": torch.ones(2).half(),
            "b": torch.tensor([True, False]),
        },
        "extra": {
            "w": torch.ones(2),
            "_extra_state": {"n": 1, "t": torch.arange(2.0), "s": {1, 2}, "b": b"ab", "l": [1.5, None]},
        },
        "flags": {"c": torch.ones(2, dtype=torch.complex64).conj(), "w": torch.ones(2)},
    }


class Base:
    """One state in one format: the opcodes of its pickle, and what lies around it."""

    def __init__(self, state: object, legacy: bool) -> None:
        self.legacy, self.records = legacy, unzipped(saved(state))
        raw = self.records.pop("data.pkl")
        self.ops = _opcodes(raw)
        if not legacy:
            self.head, self.tail = _local_records(self.records)
            return
        # Written as torch did before 1.6, but with the keys of a zip: that format has addresses for them, so that no
        # case would be the same again.
        ids = [reference.value for reference in parse(raw, 0, "")[2]]
        numels: dict[str, int] = {key: numel for _, _, key, _, numel in ids}  # type: ignore[misc]
        self.ops = [piece for op in self.ops for piece in ((b"N", op) if op == b"t" else (op,))]
        for at in [at for at, op in enumerate(self.ops) if op == b"N" and self.ops[at + 1] == b"t"][::-1]:
            if b"Q" not in self.ops[at + 2 : at + 4]:  # a tuple, but no persistent id
                del self.ops[at]
        self.head = b"".join(pickle.dumps(value, 2) for value in (MAGIC, 1001, {}))
        data = (struct.pack("<q", numel) + self.records[f"data/{key}"] for key, numel in numels.items())
        self.tail = pickle.dumps(list(numels), 2) + b"".join(data)

    def file(self, ops: list[bytes]) -> bytes:
        """The file around a changed pickle."""
        raw = b"".join(ops)
        return (
            self.head + raw + self.tail if self.legacy else _with_pickle(self.head, self.tail, len(self.records), raw)
        )


def _opcodes(raw: bytes) -> list[bytes]:
    at = [position or 0 for _, _, position in pickletools.genops(raw)]
    return [raw[start:end] for start, end in zip(at, [*at[1:], len(raw)], strict=True)]


def _local_records(records: dict[str, bytes]) -> tuple[bytes, bytes]:
    """The records of a zip, and their part of its directory; made here since zipfile takes a millisecond a file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)
        start = archive.start_dir
    data = file.getvalue()
    return data[:start], data[start:-22]


_NAME = b"archive/data.pkl"


def _with_pickle(head: bytes, directory: bytes, count: int, raw: bytes) -> bytes:
    facts = struct.pack("<HHHHHLLLHH", 20, 0, 0, 0, 33, zlib.crc32(raw), len(raw), len(raw), len(_NAME), 0)
    local = b"PK\3\4" + facts + _NAME + raw
    central = directory + b"PK\1\2\x14\0" + facts + struct.pack("<HHHLL", 0, 0, 0, 0, len(head)) + _NAME
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count + 1, count + 1, len(central), len(head) + len(local), 0)
    return head + local + central + end


@cache
def bases() -> list[Base]:
    """Every state in both formats; the old one thrice, because it is read faster."""
    zips, streams = ([Base(state, legacy) for state in states(legacy).values()] for legacy in (False, True))
    return [*zips, *streams, *streams, *streams]


# ------------------------------------------------------------------------------------------------------ the changes


def values_of(ops: list[bytes]) -> list[tuple[int, int]]:
    """First opcode and end of each value, by the stack that pickletools describes; none behind an opcode that fails."""
    stack: list[int] = []
    found: list[tuple[int, int]] = []
    for at, code in enumerate(ops):
        op = pickletools.code2op.get(chr(code[0]))
        if op is None or op.name == "STOP":
            break
        before, start = list(op.stack_before), at
        if pickletools.stackslice in before:
            while stack and stack[-1] >= 0:
                start = stack.pop()
            if not stack:
                break
            start = ~stack.pop()
            before = before[: before.index(pickletools.markobject)]
        if len(stack) < len(before):
            break
        for _ in before:
            start = stack.pop()
        if op.name == "MARK":
            stack.append(~at)
            continue
        stack.extend([start] * len(op.stack_after))
        if op.stack_after:
            found.append((start if start >= 0 else ~start, at + 1))
    return found


CALLS = (
    b"ctorch._utils\n_rebuild_tensor\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch._utils\n_rebuild_tensor_v3\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"ctorch._utils\n_rebuild_parameter_with_state\n",
    b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n",
    b"ctorch._tensor\n_rebuild_from_type_v2\n",
    b"ctorch.nn.parameter\nParameter\n",
    b"ctorch\nTensor\n",
    b"ctorch\nSize\n",
    b"ctorch\nFloatTensor\n",
    b"ccollections\nOrderedDict\n",
    b"ccollections\nCounter\n",
    b"cbuiltins\nset\n",
    b"c__builtin__\nset\n",
    b"c_codecs\nencode\n",
    b"cbuiltins\nbytearray\n",
    b"cbuiltins\ncomplex\n",
    b"ctorch.storage\nUntypedStorage\n",
    b"ctorch.storage\nTypedStorage\n",
    b"ctorch\nIntStorage\n",
    b"ctorch\nDoubleStorage\n",
    b"ctorch\nfloat64\n",
    b"ctorch\nint32\n",
    b"ctorch\ndevice\n",
)
_THREE = (
    b"}("
    + text("_parameters")
    + b"}"
    + text("a")
    + rebuilt(floats())
    + b"s"
    + text("_buffers")
    + b"}"
    + text("_modules")
    + b"}u"
)
_PAIR = b"](](" + text("z") + rebuilt(floats()) + b"ee"
VALUES = (
    b"N",
    b"\x88",
    b"\x89",
    b")",
    b"]",
    b"}",
    b"K\x00",
    b"K\x01",
    b"K\x02",
    b"K\x03",
    b"K\x01\x85",
    b"K\x02\x85",
    b"K\x02K\x01\x86",
    b"](K\x02e",
    b"ctorch\nSize\n](K\x02e\x85R",
    b"ctorch\nSize\n]q\x63\x85R",
    text("a"),
    text("0"),
    text("data"),
    text("meta"),
    text("real"),
    text("latin1"),
    text("w"),
    floats(),
    floats(numel=0),
    floats("1"),
    floats("1", 3),
    floats(kind="IntStorage"),
    floats(kind="IntStorage", numel=0),
    rebuilt(floats()),
    rebuilt(floats(), size=b"K\x01\x85"),
    b"}" + text("data") + rebuilt(floats()) + b"s",
    b"}" + text("real") + rebuilt(floats()) + b"s",
    b"N}" + text("data") + rebuilt(floats()) + b"s\x86",
    b"(" + floats() + b"K\x00K\x01\x85K\x01\x85t",
    b"(\x88\x89Nt",
    b"}" + text("conj") + b"\x88s",
    b"}" + text("conj") + b"\x89s",
    _THREE,
    _PAIR,
    b"}" + text("z") + rebuilt(floats()) + b"s",
    b"ccollections\nOrderedDict\n)R",
    b"ccollections\nOrderedDict\n)\x81",
    b"ccollections\nCounter\n)\x81",
    b"]q\x63",
    b"}q\x63",
    b"h\x63",
    b"ctorch\nfloat64\n",
    b"ctorch\nfloat32\n",
    b"ctorch\nTensor\n",
    b"ctorch.nn.parameter\nParameter\n",
    text("cpu"),
    b"("
    + text("storage")
    + b"ctorch\nFloatStorage\n"
    + text("0")
    + text("cpu")
    + b"K\x02"
    + text("v")
    + b"K\x00K\x01\x87tQ",
    b"("
    + text("storage")
    + b"ctorch\nFloatStorage\n"
    + text("0")
    + text("cpu")
    + b"K\x02"
    + text("v")
    + b"K\x01K\x01\x87tQ",
    b"("
    + text("storage")
    + b"ctorch\nFloatStorage\n"
    + text("0")
    + text("cpu")
    + b"K\x02"
    + text("0")
    + b"K\x01K\x01\x87tQ",
    b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x02NtQ",
)
"""Values that fit where a value stands; memo number 99 is shared among them."""
_OPCODES = tuple(b"bsuaetRQ\x81\x85\x86\x87N}])(h0.")


_KINDS = {
    **dict.fromkeys(b"R\x81", "result"),
    **dict.fromkeys(b"t\x85\x86\x87)", "tuple"),
    **dict.fromkeys(b"KMJ\x8a", "number"),
    **dict.fromkeys(b"us}", "dict"),
    **dict.fromkeys(b"ea]", "list"),
    **dict.fromkeys(b"N\x88\x89", "constant"),
    ord("Q"): "storage",
    ord("X"): "text",
    ord("c"): "name",
}
"""The last opcode of a value -> what it is."""


def kind_of(value: bytes) -> str:
    """What a value is, by its last opcode."""
    last = ""
    with contextlib.suppress(ValueError):
        for op, _, _ in pickletools.genops(value + b"."):
            last = last if op.name in ("STOP", "BINPUT", "LONG_BINPUT") else op.code
    return _KINDS.get(ord(last or "."), "")


@cache
def pool(legacy: bool) -> dict[str, list[bytes]]:
    """All values of all pickles of one format, and those that no pickler writes, by what they are; "" for all."""
    own = [base for base in bases() if base.legacy == legacy]
    found = {b"".join(base.ops[start:end]) for base in own for start, end in values_of(base.ops)}
    odd = [re.sub(rb"(\x8a\x01[\0-\3])tQ", rb"\1NtQ", value) if legacy else value for value in VALUES]
    kinds: dict[str, list[bytes]] = {"": []}
    for value in sorted(value for value in found if len(value) < 600) + odd * 4:
        kinds[""].append(value)
        kinds.setdefault(kind_of(value), []).append(value)
    return kinds


def change(rng: random.Random, base: Base, ops: list[bytes], donor: list[bytes]) -> list[bytes]:
    """One change; mostly one that leaves the stack as it is, so that both readers get far."""
    at = rng.randrange(len(ops))
    if rng.random() < 0.7:
        return _change_of_value(rng, base, ops)
    kind = rng.randrange(6)
    if kind == 0:
        raw = bytearray(ops[at])
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        return [*ops[:at], bytes(raw), *ops[at + 1 :]]
    if kind == 1:
        return ops[:at] + ops[at + 1 :]
    if kind == 2:
        return [*ops[:at], bytes([rng.choice(_OPCODES)]), *ops[at + (rng.random() < 0.5) :]]
    if kind == 3:
        return [*ops[:at], rng.choice(ops), *ops[at + (rng.random() < 0.5) :]]
    if kind == 4:  # numbers, and the indices of the memo
        spots = [i for i, op in enumerate(ops) if op[:1] in b"KMhqjr" and len(op) > 1]
        if not spots:
            return ops
        at = rng.choice(spots)
        new = rng.choice((0, 1, 2, 3, 4, 6, 127, 255, ops[rng.choice(spots)][1], ops[at][1] ^ 1))
        return [*ops[:at], ops[at][:1] + bytes([new]) + ops[at][2:], *ops[at + 1 :]]
    if rng.random() < 0.5:
        return ops[:at] + donor[rng.randrange(len(donor)) :]
    return [*ops[:at], number(rng.choice((0, 1, 2, 5, 1 << 20, 1 << 31, 1 << 40, 1 << 63, -1))), *ops[at + 1 :]]


def _change_of_value(rng: random.Random, base: Base, ops: list[bytes]) -> list[bytes]:
    """A value exchanged, changed, wrapped, repeated, or put beside the others."""
    values = values_of(ops)
    if not values:
        return ops
    kind = rng.randrange(8)
    for _ in range(4 if kind in (3, 4) else 1):
        start, end = rng.choice(values)
        old = ops[start:end]
        if (what := kind_of(b"".join(old))) in ("dict", "list", "result"):
            break
    if kind <= 2:  # another value in its place
        return [*ops[:start], _value(rng, base, ops, what), *ops[end:]]
    if kind <= 4:  # something done to it, or to what the memo has; rarely what its kind cannot bear
        if rng.random() < 0.3:
            old = [_get(rng, ops)]
        new = _value(rng, base, ops, "")
        done = {
            "dict": rng.choice((text(rng.choice("abwz0")), text("data"), text("conj"))) + new + b"s",
            "list": new + b"a",
            "result": _value(rng, base, ops, rng.choice(("dict", "tuple"))) + b"b",
        }
        return [
            *ops[:start],
            *old,
            done[what if what in done and rng.random() < 0.8 else rng.choice(list(done))],
            *ops[end:],
        ]
    if kind == 5:  # a call around it
        more = [_value(rng, base, ops, "") for _ in range(rng.choice((0, 0, 0, 1, 2, 3, 4)))]
        return [*ops[:start], rng.choice(CALLS), b"(", *old, *more, b"t", rng.choice((b"R", b"R", b"\x81")), *ops[end:]]
    if kind == 6:  # one of the others, with all that it stores in the memo
        other, stop = rng.choice(values)
        return ops[:start] + ops[other:stop] + ops[end:]
    # One more item of the last dict.
    return [*ops[:-2], text(rng.choice("abwxyz0")), _value(rng, base, ops, ""), *ops[-2:]]


def _get(rng: random.Random, ops: list[bytes]) -> bytes:
    stored = [op[1:2] for op in ops if op[:1] == b"q" and len(op) == 2]
    return b"h" + rng.choice(stored) if stored else b"N"


def _value(rng: random.Random, base: Base, ops: list[bytes], kind: str) -> bytes:
    """A value, mostly of this kind where there is one."""
    if rng.random() < 0.2:
        return _get(rng, ops)
    values = pool(base.legacy)
    return rng.choice(values.get(kind if rng.random() < 0.8 else "") or values[""])


def case(number: int) -> bytes:
    """The file of a number."""
    rng = random.Random(number)
    base, donor = rng.choice(bases()), rng.choice(bases())
    ops = base.ops
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        ops = change(rng, base, ops, donor.ops)
        if len(ops) < 3:
            break
    data = base.file(ops)
    if rng.random() < 0.03:
        at = rng.randrange(len(data))
        data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    return data


# ------------------------------------------------------------------------------------------------------- the verdict


def verdict(data: bytes) -> tuple[str, str]:
    """How the two readers compare on one file, and what differs."""
    try:
        theirs: object = torch.load(io.BytesIO(data), weights_only=True)
    except MemoryError:
        return "torch has no memory", ""
    except Exception:
        theirs = SmartLoadError
    try:
        with open_checkpoint(io.BytesIO(data)) as checkpoint:
            if theirs is SmartLoadError:
                return "torch refuses", ""
            found = next(differences(checkpoint, theirs), "")
            return ("DIFFERENT", found) if found else ("equal", "")
    except SmartLoadError:
        return ("both refuse" if theirs is SmartLoadError else "smartload refuses"), ""


def differences(checkpoint: Checkpoint, theirs: object) -> Iterator[str]:
    """Say where the tensors and extra states of smartload are not those of torch, and where it names one not at all."""
    held: dict[str, list[object]] = {}
    tensors: list[tuple[str, ...]] = []
    todo: list[tuple[tuple[str, ...], object]] = [((), theirs)]
    seen = 0
    while todo and (seen := seen + 1) < 10_000:
        path, value = todo.pop()
        held.setdefault(_dotted(path), []).append(value)
        if isinstance(value, torch.Tensor):
            tensors.append(path)
        elif isinstance(value, dict) and len(path) < 12 and not (path and path[-1] == "_extra_state"):
            todo.extend(((*path, key), item) for key, item in value.items() if type(key) is str)
    entries = {
        (f"{path}.{key}" if path else key): entry
        for path, part in checkpoint.parts.items()
        for key, entry in part.entries.items()
    }
    for name, entry in entries.items():
        values = held.get(name, [])
        if isinstance(entry, Span) and not any(_same_tensor(checkpoint, entry, value) for value in values):
            yield f"{name!r}: {entry} is {values!r:.300}"
        elif isinstance(entry, Extra) and not any(_same_extra(checkpoint, entry.tree, value) for value in values):
            yield f"{name!r}: {entry!r:.300} is {values!r:.300}"
    beside = {item.path for item in checkpoint.aside}
    for path in tensors:
        named = {_dotted(path[:count]) for count in range(len(path) + 1)} & entries.keys()
        aside = {".".join(map(printable, path[:count])) for count in range(len(path) + 1)} & beside
        if not named and not aside:
            yield f"{'.'.join(path)!r} is not named"


def _dotted(path: tuple[str, ...]) -> str:
    above = ".".join(path[:-1])  # "" for a dict under the key "", too
    return f"{above}.{path[-1]}" if above else "".join(path[-1:])


def _same_tensor(checkpoint: Checkpoint, span: Span, value: object) -> bool:
    """Whether the tensor of a span is this one: dtype, shape and every bit, but for how a bool is written."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta:
        return False
    if value.is_quantized or str(value.dtype) != f"torch.{span.dtype}" or tuple(value.shape) != span.shape:
        return False
    value = value.detach()
    if math.prod(span.shape) > MOST_ELEMENTS:
        # Only what lies in the file: the elements that the strides repeat are the same.
        lengths = tuple(min(size, 1 if not step else size) for size, step in zip(span.shape, span.stride, strict=True))
        if math.prod(lengths) > MOST_ELEMENTS or value.stride() != span.stride:
            return False
        value, span = value.as_strided(lengths, span.stride), span._replace(shape=lengths)
    ours = read_tensor(span, checkpoint.files)
    # Copied: a stride of one element may be any, and would be in the way of seeing the bytes.
    flat = [
        torch.empty(each.numel(), dtype=each.dtype).copy_(each.reshape(-1)).view(torch.uint8) for each in (ours, value)
    ]
    if span.dtype == "bool":
        flat = [each.ne(0) for each in flat]
    return torch.equal(*flat)


def _same_extra(checkpoint: Checkpoint, tree: object, value: object) -> bool:
    if isinstance(tree, Span):
        return _same_tensor(checkpoint, tree, value)
    if type(tree) is not type(value):
        return False
    if isinstance(tree, dict) and isinstance(value, dict):
        return set(tree) == set(value) and all(_same_extra(checkpoint, tree[key], value[key]) for key in tree)
    if isinstance(tree, (list, tuple)) and isinstance(value, (list, tuple)):
        return len(tree) == len(value) and all(_same_extra(checkpoint, *pair) for pair in zip(tree, value, strict=True))
    return tree == value or tree != tree


# ------------------------------------------------------------------------------------------------------- the process


def _judge(pipe: Connection, current: Any, first: int, last: int) -> None:
    """Judge the cases from `first` up to `last`, and send how many there were of each kind, and what differs."""
    with contextlib.suppress(ImportError):  # Windows has no such limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    found: list[str] = []
    for each in range(first, last):
        current.value = each
        kind, words = verdict(case(each))
        counts[kind] += 1
        if kind == "DIFFERENT":
            found.append(f"case {each}: {words}".encode("unicode_escape").decode("ascii"))
        if each % 1000 == 999 or each == last - 1:  # some at a time: a crash loses the counts of these only
            pipe.send((each + 1, counts, found))
            counts, found = Counter(), []


def compare(first: int, last: int) -> tuple[Counter[str], list[str]]:
    """Judge the cases from `first` up to `last`, in a process that is started again where torch has ended it."""
    context = multiprocessing.get_context("spawn")
    counts: Counter[str] = Counter()
    found: list[str] = []
    while first < last:
        current = context.Value("q", first, lock=False)
        pipe, theirs = context.Pipe()
        process = context.Process(target=_judge, args=(theirs, current, first, last), daemon=True)
        process.start()
        theirs.close()
        with contextlib.suppress(EOFError, OSError):
            while first < last and pipe.poll(CRASH):
                first, more, words = pipe.recv()
                counts += more
                found += words
        process.kill()
        process.join()
        if first < last:
            # Those since the last report are judged anew, up to the one that ended the process.
            crashed = current.value
            if crashed > first:
                more, words = compare(first, crashed)
                counts += more
                found += words
            counts["torch crashes"] += 1
            first = crashed + 1
    return counts, found
