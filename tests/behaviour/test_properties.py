"""Random networks, random wrappers, random files: a load is right bit for bit, or a typed refusal that changed nothing.

`SMARTLOAD_EXAMPLES=20000 pytest tests/behaviour/test_properties.py` looks at more of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, event, given, note, settings
from hypothesis import strategies as st
from torch import nn

from smartload import AmbiguousKeysError, SmartLoadError, smart_load

EXAMPLES = int(os.environ.get("SMARTLOAD_EXAMPLES", "250"))
thorough = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES <= 250
)
pytestmark = pytest.mark.timeout(0)

SEGMENTS = ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_module"]
PLAIN = ["a", "b", "fc", "net", "0", "1", "submodule", "attn_module", "backbone"]
NAMESAKES = ["model", "module", "_orig_mod", "_module"]
SHAPES = [(), (1,), (2,), (2, 3)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

Path = tuple[str, ...]


@dataclass
class Net:
    """The plan of a network: its tensors by path, and which of them are one tensor."""

    tensors: dict[Path, tuple[int, ...]]
    tied: dict[Path, Path] = field(default_factory=dict)
    modules: list[Path] = field(default_factory=list)

    @property
    def namesakes(self) -> bool:
        return any(segment in SEGMENTS for path in self.modules for segment in path)


@st.composite
def nets(draw: st.DrawFn, names: list[str] = PLAIN + NAMESAKES) -> Net:
    net = Net({}, {}, [])

    def grow(path: Path, depth: int) -> None:
        net.modules.append(path)
        for name in draw(st.lists(st.sampled_from(["weight", "bias", "w"]), max_size=2, unique=True)):
            net.tensors[(*path, name)] = draw(st.sampled_from(SHAPES))
        if depth < 3:
            for name in draw(st.lists(st.sampled_from(names), max_size=3 - depth, unique=True)):
                grow((*path, name), depth + 1)

    grow((), 0)
    if not net.tensors:
        net.tensors[("weight",)] = (2,)
    if draw(st.integers(0, 4)) == 0:
        by_shape: dict[tuple[int, ...], Path] = {}
        for path, shape in net.tensors.items():
            if by_shape.setdefault(shape, path) != path:
                net.tied[path] = by_shape[shape]
                break
    return net


class Node(nn.Module):
    """A module with nothing of its own."""


def build(net: Net, dtype: torch.dtype) -> nn.Module:
    root = Node()
    parameters: dict[Path, nn.Parameter] = {}
    for path in net.modules:
        inner: nn.Module = root
        for name in path:
            if name not in inner._modules:
                inner.add_module(name, Node())
            inner = inner._modules[name]  # type: ignore[assignment]
    for number, (path, shape) in enumerate(net.tensors.items()):
        inner = root
        for name in path[:-1]:
            inner = inner._modules[name]  # type: ignore[assignment]
        value = parameters.get(net.tied.get(path, ()))
        parameters[path] = value if value is not None else nn.Parameter(torch.full(shape, -1.0 - number, dtype=dtype))
        inner.register_parameter(path[-1], parameters[path])
    return root


def wrapped(model: nn.Module, path: Path, kind: str) -> nn.Module:
    """The model with one of its modules in a wrapper."""
    wrap = {"dp": nn.DataParallel, "compile": torch.compile}[kind]
    if not path:
        return wrap(model)  # type: ignore[no-any-return]
    inner = model
    for name in path[:-1]:
        inner = inner._modules[name]  # type: ignore[assignment]
    inner._modules[path[-1]] = wrap(inner._modules[path[-1]])
    return model


def values(net: Net, dtype: torch.dtype, start: int = 1) -> dict[Path, torch.Tensor]:
    """What a training run left: a value of its own for every tensor."""
    found: dict[Path, torch.Tensor] = {}
    for number, (path, shape) in enumerate(net.tensors.items()):
        found[path] = (
            found[net.tied[path]] if path in net.tied else torch.full(shape, float(start + number), dtype=dtype)
        )
    return found


def dotted(state: dict[Path, torch.Tensor], inserted: dict[Path, list[str]], prefix: Path) -> dict[str, torch.Tensor]:
    """The keys, with wrapper segments behind some of the module paths and a prefix before all."""
    named = {}
    for path, value in state.items():
        segments = list(prefix)
        for end in range(len(path)):
            segments += [*inserted.get(path[:end], []), path[end]]
        named[".".join(segments)] = value
    return named


@dataclass
class Case:
    net: Net
    model: nn.Module
    tensors: dict[Path, torch.Tensor]
    """The model's own tensors."""
    truth: dict[Path, torch.Tensor]
    keys: dict[str, torch.Tensor]
    inserted: dict[Path, list[str]]
    prefix: Path
    own_wrappers: int


