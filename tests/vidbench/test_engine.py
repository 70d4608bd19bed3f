"""Whole sweeps in worker processes: faults cost their point alone, kills lose nothing, rounds are processes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import vidbench
from vidbench.engine import runs
from vidbench.engine.local import LocalEngine
from vidbench.results import Run, load
from vidbench.sweep import RequestError

HERE = Path(__file__).parent
SMALL = {"clip_length": (4,), "batch_size": (1,), "input_size": (8,)}
VIDBENCH = [sys.executable, "-m", "vidbench.cli"]


@pytest.fixture(autouse=True)
def _in_this_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `user_models` is found, as a user's module is in the working directory."""
    monkeypatch.chdir(HERE)


def statuses(done: Run) -> dict[str, tuple[str, str]]:
    return {m.point.workload.partition(":")[2]: (m.status, m.reason) for m in done.measurements}


def test_faults_cost_their_point_alone(tmp_path: Path) -> None:
    bad = ["Segfaults", "Raises", "Exits", "NotANumber", "Hangs"]
    (done,) = runs(
        "models",
        models=[f"user_models:{name}" for name in ("tiny", *bad, "Tiny")],
        axes=SMALL,
        out=tmp_path / "run",
        seconds=0.02,
        timeout_s=20,
    )
    found = statuses(done)
    assert found["tiny"] == found["Tiny"] == ("ok", "")
    status, reason = found["Segfaults"]
    assert status == "crashed"
    assert reason.startswith("SIGSEGV: File ")
    assert found["Raises"] == ("failed", "IndexError: list index out of range")
    assert found["Exits"] == ("failed", "SystemExit: 3")
    assert found["NotANumber"][0] == "failed"
    assert found["Hangs"] == ("timeout", "no result within 20 s")


@pytest.fixture
def memory_limit() -> str:
    """Shell words that put the shell into a memory group of 1.5 GB."""
    limit = 1_500_000_000
    for root, file in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(root) / f"vidbench-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        if (group / file).exists():
            return f"echo {limit} > {group}/{file} && echo $$ > {group}/cgroup.procs && trap 'rmdir {group}' EXIT"
        group.rmdir()
    pytest.skip("no memory cgroup may be made here (needs root)")


