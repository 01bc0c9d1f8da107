"""Every ```python block of README and docs is run, one page after the other in a folder and a namespace of its own.

A ```text block right after a ```python block is its output, seconds apart. A refusal ends a block as it ends a script:
with the last lines of its traceback. In a ```console block, the commands of `python` after each `$` are run in the same
folder.
`pytest tests/project/test_docs.py --rewrite` writes today's outputs into the pages.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from smartload import SmartLoadError

ROOT = Path(__file__).parents[2]
NEEDS = {"networks.md": "transformers"}
"""Packages that the tests do not install; `python tests/thirdparty/run.py` does, and runs these pages."""
PAGES = [
    page
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if page.name not in NEEDS or find_spec(NEEDS[page.name])
]

BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?|^```console\n(?P<console>.*?)^```\n",
    re.M | re.S,
)
SECONDS = re.compile(r"\b\d+(\.\d+)?(e-\d+)? (s|ms)\b")


PROSE = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)")


def anchors(page: Path) -> set[str]:
    """The headings of a page, as links spell them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.name)
def test_links_land_on_a_heading(page: Path) -> None:
    lost = []
    for name, anchor in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(f"{name}#{anchor}")
    assert lost == []


def output(code: str, page: Path, namespace: dict[str, object]) -> str:
    """What the code prints, or is refused with."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            exec(compile(code, str(page), "exec"), namespace)
        except SmartLoadError as error:
            print(f"smartload.{type(error).__name__}: {error}")
    return printed.getvalue()


def console(block: str) -> str:
    """The block with what its commands print, on whichever stream."""
    shown = []
    for line in re.findall(r"^\$ (.*)$", block, re.M):
        command, asked, rest = line.partition('; echo "exit status $?"')
        program, *arguments = shlex.split(command)
        assert (program, rest) == ("python", "")
        run = [sys.executable, *arguments]
        done = subprocess.run(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", check=False)
        shown += [f"$ {line}\n", done.stdout, f"exit status {done.returncode}\n" if asked else ""]
    return "".join(shown)


@pytest.fixture(autouse=True)
def clean_desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of its own for each page, the same random numbers, and no device tags left from another page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.serialization, "_package_registry", list(torch.serialization._package_registry))
    torch.manual_seed(0)


def test_the_recipes_on_two_devices(cuda2: object) -> None:
    page = ROOT / "docs" / "recipes.md"
    namespace: dict[str, object] = {"__name__": page.stem}
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        printed = output(block["code"], page, namespace)
        assert printed == (block["output"] or "")
    assert namespace["gpus"] == torch.cuda.device_count() > 1


@pytest.mark.timeout(600)  # a page may start ten processes
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page: Path, request: pytest.FixtureRequest) -> None:
    rewrite = request.config.getoption("--rewrite")
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, object] = {"__name__": page.stem}

    def rerun(block: re.Match[str]) -> str:
        line = text.count("\n", 0, block.start()) + 1
        shown = block["output"] or block["console"] or ""
        printed = console(shown) if block["console"] else output("\n" * line + block["code"], page, namespace)
        if SECONDS.sub("0 s", printed) == SECONDS.sub("0 s", shown):
            return block[0]
        writable = rewrite and shown != ""
        assert writable, f"{page.name}, line {line} prints\n{printed}"
        return block[0].replace(f"\n{shown}```", f"\n{printed}```")

    today = BLOCK.sub(rerun, text)
    if rewrite:
        page.write_text(today, encoding="utf-8", newline="\n")
