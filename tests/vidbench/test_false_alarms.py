"""The count of false alarms: rules of other tools as those tools apply them, and sweeps whose outcome is known."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # `bench` is no installed package

from bench import false_alarms as script  # noqa: E402
from bench import noise  # noqa: E402


def test_rules_of_other_tools_on_cases_worked_by_hand() -> None:
    steady = 1 + 0.01 * np.linspace(-1, 1, 20)
    base = np.stack([steady] * 4)
    new = np.stack([steady, 1.04 * steady, 1.06 * steady, 1.2 * steady])
    assert script.pytest_benchmark(base, new).tolist() == [False, False, True, True]  # above 5 %
    assert script.asv(base, new).tolist() == [False, False, False, True]  # above a factor of 1.1
    assert script.nvbench(base, new).tolist() == [False, True, True, True]  # above the deviation of 0.6 %
    assert script.welch(base, new).tolist() == [False, True, True, True]
    assert not script.asv(new, base).any()  # faster is no alarm
    assert not script.asv(base[:, :5], new[:, :5]).any()  # of five samples its test cannot tell


def test_rules_pass_over_samples_that_were_not_taken() -> None:
    steady = 1 + 0.01 * np.linspace(-1, 1, 20)
    base, new = np.stack([steady] * 2), np.stack([steady, 1.2 * steady])
    padded = [np.pad(side, ((0, 0), (0, 5)), constant_values=np.nan) for side in (base, new)]
    for rule in script.PEERS.values():
        assert rule(*padded).tolist() == rule(base, new).tolist() == [False, True]


def test_simulated_processes_are_as_wide_as_they_say() -> None:
    for machine in noise.MACHINES[:2]:
        seconds = machine.draw(np.random.default_rng(0), 400)
        logs = np.log(np.median(seconds, axis=3))
        robust = np.median(np.abs(logs - np.median(logs))) / 0.6745
        assert robust == pytest.approx(machine.process, rel=0.1)


def test_what_was_recorded_is_dealt_whole(tmp_path: Path) -> None:
    import pandas as pd

    rows = [
        {"side": side, "point": f"p{at}", "round": turn, "round_s": 0.5, "sample_s": 100 * at + turn + 0.1 * which}
        for which, side in enumerate(script.SIDES)
        for at in range(2)
        for turn in range(1, 41)
        for _ in range(noise.SAMPLES - which)
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / noise.RECORDING)
    taken = noise.Recorded(tmp_path)
    assert taken.seconds_per_round() == pytest.approx(0.5)
    assert taken.deviations() == pytest.approx([0.0, 0.0], abs=0.02)  # 0.1 of 100 and more, and of few
    seconds = taken.draw(np.random.default_rng(1), 5)
    assert seconds.shape == (3, 5, 30, noise.SAMPLES)
    assert np.isnan(seconds).sum() == (0 + 1 + 2) * 5 * 30  # what a process has not taken is not made up
    turns = np.floor(seconds[..., : -len(script.SIDES)] % 100).astype(int)
    assert (np.diff(turns, axis=2) % 40 == 1).all()  # rounds in a row, from the last to the first
    assert (turns[0] == turns[1]).all()  # of all sides the same
    which = np.rint(10 * (seconds[..., 0, 0] % 1)).astype(int)
    assert (np.sort(which, axis=0) == np.array([[0], [1], [2]])).all()  # each side is one of the three


def test_parts_are_counted_once_and_the_table_tells_them(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "bench" / "false_alarms.py"),
        "judge",
        "--sweeps",
        "3",
        "--power-sweeps",
        "3",
        "--out",
        str(tmp_path),
    ]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads((tmp_path / "verdicts.json").read_text())
    quiet = found["quiet"]
    assert quiet["alarms"]["counts"]["vidbench gate, 30 rounds"] == 0
    assert quiet["finds"]["counts"]["vidbench gate, 30 rounds @ 0.1"] == 3
    assert quiet["alarms"]["counts"]["Welch at 0.05; 1 process"] == 3  # it always finds something among 50 points
    assert "| vidbench gate, 30 rounds |" in first.stdout
    assert (tmp_path / "power.svg").exists()
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "sweeps" not in again.stderr  # nothing was counted again
    assert again.stdout == first.stdout
