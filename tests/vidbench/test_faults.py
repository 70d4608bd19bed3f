"""Faults, made on purpose: what docs/faults.md promises of each. Crashes, hangs and kills are in test_engine too."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from vidbench.claims import investigate
from vidbench.engine.local import LocalEngine
from vidbench.records import Environment, Measurement
from vidbench.results import LINES, load
from vidbench.sweep import Point, RequestError
from vidbench.training import Checkpoint, Recipe, train

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENT = Environment("m")
FIRST, SECOND, THIRD = (Point("conv3d", "op", "library", case={"clip_length": n}) for n in (1, 2, 3))

# ---- workers that lie ----

WORKER = """
import os, sys, socket, time
from dataclasses import replace
from pathlib import Path
import msgspec
from vidbench import worker
from vidbench.records import Measurement

worker.AHEAD = ()
told = Path({told!r})

def honest(task):
    return Measurement(task.point, task.round, "ok", samples_s=(0.1,), trust_reasons=(str(os.getpid()),))

def framed(answer):
    body = msgspec.msgpack.encode(answer)
    return len(body).to_bytes(4, "big") + body

def lie(connection, task):
    good = honest(task)
    other = replace(task.point, workload="another")
{lie}

def work(connection):
    while (request := worker.receive(connection, worker.Describe | worker.Adopt | worker.Task)) is not None:
        if isinstance(request, worker.Task):
            if told.exists():
                worker.send(connection, honest(request))
            else:
                told.touch()
                lie(connection, request)

worker._work = work
worker.serve(socket.socket(fileno=int(sys.argv[-1])))
"""

LIES = {
    "another point": ("worker.send(connection, replace(good, point=other))", "it is of another/library/"),
    "another round": ("worker.send(connection, replace(good, round=7))", "it is of round 7"),
    "a negative time": ("worker.send(connection, replace(good, samples_s=(0.1, -0.1)))", "samples_s has -0.1"),
    "no time at all": ("worker.send(connection, replace(good, samples_s=(0.0,)))", "samples_s has 0.0"),
    "not a number": ("worker.send(connection, replace(good, samples_s=(0.1, float('nan'))))", "samples_s has nan"),
    "infinity": ("worker.send(connection, replace(good, samples_s=(float('inf'),)))", "samples_s has inf"),
    "ok without a time": ("worker.send(connection, replace(good, samples_s=()))", "neither times nor an accuracy"),
    "a negative count": ("worker.send(connection, replace(good, params=-1))", "params is -1"),
    "an unknown status": ("worker.send(connection, {**msgspec.to_builtins(good), 'status': 'fine'})", "unreadable: "),
    "another message": ("worker.send(connection, ['hello'])", "unreadable: "),
    "garbage": ("connection.sendall((9).to_bytes(4, 'big') + bytes(range(200, 209)))", "unreadable: "),
    "a huge length": ("connection.sendall(b'\\xff' * 4)", "unreadable: a message of 4294967295 bytes"),
}  # fmt: skip


@pytest.fixture
def liar(tmp_path: Path) -> Callable[[str], Path]:
    """Makes an interpreter whose first worker lies at its first point; later ones are honest."""

    def make(lie: str) -> Path:
        indented = "".join(f"    {line}\n" for line in lie.splitlines())
        (tmp_path / "liar.py").write_text(WORKER.format(told=str(tmp_path / "told"), lie=indented))
        script = tmp_path / "python"
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -P {tmp_path / "liar.py"} "$@"\n')
        script.chmod(0o755)
        return script

    return make


def asked(engine: LocalEngine, point: Point, number: int = 1) -> Measurement:
    return engine.measure(point, number, ENVIRONMENT, seconds=0.01, video=None)


@pytest.mark.parametrize("name", LIES)
def test_a_worker_that_lies_is_not_believed(name: str, liar: Callable[[str], Path]) -> None:
    lie, said = LIES[name]
    with LocalEngine(timeout_s=60, python=liar(lie)) as engine:
        engine._ready()
        assert engine._worker is not None
        before = engine._worker.pid
        refused, after = asked(engine, FIRST), asked(engine, SECOND, 2)
    assert (refused.point, refused.round, refused.status) == (FIRST, 1, "crashed")
    assert refused.reason.startswith("the worker's answer cannot be believed: ")
    assert said in refused.reason
    assert not refused.samples_s
    assert (after.point, after.round, after.status) == (SECOND, 2, "ok")
    assert after.trust_reasons != (str(before),), "a fresh worker"
    assert not psutil.pid_exists(before) or psutil.Process(before).status() == psutil.STATUS_ZOMBIE


def test_an_answer_before_its_question_is_not_taken_for_one(liar: Callable[[str], Path]) -> None:
    early = (
        "connection.sendall(framed(good) + framed(replace(good, point=replace(task.point, case={'clip_length': 2}))))"
    )
    with LocalEngine(timeout_s=60, python=liar(early)) as engine:
        found = [asked(engine, point) for point in (FIRST, SECOND, THIRD)]
    assert [one.status for one in found] == ["ok", "crashed", "ok"]
    assert found[1].reason.endswith("it answered before it was asked")


@pytest.mark.parametrize(
    "lie",
    ["time.sleep(3600)", "for byte in framed(good):\n    connection.sendall(bytes([byte]))\n    time.sleep(0.4)"],
    ids=["never", "a byte at a time"],
)
def test_an_answer_that_does_not_come_in_time_costs_its_point(lie: str, liar: Callable[[str], Path]) -> None:
    with LocalEngine(timeout_s=2, python=liar(lie)) as engine:
        found = [asked(engine, point) for point in (FIRST, SECOND)]
    assert [one.status for one in found] == ["timeout", "ok"]
    assert found[0].reason == "no result within 2 s"


def test_a_signal_without_a_name_ends_a_worker_as_any_other(liar: Callable[[str], Path]) -> None:
    with LocalEngine(timeout_s=60, python=liar("os.kill(os.getpid(), 40)")) as engine:
        found = [asked(engine, point) for point in (FIRST, SECOND)]
    assert [one.status for one in found] == ["crashed", "ok"]
    assert found[0].reason == "signal 40"


# ---- a GPU that fails, without a GPU ----

GPU = """
import sys, socket
import torch, vidbench.measure
from pathlib import Path
from vidbench import worker
from vidbench.records import Measurement

