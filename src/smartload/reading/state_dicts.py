"""The walk over what a file holds: which dicts are state dicts, and what lies beside them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from smartload.errors import AmbiguousKeysError, UnreadableError
from smartload.reading.limits import Budget
from smartload.records.entries import Beside, Entry, Opaque, Part
from smartload.records.problems import Kind, Problem
from smartload.records.text import plural, printable, with_article

MAX_DEPTH = 4
MAX_COUNTED = 2_000_000
"""Values looked at to count tensors that are set aside; beyond them the count is a lower bound."""
_PLAIN = frozenset((str, int, float, bool, bytes, type(None)))


class TreeValues(ABC):
    """How the values of a tree are looked at: notes of a pickle, objects in memory, entries by paths.

    What a kind of tree cannot have is answered here; each kind overrides the rest.
    """

    file: str
    """The file, for messages."""
    most: int = 1 << 23
    """Items beyond which what is walked refers to itself in too many ways to be weights."""
    keep_all: bool = False
    """Whether a dict among tensors stays an entry of theirs, besides being walked itself."""

    @abstractmethod
    def tensor(self, value: object) -> Entry | None:
        """Give the entry of a tensor, None for anything else."""

    @abstractmethod
    def extra(self, value: object) -> Entry:
        """Give the entry of a module's extra state."""

    @abstractmethod
    def items(self, value: object) -> Mapping[str, object] | None:
        """Give the items of a dict whose keys are strings, None for anything else."""

    @abstractmethod
    def noun(self, value: object) -> str:
        """Say what a value is, with its article: 'a dict of 3'."""

    @abstractmethod
    def is_list(self, value: object) -> bool:
        """Tell whether `value` is a list."""

    @abstractmethod
    def inner(self, value: object) -> Iterable[object]:
        """Give all values directly inside another one."""

    def opaque(self, value: object) -> Entry:
        """Give the entry of a value among tensors that is none."""
        return Opaque(self.noun(value))

    def module(self, value: object) -> Part | None:
        """Give the state dict of a module, None for anything else."""
        return None

    def odd_key(self, value: object) -> tuple[str, str] | None:
        """Give type and text of the first key that is no string, where `value` is a dict that has one."""
        return None

    def repeated(self, value: object) -> str | None:
        """Give a key that a dict has twice, None where there is none."""
        return None

    def versions(self, value: object) -> Mapping[str, Mapping[str, object]] | None:
        """Give the `_metadata` of a state dict, None where it has none."""
        return None

    def unseen(self) -> int | None:
        """Give how many tensors nobody has asked for yet; None where that is not known."""
        return None


class StateDicts(NamedTuple):
    """The state dicts of a file by dotted path, and everything beside them."""

    parts: Mapping[str, Part]
    aside: tuple[Beside, ...]


def explore(root: object, values: TreeValues) -> StateDicts:
    """All state dicts and modules under string keys, four levels down.

    Raises UnreadableError with a reason of its own for each kind of thing that holds none.
    """
    walk = _Walk(values)
    walk.visit(root, (), 0)
    if not walk.parts:
        if walk.empty is None or walk.tensors_in(root):
            raise walk.nothing(root)
        walk.parts[walk.empty] = Part({}, values.versions(walk.empty_value))
    return StateDicts(walk.parts, tuple(walk.asides()))


