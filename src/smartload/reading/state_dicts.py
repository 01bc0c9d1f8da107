"""Find the state dicts in a tree of values, and say what lies beside them.

`explore` is the entry. A dict with a tensor directly in it is a state dict, a module gives one, and dicts of dicts are
searched, as training checkpoints have them: {"model": {...}, "optimizer": {...}, "epoch": 3}. `TreeValues` hides what
the values are: notes of a pickle, objects in memory, or entries by paths.
"""

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
"""Dicts from the root to a state dict; real files have it at the top, or one or two levels down."""
MAX_COUNTED = 2_000_000
"""Values looked at to count the tensors that lie beside the state dicts. Beyond them the count is a lower bound: it is
only shown, and not worth more than a second or two."""
# No tensor lies in values of these types, so they need no question.
_PLAIN = frozenset((str, int, float, bool, bytes, type(None)))


class TreeValues(ABC):
    """The questions that the walk asks of the values of one kind of tree.

    Each kind answers the abstract ones. The others are answered here for kinds that have no such thing.
    """

    file: str
    """The file, for messages."""
    most: int = 1 << 23
    """The most items that the walk visits. A tree in which dicts are shared or contain themselves gives far more of
    them than the file has, and is refused."""
    keep_all: bool = False
    """Whether a dict inside a state dict stays an entry of it, besides being searched itself."""

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
        """Give the entry of a value in a state dict that is no tensor."""
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
    """The state dicts of a file.

    Attributes:
        parts: dotted path -> state dict.
        aside: everything beside them.
    """

    parts: Mapping[str, Part]
    aside: tuple[Beside, ...]


def explore(root: object, values: TreeValues) -> StateDicts:
    """Find all state dicts and modules below `root`, under string keys and at most four levels down.

    Args:
        root: what the file holds.
        values: answers what each value is.

    Raises:
        UnreadableError: there is none; the reason says what there is instead. Or a state dict has a key twice.
        AmbiguousKeysError: two of them have one dotted path.
    """
    walk = _Walk(values)
    walk.visit(root, (), 0)
    if not walk.parts:
        # An empty dict is the state dict of a model without tensors, but only where no tensor lies anywhere.
        if walk.empty is None or walk.count_tensors(root):
            raise walk.no_weights(root)
        walk.parts[walk.empty] = Part({}, values.versions(walk.empty_value))
    return StateDicts(walk.parts, tuple(walk.asides()))


