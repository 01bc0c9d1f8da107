"""Whatever plain `model.load_state_dict(torch.load(path))` accepts, smart_load accepts with the same result."""

from __future__ import annotations

import copy
import io
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dtypes import DTYPES, dtype
from torch import nn

import smartload.load.strict
from smartload import AmbiguousKeysError, KeyMismatchError, PlacementError, SmartLoadError, inspect, smart_load

pytestmark = pytest.mark.filterwarnings(
    "ignore:B?Complex(Half|32) support", "ignore:Sparse .* tensor support", "ignore:.*quantiz", "ignore:Lazy modules"
)


class SetNote(nn.Module):
    """A module of whatever it is given: Parameters as they are, other tensors as buffers."""

    def __init__(self, **things: Any) -> None:
        super().__init__()
        self.log: list[object] = []
        for name, thing in things.items():
            if isinstance(thing, (nn.Parameter, nn.Module)) or thing is None:
                setattr(self, name, thing)
            else:
                self.register_buffer(name, thing)


def hooked() -> nn.Module:
    inner = SetNote(fc=nn.Linear(2, 2), norm=nn.BatchNorm1d(2))
    model = SetNote(first=nn.Linear(2, 2), inner=inner, tail=nn.Linear(2, 1))
    log = model.log

    def before(name: str) -> Callable[..., None]:
        return lambda state, prefix, meta, strict, *lists: log.append(
            (name, sorted(state), prefix, dict(meta), strict, lists)
        )

    def before_with_module(name: str) -> Callable[..., None]:
        return lambda module, state, prefix, *rest: log.append((name, type(module).__name__, sorted(state), prefix))

    def after(name: str) -> Callable[..., None]:
        return lambda module, keys: log.append((name, type(module).__name__, list(keys.missing_keys), [*keys[1]]))

    for name, module in model.named_modules():
        module._register_load_state_dict_pre_hook(before("pre " + name))
        module.register_load_state_dict_pre_hook(before_with_module("pre with module " + name))
        module.register_load_state_dict_post_hook(after("post " + name))
    return model


def post_hooked() -> nn.Module:
    model = SetNote(fc=nn.Linear(2, 2), tail=nn.Linear(2, 1))
    for module in (model.fc, model):
        module.register_load_state_dict_post_hook(lambda module, keys: model.log.append((type(module).__name__, keys)))
    return model


class Stated(SetNote):
    """A module with an extra state."""

    def __init__(self, state: object, **things: Any) -> None:
        super().__init__(**things)
        self.state = state

    def get_extra_state(self) -> object:
        return self.state

    def set_extra_state(self, state: object) -> None:
        self.state = state
        self.log.append(repr(state))


class Serialized(nn.Linear):
    """Stores "serialized" instead of its weight."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "serialized"] = destination.pop(prefix + "weight") + 1

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        state[prefix + "weight"] = state.pop(prefix + "serialized") - 1
        super()._load_from_state_dict(state, prefix, *rest)


class OwnLoad(nn.Linear):
    def load_state_dict(self, state: Any, strict: bool = False, assign: bool = False) -> Any:
        state = {key.removeprefix("old_"): value for key, value in state.items()}
        return super().load_state_dict(state, strict=strict, assign=assign)


class NarrowLoad(nn.Linear):
    def load_state_dict(self, state_dict: Any) -> Any:  # type: ignore[override]
        return super().load_state_dict(state_dict)


class HalfSaved(nn.Linear):
    """Its state dict has a copy in another dtype: nothing can be read into that copy."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self._register_state_dict_hook(
            lambda module, state, prefix, meta: state.update({prefix + "weight": self.weight.half()})
        )


class Quantizing(SetNote):
    """Turns the floats of a file into its own integers, by a pre-hook."""

    def __init__(self) -> None:
        super().__init__(w=torch.zeros(3, dtype=torch.int8))
        self._register_load_state_dict_pre_hook(self._quantize)

    def _quantize(self, state: Any, prefix: str, *rest: object) -> None:
        if state[prefix + "w"].is_floating_point():
            state[prefix + "w"] = (state[prefix + "w"] * 10).round().to(torch.int8)


class Tagged(torch.Tensor):
    """A subclass that notes which functions it went through."""

    calls: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls.append(getattr(func, "__name__", "?"))
        return super().__torch_function__(func, types, args, kwargs or {})


