"""What other loaders do with the same files: the first table of "Beside other loaders" in docs/recipes.md.

    python tests/thirdparty/peers.py

It prints the table, and fails where the page says something else. Wanted in the environment: timm, accelerate,
safetensors, transformers, lightning and mmengine, beside torch and smartload.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from smartload import AmbiguousKeysError, smart_load

# timm imports torchvision. One built for CUDA has no operators beside a torch for the CPU; none is needed here.
register = torch.library.register_fake
torch.library.register_fake = lambda op, *rest, **more: (
    (lambda function: function) if str(op).startswith("torchvision::") else register(op, *rest, **more)
)
warnings.simplefilter("ignore")

import accelerate  # noqa: E402
import lightning  # noqa: E402
import mmengine  # noqa: E402
import mmengine.runner  # noqa: E402
import safetensors.torch  # noqa: E402
import timm.models  # noqa: E402
import transformers  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
State = dict[str, torch.Tensor]


def fill(net: nn.Module) -> None:
    net.conv, net.bn, net.fc = nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.Linear(3, 2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        fill(self)


class Config(transformers.PretrainedConfig):
    model_type = "net"


class Pretrained(transformers.PreTrainedModel):
    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        fill(self)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass


class System(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        fill(self)


class Harm:
    def __reduce__(self) -> object:
        return os.mkdir, ("ran",)


# ------------------------------------------------------------------------------------------------------------ loaders


def consume(model: nn.Module, path: str) -> None:
    state = torch.load(path)
    consume_prefix_in_state_dict_if_present(state, "module.")
    model.load_state_dict(state)


def pretrained(model: nn.Module, path: str) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        Config(architectures=["Pretrained"]).save_pretrained(folder)
        os.link(path, f"{folder}/pytorch_model.bin")
        return Pretrained.from_pretrained(folder)


LOADERS: dict[str, Callable[[nn.Module, str], object]] = {
    "torch": lambda model, path: model.load_state_dict(torch.load(path)),
    "`consume_prefix`": consume,
    "timm": lambda model, path: timm.models.load_checkpoint(model, path),
    "accelerate": lambda model, path: accelerate.load_checkpoint_in_model(model, path),
    "safetensors": lambda model, path: safetensors.torch.load_model(model, path),
    "transformers": pretrained,
    "Lightning": lambda model, path: System.load_from_checkpoint(path),
    "mmengine": lambda model, path: mmengine.runner.load_checkpoint(model, path),
    "smartload": lambda model, path: smart_load(model, path),
}
BUILDERS = ("transformers", "Lightning")
"""They build the model themselves: it is neither wrapped before the load nor left over after an error."""

# -------------------------------------------------------------------------------------------------------------- files

SOURCE = Net()
for tensor in (*SOURCE.parameters(), *SOURCE.buffers()):
    tensor.data.copy_(torch.randint(1, 1000, tensor.shape))
STATE: State = SOURCE.state_dict()
OTHER: State = {name: value + 1 for name, value in STATE.items()}
tag: str | None = None
torch.serialization.register_package(0, lambda storage: tag, lambda storage, location: None)


def spelled(prefix: str) -> State:
    return {prefix + name: value for name, value in STATE.items()}


FILES: dict[str, list[object]] = {
    "`module.*`": [spelled("module.")],
    "`_orig_mod.*`, also around or inside `module.`": [
        spelled(prefix) for prefix in ("_orig_mod.", "module._orig_mod.", "_orig_mod.module.")
    ],
    "any other prefix: `net.*`, `backbone.*`": [spelled("net."), spelled("backbone.")],
    "a wrapper around one layer: `bn.module.weight`": [
        {name.replace("bn.", "bn.module."): value for name, value in STATE.items()}
    ],
    "plain, into a `DataParallel`": [STATE],
    "plain, into a compiled model": [STATE],
    'in `{"state_dict": ...}`': [{"epoch": 1, "state_dict": STATE}],
    'in `{"model": ...}`': [{"epoch": 1, "model": STATE}],
    'in `{"net": ...}`, or deeper': [{"epoch": 1, "net": STATE}, {"run": {"weights": STATE}}],
    "saved on `cuda:1`, on a machine without": [STATE],
    "a `Namespace` beside the weights": [{"state_dict": STATE, "args": argparse.Namespace(lr=0.1)}],
    "a numpy number beside the weights": [{"state_dict": STATE, "best": torch.ones(1).numpy()[0]}],
    "a whole pickled model": [SOURCE],
    "raw and averaged weights, both fit": [{"state_dict": STATE, "state_dict_ema": OTHER}],
    "a name is missing": [{name: value for name, value in STATE.items() if name != "fc.bias"}],
    "a name too many": [STATE | {"extra": torch.ones(1)}],
    "... after that error, the model is": [STATE | {"extra": torch.ones(1)}],
    "a fraction for an int": [STATE | {"bn.num_batches_tracked": torch.tensor(2.87)}],
    "a file that would run code": [STATE | {"extra": Harm()}],
}


def written(value: object, loader: str) -> str | None:
    """The file in the form that the loader is made for, or None where that form cannot hold it."""
    plain = isinstance(value, dict) and all(isinstance(each, torch.Tensor) for each in value.values())
    if loader == "safetensors":
        if not plain:
            return None
        safetensors.torch.save_file({name: each.clone() for name, each in value.items()}, "net.safetensors")
        return "net.safetensors"
    if loader == "Lightning" and isinstance(value, dict):
        value = ({"state_dict": value} if plain else value) | {"pytorch-lightning_version": lightning.__version__}
    torch.save(value, "net.ckpt")
    return "net.ckpt"


# ----------------------------------------------------------------------------------------------------------- outcomes


class Heard(logging.Handler):
    """Whether anybody was warned."""

    warned = False

    def emit(self, record: logging.LogRecord) -> None:
        Heard.warned = Heard.warned or record.levelno >= logging.WARNING


def holds(model: nn.Module, state: State) -> bool:
    found = zip(state.values(), model.state_dict().values(), strict=True)  # the same order under any names
    return all(torch.equal(wanted, value.cpu()) for wanted, value in found)


def outcome(row: str, value: object, loader: str) -> str:
    global tag
    target = "DataParallel" if "DataParallel" in row else "compile" if "compiled" in row else ""
    if loader in BUILDERS and (target or row.startswith("...")):
        return "–"
    tag = "cuda:1" if "cuda:1" in row else None
    path = written(value, loader)
    tag = None
    if path is None:
        return "–"
    model = Net()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    wrapped = {"DataParallel": nn.DataParallel, "compile": torch.compile}.get(target, lambda net: net)(model)
    Heard.warned, said = False, io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            result = LOADERS[loader](wrapped, path)
    except AmbiguousKeysError:
        return "asks"
    except BaseException:
        if row.startswith("..."):
            return "unchanged" if holds(model, before) else "half loaded"
        return "error"
    finally:
        if Path("ran").exists():
            raise SystemExit(f"{loader} ran code")
    if row.startswith("..."):
        return "–"
    loaded = result if loader in BUILDERS else model
    warned = Heard.warned or "do not match" in said.getvalue()
    if "averaged" in row and (holds(loaded, STATE) or holds(loaded, OTHER)):
        return "raw" if holds(loaded, STATE) else "averaged"
    if holds(loaded, STATE) and not row.startswith("a name too many"):
        return "yes"
    return "warns" if warned else "silent"


def cell(row: str, loader: str) -> str:
    found = sorted({outcome(row, value, loader) for value in FILES[row]})
    return " or ".join(found)


def main() -> int:
    """Print the table, and compare it with the page."""
    for name in ("", "accelerate", "transformers", "lightning", "mmengine", "timm"):
        logging.getLogger(name).addHandler(Heard())
    packages = (torch, timm, accelerate, safetensors, transformers, lightning, mmengine)
    print(", ".join(f"{package.__name__} {package.__version__}" for package in packages))
    lines = ["| the file | " + " | ".join(LOADERS) + " |", "| --- |" + " --- |" * len(LOADERS)]
    page = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for row in FILES:
            lines.append(f"| {row} | " + " | ".join(cell(row, loader) for loader in LOADERS) + " |")
    print("\n".join(lines))
    missing = [line for line in lines if line not in page]
    print("\nthe page says the same" if not missing else "\nnot on the page:\n" + "\n".join(missing))
    return bool(missing)


if __name__ == "__main__":
    raise SystemExit(main())
