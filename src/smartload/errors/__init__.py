"""What smartload raises: typed errors that carry data. Their words are in `refusals`."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from smartload.errors import sentences as refusals

if TYPE_CHECKING:
    from smartload.records.problems import Ambiguity, Mismatch, Problem


class SmartLoadError(RuntimeError):
    """Base of all refusals; after one, the model is bit for bit what it was.

    `problem` holds the facts, `str()` the words: what, where, how close, what to write.

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
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return refusals.words(self.problem)


class CheckpointNotFoundError(SmartLoadError, FileNotFoundError):
    """There is no file at the path given."""


class UnreadableError(SmartLoadError):
    """The file is damaged, changed while it was read, or is no checkpoint that smartload reads."""


class UnsafeCheckpointError(UnreadableError):
    """The file asks for something that no honest checkpoint needs; nothing of it was run."""


class MissingExtraError(SmartLoadError, ImportError):
    """A package is needed that is not installed; the message says how to install it."""


class KeyMismatchError(SmartLoadError):
    """The names in the file are not the names of the model, under any rule."""


class ShapeMismatchError(KeyMismatchError):
    """The names pair off, but tensors differ in shape."""


class AmbiguousKeysError(KeyMismatchError):
    """The file holds two answers; the message names both and the argument that decides."""


class CastError(SmartLoadError):
    """A value of the file cannot be held by the model's dtype."""


class PlacementError(SmartLoadError, ValueError):
    """The device asked for is not there, or the model cannot be brought to it."""


class ModelCodeError(SmartLoadError):
    """Loading code of the model's own (a hook, an override, `set_extra_state`) raised; the model is as it was.

    It is also an instance of the type that was raised, so code that catches that type still does.
    """


E = TypeVar("E", bound=SmartLoadError)


def of_both_types(kind: type[E], problem: Problem, cause: Exception) -> E:
    """An error of ours that is an instance of the cause's type as well, where such a class can be made.

    Code that catches what torch or the model raises then still does. Pickled, it is ours alone.
    """
    try:
        error: E = type(kind.__name__, (kind, type(cause)), {"__reduce__": lambda self: (kind, (problem,))})(problem)
    except TypeError:  # a layout of its own, or an __init__ that wants other arguments
        error = kind(problem)
    return error
