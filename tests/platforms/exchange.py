"""Files that one torch writes, and another reads, bit for bit.

    python tests/platforms/exchange.py write FOLDER     # with one Python and torch
    python tests/platforms/exchange.py read FOLDER      # with any other; exits with 1 where a value is another

`write` writes a checkpoint of each kind that the running torch can write, and `expected.json`: the model that each
is for, and every value that the model must then have. `read` builds that model anew, loads, and compares.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import torch
from dtypes import DTYPES, dtype
from formats import FORMATS, Shadow
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations

from smartload import UnreadableError, smart_load

State = Mapping[str, torch.Tensor]
HERE = f"Python {platform.python_version()}, torch {torch.__version__}, {sys.platform}"


class Holder(nn.Module):
    """One buffer of any dtype."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("v", value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def network() -> nn.Module:
    layers = {"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4), "fc": nn.Linear(4, 2)}
    return nn.ModuleDict({"body": nn.ModuleDict(layers), "embed": nn.Embedding(5, 4)})


def tied() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "out": nn.Linear(4, 5, bias=False)})
    model["out"].weight = model["embed"].weight  # type: ignore[assignment]
    return model


def attention() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "network": network,
    "tied": tied,
    "attention": attention,
    "recurrent": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(3, 2)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(3, 2)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(3, 3)),
    "lazy": lambda: nn.LazyLinear(2),
}
"""What both sides can build by themselves; any other model is made of the names in `expected.json`."""


def numbers(state: State) -> dict[str, torch.Tensor]:
    """Values that are easily told apart, in place of those that a new model has."""
    return {
        key: (torch.arange(value.numel()) * 0.37 + len(key)).view(value.shape).to(value.dtype)
        for key, value in state.items()
    }


def filled(model: nn.Module) -> nn.Module:
    model.load_state_dict(numbers(model.state_dict()))
    return model


# -------------------------------------------------------------------------------------------------------------- write