told = Path({told!r})

def broken(*_):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def measured(point, environment, *_):
    if point.case["clip_length"] == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\\nMore words.")
    if point.case["clip_length"] == 2:
        torch.cuda.synchronize = broken  # and for the rest of this process's life
        broken()
    torch.cuda.synchronize()
    return Measurement(point, 1, "ok", samples_s=(0.1,))

torch.cuda.synchronize = torch.cuda.empty_cache = lambda: None
vidbench.measure._measure = measured
worker.serve(socket.socket(fileno=int(sys.argv[-1])))
"""


def test_a_full_device_and_a_broken_one_cost_their_points_alone(
    liar: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "WORKER", GPU)
    points = [replace(point, device="cuda") for point in (FIRST, SECOND, THIRD)]
    with LocalEngine(timeout_s=120, python=liar("")) as engine:
        found = [asked(engine, point) for point in points]
    assert [one.status for one in found] == ["oom", "crashed", "ok"]
    assert found[0].reason == "CUDA out of memory. Tried to allocate 20.00 GiB."
    assert found[1].reason == "RuntimeError: CUDA error: an illegal memory access was encountered"


# ---- a full disk ----


def _limited(size: int) -> Callable[[], None]:
    """For a process whose files may not grow beyond `size`, as on a disk that is full."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def vidbench(*arguments: str | Path, cwd: Path, full: int | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vidbench.cli", *map(str, arguments)], capture_output=True, text=True, check=False,
        preexec_fn=None if full is None else _limited(full), env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=cwd,
    )  # fmt: skip


def refused(ended: subprocess.CompletedProcess[str], said: str) -> bool:
    """Whether a command ended with exit code 2 and one line of error that says so."""
    errors = [line for line in ended.stderr.splitlines() if line.startswith("vidbench: error: ")]
    return ended.returncode == 2 and len(errors) == 1 and said in errors[0] and "Traceback" not in ended.stderr


def test_a_full_disk_ends_a_sweep_in_a_line_and_it_is_gone_on_with(tmp_path: Path) -> None:
    sweep = [
        *("sweep", "models", "--model", "user_models:tiny", "--axis", "clip_length=1,2,3,4", "--axis", "batch_size=1"),
        *("--axis", "input_size=8", "--rounds", "2", "--resume", "--out", tmp_path / "run"),
    ]
    ended = vidbench(*sweep, cwd=HERE, full=4500)
    assert refused(ended, f"cannot write to {tmp_path / 'run' / LINES}"), ended.stderr
    kept = (tmp_path / "run" / LINES).read_bytes()
    assert 0 < len(load(tmp_path / "run").measurements) == kept.count(b"\n") < 8
    ended = vidbench(*sweep, cwd=HERE)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "run" / LINES).read_bytes().startswith(kept)
    done = load(tmp_path / "run")
    assert Counter((one.point.key, one.round) for one in done.measurements).most_common(1)[0][1] == 1
    assert len(done.measurements) == 8


