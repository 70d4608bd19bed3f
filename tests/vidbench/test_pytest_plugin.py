"""Benchmarks under pytest, in sessions of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vidbench.results import load

POINTS = """
def test_point(point, measure_point):
    assert measure_point(point).status == "ok"
"""
SMALL = (
    "--benchmark-only", "--vidbench-suite=conv3d", "--vidbench-axis=clip_length=2", "--vidbench-axis=batch_size=1",
    "--vidbench-axis=input_size=8", "--vidbench-axis=in_channels=4", "--vidbench-axis=out_channels=4",
    "--vidbench-axis=kernel_size=3", "--vidbench-axis=stride=1",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "test_points.py").write_text(POINTS)
    return tmp_path


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Whoever runs these tests in parallel: pytest-benchmark switches itself off where it sees xdist.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_every_point_is_a_benchmark_with_what_its_row_cannot_hold(folder: Path) -> None:
    ended = run_pytest(
        folder, *SMALL, "--vidbench-axis=implementation=library", "--benchmark-json=b.json", "--vidbench-out=run"
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    benchmarks = json.loads((folder / "b.json").read_text())["benchmarks"]
    done = load(folder / "run")
    assert {b["extra_info"]["point"] for b in benchmarks} == {m.point.key for m in done.measurements}
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        assert info["implementation"] == "library"
        assert benchmark["group"] == "conv3d forward"
        assert (info["clip_length"], info["batch_size"]) == (2, 1)
        assert info["flops"] == 2 * info["macs"] == 2 * 4 * 4 * 27 * 2 * 8 * 8
        assert info["params"] == 4 * 4 * 27
        assert info["peak_memory_bytes"] >= 4 * (4 * 4 * 27 + 2 * 4 * 2 * 8 * 8)
        assert 0 < info["relative_error"] < 2e-6
        assert info["device_samples_s"] == pytest.approx(benchmark["stats"]["data"])
    compared = subprocess.run(
        ["pytest-benchmark", "compare", "b.json"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert compared.returncode == 0, compared.stderr
    assert "test_point[conv3d/library/forward" in compared.stdout


def test_what_cannot_run_is_skipped_with_why(folder: Path) -> None:
    ended = run_pytest(folder, *SMALL, "--vidbench-axis=mode=stream", "-rs")
    assert "has no streaming step" in ended.stdout
    assert "passed" not in ended.stdout


def test_under_xdist_it_refuses_instead_of_measuring_nothing(folder: Path) -> None:
    ended = run_pytest(folder, *SMALL, "-n", "2")
    assert ended.returncode == pytest.ExitCode.USAGE_ERROR
    assert "under xdist (-n) would measure nothing" in ended.stderr


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--vidbench-suite=quik", "did you mean 'quick'"),
        ("--vidbench-axis=clip_lenth=2", "did you mean 'clip_length'"),
        ("--vidbench-axis=implementation=libary", "unknown implementation 'libary': did you mean 'library'"),
    ],
)
def test_a_bad_option_is_a_usage_error(folder: Path, option: str, said: str) -> None:
    ended = run_pytest(folder, *SMALL, option)
    assert ended.returncode != 0
    assert said in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr


def test_plain_pytest_passes_the_benchmarks_by() -> None:
    root = Path(__file__).parents[2]
    ended = run_pytest(root, "bench", "--collect-only")
    assert "test_point" not in ended.stdout
    assert ended.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
