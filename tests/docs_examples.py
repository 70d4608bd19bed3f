"""Runs what the documentation shows: Python blocks as they stand, and every `vidbench` line that a console block shows.

Not collected by a plain `pytest`; `tox -e docs` runs it.
"""

import html
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
"""Python blocks of all run before console blocks of any: a block may write what a later one needs."""
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[pytest.param]:  # type: ignore[valid-type]
    return [
        pytest.param(body, id=f"{page.relative_to(ROOT)}:{page.read_text()[: match.start()].count(chr(10)) + 1}")
        for page in PAGES
        for match in BLOCK.finditer(page.read_text())
        if match[1] == language and (body := match[2])
    ]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples: later ones read what earlier ones wrote."""
    return tmp_path_factory.mktemp("examples")


@pytest.mark.parametrize("body", blocks("python"))
def test_python(body: str, workplace: Path) -> None:
    (workplace / "example.py").write_text(body)
    ended = subprocess.run(
        [sys.executable, "example.py"], cwd=workplace, capture_output=True, text=True, check=False, env=os.environ
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("body", blocks("console"))
def test_console(body: str, workplace: Path) -> None:
    for line in body.replace("\\\n", " ").splitlines():
        if not line.startswith("$ vidbench "):
            continue
        command = [sys.executable, "-P", "-m", "vidbench.cli", *shlex.split(line, comments=True)[2:]]
        ended = subprocess.run(command, cwd=workplace, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, f"{line}\n{ended.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    """Every relative link leads to a file."""
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_verdicts_shown_are_those_measured() -> None:
    (measured,) = ROOT.glob("reports/*/claims/claims.md")
    page = (ROOT / "docs" / "claims.md").read_text()
    row = re.compile(r"^\| (?:SUPPORTED|REFUTED|UNDECIDED) \|.*$", re.MULTILINE)
    assert row.findall(page) == [html.unescape(line) for line in row.findall(measured.read_text())] != []
