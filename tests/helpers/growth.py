"""Small files whose cost would grow far faster than they do, at several sizes; what each costs is told by a process.

python tests/helpers/growth.py [NAME ...]     # a table of all of them
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from reading_tools import TWO_FLOATS, checkpoint_of, floats, number, rebuilt, text, zipped

MORE_MEMORY = 3 << 30
"""Bytes of address space that the process may take beyond what it has once torch is imported."""
MOST_SECONDS = 150
GOOD = rebuilt(floats())
DICT = b"}(" + text("a") + GOOD


class Growth(NamedTuple):
    """A file by a number, the numbers that are tried, and what the largest must end with: a part of the message."""

    make: Callable[[int], bytes]
    sizes: tuple[int, ...]
    words: str = ""
    """"" where it loads."""
    lazy: bool = False
    """Whether it is loaded into a module that takes its shape from the file."""


def torch_zip(pickle: bytes) -> bytes:
    return checkpoint_of(b"\x80\x02" + pickle + b".", d0=TWO_FLOATS)


def of_bytes(data: bytes) -> bytes:
    return b"B" + len(data).to_bytes(4, "little") + data


def extra(value: bytes) -> bytes:
    """A state dict with an extra state."""
    return torch_zip(DICT + text("_extra_state") + value + b"u")


def doubled(levels: int, join: bytes) -> bytes:
    """A container that holds another one twice, and so on down."""
    out = join.replace(b"@", b"NN") + b"q\x01"
    for _ in range(levels):
        out += b"0" + join.replace(b"@", b"h\x01h\x01") + b"q\x01"
    return out


def grown(count: int) -> bytes:
    """A tensor of as many elements that all lie in one place."""
    return rebuilt(floats(), size=b"K\x02" + number(count) + b"\x86", stride=b"K\x00K\x00\x86")


def script(code: bytes) -> bytes:
    program = b"\x80\x02c__torch__\nM\n)\x81}" + text("a") + GOOD + b"sb."
    records = {"data.pkl": program, "constants.pkl": b"\x80\x02).", "data/0": TWO_FLOATS}
    out = io.BytesIO(zipped({**records}))
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr("archive/code/__torch__.py", code, zipfile.ZIP_DEFLATED)
    return out.getvalue()


MEGABYTE = b"a" * (1 << 20)
GROWTHS: dict[str, Growth] = {
    "bytes that an extra state uses often": Growth(
        lambda n: extra(of_bytes(MEGABYTE) + b"q\x010](" + b"h\x01" * n + b"e"), (200, 2000, 20_000)
    ),
    "bytes that are the key of many dicts": Growth(
        lambda n: extra(of_bytes(MEGABYTE) + b"q\x010](" + b"}h\x01Ns" * n + b"e"), (200, 2000, 20_000)
    ),
    "a tensor of an extra state many times": Growth(
        lambda n: extra(grown(1 << 20) + b"q\x010](" + b"h\x01" * n + b"e"), (50, 500, 20_000)
    ),
    "tensors of an extra state that grow": Growth(
        lambda n: extra(b"](" + grown(1 << 20) * n + b"e"), (2, 50, 1000), "far larger"
    ),
    "a list in an extra state that holds another twice": Growth(lambda n: extra(doubled(n, b"](@e")), (10, 25, 50)),
    "a tuple in an extra state that holds another twice": Growth(lambda n: extra(doubled(n, b"(@t")), (10, 25, 50)),
    "a dict in an extra state that holds another twice": Growth(
        lambda n: extra(doubled(n, b"}(K\x01@u").replace(b"h\x01h\x01", b"h\x01K\x02h\x01").replace(b"NN", b"NK\x02N")),
        (10, 25, 50),
    ),
    "a lazy module's shape": Growth(
        lambda n: torch_zip(b"}(" + text("bias") + GOOD + text("weight") + grown(n) + b"u"),
        (1 << 20, 1 << 28, 1 << 30),
        "the lazy module",
        lazy=True,
    ),
    "a name of many dots": Growth(
        lambda n: torch_zip(DICT + text("." * n + "b") + GOOD + b"u"), (5000, 20_000, 80_000), "dots in its names"
    ),
    "a dict below a name of many dots": Growth(
        lambda n: torch_zip(b"}" + text("." * n) + DICT + b"us"), (5000, 20_000, 80_000), "dots in its names"
    ),
    "a module's version below many dots": Growth(
        lambda n: torch_zip(
            b"ccollections\nOrderedDict\n)R("
            + text("a")
            + GOOD
            + b"u}"
            + text("_metadata")
            + b"}"
            + text("." * n)
            + b"}"
            + text("version")
            + b"K\x01sssb"
        ),
        (5000, 20_000, 80_000),
    ),
    "empty dicts": Growth(
        lambda n: torch_zip(DICT + text("b") + b"(" + b"}" * n + b"tu"), (1 << 17, 1 << 23), "more memory"
    ),
    "empty lists": Growth(lambda n: torch_zip(DICT + text("b") + b"(" + b"]" * n + b"tu"), (1 << 17, 1 << 23), "steps"),
    "empty bytes": Growth(
        lambda n: torch_zip(DICT + text("b") + b"(" + b"C\0" * n + b"tu"), (1 << 17, 1 << 23), "more memory"
    ),
    "dicts of one item": Growth(
        lambda n: torch_zip(DICT + text("b") + b"Nq\x010(" + b"}NNs" * n + b"tu"), (1 << 17, 1 << 22), "more memory"
    ),
    "calls of OrderedDict": Growth(
        lambda n: torch_zip(DICT + text("b") + b"ccollections\nOrderedDict\nq\x010(" + b"h\x01)R" * n + b"tu"),
        (1 << 17, 1 << 22),
        "more memory",
    ),
    "tuples in tuples": Growth(
        lambda n: torch_zip(DICT + text("b") + b"N" + b"\x85" * n + b"u"), (1 << 17, 1 << 23), "steps"
    ),
    "marks": Growth(lambda n: torch_zip(b"(" * n), (1 << 17, 1 << 23), "steps"),
    "a class of TorchScript with a long name": Growth(
        lambda n: script(b"class " + b"a" * n + b"\n"), (10_000, 100_000, 1 << 20)
    ),
    "a class of TorchScript with a long list": Growth(
        lambda n: script(b"class M(Module):\n  __parameters__ = [" + b'"]' * n + b"\n"), (10_000, 100_000, 1 << 20)
    ),
    "a foreign name that is used often": Growth(
        lambda n: torch_zip(
            b"c"
            + b"m" * (1 << 20)
            + b"\n"
            + b"n" * (1 << 20)
            + b"\n)\x81q\x010"
            + DICT
            + b"".join(text(f"{i}") + b"h\x01" for i in range(n))
            + b"u"
        ),
        (100, 4000, 20_000),
    ),
    "a dict with a long key of bytes, often": Growth(
        lambda n: torch_zip(
            b"}" + of_bytes(MEGABYTE) + GOOD + b"sq\x010}(" + b"".join(text(f"{i}") + b"h\x01" for i in range(n)) + b"u"
        ),
        (100, 4000, 20_000),
        "keys are of type bytes",
    ),
    "a long text that stands for bytes, often": Growth(
        lambda n: torch_zip(
            b"c_codecs\nencode\nX"
            + len(MEGABYTE).to_bytes(4, "little")
            + MEGABYTE
            + text("latin1")
            + b"\x86Rq\x010"
            + DICT
            + b"".join(text(f"{i}") + b"h\x01" for i in range(n))
            + b"u"
        ),
        (100, 4000, 20_000),
    ),
}


def costs(names: list[str]) -> Iterator[dict[str, Any]]:
    """What opening and loading cost, for each size of each file, in this process."""
    import torch
    from systems import STATUS, forget_peak, peak_memory
    from torch import nn

    from smartload import SmartLoadError, inspect, smart_load

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("a", torch.zeros(2))

        def get_extra_state(self) -> object:
            return {}

        def set_extra_state(self, state: object) -> None:
            self.extra = state

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    smart_load(Net(), io.BytesIO(extra(b"N")))  # what is imported by a first load is not the file's doing
    with contextlib.suppress(ImportError):
        import resource

        size = int(STATUS.read_text(encoding="utf-8").split("VmSize:")[1].split()[0]) << 10 if STATUS.exists() else 0
        resource.setrlimit(resource.RLIMIT_AS, (size + MORE_MEMORY, size + MORE_MEMORY))
    for name in names:
        growth = GROWTHS[name]
        for count in growth.sizes:
            data = growth.make(count)
            for call in (inspect, smart_load):  # `check` is the beginning of a load
                net = nn.LazyLinear(2) if growth.lazy else Net()
                arguments = () if call is inspect else (net,)
                options: dict[str, Any] = {} if call is inspect else {"allow_missing": ["*"], "allow_unexpected": ["*"]}
                forget_peak()
                before, began, words = peak_memory(), time.process_time(), "done"
                try:
                    str(call(*arguments, io.BytesIO(data), **options))
                except SmartLoadError as error:
                    words = str(error)
                except BaseException as error:
                    words = f"raw {type(error).__name__}: {error}"[:300]
                yield {
                    "name": name, "count": count, "call": call.__name__, "size": len(data), "words": words,
                    "seconds": time.process_time() - began, "memory": peak_memory() - before,
                }  # fmt: skip
                del net


def measure(*names: str) -> list[dict[str, Any]]:
    """The same, in a process of its own, which may take neither more memory than is said above nor more time."""
    command = [sys.executable, __file__, "--json", *names]
    with tempfile.TemporaryFile() as out:
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, stdout=out, timeout=MOST_SECONDS, check=False)
        out.seek(0)
        return [json.loads(line) for line in out.read().splitlines() if line.endswith(b"}")]


def main() -> None:
    """Print the table, or each cost as a line of JSON."""
    names = [name for name in sys.argv[1:] if name != "--json"] or list(GROWTHS)
    if "--json" in sys.argv:
        for cost in costs(names):
            print(json.dumps(cost), flush=True)
        return
    for name in names:
        for cost in measure(name) or [
            {"name": name, "call": "all", "count": 0, "size": 0, "words": "ended", "seconds": 0, "memory": 0}
        ]:
            print(
                f"{cost['name']:48.48} {cost['count']:10} {cost['size']:9} {cost['call']:10} {cost['seconds']:7.2f} s "
                f"{cost['memory'] >> 20:5} MiB  {cost['words'][:60]!r}",
                flush=True,
            )


if __name__ == "__main__":
    main()
