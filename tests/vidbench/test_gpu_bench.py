"""The scripts for an hour on a GPU, without one: processes that die, archives, resumption, deadlines, tuning."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # `bench` is no installed package

from bench.gpu import plan  # noqa: E402
from bench.gpu.pool import BROKEN, Unit, run  # noqa: E402
from bench.gpu.session import ARCHIVE, ROWS, Session  # noqa: E402
from bench.gpu.summary import summary  # noqa: E402
from vidbench import tune as tuner  # noqa: E402
from vidbench.layers import Layer  # noqa: E402
from vidbench.timing import Samples  # noqa: E402
from vidkernels import OPS, Implementation, tuning  # noqa: E402
from vidkernels.launch import TARGETS  # noqa: E402


def behave(unit: Unit, emit: Callable[[dict[str, Any]], None]) -> None:
    """A unit that does what its name says."""
    if unit.key.startswith("dies"):
        emit({"status": "ok", "reason": "before"})
        os.kill(os.getpid(), signal.SIGKILL)
    if unit.key == "leaves":
        os._exit(BROKEN)
    if unit.key == "hangs":
        time.sleep(60)
    if unit.key == "raises":
        raise RuntimeError("out of ideas\nand more")
    print("said by", unit.key)
    emit({"status": "ok", "reason": "", "pid": os.getpid()})


def _run(names: list[str], tmp_path: Path, **options: Any) -> tuple[list[tuple[str, str, str]], list[str]]:
    rows: list[tuple[str, str, str]] = []
    units = [Unit(name, "test_gpu_bench:behave", timeout_s=0.3 if name == "hangs" else 30) for name in names]
    given = {"processes": 1, "deadline": time.monotonic() + 30, **options}
    log = tmp_path / "log"
    left = run(units, lambda unit, row: rows.append((unit.key, row["status"], row["reason"])), log=log, **given)
    return rows, [unit.key for unit in left]


def test_a_unit_that_dies_costs_itself_alone(tmp_path: Path) -> None:
    rows, left = _run(["good", "dies", "better", "raises", "hangs", "best"], tmp_path)
    assert rows == [
        ("good", "ok", ""),
        ("dies", "ok", "before"),
        ("dies", "crashed", "SIGKILL"),
        ("better", "ok", ""),
        ("raises", "failed", "RuntimeError: out of ideas"),
        ("hangs", "timeout", "no end within 0.3 s"),
        ("best", "ok", ""),
    ]
    assert not left
    assert "said by best" in (tmp_path / "log").read_text()


def test_a_process_whose_device_is_broken_has_said_so_itself(tmp_path: Path) -> None:
    assert _run(["leaves", "good"], tmp_path)[0] == [("good", "ok", "")]


def test_the_deadline_leaves_units_over(tmp_path: Path) -> None:
    rows, left = _run(["good", "hangs", "never"], tmp_path, deadline=time.monotonic() - 1)
    assert not rows
    assert left == ["good", "hangs", "never"]


def test_a_unit_stopped_by_the_deadline_has_no_row(tmp_path: Path) -> None:
    units = [Unit("hangs", "test_gpu_bench:behave", timeout_s=30)]
    rows: list[Any] = []
    deadline = time.monotonic() + 0.5
    left = run(units, lambda *row: rows.append(row), processes=1, deadline=deadline, log=tmp_path / "log")
    assert not rows
    assert left == units


def test_several_processes_share_the_units(tmp_path: Path) -> None:
    rows, left = _run([f"unit {number}" for number in range(20)], tmp_path, processes=4)
    assert sorted(rows) == sorted((f"unit {number}", "ok", "") for number in range(20))
    assert not left


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    made = Session(tmp_path / "out", 60)
    yield made
    made.close()


def _row(unit: str, status: str = "ok", **more: Any) -> dict[str, Any]:
    return {"part": "tune", "unit": unit, "status": status, "reason": "", **more}


@pytest.mark.parametrize("source", ["folder", "archive alone", "archive"])
def test_a_later_call_takes_over_what_is_done(tmp_path: Path, session: Session, source: str) -> None:
    session.record(_row("one"))
    session.record(_row("two"))
    session.record(_row("two", "failed"))
    (session.out / "tables" / "gpu.json").write_text("{}")
    (session.raw / "log").write_text("x" * 100)
    session.pack("page")
    (session.out / ROWS).open("a").write('{"part":"tu')  # killed while writing
    earlier = session.out if source == "folder" else session.out / ARCHIVE
    if source == "archive alone":
        (session.out / ROWS).unlink()
        earlier = session.out
    later = Session(tmp_path / "later", 60, [earlier])
    assert later.statuses("tune") == {"one": "ok", "two": "failed"}
    assert (later.out / "tables" / "gpu.json").read_text() == "{}"
    later.call = "later"
    later.record(_row("two"))
    assert later.statuses("tune") == {"one": "ok", "two": "ok"}
    assert [row["status"] for row in later.latest("tune") if row["unit"] == "two"] == ["ok"]
    later.close()


def test_what_comes_back_is_few_files_and_everything(session: Session) -> None:
    session.record(_row("one"))
    session.say("a line")
    (session.raw / "deep").mkdir()
    (session.raw / "deep" / "workers.log").write_bytes(b"x" * 3 * 2**20 + b"end")
    (session.out / "tables" / "gpu.json").write_text("{}")
    session.pack("page")
    session.close()
    files = [path for path in session.out.rglob("*") if path.is_file()]
    assert len(files) <= 8
    assert all(len(path.relative_to(session.out).parts) <= 2 for path in files)
    with tarfile.open(session.out / ARCHIVE) as archive:
        names = archive.getnames()
        assert {"rows.jsonl", "summary.md", "log.txt", "tables/gpu.json", "raw/deep/workers.log"} <= set(names)
        log = archive.extractfile("raw/deep/workers.log")
        assert log is not None
        content = log.read()
        assert len(content) == 2**21  # of a long log the end
        assert content.endswith(b"end")


def _timed(implementation: str, way: str, rounds: list[float]) -> dict[str, Any]:
    case = {"batch_size": 8, "in_channels": 54, "clip_length": 16, "height": 56, "width": 56, "kernel_size": [3, 3, 3]}
    common = {"op": "depthwise_conv3d", "case": case, "dtype": "bf16", "direction": "forward", "regime": "cold"}
    times = {"median_s": rounds[1], "samples_s": [[seconds] for seconds in rounds], "floor_s": 2e-5, "bound": "bytes"}
    row = {"part": "kernels", "unit": "depthwise", "status": "ok", "reason": "", "floor_fraction": 2e-5 / rounds[1]}
    return {**common, **times, **row, "implementation": implementation, "way": way}


def test_the_summary_compares_with_the_best_peer_round_by_round(session: Session) -> None:
    session.record(_timed("library", "library contiguous", [9e-4] * 3))
    session.record(_timed("library", "library channels_last", [1e-4, 2e-4, 4e-4]))  # a machine that slows down
    session.record(_timed("cuda_rolling", "cuda_rolling channels_last", [0.25e-4, 0.5e-4, 1e-4]))
    session.record({**_timed("triton_direct", "", [1e-4] * 3), "status": "failed", "reason": "output error 1.0"})
    session.unreached["tune"] = 3
    page = summary(session)
    assert "| depthwise_conv3d | cuda_rolling | bf16 | forward | 1 | 4.00 | 4.00 | 4.00 |" in page
    assert "library channels_last 200.0 | cuda_rolling 50.0 | 4.00 ±0% | 20.0 (bytes) | 40% |" in page
    assert "- failed: depthwise cold: output error 1.0" in page
    assert "triton_direct" not in page  # a red check has no latency
    assert "units left (check: 1 stands for the rest of the tests): tune: 3" in page


def test_the_summary_of_checks_tells_why_not(session: Session) -> None:
    common = {"part": "check", "op": "conv3d", "direction": "forward", "test": "t"}
    ours = {**common, "implementation": "triton_igemm", "dtype": "bf16"}
    session.record({**ours, "unit": "a", "status": "ok", "reason": "", "over_gate": 0.25})
    session.record({**ours, "unit": "b", "status": "ok", "reason": "", "over_gate": 0.5})
    session.record({**ours, "unit": "c", "status": "skipped", "reason": "needs two CUDA devices", "over_gate": None})
    session.record({**ours, "unit": "d", "status": "crashed", "reason": "illegal address", "over_gate": None})
    session.record({**ours, "unit": "e", "status": "skipped", "reason": "dtype=fp64", "dtype": "fp64"})
    page = summary(session)
    assert "| conv3d | triton_igemm | bf16 | forward | 2 | 1 | 1 | 0.5 | needs two CUDA devices |" in page
    assert "- crashed: d: illegal address" in page
    assert "- conv3d/triton_igemm: dtype=fp64 (fp64 forward)" in page


def test_the_plan_begins_with_the_headlines_and_names_every_unit_once() -> None:
    units = [
        (plan.text_of(layer.op, plan.values_of(layer)), dtype, direction)
        for layer, dtype, _ in plan.layers()
        for direction in plan.directions(layer.op)
    ]
    assert len(set(units)) == len(units)
    first = [(layer, dtype) for layer, dtype, _ in plan.layers()][: len(plan.HEADLINES)]
    assert first == [(layer, "bf16") for layer in plan.HEADLINES]
    assert set(plan.SMALL) == set(OPS)
    for op, cases in plan.SMALL.items():
        for values in cases.values():
            OPS[op].case(values)
    for layer, dtype, _ in plan.layers():
        tuner.case_of(OPS[layer.op], plan.values_of(layer), dtype, "train")


CONFIGS = ({"speed": 3}, {"speed": 1}, {"speed": 2, "wrong": 1}, {"speed": 1, "raises": 1})
LAYER = Layer("causal_conv1d", {"in_channels": 2, "out_channels": 2, "clip_length": 4, "batch_size": 1})


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """An implementation whose configurations differ in speed, correctness and manners; its clock is faked."""
    now: dict[str, Any] = {"calls": 0}
    op = OPS["causal_conv1d"]

    def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dilation: int = 1) -> Tensor:
        key = tuning.Key("fp32", (x.shape[1], weight.shape[0]), (weight.shape[2], dilation), x.shape[2])
        config = tuning.pick("causal_conv1d/fake/forward", key, CONFIGS, TARGETS["sm_90"])
        now["calls"] += 1
        now["speed"] = config["speed"]
        if "raises" in config:
            raise RuntimeError("out of resource: shared memory")
        y: Tensor = op["library"].fn(x, weight, bias, dilation=dilation)
        return y + 1 if "wrong" in config else y

    def sample(call: Callable[[], Any], *_: object) -> Samples:
        call()
        return Samples([float(now["speed"])] * 3)

    monkeypatch.setitem(op.implementations, "fake", Implementation("fake", conv))
    monkeypatch.setattr(tuner, "sample", sample)
    monkeypatch.setattr(tuner, "warm_up", lambda *_: None)
    return now


def _tune(table: Path, **options: Any) -> list[tuner.Progress]:
    chosen: dict[str, Any] = {"dtypes": ("fp32",), "implementations": ("fake",), "directions": ("forward",)}
    return list(tuner.tune_layers([LAYER], table, device="cpu", **chosen, **options))


def test_tuning_takes_the_fastest_that_is_right(tmp_path: Path, fake: dict[str, Any]) -> None:
    table = tmp_path / "sm_90.json"
    ((tuned,),) = [progress.tuned for progress in _tune(table)]
    assert tuned.best is not None
    assert tuned.best.config == {"speed": 1}
    assert (tuned.before, tuned.source) == (CONFIGS[0], "analytic")
    reasons = [trial.reason for trial in tuned.trials]
    assert reasons[:2] == ["", ""]
    assert "output error" in reasons[2]
    assert reasons[3] == "RuntimeError: out of resource: shared memory"
    assert json.loads(table.read_text())["launches"] == {"causal_conv1d/fake/forward": {tuned.key: {"speed": 1}}}


def test_tuning_again_passes_over_what_is_known(tmp_path: Path, fake: dict[str, Any]) -> None:
    table = tmp_path / "sm_90.json"
    _tune(table)
    calls = fake["calls"]
    assert _tune(table)[0].tuned == ()
    assert fake["calls"] == calls + 1  # what it would launch is asked, no more
    assert _tune(table, resume=False)[0].tuned


def test_tuning_tells_why_not(tmp_path: Path, fake: dict[str, Any]) -> None:
    (progress,) = tuner.tune_layers(
        [LAYER], tmp_path / "t.json", device="cpu", dtypes=("tf32",), implementations=("fake",)
    )
    assert progress.reason == "causal_conv1d/fake: tf32 is an arithmetic of CUDA devices, not of cpu"


@pytest.mark.parametrize("direction", tuner.DIRECTIONS)
@pytest.mark.parametrize("op_name", list(OPS))
def test_every_direction_agrees_with_the_cpu_oracle(op_name: str, direction: str) -> None:
    """The float64 truth that is computed on the device is that of `vidkernels.checking`."""
    op, values = OPS[op_name], plan.SMALL[op_name]["odd"]
    case = tuner.case_of(op, values, "fp32", direction)
    inputs = tuner.inputs_of(op, values, case, 1, "cpu")
    for mine, theirs in zip(inputs.tensors(), op.inputs(case, seed=1).tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
        assert mine.stride() == theirs.stride()
    want = tuner.truth(op, inputs, direction, "fp32")
    exact = tuner.bind(op["reference"].fn, inputs.map(torch.Tensor.double), direction)()
    assert not tuner.errors(op, exact, want).failures(op, op.case(values, dtype="fp64"))
    got = tuner.bind(op["library"].fn, inputs, direction)()
    found = tuner.errors(op, got, want)
    assert not found.failures(op, case, found)
    assert (found.input_gradient is None) == (direction in ("forward", "weight_gradient"))
    assert (found.weight_gradient is None) == (direction in ("forward", "input_gradient"))


MISSING = ("msgspec", "fvcore", "av", "ray")
"""What the machine does not have."""


def _call(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    """bench/gpu.sh's own command on a CPU, in the state of the other machine's packages."""
    block = tmp_path / "site"
    block.mkdir(exist_ok=True)
    lines = "".join(f"sys.modules[{name!r}] = None\n" for name in MISSING)
    (block / "sitecustomize.py").write_text(f"import sys\n{lines}")
    environment = {
        **os.environ, "PYTHONPATH": f"{block}:{ROOT}:{ROOT / 'kernels'}", "TMPDIR": str(tmp_path),
        "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--smoke", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_call_without_a_gpu_or_the_missing_packages(tmp_path: Path) -> None:
    status, said = _call(tmp_path, "--out", str(tmp_path / "one"), "--parts", "models", "--only", "eager")
    assert status == 0, said
    assert "| tcn | forward | fp32 | eager |" in said
    resume = ("--resume", str(tmp_path / "one" / ARCHIVE))
    status, again = _call(tmp_path, "--out", str(tmp_path / "two"), "--parts", "models", "--only", "eager", *resume)
    assert status == 0, again
    assert "models: tcn eager" in said
    assert "models: tcn eager" not in again
    assert "| tcn | forward | fp32 | eager |" in again  # from the earlier call


def test_a_part_nobody_has(tmp_path: Path) -> None:
    status, said = _call(tmp_path, "--out", str(tmp_path / "out"), "--parts", "kernles")
    assert status == 2
    assert "unknown part 'kernles': known: check, sanitize, baselines, kernels, tune, models" in said


@pytest.mark.slow
def test_a_whole_call(tmp_path: Path) -> None:
    status, said = _call(tmp_path, "--out", str(tmp_path / "out"), "--minutes", "8")
    assert status == 0, said
    rows = [json.loads(line) for line in (tmp_path / "out" / ROWS).read_text().splitlines()]
    found = {(row["part"], row["status"]) for row in rows}
    assert {(part, "ok") for part in ("environment", "check", "sanitize", "kernels", "tune", "models")} <= found
    assert not [row for row in rows if row["status"] not in ("ok", "skipped")]
    tables = json.loads((tmp_path / "out" / "tables" / "sm_90.json").read_text())
    assert set(tables) == {"launches", "implementations"}
    assert set(tables["implementations"]["conv3d/train"]) == {"fp32 4x4 k1,1,1,1,1,1,1,1,1 p4"}


@pytest.mark.slow
def test_a_call_without_time_says_what_is_left(tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, said = _call(tmp_path, "--out", str(out), "--minutes", "0.25", "--parts", "kernels,tune")
    assert status == 3, said
    assert "Time ran out; units left" in said
    assert (out / ARCHIVE).exists()


CHECKS = """
import os
import pytest

