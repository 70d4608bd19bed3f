"""Runs the steps of a workflow's job as they stand, in a fresh clone of this repository.

    python tests/run_workflow.py .github/workflows/gpu.yml gate BASE=HEAD~1 SUITE=temporal DEVICE=cpu DTYPE=fp32

Steps that use an action are named and passed over; of an `if`, `!cancelled()` is always true. Values of `env` that
only GitHub knows are given as NAME=VALUE. A failing step fails the job, after the steps that run all the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]


def steps_of(workflow: Mapping[str, Any], job: str) -> list[Mapping[str, Any]]:
    """The steps of a job."""
    found: list[Mapping[str, Any]] = workflow["jobs"][job]["steps"]
    return found


def shell_of(workflow: Mapping[str, Any]) -> list[str]:
    """How a runner starts the shell of a `run` step."""
    if workflow.get("defaults", {}).get("run", {}).get("shell") == "bash":
        return ["bash", "--noprofile", "--norc", "-eo", "pipefail"]
    return ["bash", "-e"]


def environ_of(workflow: Mapping[str, Any], job: str, given: Mapping[str, str], summary: Path) -> dict[str, str]:
    """What a job's steps find in their environment.

    Raises:
        KeyError: A value that only GitHub knows was not given.
    """
    found = {**os.environ, "CI": "true", "GITHUB_STEP_SUMMARY": str(summary)}
    for name, value in workflow["jobs"][job].get("env", {}).items():
        found[name] = given[name] if "${{" in str(value) else str(value)
    return {**found, **given}


def main() -> int:
    """The command line."""
    path, job, *pairs = sys.argv[1:]
    workflow = yaml.safe_load((ROOT / path).read_text())
    given = dict(pair.split("=", 1) for pair in pairs)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        environ = environ_of(workflow, job, given, Path(folder) / "summary.md")
        for step in steps_of(workflow, job):
            name = step.get("name") or step.get("uses", step.get("run"))
            if "run" not in step:
                print(f"--- {name}: an action, not run", flush=True)
                continue
            condition = str(step.get("if", ""))
            if "pull_request" in condition or (failed and "!cancelled()" not in condition):
                print(f"--- {name}: passed over", flush=True)
                continue
            print(f"--- {name}", flush=True)
            ran = subprocess.run([*shell_of(workflow), "-c", step["run"]], cwd=clone, env=environ, check=False)
            print(f"--- {name}: exit code {ran.returncode}", flush=True)
            failed = failed or ran.returncode != 0
        summary = Path(folder) / "summary.md"
        if summary.exists():
            print(f"--- summary\n{summary.read_text()}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
