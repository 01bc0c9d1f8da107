"""The rules that the whole package keeps, whatever its modules do."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import pytest

import smartload

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
TREES = {path.relative_to(ROOT / "src").as_posix(): ast.parse(path.read_text()) for path in SOURCES}

LAZY = ("numpy", "safetensors", "tqdm", "torch.distributed.checkpoint", "torch._dynamo")


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_import_contracts_are_kept(tmp_path: Path) -> None:
    done = python("from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))")
    assert done.returncode == 0, done.stdout


def test_importing_smartload_imports_nothing_that_torch_does_not() -> None:
    seen = "import sys, {}; print(*(name for name in sys.argv[1:] if name in sys.modules))"
    torch, ours = (python(seen.format(name), *LAZY).stdout.split() for name in ("torch", "smartload"))
    assert set(ours) <= set(torch)


def test_loading_a_file_imports_nothing_that_torch_does_not(tmp_path: Path) -> None:
    save = "import sys, torch; torch.save(torch.nn.Linear(2, 1).state_dict(), sys.argv[1])"
    file = str(tmp_path / "linear.pth")
    assert python(save, file).returncode == 0
    load = (
        "import sys, torch, smartload; before = set(sys.modules) "
        "; smartload.smart_load(torch.nn.Linear(2, 1), sys.argv[1]) "
        "; print(*(name for name in sys.argv[2:] if name in set(sys.modules) - before))"
    )
    done = python(load, file, *LAZY)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_a_load_imports_no_reader_of_a_rare_format(tmp_path: Path) -> None:
    file = str(tmp_path / "linear.pth")
    code = (
        "import sys, torch, smartload; torch.save(torch.nn.Linear(2, 1).state_dict(), sys.argv[1]) "
        "; smartload.smart_load(torch.nn.Linear(2, 1), sys.argv[1]) "
        "; print(*sorted(name[18:] for name in sys.modules if name.startswith('smartload.formats.')))"
    )
    done = python(code, file)
    others = {"dcp", "sharded", "torchscript", "torch_export", "npz", "pickle_file", "in_memory"}
    assert done.returncode == 0, done.stderr
    assert {"safetensors", "torch_save"} <= set(done.stdout.split())
    assert not others & set(done.stdout.split())


def test_the_reference_documents_exactly_the_public_names() -> None:
    page = (ROOT / "docs" / "reference.md").read_text()
    documented = re.findall(r"^\.\. auto\w+:: smartload\.(\w+)", page, re.M)
    assert sorted(documented) == sorted(smartload.__all__)
    assert all(hasattr(smartload, name) for name in smartload.__all__)


def test_the_version_is_the_same_everywhere() -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version is not None
    assert metadata.version("torch-smartload") == version[1]
    assert smartload.__version__ == version[1]
    assert f"\n## [{version[1]}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_version_of_a_source_tree_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert smartload.__version__ == "0+unknown"


def test_there_is_no_attribute_but_the_public_ones() -> None:
    with pytest.raises(AttributeError, match=r"^module 'smartload' has no attribute 'smart_laod'$"):
        smartload.smart_laod  # type: ignore[attr-defined]  # noqa: B018


def test_dir_shows_the_public_names_alone() -> None:
    names = dir(smartload)
    assert sorted(name for name in names if not name.startswith("__")) == sorted(smartload.__all__)
    assert {"__all__", "__doc__", "__name__", "__version__"} <= set(names)
    assert len(names) == len(set(names))
    for folder in ("formats", "match", "place", "load", "conversion", "api"):
        assert importlib.import_module(f"smartload.{folder}") is getattr(smartload, folder)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("name", TREES)
def test_nothing_weakens_strictness_or_safety(name: str) -> None:
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.keyword) and node.arg in ("strict", "weights_only"):
            assert ast.unparse(node.value) != "False", f"{name}:{node.value.lineno}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not re.search(r"(strict|weights_only)\s*=\s*False", node.value), f"{name}:{node.lineno}"


def test_type_checkers_see_the_types() -> None:
    assert (resources.files(smartload) / "py.typed").is_file()
