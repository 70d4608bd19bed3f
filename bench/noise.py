"""Where the noise comes from by which verdicts are tried: recorded rounds of a real machine, and simulated machines."""

from __future__ import annotations

import math
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vidbench.gate import LOOKS, SIDES, Side, Step, take_round
from vidbench.progress import Bar
from vidbench.results import RunWriter, load
from vidbench.sweep import Point

Numbers = npt.NDArray[np.float64]
"""Seconds: (sides, points, rounds, samples); NaN after the last sample of a process that took fewer than others."""

SAMPLES = 10
"""Of a simulated process."""

RECORDING = "samples.parquet"


# --- where the noise comes from ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Simulated:
    """A machine whose processes, samples and runs differ by chance alone."""

    name: str
    meaning: str
    process: float
    """Robust standard deviation of the logarithm of a process's time."""
    heavy: bool = True
    """Whether processes follow Student's t of three degrees of freedom, else a normal distribution."""
    sample: float = 0.01
    """Standard deviation of the logarithm of a sample within its process."""
    slow_mode: float = 0.0
    """By how much of the logarithm three processes in ten are slower."""
    weather: float = 0.0
    """Standard deviation of the steps of a random walk that all sides and points share, from round to round."""
    run: float = 0.1
    """Standard deviation of the logarithm of a stored run's time; sides that are measured in turn share it."""

    def draw(self, rng: np.random.Generator, points: int, *, sides: int = 3, apart: bool = False) -> Numbers:
        """Sides of one A/A sweep; `apart` makes each a run of its own."""
        shape = (sides, points, LOOKS[-1])
        if self.heavy:
            # Scaled so that half of all processes lie as far from the middle as those of a normal distribution do.
            processes = self.process * rng.standard_t(3, shape) * 0.6745 / 0.7649
        else:
            processes = self.process * rng.standard_normal(shape)
        processes += self.slow_mode * (rng.random(shape) < 0.3)
        processes += self.weather * np.cumsum(rng.standard_normal(LOOKS[-1]))
        if apart:
            processes += self.run * rng.standard_normal((sides, points, 1))
        logs = processes[..., None] + self.sample * rng.standard_normal((*shape, SAMPLES))
        return np.asarray(1e-3 * np.exp(logs))


@dataclass(frozen=True)
class Recorded:
    """Rounds that a real machine took in turn, dealt anew: which point, from which round on, which side is which."""

    folder: Path
    name: str = "recorded"

    @property
    def meaning(self) -> str:
        """What was recorded."""
        seconds, _ = self._recording()
        return f"{seconds.shape[1]} points × {seconds.shape[2]} rounds × {len(SIDES)} processes in turn"

    def draw(self, rng: np.random.Generator, points: int, *, sides: int = 3) -> Numbers:
        """Sides of one A/A sweep: contiguous rounds, so that what drifts still drifts."""
        seconds, _ = self._recording()
        _, recorded, rounds, _ = seconds.shape
        chosen = np.empty((sides, points, LOOKS[-1], seconds.shape[3]))
        distinct = rng.permutation(recorded)
        for index in range(points):
            # A small sweep takes every point once, a large one several times, from other rounds on.
            at = distinct[index % recorded]
            turns = (rng.integers(rounds) + np.arange(LOOKS[-1])) % rounds
            chosen[:, index] = seconds[rng.permutation(len(SIDES))[:sides], at][:, turns]
        return chosen

    def seconds_per_round(self) -> float:
        """What a round of all recorded points and sides took, checks included: the median; NaN where it is not told."""
        return self._recording()[1]

    def deviations(self) -> list[float]:
        """Of each point, the robust standard deviation of a round's change, as a share; smallest first."""
        base, head, again = np.log(self._recording()[0])
        changes = np.nanmedian(head - (base + again) / 2, axis=2)
        off = np.abs(changes - np.median(changes, axis=1, keepdims=True))
        return sorted((np.median(off, axis=1) / 0.6745).tolist())

    def _recording(self) -> tuple[Numbers, float]:
        if self.folder not in _RECORDINGS:
            _RECORDINGS[self.folder] = _read(self.folder)
        return _RECORDINGS[self.folder]


