"""Optimizers made before the load: they keep their grip, and their state follows where it was asked to."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from placing import devices, look, network, same_values
from tagging import saved
from torch import nn

from smartload import SmartLoadError, smart_load

Optimizer = torch.optim.Optimizer
KINDS: list[Callable[[Iterator[nn.Parameter]], Optimizer]] = [
    lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    lambda parameters: torch.optim.AdamW(parameters, lr=0.1, amsgrad=True),
    lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    lambda parameters: torch.optim.RMSprop(parameters, lr=0.1, centered=True),
]


def stepped(model: nn.Module, kind: Callable[[Iterator[nn.Parameter]], Optimizer] = KINDS[0]) -> Optimizer:
    optimizer = kind(model.parameters())
    step(model, optimizer)
    return optimizer


def step(model: nn.Module, optimizer: Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def places(optimizer: Optimizer) -> dict[str, set[str]]:
    """Name of a piece of state -> the devices on which it lies."""
    seen: dict[str, set[str]] = {}
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                seen.setdefault(name, set()).add(str(value.device))
    return seen


@pytest.mark.parametrize("kind", KINDS, ids=["adam", "adamw", "sgd", "rmsprop"])
def test_the_state_follows_and_the_next_step_is_the_same(
    cuda2: object, kind: Callable[[Iterator[nn.Parameter]], Optimizer]
) -> None:
    model, twin, source = network(1), network(1), network()
    optimizer, other = stepped(model, kind), stepped(twin, kind)
    smart_load(model, saved(source.state_dict(), "cuda:1"), "cuda:1", optimizer=optimizer)
    smart_load(twin, source.state_dict(), optimizer=other)
    reached = places(optimizer)
    assert reached.pop("step", {"cpu"}) == {"cpu"}
    assert set().union(*reached.values()) == {"cuda:1"}
    step(model, optimizer)
    step(twin, other)
    for mine, theirs in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(mine.cpu(), theirs)


def test_the_state_lies_where_torchs_own_loading_would_put_it(cuda2: object) -> None:
    model, twin = network(1), network(1)
    optimizer, other = stepped(model), stepped(twin)
    for group in (*optimizer.param_groups, *other.param_groups):
        group["capturable"] = True  # then the counter of steps lies beside the parameter
    smart_load(model, network().state_dict(), "cuda:1", optimizer=optimizer)
    twin.to("cuda:1")
    other.load_state_dict(other.state_dict())
    assert places(optimizer) == places(other)
    assert places(optimizer)["step"] == {"cuda:1"}


def test_without_it_the_state_stays_and_torch_complains(cuda2: object) -> None:
    model = network(1)
    optimizer = stepped(model)
    smart_load(model, network().state_dict(), "cuda:1")
    assert set().union(*places(optimizer).values()) == {"cpu"}
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        step(model, optimizer)
    smart_load(model, network().state_dict(), optimizer=optimizer)
    step(model, optimizer)


def test_several_optimizers_follow(cuda2: object) -> None:
    model = network(1)
    first = torch.optim.Adam(model[0].parameters())
    second = torch.optim.SGD(model[3].parameters(), lr=0.1, momentum=0.9)
    for optimizer in (first, second):
        step(model, optimizer)
    smart_load(model, network().state_dict(), "cuda:1", optimizer=(each for each in (first, second)))
    assert places(first)["exp_avg"] == places(second)["momentum_buffer"] == {"cuda:1"}


def test_each_piece_of_state_goes_to_its_own_parameter(cuda2: object) -> None:
    model = network(1)
    optimizer = stepped(model)
    model.get_submodule("out").to("cuda:1")
    smart_load(model, network().state_dict(), optimizer=optimizer)
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].device == parameter.device
    assert devices(model) == {"cpu", "cuda:1"}


def test_nested_state_follows(cuda2: object) -> None:
    """LBFGS keeps lists of tensors."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.LBFGS(model.parameters())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(torch.ones(3, 2)) ** 2).sum()
        loss.backward()
        return loss.detach()  # of one with a gradient, the optimizer of torch 2.8 makes a warning

    optimizer.step(closure)
    state = optimizer.state[model.weight]
    assert isinstance(state["old_dirs"], list)
    assert state["old_dirs"]
    smart_load(model, nn.Linear(2, 1).state_dict(), "cuda:1", optimizer=optimizer)
    assert {str(value.device) for value in optimizer.state[model.weight]["old_dirs"]} == {"cuda:1"}


@pytest.mark.parametrize("undo", [True, False])
def test_after_a_failure_the_state_is_as_it_was(cuda2: object, undo: bool) -> None:
    model = network(1)
    optimizers = [stepped(model), stepped(model, KINDS[2])]

    def fail(*args: object) -> None:
        assert places(optimizers[0])["exp_avg"] == {"cuda:1"}
        raise ValueError("no")

    model.register_load_state_dict_pre_hook(fail)
    before = look(model, optimizers)
    with pytest.raises(SmartLoadError):
        smart_load(model, network().state_dict(), "cuda:1", optimizer=optimizers, undo=undo)
    assert look(model, optimizers) == before
    step(model, optimizers[0])


def test_a_refusal_does_not_touch_it(cuda2: object) -> None:
    model = network(1)
    optimizer = stepped(model)
    before = look(model, [optimizer])
    with pytest.raises(SmartLoadError):
        smart_load(model, {"fc.weight": torch.ones(1)}, "cuda:1", optimizer=optimizer)
    assert look(model, [optimizer]) == before


def test_the_moments_themselves_are_not_reset(cuda2: object) -> None:
    model = network(1)
    optimizer = stepped(model)
    parameter = next(model.parameters())
    moment = optimizer.state[parameter]["exp_avg"].clone()
    smart_load(model, network().state_dict(), "cuda:1", optimizer=optimizer)
    assert torch.equal(optimizer.state[parameter]["exp_avg"].cpu(), moment)
    assert optimizer.param_groups[0]["params"][0] is parameter
    assert same_values(model, network())


@pytest.mark.parametrize("wrong", ["adam", [1], nn.Linear(1, 1)])
def test_what_is_no_optimizer_is_a_type_error(wrong: object) -> None:
    model = network(1)
    before = look(model)
    with pytest.raises(TypeError, match=r"^optimizer must be a torch\.optim\.Optimizer or several of them, got "):
        smart_load(model, network().state_dict(), optimizer=wrong)  # type: ignore[arg-type]
    assert look(model) == before
