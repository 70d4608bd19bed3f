"""Samples of several engines taken in turn: who is asked when, and what a death or a lack of memory costs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from vidbench import gate, threads, timing
from vidbench.engine import local
from vidbench.engine.local import LocalEngine, Work, in_turn
from vidbench.gate import Side, take_round
from vidbench.records import Environment, Measurement
from vidbench.results import RunWriter, load
from vidbench.sweep import Point
from vidbench.timing import Budget

HERE = Path(__file__).parent
UNLIMITED = Environment("m", flops_per_s={"cpu/fp32": 1e18}, bytes_per_s={"cpu/1000": 1e15})
CASE = {"in_channels": 4, "out_channels": 6, "clip_length": 4, "batch_size": 2, "height": 9, "width": 8}
SMALL = Point("conv3d", "op", "library", case=CASE)
TINY = {"clip_length": 2, "batch_size": 1, "height": 8, "width": 8, "num_classes": 4}


def model(name: str) -> Point:
    return Point(f"user_models:{name}", "model", "eager", case=TINY)


def scripted(name: str, log: list[str], *, seconds: float, dies_at: int | None = None) -> Work:
    """A measurement that notes when it is asked."""
    log.append(f"{name} ready")
    go, taken = (yield 0.0), 0
    while go:
        taken += 1
        if taken == dies_at:
            return Measurement(SMALL, 1, "crashed", name)
        log.append(name)
        go = yield seconds
    return Measurement(SMALL, 1, "ok", name, samples_s=[seconds] * taken)


def test_samples_go_round_until_the_time_is_spent() -> None:
    log: list[str] = []
    works = {name: scripted(name, log, seconds=0.1) for name in "abc"}
    found = dict(in_turn(works, 0.55))
    assert log == ["a ready", "b ready", "c ready", *"abc" * 6]
    assert {name: len(one.samples_s) for name, one in found.items()} == {"a": 6, "b": 6, "c": 6}


def test_there_are_a_few_turns_however_long_and_not_too_many_however_short() -> None:
    assert len(dict(in_turn({"a": scripted("a", [], seconds=100.0)}, 0.1))["a"].samples_s) == local.LEAST_TURNS
    assert len(dict(in_turn({"a": scripted("a", [], seconds=0.0)}, 0.1))["a"].samples_s) == local.MOST_TURNS


def test_who_dies_is_left_out_of_the_further_turns() -> None:
    log: list[str] = []
    works = {name: scripted(name, log, seconds=0.1, dies_at=2 if name == "b" else None) for name in "abc"}
    found = list(in_turn(works, 0.35))
    assert [(name, one.status) for name, one in found] == [("b", "crashed"), ("a", "ok"), ("c", "ok")]
    assert "".join(log[3:]) == "abc" + "ac" * (len(found[1][1].samples_s) - 1)


class Spinning:
    """A clock, and threads that go on spinning until `until`."""

    def __init__(self, until: float) -> None:
        self.now, self.until = 0.0, until

    def perf_counter(self) -> float:
        self.now += 1e-9  # a clock that stood still would be noticed
        return self.now

    def process_time(self) -> float:
        return min(self.now, self.until)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def clock_gettime(self, _: int) -> float:
        return self.process_time()


@pytest.mark.parametrize(("until", "waited"), [(0.0, 0.0), (0.012, 0.012), (9.0, 0.1)])
def test_a_turn_is_over_when_its_threads_no_longer_spin(
    monkeypatch: pytest.MonkeyPatch, until: float, waited: float
) -> None:
    clock = Spinning(until)
    monkeypatch.setattr(threads, "time", clock)
    threads.be_still(patience_s=0.1)
    assert clock.now == pytest.approx(waited, abs=2 * threads.STILL_S)


def test_short_calls_are_timed_several_at_a_time_and_a_turn_is_told_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Spinning(until=0.0)
    for module in (timing, threads):
        monkeypatch.setattr(module, "time", clock)
    told: list[float] = []
    samples = timing.sample_in_turn(
        lambda: clock.sleep(1e-3), timing.Timer("cpu", "hot"), Budget(), turns=iter([None] * 6), taken=told.append
    )
    assert samples.calls_per_sample == 5
    assert samples.device_s == pytest.approx([1e-3] * 6)
    a_sample = 5e-3
    assert told == pytest.approx([timing.AWAKE_S + a_sample + threads.STILL_S] * 6, abs=1e-3)


def test_a_worker_is_ready_when_nothing_but_samples_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = Spinning(until=0.0), []
    for module in (timing, threads):
        monkeypatch.setattr(module, "time", clock)

    def call() -> None:
        log.append("call")
        clock.sleep(6e-3)

    def turns() -> Iterator[None]:
        log.append("ready")
        yield from [None] * 2

    timing.sample_in_turn(call, timing.Timer("cpu", "hot"), Budget(), turns=turns(), taken=lambda _: log.append("over"))
    # How long it is, and who computes; then one to be awake, of 6 ms, and one that is timed.
    assert log == ["call", "call", "ready", *["call", "call", "over"] * 2]


def test_real_workers_take_as_many_samples_and_are_checked_as_ever() -> None:
    with LocalEngine(timeout_s=60) as one, LocalEngine(timeout_s=60) as other:
        works = {name: e.measuring(SMALL, 1, UNLIMITED, seconds=0.05, in_turn=True) for name, e in
                 (("one", one), ("other", other))}  # fmt: skip
        found = dict(in_turn(works, 0.05))
        alone = one.measure(SMALL, 2, UNLIMITED, seconds=0.05, video=None)
    assert {measured.status for measured in (*found.values(), alone)} == {"ok"}
    assert len(found["one"].samples_s) == len(found["other"].samples_s) >= local.LEAST_TURNS
    assert all(measured.error is not None and measured.counts is not None for measured in found.values())


def test_who_takes_turns_does_not_spin_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    assert "GOMP_SPINCOUNT" not in LocalEngine(timeout_s=1)._environ
    assert LocalEngine(timeout_s=1, takes_turns=True)._environ["GOMP_SPINCOUNT"] == local.SPIN_COUNT
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # what a user has chosen stays
    assert "GOMP_SPINCOUNT" not in LocalEngine(timeout_s=1, takes_turns=True)._environ


def test_a_worker_that_dies_before_its_turn_costs_its_own_point_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)  # where user_models lies
    with LocalEngine(timeout_s=60) as one, LocalEngine(timeout_s=60) as other:
        works = {
            "dies": one.measuring(model("Segfaults"), 1, UNLIMITED, seconds=0.02, in_turn=True),
            "lives": other.measuring(model("Tiny"), 1, UNLIMITED, seconds=0.02, in_turn=True),
        }
        found = dict(in_turn(works, 0.02))
        after = one.measure(model("Tiny"), 2, UNLIMITED, seconds=0.02, video=None)
    assert (found["dies"].status, found["lives"].status, after.status) == ("crashed", "ok", "ok")


def test_what_does_not_fit_beside_the_others_is_measured_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Engine:
        def __init__(self, name: str) -> None:
            self.name = name

        def retire(self) -> None:
            asked.append(f"{self.name} fresh")

        def measuring(self, point: Point, round: int, *_: object, **__: object) -> Work:
            alone = asked[-3:] == [f"{name} fresh" for name in gate.SIDES] and len(asked) > 3
            asked.append(f"{self.name} {'alone' if alone else 'in turn'}")
            yield 0.0
            if self.name == "again" and not alone:
                return Measurement(point, round, "oom", "out of memory")
            return Measurement(point, round, "ok", samples_s=[2.0 if alone else 1.0])

    def sides() -> Iterator[tuple[str, Side]]:
        for name in gate.SIDES:
            writer = RunWriter.create(tmp_path / name, suite="s", sweeps=(), environment=UNLIMITED, command="")
            yield name, Side(Engine(name), writer, UNLIMITED, {SMALL.key})  # type: ignore[arg-type]

    found = dict(sides())
    take_round(1, [SMALL], found, seconds=0.1)
    for side in found.values():
        side.writer.close()
    assert asked[-1] == "again alone"
    assert {name: load(tmp_path / name).measurements[0].median_s for name in gate.SIDES} == {
        "base": 1.0, "head": 1.0, "again": 2.0,
    }  # fmt: skip
