"""Names without tensors: what the tests of the pure folders are written in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from smartload.match.search import match
from smartload.records.entries import FileKey, TensorSpec
from smartload.records.keys import join
from smartload.records.report import KeyPlan
from smartload.records.requests import ModelKeys, Options

Names = str | Mapping[str, TensorSpec | None]


def specs(names: Names) -> dict[str, TensorSpec | None]:
    """`"fc.weight:2x3 fc.bias x:?"` as specs: shape (2,) where none is given, `?` for what is no tensor."""
    if not isinstance(names, str):
        return dict(names)
    found: dict[str, TensorSpec | None] = {}
    for text in names.split():
        name, _, shape = text.partition(":")
        if shape == "?":
            found[name] = None
        else:
            sizes = tuple(int(size) for size in shape.split("x") if size) if shape != "()" else ()
            found[name] = TensorSpec(sizes if shape else (2,), "float32")
    return found


@dataclass
class GivenAnswers:
    """Answers for `match`: tensors that are equal, buffers that are equal, key sets that the model accepts."""

    equal: Iterable[set[str]] = ()
    buffers: Iterable[tuple[str, str]] = ()
    accepted: Iterable[set[str]] = ()
    named: Iterable[set[str]] = ()
    """Key sets that the model would accept in its own shapes."""
    asked: list[str] = field(default_factory=list)

    def same(self, first: str, second: str) -> bool:
        self.asked.append(f"same {first} {second}")
        return first == second or any({first, second} <= group for group in self.equal)

    def is_own(self, name: str) -> bool:
        return False

    def loadable(self, names: Mapping[str, str]) -> bool:
        return True

    def equals_buffer(self, name: str, buffer: str) -> bool:
        return (name, buffer) in self.buffers

    def accepts(self, names: Mapping[str, str], own_shapes: bool = False) -> bool:
        return set(names) in (self.named if own_shapes else self.accepted)


def model_keys(
    names: Names, wrappers: str = "", tied: Iterable[tuple[str, ...]] = (), non_persistent: Names = ""
) -> ModelKeys:
    tensors = {name: spec for name, spec in specs(non_persistent).items() if spec is not None}
    return ModelKeys("Net", specs(names), tuple(tied), frozenset(wrappers.split()), tensors)


def file_keys(path: str, specs: Mapping[str, TensorSpec | None]) -> list[FileKey]:
    return [FileKey(join(path, key), path, key, spec) for key, spec in specs.items()]


def matched(
    model: ModelKeys | str, parts: Names | Mapping[str, str], given: GivenAnswers | None = None, **options: object
) -> KeyPlan:
    """`match` on names alone; `parts` is one dict, or several by path."""
    if isinstance(parts, str):
        parts = {"": parts}
    held = {path: file_keys(path, specs(names)) for path, names in parts.items()}  # type: ignore[arg-type]
    model = model_keys(model) if isinstance(model, str) else model
    return match(model, held, "f.pt", Options(**options), given or GivenAnswers())  # type: ignore[arg-type]


def renamed(plan: KeyPlan) -> str:
    """The pairs of a plan in short: `key<name`, or the key alone where both are equal."""
    return " ".join(key if key == name else f"{key}<{name}" for key, name in plan.pairs.items())
