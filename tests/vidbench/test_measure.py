"""One point in this process: checks, samples, memory, ceilings, trust. Time is faked where it is the subject."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vidbench import measure as module
from vidbench import timing
from vidbench.environment import ceilings, describe, precision
from vidbench.measure import measure
from vidbench.records import Cost, Counts, Environment, KnownCosts, Measurement
from vidbench.sweep import Point
from vidbench.timing import Budget, Samples, Timer, median_interval, sample, warm_up
from vidbench.workload.op import OpWorkload
from vidkernels import OPS

CONV = {"in_channels": 4, "out_channels": 6, "clip_length": 4, "batch_size": 2, "height": 9, "width": 8}
QUICK = Budget(seconds=0.02)


@pytest.fixture(scope="module")
def environment() -> Environment:
    return describe("cpu", ["fp32", "fp64"])


@pytest.fixture(autouse=True)
def _user_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def user(name: str, **changes: Any) -> Point:
    case = {"clip_length": 4, "batch_size": 2, "height": 8, "width": 8}
    return replace(Point(f"user_models:{name}", "model", "eager", case=case), **changes)


def op(**changes: Any) -> Point:
    return replace(Point("conv3d", "op", "library", case=CONV), **changes)


class FakeTimer:
    """Plays back durations."""

    cuda = False
    cold = False
    hidden = 0
    step_s = 0.0

    def __init__(self, durations: Iterator[float]) -> None:
        self.durations = durations
        self.calls = 0

    def __call__(self, call: Callable[[], Any], calls: int = 1) -> tuple[float, float]:
        self.calls += calls
        seconds = next(self.durations)
        return seconds, seconds


@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_an_op_is_checked_timed_and_counted(environment: Environment, mode: str, memory_format: str) -> None:
    row = measure(op(mode=mode, memory_format=memory_format), environment, budget=QUICK)
    assert (row.status, row.reason) == ("ok", "")
    macs = 2 * 6 * 4 * 9 * 8 * 4 * 27
    assert row.counts is not None
    assert row.counts.macs == macs * (3 if mode == "train" else 1)
    assert row.params == 6 * 4 * 27
    assert row.error is not None
    assert 0 < row.error.output < 2e-6
    assert (row.error.weight_gradient is not None) == (mode == "train")
    assert row.median_s is not None
    assert 0 < row.median_s < 10


def test_live_and_peak_bytes_are_exact(environment: Environment) -> None:
    """x, w alive; the output is all that one reference-free call adds, but for the library's own workspace."""
    point = Point(
        "user_models:tiny", "model", "eager", case={"clip_length": 4, "batch_size": 2, "height": 8, "width": 8}
    )
    row = measure(point, environment, budget=QUICK)
    assert row.memory is not None
    clip, weights = 4 * 2 * 3 * 4 * 8 * 8, 4 * (3 * 400 + 400)
    assert row.memory.live_before_bytes == clip + weights
    # mean (2, 3), then logits (2, 400)
    assert row.memory.peak_bytes - row.memory.live_before_bytes == 4 * 2 * 3 + 4 * 2 * 400
    assert row.memory.peak_resident_bytes is not None
    assert row.memory.peak_resident_bytes > row.memory.peak_bytes


def test_streaming_frames_equal_the_whole_clip(environment: Environment) -> None:
    case = {"clip_length": 5, "batch_size": 2, "input_features": 3, "hidden_size": 4}
    row = measure(Point("lstm", "op", "library", mode="stream", case=case), environment, budget=QUICK)
    assert row.status == "ok"
    one_frame = OPS["lstm"].macs(OPS["lstm"].case({**case, "clip_length": 1}))
    assert row.counts is not None
    assert row.counts.macs == one_frame


def test_a_streams_memory_does_not_grow_with_the_clip(environment: Environment) -> None:
    def live(clip_length: int) -> int:
        case = {"clip_length": clip_length, "batch_size": 1, "input_features": 64, "hidden_size": 8}
        row = measure(Point("rnn", "op", "library", mode="stream", case=case), environment, budget=QUICK)
        assert row.memory is not None
        return row.memory.live_before_bytes

    assert live(8) == live(256)


@pytest.mark.parametrize(
    ("point", "reason"),
    [
        (op(mode="stream"), "conv3d/library has no streaming step"),
        (op(case={**CONV, "kernel_size": (9, 1, 1), "padding": 0}), "kernel_size=9"),
        (op(case={**CONV, "kernel": 3}), "conv3d has no 'kernel': did you mean 'kernel_size'?"),
        (op(implementation="eager"), "conv3d has no implementation 'eager'"),
        (op(regime="graph"), "graph replay needs a CUDA device"),
        (op(dtype="tf32"), "tf32 needs a CUDA device"),
        (user("tiny", implementation="library"), "a model has no implementation 'library'"),
        (user("tiny", mode="stream"), "user_models:tiny has no streaming step"),
        (user("no_module"), "wanted a torch.nn.Module"),
    ],
)
def test_what_cannot_run_is_a_skipped_row_with_why(environment: Environment, point: Point, reason: str) -> None:
    row = measure(point, environment, budget=QUICK)
    assert row.status == "skipped"
    assert reason in row.reason
    assert not row.samples_s


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_missing_device_is_a_skipped_row(environment: Environment) -> None:
    assert measure(op(device="cuda"), environment).reason == "no CUDA device is visible to torch"


