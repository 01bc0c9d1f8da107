"""The walk over what a file holds: which dicts are state dicts, and what lies beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

from smartload.errors import AmbiguousKeysError, UnreadableError
from smartload.reading.limits import Budget
from smartload.reading.naming import with_article
from smartload.records.data import Aside, Entry, Opaque, Part, Problem
from smartload.records.text import plural, shown

MAX_DEPTH = 4
MAX_COUNTED = 2_000_000
"""Values looked at to count tensors that are set aside; beyond them the count is a lower bound."""
_PLAIN = frozenset((str, int, float, bool, bytes, type(None)))


class Kinds(Protocol):
    """How values look: inert notes of a file, or objects in memory."""

    file: str
    most: int
    """Items beyond which what is walked refers to itself in too many ways to be weights."""
    keep_all: bool
    """Whether a dict among tensors stays an entry of theirs, besides being walked itself."""

    def tensor(self, value: object) -> Entry | None:
        """The entry of a tensor, None for anything else."""

    def extra(self, value: object) -> Entry:
        """The entry of a module's extra state."""

    def module(self, value: object) -> Part | None:
        """The state dict of a module, None for anything else."""

    def items(self, value: object) -> Mapping[str, object] | None:
        """The items of a dict whose keys are strings, None for anything else."""

    def odd_key(self, value: object) -> tuple[str, str] | None:
        """Type and text of the first key that is no string, where `value` is a dict that has one."""

    def repeated(self, value: object) -> str | None:
        """A name that a dict gives twice."""

    def versions(self, value: object) -> Mapping[str, Mapping[str, object]] | None:
        """The `_metadata` of a state dict."""

    def noun(self, value: object) -> str:
        """What a value is, with its article."""

    def opaque(self, value: object) -> Entry:
        """The entry of a value among tensors that is none."""

    def is_list(self, value: object) -> bool:
        """Whether `value` is a list."""

    def inner(self, value: object) -> Iterable[object]:
        """All values directly inside another one."""

    def unseen(self) -> int | None:
        """How many tensors have not been asked for yet; None where nobody knows."""


class Found(NamedTuple):
    """The state dicts of a file by dotted path, and everything beside them."""

    parts: Mapping[str, Part]
    aside: tuple[Aside, ...]


def explore(root: object, kinds: Kinds) -> Found:
    """All state dicts and modules under string keys, four levels down.

    Raises UnreadableError with a reason of its own for each kind of thing that holds none.
    """
    walk = _Walk(kinds)
    walk.visit(root, (), 0)
    if not walk.parts:
        if walk.empty is None or walk.tensors_in(root):
            raise walk.nothing(root)
        walk.parts[walk.empty] = Part({}, kinds.versions(walk.empty_value))
    return Found(walk.parts, tuple(walk.asides()))