def test_a_disk_that_is_full_from_the_start_is_said(tmp_path: Path) -> None:
    sweep = ["sweep", "models", "--model", "user_models:tiny", "--axis", "clip_length=1", "--out", tmp_path / "run"]
    ended = vidbench(*sweep, cwd=HERE, full=100)
    assert refused(ended, f"cannot write a run to {tmp_path / 'run'}"), ended.stderr


def _points(start: int) -> Any:
    while True:
        generator = torch.Generator().manual_seed(start)
        yield torch.randn(8, 4, generator=generator), torch.randint(2, (8,), generator=generator)
        start += 1


RECIPE = Recipe(width_multiplier=1.0, learning_rate=0.1, steps=4, batch_size=8)


def _trained(path: Path) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    train(model, _points, RECIPE, checkpoint=Checkpoint(path, "a test", every_s=0.0))
    return model


@pytest.mark.parametrize(
    "trouble", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")]
)
def test_a_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path, trouble: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _trained(tmp_path / "whole.pt")
    save, calls = torch.save, iter(range(9))

    def full(state: Any, file: Any) -> None:
        if next(calls) == 2:
            file.write(b"a part")
            raise trouble
        save(state, file)

    path = tmp_path / "broken.pt"
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(RequestError) as caught:
            _trained(path)
    assert str(caught.value).startswith(f"cannot write {path}: {getattr(trouble, 'strerror', None) or trouble};")
    assert torch.load(path, weights_only=True)["step"] == 2
    assert [one.name for one in tmp_path.iterdir() if one.suffix == ".tmp"] == []
    assert torch.equal(_trained(path).weight, whole.weight)


@pytest.mark.slow
def test_a_full_disk_ends_a_training_in_a_line(tmp_path: Path) -> None:
    train_ = ["train", "frame_pool_avg", "--task", "appearance:clip_length=1", "--steps", "2", "--width-multiplier",
              "0.0625", "--batch-size", "4", "--out", tmp_path / "run", "--resume"]  # fmt: skip
    ended = vidbench(*train_, cwd=tmp_path, full=20_000)
    assert refused(ended, f"cannot write {tmp_path / 'run' / 'training'}"), ended.stderr
    assert not list((tmp_path / "run" / "training").iterdir())
    assert vidbench(*train_, cwd=tmp_path).returncode == 0
    assert len(load(tmp_path / "run").measurements) == 1


