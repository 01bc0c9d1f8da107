"""Define what smartload raises: typed errors that carry a problem as data; `sentences` makes its words."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, TypeVar

from smartload.errors import sentences
from smartload.records.text import for_console

if TYPE_CHECKING:
    from smartload.records.problems import Ambiguity, Mismatch, Problem


class SmartLoadError(RuntimeError):
    """The base class of all refusals; after one, the model is bit for bit what it was.

    There is one exception: without `undo`, an I/O error in the middle of a load leaves a part written, and the message
    names those keys. Every error survives pickling.

    Attributes:
        problem: the facts, as data: a `Problem` (kind, file, facts), a `Mismatch` (missing and unexpected keys, shapes
            that differ) or an `Ambiguity` (what fits, and the argument that chooses it). `str()` is its words: what is
            wrong, where, how close the two come, and what to write.

    >>> from smartload import SmartLoadError, smart_load
    >>> import torch
    >>> try:
    ...     smart_load(torch.nn.Linear(2, 1), {"weight": torch.ones(1, 2)})
    ... except SmartLoadError as error:
    ...     list(error.problem.missing)
    ['bias']
    """

    problem: Problem | Mismatch | Ambiguity

    def __init__(self, problem: Problem | Mismatch | Ambiguity) -> None:
        # RuntimeError, because torch's load_state_dict raises it: code that catches that goes on working. The problem
        # is the only argument, because pickle makes the copy of an exception from its arguments.
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        # Made when it is read: `match` tries arguments by searching again, and catches those refusals unread.
        return for_console(sentences.words(self.problem))


class CheckpointNotFoundError(SmartLoadError, FileNotFoundError):
    """There is no file at the given path; the message names what lies beside it.

    >>> from smartload import CheckpointNotFoundError, inspect
    >>> try:
    ...     inspect("no_such_folder/best.pth")
    ... except CheckpointNotFoundError as error:
    ...     error.problem.kind
    'not_found'
    """


class UnreadableError(SmartLoadError):
    """The file cannot be read: truncated, corrupt, changed while it was read, or no checkpoint of a known format.

    Also raised for a value that was chosen for a key and is no tensor.

    >>> import io
    >>> from smartload import UnreadableError, inspect
    >>> try:
    ...     inspect(io.BytesIO(b""))
    ... except UnreadableError as error:
    ...     print(error)
    the file object: the file is empty. Copy or download it again.
    """


class UnsafeCheckpointError(UnreadableError):
    """The file asks for something that no checkpoint needs, such as a file outside of its folder; nothing was run."""


class KeyMismatchError(SmartLoadError):
    """The file's keys are not the model's under any rule, or an argument about keys matched nothing.

    Attributes:
        problem: a `Mismatch` where keys differ, with `missing` and `unexpected` as torch uses the words, and `hints`:
            the arguments that were tried and work. A `Problem` where an argument matched nothing.
    """


class ShapeMismatchError(KeyMismatchError):
    """Every key has its partner, but tensors differ in shape; `problem.shapes` has both shapes of each.

    >>> import torch
    >>> from smartload import ShapeMismatchError, smart_load
    >>> try:
    ...     smart_load(torch.nn.Linear(2, 1), torch.nn.Linear(3, 1).state_dict())
    ... except ShapeMismatchError as error:
    ...     in_file, in_model = error.problem.shapes["weight"]
    ...     in_file.shape, in_model.shape
    ((1, 3), (1, 2))
    """


class AmbiguousKeysError(KeyMismatchError):
    """The file has two different tensors for one key, or two state dicts that fit; nothing is guessed.

    Attributes:
        problem: an `Ambiguity`, whose `answers` pair what would be loaded with the argument that chooses it. A
            `Problem` where two keys would get one name.
    """


class CastError(SmartLoadError):
    """A value of the file does not fit the target dtype: a fraction in an integer, a float too large, a complex."""


class PlacementError(SmartLoadError, ValueError):
    """The device does not exist on this machine, or the model cannot be moved to it; no tensor stays moved."""


class ModelCodeError(SmartLoadError):
    """Loading code of the model's own (a hook, an override, `set_extra_state`) raised; the model is as it was.

    The error is also an instance of the type that was raised, so code that catches that type goes on working. The
    exception itself is its `__cause__`.
    """


E = TypeVar("E", bound=SmartLoadError)


def of_both_types(kind: type[E], problem: Problem, cause: Exception) -> E:
    """Make an error of class `kind` that is an instance of the type of `cause`, too, where Python allows such a class.

    Code that catches what torch or the model raises then catches this error as well.

    >>> error = of_both_types(ModelCodeError, None, KeyError("x"))
    >>> isinstance(error, ModelCodeError), isinstance(error, KeyError)
    (True, True)
    """
    try:
        error: E = _class_of_both(kind, type(cause))(problem)  # type: ignore[arg-type]
    except TypeError:  # types whose memory layouts conflict, or an __init__ that needs other arguments
        error = kind(problem)
    return error


@functools.lru_cache(64)  # a class refers to itself, so that each new one would stay until the collector runs
def _class_of_both(kind: type[E], other: type[Exception]) -> type[E]:
    # The class exists in this process only, so pickle could not find it: a copy is of `kind` alone.
    return type(kind.__name__, (kind, other), {"__reduce__": lambda self: (kind, (self.problem,))})
