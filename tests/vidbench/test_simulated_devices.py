"""Devices and clocks that misbehave, simulated: a lowered trust with its reason, a failed row or UNDECIDED, never a
wrong verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vidbench import timing
from vidbench.compare import FALSE_DISCOVERY_RATE, Comparison, compare
from vidbench.gate import LOOKS
from vidbench.measure import measure
from vidbench.records import Environment, Measurement
from vidbench.results import Run
from vidbench.sweep import Point
from vidbench.timing import Budget, Samples, Timer, sample, warm_up
from vidbench.trust import judge, two_modes

CASE = {"in_channels": 4, "out_channels": 6, "clip_length": 4, "batch_size": 2, "height": 9, "width": 8}
UNLIMITED = Environment("m", flops_per_s={"cpu/fp32": 1e18}, bytes_per_s={"cpu/1000": 1e15})


class Machine:
    """Simulated time: what a call takes, and what a clock makes of it.

    Args:
        seconds: What a call takes at a moment; noise of 15 % is added, so that sampling takes its whole budget.
        read: What the clock shows at a moment.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        seconds: Callable[[float], float],
        read: Callable[[float], float] = float,
        *,
        noise: float = 0.15,
        seed: int = 0,
    ) -> None:
        self.now, self.seconds, self.read, self.noise = 0.0, seconds, read, noise
        self.generator = np.random.default_rng(seed)
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=self.perf_counter))

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.read(self.now)

    def call(self) -> None:
        self.now += self.seconds(self.now) * math.exp(self.noise * self.generator.standard_normal())

    def measured(self, regime: str = "hot") -> Measurement:
        """A point that takes this time, as `measure` judges it."""

        def sampler(_: Any, timer: Timer, budget: Budget) -> Samples:
            return sample(self.call, timer, budget)

        point = Point("conv3d", "op", "library", regime=regime, case=CASE)
        return measure(point, UNLIMITED, sampler=sampler)

    def samples(self) -> Samples:
        timer = Timer("cpu", "hot")
        warm_up(self.call, timer, 1.0)
        return sample(self.call, timer, Budget())


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after_s", [0.17, 0.25, 0.33])
def test_a_clock_that_steps_down_while_sampling_is_said(monkeypatch: pytest.MonkeyPatch, after_s: float) -> None:
    """The hundred samples take half a second to 0.8 s; the warm-up sees the fast device alone."""
    machine = Machine(monkeypatch, lambda now: 5e-3 if now < after_s else 8e-3)
    found = machine.samples()
    trust, reasons = judge(found.device_s, stop=found.stop)
    assert trust != "good"
    assert any(reason.startswith("drifted +") for reason in reasons), reasons


def test_a_device_that_is_slower_when_hot_parts_cold_from_hot_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """It warms from the first call on and gives way after 0.25 s."""
    machine = Machine(monkeypatch, lambda now: 5e-3 * (1 + 0.5 / (1 + math.exp(-40 * (now - 0.25)))))
    row = machine.measured()
    assert row.trust != "good"
    assert any(reason.startswith("drifted +") for reason in row.trust_reasons), row.trust_reasons


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_two_speeds_within_a_process_are_said(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    generator = np.random.default_rng(1)
    machine = Machine(monkeypatch, lambda _: 5e-3 * (1.1 if generator.random() < share else 1.0), noise=0.005)
    row = machine.measured()
    assert row.trust != "good" or len(row.samples_s) < 30  # where a few agreed by chance, sampling has ended
    taken = [5e-3 * (1.1 if generator.random() < share else 1.0) for _ in range(100)]
    found = two_modes(taken)
    assert found is not None
    assert found[0] == pytest.approx(share, abs=0.12)
    assert found[1] == pytest.approx(0.1)


@pytest.mark.parametrize("spread", [0.01, 0.05, 0.2])
def test_plain_noise_has_one_speed(spread: float) -> None:
    generator = np.random.default_rng(2)
    noise = [
        generator.standard_normal,
        lambda size: generator.standard_t(2, size),
        lambda size: generator.exponential(1, size),
    ]
    alarms = sum(two_modes(np.exp(spread * noise[i % 3](count)).tolist()) is not None
                 for i in range(600) for count in (20, 30, 100))  # fmt: skip
    assert alarms <= 18  # of 1,800


# --- clocks -----------------------------------------------------------------------------------------------------------


def test_a_clock_that_jumps_ahead_moves_no_median_and_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Machine(monkeypatch, lambda _: 5e-3).samples()
    jump = 5e-3 * 40
    jumped = Machine(monkeypatch, lambda _: 5e-3, lambda now: now + 3600 * (now > jump))
    row = jumped.measured()
    assert row.status == "ok"
    assert max(row.samples_s) > 3600
    assert row.median_s == pytest.approx(statistics.median(honest.device_s), rel=0.1)
    assert any("times the median" in reason for reason in row.trust_reasons), row.trust_reasons


def test_a_clock_that_jumps_back_is_a_failed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, lambda _: 5e-3, lambda now: now - 3600 * (now > 0.2))
    row = machine.measured()
    assert row.status == "failed"
    assert row.reason.startswith("the clock went backwards or stood still: a sample of -3.6e+03 s")
    assert not row.samples_s


def test_a_clock_that_jumps_before_the_samples_harms_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for by in (3600.0, -3600.0):
        machine = Machine(monkeypatch, lambda _: 1e-5, lambda now, by=by: now + by * (now > 1.5e-5), noise=0.01)  # type: ignore[misc]
        found = sample(machine.call, Timer("cpu", "hot"), Budget())
        assert statistics.median(found.device_s) == pytest.approx(1e-5, rel=0.2)
        assert len(found.device_s) >= 6