class Writer:
    """Writes cases into a folder, and notes what each must give."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cases: dict[str, dict[str, Any]] = {}

    def case(self, name: str, model: str, want: State, write: Callable[[Path], object]) -> None:
        """Write one checkpoint; `write` gets an empty folder, and gives the path in it that is to be loaded."""
        folder = self.folder / f"{len(self.cases):03}"
        folder.mkdir(parents=True)
        path = write(folder)
        if isinstance(path, Path):  # not a file object
            state = {key: encoded(value) for key, value in want.items()}
            self.cases[name] = {"path": path.relative_to(self.folder).as_posix(), "model": model, "state": state}
        else:
            folder.rmdir()

    def saved(self, name: str, model: str, want: State, content: object) -> None:
        """Write `content` by torch.save, as a zip and in the form of before 1.6."""
        for form in ("zip", "legacy"):

            def write(folder: Path, form: str = form) -> Path:
                torch.save(content, folder / "x.pt", _use_new_zipfile_serialization=form == "zip")
                return folder / "x.pt"

            self.case(f"{name}, {form}", model, want, write)


def encoded(value: torch.Tensor) -> list[object]:
    """A tensor as JSON: dtype, shape, and its bytes as hexadecimal text."""
    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return [str(value.dtype).removeprefix("torch."), list(value.shape), bytes(flat.tolist()).hex()]


def write_all(writer: Writer) -> None:
    state = numbers(Shadow({"w": torch.zeros(3, 2), "b": torch.zeros(2), "m": torch.zeros(2) > 0}).state_dict())
    state |= {"n": torch.tensor(7), "e.w": torch.arange(12.0).view(4, 3)}
    for name, form in FORMATS.items():
        writer.case(name, "", state, lambda folder, form=form: form(state, folder))  # type: ignore[misc]
    for name in DTYPES:
        write_dtype(writer, name)
    for name, build in MODELS.items():
        if name != "lazy":
            model = filled(build())
            writer.saved(f"state dict: {name}", name, model.state_dict(), model.state_dict())
    for name in ("network", "tied", "attention", "recurrent"):
        model = filled(MODELS[name]())
        writer.saved(f"whole module: {name}", name, model.state_dict(), model)
    linear = filled(nn.Linear(3, 2))
    writer.saved("into a lazy module", "lazy", linear.state_dict(), linear.state_dict())
    write_training(writer)
    write_of_this_release(writer)


def write_dtype(writer: Writer, name: str) -> None:
    """One tensor of the dtype, in whatever holds any: bytes 0 to 7, so that no number is NaN."""
    value = (torch.arange(6 * dtype(name).itemsize) % (2 if name == "bool" else 7)).to(torch.uint8)
    value = value.view(dtype(name)).view(2, 3)
    state = {"v": value}
    writer.saved(f"{name}", "", state, state)

    def script(folder: Path) -> Path:
        torch.jit.save(torch.jit.trace(Holder(value), torch.ones(1)), folder / "x.pt")
        return folder / "x.pt"

    def safe(folder: Path) -> Path:
        save_file(state, folder / "x.safetensors")
        return folder / "x.safetensors"

    writer.case(f"{name}, torchscript", "", state, script)
    writer.case(
        f"{name}, distributed checkpoint", "", state, lambda folder: FORMATS["distributed checkpoint"](state, folder)
    )
    if name not in ("complex32", "bcomplex32", "complex128"):  # which the package does not write
        writer.case(f"{name}, safetensors", "", state, safe)


def write_training(writer: Writer) -> None:
    """What training leaves: optimizer and scheduler beside the weights, wrappers around them."""
    model = filled(network())
    state = model.state_dict()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    want = {key: value.clone() for key, value in state.items()}
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    beside = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "epoch": 3}
    writer.saved("optimizer beside", "network", want, {"model": state, **beside})
    parallel = nn.DataParallel(filled(network()))
    writer.saved("DataParallel", "network", parallel.module.state_dict(), parallel.state_dict())
    writer.saved("DataParallel, whole", "network", parallel.module.state_dict(), parallel)
    averaged = torch.optim.swa_utils.AveragedModel(filled(network()))
    writer.saved("averaged", "network", averaged.module.state_dict(), averaged.state_dict())
    compiled = torch.compile(filled(network()))
    writer.saved("compiled", "network", filled(network()).state_dict(), compiled.state_dict())
    writer.saved("compiled, whole", "network", filled(network()).state_dict(), compiled)
    old = torch.nn.utils.weight_norm(nn.Linear(3, 2))
    want = {
        "bias": old.bias,
        "parametrizations.weight.original0": old.weight_g,
        "parametrizations.weight.original1": old.weight_v,
    }
    writer.saved("weight norm of before 2.0", "weight norm", want, old.state_dict())


def write_of_this_release(writer: Writer) -> None:
    """What only some releases of torch can write."""
    model = filled(network())

    def exported(folder: Path) -> Path:
        program = torch.export.export(filled(attention()).eval(), (torch.ones(1, 3, 8),))
        torch.export.save(program, folder / "x.pt2")
        return folder / "x.pt2"

    writer.case("exported attention", "attention", filled(attention()).state_dict(), exported)
    try:
        from torch.distributed.checkpoint import HuggingFaceStorageWriter
    except ImportError:
        return

    def hugging_face(folder: Path) -> Path:
        by_hand: dict[str, Any] = {"path": str(folder), "fqn_to_index_mapping": dict.fromkeys(model.state_dict(), 1)}
        torch.distributed.checkpoint.save(model.state_dict(), storage_writer=HuggingFaceStorageWriter(**by_hand))
        return folder

    writer.case("distributed checkpoint as safetensors", "network", model.state_dict(), hugging_face)


# --------------------------------------------------------------------------------------------------------------- read


def read_all(folder: Path) -> int:
    """Load every case, print those that went wrong and a line that counts; give the exit status."""
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    wrong, lacked = 0, []
    for name, case in expected["cases"].items():
        lack = {kind for kind, _, _ in case["state"].values()} - set(DTYPES)
        try:
            if lack:
                refused_for_its_dtype(folder / case["path"])
                lacked.append(name)
            elif different := differing(folder, case):
                raise AssertionError(f"other values in {different}")
        except Exception as failure:
            wrong += 1
            print(f"  WRONG {name}: {type(failure).__name__}: {failure}")
    read = len(expected["cases"]) - wrong - len(lacked)
    print(f"{expected['writer']} -> {HERE}: {read} equal, {len(lacked)} refused for a dtype it lacks, {wrong} wrong")
    return 1 if wrong else 0


def refused_for_its_dtype(path: Path) -> None:
    """Check that a tensor of a dtype that this torch lacks is refused by name."""
    try:
        smart_load(Holder(torch.zeros(2, 3)), path, assign=True)  # or the cast is refused before it
    except UnreadableError as refusal:
        if "dtype" in str(refusal):
            return
        raise
    raise AssertionError("loaded, although this torch lacks the dtype")


def differing(folder: Path, case: Mapping[str, Any]) -> list[str]:
    """Give the keys whose values in the loaded model are not as expected."""
    model = (
        MODELS[case["model"]]() if case["model"] else Shadow({key: zeros(*spec) for key, spec in case["state"].items()})
    )
    smart_load(model, folder / case["path"])
    have = {key: encoded(value) for key, value in model.state_dict().items()}
    return [key for key in {**case["state"], **have} if case["state"].get(key) != have.get(key)]


def zeros(kind: str, shape: list[int], values: str) -> torch.Tensor:
    """A tensor for `values` to be loaded into."""
    return torch.zeros(len(values) // 2, dtype=torch.uint8).view(dtype(kind)).view(shape)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["write", "read"])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # torch's, of formats that it calls old
    torch.manual_seed(0)
    if arguments.command == "read":
        return read_all(arguments.folder)
    arguments.folder.mkdir(parents=True)
    writer = Writer(arguments.folder)
    write_all(writer)
    text = json.dumps({"writer": HERE, "cases": writer.cases})
    (arguments.folder / "expected.json").write_text(text, encoding="utf-8")
    print(f"{HERE}: {len(writer.cases)} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