def test_the_kernels_memory_limit_costs_its_point_alone(tmp_path: Path, memory_limit: str) -> None:
    sweep = (
        f"{' '.join(VIDBENCH)} sweep models --axis clip_length=4 --axis batch_size=1 --axis input_size=8 --timeout 60 "
        f"--model user_models:tiny --model user_models:Hogs --model user_models:Tiny --out {tmp_path / 'run'}"
    )
    ended = subprocess.run(["bash", "-c", f"{memory_limit}; {sweep}"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found = statuses(load(tmp_path / "run"))
    assert found["Hogs"] == ("oom", "killed by the kernel: out of memory")
    assert found["tiny"] == found["Tiny"] == ("ok", "")


def test_rounds_are_processes_and_each_takes_every_point_once(tmp_path: Path) -> None:
    seen = []
    (done,) = runs(
        "models",
        models=["user_models:tiny"],
        axes={**SMALL, "clip_length": (2, 4)},
        rounds=3,
        out=tmp_path / "run",
        seconds=0.02,
        progress=lambda p: seen.append((p.done, p.total, p.measurement is None)),
    )
    assert Counter((m.point.key, m.round) for m in done.measurements) == {
        (m.point.key, number): 1 for m in done.measurements[:2] for number in (1, 2, 3)
    }
    assert seen[0] == (0, 6, True)
    assert seen[-1] == (6, 6, False)
    frame = done.frame()
    assert frame["rounds"].tolist() == [3, 3]


def test_resuming_does_only_what_is_missing(tmp_path: Path) -> None:
    wanted = {"axes": SMALL, "models": ["user_models:tiny"], "out": tmp_path / "run", "seconds": 0.02}
    (first,) = runs("models", rounds=1, **wanted)  # type: ignore[arg-type]
    (again,) = runs("models", rounds=2, resume=True, **wanted)  # type: ignore[arg-type]
    assert [m.round for m in again.measurements] == [1, 2]
    assert again.measurements[0] == first.measurements[0]
    with pytest.raises(RequestError, match="holds a run"):
        runs("models", **wanted)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="cannot be resumed"):
        runs("models", resume=True, **{**wanted, "axes": {**SMALL, "clip_length": (5,)}})  # type: ignore[arg-type]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_sweep_loses_nothing_and_repeats_nothing(tmp_path: Path, kills: int) -> None:
    """SIGKILL at random moments, then `--resume`, until the sweep ends by itself."""
    out = tmp_path / "run"
    command = [
        *VIDBENCH, "sweep", "models", "--model", "user_models:tiny", "--axis", "clip_length=1,2,3,4,5,6,7,8",
        "--axis", "batch_size=1,2", "--axis", "input_size=8", "--rounds", "3", "--out", str(out), "--resume",
    ]  # fmt: skip
    moments = random.Random(0)
    kept: list[bytes] = []
    killed = 0
    while True:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if killed < kills:
            before = _lines(out)
            while _lines(out) <= before and process.poll() is None:
                time.sleep(0.01)  # it is under way
            time.sleep(moments.uniform(0, 0.3))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                killed += 1
        assert process.wait(300) in (0, -signal.SIGKILL)
        finished = (out / "measurements.jsonl").read_bytes().split(b"\n")[:-1]
        assert finished[: len(kept)] == kept, "a finished measurement was lost or changed"
        kept = finished
        if process.returncode == 0:
            break
    assert killed >= 1
    done = load(out)
    assert not done.warnings
    assert Counter(Counter((m.point.key, m.round) for m in done.measurements).values()) == {1: 8 * 2 * 3}
    assert {m.status for m in done.measurements} == {"ok"}


def _lines(out: Path) -> int:
    path = out / "measurements.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    """However the parent ends: nothing of it is left a moment later."""
    process = subprocess.Popen(
        [*VIDBENCH, "sweep", "models", "--model", "user_models:Hangs", "--out", str(tmp_path / "run")],
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    family: set[int] = set()
    while len(family) < 2 and time.monotonic() < deadline:
        family |= _descendants(process.pid)
        time.sleep(0.05)
    assert len(family) >= 2, "the server and its worker"
    process.kill()
    process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in family) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in family if Path(f"/proc/{pid}").exists()]


def _descendants(pid: int) -> set[int]:
    children = {int(c) for t in Path(f"/proc/{pid}/task").glob("*/children") for c in t.read_text().split()}
    return children | {d for child in children for d in _descendants(child)}


def test_interrupting_ends_in_order_and_says_how_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(
        [*VIDBENCH, "sweep", "models", "--model", "user_models:tiny", "--model", "user_models:Hangs", "--axis",
         "clip_length=4", "--out", str(out)],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not _lines(out) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in said
    assert "Traceback" not in said
    assert len(load(out).measurements) == 1


def test_the_library_face_takes_what_the_command_line_takes(tmp_path: Path) -> None:
    done = vidbench.sweep(
        "models",
        models=["user_models:tiny"],
        axes={"clip_length": [4], "batch_size": [1], "input_size": [8], "dtype": ["fp64"]},
        out=tmp_path / "run",
    )
    assert [(m.status, m.point.dtype) for m in done.measurements] == [("ok", "fp64")]
    header = json.loads((tmp_path / "run" / "run.json").read_text())
    assert header["environment"]["torch"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"suite": "models", "models": ["user_models:nothing"]}, "user_models has no 'nothing'"),
        ({"suite": "models", "models": ["nowhere:model"]}, "no module 'nowhere'"),
        ({"suite": "conv3d", "implementations": ["libary"]}, "unknown implementation 'libary': did you mean 'library'"),
        ({"suite": "conv3d", "axes": {"device": ("cpu", "cuda")}}, "one run measures one device"),
        ({"suite": "models", "video": Path("nowhere.mp4")}, "nowhere.mp4"),
    ],
)
def test_a_request_that_cannot_be_carried_out_is_one_line(
    tmp_path: Path, arguments: dict[str, object], said: str
) -> None:
    with pytest.raises(RequestError) as error:
        runs(**arguments, out=tmp_path / "run")  # type: ignore[arg-type]
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_worker_that_dies_between_points_is_replaced() -> None:
    with LocalEngine(timeout_s=60) as engine:
        environment, known = engine.describe("cpu", ("fp32",), {"conv3d": "op"})
        assert {"reference", "library", "compiled"} <= set(known["conv3d"])
        assert environment.flops_per_s["cpu/fp32"] > 1e8
        worker = engine._worker
        assert worker is not None
        os.kill(worker.pid, signal.SIGKILL)
        point = (
            vidbench.suites.SUITES["conv3d"]
            .sweeps[0]
            .override(  # type: ignore[attr-defined]
                {"clip_length": (2,), "input_size": (8,), "implementation": ("library",), "batch_size": (1,)}
            )
        )
        first, second = list(point.points())
        assert engine.measure(first, 1, environment, seconds=0.01, video=None).status == "crashed"
        assert engine.measure(second, 1, environment, seconds=0.01, video=None).status == "ok"
