"""The table of compiled kernels: what makes a row, what is worse than it, and what is found again."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vidbench import kernel_table
from vidbench.kernel_table import Row, flaws, read, sample, tasks, worse, write
from vidkernels.launch import TARGETS

ROW = Row(
    "sm_90", "conv3d.triton_igemm_kernels:gather", "bf16 BLOCK_M=128", "0" * 12, "1" * 12, 100, 0, 0, 98304, 0, "wgmma",
    400,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stack_bytes": 8}, "stack_bytes 0 → 8"),
        ({"local_accesses": 1}, "local_accesses 0 → 1"),
        ({"shared_bytes": 100_000}, "shared_bytes 98304 → 100000"),
        ({"narrow_accesses": 16}, "narrow_accesses 0 → 16"),
        ({"registers": 128}, "registers 100 → 128"),
        ({"matrix_instructions": "mma"}, "matrix instructions wgmma → mma"),
    ],
)
def test_a_change_for_the_worse_is_told(change: dict[str, object], said: str) -> None:
    (line,) = worse(replace(ROW, **change), ROW)  # type: ignore[arg-type]
    assert line.endswith(said)
    assert line.startswith("sm_90 conv3d.triton_igemm_kernels:gather bf16 BLOCK_M=128")


@pytest.mark.parametrize("change", [{}, {"registers": 96}, {"registers": 104}, {"instructions": 900}])
def test_a_change_for_the_better_is_not(change: dict[str, int]) -> None:
    assert worse(replace(ROW, **change), ROW) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stack_bytes": 8}, "8 bytes of stack, 0 accesses to local memory"),
        ({"local_accesses": 3}, "0 bytes of stack, 3 accesses to local memory"),
        ({"matrix_instructions": "mma"}, "matrix instructions mma, not wgmma"),
        ({"matrix_instructions": "none", "configuration": "fp32 PRECISION=tf32"}, "none, not wgmma"),
    ],
)
def test_what_no_shipped_kernel_may_have(change: dict[str, object], said: str) -> None:
    (line,) = flaws(replace(ROW, **change))  # type: ignore[arg-type]
    assert line.endswith(said)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"matrix_instructions": "none", "configuration": "fp32 PRECISION=ieee"},
        {"matrix_instructions": "mma", "architecture": "sm_80"},
        {"matrix_instructions": "none", "kernel": "conv3d.triton_igemm_kernels:add_parts"},
    ],
)
def test_what_a_shipped_kernel_may_be(change: dict[str, object]) -> None:
    assert flaws(replace(ROW, **change)) == []  # type: ignore[arg-type]


def test_a_table_is_read_as_written(tmp_path: Path) -> None:
    other = replace(ROW, architecture="sm_80", matrix_instructions="mma")
    lstm = replace(ROW, kernel="recurrent/cuda_cluster.cu:forward", id="2" * 12)
    write(tmp_path, [ROW, lstm, other])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["conv3d.csv", "recurrent.csv"]
    assert read(tmp_path) == {row.place: row for row in (ROW, other, lstm)}


def test_layers_become_tasks_and_a_sample_has_every_kernel() -> None:
    """Recorded on meta tensors, in a process that does not interpret: an interpreted function has no binder."""
    code = (
        "from vidbench.kernel_table import Task, tasks, sample\nP = Task.place.fget\n"
        "todo = tasks(('sm_80', 'sm_90'), ('bf16',), ('causal_conv1d',))\n"
        "kernels = {(task.architecture, task.key.partition(' ')[0]) for task in todo}\n"
        "print(len(todo) > len(kernels) >= 4, len(sample(todo)) == len(kernels), len({*map(P, todo)}) == len(todo))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["True", "True", "True"]


def test_an_interpreter_compiles_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernel_table.main([]) == 2
    assert "unset it to compile them" in capsys.readouterr().err


def test_architectures_are_those_of_the_targets() -> None:
    assert list(TARGETS) == ["sm_80", "sm_90", "sm_100"]
    assert tasks(("sm_90",), ("bf16",), ()) == []
    assert sample([]) == []
