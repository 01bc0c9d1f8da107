"""Run the command line: `python -m smartload inspect | check | diff | convert`.

Answers go to stdout; refusals, and what the user's own code prints, go to stderr, so that stdout can be parsed.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
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

# As `grep` and `diff` do: 1 is an answer (no), 2 that there is none. The last two are what a shell gives for a program
# that Ctrl-C or a closed pipe has ended.
NO, FAILED, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141

_INSPECT = "List what a checkpoint holds: its state dicts, keys, dtypes, devices, and other values. No weight is read."
_CHECK = """Tell whether and how a checkpoint fits a model. FACTORY is a function or class in MODULE that returns the
model when it is called without arguments. Your code is imported, from the current folder too, and CALLED; no code in
the checkpoint is. The exit status is 0 if it fits, 1 if it does not, 2 if the model could not be built."""
_DIFF = """Tell how the weights of two checkpoints of any format differ: in keys, shapes, dtypes, and with --values in
values. Prefixes of wrappers, such as `module.`, make no difference. The exit status is 0 if they are the same, 1 if
they differ, 2 if one of them was refused."""
_CONVERT = """Write the weights of a checkpoint of any format to a clean file: one flat dict of CPU tensors, without
optimizer state and prefixes of wrappers. DST is replaced only after the new file was read back and compared bit for
bit. The exit status is 0 if it was written, 1 if it was refused."""
_FILE = "a checkpoint: a file or folder"
_PART = "dotted path of the part to take, such as state_dict.backbone"


class _Parser(argparse.ArgumentParser):
    """A parser that takes options by their full names, so that a new one breaks no script, and colours nothing."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)
        self.color = False  # an attribute, because only Python 3.14 has it as an argument