class _Walk:
    """One search through a tree.

    Attributes:
        parts: the state dicts by dotted path.
        aside: path and value of everything else.
        counted: the values that `count_tensors` looked at, in all its calls.
        empty: the dotted path of the first empty dict, None where there is none.
        empty_value: that dict.
    """

    def __init__(self, values: TreeValues) -> None:
        self.values = values
        self.work = Budget(values.most, Problem("tangled", values.file, {"limit": values.most}))
        self.parts: dict[str, Part] = {}
        self.aside: list[tuple[tuple[str, ...], object]] = []
        self.counted = 0
        self.empty: str | None = None
        self.empty_value: object = None

    def visit(self, value: object, path: tuple[str, ...], depth: int) -> None:
        """Add `value` as a state dict where it is a module, search it where it is a dict, else set it aside.

        `path` are the keys that lead to it, `depth` says how many dicts lie above it.
        """
        values = self.values
        self.work.take(1)
        part = values.module(value)
        if part is not None:
            self._add(path, part)
            return
        items = values.items(value)
        self.work.take(len(items or ()))
        # An optimizer's state holds a dict of tensors for each parameter, which would all look like state dicts.
        if items is None or is_optimizer(items, values):
            self.aside.append((path, value))
        elif not items:
            if self.empty is None:
                self.empty, self.empty_value = ".".join(path), value
        else:
            self._dict(value, items, path, depth)

    def _dict(self, value: object, items: Mapping[str, object], path: tuple[str, ...], depth: int) -> None:
        """Add a dict as a state dict where a tensor lies directly in it; else visit its items."""
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
                if type(item) in _PLAIN:  # nothing lies in it, so it needs no visit
                    self.aside.append(((*path, key), item))
                else:
                    self.visit(item, (*path, key), depth + 1)
        if len(self.parts) == parts and path:
            # Nothing in it can be loaded: one line for the dict instead of one for each item.
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
        """Add a dict with `tensors` as a state dict, and visit the dicts and modules that lie among them."""
        values = self.values
        # A reader keeps one of the two values, and which one cannot be told.
        if (name := values.repeated(value)) is not None:
            raise UnreadableError(Problem("key_twice", values.file, {"name": printable(name)}))
        others = [key for key in items if key not in tensors]
        containers = {key for key in others if depth < MAX_DEPTH and self._is_container(items[key])}
        left_out = frozenset() if values.keep_all else containers
        entries = {key: tensors.get(key) or values.opaque(item) for key, item in items.items() if key not in left_out}
        self._add(path, Part(entries, values.versions(value)))
        for key in others:  # in the file's order
            if key in containers:
                self.visit(items[key], (*path, key), depth + 1)

    def _is_container(self, value: object) -> bool:
        """Tell whether state dicts may lie in `value`: it is a module, or a dict of tensors or dicts.

        A dict of plain values only is an entry of the state dict around it.
        """
        values = self.values
        items = values.items(value)
        if items is None:
            return values.module(value) is not None
        # One dict may lie in many state dicts, so looking into it is work each time.
        self.work.take(len(items))
        return any(values.tensor(item) is not None or values.items(item) is not None for item in items.values())

    def _add(self, path: tuple[str, ...], part: Part) -> None:
        """Add a state dict under its dotted path."""
        name = ".".join(path)
        # The path ("a.b",) and the path ("a", "b") look alike when dotted, and `select` could not tell them apart.
        if name in self.parts:
            raise AmbiguousKeysError(Problem("path_twice", self.values.file, {"name": printable(name)}))
        self.parts[name] = part

    def asides(self) -> Iterator[Beside]:
        """Give everything beside the state dicts, and at last the tensors that none of it holds."""
        for path, value in self.aside:
            yield Beside(".".join(map(printable, path)), *self.describe(value))
        # After the loop, whose counting asks for tensors, too.
        if left := self.values.unseen():
            yield Beside("", "tensors that no state dict names, such as plain attributes of a module", left)

    def describe(self, value: object) -> tuple[str, int]:
        """Say what a value is that is no state dict, and count the tensors in it: ('2 tensors in a list of 5', 2)."""
        values = self.values
        items = values.items(value)
        tensors = self.count_tensors(value)
        if items is not None and is_optimizer(items, values):
            return "an optimizer's state", tensors
        entry = values.tensor(value)
        noun = entry.what if isinstance(entry, Opaque) else "a tensor" if entry is not None else values.noun(value)
        return (f"{plural(tensors, 'tensor')} in {noun}" if tensors and entry is None else noun), tensors

    def count_tensors(self, root: object) -> int:
        """Count the tensors in `root`, each once; only some of them where it is vast (see `MAX_COUNTED`)."""
        values, seen, todo, count = self.values, set[int](), [root], 0
        # It ends early where every tensor of the file has been asked for: there is none left to count.
        while todo and self.counted < MAX_COUNTED and values.unseen() != 0:
            value = todo.pop()
            if id(value) in seen:  # by identity: values are shared, contain themselves, and cannot all be hashed
                continue
            seen.add(id(value))
            self.counted += 1
            if values.tensor(value) is not None:
                count += 1
                continue
            inner = list(values.inner(value))
            self.counted += len(inner)  # one list may be reached from very many places
            todo.extend([item for item in inner if type(item) not in _PLAIN])
        return count

    def no_weights(self, root: object) -> UnreadableError:
        """Give the exception for a file without a state dict; its kind says what is there instead, if that is known."""
        values = self.values
        # First the most helpful reason: there is a dict of tensors, but its keys are no strings.
        for _, value in self.aside:
            odd = values.odd_key(value)
            if odd is not None and self.count_tensors(value):
                return UnreadableError(Problem("odd_keys", values.file, {"type": odd[0], "key": odd[1]}))
        what, tensors = self.describe(root)
        facts: dict[str, object] = {"what": what, "tensors": tensors}
        # From the most to the least specific.
        items = values.items(root) or {}
        kind: Kind = "no_weights"
        # ZeRO files of DeepSpeed keep the weights of a rank in the optimizer's state.
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
    """Tell whether `key` is that of a module's extra state, which may be any value: 'fc._extra_state'."""
    return key == "_extra_state" or key.endswith("._extra_state")


def is_optimizer(items: Mapping[str, object], values: TreeValues) -> bool:
    """Tell whether a dict is what `optimizer.state_dict()` gives: {"state": {...}, "param_groups": [...]}."""
    return "state" in items and "param_groups" in items and values.is_list(items["param_groups"])


def article(noun: str, size: int) -> str:
    """Give a noun with its article and the number of its items.

    >>> article("list", 3)
    'a list of 3'
    """
    return f"{with_article(noun)} of {size:,}"
