"""Kills sweeps, gates and trainings at random moments, resumes them, and looks after every kill at what is left.

    python bench/kills.py [--kills 200] [--seed 0]

A kill is a SIGKILL of the whole process group at a moment uniform over the time that the command has last taken,
start-up included. After every kill the run loads, every line that was finished before is there byte for byte, no
process is left, and a checkpoint has not gone back. In the end everything is there once, and a model is trained to the
same bits as one whose training was not killed. Exits 1 at the first thing that does not hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from vidbench.results import HEADER, LINES, load

ROOT = Path(__file__).resolve().parents[1]

SHARES = {"sweep": 0.55, "train": 0.3, "gate": 0.15}
"""Of the kills: a gate takes several times as long as the others."""

PHASES = ("before anything new", "at work", "cut a write")
"""When a kill came: before the process had kept anything, later, or while it wrote."""

END_S = 30.0
"""For the processes of a command that was killed to be gone."""

MODEL = """
from torch import nn

class Mean(nn.Module):
    def __init__(self, num_classes=4):
        super().__init__()
        self.head = nn.Linear(3, num_classes)

    def forward(self, clip):
        return self.head(clip.mean((2, 3, 4)))
"""

QUICKLY = """
from dataclasses import replace
from functools import partial
from vidbench import cli, suites, training, trials
trials.Checkpoint = partial(training.Checkpoint, every_s=0.0)
suites.SUITES.update({name: replace(suite, seconds=0.01) for name, suite in suites.SUITES.items()})
cli.main()
"""
"""The command line with a checkpoint after every step, and little time to sample."""

CONV = ("--axis", "implementation=library", "--axis", "memory_format=contiguous", "--axis", "clip_length=4",
        "--axis", "batch_size=1", "--axis", "input_size=8", "--axis", "in_channels=16", "--axis", "out_channels=16",
        "--axis", "kernel_size=3", "--axis", "stride=1")  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A command that writes runs into `--out`, small enough to be killed often."""

    name: str
    start: tuple[str, ...]
    """What python is given."""
    runs: tuple[str, ...]
    """The run folders in `--out`."""
    entries: int
    """Lines in each of them when it is done."""
    ends: tuple[int, ...] = (0,)
    """Exit codes of being done."""


COMMANDS = {
    command.name: command
    for command in (
        Command(
            "sweep",
            ("-c", QUICKLY, "sweep", "models", "--model", "killed_model:Mean", "--axis", "input_size=8",
             "--axis", "clip_length=1,2,3,4", "--axis", "batch_size=1,2", "--rounds", "2"),
            (".",),
            16,
        ),
        Command(
            "train",
            ("-c", QUICKLY, "train", "frame_pool_avg", "--task", "appearance:clip_length=1", "--steps", "30",
             "--width-multiplier", "0.0625", "--batch-size", "4", "--seeds", "0,1"),
            (".",),
            2,
        ),
        Command(
            "gate",
            ("-c", QUICKLY, "gate", "conv3d", "--base", "base", *CONV, "--budget", "0"),
            ("base", "head", "again"),
            6,
            (0, 1),  # a busy machine may seem slower
        ),
    )
}  # fmt: skip


class Broken(Exception):
    """Something did not survive a kill."""


@dataclass
class Tally:
    """What was seen of one command."""

    kills: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    finished: int = 0
    """Folders in which everything was there in the end."""
    resumed: int = 0