class _Walk:
    def __init__(self, kinds: Kinds) -> None:
        self.kinds = kinds
        self.work = Budget(kinds.most, Problem("tangled", kinds.file, {"limit": kinds.most}))
        self.parts: dict[str, Part] = {}
        self.aside: list[tuple[tuple[str, ...], object]] = []
        self.counted = 0
        self.empty: str | None = None
        self.empty_value: object = None

    def visit(self, value: object, path: tuple[str, ...], depth: int) -> None:
        """Take `value` as a part, walk it as a container, or set it aside as one thing."""
        kinds = self.kinds
        self.work.take(1)
        part = kinds.module(value)
        if part is not None:
            self._add(path, part)
            return
        items = kinds.items(value)
        self.work.take(len(items or ()))
        if items is None or is_optimizer(items, kinds):
            self.aside.append((path, value))
        elif not items:
            if self.empty is None:
                self.empty, self.empty_value = ".".join(path), value
        else:
            self._dict(value, items, path, depth)

    def _dict(self, value: object, items: Mapping[str, object], path: tuple[str, ...], depth: int) -> None:
        kinds = self.kinds
        tensors = {
            key: entry
            for key, item in items.items()
            if (entry := kinds.extra(item) if is_extra(key) else kinds.tensor(item)) is not None
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
        kinds = self.kinds
        if (name := kinds.repeated(value)) is not None:
            raise UnreadableError(Problem("key_twice", kinds.file, {"name": shown(name)}))
        others = [key for key in items if key not in tensors]
        walked = {key for key in others if depth < MAX_DEPTH and self._is_container(items[key])}
        left = frozenset() if kinds.keep_all else walked
        entries = {key: tensors.get(key) or kinds.opaque(item) for key, item in items.items() if key not in left}
        self._add(path, Part(entries, kinds.versions(value)))
        for key in others:
            if key in walked:
                self.visit(items[key], (*path, key), depth + 1)

    def _is_container(self, value: object) -> bool:
        kinds = self.kinds
        items = kinds.items(value)
        if items is None:
            return kinds.module(value) is not None
        self.work.take(len(items))
        return any(kinds.tensor(item) is not None or kinds.items(item) is not None for item in items.values())

    def _add(self, path: tuple[str, ...], part: Part) -> None:
        name = ".".join(path)
        if name in self.parts:
            raise AmbiguousKeysError(Problem("path_twice", self.kinds.file, {"name": shown(name)}))
        self.parts[name] = part

    def asides(self) -> Iterator[Aside]:
        """Everything beside the parts, one line each; last the tensors that nothing has named so far."""
        for path, value in self.aside:
            yield Aside(".".join(map(shown, path)), *self.described(value))
        if left := self.kinds.unseen():
            yield Aside("", "tensors that no state dict names, such as plain attributes of a module", left)

    def described(self, value: object) -> tuple[str, int]:
        """What a thing is that is no part, and the number of tensors in it."""
        kinds = self.kinds
        items = kinds.items(value)
        tensors = self.tensors_in(value)
        if items is not None and is_optimizer(items, kinds):
            return "an optimizer's state", tensors
        entry = kinds.tensor(value)
        noun = entry.what if isinstance(entry, Opaque) else "a tensor" if entry is not None else kinds.noun(value)
        return (f"{plural(tensors, 'tensor')} in {noun}" if tensors and entry is None else noun), tensors

    def tensors_in(self, root: object) -> int:
        """How many tensors lie in a thing, each counted once; a lower bound where it is vast."""
        kinds, seen, todo, found = self.kinds, set[int](), [root], 0
        while todo and self.counted < MAX_COUNTED and kinds.unseen() != 0:
            value = todo.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            self.counted += 1
            if kinds.tensor(value) is not None:
                found += 1
                continue
            inner = list(kinds.inner(value))
            self.counted += len(inner)
            todo.extend([item for item in inner if type(item) not in _PLAIN])
        return found

    def nothing(self, root: object) -> UnreadableError:
        """The refusal for a file in which there is nothing to load."""
        kinds = self.kinds
        for _, value in self.aside:
            odd = kinds.odd_key(value)
            if odd is not None and self.tensors_in(value):
                return UnreadableError(Problem("odd_keys", kinds.file, {"type": odd[0], "key": odd[1]}))
        what, tensors = self.described(root)
        facts: dict[str, object] = {"what": what, "tensors": tensors}
        items = kinds.items(root) or {}
        kind = "no_weights"
        if "optimizer_state_dict" in items and ("ds_version" in items or "ds_config" in items):
            kind = "zero"
        elif what == "an optimizer's state":
            kind = "optimizer"
        elif kinds.tensor(root) is not None:
            kind = "bare_tensor"
        elif kinds.is_list(root):
            kind = "a_list"
        elif tensors:
            kind = "out_of_reach"
        return UnreadableError(Problem(kind, kinds.file, facts))


def is_extra(key: str) -> bool:
    """Whether a name is that of a module's extra state."""
    return key == "_extra_state" or key.endswith("._extra_state")


def is_optimizer(items: Mapping[str, object], kinds: Kinds) -> bool:
    """Whether a dict is what `optimizer.state_dict()` gives."""
    return "state" in items and "param_groups" in items and kinds.is_list(items["param_groups"])


def article(noun: str, size: int) -> str:
    """`a list of 3`."""
    return f"{with_article(noun)} of {size:,}"
