"""The command line: `python -m smartload inspect | check | diff | convert`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from torch import nn

from smartload.api import check, convert, inspect
from smartload.conversion.diff import diff
from smartload.conversion.write import SUFFIXES
from smartload.errors import AmbiguousKeysError, SmartLoadError

NO, TROUBLE, INTERRUPTED, NOBODY_READS = 1, 2, 130, 141
"""Exit statuses; the last two as a shell gives them for a program that Ctrl-C or a closed pipe has ended."""

_INSPECT = "Say what a checkpoint holds: parts, names, dtypes, devices, and what lies beside. No weight is read."
_CHECK = """Say whether and how a checkpoint fits a model. FACTORY is a function or class in MODULE that gives the model
when it is called without arguments. Your code is imported, from the current folder too, and CALLED; the checkpoint's is
not. The exit status is 0 where it fits, 1 where it does not, 2 where the model could not be built."""
_DIFF = """Say how the weights of two checkpoints of any format differ: names, shapes, dtypes, and with --values the
values. The names of wrappers are seen through. The exit status is 0 where they are the same, 1 where they differ, 2
where one of them was refused."""
_CONVERT = """Write the weights of a checkpoint of any format to a clean file of their own: a flat dict of CPU tensors,
no optimizer, no names of wrappers. DST is replaced only after the new file was read back and compared bit for bit."""


class _Parser(argparse.ArgumentParser):
    """A parser that takes options by their full names, and colours nothing."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)
        self.color = False


class _Trouble(Exception):
    """Why the call cannot be served as it was written."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: what follows `python -m smartload`; None takes it from the process.

    Returns:
        The exit status.
    """
    asked = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name may have letters that the terminal has not
    try:
        status: int = asked.command(asked)
        sys.stdout.flush()
        return status
    except (SmartLoadError, _Trouble) as refusal:
        print(refusal, file=sys.stderr)
        if isinstance(refusal, AmbiguousKeysError):
            option = "--select-a or --select-b" if asked.command is _diff else "--select"
            print(f"Here select=... is written {option} ...", file=sys.stderr)
        return NO if isinstance(refusal, SmartLoadError) and asked.command is not _diff else TROUBLE
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes when it ends
        if isinstance(error, BrokenPipeError):
            return NOBODY_READS
        print(f"the output cannot be written: {error.strerror}.", file=sys.stderr)
        return TROUBLE


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m smartload", description="Look into checkpoints of PyTorch; nothing in them is run."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("inspect", help="what a checkpoint holds", description=_INSPECT)
    one.add_argument("path", metavar="PATH", help="a file or folder")
    one.set_defaults(command=_inspect)
    two = commands.add_parser("check", help="whether it fits a model", description=_CHECK)
    two.add_argument("path", metavar="PATH", help="a file or folder")
    two.add_argument("model", metavar="MODULE:FACTORY", type=_factory, help="imported and called")
    two.set_defaults(command=_check)
    three = commands.add_parser("diff", help="how two checkpoints differ", description=_DIFF)
    three.add_argument("a", metavar="A", help="a file or folder")
    three.add_argument("b", metavar="B", help="a file or folder")
    three.add_argument("--values", action="store_true", help="compare the values, too")
    three.add_argument("--select-a", metavar="PATH", help="dotted path of the part of A to take")
    three.add_argument("--select-b", metavar="PATH", help="the same for B")
    three.set_defaults(command=_diff)
    four = commands.add_parser("convert", help="its weights in a clean file", description=_CONVERT)
    four.add_argument("path", metavar="SRC", help="a file or folder")
    four.add_argument("to", metavar="DST", type=_destination, help=f"the file to write: {', '.join(SUFFIXES)}")
    four.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "float64"), help="of all floating tensors")
    four.set_defaults(command=_convert)
    for each in (one, two, three):
        each.add_argument("--json", action="store_true", help="one JSON document on stdout")
    for each in (two, four):
        each.add_argument("--select", metavar="PATH", help="dotted path of the part to take")
        rule = "prefix of names in the file, and what it becomes; repeatable"
        each.add_argument("--rename", metavar="OLD=NEW", type=_rule, action=_Rules, default={}, help=rule)
    for option, whose in (("--allow-missing", "model"), ("--allow-unexpected", "file")):
        what = f"glob of keys of the {whose} that need no partner; repeatable"
        two.add_argument(option, metavar="PATTERN", action="append", default=[], help=what)
    return parser


class _Rules(argparse.Action):
    """Collects the rules of `rename`; two for one prefix are a slip of the pen."""

    def __call__(self, parser: argparse.ArgumentParser, given: argparse.Namespace, value: Any, *_: object) -> None:
        old, new = value
        rules = getattr(given, self.dest)
        if old in rules:
            parser.error(f"argument --rename: two rules for {old!r}")
        setattr(given, self.dest, {**rules, old: new})


def _rule(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form OLD=NEW")
    return old, new


def _factory(text: str) -> tuple[str, str]:
    module, _, name = text.partition(":")
    if not (module and name):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form MODULE:FACTORY, such as my.models:resnet50")
    return module, name


def _destination(text: str) -> str:
    if not text.endswith(SUFFIXES):
        raise argparse.ArgumentTypeError(f"the suffix of {text!r} is none of {', '.join(SUFFIXES)}")
    return text


def _inspect(asked: argparse.Namespace) -> int:
    found = inspect(asked.path)
    print(_json(found.to_dict()) if asked.json else found)
    return 0


def _check(asked: argparse.Namespace) -> int:
    model = _built(*asked.model)
    options = {name: getattr(asked, name) for name in ("select", "allow_missing", "allow_unexpected")}
    try:
        plan = check(model, asked.path, rename=asked.rename or None, **options)
    except SmartLoadError as refusal:
        if not asked.json:
            raise
        print(_json({"fits": False, "error": type(refusal).__name__, "message": str(refusal)}))
        return NO
    print(_json({"fits": True, **plan.to_dict()}) if asked.json else plan)
    return 0


def _built(module: str, name: str) -> nn.Module:
    """The model that the caller's own code gives; what that code prints goes to stderr."""
    where = f"{module}:{name}"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            model = _named(module, name)()
    except _Trouble:
        raise
    except (Exception, SystemExit):  # noqa: BLE001 - it may raise whatever it likes, and that is shown as it is
        traceback.print_exc()
        raise _Trouble(f"the model could not be built: {where} raised the error above.") from None
    if not isinstance(model, nn.Module):
        raise _Trouble(f"{where} gave {type(model).__name__}, not a torch.nn.Module.")
    return model


def _named(module: str, name: str) -> Any:
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module and not module.startswith(f"{error.name}."):  # one that the caller's own module imports
            raise
        raise _Trouble(f"there is no module {module!r} in the current folder, and none is installed.") from None
    for part in name.split("."):
        if not hasattr(found, part):
            raise _Trouble(f"there is no {name!r} in the module {module!r}.")
        found = getattr(found, part)
    return found


def _diff(asked: argparse.Namespace) -> int:
    found = diff(asked.a, asked.b, select_a=asked.select_a, select_b=asked.select_b, values=asked.values)
    print(_json(found.to_dict()) if asked.json else found)
    return 0 if found.same else NO


def _convert(asked: argparse.Namespace) -> int:
    log = logging.getLogger("smartload")
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler(sys.stdout))
    convert(asked.path, asked.to, select=asked.select, rename=asked.rename or None, dtype=asked.dtype)
    return 0


def _json(content: object) -> str:
    return json.dumps(content, indent=2, allow_nan=False)


if __name__ == "__main__":
    sys.exit(main())