@st.composite
def cases(draw: st.DrawFn, names: list[str] = PLAIN + NAMESAKES) -> Case:
    net = draw(nets(names))
    model = build(net, draw(st.sampled_from(DTYPES)))
    plain = dict(model.named_parameters(remove_duplicate=False))
    tensors = {path: plain[".".join(path)] for path in net.tensors}
    outside_in = sorted(draw(st.lists(st.sampled_from(net.modules), max_size=2, unique=True)), key=len, reverse=True)
    for path in outside_in:
        for kind in draw(st.lists(st.sampled_from(["dp", "dp", "compile"]), min_size=1, max_size=2)):
            model = wrapped(model, path, kind)
            if kind == "compile":  # torch.compile of a compiled module is no module any more
                break
    truth = values(net, draw(st.sampled_from(DTYPES)))
    inserted = draw(
        st.dictionaries(
            st.sampled_from(net.modules), st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=3), max_size=3
        )
    )
    prefix = tuple(draw(st.lists(st.sampled_from(PLAIN + NAMESAKES), max_size=2)))
    stored = truth
    if net.tied and draw(st.booleans()):
        gone = draw(st.sampled_from([*net.tied, *net.tied.values()]))
        stored = {path: value for path, value in truth.items() if path != gone}
    return Case(net, model, tensors, truth, dotted(stored, inserted, prefix), inserted, prefix, len(outside_in))


def snapshot(case: Case) -> list[tuple[int, torch.Tensor]]:
    return [(id(tensor), tensor.detach().clone()) for tensor in case.tensors.values()]


def unchanged(case: Case, before: list[tuple[int, torch.Tensor]]) -> bool:
    return all(id(t) == i and torch.equal(t, old) for t, (i, old) in zip(case.tensors.values(), before))


def right(case: Case) -> bool:
    return all(torch.equal(case.tensors[path], case.truth[path].to(case.tensors[path].dtype)) for path in case.truth)


def attempt(case: Case, checkpoint: object, **arguments: object) -> SmartLoadError | None:
    """Load; None means right. Anything but a right load or a clean refusal fails."""
    note(f"model {list(case.model.state_dict())}\nfile {checkpoint}\n{arguments}")
    before, refusal = snapshot(case), None
    try:
        note(str(smart_load(case.model, checkpoint, **arguments)))  # type: ignore[arg-type]
    except SmartLoadError as error:
        refusal = error
    event(f"refused: {type(refusal).__name__}" if refusal else "loaded")
    note(str(refusal))
    if refusal is None:
        assert right(case), "a wrong load"
    else:
        assert unchanged(case, before)
        assert str(refusal).count("\n") < 25
    return refusal


def contained(draw: st.DrawFn, state: dict[str, torch.Tensor]) -> dict[str, object]:
    """The state dict as it is, or in a training checkpoint."""
    found: dict[str, object] = dict(state)
    for name in draw(st.lists(st.sampled_from(["state_dict", "model", "module", "net", "ckpt"]), max_size=2)):
        found = {"epoch": 3, name: found, "optimizer": {"state": {}, "param_groups": []}}
    return found


@thorough
@given(cases(PLAIN), st.data())
def test_whatever_wraps_it_loads(case: Case, data: st.DataObject) -> None:
    assert attempt(case, contained(data.draw, case.keys)) is None


@thorough
@given(cases(), st.data())
def test_real_modules_with_the_names_of_wrappers(case: Case, data: st.DataObject) -> None:
    attempt(case, contained(data.draw, case.keys))


@thorough
@given(cases(), st.data())
def test_what_is_spelled_as_the_model_spells_it_loads(case: Case, data: st.DataObject) -> None:
    state = dict(case.model.state_dict())
    by_key = dict(zip(state, own_paths(case)))
    checkpoint = contained(data.draw, {key: case.truth[path].clone() for key, path in by_key.items()})
    assert attempt(case, checkpoint) is None


def own_paths(case: Case) -> Iterator[Path]:
    """The path of each key of the model's state dict, by object."""
    for _, parameter in case.model.named_parameters(remove_duplicate=False):
        yield next(path for path, tensor in case.tensors.items() if tensor is parameter)


@thorough
@given(cases(), st.data())
def test_two_networks_are_ambiguous_unless_they_are_equal(case: Case, data: st.DataObject) -> None:
    same = data.draw(st.booleans())
    second = values(case.net, next(iter(case.truth.values())).dtype, start=1 if same else 500)
    inserted = data.draw(st.sampled_from([case.inserted, {}]))
    other = dotted(second, inserted, case.prefix)
    if data.draw(st.booleans()):
        checkpoint: dict[str, object] = {"first": dict(case.keys), "second": other}
    else:
        checkpoint = {
            f"{part}.{key}": v
            for part, state in (("student", case.keys), ("teacher", other))
            for key, v in state.items()
        }
    refusal = attempt(case, checkpoint)
    if not same:
        assert refusal is not None, "one of two was taken"
        assert isinstance(refusal, AmbiguousKeysError) or case.net.namesakes
    elif not case.net.namesakes:
        assert refusal is None