@pytest.mark.slow
def test_a_full_disk_ends_an_investigation_in_a_line(tmp_path: Path) -> None:
    claims = ["claims", "tcn_gradients_are_stable", "--jobs", "1", "--out", tmp_path / "run", "--resume"]
    ended = vidbench(*claims, cwd=tmp_path, full=7000)  # two outcomes and a part of the third
    assert refused(ended, f"cannot write to {tmp_path / 'run'}"), ended.stderr
    kept = len(investigate.load(tmp_path / "run")[1])
    assert kept
    ended = vidbench(*claims, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    done = investigate.load(tmp_path / "run")[1]
    assert len({outcome.experiment.key for outcome in done}) == len(done) > kept


# ---- files cut at every byte ----


@pytest.mark.parametrize("step", [37, pytest.param(1, marks=pytest.mark.slow)])
def test_a_checkpoint_cut_at_any_byte_is_refused(tmp_path: Path, step: int) -> None:
    path = tmp_path / "training.pt"
    _trained(path)
    content = path.read_bytes()
    for cut in (*range(0, len(content) - 100, step), *range(len(content) - 100, len(content))):
        path.write_bytes(content[:cut])
        with pytest.raises(RequestError, match=r"training\.pt is not a checkpoint"):
            _trained(path)
    path.write_bytes(content)
    _trained(path)


def test_outcomes_cut_at_any_byte_load_up_to_the_last_whole_line(tmp_path: Path) -> None:
    header = investigate.Header(1, "2026-01-01T00:00:00Z", "small", "cpu", "vidbench claims", ENVIRONMENT, "abc")
    investigate._open(tmp_path, header, resume=True)
    with (tmp_path / investigate.LINES).open("ab") as file:
        for seed in range(3):
            experiment = investigate.Experiment("relus", {"model": "r3d_18", "shape": (1, 2)}, seed)
            investigate._write(file, investigate.Outcome(experiment, [{"relus": 17.0}], 0.5, ""))
    content = (tmp_path / investigate.LINES).read_bytes()
    ends = [index + 1 for index, byte in enumerate(content) if byte == ord("\n")]
    for cut in range(len(content) + 1):
        (tmp_path / investigate.LINES).write_bytes(content[:cut])
        assert len(investigate.load(tmp_path)[1]) == sum(end <= cut for end in ends), cut
        assert len(investigate._restore(tmp_path)) == sum(end <= cut for end in ends), cut
        assert (tmp_path / investigate.LINES).read_bytes() == content[: max((e for e in ends if e <= cut), default=0)]


@pytest.mark.parametrize("damage", [b'{"kind":"\xff"}\n', b"[" * 100_000 + b"\n", b"\x00\n"])
def test_damaged_outcomes_are_refused_in_a_line(tmp_path: Path, damage: bytes) -> None:
    header = investigate.Header(1, "2026-01-01T00:00:00Z", "small", "cpu", "vidbench claims", ENVIRONMENT, "abc")
    investigate._open(tmp_path, header, resume=True)
    (tmp_path / investigate.LINES).write_bytes(damage)
    with pytest.raises(RequestError, match=rf"{investigate.LINES}, line 1: "):
        investigate.load(tmp_path)
    (tmp_path / investigate.HEADER).write_bytes(damage)
    with pytest.raises(RequestError, match=rf"{investigate.HEADER} cannot be read: "):
        investigate.load(tmp_path)


# ---- signals ----

SMALL = ["--axis", "implementation=library", "--axis", "memory_format=contiguous", "--axis", "clip_length=4", "--axis",
         "batch_size=1", "--axis", "input_size=8", "--axis", "in_channels=16", "--axis", "out_channels=16", "--axis",
         "kernel_size=3", "--axis", "stride=1"]  # fmt: skip

AT_WORK = {
    "sweep": (["sweep", "models", "--model", "user_models:tiny", "--model", "user_models:Hangs", "--axis",
               "clip_length=4", "--axis", "input_size=8"], LINES),
    "gate": (["gate", "conv3d", "--base", "HEAD", *SMALL], f"again/{LINES}"),
    "train": (["train", "frame_pool_avg", "--task", "appearance:clip_length=1", "--steps", "100000", "--batch-size",
               "4", "--width-multiplier", "0.0625"], LINES),
    "claims": (["claims", "tcn_gradients_are_stable", "--jobs", "1"], investigate.LINES),
}  # fmt: skip
"""A command that will not end soon, and the file that tells that it is at work."""


def _repository(folder: Path) -> Path:
    """These sources under a commit of their own."""
    for name in ("vidbench", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    for arguments in (("init", "-q"), ("add", "-A"), ("commit", "-qm", "base")):
        named = ("git", "-c", "user.name=test", "-c", "user.email=test@example.org", *arguments)
        subprocess.run(named, cwd=folder, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("sweep", signal.SIGTERM),
        *(pytest.param(name, signal.SIGTERM, marks=pytest.mark.slow) for name in ("gate", "train", "claims")),
        *(pytest.param(name, signal.SIGINT, marks=pytest.mark.slow) for name in ("gate", "train")),
    ],
)
def test_a_signal_ends_a_command_in_order(name: str, number: signal.Signals, tmp_path: Path) -> None:
    arguments, lines = AT_WORK[name]
    cwd = _repository(tmp_path / "repository") if name == "gate" else HERE
    out = tmp_path / "run"
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    if name == "gate":
        environ["PYTHONPATH"] = os.pathsep.join((str(cwd), str(cwd / "kernels")))
    process = subprocess.Popen(
        [sys.executable, "-m", "vidbench.cli", *arguments, "--out", str(out)], cwd=cwd, env=environ, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 400
    while not ((out / lines).exists() and (name == "train" or (out / lines).stat().st_size)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if name == "train":
        time.sleep(2)  # its run is open; it begins to train
    family = psutil.Process(process.pid).children(recursive=True)
    kept = (out / lines).read_bytes()
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert said.splitlines()[-1].startswith("vidbench: interrupted")
    assert f"add --resume --out {out} to go on" in said
    assert "Traceback" not in said
    assert (out / lines).read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    _, left = psutil.wait_procs(family, timeout=30)
    with contextlib.suppress(psutil.NoSuchProcess):
        assert [one.cmdline() for one in left if one.status() != psutil.STATUS_ZOMBIE] == []
    if name == "gate":
        assert not (out / "source").exists()
        for side in ("base", "head", "again"):
            load(out / side)
    elif name != "claims":
        load(out)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kills_at_random_moments_lose_nothing() -> None:
    """A few of the two hundred."""
    script = [sys.executable, str(ROOT / "bench" / "kills.py"), "--kills", "8", "--seed", "3"]
    ended = subprocess.run(script, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("nothing lost, nothing twice") == 3