def test_a_clock_whose_rate_drifts_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, lambda _: 5e-3, lambda now: now * (1 + now))
    row = machine.measured()
    assert any(reason.startswith("drifted +") for reason in row.trust_reasons), row.trust_reasons


def coarse(now: float) -> float:
    """Moves every 10 ms."""
    return math.floor(now * 100) / 100


@pytest.mark.parametrize("seconds", [1e-4, 1e-3, 4e-3, 3e-2])
def test_a_coarse_clock_is_given_samples_long_enough(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    machine = Machine(monkeypatch, lambda _: seconds, coarse, noise=0.01)
    timer = Timer("cpu", "hot")
    assert timer.step_s == pytest.approx(0.01)
    found = sample(machine.call, timer, Budget())
    assert statistics.median(found.device_s) == pytest.approx(seconds, rel=0.01)
    assert statistics.median(found.device_s) * found.calls_per_sample > 150 * 0.01


def test_a_coarse_clock_has_no_cold_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Machine(monkeypatch, lambda _: 4e-2, coarse, noise=0.01).measured("cold")
    assert row.status == "failed"
    assert row.reason.startswith("the clock moves in steps of 0.01 s, over 1% of a sample of 0.04 s")
    assert "use the hot regime" in row.reason


def test_a_clock_that_stands_still_fails_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MOST_READINGS", 1000)
    row = Machine(monkeypatch, lambda _: 1e-3, lambda _: 7.0).measured()
    assert row.status == "failed"
    assert row.reason.startswith("the clock went backwards or stood still")


def test_a_fine_clock_has_no_step() -> None:
    assert timing.clock_step_s() < 1e-5


# --- verdicts ---------------------------------------------------------------------------------------------------------


def judged(times: Sequence[Sequence[Sequence[float]]], rounds: int) -> Comparison:
    """A gate's look at base, head and base again: the sides' points' seconds of every round."""
    runs = []
    for name, side in zip(("base", "head", "again"), times, strict=True):
        rows = [
            Measurement(
                Point("conv3d", "op", "library", case={"clip_length": number}), round, "ok", samples_s=[seconds] * 3
            )
            for number, point in enumerate(side)
            for round, seconds in enumerate(point[:rounds], 1)
        ]
        runs.append(Run(1, name, "s", "", (), Environment("m"), "", None, rows, (), Path(name)))
    return compare(runs[0], runs[1], again=runs[2], rate=FALSE_DISCOVERY_RATE / len(LOOKS))


def alarms(make: Callable[[np.random.Generator], np.ndarray[Any, Any]], sweeps: int) -> int:
    """In how many gates of unchanged code any look calls any point SLOWER or FASTER."""
    generator = np.random.default_rng(3)
    return sum(
        any(one.verdict in ("SLOWER", "FASTER") for look in LOOKS for one in judged(times.tolist(), look).points)
        for times in (make(generator) for _ in range(sweeps))
    )


POINTS, ROUNDS = 10, LOOKS[-1]


def two_speeds_of_processes(generator: np.random.Generator) -> np.ndarray[Any, Any]:
    modes = np.where(generator.random((3, POINTS, ROUNDS)) < 0.5, 1.1, 1.0)
    return 5e-3 * modes * np.exp(0.005 * generator.standard_normal(modes.shape))


def a_rate_that_drifts(generator: np.random.Generator) -> np.ndarray[Any, Any]:
    """By a percent with every round, under all three sides alike."""
    noise = np.exp(0.01 * generator.standard_normal((3, POINTS, ROUNDS)))
    return 5e-3 * noise * 1.01 ** np.arange(ROUNDS)


def steps_of_a_clock(generator: np.random.Generator) -> np.ndarray[Any, Any]:
    """Medians of samples of 200 steps, as they are rounded; true times differ by less than a step."""
    true = 5e-3 * (1 + 0.002 * generator.random((3, POINTS, 1))) * np.ones((3, POINTS, ROUNDS))
    return np.floor(true / 5e-3 * 200) / 200 * 5e-3


def jumps_ahead(generator: np.random.Generator) -> np.ndarray[Any, Any]:
    """Now and then a round whose every sample holds an hour."""
    noise = np.exp(0.01 * generator.standard_normal((3, POINTS, ROUNDS)))
    return 5e-3 * noise + 3600 * (generator.random(noise.shape) < 0.02)


@pytest.mark.parametrize("make", [two_speeds_of_processes, a_rate_that_drifts, steps_of_a_clock, jumps_ahead])
def test_no_misbehaviour_of_machine_or_clock_makes_a_verdict(
    make: Callable[[np.random.Generator], np.ndarray[Any, Any]],
) -> None:
    assert alarms(make, sweeps=5) == 0


def test_a_change_is_found_all_the_same_or_undecided() -> None:
    """20 % on a machine of two speeds; and in no case the wrong way round."""
    times = two_speeds_of_processes(np.random.default_rng(4))
    times[1, 0] *= 1.2
    found = {one.point.case["clip_length"]: one.verdict for one in judged(times.tolist(), ROUNDS).points}
    assert found[0] == "SLOWER"
    assert set(found.values()) <= {"SLOWER", "SAME", "UNDECIDED"}
    few = {one.verdict for one in judged(times.tolist(), 2).points}
    assert few <= {"SLOWER", "SAME", "UNDECIDED"}