def test_a_time_above_the_ceiling_is_a_fault(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "raise_ceilings", lambda *_: None)

    def impossible(*_: object) -> Samples:
        return Samples([1e-12] * 5)

    row = measure(op(), environment, sampler=impossible)
    assert row.status == "failed"
    assert "times the device's measured ceiling" in row.reason


def test_out_of_memory_is_its_own_status(environment: Environment) -> None:
    row = measure(op(case={**CONV, "clip_length": 10**9}), environment)
    assert row.status == "oom"
    assert "allocate" in row.reason


def test_counts_are_shared_between_implementations(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = KnownCosts()
    counted: list[Cost] = []
    count = OpWorkload.cost
    monkeypatch.setattr(OpWorkload, "cost", lambda work: counted.append(count(work)) or counted[-1])
    rows = []
    for implementation in ("reference", "library"):
        for memory_format in ("contiguous", "channels_last"):
            point = op(implementation=implementation, memory_format=memory_format)
            rows.append(measure(point, environment, cost=costs.of(point)))
            costs.learn(rows[-1])
    assert len(counted) == 1
    assert {(row.params, row.bytes_moved) for row in rows} == {(counted[0].params, counted[0].bytes_moved)}
    assert all(row.counts == counted[0].counts for row in rows)
    assert costs.of(op(mode="train")) is None  # which needs more


def test_counts_of_what_went_wrong_are_not_kept() -> None:
    costs = KnownCosts()
    costs.learn(Measurement(op(), 1, "failed", counts=Counts(1), params=2))
    assert costs.of(op()) is None


def test_sampling_stops_when_the_median_is_known() -> None:
    timer = FakeTimer(iter([1e-3] * 1000))
    samples = sample(lambda: None, timer, Budget(seconds=60))  # type: ignore[arg-type]
    assert (samples.stop, len(samples.device_s)) == ("converged", 6)


def test_sampling_stops_when_the_budget_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now) * 0.1)
    noisy = iter([1e-3 * (1 + index % 7) for index in range(1000)])
    samples = sample(lambda: None, FakeTimer(noisy), Budget(seconds=1.0))  # type: ignore[arg-type]
    assert samples.stop == "budget"
    assert 5 <= len(samples.device_s) <= 11


def test_no_sample_is_dropped() -> None:
    durations = [1e-3, 9.0, 1e-3, 2e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3]
    samples = sample(lambda: None, FakeTimer(iter([1e-3, *durations])), Budget(most=len(durations), seconds=60))  # type: ignore[arg-type]
    assert list(samples.device_s) == durations[: len(samples.device_s)]
    assert 9.0 in samples.device_s


def test_short_calls_are_timed_several_at_a_time() -> None:
    samples = sample(lambda: None, FakeTimer(iter([1e-5] * 100)), Budget())  # type: ignore[arg-type]
    assert samples.calls_per_sample == 20


def test_warm_up_goes_on_while_calls_become_faster() -> None:
    timer = FakeTimer(iter([8.0, 4.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]))
    warm_up(lambda: None, timer, seconds=60)  # type: ignore[arg-type]
    assert timer.calls == 7


def test_median_interval_covers_the_median_nineteen_times_in_twenty() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(1000):
        low, high = median_interval((-torch.log(torch.rand(31, generator=generator))).tolist())
        hits += low <= math.log(2) <= high  # the median of the exponential distribution
    assert hits >= 930


def test_a_drifting_device_lowers_trust(environment: Environment) -> None:
    row = measure(op(), environment, sampler=lambda *_: Samples([0.1 + 0.01 * i for i in range(20)], stop="budget"))
    assert row.trust != "good"
    assert any(reason.startswith("drifted") for reason in row.trust_reasons)


def test_ceilings_follow_the_footprint() -> None:
    machine = Environment(
        "m", flops_per_s={"cpu/fp32": 1e11}, bytes_per_s={"cpu/1000": 5e9, "cpu/100000": 9e9, "cpu/10000000": 2e9}
    )
    assert ceilings(machine, "cpu", "fp32", 50_000, cold=False).bytes_per_s == 9e9  # a larger copy is faster still
    assert ceilings(machine, "cpu", "fp32", 10**8, cold=False).bytes_per_s == 2e9
    assert ceilings(machine, "cpu", "fp32", 50_000, cold=True).bytes_per_s == 2e9
    assert ceilings(machine, "cpu", "fp32", None, cold=False).bytes_per_s == 2e9


def test_the_cold_regime_flushes_outside_the_timed_span() -> None:
    timer = Timer("cpu", "cold")
    assert timer._flush is not None
    seconds, _ = timer(lambda: None)
    assert seconds < 1e-3  # the flush itself takes tens of milliseconds


def test_precision_puts_the_switches_back() -> None:
    before = torch.backends.cudnn.allow_tf32
    with precision("tf32"):
        assert torch.backends.cudnn.allow_tf32
        with precision("fp32"):
            assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before


def test_a_measurement_has_a_median_only_with_samples() -> None:
    assert Measurement(op(), 1, "oom").median_s is None
    assert Measurement(op(), 1, "ok", samples_s=(3.0, 1.0, 2.0)).median_s == 2.0
