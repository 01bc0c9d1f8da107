"""Files of every format, damaged on purpose, and a judge of what a load makes of them.

    python tests/helpers/fuzz.py --seconds 3600 [--seed N] [--format NAME] [--findings FOLDER]
    python tests/helpers/fuzz.py --format NAME --case N      # one case again, its files kept
    python tests/helpers/fuzz.py --against-torch 100000 [--seed N]   # pickles, compared with torch.load

A load may refuse, in words, and leave the model as it was; or give tensors that the file really holds.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import itertools
import multiprocessing
import os
import pickletools
import re
import shutil
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from damage import PAYLOAD, STATES, Bases, Case, Net, case, plain, raw_of, records
from differential import compare
from dtypes import DTYPES
from formats import FORMATS
from reading_tools import CANARY, same, watched
from systems import peak_memory

from smartload import SmartLoadError, inspect, smart_load

SLOWEST, MOST_MEMORY = 5.0, 64 << 20
_raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc


# --------------------------------------------------------------------------------------------------------- the judge


class Overtime(BaseException):
    """A load has taken more of the processor's time than any file may."""


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise Overtime in this thread once the process has used its processor for so long.

    By another thread that looks at the clock: not every system has a timer for the processor's time.
    """
    thread, done, begun = ctypes.c_ulong(threading.get_ident()), threading.Event(), time.process_time()

    def watch() -> None:
        while not done.wait(0.2):
            if time.process_time() - begun > seconds:
                _raise_in(thread, ctypes.py_object(Overtime))
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


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
        source, verify = self.write(made), made.rng.choice((True, False, "auto"))
        calls = (lambda: smart_load(self.net, source, verify=verify), lambda: str(inspect(source)))
        call, outcome, words = calls[made.rng.random() < 0.1], "loaded", ""
        self.net.load_state_dict(self.before)
        memory, started = peak_memory(), time.perf_counter()
        with watched() as seen, _at_most(SLOWEST + 1):
            try:
                report: Any = call()
            except SmartLoadError as error:
                outcome, words = "refused", self._words(error)
            except Overtime as error:
                return "hang", _where(error)
            except BaseException as error:
                return f"raw {type(error).__name__}", _where(error)
        seconds, more = time.perf_counter() - started, peak_memory() - memory
        seen = [event for event in seen if not event.startswith("ctypes.cdata")]
        state = {key: tensor.clone() for key, tensor in self.net.state_dict().items()}
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
    for name, content in (*records(data).items(), *_by_local_headers(data)):
        if name.endswith((".pt", ".pkl")):
            yield from _payloads(content)
        elif PAYLOAD.fullmatch(name):
            yield content[content.find(b"\n") + 1 :] if name.endswith(".npy") else content
    with contextlib.suppress(Exception):
        for _, value, _ in pickletools.genops(data):
            if isinstance(value, (str, bytes)) and len(value) > 3:
                content = value.encode("latin1", "ignore") if isinstance(value, str) else value
                yield from (content[shift:] for shift in range(8))  # where in a nested stream a tensor begins


def _by_local_headers(data: bytes) -> Iterator[tuple[str, bytes]]:
    """The records of a zip whose directory zipfile does not read."""
    for found in re.finditer(rb"PK\x03\x04", data[:-30]):
        _, size, name, extra = struct.unpack_from("<2L2H", data, found.start() + 18)
        at = found.start() + 30 + name
        yield data[at - name : at].decode("latin1"), data[at + extra : at + extra + size]


def _values(tensor: torch.Tensor) -> set[bytes]:
    raw, width = raw_of(tensor), tensor.element_size()
    return {raw[at : at + width] for at in range(0, len(raw), width)}


def _seen_as(pool: list[bytes], dtype: torch.dtype) -> set[bytes]:
    """Every element of `dtype` that the bytes hold, read as whatever dtype and in either order, and cast."""
    found: set[bytes] = set()
    for content in pool:
        for name in DTYPES:
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


class Workers:
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

    def close(self) -> None:
        """Send the worker home."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(5)


def main() -> None:
    """Fuzz for a while, or repeat one case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--case", type=int)
    parser.add_argument("--format", choices=list(FORMATS), action="append")
    parser.add_argument("--against-torch", type=int, metavar="CASES")
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()) / "smartload-findings")
    arguments = parser.parse_args()
    if arguments.against_torch:
        first = arguments.seed * 10_000_000
        outcomes, found = compare(first, first + arguments.against_torch)
        print(*found, *outcomes.most_common(), f"(seed {arguments.seed})", sep="\n")
        raise SystemExit(bool(found))
    work = arguments.findings / "work"
    workers = Workers(work)
    if arguments.case is not None:
        print(*workers.ask(arguments.format[0], arguments.case), f"(files in {work})", sep="\n")
        workers.close()
        return
    counts: dict[str, Counter[str]] = {name: Counter() for name in arguments.format or FORMATS}
    kinds: Counter[str] = Counter()
    end, rounds = time.monotonic() + arguments.seconds, itertools.count(arguments.seed * 1_000_000, 25)
    with contextlib.suppress(KeyboardInterrupt):
        while time.monotonic() < end:
            first = next(rounds)
            for name, number in itertools.product(counts, range(first, first + 25)):
                kind, words = workers.ask(name, number)
                counts[name][kind if kind in ("refused", "loaded") else "findings"] += 1
                if kind not in ("refused", "loaded"):
                    kinds[f"{kind} {words[:120]}"] += 1
                    if kinds[f"{kind} {words[:120]}"] <= 3:
                        print(f"{name!r} {number}: {kind} {words}", flush=True)
                        shutil.copytree(work, arguments.findings / f"{name}-{number}", dirs_exist_ok=True)
                    workers.again()
    workers.close()
    print(f"{'':36}{'files':>9}{'refused':>9}{'loaded':>9}{'findings':>9}   (seed {arguments.seed})")
    for name, count in counts.items():
        print(f"{name:36}{count.total():9}{count['refused']:9}{count['loaded']:9}{count['findings']:9}")
    print(f"{'all':36}{sum(count.total() for count in counts.values()):9}", *kinds.most_common(40), sep="\n")


if __name__ == "__main__":
    main()