@thorough
@given(cases(PLAIN), st.data())
def test_ambiguous_only_where_two_parts_fit(case: Case, data: st.DataObject) -> None:
    """Another network beside the weights: with one more tensor, one less, or one of another shape."""
    second = values(case.net, torch.float32, start=500)
    at = data.draw(st.sampled_from(list(second)))
    kind = data.draw(st.sampled_from(["less", "more", "shape"]))
    if kind == "less" and (case.net.tied or len(second) == 1):
        kind = "more"
    if kind == "less":
        del second[at]
    elif kind == "more":
        second[(*at[:-1], "one_more")] = torch.ones(2)
    else:
        for path in second:
            if (
                path == at
                or case.net.tied.get(path) == at
                or case.net.tied.get(at) in (path, case.net.tied.get(path, at))
            ):
                second[path] = torch.full((5, 5), 7.0)
    checkpoint = {"first": dict(case.keys), "second": dotted(second, {}, ())}
    refusal = attempt(case, checkpoint)
    assert not isinstance(refusal, AmbiguousKeysError) or self_similar(case)
    if not self_similar(case):
        assert refusal is None


def self_similar(case: Case) -> bool:
    """Whether a corner of the network could be taken for the whole: then a file may hold it twice."""
    net = case.net
    for module in net.modules[1:]:
        size = len(module)
        corner = {(path[size:], shape) for path, shape in net.tensors.items() if path[:size] == module}
        # Of two tied names one is enough.
        lost = {path for path, shape in net.tensors.items() if (path, shape) not in corner}
        if all(other not in lost for path in lost for other in [twin(net, path)]):
            return True
    return False


def twin(net: Net, path: Path) -> Path:
    """The other name of a tied tensor; the name itself where it has no other."""
    back = {first: second for second, first in net.tied.items()}
    return net.tied.get(path) or back.get(path, path)


@thorough
@given(cases(), st.data())
def test_a_file_with_one_fault_is_refused(case: Case, data: st.DataObject) -> None:
    keys = dict(case.keys)
    at = data.draw(st.sampled_from(list(keys)))
    kind = data.draw(st.sampled_from(["less", "more", "shape", "renamed"]))
    if kind == "less" and case.net.tied:
        kind = "more"
    if kind == "less":
        del keys[at]
    elif kind == "more":
        keys[f"{at}_more"] = torch.ones(2)
    elif kind == "renamed":
        keys[f"{at}_new"] = keys.pop(at)
    else:
        keys[at] = torch.ones(7, 7)
    assert attempt(case, contained(data.draw, keys)) is not None


@thorough
@given(cases(), st.data())
def test_with_everything_allowed_no_tensor_lands_on_a_wrong_name(case: Case, data: st.DataObject) -> None:
    """Names that are unique in the network, so that what belongs where cannot be in doubt."""
    unique = {path: (*(f"{segment}{i}" for i, segment in enumerate(path)),) for path in case.net.tensors}
    net = Net({}, {}, [()])
    for number, (path, shape) in enumerate(case.net.tensors.items()):
        net.tensors[(*unique[path][:-1], f"{path[-1]}{number}")] = shape
    net.modules = sorted({path[:i] for path in net.tensors for i in range(len(path))}, key=len)
    model = build(net, torch.float32)
    plain = dict(model.named_parameters())
    truth = values(net, torch.float32)
    kept = data.draw(st.lists(st.sampled_from(list(truth)), unique=True, max_size=len(truth)))
    inserted = {(): [data.draw(st.sampled_from(SEGMENTS))]} if data.draw(st.booleans()) else {}
    state: dict[str, object] = dict(dotted({path: truth[path] for path in kept}, inserted, case.prefix))
    if data.draw(st.booleans()):
        state["something.else"] = torch.ones(2)
    note(f"{list(plain)} {list(state)}")
    before = {path: tensor.detach().clone() for path, tensor in ((p, plain[".".join(p)]) for p in net.tensors)}
    try:
        report = smart_load(model, state, allow_missing=["*"], allow_unexpected=["*"] if state else [])
    except SmartLoadError:
        event("refused")
        assert all(torch.equal(plain[".".join(path)], value) for path, value in before.items())
        return
    event("loaded")
    for path in net.tensors:
        key = ".".join(path)
        expected = before[path] if key in report.missing_keys else truth[path]
        assert torch.equal(plain[key], expected)
        assert key in report.missing_keys or path in kept
