"""The workflows of continuous integration: their commands exist, and what fails in them fails the job."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from run_workflow import ROOT, shell_of

WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
STEPS = [
    pytest.param(workflow, step, id=f"{name}-{job}-{step.get('name')}")
    for name, workflow in WORKFLOWS.items()
    for job, content in workflow["jobs"].items()
    for step in content["steps"]
    if "run" in step
]


def commands_of(step: dict[str, Any]) -> list[list[str]]:
    """The vidbench commands of a step, as argument lists."""
    text = step["run"].replace("\\\n", " ")
    found = re.findall(r"\.venv/bin/vidbench ([^|\n]*)", text)
    values = {"BASE": "main", "SUITE": "conv3d", "DEVICE": "cuda", "DTYPE": "bf16"}
    return [[re.sub(r"\$(\w+)", lambda name: values[name[1]], word) for word in shlex.split(line)] for line in found]


@pytest.mark.parametrize(("workflow", "step"), STEPS)
def test_every_step_is_a_command_line_that_exists(workflow: dict[str, Any], step: dict[str, Any]) -> None:
    import typer

    from vidbench.cli import app

    assert subprocess.run(["bash", "-n", "-c", step["run"]], check=False).returncode == 0
    assert workflow
    for arguments in commands_of(step):
        group = typer.main.get_command(app)
        name, *rest = arguments
        command = group.commands[name]  # type: ignore[attr-defined]
        command.make_context(name, rest)  # raises on an option that does not exist


@pytest.mark.parametrize("name", ["cpu", "gpu"])
@pytest.mark.parametrize("code", [0, 1])
def test_a_gate_that_fails_fails_its_step_and_is_reported(name: str, code: int, tmp_path: Path) -> None:
    [gate] = [step for step in WORKFLOWS[name]["jobs"]["gate"]["steps"] if step.get("name") == "Gate"]
    stub = tmp_path / ".venv" / "bin" / "vidbench"
    stub.parent.mkdir(parents=True)
    stub.write_text(f"#!/bin/sh\necho SLOWER\nexit {code}\n")
    stub.chmod(0o755)
    summary = tmp_path / "summary.md"
    environ = {
        **os.environ,
        "GITHUB_STEP_SUMMARY": str(summary),
        "BASE": "main",
        "SUITE": "conv3d",
        "DEVICE": "cpu",
        "DTYPE": "bf16",
    }
    ran = subprocess.run([*shell_of(WORKFLOWS[name]), "-c", gate["run"]], cwd=tmp_path, env=environ, check=False)
    assert ran.returncode == code
    assert summary.read_text() == "SLOWER\n"


def test_a_gpu_runner_takes_no_stranger_s_code() -> None:
    [job] = WORKFLOWS["gpu"]["jobs"].values()
    assert "self-hosted" in job["runs-on"]
    assert "github.event.pull_request.head.repo.full_name == github.repository" in job["if"]
    assert "labels" in job["if"]
