"""Run smartload where other people run it: other versions of Python and torch, Windows, a system without `preadv`.

    python -m nox -f tests/platforms/noxfile.py --list
    python -m nox -f tests/platforms/noxfile.py -s "versions(3.10, 2.6.0)"
    python -m nox -f tests/platforms/noxfile.py -s without -- tests/behaviour
    python -m nox -f tests/platforms/noxfile.py -s versions -- --exchange /tmp/written

Every session makes an environment of its own, runs the quickstart, the other examples, the command line and the tests
(all, or those that are named), and prints a row of the table in docs/platforms.md; with `--record` it writes the row
there. With `--exchange` it writes files into the folder instead, and reads those that the other sessions have written:
run twice, every session reads the files of all. Each Python must be on PATH. Windows is run by wine, on Linux.
"""

from __future__ import annotations

import argparse
import datetime
import re
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import nox

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "platforms.md"
HEAD = "| what | quickstart | examples | command line | tests | run on |"
# The oldest and newest torch with the oldest and newest Python that each has wheels for, and some between.
PAIRS = [
    ("3.10", "2.6.0"),
    ("3.10", "2.7.1"),
    ("3.12", "2.8.0"),
    ("3.13", "2.9.1"),
    ("3.11", "2.13.0"),
    ("3.11", "2.14.1"),
    ("3.13", "2.14.1"),
]
EXAMPLES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").glob("*.py"))
# What runs `python` with these arguments in a session, and tells whether it succeeded.
Runner = Callable[..., bool]

nox.options.default_venv_backend = "venv"
nox.options.sessions = []
nox.options.error_on_missing_interpreters = True


@nox.session
@nox.parametrize("python,torch", [nox.param(*pair, id=", ".join(pair)) for pair in PAIRS])
def versions(session: nox.Session, torch: str) -> None:
    """A pair of Python and torch."""
    session.install(f"torch=={torch}")
    session.install("-e", f"{ROOT}[test]")
    report(session, f"Python {session.python}, torch {torch}", runner(session), "-n2")


@nox.session
def without(session: nox.Session) -> None:
    """The torch of the README, where `os` lacks what it lacks on Windows and on an old macOS."""
    session.install(f"torch=={pinned_torch()}")
    session.install("-e", f"{ROOT}[test]")
    report(session, "Linux without `preadv`", runner(session, {"PYTHONPATH": str(HERE / "without")}), "-n2")


@nox.session
def windows(session: nox.Session) -> None:
    """Python and torch for Windows, run by wine."""
    run = runner(session, command=(sys.executable, str(HERE / "wine.py")))
    # On Windows a test that takes too long ends the whole run: it gets more time, as wine is slow.
    report(session, "Windows (wine), Python 3.13", run, "--timeout=900")


def runner(session: nox.Session, env: dict[str, str] | None = None, command: tuple[str, ...] = ("python",)) -> Runner:
    """Give what runs Python: that of the session's own environment, or another by its command."""

    def run(*arguments: str) -> bool:
        try:
            session.run(*command, *arguments, env=env or {}, external=command != ("python",))
        except nox.command.CommandFailed:
            return False
        return True

    return run


def pinned_torch() -> str:
    """Give the version of torch that the README installs."""
    found = re.search(r"torch==([0-9.]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert found is not None
    return found[1]


def report(session: nox.Session, name: str, run: Runner, *options: str) -> None:
    """Run the examples, the command line and the tests; print the row of the table, and fail where one of them does.

    Args:
        session: its arguments are `--record`, `--exchange`, and the tests to run, all where there are none.
        name: what the row is called.
        run: runs Python there.
        options: further options of pytest.
    """
    session.chdir(ROOT)
    parser = argparse.ArgumentParser()
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--exchange", type=Path)
    parser.add_argument("tests", nargs="*")
    given = parser.parse_args(session.posargs)
    if given.exchange:
        exchange(session, name, run, given.exchange.resolve())
        return
    failed = [path for path in EXAMPLES if not run(path)]
    command_line = run(str(HERE / "commands.py"))
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.xml")
        finished = run("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={results}", *options, *given.tests)
        counts = counts_in(results)
    bad = counts["failures"] + counts["errors"]
    if not finished and not bad:
        bad = 1  # of pytest itself
    passed = counts["tests"] - bad - counts["skipped"]
    which = f" ({', '.join(given.tests)})" if given.tests else ""
    row = (
        f"| {name} | {'failed' if 'examples/quickstart.py' in failed else 'ok'} "
        f"| {len(EXAMPLES) - len(failed)} of {len(EXAMPLES)} | {'ok' if command_line else 'failed'} "
        f"| {passed:,} passed, {bad} failed, {counts['skipped']} skipped{which} "
        f"| {datetime.date.today()} |"
    )
    session.log(row)
    if given.record:
        write_row(name, row)
    if failed or not command_line or bad:
        session.error(f"{name}: see above")


def counts_in(results: Path) -> dict[str, int]:
    """Give how many tests there were, and what became of them; none where pytest could not even begin."""
    suite = ET.parse(results).getroot().find("testsuite") if results.exists() else None
    names = ("tests", "failures", "errors", "skipped")
    return {name: 0 if suite is None else int(suite.get(name, "0")) for name in names}


def exchange(session: nox.Session, name: str, run: Runner, folder: Path) -> None:
    """Write files into a folder of this session's own in `folder`, and read those of all sessions."""
    script = str(HERE / "exchange.py")
    own = folder / re.sub(r"[^0-9A-Za-z.]+", "-", name)
    if not (own / "expected.json").exists() and not run(script, "write", str(own)):
        session.error(f"{name}: writes no files")
    written = sorted(path.parent for path in folder.glob("*/expected.json"))
    wrong = [each.name for each in written if not run(script, "read", str(each))]
    if wrong:
        session.error(f"{name}: reads other values from {', '.join(wrong)}")


def write_row(name: str, row: str) -> None:
    """Put the row in the place of the one that is called so, or behind the last."""
    lines = PAGE.read_text(encoding="utf-8").split("\n")
    first = lines.index(HEAD)
    end = lines.index("", first)  # the table ends at the first empty line
    at = next((at for at in range(first, end) if lines[at].startswith(f"| {name} |")), end)
    lines[at : at + (at < end)] = [row]
    PAGE.write_text("\n".join(lines), encoding="utf-8")