NAMES = [("conv3d", "library", "bf16"), ("conv3d", "triton_igemm", "bf16")]

@pytest.mark.parametrize(("op_name", "name", "dtype"), NAMES)
@pytest.mark.parametrize("what", ["passes", "skips", "fails", "dies"])
def test_it(op_name, name, dtype, what):
    if what == "skips":
        pytest.skip("needs two CUDA devices")
    if what == "dies" and name == "library":
        os.abort()
    assert what != "fails", "error 1.0 exceeds 0.1"
"""


@pytest.mark.slow
def test_checks_are_rows_whatever_becomes_of_their_process(tmp_path: Path) -> None:
    (tmp_path / "test_checks.py").write_text(CHECKS)
    rows, done = tmp_path / "rows", tmp_path / "done"
    rows.touch()
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "VIDBENCH_GPU_ROWS": str(rows)}
    environment |= {"VIDBENCH_GPU_DONE": str(done), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        os.devnull,
        "--rootdir",
        str(tmp_path),
        "-n",
        "2",
        "--dist",
        "load",
    ]
    command += ["-p", "bench.gpu.rows_plugin", "-p", "no:cacheprovider", str(tmp_path / "test_checks.py")]

    def outcomes() -> dict[tuple[str, str], tuple[str, str]]:
        subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
        found = [json.loads(line) for line in rows.read_text().splitlines()]
        return {
            (r["implementation"], r["unit"].rpartition("[")[2].split("-")[0]): (r["status"], r["reason"]) for r in found
        }

    first = outcomes()
    for name in ("library", "triton_igemm"):
        assert first[name, "passes"] == ("ok", "")
        assert first[name, "skips"] == ("skipped", "needs two CUDA devices")
        assert first[name, "fails"][0] == "failed"
        assert "AssertionError: error 1.0 exceeds 0.1" in first[name, "fails"][1]
    assert first["library", "dies"][0] == "crashed"
    assert first["triton_igemm", "dies"] == ("ok", "")
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    done.write_text("\n".join(line["unit"] for line in lines if line["status"] in ("ok", "skipped")))
    rows.write_text("")
    assert set(outcomes()) == {("library", "fails"), ("triton_igemm", "fails"), ("library", "dies")}
