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


def join(*names: str) -> str:
    """The dotted name of the parts that are not empty."""
    return ".".join(name for name in names if name)


def parent(name: str) -> str:
    """The module path of a key, or of a module."""
    return name.rpartition(".")[0]


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


def blind(name: str) -> str:
    """`name` without any segment that could be a wrapper's."""
    *path, leaf = name.split(".")
    return ".".join([*(segment for segment in path if segment not in WRAPPER_SEGMENTS), leaf])


class SeeThrough:
    """Reads the file's names as the model spells them: wrapper segments that the model does not have are skipped."""

    def __init__(self, modules: Iterable[str]) -> None:
        self._modules = frozenset(modules)
        self._known: dict[str, str] = {"": ""}

    def module(self, path: str) -> str:
        """The module path without the wrapper segments that are no real names in the model."""
        known = self._known.get(path)
        if known is None:
            above, _, segment = path.rpartition(".")
            base = self.module(above) if above.count(".") < 200 else above
            real = f"{base}.{segment}" if base else segment
            known = base if segment in WRAPPER_SEGMENTS and real not in self._modules else real
            self._known[path] = known
        return known

    def key(self, name: str) -> str:
        """The key with its module path seen through."""
        path, dot, leaf = name.rpartition(".")
        if not dot:
            return name
        path = self.module(path)
        return f"{path}.{leaf}" if path else leaf


class Renames:
    """The caller's `rename`: prefixes of whole segments, the longest that fits, or a function of the whole name."""

    def __init__(self, rename: Mapping[str, str] | Callable[[str], str] | None) -> None:
        self._function = rename if callable(rename) else None
        rules = {} if rename is None or callable(rename) else rename
        self._rules = {old.rstrip("."): new.rstrip(".") for old, new in rules.items()}
        self._longest_first = sorted(self._rules, key=len, reverse=True)
        self.used: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._function or self._rules)

    def whole(self, name: str) -> str:
        """The name as it lies in the file, renamed."""
        if self._function is None:
            return self.prefix(name)
        renamed = self._function(name)
        if not isinstance(renamed, str):
            raise TypeError(f"rename({name!r}) must return a str, got {type(renamed).__name__}")
        if renamed != name:
            self.used.add("")
        return renamed

    def prefix(self, name: str) -> str:
        """The name, already adapted, under the first rule whose prefix it has."""
        for old in self._longest_first:
            rest = "" if name == old else below(name, old)
            if rest is not None:
                self.used.add(old)
                return join(self._rules[old], rest)
        return name

    def unused(self) -> list[str]:
        """The rules that matched no name."""
        if self._function is not None:
            return [] if self.used else ["the function"]
        return [old for old in self._rules if old not in self.used]
