"""Training, testing and choosing as a shell sees them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from vidbench import load
from vidbench.pick import within
from vidbench.sweep import RequestError

TINY = ["--task", "appearance:clip_length=2", "--steps", "2", "--width-multiplier", "0.0625", "--batch-size", "4"]


def vidbench(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vidbench.cli", *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=cwd,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("train c3d", "give either --task, a generated task, or --data, a folder of videos"),
        ("train c3d --task frame_oder", "unknown task 'frame_oder': did you mean 'frame_order'?"),
        ("train c3 --task frame_order --steps 1", "unknown model 'c3': did you mean 'c3d'?"),
        ("train c3d --task frame_order --seeds 1,1", "--seeds 1,1: wanted different whole numbers from 0 on"),
        ("train c3d --task frame_order --epochs 2", "--epochs is for --data"),
        ("train c3d --task frame_order --clip-length 8", "--task frame_order:clip_length=8"),
        ("train c3d --task frame_order --resume", "--resume needs --out DIR"),
        ("train c3d --data nowhere", "no such dataset: nowhere"),
        ("evaluate c3d --task frame_order --weights nowhere.pt", "nowhere.pt"),
        ("pick nowhere", "no run at nowhere"),
    ],
)
def test_a_bad_request_is_one_line_and_exit_code_2(command: str, said: str, tmp_path: Path) -> None:
    ended = vidbench(*command.split(), cwd=tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    assert ended.stderr.startswith("vidbench: error: ")
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_a_training_is_kept_tested_and_not_done_twice(tmp_path: Path) -> None:
    train = ["train", "frame_pool_avg", *TINY, "--seeds", "0,1", "--format", "json", "--out", "run"]
    ended = vidbench(*train, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "frame_pool_avg, seed 1 [2/2] loss" in ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    assert [one["seed"] for one in found["seeds"]] == [0, 1]
    assert found["examples"] == sum(map(sum, found["confusion"])) == 600
    assert found["chance"] == 0.25
    assert set(found["seeds"][0]) == {"seed", "top1", "top5", "shuffled", "reversed", "frozen"}

    again = vidbench(*train, cwd=tmp_path)
    assert again.returncode == 2
    assert "is there already: go on with it by --resume, or give another --out" in again.stderr
    again = vidbench(*train, "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == found

    kept = next((tmp_path / "run" / "training").glob("*-0.pt"))
    tested = vidbench("evaluate", "frame_pool_avg", *TINY[:2], *TINY[4:6], "--weights", kept, cwd=tmp_path)
    assert tested.returncode == 0, tested.stderr
    assert tested.stdout.startswith(
        f"frame_pool_avg on appearance:clip_length=2: top-1 {found['seeds'][0]['top1']:.1%}"
    )

    reported = vidbench("report", "run", cwd=tmp_path)
    assert reported.returncode == 0, reported.stderr
    assert "appearance:clip_length=2" in (tmp_path / "run" / "report" / "report.md").read_text()


CLIPS = Path(__file__).resolve().parents[2].parent / "shared" / "clips"
_OF_CLASS = {
    "sport": ("arm_wrestling.mp4", "v_BaseballPitch_g01_c01.avi"),
    "other": ("h265_video.mp4", "nasa_13013_rotated.mp4", "testsrc2_odd_height_and_width_mpeg2.mp4"),
}


def test_a_training_on_videos_skips_what_is_broken_or_ends(tmp_path: Path) -> None:
    if not CLIPS.is_dir():
        pytest.skip(f"{CLIPS} is not present")
    for name, files in _OF_CLASS.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for file in files:
            shutil.copy(CLIPS / file, tmp_path / "data" / name)
    broken = tmp_path / "data" / "sport" / "truncated.mp4"
    broken.write_bytes((CLIPS / "nasa_13013.mp4").read_bytes()[:120_000])
    size = ["--clip-length", "4", "--input-size", "32", "--width-multiplier", "0.125", "--batch-size", "2"]
    train = ["train", "r3d_18", "--data", "data", *size, "--epochs", "1", "--out", "run"]

    ended = vidbench(*train, cwd=tmp_path)
    assert ended.returncode == 2
    assert f"{Path('data/sport/truncated.mp4')} is not a video that FFmpeg can open, or it is cut short" in ended.stderr

    ended = vidbench(*train, "--on-error", "skip", "--resume", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("vidbench: warning: 1 of ") == 1
    assert "videos of data were skipped:\n  data/sport/truncated.mp4" in ended.stderr
    assert "r3d_18 on data: top-1" in ended.stdout
    assert "frozen frames" in ended.stdout


def _rows(**columns: list[Any]) -> pd.DataFrame:
    frame = pd.DataFrame(columns)
    return frame.assign(kind="model", mode="forward", status="ok", implementation="eager", task="frame_order")


def test_the_choice_is_what_no_other_row_beats() -> None:
    frame = _rows(
        workload=["a", "b", "c", "d", "e"],
        top1_accuracy=[0.9, 0.8, 0.95, 0.8, 0.5],
        latency_s=[0.010, 0.005, 0.050, 0.006, 0.004],
        peak_memory_bytes=[3e8, 1e8, 9e8, 1e8, 4e8],
    )
    assert within(frame)["workload"].tolist() == ["c", "a", "b", "e"]  # d: as accurate as b, slower, no leaner
    assert within(frame, latency_s=0.02)["workload"].tolist() == ["a", "b", "e"]
    assert within(frame, latency_s=0.02, memory_bytes=2e8)["workload"].tolist() == ["b"]
    with pytest.raises(RequestError, match=r"none of 5 choices is within the budget; the fastest is e with 4 ms"):
        within(frame, latency_s=0.001)
    with pytest.raises(RequestError, match="no accuracy on task 'appearance'; this run has frame_order"):
        within(frame, task="appearance")
    two = pd.concat([frame, frame.assign(task="appearance")])
    with pytest.raises(RequestError, match="accuracies on several tasks: appearance, frame_order; choose one"):
        within(two)
    with pytest.raises(RequestError, match="no model of this run has both a latency and an accuracy"):
        within(frame.assign(top1_accuracy=None))


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Equal shares of every batch, gradients averaged: the weights of one process with whole batches."""
    command = ["vidbench.cli", "train", "tcn", "--task", "token_memory:clip_length=8", "--steps", "20"]
    command += ["--width-multiplier", "0.125", "--batch-size", "12", "--format", "json", "--out"]
    weights, said = [], []
    for out, launch in (("one", ["-m"]), ("two", ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"])):
        ended = subprocess.run(
            [sys.executable, *launch, *command, out], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert ended.returncode == 0, ended.stderr
        said.append(json.loads(ended.stdout))  # one document: the second process says nothing
        (kept,) = (tmp_path / out / "training").iterdir()
        weights.append(torch.load(kept, weights_only=True)["model"])
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], rtol=1e-4, atol=1e-6), name
    assert said[0]["examples"] == said[1]["examples"] == 600
    assert said[0]["top1"] == pytest.approx(said[1]["top1"], abs=0.01)
    assert [len(load(tmp_path / out).measurements) for out in ("one", "two")] == [1, 1]


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    command = [
        "vidbench.cli",
        "train",
        "tcn",
        "--task",
        "token_memory:clip_length=8",
        "--steps",
        "1",
        "--batch-size",
        "5",
    ]
    ended = subprocess.run([*launch, *command], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ended.returncode != 0
    assert "batch_size=5 cannot be shared by 2 processes: give a multiple" in ended.stderr
