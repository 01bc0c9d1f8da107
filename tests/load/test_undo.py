"""The log of a load: whatever happens to a model in between, it comes back the same, object for object, bit for bit."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from placing import look
from torch import nn

from smartload.load.undo import Undo


def network() -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    model(torch.randn(4, 3)).sum().backward()
    model.settings = {"a": [1, {2, 3}], "o": OrderedDict(b=[4])}  # type: ignore[assignment]
    return model


def settings(model: nn.Module) -> str:
    return repr(model.settings)


HARM: dict[str, Callable[[Any], object]] = {
    "values": lambda m: m[0].weight.detach().fill_(9),
    "buffer values": lambda m: m[1].running_mean.fill_(9),
    "memory": lambda m: setattr(m[0].weight, "data", torch.zeros(2, 3)),
    "dtype": lambda m: setattr(m[0].weight, "data", torch.zeros(2, 3, dtype=torch.float64)),
    "shape": lambda m: setattr(m[0].weight, "data", torch.zeros(7)),
    "strides": lambda m: setattr(m[0].weight, "data", m[0].weight.data.t().contiguous().t()),
    "gradient gone": lambda m: setattr(m[0].weight, "grad", None),
    "gradient moved": lambda m: setattr(m[0].weight.grad, "data", torch.zeros(2, 3)),
    "another gradient": lambda m: setattr(m[0].weight, "grad", torch.ones(2, 3)),
    "frozen": lambda m: m[0].weight.requires_grad_(False),
    "parameter replaced": lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(2, 3))),
    "buffer replaced": lambda m: setattr(m[1], "running_mean", torch.ones(2)),
    "buffer removed": lambda m: m[1]._buffers.pop("running_var"),
    "module replaced": lambda m: setattr(m, "0", nn.Linear(1, 1)),
    "attribute added": lambda m: setattr(m, "more", 1),
    "attribute removed": lambda m: delattr(m, "settings"),
    "nested list": lambda m: m.settings["a"].append(5),
    "nested set": lambda m: m.settings["a"][1].clear(),
    "nested dict": lambda m: m.settings["o"]["b"].clear(),
    "mode": lambda m: m.eval(),
    "attribute of a parameter": lambda m: setattr(m[0].weight, "tag", 1),
    "swapped": lambda m: torch.utils.swap_tensors(m[0].bias, nn.Parameter(torch.ones(2))),
    "hook": lambda m: m.register_forward_hook(lambda *_: None),
    "all to another dtype": lambda m: m.double(),
}


@pytest.mark.parametrize("harm", HARM)
def test_everything_comes_back(harm: str) -> None:
    model = network()
    before, names, plain = look(model), list(vars(model)), settings(model)
    modules = [id(module) for module in model.modules()]
    log = Undo(model.modules(), (), bits=True)
    HARM[harm](model)
    log.restore()
    assert look(model) == before
    assert list(vars(model)) == names
    assert settings(model) == plain
    assert [id(module) for module in model.modules()] == modules
    assert all(module.training for module in model.modules())
    assert not hasattr(model[0].weight, "tag")
    assert not model._forward_hooks
    model(torch.randn(4, 3)).sum().backward()


def test_values_alone_come_back_whatever_the_layout() -> None:
    base, large = torch.arange(16.0).reshape(4, 4), torch.arange(5000.0)
    tensors = [base[:, :2], base[:, 2:].t(), large, torch.empty(0), torch.tensor(3.0), torch.ones(2, 3).t()]
    before = [tensor.clone() for tensor in tensors]
    log = Undo((), (), bits=True, tensors=tensors)
    for tensor in tensors:
        tensor.add_(1)
    log.restore()
    assert all(map(torch.equal, tensors, before))


def test_without_bits_only_values_differ() -> None:
    model = network()
    before = look(model)
    log = Undo(model.modules(), (), bits=False)
    for name in HARM.keys() - {"values", "buffer values", "swapped"}:
        HARM[name](model) if name not in ("attribute removed", "nested list", "nested set", "nested dict") else None
        log.restore()
    assert look(model) == before
    HARM["values"](model)
    log.restore()
    assert model[0].weight.unique().tolist() == [9.0]


def test_optimizers_come_back() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.step()
    before = look(model, [optimizer])
    log = Undo(model.modules(), [optimizer], bits=True)
    for state in optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].double()
        state["more"] = 1
    log.restore()
    assert look(model, [optimizer]) == before


def test_lazy_parameters_become_lazy_again() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d())
    before = [(id(tensor), type(tensor)) for tensor in (*model.parameters(), *model.buffers())]
    log = Undo(model.modules(), (), bits=True)
    model(torch.randn(4, 3))
    assert not isinstance(model[0].weight, nn.UninitializedParameter)
    model[0].weight.grad = torch.zeros(2, 3)
    log.restore()
    assert [(id(tensor), type(tensor)) for tensor in (*model.parameters(), *model.buffers())] == before
    assert model[0].weight.requires_grad
    model[0].weight.materialize((2, 3))


def test_sparse_quantized_and_strided() -> None:
    model = nn.Module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.register_buffer("s", torch.eye(3).to_sparse())
        model.register_buffer("q", torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))
        model.register_buffer("t", torch.arange(6.0).reshape(2, 3).t())
        model.register_buffer("e", torch.ones(1).expand(4))
        model.register_buffer("c", torch.tensor([1 + 2j]).conj())
        log = Undo(model.modules(), (), bits=True)
        model.s.copy_(torch.ones(3, 3).to_sparse())
        model.q.copy_(torch.zeros(3))
        model.t.zero_()
        model.c.zero_()
        log.restore()
    assert torch.equal(model.s.to_dense(), torch.eye(3))
    assert model.q.int_repr().tolist() == [10, 10, 10]
    assert model.t.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert model.t.stride() == (1, 3)
    assert model.e.tolist() == [1.0] * 4
    assert model.c.item() == 1 - 2j


def test_buffers_with_a_history_are_asked_without_a_warning() -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(2))
    model.register_buffer("h", model.w * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log = Undo(model.modules(), (), bits=True)
        with torch.no_grad():
            model.h.zero_()
        log.restore()
    assert model.h.tolist() == [2.0, 2.0]


def test_a_class_that_cannot_be_copied_is_no_reason_to_refuse() -> None:
    class Stubborn(torch.Tensor):
        @staticmethod
        def __new__(cls) -> Any:
            return torch.Tensor._make_wrapper_subclass(cls, (2,))

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise NotImplementedError(func)

    model = nn.Module()
    model.register_buffer("w", Stubborn())
    model.register_buffer("v", torch.zeros(1))
    log = Undo(model.modules(), (), bits=True)
    model.v.fill_(1)
    log.restore()
    assert model.v.item() == 0
