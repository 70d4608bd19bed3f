"""The gate on a small repository of our own sources: what passes, what fails, what is named, what survives a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vidbench.results import load

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "conv3d", "--axis", "implementation=library", "--axis", "memory_format=contiguous", "--axis", "clip_length=4",
    "--axis", "batch_size=1", "--axis", "input_size=8", "--axis", "in_channels=16", "--axis", "out_channels=16",
    "--axis", "kernel_size=3", "--axis", "stride=1",
]  # fmt: skip
"""One point."""

KERNEL = Path("kernels/vidkernels/conv3d/library.py")
CALL = "    y = F.conv3d(x, weight, bias, stride, padding, dilation)\n"


def git(*arguments: str, cwd: Path) -> str:
    named = ("git", "-c", "user.name=test", "-c", "user.email=test@example.org", *arguments)
    return subprocess.run(named, cwd=cwd, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose head and `base` are these sources."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    folder = tmp_path_factory.mktemp("repository")
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(ROOT / "vidbench", folder / "vidbench", ignore=ignored)
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=ignored)
    shutil.copy(ROOT / "constraints.txt", folder)
    (folder / ".gitignore").write_text("runs/\n__pycache__/\n")
    git("init", "-q", cwd=folder)
    git("add", "-A", cwd=folder)
    git("commit", "-qm", "base", cwd=folder)
    git("tag", "base", cwd=folder)
    return folder


@pytest.fixture
def head(repository: Path) -> Path:
    """The repository with a clean head."""
    git("checkout", "-q", "--force", "base", cwd=repository)
    return repository


def command(repository: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join((str(repository), str(repository / "kernels")))}
    return [sys.executable, "-m", "vidbench.cli", "gate", *arguments], environ


def gate(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    line, environ = command(repository, *arguments)
    return subprocess.run(line, cwd=repository, env=environ, capture_output=True, text=True, check=False)


def planted(repository: Path, path: Path, before: str, after: str) -> None:
    text = (repository / path).read_text()
    assert text.count(before) == 1
    (repository / path).write_text(text.replace(before, after))
    git("commit", "-qam", "planted", cwd=repository)


def test_a_slower_op_fails_and_is_named(head: Path) -> None:
    planted(head, KERNEL, CALL, CALL + 3 * "    F.conv3d(x, weight, bias, stride, padding, dilation)\n")
    ended = gate(head, "--base", "base", *SMALL, "--out", "runs/slower", "--format", "json")
    assert ended.returncode == 1, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    (one,) = found["points"]
    assert one["verdict"] == "SLOWER"
    assert one["point"].startswith("conv3d/library/forward")
    assert one["ratio"] > 1.5
    assert found["base"]["git_commit"] == git("rev-parse", "base", cwd=head)
    assert found["new"]["git_commit"] == git("rev-parse", "HEAD", cwd=head)
    # The worktree of the base is gone, what was measured is kept.
    assert git("worktree", "list", cwd=head).count("\n") == 0
    assert not (head / "runs/slower/source").exists()
    sides = [load(head / "runs/slower" / side) for side in ("base", "head", "again")]
    assert len({len(side.measurements) for side in sides}) == 1
    assert len(sides[0].measurements) in (6, 12, 20, 30)


def test_a_deleted_benchmark_fails(head: Path) -> None:
    sweeps = '            _conv_sweeps("depthwise_conv3d", DEPTHWISE_LAYERS),'
    planted(head, Path("vidbench/suites.py"), sweeps, sweeps.replace("LAYERS", "LAYERS[2:]"))
    small = ["depthwise", *SMALL[1:9], "--axis", "input_size=8"]
    ended = gate(head, "--base", "base", *small, "--budget", "0", "--out", "runs/deleted")
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[0] == "WORSE: 2 missing of 4 points"
    assert ended.stdout.count("it is not in NEW") == 2


@pytest.mark.slow
def test_an_implementation_that_is_gone_fails(head: Path) -> None:
    planted(head, KERNEL, '@OP.implementation("library")\n', '@OP.implementation("biblioteca")\n')
    ended = gate(head, "--base", "base", *SMALL, "--budget", "0", "--out", "runs/gone")
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "MISSING: 1" in ended.stdout
    assert "it is not in NEW" in ended.stdout


def test_no_change_passes_and_a_killed_gate_is_gone_on_with(head: Path) -> None:
    line, environ = command(head, "--base", "base", *SMALL, "--budget", "0", "--out", "runs/same")
    process = subprocess.Popen(line, cwd=head, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = head / "runs/same/again/measurements.jsonl"
    deadline = time.monotonic() + 240
    while not lines.exists() or lines.read_bytes().count(b"\n") < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {side: (head / "runs/same" / side / "measurements.jsonl").read_bytes() for side in ("base", "head")}
    ended = gate(head, "--base", "base", *SMALL, "--budget", "0", "--out", "runs/same", "--resume")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "6 rounds: " in ended.stdout
    for side, kept in before.items():
        after = (head / "runs/same" / side / "measurements.jsonl").read_bytes()
        assert after.startswith(kept[: kept.rfind(b"\n") + 1])
        assert [one.round for one in load(head / "runs/same" / side).measurements] == list(range(1, 7))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--base", "no-such-revision"], "git rev-parse --verify no-such-revision^{commit}: "),
        (["--base", "base", "conv4d"], "unknown suite 'conv4d': did you mean 'conv3d'?"),
        (["--base", "base", "--resume"], "--resume needs --out DIR"),
        (["--base", "base", "conv3d", "--implementation", "library,cudnn"], "'conv3d' has no implementation 'cudnn'"),
    ],
)
def test_a_bad_request_is_one_line_and_exit_code_2(head: Path, arguments: list[str], said: str) -> None:
    ended = gate(head, *arguments)
    assert ended.returncode == 2
    assert ended.stderr.startswith("vidbench: error: ")
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_what_is_installed_is_the_head_or_the_gate_refuses(head: Path, tmp_path: Path) -> None:
    """Else the head's old copy would be measured, and pass."""
    line, environ = command(head, "--base", "base", *SMALL)
    git("clone", "-q", str(head), str(tmp_path / "clone"), cwd=head)
    planted(tmp_path / "clone", KERNEL, CALL, 2 * CALL)
    ended = subprocess.run(line, cwd=tmp_path / "clone", env=environ, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "is not that of" in ended.stderr
    assert ended.stderr.count("\n") == 1


MODEL = """
import torch
from widths import WIDTH

def net(num_classes: int = 4) -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv3d(3, WIDTH, 3, padding=1), torch.nn.AdaptiveAvgPool3d(1), torch.nn.Flatten(),
        torch.nn.Linear(WIDTH, num_classes),
    )
"""


def test_a_model_in_a_repository_of_ones_own_is_gated(head: Path, tmp_path: Path) -> None:
    """Base and head each from their own files, what the model imports too; from a folder inside the repository."""
    folder = tmp_path / "package"
    folder.mkdir()
    git("init", "-q", cwd=tmp_path)
    (folder / "mine.py").write_text(MODEL)
    (folder / "widths.py").write_text("WIDTH = 4\n")
    git("add", "-A", cwd=tmp_path)
    git("commit", "-qm", "base", cwd=tmp_path)
    git("tag", "base", cwd=tmp_path)
    (folder / "widths.py").write_text("WIDTH = 64\n")
    git("commit", "-qam", "wider", cwd=tmp_path)
    _, environ = command(head)
    small = ["--axis", "clip_length=4", "--axis", "batch_size=1", "--axis", "input_size=16"]
    line = [sys.executable, "-P", "-m", "vidbench.cli", "gate", "--base", "base", "models", *small, "--budget", "0"]
    model = ["--model", "mine:net", "--out", str(tmp_path / "out"), "--format", "json"]
    ended = subprocess.run([*line, *model], cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    found = json.loads(ended.stdout)
    (one,) = found["points"]
    assert one["point"].startswith("mine:net/")  # what time says of so small a network is noise; the rest is exact
    sides = {side: load(tmp_path / "out" / side).measurements[0].params for side in ("base", "head", "again")}
    assert sides == {"base": 4 * 482 + 400, "head": 64 * 482 + 400, "again": 4 * 482 + 400}
    ended = subprocess.run(line, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "--model package.module:factory" in ended.stderr