class Wrapped(torch.Tensor):
    """A wrapper subclass: its values lie in another tensor, twice as large."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapped:
        made: Wrapped = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner * 2
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            source = args[1].inner / 2 if isinstance(args[1], Wrapped) else args[1]
            args[0].inner.copy_(source * 2)
            return args[0]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten.alias.default):
            made = Wrapped(args[0].inner / 2)
            if func is not torch.ops.aten.clone.default:
                made.inner = args[0].inner
            return made
        raise NotImplementedError(func)


def shared() -> nn.Module:
    layer = nn.Linear(3, 3)
    return SetNote(one=layer, two=layer, norm=nn.BatchNorm1d(3))


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())


def quantized() -> nn.Module:
    return SetNote(q=torch.quantize_per_tensor(torch.randn(4), 0.1, 2, torch.qint8))


def of(**things: Callable[[], Any]) -> Callable[[], nn.Module]:
    return lambda: SetNote(**{name: make() for name, make in things.items()})


def parameter(make: Callable[[], torch.Tensor], requires_grad: bool = True) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(make(), requires_grad)


def bits_of(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    return lambda: torch.randint(0, 60, (6 * dtype.itemsize,), dtype=torch.uint8).view(dtype)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)),
    "hooks": hooked,
    "post hooks": post_hooked,
    "frozen": of(w=parameter(lambda: torch.randn(3), False), v=parameter(lambda: torch.randn(3))),
    "evaluation mode": lambda: nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)).eval(),
    "half": lambda: nn.Linear(3, 2).half(),
    "double": lambda: nn.Linear(3, 2).double(),
    "extra state, tensor": lambda: Stated(torch.randn(3), w=torch.randn(2)),
    "extra state, dict": lambda: Stated({"a": [1, {"t": torch.randn(2)}], "b": "text"}, inner=Stated((1, 2))),
    "shared": shared,
    "registered as None": of(w=lambda: torch.randn(2), gone=lambda: None),
    "saves its own way": lambda: nn.Sequential(Serialized(3, 2), nn.Linear(2, 2)),
    "loads its own way": lambda: OwnLoad(3, 2),
    "loads with one argument": lambda: NarrowLoad(3, 2),
    "state dict in half": lambda: nn.Sequential(HalfSaved()),
    "subclass": of(w=lambda: nn.Parameter(torch.randn(3).as_subclass(Tagged))),
    "sparse": of(s=lambda: torch.eye(3).mul(torch.randn(())).to_sparse()),
    "sparse csr": of(s=lambda: torch.eye(3).mul(torch.randn(())).to_sparse_csr()),
    "quantized": quantized,
    "complex": of(c=parameter(lambda: torch.randn(3, dtype=torch.complex64))),
    "conjugate": of(c=parameter(lambda: torch.randn(3, dtype=torch.complex64).conj())),
    "negated view": of(c=lambda: torch.randn(3, dtype=torch.complex64).conj().imag),
    "bool": of(b=lambda: torch.rand(9) > 0.5),
    "uint16": of(u=bits_of(torch.uint16), v=bits_of(torch.uint32), w=bits_of(torch.uint64)),
    "float8": of(**{name: bits_of(dtype(name)) for name in DTYPES if name.startswith("float8")}),
    "complex half": of(**{name: bits_of(dtype(name)) for name in DTYPES if name.endswith("complex32")}),
    "not contiguous": of(w=parameter(lambda: torch.randn(4, 3).t()), v=parameter(lambda: torch.randn(4, 6)[:, ::2])),
    "channels last": lambda: nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last),
    "a hole in the middle": of(v=parameter(lambda: torch.randn(40).as_strided((2, 3), (7, 2)))),
    "empty tensors": of(e=parameter(lambda: torch.empty(0, 3)), f=lambda: torch.empty(0, dtype=torch.int64)),
    "no tensors": lambda: nn.Sequential(nn.ReLU()),
    "one number": of(n=lambda: torch.tensor(3.0), m=parameter(lambda: torch.randn(1))),
    "lazy, seen": lambda: _initialised(lazy()),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
    "orthogonal": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)),
    "spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(3, 2)),
    "recurrent": lambda: nn.LSTM(3, 2, 2),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8),
    "scripted": lambda: torch.jit.script(nn.Sequential(nn.Linear(2, 2))),
    "traced graph": lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2))),
    "views of one storage": lambda: _views(),
    "names like methods": lambda: nn.ModuleDict({"relu": nn.Linear(2, 2), "Module": nn.Linear(2, 1)}),
}


def _initialised(model: nn.Module) -> nn.Module:
    model(torch.randn(4, 5))
    return model


def _views() -> nn.Module:
    base = torch.randn(10)
    return SetNote(a=nn.Parameter(base[:6]), b=nn.Parameter(base[4:]))


def build(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MODELS[name]()


def values(tensor: torch.Tensor) -> object:
    if nn.parameter.is_lazy(tensor):
        return "open"
    tensor = tensor.detach()
    if isinstance(tensor, Wrapped):
        return tensor.inner.tolist()
    if tensor.layout is not torch.strided:
        return tensor.to_dense().tolist()
    if tensor.is_quantized:
        return tensor.int_repr().tolist()
    plain = tensor.as_subclass(torch.Tensor).resolve_conj().resolve_neg().contiguous().reshape(-1)
    return plain.view(torch.uint8).tolist()


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def look(model: nn.Module) -> list[object]:
    """All that can be seen of a model, identities aside."""
    seen: list[object] = []
    for name, tensor in tensors(model).items():
        open_ = nn.parameter.is_lazy(tensor)
        shape = None if open_ else (tuple(tensor.shape), tensor.layout is torch.strided and tensor.stride())
        seen.append((name, type(tensor), tensor.dtype, shape, tensor.requires_grad, tensor.grad, values(tensor)))
    for name, module in model.named_modules():
        seen.append((name, module.training, repr(getattr(module, "state", None)), repr(getattr(module, "log", None))))
    return seen


def kept(model: nn.Module, load: Callable[[], object]) -> list[bool]:
    """Which tensors are the same objects after the load as before."""
    before = tensors(model)
    load()
    after = tensors(model)
    return [after[name] is tensor for name, tensor in before.items()]


@pytest.fixture(params=["file", "legacy", "object", "memory"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Any], Any]:
    """A function that brings a state dict to where smart_load gets it from."""

    def bring(state: Any) -> Any:
        if request.param == "memory":
            return state
        target = io.BytesIO() if request.param == "object" else tmp_path / "w.pt"
        torch.save(state, target, _use_new_zipfile_serialization=request.param != "legacy")
        if isinstance(target, io.BytesIO):
            target.seek(0)
        return target

    return bring


# What a file holds of these is no tensor made of bytes alone.
NOT_FROM_FILES = {"sparse", "sparse csr", "quantized"}
# Assigned from a file: without the bytes in between, and without the class, which is not imported.
PLAINER = {"not contiguous", "a hole in the middle", "negated view", "subclass"}


@pytest.mark.parametrize("name", MODELS)
def test_same_as_plain(name: str, source: Callable[[Any], Any]) -> None:
    state = build(name, 1).state_dict()
    plain, smart = build(name, 2), build(name, 2)
    given = source(copy.copy(state))
    if given is not state and not isinstance(given, dict) and name in NOT_FROM_FILES:
        with pytest.raises(SmartLoadError):
            smart_load(smart, given)
        assert look(smart) == look(plain)
        return
    identities = kept(plain, lambda: plain.load_state_dict(copy.copy(state)))
    random = torch.get_rng_state()
    result: list[Any] = []
    assert kept(smart, lambda: result.append(smart_load(smart, given))) == identities
    assert torch.equal(torch.get_rng_state(), random)
    missing, unexpected = result[0]
    assert (missing, unexpected) == ([], [])
    assert look(smart) == look(plain)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("views of one storage",)])
def test_same_as_plain_with_assign(name: str, source: Callable[[Any], Any]) -> None:
    if name == "loads with one argument":
        return
    state = build(name, 1).state_dict()
    plain, smart = build(name, 2), build(name, 2)
    given = source(copy.copy(state))
    in_memory = isinstance(given, dict)
    if not in_memory and name in NOT_FROM_FILES | PLAINER:
        return
    try:
        plain.load_state_dict(copy.copy(state), assign=True)
    except (RuntimeError, TypeError):  # what torch cannot assign, nobody can
        with pytest.raises(SmartLoadError):
            smart_load(smart, given, assign=True)
        assert look(smart) == look(build(name, 2))
        return
    smart_load(smart, given, assign=True)
    assert look(smart) == look(plain)
    if in_memory and name != "saves its own way":
        theirs, ours = tensors(plain), tensors(smart)
        assert [a.data_ptr() if a.layout is torch.strided else 0 for a in theirs.values()] == [
            b.data_ptr() if b.layout is torch.strided else 0 for b in ours.values()
        ]


@pytest.mark.parametrize("name", ["plain", "hooks", "shared", "extra state, dict", "lazy, seen", "subclass", "bool"])
def test_swap_tensors_mode(name: str, source: Callable[[Any], Any]) -> None:
    state = build(name, 1).state_dict()
    given = source(copy.copy(state))
    plain, smart = build(name, 2), build(name, 2)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        plain.load_state_dict(state)
        smart_load(smart, given)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert look(smart) == look(plain)


def test_a_wrapper_subclass() -> None:
    plain, smart = (SetNote(w=nn.Parameter(Wrapped(torch.ones(3)))) for _ in range(2))
    state = {"w": torch.tensor([4.0, 5.0, 6.0])}
    plain.load_state_dict(state)
    parameter = smart.w
    smart_load(smart, state)
    assert smart.w is parameter
    assert values(smart.w) == values(plain.w) == [8.0, 10.0, 12.0]


def test_a_wrapper_subclass_comes_back_after_a_failure() -> None:
    model = SetNote(w=nn.Parameter(Wrapped(torch.ones(3))), v=torch.zeros(2))

    def fail(module: object, keys: object) -> None:
        raise ValueError("late")

    model.register_load_state_dict_post_hook(fail)
    with pytest.raises(SmartLoadError):
        smart_load(model, {"w": torch.tensor([4.0, 5.0, 6.0]), "v": torch.ones(2)})
    assert values(model.w) == [2.0, 2.0, 2.0]
    assert model.v.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("state_of", ["initialised", "lazy"])
def test_lazy_modules(state_of: str, source: Callable[[Any], Any]) -> None:
    state = build("lazy, seen", 1).state_dict() if state_of == "initialised" else lazy().state_dict()
    given = source(state)
    plain, smart = lazy(), lazy()
    plain.load_state_dict(copy.copy(state))
    if state_of == "lazy" and not isinstance(given, dict):
        with pytest.raises(SmartLoadError):
            smart_load(smart, given)  # an uninitialised parameter has no bytes that could lie in a file
        return
    before = dict(smart.named_parameters())
    smart_load(smart, given)
    assert look(smart) == look(plain)
    assert all(tensor is before[name] for name, tensor in smart.named_parameters())


def test_a_floating_quantizing_model_gets_what_its_hook_makes(source: Callable[[Any], Any]) -> None:
    plain, smart = Quantizing(), Quantizing()
    state = {"w": torch.tensor([0.15, 1.26, -2.0])}
    plain.load_state_dict(dict(state))
    smart_load(smart, source(state))
    assert smart.w.tolist() == plain.w.tolist() == [2, 13, -20]


def test_zero_dimensions_against_one_element(source: Callable[[Any], Any]) -> None:
    plain, smart = SetNote(n=torch.tensor(0.0)), SetNote(n=torch.tensor(0.0))
    plain.load_state_dict({"n": torch.tensor([7.0])})
    smart_load(smart, source({"n": torch.tensor([7.0])}))
    assert smart.n.shape == plain.n.shape == ()
    assert smart.n.item() == 7.0
    with pytest.raises(KeyMismatchError):
        smart_load(SetNote(n=torch.zeros(1)), source({"n": torch.tensor(7.0)}))


@pytest.mark.parametrize("version", [1, 2, None, "no metadata"])
@pytest.mark.parametrize("counted", [True, False])
def test_batch_norm_of_all_ages(version: Any, counted: bool, source: Callable[[Any], Any]) -> None:
    torch.manual_seed(1)
    state: Any = nn.BatchNorm1d(2).state_dict()
    state["running_mean"] = torch.randn(2)
    state["num_batches_tracked"] = torch.tensor(5)
    if not counted:
        del state["num_batches_tracked"]
    if version == "no metadata":
        state = dict(state)
    else:
        state._metadata[""] = {} if version is None else {"version": version}
    plain, smart = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    smart.num_batches_tracked.fill_(3)
    plain.num_batches_tracked.fill_(3)
    try:
        plain.load_state_dict(copy.copy(state))
    except RuntimeError:
        with pytest.raises(KeyMismatchError):
            smart_load(smart, source(state))
        assert smart.running_mean.tolist() == [0.0, 0.0]
    else:
        smart_load(smart, source(state))
        assert look(smart) == look(plain)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_extra_states_are_strict(change: str, source: Callable[[Any], Any]) -> None:
    model = Stated({"a": 1}, w=torch.zeros(2))
    state: Any = Stated({"a": 2}, w=torch.ones(2)).state_dict()
    state = {key: value for key, value in state.items() if key != "_extra_state" or change != "missing"}
    if change == "unexpected":
        model = SetNote(w=torch.zeros(2))  # type: ignore[assignment]
    before = look(model)
    with pytest.raises(RuntimeError):
        copy.deepcopy(model).load_state_dict(state)
    with pytest.raises(KeyMismatchError, match="_extra_state"):
        smart_load(model, source(state))
    assert look(model) == before


def test_one_alias_updated_wins_over_the_models_own() -> None:
    smart = shared()
    state = smart.state_dict()
    state.update({"one.weight": torch.ones(3, 3), "norm.running_mean": torch.arange(3.0)})
    smart_load(smart, state)
    assert smart.get_submodule("two").weight.tolist() == torch.ones(3, 3).tolist()
    with pytest.raises(AmbiguousKeysError):
        smart_load(smart, {**state, "two.weight": torch.zeros(3, 3)})


def test_a_live_optimizer_keeps_working(source: Callable[[Any], Any]) -> None:
    def steps(load: Callable[[nn.Module, Any], object]) -> list[object]:
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        x = torch.randn(4, 3)
        for turn in range(4):
            if turn == 2:
                load(model, {key: value.clone() for key, value in state.items()})
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
        return look(model)[:4]

    state = build("plain", 1).state_dict()
    torch.manual_seed(9)
    state = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).state_dict()

    def same(one: object, other: object) -> bool:
        return repr(one) == repr(other)

    assert same(steps(lambda m, s: m.load_state_dict(s)), steps(lambda m, s: smart_load(m, source(s))))


def test_backward_over_a_load_is_refused_as_by_torch(source: Callable[[Any], Any]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    loss = model(torch.ones(1, 2)).sum()
    smart_load(model, source(copy.deepcopy(model.state_dict())))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_callers_dict_and_its_metadata_are_not_touched() -> None:
    state: Any = build("hooks", 1).state_dict()
    state._metadata["inner"]["assign_to_params_buffers"] = True  # left there by an earlier load with assign=True
    metadata = copy.deepcopy(state._metadata)
    held = dict(state)
    versions = {key: value._version for key, value in state.items()}
    for assign in (False, True):
        smart_load(build("hooks", 2), state, assign=assign)
    assert list(state) == list(held)
    assert all(state[key] is value for key, value in held.items())
    assert state._metadata == metadata
    assert {key: value._version for key, value in state.items()} == versions


def test_assign_from_a_file_keeps_ties_and_flags(tmp_path: Path) -> None:
    layer = nn.Linear(3, 3, dtype=torch.float64)
    torch.save(SetNote(one=layer, two=layer, norm=nn.BatchNorm1d(3)).state_dict(), tmp_path / "w.pt")
    one, two = nn.Linear(3, 3), nn.Linear(3, 3)
    two.weight, two.bias = one.weight, one.bias  # tied tensor by tensor: each is assigned by its own module
    model = SetNote(one=one, two=two, norm=nn.BatchNorm1d(3))
    model.get_submodule("one").weight.requires_grad_(False)
    old = model.get_submodule("one").weight
    smart_load(model, tmp_path / "w.pt", assign=True)
    one, two = model.get_submodule("one").weight, model.get_submodule("two").weight
    assert one is two
    assert one is not old
    assert model.get_submodule("one").bias is model.get_submodule("two").bias
    assert (one.dtype, one.requires_grad) == (torch.float64, False)
    assert model.get_submodule("one").bias.requires_grad


def test_assign_does_not_tie_what_the_model_has_apart(tmp_path: Path) -> None:
    tied = nn.Linear(3, 3)
    torch.save(nn.Sequential(tied, tied).state_dict(), tmp_path / "w.pt")
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight.requires_grad_(False)
    smart_load(model, tmp_path / "w.pt", assign=True)
    assert model[0].weight is not model[1].weight
    assert (model[0].weight.requires_grad, model[1].weight.requires_grad) == (True, False)


def test_inference_mode(source: Callable[[Any], Any]) -> None:
    state = build("plain", 1).state_dict()
    given = source(state)
    with torch.inference_mode():
        born_there = build("plain", 2)
        smart_load(born_there, given)
    assert look(born_there)[:4] == look(build("plain", 1))[:4]
    if isinstance(given, io.BytesIO):
        given.seek(0)
    smart = build("plain", 2)
    with torch.inference_mode():
        smart_load(smart, given)
    assert look(smart) == look(build("plain", 1))
    before = look(born_there)
    with pytest.raises(PlacementError, match=r"made in inference mode, and nothing may write to them outside of it"):
        smart_load(born_there, build("plain", 3).state_dict())
    assert look(born_there) == before


@pytest.mark.parametrize("name", ["plain", "hooks", "bool", "float8", "not contiguous", "shared"])
def test_surroundings_do_not_matter(name: str, source: Callable[[Any], Any]) -> None:
    state = build(name, 1).state_dict()
    given = source(state)
    plain, smart = build(name, 2), build(name, 2)
    plain.load_state_dict(state)
    failures: list[BaseException] = []

    def load() -> None:
        try:
            smart_load(smart, given)
        except BaseException as failure:
            failures.append(failure)

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load()
            assert not failures
            assert look(smart) == look(plain)
            thread = threading.Thread(target=load)
            thread.start()
            thread.join()
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    assert not failures


def test_expanded_parameters_are_refused_as_by_torch(source: Callable[[Any], Any]) -> None:
    model = SetNote(w=nn.Parameter(torch.zeros(1).expand(3)), v=torch.zeros(2))
    state = {"w": torch.ones(3), "v": torch.ones(2)}
    with pytest.raises(RuntimeError, match="single memory location"):
        model.load_state_dict(state)
    model.v.zero_()
    with pytest.raises(KeyMismatchError, match="single memory location"):
        smart_load(model, source(state))
    assert model.v.tolist() == [0.0, 0.0]


def test_an_expanded_tensor_in_the_file_is_no_trouble(source: Callable[[Any], Any]) -> None:
    model = SetNote(w=nn.Parameter(torch.zeros(3, 2)))
    smart_load(model, source({"w": torch.tensor([[5.0, 6.0]]).expand(3, 2)}))
    assert model.w.tolist() == [[5.0, 6.0]] * 3


def test_buffers_with_a_history_give_no_warning(source: Callable[[Any], Any]) -> None:
    model = SetNote(w=nn.Parameter(torch.ones(2)))
    model.register_buffer("h", model.w * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        smart_load(model, source({"w": torch.zeros(2), "h": torch.zeros(2)}))
    assert model.h.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("wide", [True, False])
def test_many_children_take_the_short_road_to_the_same_end(
    wide: bool, source: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smartload.load.strict, "MAX_FILTER_STEPS", 0 if wide else 1 << 60)
    for name in ("plain", "shared", "recurrent", "channels last"):
        state = build(name, 1).state_dict()
        plain, smart = build(name, 2), build(name, 2)
        plain.load_state_dict(state)
        report = smart_load(smart, source(state))
        assert look(smart) == look(plain)
        told = "each module loaded its own keys" in str(report)
        assert told is (wide and bool(list(plain.children())))
    for name in ("plain", "recurrent"):
        plain, smart = build(name, 2), build(name, 2)
        plain.load_state_dict(build(name, 1).state_dict(), assign=True)
        smart_load(smart, source(build(name, 1).state_dict()), assign=True)
        assert look(smart) == look(plain)


def test_the_short_road_ends_in_torchs_own_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smartload.load.strict, "MAX_FILTER_STEPS", 0)
    model = SetNote(w=nn.Parameter(torch.zeros(1).expand(3)))
    with pytest.raises(KeyMismatchError, match="single memory location"):
        smart_load(model, {"w": torch.ones(3)})


# --------------------------------------------------------------------- torch's own ways, through a replaced method


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """torch.nn.Module.load_state_dict is a thin call of smart_load that ends in the original."""
    original, busy, reports = nn.Module.load_state_dict, threading.local(), []

    def load_state_dict(self: nn.Module, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        if getattr(busy, "now", False):
            return original(self, state_dict, strict=strict, assign=assign)
        busy.now = True
        try:
            reports.append(smart_load(self, state_dict, assign=assign))
        finally:
            busy.now = False
        return reports[-1]

    monkeypatch.setattr(nn.Module, "load_state_dict", load_state_dict)
    yield reports
    assert reports


def test_torch_result_and_errors(replaced: list[object]) -> None:
    layer = nn.Linear(2, 1)
    missing, unexpected = layer.load_state_dict({"weight": torch.ones(1, 2), "bias": torch.ones(1)})
    assert (missing, unexpected) == ([], [])
    for state, text in [
        ({"weight": torch.ones(1, 2)}, "bias"),
        ({**layer.state_dict(), "extra": torch.ones(1)}, "extra"),
        ({**layer.state_dict(), "bias.x": torch.ones(1)}, "bias.x"),
        ({"weight": torch.ones(2, 1), "bias": torch.ones(1)}, r"\[2, 1\]"),
    ]:
        with pytest.raises(RuntimeError, match=text):
            layer.load_state_dict(state)
    assert layer.weight.tolist() == [[1.0, 1.0]]


def test_torch_type_errors(replaced: list[object]) -> None:
    layer = nn.Linear(2, 1)
    layer.load_state_dict(layer.state_dict())
    with pytest.raises((TypeError, RuntimeError)):
        layer.load_state_dict(2)
    with pytest.raises(RuntimeError):
        layer.load_state_dict({"weight": [[1.0, 2.0]], "bias": torch.ones(1)})


def test_torch_custom_module_with_own_names(replaced: list[object]) -> None:
    class Custom(nn.Module):
        def __init__(self, *nested: nn.Module) -> None:
            super().__init__()
            self.param = nn.Parameter(torch.ones(1))
            self.sub = nested[0] if nested else nn.Linear(1, 1)

        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            destination[prefix + "serialized"] = self.param.data + 1

        def _load_from_state_dict(self, state: Any, prefix: str, meta: Any, strict: bool, *lists: Any) -> None:
            with torch.no_grad():
                self.param.copy_(state[prefix + "serialized"] - 1)

    model, other = Custom(Custom()), Custom(Custom())
    model.param.data[0] = 10
    model.sub.param.data[0] = 20
    model.sub.sub.weight.data[0] = 30
    other.load_state_dict(model.state_dict())
    assert (other.param.item(), other.sub.param.item(), other.sub.sub.weight.item()) == (10, 20, 30)


def test_torch_hooks_see_and_change_the_state_dict(replaced: list[object]) -> None:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.new = nn.Parameter(torch.zeros(2))
            self._register_load_state_dict_pre_hook(self._rename)
            self.register_load_state_dict_post_hook(self._forgive)

        def _rename(self, state: Any, prefix: str, *rest: Any) -> None:
            if prefix + "old" in state:
                state[prefix + "new"] = state.pop(prefix + "old") * 2

        @staticmethod
        def _forgive(module: nn.Module, keys: Any) -> None:
            keys.missing_keys.clear()

    model = nn.Sequential(Renamed(), nn.Linear(1, 1))
    model.load_state_dict({"0.old": torch.ones(2), "1.weight": torch.ones(1, 1), "1.bias": torch.ones(1)})
    assert model[0].new.tolist() == [2.0, 2.0]


def test_torch_post_hooks_must_not_return(replaced: list[object]) -> None:
    layer = nn.Linear(1, 1)
    layer.load_state_dict(layer.state_dict())
    layer.register_load_state_dict_post_hook(lambda module, keys: keys)
    with pytest.raises(AssertionError, match="to return new values"):
        layer.load_state_dict(layer.state_dict())


def test_torch_module_containers(replaced: list[object]) -> None:
    model = nn.ModuleDict({"a": nn.ParameterList([nn.Parameter(torch.ones(2))]), "b": nn.ModuleList([nn.Linear(1, 1)])})
    model["p"] = nn.ParameterDict({"x": nn.Parameter(torch.ones(1)), "y": nn.Parameter(torch.ones(2))})
    state = OrderedDict((key, torch.full_like(value, 3.0)) for key, value in model.state_dict().items())
    model.load_state_dict(state)
    assert {value.unique().item() for value in model.state_dict().values()} == {3.0}


def test_torch_assign(replaced: list[object]) -> None:
    layer = nn.Linear(2, 1)
    state = {"weight": nn.Parameter(torch.ones(1, 2), requires_grad=False), "bias": torch.ones(1, dtype=torch.float64)}
    layer.load_state_dict(state, assign=True)
    assert layer.weight is state["weight"]
    assert layer.weight.requires_grad
    assert layer.bias.data_ptr() == state["bias"].data_ptr()
    with torch.device("meta"):
        hollow = nn.Linear(2, 1)
    hollow.load_state_dict({key: value.detach() for key, value in state.items()}, assign=True)
    assert not hollow.weight.is_meta


def test_torch_extra_state_by_a_type_that_is_no_tensor(replaced: list[object]) -> None:
    for state in ("text", 5, None, [1, 2], torch.ones(2), {"a": torch.ones(1)}):
        model = nn.Sequential(Stated(None), nn.Linear(1, 1))
        model.load_state_dict(nn.Sequential(Stated(state), nn.Linear(1, 1)).state_dict())
        assert repr(model[0].state) == repr(state)


def test_a_state_dict_of_copies_costs_no_digits(source: Callable[[Any], Any]) -> None:
    torch.manual_seed(1)
    state = {"0.weight": torch.randn(2, 2) * 1e6, "0.bias": torch.randn(2)}
    plain, smart = build("state dict in half", 2), build("state dict in half", 2)
    plain.load_state_dict(dict(state))
    smart_load(smart, source(state))
    assert look(smart) == look(plain)


# --------------------------------------------------------------------- extra states that are modules


class Keeping(nn.Module):
    """Registers its extra state as a child, where that is a module: torch then loads the keys below it as well."""

    def __init__(self, kept: object) -> None:
        super().__init__()
        self.kept = kept

    def get_extra_state(self) -> object:
        return self.kept

    def set_extra_state(self, state: object) -> None:
        self.kept = state


KEPT: dict[str, Callable[[], object]] = {
    "text": lambda: "something",
    "a state dict": lambda: nn.Linear(2, 2).state_dict(),
    "dicts of state dicts": lambda: {"model": nn.Linear(2, 2).state_dict(), "ema": {"w": torch.ones(2)}},
    "a module": lambda: nn.Linear(2, 2),
    "a module in a dict": lambda: {"model": nn.Linear(2, 2)},
    "one like it": lambda: Keeping(3),
    "a nest of them": lambda: Keeping(Keeping(nn.Linear(1, 1))),
}


@pytest.mark.parametrize("above", ["", "0."])
@pytest.mark.parametrize("name", KEPT)
def test_an_extra_state_that_is_a_module_or_holds_state_dicts(name: str, above: str) -> None:
    def build(kept: object) -> nn.Module:
        return nn.Sequential(Keeping(kept), nn.Linear(1, 1)) if above else Keeping(kept)

    state = build(KEPT[name]()).state_dict()
    plain, smart = build("else"), build("else")
    plain.load_state_dict(state)
    report = smart_load(smart, state)
    for model in (plain, smart):
        kept = model[0].kept if isinstance(model, nn.Sequential) else model.kept
        assert kept is state[above + "_extra_state"]
    assert list(smart.state_dict()) == list(plain.state_dict())
    assert report.plan.pairs.keys() == state.keys()
    assert list(inspect(state).parts) == [""]


def test_a_module_as_extra_state_without_all_its_keys_changes_nothing() -> None:
    state = Keeping(nn.Linear(2, 2)).state_dict()
    del state["kept.bias"]
    model = Keeping("else")
    with pytest.raises(RuntimeError, match=r"kept\.bias"):
        model.load_state_dict(state)
    model = Keeping("else")
    with pytest.raises(KeyMismatchError, match=r"kept\.bias"):
        smart_load(model, state)
    assert model.kept == "else"
    assert not model._modules