class _PrintingHandler(logging.Handler):
    """Print what is logged. Unlike the handlers of `logging`, it lets an error of the output through to `main`."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage())


class _CannotBuildModel(Exception):
    """MODULE:FACTORY gives no model; the message says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, print its answer or refusal, and return the exit status.

    Args:
        arguments: what follows `python -m smartload`; None takes it from the process.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a key may have letters that the terminal cannot show
    given = _parser().parse_args(arguments)
    try:
        status: int = given.command(given)
        sys.stdout.flush()  # here, where an error can still be answered
        return status
    except (SmartLoadError, _CannotBuildModel) as refusal:
        print(refusal, file=sys.stderr)
        if isinstance(refusal, AmbiguousKeysError):  # its message tells what to write in Python
            option = "--select-a or --select-b" if given.command is _diff else "--select"
            print(f"Here select=... is written {option} ...", file=sys.stderr)
        # For `diff`, 1 means that the two differ, which a refusal does not say.
        return NO if isinstance(refusal, SmartLoadError) and given.command is not _diff else FAILED
    except KeyboardInterrupt:
        return INTERRUPTED  # without a traceback
    except OSError as error:
        # Errors of reading are SmartLoadErrors, so it is stdout that failed. When the process ends, Python flushes what
        # is left of it and would print a second error: that goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # As after `| head`: whoever read has enough. Windows has no error of its own for it.
        if isinstance(error, BrokenPipeError) or (os.name == "nt" and error.errno == errno.EINVAL):
            return BROKEN_PIPE
        print(f"the output cannot be written: {error.strerror}.", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    """Make the parser of all commands; each sets `command` to the function that runs it."""
    parser = _Parser(
        prog="python -m smartload", description="Look into PyTorch checkpoints. No code in a checkpoint is run."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect_ = commands.add_parser("inspect", help="list what a checkpoint holds", description=_INSPECT)
    inspect_.add_argument("path", metavar="PATH", help=_FILE)
    inspect_.set_defaults(command=_inspect)
    check_ = commands.add_parser("check", help="tell whether a checkpoint fits a model", description=_CHECK)
    check_.add_argument("path", metavar="PATH", help=_FILE)
    factory = "what returns the model, such as my.models:resnet50; it is imported and called"
    check_.add_argument("model", metavar="MODULE:FACTORY", type=_factory, help=factory)
    check_.set_defaults(command=_check)
    diff_ = commands.add_parser("diff", help="tell how two checkpoints differ", description=_DIFF)
    diff_.add_argument("a", metavar="A", help=_FILE)
    diff_.add_argument("b", metavar="B", help=_FILE)
    diff_.add_argument("--values", action="store_true", help="compare the values, too")
    diff_.add_argument("--select-a", metavar="PATH", help="dotted path of the part of A to take")
    diff_.add_argument("--select-b", metavar="PATH", help="dotted path of the part of B to take")
    diff_.set_defaults(command=_diff)
    convert_ = commands.add_parser("convert", help="write the weights to a clean file", description=_CONVERT)
    convert_.add_argument("path", metavar="SRC", help=_FILE)
    convert_.add_argument("to", metavar="DST", type=_destination, help=f"the file to write: {', '.join(SUFFIXES)}")
    dtypes = ("float16", "bfloat16", "float32", "float64")
    convert_.add_argument("--dtype", choices=dtypes, help="cast all float tensors to this dtype")
    convert_.set_defaults(command=_convert)
    for command in (inspect_, check_, diff_):
        command.add_argument("--json", action="store_true", help="print one JSON document")
    for command in (check_, convert_):
        command.add_argument("--select", metavar="PATH", help=_PART)
        rule = "a key prefix in the file, and what it becomes; may be given more than once"
        command.add_argument("--rename", metavar="OLD=NEW", type=_rule, action=_Rules, default={}, help=rule)
    missing = "glob pattern of model keys that the file may lack; may be given more than once"
    unexpected = "glob pattern of file keys that the model may lack; may be given more than once"
    for option, text in (("--allow-missing", missing), ("--allow-unexpected", unexpected)):
        check_.add_argument(option, metavar="PATTERN", action="append", default=[], help=text)
    return parser


class _Rules(argparse.Action):
    """Collect the rules of `--rename` in one dict; refuse two for one prefix, of which the first would be lost."""

    def __call__(self, parser: argparse.ArgumentParser, given: argparse.Namespace, rule: Any, *_: object) -> None:
        old, new = rule
        rules = getattr(given, self.dest)
        if old in rules:
            parser.error(f"argument --rename: two rules for {old!r}")
        setattr(given, self.dest, {**rules, old: new})  # a new dict: the default is shared by all calls


def _rule(text: str) -> tuple[str, str]:
    """Parse a rule of `--rename`: `'backbone=encoder' -> ('backbone', 'encoder')`; either side may be empty."""
    old, equals, new = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form OLD=NEW")
    return old, new


def _factory(text: str) -> tuple[str, str]:
    """Parse MODULE:FACTORY: `'my.models:resnet50' -> ('my.models', 'resnet50')`."""
    module, _, name = text.partition(":")
    if not (module and name):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form MODULE:FACTORY, such as my.models:resnet50")
    return module, name


def _destination(text: str) -> str:
    """Return the file to write; refuse a suffix that `convert` does not know, as a mistake in the call."""
    if not text.endswith(SUFFIXES):
        raise argparse.ArgumentTypeError(f"the suffix of {text!r} is none of {', '.join(SUFFIXES)}")
    return text


def _inspect(given: argparse.Namespace) -> int:
    checkpoint = inspect(given.path)
    print(_json(checkpoint.to_dict()) if given.json else checkpoint)
    return 0


def _check(given: argparse.Namespace) -> int:
    model = _build_model(*given.model)
    options = {name: getattr(given, name) for name in ("select", "allow_missing", "allow_unexpected")}
    try:
        plan = check(model, given.path, rename=given.rename or None, **options)
    except SmartLoadError as refusal:
        if not given.json:
            raise
        # That it does not fit is an answer, too: the document goes to stdout.
        print(_json({"fits": False, "error": type(refusal).__name__, "message": str(refusal)}))
        return NO
    print(_json({"fits": True, **plan.to_dict()}) if given.json else plan)
    return 0


def _build_model(module: str, name: str) -> nn.Module:
    """Import the user's module and call its factory; what this code prints goes to stderr.

    Raises:
        _CannotBuildModel: the module or name does not exist, the code raised, or it returned no module.
    """
    factory = f"{module}:{name}"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            model = _import_name(module, name)()
    except _CannotBuildModel:
        raise
    except (Exception, SystemExit):  # noqa: BLE001 - the user's code may raise anything, and sees its own traceback
        traceback.print_exc()
        raise _CannotBuildModel(f"the model could not be built: {factory} raised the error above.") from None
    if not isinstance(model, nn.Module):
        raise _CannotBuildModel(f"{factory} gave {type(model).__name__}, not a torch.nn.Module.")
    return model


def _import_name(module: str, name: str) -> Any:
    """Import a module and give what it has under a dotted name.

    Raises:
        _CannotBuildModel: there is no such module or name.
    """
    try:
        value: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A module that the user's own module imports is another matter: its traceback says where.
        if error.name != module and not module.startswith(f"{error.name}."):
            raise
        raise _CannotBuildModel(
            f"there is no module {module!r} in the current folder, and none is installed."
        ) from None
    for attribute in name.split("."):
        if not hasattr(value, attribute):
            raise _CannotBuildModel(f"there is no {name!r} in the module {module!r}.")
        value = getattr(value, attribute)
    return value


def _diff(given: argparse.Namespace) -> int:
    result = diff(given.a, given.b, select_a=given.select_a, select_b=given.select_b, values=given.values)
    print(_json(result.to_dict()) if given.json else result)
    return 0 if result.same else NO


def _convert(given: argparse.Namespace) -> int:
    # The line that `convert` logs says what was written and what was left out: it is the answer of this command.
    log = logging.getLogger("smartload")
    log.setLevel(logging.INFO)
    log.addHandler(handler := _PrintingHandler())
    try:
        convert(given.path, given.to, select=given.select, rename=given.rename or None, dtype=given.dtype)
    finally:
        log.removeHandler(handler)
    return 0


def _json(content: object) -> str:
    # JSON has no NaN: printing one would be read by Python alone.
    return json.dumps(content, indent=2, allow_nan=False)


if __name__ == "__main__":
    sys.exit(main())