def workplace(folder: Path) -> Path:
    """A repository of these sources with a commit on top of `base`, where nobody commits meanwhile."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("vidbench", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "constraints.txt", folder)
    (folder / "killed_model.py").write_text(MODEL)
    (folder / ".gitignore").write_text("runs/\n__pycache__/\n")
    for step in (("init", "-q"), ("add", "-A"), ("commit", "-qm", "base"), ("tag", "base")):
        _git(folder, *step)
    with (folder / "killed_model.py").open("a") as file:
        file.write("# head\n")
    _git(folder, "commit", "-qam", "head")
    return folder


def _git(folder: Path, *arguments: str) -> None:
    named = ("git", "-c", "user.name=kills", "-c", "user.email=kills@example.org", *arguments)
    subprocess.run(named, cwd=folder, check=True, capture_output=True)


def start(command: Command, place: Path, out: Path, log: Path) -> subprocess.Popen[bytes]:
    """The command, in a process group of its own, going on with whatever lies in `out`."""
    sources = os.pathsep.join((str(place), str(place / "kernels")))
    environ = {**os.environ, "PYTHONPATH": sources, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as said:
        return subprocess.Popen(
            [sys.executable, *command.start, "--out", str(out), "--resume"],
            cwd=place, env=environ, stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip


def lines_of(command: Command, out: Path) -> dict[str, bytes]:
    """By run the lines that are finished."""
    found = {}
    for name in command.runs:
        path = out / name / LINES
        content = path.read_bytes() if path.exists() else b""
        found[name] = content[: content.rfind(b"\n") + 1]
    return found


def checkpoints(out: Path) -> dict[str, dict[str, Any]]:
    """What every checkpoint holds."""
    return {path.name: torch.load(path, weights_only=True) for path in sorted((out / "training").glob("*.pt"))}


def cuts(command: Command, out: Path) -> set[tuple[Path, int]]:
    """Files whose writing was cut, with their sizes."""
    found = {(path, path.stat().st_size) for path in out.rglob("*.tmp")}
    for path in (out / name / LINES for name in command.runs):
        if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
            found.add((path, len(content)))
    return found


def look(command: Command, out: Path, before: dict[str, bytes], steps: dict[str, int]) -> None:
    """Holds what is left against what was there, and brings `steps` up to date.

    Raises:
        Broken: Something is lost, changed or there twice.
    """
    after = lines_of(command, out)
    for name, kept in before.items():
        if not after[name].startswith(kept):
            raise Broken(f"{out / name}: a finished line was lost or changed")
    for name in command.runs:
        if not (out / name / HEADER).exists():
            if after[name]:
                raise Broken(f"{out / name}: lines without {HEADER}")
            continue
        run = load(out / name)
        if len(run.measurements) != after[name].count(b"\n"):
            raise Broken(f"{out / name}: {len(run.measurements)} measurements in {after[name].count(10)} lines")
        twice = [entry for entry, count in _entries(run.measurements).items() if count > 1]
        if twice or len(run.measurements) > command.entries:
            raise Broken(f"{out / name}: measured twice: {twice}")
    for name, kept in checkpoints(out).items():
        if kept["step"] < steps.get(name, 0):
            raise Broken(f"{name} went back from step {steps[name]} to {kept['step']}")
        steps[name] = kept["step"]


def _entries(measurements: list[Any]) -> Counter[tuple[str, int]]:
    return Counter((one.point.key, one.round) for one in measurements)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a process group, and waits for all that came of it to be gone.

    Raises:
        Broken: Something of it goes on.
    """
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    left = psutil.wait_procs(family, timeout=END_S)[1]
    left = [one for one in left if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    if left:
        raise Broken(f"still at work: {[' '.join(one.cmdline()) for one in left]}")


def until_done(
    command: Command, place: Path, out: Path, life_s: float, rng: random.Random, tally: Tally, kills: int
) -> float:
    """Kills and resumes a command until everything is there; the seconds that its last process took."""
    log = out.with_suffix(".log")
    seen: dict[str, bytes] = dict.fromkeys(command.runs, b"")
    steps: dict[str, int] = {}
    while True:
        began = lines_of(command, out), dict(steps)
        cut_before = cuts(command, out)
        started = time.monotonic()
        process = start(command, place, out, log)
        if tally.kills < kills:
            moment_s = rng.uniform(0, life_s)
            try:
                process.wait(moment_s)
            except subprocess.TimeoutExpired:
                seen = lines_of(command, out)
                kill(process)
                tally.kills += 1
                tally.resumed += 1
                look(command, out, seen, steps)
                working = (lines_of(command, out), steps) != began
                torn = cuts(command, out) - cut_before
                tally.phases[PHASES[2 if torn else 1 if working else 0]] += 1
                if not working:
                    life_s *= 1.1  # the machine may have become slower, and lives longer
                continue
        code, took_s = process.wait(), time.monotonic() - started
        if code not in command.ends:
            raise Broken(f"{command.name} ended with {code}: {log.read_text()[-500:]}")
        look(command, out, seen, steps)
        for name in command.runs:
            done = load(out / name)
            if done.warnings or len(done.measurements) != command.entries:
                raise Broken(f"{out / name}: {len(done.measurements)} of {command.entries} in the end; {done.warnings}")
        tally.finished += 1
        return took_s


def weights(out: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of every trained model, by name."""
    for name, kept in checkpoints(out).items():
        for tensor, value in kept["model"].items():
            yield f"{name}: {tensor}", value


def accuracies(out: Path) -> list[Any]:
    """What was found of every training, its time aside."""
    found = (one.accuracy for one in load(out).measurements)
    return [dataclasses.replace(one, train_s=0.0) for one in found if one is not None]


def same(one: Path, other: Path) -> None:
    """Holds two trainings against each other.

    Raises:
        Broken: They differ in a bit.
    """
    first, second = dict(weights(one)), dict(weights(other))
    if first.keys() != second.keys() or not first:
        raise Broken(f"{other}: not the weights of {one}")
    for name, tensor in first.items():
        if not torch.equal(tensor, second[name]):
            raise Broken(f"{other}: {name} differs from that of a training that was not killed")
    if accuracies(one) != accuracies(other):
        raise Broken(f"{other}: accuracies differ from those of a training that was not killed")


def torture(
    name: str, kills: int, rng: random.Random, place: Path, tell: Callable[[str], None] = lambda _: None
) -> Tally:
    """Kills a command so many times, in as many folders as it takes.

    Raises:
        Broken: Something did not survive.
    """
    command, tally = COMMANDS[name], Tally()
    whole = place / "runs" / f"{name}-whole"
    whole.parent.mkdir(exist_ok=True)
    life_s = until_done(command, place, whole, 0.0, rng, Tally(), 0)
    tell(f"{name}: {life_s:.1f} s when it is not killed")
    while tally.kills < kills:
        out = place / "runs" / f"{name}-{tally.finished}"
        # What else the machine does changes how long a life is; of a resumed one only the end was seen.
        life_s = 1.25 * until_done(command, place, out, life_s, rng, tally, kills)
        if name == "train":
            same(whole, out)
        tell(f"{name}: {tally.kills} of {kills} kills, {tally.finished} folders done")
    return tally


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    rows: list[tuple[object, ...]] = [("command", "kills", *PHASES, "resumed", "folders done", "outcome")]
    wrong = 0
    with tempfile.TemporaryDirectory() as temporary:
        place = workplace(Path(temporary) / "repository")
        for name, share in SHARES.items():
            try:
                tally = torture(name, round(share * given.kills), rng, place, lambda line: print(line, flush=True))
                outcome = "nothing lost, nothing twice" + (", same weights" if name == "train" else "")
            except Broken as broken:
                wrong, tally, outcome = 1, Tally(), f"BROKEN: {broken}"
            counts = (tally.phases[phase] for phase in PHASES)
            rows.append((name, tally.kills, *counts, tally.resumed, tally.finished, outcome))
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(f"{one!s:<{width}}" for one, width in zip(row, widths, strict=True)).rstrip())
    return wrong


if __name__ == "__main__":
    sys.exit(main())
