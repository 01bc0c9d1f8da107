"""How far one reading of the file's names fits the model: pairs, and everything that has no partner. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property

from smartload.records import Ignored, Manifest, TensorSpec, Wishes
from smartload.spelling import Renames, SeeThrough, ancestors, below, blind, join, parent

COUNTERS = ("total_ops", "total_params")  # what the profiler thop registers in every module
AVERAGED = "n_averaged"  # the bookkeeping of torch.optim.swa_utils.AveragedModel


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of the glob patterns fits the name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


class FileNames:
    """The names of a file's tensors, dotted through all its dicts below `base`, after the renaming of whole names.

    `stored[name]` is the full name that the file has for it, `own[name]` its key in its own dict.
    """

    def __init__(self, parts: Mapping[str, Mapping[str, TensorSpec | None]], renames: Renames, base: str = "") -> None:
        self.spec: dict[str, TensorSpec | None] = {}
        self.part: dict[str, str] = {}
        self.stored: dict[str, str] = {}
        self.own: dict[str, str] = {}
        self.twice: list[tuple[str, str]] = []
        for path, specs in parts.items():
            for key, spec in specs.items():
                name = join(path, renames.whole(key) if renames else key)
                stored = join(base, path, key)
                if name in self.spec:
                    self.twice.append((self.stored[name], stored))
                self.spec[name], self.part[name] = spec, path
                self.stored[name], self.own[name] = stored, key
        self.parts = tuple(parts)

    def tails(self, prefix: str) -> Iterator[str]:
        """The names below `prefix`, without it."""
        return (below(name, prefix) or name for name in self.under(prefix))

    @cached_property
    def _sorted(self) -> list[str]:
        return sorted(self.spec)

    def under(self, prefix: str) -> list[str]:
        """The names that begin with the whole segments of `prefix`, in the file's order where that is all."""
        if not prefix:
            return list(self.spec)
        names = self._sorted
        return names[bisect_left(names, prefix + ".") : bisect_left(names, prefix + "/")]  # "/" follows "."

    def containers(self) -> Iterator[str]:
        """The paths of all dicts that hold tensors, at any depth."""
        return iter(dict.fromkeys(path for part in self.parts for path in ancestors(part)))


class ModelNames:
    """The model's names, without its wrappers' segments and, where `added` is given, without that common prefix."""

    def __init__(self, model: Manifest, added: str = "") -> None:
        self.manifest, self.added = model, added
        self._module: dict[str, str] = {"": ""}
        self.key: dict[str, str] = {}
        self.outside: list[str] = []
        for key in model.specs:
            name = below(self.plain(key), added)
            if name is None:
                self.outside.append(key)
            else:
                self.key[name] = key
        self.transient = {below(self.plain(key), added): key for key in model.transient}

    def plain(self, key: str) -> str:
        """The model's key without the segments of its wrappers."""
        return join(self._plain_module(parent(key)), key.rpartition(".")[2])

    def _plain_module(self, path: str) -> str:
        known = self._module.get(path)
        if known is None:
            base = self._plain_module(parent(path))
            known = base if path in self.manifest.wrappers else join(base, path.rpartition(".")[2])
            self._module[path] = known
        return known

    @cached_property
    def modules(self) -> dict[str, str]:
        """Module path without wrappers -> the innermost module of the model that has it."""
        for key in self.manifest.specs:
            self._plain_module(parent(key))
        found: dict[str, str] = {}
        for path, plain in self._module.items():
            name = below(plain, self.added) if plain != self.added else ""
            if name is not None and len(path) >= len(found.get(name, "")):
                found[name] = path
        return found

    @cached_property
    def see(self) -> SeeThrough:
        """Reads names of a file as this model spells them."""
        return SeeThrough(self.modules)

    @cached_property
    def blind(self) -> frozenset[str]:
        """The names as they look when every segment that could be a wrapper's is gone."""
        return frozenset(blind(name) for name in self.key)

    def spell(self, name: str) -> str:
        """Any name below a module of the model, as the model would write it."""
        if name in self.key:
            return self.key[name]
        for path in ancestors(parent(name)):
            if path in self.modules:
                return join(self.modules[path], below(name, path) or "")
        return join(self.added, name)


@dataclass(slots=True)
class Fit:
    """What comes of reading the file's names below `removed`, in front of which the model has `added`."""

    removed: str
    model: ModelNames
    pairs: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    """What the file's names are called once adapted."""
    renamed: bool = False
    missing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    clashes: list[tuple[str, str, str]] = field(default_factory=list)
    """(model key, and the two names of the file that would fill it)"""
    buffers: dict[str, str] = field(default_factory=dict)
    """Leftovers that may be equal to a non-persistent buffer of the model: name in the file -> model key."""
    ignored: list[Ignored] = field(default_factory=list)
    kept: list[Ignored] = field(default_factory=list)
    allowed_missing: list[str] = field(default_factory=list)
    allowed_unexpected: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every name has its partner, or a reason."""
        return not (self.missing or self.left_over or self.shapes or self.clashes)

    @property
    def answer(self) -> frozenset[tuple[str, str]]:
        """What distinguishes this fit from another."""
        return frozenset(self.pairs.items())


def same_shape(file: TensorSpec | None, model: TensorSpec | None) -> bool:
    """Whether the file's tensor may go there: equal shapes, open ones, and (1,) for () as torch 0.3 wrote scalars."""
    if file is None or model is None or file.shape is None or model.shape is None:
        return True
    return file.shape == model.shape or (model.shape == () and file.shape == (1,))


