"""How a gate spends its budget: how long it samples, when it looks, why it stops. Clocks and engines are faked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from vidbench import gate
from vidbench.gate import JOURNAL, LEAST_SAMPLING_S, LOOKS, SIDES, WANTED_ROUNDS, Pace, Side, Step
from vidbench.records import Environment, Measurement
from vidbench.results import Run
from vidbench.sweep import Point, RequestError

MACHINE = Environment("simulated", cores=2, threads=2)
POINTS = [Point("conv3d", "op", "library", case={"in_channels": number}) for number in range(1, 11)]


class Job:
    """A gate whose clock is a number: a measurement takes `besides_s` and what it is sampled for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, out: Path, *, besides_s: float, undecided: int = 10) -> None:
        self.now, self.besides_s, self.out = 0.0, besides_s, out
        self.noisy = {one.key for one in POINTS[:undecided]}
        self.sampled: list[tuple[float, int]] = []
        """Of every round, for how long and how many points."""
        self.hung: dict[str, str] = {}
        """Key of a point that hangs, and on which side."""
        self.lines: dict[str, list[Measurement]] = {name: [] for name in SIDES}
        self.sides = {
            name: Side(
                SimpleNamespace(),  # type: ignore[arg-type]
                SimpleNamespace(done=set()),  # type: ignore[arg-type]
                MACHINE,
                {one.key for one in POINTS},
            )
            for name in SIDES
        }
        monkeypatch.setattr(gate, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(gate, "take_round", self.take_round)
        monkeypatch.setattr(gate.results, "load", self.load)

    def take_round(
        self, number: int, points: Sequence[Point], sides: Mapping[str, Side], *, seconds: float, progress: object
    ) -> list[tuple[str, Measurement]]:
        taken = []
        for which, name in enumerate(SIDES):
            for one in points:
                if (one.key, number) in sides[name].writer.done:
                    continue
                # Base and base again lie apart by as much, to one side and the other.
                off = (-1) ** (number + which) * 0.2 * (one.key in self.noisy)
                measured = Measurement(one, number, "ok", samples_s=[1.0 + off] * 3)
                self.now += self.besides_s + seconds
                if self.hung.get(one.key) == name:
                    measured = Measurement(one, number, "timeout", "no result within 600 s")
                    self.now += 600
                taken.append((name, measured))
                self.lines[name].append(measured)
                sides[name].writer.done.add((one.key, number))  # type: ignore[attr-defined]
        if taken:
            self.sampled.append((seconds, len(points)))
        return taken

    def load(self, folder: Path) -> Run:
        created = "2026-01-01T00:00:00Z"
        return Run(1, folder.name, "s", created, (), MACHINE, "", None, list(self.lines[folder.name]), (), folder)

    def run(self, budget_s: float, most_s: float = 0.5) -> tuple[int, str]:
        began = self.now
        with gate._Journal(self.out, resume=True) as journal:
            _, rounds, stopped = gate._until_decided(
                POINTS, self.sides, self.out, journal, Pace(began + budget_s, most_s), self.note
            )
        self.took_s = self.now - began
        return rounds, stopped

    def note(self, step: Step) -> None:
        pass

    @property
    def looks(self) -> list[int]:
        return [json.loads(line)["look"] for line in (self.out / JOURNAL).read_text().splitlines()]


def test_a_small_budget_holds_the_rounds_that_a_verdict_wants(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    job = Job(monkeypatch, tmp_path, besides_s=0.15)
    assert job.run(budget_s=300.0) == (WANTED_ROUNDS, "the budget is spent")
    assert job.sampled[0][0] == pytest.approx(0.97 * 0.5 / 2)  # half a second for each measurement, half of it sampling
    assert job.sampled[5][0] == pytest.approx(0.35, abs=0.03)
    assert 280 < job.took_s <= 300


def test_a_large_budget_samples_as_long_as_the_suite_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    job = Job(monkeypatch, tmp_path, besides_s=0.15)
    assert job.run(budget_s=3000.0) == (LOOKS[-1], "the last look was taken")
    assert set(job.sampled) == {(0.5, 10)}
    assert job.looks == list(LOOKS)


def test_every_round_that_was_paid_for_is_judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    job = Job(monkeypatch, tmp_path, besides_s=1.0)
    assert job.run(budget_s=270.0) == (8, "the budget is spent")  # a round takes half a minute
    assert len(job.sampled) == 8
    assert job.looks == [6, 8]


def test_the_first_look_is_always_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    job = Job(monkeypatch, tmp_path, besides_s=1.0)
    assert job.run(budget_s=0.0) == (LOOKS[0], "the budget is spent")
    assert set(job.sampled) == {(LEAST_SAMPLING_S, 10)}


def test_going_on_again_and_again_looks_no_more_often(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    job = Job(monkeypatch, tmp_path, besides_s=1.0)
    found = [job.run(budget_s=budget) for budget in (0.0, 0.0, 70.0, 70.0, 10_000.0, 10_000.0)]
    assert found == [
        (6, "the budget is spent"), (6, "the budget is spent"), (8, "the budget is spent"),
        (10, "the budget is spent"), (12, "the last look was taken"), (12, "the last look was taken"),
    ]  # fmt: skip
    assert job.looks == [6, 8, 10, 12]


def test_a_killed_gate_looks_where_it_would_have(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    job = Job(monkeypatch, tmp_path, besides_s=1.0)
    job.run(budget_s=500.0)
    (tmp_path / JOURNAL).write_text('{"look": 6}\n{"lo')  # killed in the last line, with 15 rounds on the disk
    assert job.run(budget_s=0.0) == (15, "the budget is spent")
    assert job.looks == [6, 12, 15]


def test_what_is_decided_is_measured_no_more_and_the_rest_longer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = Job(monkeypatch, tmp_path, besides_s=0.15, undecided=4)
    job.run(budget_s=150.0)
    assert [points for _, points in job.sampled[:8]] == [10] * 6 + [4] * 2
    assert job.sampled[6][0] > 1.5 * job.sampled[5][0]
    job = Job(monkeypatch, tmp_path / "other", besides_s=0.15, undecided=0)
    assert job.run(budget_s=3000.0) == (LOOKS[0], "every point is decided")


def test_what_hangs_costs_its_timeout_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    job = Job(monkeypatch, tmp_path, besides_s=0.15)
    job.hung = {POINTS[3].key: "head"}
    job.run(budget_s=3000.0)
    assert [one.status for one in job.lines["head"]].count("timeout") == 1
    assert [points for _, points in job.sampled[:3]] == [10, 9, 9]


def test_a_gate_leaves_alone_what_is_not_its_own(tmp_path: Path) -> None:
    kept = tmp_path / "docs" / "source" / "index.rst"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    with pytest.raises(RequestError, match="is not empty and holds no gate"):
        gate.gate("HEAD", "conv3d", out=tmp_path / "docs", resume=True)
    assert kept.read_text() == "mine"


def test_one_gate_at_a_time_and_only_gone_on_with_if_asked(tmp_path: Path) -> None:
    with gate._Journal(tmp_path, resume=False):
        with pytest.raises(RequestError, match="another gate is at work there"):
            gate._Journal(tmp_path, resume=True).__enter__()
        with pytest.raises(RequestError, match="holds a gate already: go on with it by --resume"):
            gate._Journal(tmp_path, resume=False).__enter__()
    (tmp_path / JOURNAL).write_text('{"look": "soon"}\n')
    with pytest.raises(RequestError, match=r"gate.jsonl, line 1: wanted \{\"look\": rounds\}"):
        gate._Journal(tmp_path, resume=True).__enter__()
