"""The rules that the whole package keeps, whatever its modules do."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from importlib import metadata, resources
from pathlib import Path

import pytest

import smartload

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
TREES = {path.relative_to(ROOT / "src").as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}

LAZY = ("numpy", "safetensors", "tqdm", "torch.distributed.checkpoint", "torch._dynamo")


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, check=False)


def test_import_contracts_are_kept() -> None:
    pytest.importorskip("importlinter", reason="import-linter is not installed; the contract is the same everywhere")
    done = python("from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))")
    assert done.returncode == 0, done.stdout


IMPORTS = """
import json, sys, torch

def seen():
    return [name for name in sys.argv[2:] if name in sys.modules]

found = {"torch": seen()}
import smartload
found["smartload"] = seen()
torch.save(torch.nn.Linear(2, 1).state_dict(), sys.argv[1])
before = seen()
smartload.smart_load(torch.nn.Linear(2, 1), sys.argv[1])
found["load"] = [name for name in seen() if name not in before]
found["formats"] = [name for name in sys.modules if name.startswith("smartload.formats.")]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def imports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What a fresh process imports with torch, with smartload beside it, and in one load of a file."""
    done = python(IMPORTS, str(tmp_path_factory.mktemp("imports") / "linear.pth"), *LAZY)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def test_importing_smartload_imports_nothing_that_torch_does_not(imports: dict[str, list[str]]) -> None:
    assert set(imports["smartload"]) <= set(imports["torch"])


def test_loading_a_file_imports_nothing_that_torch_does_not(imports: dict[str, list[str]]) -> None:
    assert imports["load"] == []


def test_a_load_imports_no_reader_of_a_rare_format(imports: dict[str, list[str]]) -> None:
    common = {f"smartload.formats.{name}" for name in ("torch_save", "torch_legacy", "safetensors")}
    assert set(imports["formats"]) == common


def layers() -> list[list[str]]:
    """The folders and modules of the import contract, the highest first."""
    contract = re.search(r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M | re.S)
    assert contract is not None
    return [line.split(" | ") for line in re.findall(r'^  "(.+)",', contract[1], re.M)]


def drawing() -> str:
    """The import contract as a drawing: each name with the first sentence of its docstring."""
    width = max(len(name) for layer in layers() for name in layer) + 3
    rows = []
    for layer in layers():
        for name in layer:
            path = ROOT / "src" / "smartload" / name
            source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            docstring = ast.get_docstring(TREES[source.relative_to(ROOT / "src").as_posix()]) or ""
            sentence = " ".join(docstring.split()).partition(". ")[0].rstrip(".")
            rows.append(f"{name:{width}}{sentence}")
        rows.append("   |")
    return "\n".join(rows[:-1]) + "\n"


def test_the_drawing_of_the_architecture_is_the_import_contract(pytestconfig: pytest.Config) -> None:
    page = ROOT / "docs" / "architecture.md"
    text = page.read_text(encoding="utf-8")
    block = re.search(r"^<!-- drawing of the import contract.*\n```text\n(.*?)^```\n", text, re.M | re.S)
    assert block is not None
    if pytestconfig.getoption("--rewrite"):
        page.write_text(text[: block.start(1)] + drawing() + text[block.end(1) :], encoding="utf-8")
    else:
        assert block[1] == drawing(), "pytest tests/project --rewrite draws it anew"


def recipe(page: str, title: str) -> str:
    """The code block of CONTRIBUTING that contains the text, without the indentation of its list."""
    blocks = re.findall(r"^( *)```(?:python|text)\n(.*?)^ *```$", page, re.M | re.S)
    (found,) = [textwrap.dedent(block) for _, block in blocks if title in block]
    return found


def test_the_recipe_for_a_format_works_as_it_is_written(tmp_path: Path) -> None:
    """CONTRIBUTING is followed by copying its blocks: the module, its line in the list, and its tests."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    package = tmp_path / "smartload"
    shutil.copytree(ROOT / "src" / "smartload", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "formats" / "toy.py").write_text(recipe(page, '"""Files of toy: TOYFILE1'), encoding="utf-8")
    formats = package / "formats" / "__init__.py"
    old = "    from smartload.formats import pickle_file, sharded\n\n    yield from (pickle_file, sharded)\n"
    assert old in formats.read_text(encoding="utf-8")
    new = textwrap.indent(recipe(page, "yield from (pickle_file, sharded, toy)"), "    ")
    formats.write_text(formats.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    (tmp_path / "test_toy.py").write_text(recipe(page, '"""Files of toy: read as they are'), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "test_toy.py"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=tmp_path, env=env, check=False)
    assert "4 passed" in done.stdout, done.stdout


def test_no_folder_is_crowded() -> None:
    """A newcomer finds the way from the listing of a folder: about twelve entries. More are two subjects: part them."""
    package = ROOT / "src" / "smartload"
    for folder in (package, *(path.parent for path in package.rglob("__init__.py"))):
        entries = [path.name for path in folder.iterdir() if path.name not in ("__pycache__", "py.typed")]
        assert len(entries) <= 14, f"{folder.name} has {len(entries)} entries"


def test_the_reference_documents_exactly_the_public_names() -> None:
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\.\. auto\w+:: smartload\.(\w+)", page, re.M)
    assert sorted(documented) == sorted(smartload.__all__)
    assert all(hasattr(smartload, name) for name in smartload.__all__)


def test_the_version_is_the_same_everywhere() -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    assert version is not None
    assert metadata.version("torch-smartload") == version[1]
    assert smartload.__version__ == version[1]
    assert f"\n## [{version[1]}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


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
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("name", TREES)
def test_nothing_weakens_strictness_or_safety(name: str) -> None:
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.keyword) and node.arg in ("strict", "weights_only"):
            assert ast.unparse(node.value) != "False", f"{name}:{node.value.lineno}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not re.search(r"(strict|weights_only)\s*=\s*False", node.value), f"{name}:{node.lineno}"


def test_type_checkers_see_the_types() -> None:
    assert (resources.files(smartload) / "py.typed").is_file()


def test_no_extra_replaces_the_torch_that_somebody_has() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[tool.")[0]
    assert re.findall(r'"torch([=<>~!][^"]*)?"', project) == [">=2.6"]
