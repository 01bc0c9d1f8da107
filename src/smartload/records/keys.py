"""Keys of state dicts as text: segments, prefixes, wrappers, renames. Pure, and linear in the keys.

A key is a dotted name, 'layer1.0.weight'; its segments are 'layer1', '0' and 'weight'; the segments before the last are
the path of the module that has the tensor. A prefix always ends at a dot: 'layer' is no prefix of 'layer1.weight'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from smartload.records.wrappers import AVERAGED, SEGMENTS, has_no_wrapper


def join(*names: str) -> str:
    """Join the names that are not empty by dots.

    >>> join("model", "", "fc.weight")
    'model.fc.weight'
    """
    return ".".join(filter(None, names))


def parent(name: str) -> str:
    """Give the path of the module that has the key or module.

    >>> parent("layer1.0.weight")
    'layer1.0'
    """
    return name.rpartition(".")[0]


def leaf(name: str) -> str:
    """Give the last segment of a key.

    >>> leaf("layer1.0.weight")
    'weight'
    """
    return name.rpartition(".")[2]


def without_prefix(name: str, prefix: str) -> str | None:
    """Give what follows `prefix` in `name`; None where the whole segments of `prefix` do not begin it.

    >>> without_prefix("module.fc.weight", "module"), without_prefix("modules.fc.weight", "module")
    ('fc.weight', None)
    """
    if not prefix:
        return name
    # No `prefix + "."`, which would be a new string for every key of a file.
    if name.startswith(prefix) and name[len(prefix) : len(prefix) + 1] == ".":
        return name[len(prefix) + 1 :]
    return None


def ancestors(path: str) -> Iterator[str]:
    """Give `path` and every path above it, the empty one last.

    >>> list(ancestors("layer1.0"))
    ['layer1.0', 'layer1', '']
    """
    while path:
        yield path
        path = parent(path)
    yield ""


def common_path(names: Iterable[str]) -> str:
    """Find the longest module path that all the keys lie under.

    >>> common_path(["net.fc.weight", "net.conv.weight"])
    'net'
    """
    paths = [parent(name) for name in names]
    if not paths:
        return ""
    # All paths lie between the first and the last in order, so what these two begin with, all begin with.
    low, high = min(paths).split("."), max(paths).split(".")
    shared = next((i for i, (a, b) in enumerate(zip(low, high)) if a != b), min(len(low), len(high)))
    path = ".".join(low[:shared])
    # min and max are ordered by characters, not by segments: "a-b" sorts between "a" and "a.c".
    while path and any(without_prefix(each + ".", path) is None for each in paths):
        path = parent(path)
    return path


def without_wrappers(name: str, segments: frozenset[str] = SEGMENTS) -> str:
    """Remove every segment of the key's path that could be a wrapper's.

    >>> without_wrappers("module.net._orig_mod.fc.weight")
    'net.fc.weight'
    """
    if has_no_wrapper(name):
        return name
    *path, last = name.split(".")
    return ".".join([*(segment for segment in path if segment not in segments), last])


class WrapperStripper:
    """Removes from keys of a file the wrapper segments that the model does not have there.

    Args:
        modules: the module paths that the model has; a wrapper segment that is a real name there stays.
        only: paths in the file that are the one thing in the module above, and so may be wrappers.
        crowded: modules of the model that hold more than one thing, so that an only child in the file is a wrapper
            around them and not the real child of that name.

    >>> WrapperStripper(["fc"]).strip("module.fc.weight"), WrapperStripper(["module.fc"]).strip("fc.module.weight")
    ('fc.weight', 'fc.weight')
    >>> WrapperStripper(["module", "module.fc"]).strip("module.fc.weight")
    'module.fc.weight'
    """

    def __init__(
        self, modules: Iterable[str], only: frozenset[str] = frozenset(), crowded: frozenset[str] = frozenset()
    ) -> None:
        self._modules, self._only, self._crowded = frozenset(modules), only, crowded
        self._known: dict[str, str] = {"": ""}

    def strip(self, name: str) -> str:
        """Give the key with the wrapper segments of its module path removed."""
        path, dot, last = name.rpartition(".")
        if not dot or has_no_wrapper(path):
            return name
        stripped = self._known.get(path)
        if stripped is None:  # the keys of one module share its path
            stripped = self._known[path] = self._strip_path(path)
        return f"{stripped}.{last}" if stripped else last

    def _strip_path(self, path: str) -> str:
        # Segment by segment from the front, without a split: a hostile path has thousands of segments, and the walk
        # ends where the path leaves the model.
        base, end = "", -1
        while end < len(path):
            start, end = end + 1, path.find(".", end + 1)
            end = len(path) if end < 0 else end
            segment = path[start:end]
            real = f"{base}.{segment}" if base else segment
            if segment in SEGMENTS and (
                real not in self._modules or (base in self._crowded and path[:end] in self._only)
            ):
                continue
            if real not in self._modules:  # the path leaves the model: nothing below can be one of its names
                rest = path[start:].split(".")
                return join(base, *(each for each in rest if each not in SEGMENTS))
            base = real  # one more module of the model
        return base


def only_child_wrappers(names: Iterable[str], depth: int) -> frozenset[str]:
    """Find the module paths that end in a wrapper's segment and are the only child of the module above.

    Args:
        names: keys of one state dict.
        depth: how many segments of each key are looked at.

    >>> sorted(only_child_wrappers(["net.module.a.weight", "net.module.b.weight", "head.weight"], 4))
    ['net.module']
    """
    children: dict[str, set[str]] = {}
    for name in names:
        above = ""
        # Cut at `depth`: no module of the model lies deeper, and a hostile name may go on for long.
        for segment in name.split(".", depth)[:depth]:
            children.setdefault(above, set()).add(segment)
            above = f"{above}.{segment}" if above else segment
    # AveragedModel puts a counter beside the module that it wraps.
    inner = ((path, names - {AVERAGED}) for path, names in children.items())
    return frozenset(join(path, *names) for path, names in inner if len(names) == 1 and names <= SEGMENTS)


class Renames:
    """The caller's `rename`: key prefixes, of which the longest that fits is taken, or a function of the whole key.

    >>> Renames({"backbone": "net"}).prefix("backbone.fc.weight")
    ('net.fc.weight', 'backbone')
    """

    def __init__(self, rename: Mapping[str, str] | Callable[[str], str] | None) -> None:
        self._function = rename if callable(rename) else None
        rules = {} if rename is None or callable(rename) else rename
        # "head" and "head." are one prefix: people write both, and a prefix ends at a dot in any case.
        self._rules = {old.rstrip("."): new.rstrip(".") for old, new in rules.items()}
        # Segments of the longest rule: of a name, no more than these are compared with rules.
        self.depth = max((old.count(".") + 1 for old in self._rules), default=0)

    def __bool__(self) -> bool:
        return bool(self._function or self._rules)

    def whole(self, name: str) -> tuple[str, str | None]:
        """Rename a key as the file has it; give the rule that did it, too, None where none did."""
        if self._function is None:
            return self.prefix(name)
        renamed = self._function(name)
        # The function is the caller's, and so is the mistake: a TypeError, where a refusal would blame the file.
        if not isinstance(renamed, str):
            raise TypeError(f"rename({name!r}) must return a str, got {type(renamed).__name__}")
        return renamed, "the function" if renamed != name else None

    def prefix(self, name: str) -> tuple[str, str | None]:
        """Rename a key by the longest rule that is a prefix of it; give that rule, too, None where there is none."""
        if self._rules:
            segments = name.split(".", self.depth)
            # Down to no segment at all: the rule "" puts a prefix before every key.
            for count in range(min(self.depth, len(segments)), -1, -1):
                old = ".".join(segments[:count])
                if old in self._rules:
                    return join(self._rules[old], name[len(old) + 1 :] if old else name), old
        return name, None

    def unused(self, used: set[str]) -> list[str]:
        """Give the rules that are not in `used`."""
        return [rule for rule in (["the function"] if self._function else self._rules) if rule not in used]
