"""How a gate spends its budget: how long it samples, when it looks, why it stops. Clocks and engines are faked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from vidbench import gate
from vidbench.gate import SIDES, WANTED_ROUNDS, Side, Step, sampling_s
from vidbench.records import Environment, Measurement
from vidbench.results import Run
from vidbench.sweep import Point

MACHINE = Environment("simulated", cores=2, threads=2)
POINTS = [Point("conv3d", "op", "library", case={"in_channels": number}) for number in range(1, 11)]


class Job:
    """A gate whose clock is a number: a measurement takes `besides_s` and what it is sampled for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, besides_s: float, deviation: float = 0.0) -> None:
        self.now, self.besides_s, self.deviation = 0.0, besides_s, deviation
        self.sampled_s: list[float] = []
        self.looks: list[int] = []
        self.lines: dict[str, list[Measurement]] = {name: [] for name in SIDES}
        self.sides = {
            name: Side(SimpleNamespace(), SimpleNamespace(done=set()), MACHINE, {one.key for one in POINTS})  # type: ignore[arg-type]
            for name in SIDES
        }
        monkeypatch.setattr(gate, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(gate, "take_round", self.take_round)
        monkeypatch.setattr(gate.results, "load", self.load)

    def take_round(
        self, number: int, points: Sequence[Point], sides: Mapping[str, Side], *, seconds: float, progress: object
    ) -> int:
        self.sampled_s.append(seconds)
        self.now += len(points) * len(sides) * (self.besides_s + seconds)
        for which, name in enumerate(SIDES):
            # Base and base again lie apart by as much, to one side and the other.
            off = (-1) ** (number + which) * self.deviation
            self.lines[name] += [Measurement(one, number, "ok", samples_s=[1.0 + off] * 3) for one in points]
        return len(points) * len(sides)

    def load(self, folder: Path) -> Run:
        return Run(1, folder.name, "s", "2026-01-01T00:00:00Z", (), MACHINE, "", None, self.lines[folder.name], (), folder)

    def run(self, budget_s: float, most_s: float = 0.5) -> tuple[int, str]:
        def note(step: Step) -> None:
            if step.comparison is not None:
                self.looks.append(step.round)

        _, rounds, stopped = gate._until_decided(POINTS, self.sides, Path(), budget_s, most_s, note)
        return rounds, stopped


def test_sampling_is_what_the_budget_leaves_within_its_limits() -> None:
    assert sampling_s(300.0, 20, 30, 0.2, 0.5) == pytest.approx(0.3)
    assert sampling_s(3000.0, 20, 30, 0.2, 0.5) == 0.5
    assert sampling_s(30.0, 20, 30, 0.2, 0.5) == gate.LEAST_SAMPLING_S
    assert sampling_s(-5.0, 0, 0, 0.2, 0.5) == gate.LEAST_SAMPLING_S


def test_a_small_budget_holds_the_rounds_that_a_verdict_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(monkeypatch, besides_s=0.15, deviation=0.2)
    rounds, stopped = job.run(budget_s=300.0)
    assert (rounds, stopped) == (WANTED_ROUNDS + 1, "the budget is spent")
    assert job.sampled_s[5] == pytest.approx(0.35, abs=0.02)
    assert 300 < job.now < 330  # no more than a round beyond it


def test_a_large_budget_samples_as_long_as_the_suite_says(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(monkeypatch, besides_s=0.15, deviation=0.2)
    assert job.run(budget_s=3000.0) == (gate.LOOKS[-1], "the last look was taken")
    assert set(job.sampled_s) == {0.5}
    assert job.looks == list(gate.LOOKS)


def test_every_round_that_was_paid_for_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(monkeypatch, besides_s=1.0, deviation=0.2)
    rounds, stopped = job.run(budget_s=250.0)  # a round takes half a minute
    assert stopped == "the budget is spent"
    assert rounds == len(job.sampled_s) == 8
    assert job.looks == [6, 8]


def test_the_first_look_is_always_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(monkeypatch, besides_s=1.0, deviation=0.2)
    assert job.run(budget_s=0.0) == (gate.LOOKS[0], "the budget is spent")
    assert set(job.sampled_s) == {gate.LEAST_SAMPLING_S}


def test_what_is_decided_is_measured_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(monkeypatch, besides_s=0.15)
    assert job.run(budget_s=3000.0) == (gate.LOOKS[0], "every point is decided")