def fit(file: FileNames, model: ModelNames, removed: str, renames: Renames, wishes: Wishes) -> Fit:
    """Read the file's names below `removed` as names of the model, and give every name a partner or a reason."""
    found = Fit(removed, model)
    strays = _pair(found, file, renames)
    _settle_clashes(found, file, wishes)
    _settle_shapes(found, file, wishes)
    _settle_missing(found, wishes)
    _settle_strays(found, file, strays, wishes)
    if removed and found.complete:
        _settle_outside(found, file, wishes)
    return found


def _pair(found: Fit, file: FileNames, renames: Renames) -> list[str]:
    strays: list[str] = []
    keys = found.model.key
    for name in file.under(found.removed):
        tail = name[len(found.removed) + 1 :] if found.removed else name
        adapted = tail if tail in keys else found.model.see.key(tail)
        if renames and name == join(file.part[name], file.own[name]):
            plain, adapted = adapted, renames.prefix(adapted)
            found.renamed = found.renamed or plain != adapted
        found.names[name] = adapted
        key = keys.get(adapted)
        if key is None:
            strays.append(name)
        elif key in found.pairs:
            found.clashes.append((key, found.pairs[key], name))
        else:
            found.pairs[key] = name
    return strays


def _settle_clashes(found: Fit, file: FileNames, wishes: Wishes) -> None:
    """Two names for one key: one of them may be left out on demand."""
    remaining = []
    for key, first, second in found.clashes:
        out = [name for name in (first, second) if _named(file, name, wishes)]
        if len(out) == 1:
            found.pairs[key] = second if out[0] == first else first
            found.allowed_unexpected.append(out[0])
        else:
            remaining.append((key, first, second))
    found.clashes = remaining
    for group in found.model.manifest.aliases if wishes.allow_unexpected else ():
        present = [key for key in group if key in found.pairs]
        out = [key for key in present if _named(file, found.pairs[key], wishes)]
        for key in out if len(out) < len(present) else ():
            found.allowed_unexpected.append(found.pairs.pop(key))


def _named(file: FileNames, name: str, wishes: Wishes) -> bool:
    """Whether the caller allowed this name as the file spells it."""
    return matches(file.stored[name], wishes.allow_unexpected) or matches(file.own[name], wishes.allow_unexpected)


def _settle_shapes(found: Fit, file: FileNames, wishes: Wishes) -> None:
    specs = found.model.manifest.specs
    for key, name in list(found.pairs.items()):
        if same_shape(file.spec[name], specs[key]):
            continue
        if matches(key, wishes.allow_missing) and _may_be_left(found, file, name, wishes):
            del found.pairs[key]
            found.allowed_unexpected.append(name)
        else:
            found.shapes.append(key)


def _may_be_left(found: Fit, file: FileNames, name: str, wishes: Wishes) -> bool:
    """Whether the caller allowed this name, as the file spells it or as it reads once adapted."""
    allowed = wishes.allow_unexpected
    return bool(allowed) and (_named(file, name, wishes) or matches(found.names.get(name, name), allowed))


def _settle_missing(found: Fit, wishes: Wishes) -> None:
    manifest = found.model.manifest
    if len(found.pairs) < len(manifest.specs):
        for group in manifest.aliases:
            source = next((found.pairs[key] for key in group if key in found.pairs), None)
            if source is not None:
                for key in group:
                    if key in manifest.specs:
                        found.pairs.setdefault(key, source)
    for key in manifest.specs:
        if key in found.pairs:
            continue
        if matches(key, wishes.allow_missing):
            found.allowed_missing.append(key)
        elif key.rpartition(".")[2] == AVERAGED and join(parent(key), "module") in manifest.wrappers:
            found.kept.append(Ignored(key, "bookkeeping of AveragedModel, not in the file"))
        else:
            found.missing.append(key)


def _settle_strays(found: Fit, file: FileNames, strays: list[str], wishes: Wishes) -> None:
    contributing = {file.part[name] for name in found.pairs.values()} or {file.part[name] for name in strays}
    for name in strays:
        reason = _stray_reason(found, file, name, contributing)
        buffer = found.model.transient.get(found.names[name])
        if _may_be_left(found, file, name, wishes):
            found.allowed_unexpected.append(name)
        elif reason:
            found.ignored.append(Ignored(name, reason))
        elif buffer is not None and same_shape(file.spec[name], found.model.manifest.transient[buffer]):
            found.buffers[name] = buffer
        else:
            found.left_over.append(name)


def _stray_reason(found: Fit, file: FileNames, name: str, contributing: set[str]) -> str:
    leaf = name.rpartition(".")[2]
    spec = file.spec[name]
    if file.part[name] not in contributing:
        return "another part of the file"
    if spec is None:
        return "" if leaf == "_extra_state" else "not a tensor"
    if leaf in COUNTERS and spec.shape in ((), (1,)):
        return "a counter of the profiler thop"
    if leaf == AVERAGED and file.under(join(parent(name), "module")):
        return "bookkeeping of AveragedModel"
    return ""


def _settle_outside(found: Fit, file: FileNames, wishes: Wishes) -> None:
    """Names beside `removed`: other parts of the file, unless they would fill the same keys."""
    contributing = {file.part[name] for name in found.pairs.values()}
    for name, part in file.part.items():
        if below(name, found.removed) is not None:
            continue
        if part not in contributing or file.spec[name] is None:
            found.ignored.append(Ignored(name, "another part of the file"))
        elif _may_be_left(found, file, name, wishes):
            found.allowed_unexpected.append(name)
        else:
            key = found.model.key.get(found.model.see.key(below(name, part) or name))
            if key is not None and key in found.pairs:
                found.clashes.append((key, found.pairs[key], name))
            else:
                reason = "bookkeeping of AveragedModel" if name.endswith(AVERAGED) else f"outside of {found.removed!r}"
                found.ignored.append(Ignored(name, reason))
