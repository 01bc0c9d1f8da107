"""How names are written: prefixes, wrapper segments, renames. Pure string work, linear in the names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

WRAPPER_SEGMENTS = frozenset(
    {
        "module",  # DataParallel, DistributedDataParallel, AveragedModel
        "_orig_mod",  # torch.compile
        "_fsdp_wrapped_module",
        "_fpw_module",  # FSDP before torch 1.13
        "_checkpoint_wrapped_module",
        "_forward_module",  # Lightning Fabric
        "_module",  # Opacus
    }
)

AVERAGED = "n_averaged"
"""What torch.optim.swa_utils.AveragedModel counts in, beside the module that it wraps."""


def join(*names: str) -> str:
    """The dotted name of the parts that are not empty."""
    return ".".join(filter(None, names))


def parent(name: str) -> str:
    """The module path of a key, or of a module."""
    return name.rpartition(".")[0]


def leaf(name: str) -> str:
    """The last segment of a name."""
    return name.rpartition(".")[2]


def below(name: str, prefix: str) -> str | None:
    """What follows the whole segments of `prefix` in `name`; None where they do not begin it."""
    if not prefix:
        return name
    if name.startswith(prefix) and name[len(prefix) : len(prefix) + 1] == ".":
        return name[len(prefix) + 1 :]
    return None


def ancestors(path: str) -> Iterator[str]:
    """`path` and all the paths above it, the empty one last."""
    while path:
        yield path
        path = parent(path)
    yield ""


def common_path(names: Iterable[str]) -> str:
    """The longest module path that all the keys lie under."""
    paths = [parent(name) for name in names]
    if not paths:
        return ""
    low, high = min(paths).split("."), max(paths).split(".")
    shared = next((i for i, (a, b) in enumerate(zip(low, high)) if a != b), min(len(low), len(high)))
    path = ".".join(low[:shared])
    # min and max are ordered by characters, not by segments: "a-b" sorts between "a" and "a.c".
    while path and any(below(each + ".", path) is None for each in paths):
        path = parent(path)
    return path


def blind(name: str, segments: frozenset[str] = WRAPPER_SEGMENTS) -> str:
    """`name` without any segment that could be a wrapper's."""
    if has_no_wrapper(name):
        return name
    *path, last = name.split(".")
    return ".".join([*(segment for segment in path if segment not in segments), last])


def has_no_wrapper(name: str) -> bool:
    """Whether no wrapper's segment can be in the name, seen without taking it apart."""
    return "module" not in name and "_mod" not in name


class SeeThrough:
    """Reads the file's names as the model spells them: wrapper segments that the model does not have are skipped.

    Args:
        modules: the module paths that the model has; a wrapper segment that is a real name there stays.
        only: paths in the file that are the one thing in the module above, and wrappers for all that is known.
        crowded: modules of the model that hold more than one thing, so that an only child in the file is a
            wrapper around them and not the real child of that name.
    """

    def __init__(
        self, modules: Iterable[str], only: frozenset[str] = frozenset(), crowded: frozenset[str] = frozenset()
    ) -> None:
        self._modules, self._only, self._crowded = frozenset(modules), only, crowded
        self._known: dict[str, str] = {"": ""}

    def key(self, name: str) -> str:
        """The key with its module path seen through."""
        path, dot, last = name.rpartition(".")
        if not dot or has_no_wrapper(path):
            return name
        seen = self._known.get(path)
        if seen is None:
            seen = self._known[path] = self._module(path)
        return f"{seen}.{last}" if seen else last

    def _module(self, path: str) -> str:
        base, end = "", -1
        while end < len(path):
            start, end = end + 1, path.find(".", end + 1)
            end = len(path) if end < 0 else end
            segment = path[start:end]
            real = f"{base}.{segment}" if base else segment
            if segment in WRAPPER_SEGMENTS and (
                real not in self._modules or (base in self._crowded and path[:end] in self._only)
            ):
                continue
            if real not in self._modules:  # outside of the model: no name from here on is its own
                rest = path[start:].split(".")
                return join(base, *(each for each in rest if each not in WRAPPER_SEGMENTS))
            base = real
        return base


def lonely_wrappers(names: Iterable[str], depth: int) -> frozenset[str]:
    """Module paths with a wrapper's segment at their end that are the only thing in the module above.

    Args:
        names: keys of one state dict.
        depth: segments of a name that are looked at.
    """
    children: dict[str, set[str]] = {}
    for name in names:
        above = ""
        for segment in name.split(".", depth)[:depth]:
            children.setdefault(above, set()).add(segment)
            above = f"{above}.{segment}" if above else segment
    inner = ((path, names - {AVERAGED}) for path, names in children.items())
    return frozenset(join(path, *names) for path, names in inner if len(names) == 1 and names <= WRAPPER_SEGMENTS)


class Renames:
    """The caller's `rename`: prefixes of whole segments, the longest that fits, or a function of the whole name."""

    def __init__(self, rename: Mapping[str, str] | Callable[[str], str] | None) -> None:
        self._function = rename if callable(rename) else None
        rules = {} if rename is None or callable(rename) else rename
        self._rules = {old.rstrip("."): new.rstrip(".") for old, new in rules.items()}
        self.depth = max((old.count(".") + 1 for old in self._rules), default=0)

    def __bool__(self) -> bool:
        return bool(self._function or self._rules)

    def whole(self, name: str) -> tuple[str, str | None]:
        """The name as it lies in the file, renamed, and the rule that did it; None where none did."""
        if self._function is None:
            return self.prefix(name)
        renamed = self._function(name)
        if not isinstance(renamed, str):
            raise TypeError(f"rename({name!r}) must return a str, got {type(renamed).__name__}")
        return renamed, "the function" if renamed != name else None

    def prefix(self, name: str) -> tuple[str, str | None]:
        """The name under the longest rule whose prefix it has, and that rule; None where it has none."""
        if self._rules:
            segments = name.split(".", self.depth)
            for count in range(min(self.depth, len(segments)), -1, -1):
                old = ".".join(segments[:count])
                if old in self._rules:
                    return join(self._rules[old], name[len(old) + 1 :] if old else name), old
        return name, None

    def unused(self, used: set[str]) -> list[str]:
        """The rules that are not among those used."""
        return [rule for rule in (["the function"] if self._function else self._rules) if rule not in used]