_RECORDINGS: dict[Path, tuple[Numbers, float]] = {}


def _read(folder: Path) -> tuple[Numbers, float]:
    import pandas as pd

    frame = pd.read_parquet(folder / RECORDING)
    points, rounds = frame["point"].unique(), sorted(frame["round"].unique())
    by = {key: group["sample_s"].to_numpy() for key, group in frame.groupby(["side", "point", "round"])}
    rounds = [
        number for number in rounds if all((side, point, number) in by for side in SIDES for point in points)
    ]  # a row that was not ok has no samples
    seconds = np.full((len(SIDES), len(points), len(rounds), max(map(len, by.values()))), np.nan)
    for which, point, number in np.ndindex(seconds.shape[:3]):
        samples = by[SIDES[which], points[point], rounds[number]]
        seconds[which, point, number, : len(samples)] = samples
    took = frame.groupby("round")["round_s"].first().median() if "round_s" in frame else math.nan
    return seconds, float(took)


MACHINES = (
    Simulated("shared", "processes differ by 2 %, now and then by far more, as on a shared machine", 0.02),
    Simulated("quiet", "processes differ by 0.5 %", 0.005, heavy=False, sample=0.005, run=0.01),
    Simulated("two modes", "three processes in ten are 10 % slower, for good", 0.005, slow_mode=0.1),
    Simulated("drifting", "as quiet, but the whole machine wanders by 2 % a round", 0.005, False, weather=0.02),
)


# --- recording --------------------------------------------------------------------------------------------------------


def ten_points() -> list[Point]:
    """Ten short points of every kind."""
    from vidbench.suites import plan

    chosen: dict[str, Point] = {}
    for sweep in plan("quick").sweeps:
        for point in sweep.points():
            if point.kind in ("op", "model") and point.mode == "forward" and point.case["clip_length"] == 8:
                chosen.setdefault(point.workload, point)
    return list(chosen.values())[:10]


def record(out: Path, rounds: int, seconds: float) -> None:
    """Takes rounds of three sides of the same code in turn, as the gate does, and keeps every sample; resumes."""
    import pandas as pd

    from vidbench.engine import devices
    from vidbench.engine.local import LocalEngine
    from vidbench.sweep import Sweep

    points = ten_points()
    sweeps = [Sweep(one.workload, one.kind, fixed=one.case) for one in points]
    bar = Bar(sys.stderr)
    with ExitStack() as stack:
        engines = {name: stack.enter_context(LocalEngine(timeout_s=600, takes_turns=True)) for name in SIDES}
        environment, _ = engines["head"].describe(*devices(points), {one.workload: one.kind for one in points})
        sides = {}
        for name in SIDES:
            writer = RunWriter.resume(
                out / name,
                suite="noise",
                sweeps=sweeps,
                environment=environment,
                command="bench/false_alarms.py record",
            )
            keys = frozenset(one.key for one in points)
            sides[name] = Side(engines[name], stack.enter_context(writer), environment, keys)

        def tell(step: Step) -> None:
            bar.update((step.round - 1) * step.of + step.done, rounds * step.of, f"round {step.round}")
            if step.done == step.of:
                bar.say(f"round {step.round} of {rounds}")

        took_s = _round_seconds(out)
        for number in range(1, rounds + 1):
            began = time.monotonic()
            taken = take_round(number, points, sides, seconds=seconds, progress=tell)
            if len(taken) == len(points) * len(SIDES):
                took_s[number] = time.monotonic() - began
    bar.close()
    rows = [
        {
            "side": name,
            "point": one.point.key,
            "round": one.round,
            "round_s": took_s.get(one.round, math.nan),
            "sample_s": sample,
        }
        for name in SIDES
        for one in load(out / name).measurements
        for sample in one.samples_s
    ]
    pd.DataFrame(rows).to_parquet(out / RECORDING, compression="zstd")


def _round_seconds(out: Path) -> dict[int, float]:
    """How long the rounds took that a recording has already."""
    import pandas as pd

    if not (out / RECORDING).exists():
        return {}
    took = pd.read_parquet(out / RECORDING).groupby("round")["round_s"].first().dropna()
    return {int(str(number)): float(seconds) for number, seconds in took.items()}