class _Walk:
    def __init__(self, values: TreeValues) -> None:
        self.values = values
        self.work = Budget(values.most, Problem("tangled", values.file, {"limit": values.most}))
        self.parts: dict[str, Part] = {}
        self.aside: list[tuple[tuple[str, ...], object]] = []
        self.counted = 0
        self.empty: str | None = None
        self.empty_value: object = None

    def visit(self, value: object, path: tuple[str, ...], depth: int) -> None:
        """Take `value` as a part, walk it as a container, or set it aside as one thing."""
        values = self.values
        self.work.take(1)
        part = values.module(value)
        if part is not None:
            self._add(path, part)
            return
        items = values.items(value)
        self.work.take(len(items or ()))
        if items is None or is_optimizer(items, values):
            self.aside.append((path, value))
        elif not items:
            if self.empty is None:
                self.empty, self.empty_value = ".".join(path), value
        else:
            self._dict(value, items, path, depth)

    def _dict(self, value: object, items: Mapping[str, object], path: tuple[str, ...], depth: int) -> None:
        values = self.values
        tensors = {
            key: entry
            for key, item in items.items()
            if (entry := values.extra(item) if is_extra(key) else values.tensor(item)) is not None
        }
        if tensors:
            self._state_dict(value, items, tensors, path, depth)
            return
        parts, asides = len(self.parts), len(self.aside)
        if depth < MAX_DEPTH:
            for key, item in items.items():
                if type(item) in _PLAIN:
                    self.aside.append(((*path, key), item))
                else:
                    self.visit(item, (*path, key), depth + 1)
        if len(self.parts) == parts and path:
            # Nothing in it can be loaded: one line for the whole of it.
            del self.aside[asides:]
            self.aside.append((path, value))

    def _state_dict(
        self,
        value: object,
        items: Mapping[str, object],
        tensors: Mapping[str, Entry],
        path: tuple[str, ...],
        depth: int,
    ) -> None:
        values = self.values
        if (name := values.repeated(value)) is not None:
            raise UnreadableError(Problem("key_twice", values.file, {"name": printable(name)}))
        others = [key for key in items if key not in tensors]
        walked = {key for key in others if depth < MAX_DEPTH and self._is_container(items[key])}
        left = frozenset() if values.keep_all else walked
        entries = {key: tensors.get(key) or values.opaque(item) for key, item in items.items() if key not in left}
        self._add(path, Part(entries, values.versions(value)))
        for key in others:
            if key in walked:
                self.visit(items[key], (*path, key), depth + 1)

    def _is_container(self, value: object) -> bool:
        values = self.values
        items = values.items(value)
        if items is None:
            return values.module(value) is not None
        self.work.take(len(items))
        return any(values.tensor(item) is not None or values.items(item) is not None for item in items.values())

    def _add(self, path: tuple[str, ...], part: Part) -> None:
        name = ".".join(path)
        if name in self.parts:
            raise AmbiguousKeysError(Problem("path_twice", self.values.file, {"name": printable(name)}))
        self.parts[name] = part

    def asides(self) -> Iterator[Beside]:
        """Everything beside the parts, one line each; last the tensors that nothing has named so far."""
        for path, value in self.aside:
            yield Beside(".".join(map(printable, path)), *self.described(value))
        if left := self.values.unseen():
            yield Beside("", "tensors that no state dict names, such as plain attributes of a module", left)

    def described(self, value: object) -> tuple[str, int]:
        """What a thing is that is no part, and the number of tensors in it."""
        values = self.values
        items = values.items(value)
        tensors = self.tensors_in(value)
        if items is not None and is_optimizer(items, values):
            return "an optimizer's state", tensors
        entry = values.tensor(value)
        noun = entry.what if isinstance(entry, Opaque) else "a tensor" if entry is not None else values.noun(value)
        return (f"{plural(tensors, 'tensor')} in {noun}" if tensors and entry is None else noun), tensors

    def tensors_in(self, root: object) -> int:
        """How many tensors lie in a thing, each counted once; a lower bound where it is vast."""
        values, seen, todo, found = self.values, set[int](), [root], 0
        while todo and self.counted < MAX_COUNTED and values.unseen() != 0:
            value = todo.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            self.counted += 1
            if values.tensor(value) is not None:
                found += 1
                continue
            inner = list(values.inner(value))
            self.counted += len(inner)
            todo.extend([item for item in inner if type(item) not in _PLAIN])
        return found

    def nothing(self, root: object) -> UnreadableError:
        """The refusal for a file in which there is nothing to load."""
        values = self.values
        for _, value in self.aside:
            odd = values.odd_key(value)
            if odd is not None and self.tensors_in(value):
                return UnreadableError(Problem("odd_keys", values.file, {"type": odd[0], "key": odd[1]}))
        what, tensors = self.described(root)
        facts: dict[str, object] = {"what": what, "tensors": tensors}
        items = values.items(root) or {}
        kind: Kind = "no_weights"
        if "optimizer_state_dict" in items and ("ds_version" in items or "ds_config" in items):
            kind = "zero"
        elif what == "an optimizer's state":
            kind = "optimizer"
        elif values.tensor(root) is not None:
            kind = "bare_tensor"
        elif values.is_list(root):
            kind = "a_list"
        elif tensors:
            kind = "out_of_reach"
        return UnreadableError(Problem(kind, values.file, facts))


def is_extra(key: str) -> bool:
    """Whether a name is that of a module's extra state."""
    return key == "_extra_state" or key.endswith("._extra_state")


def is_optimizer(items: Mapping[str, object], values: TreeValues) -> bool:
    """Whether a dict is what `optimizer.state_dict()` gives."""
    return "state" in items and "param_groups" in items and values.is_list(items["param_groups"])


def article(noun: str, size: int) -> str:
    """`a list of 3`."""
    return f"{with_article(noun)} of {size:,}"
