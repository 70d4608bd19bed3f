"""Kernels and models that would be timed wrong, or are wrong and fast: each must be caught."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vidbench import measure as module
from vidbench import timing
from vidbench.compare import FALSE_DISCOVERY_RATE, Comparison, compare
from vidbench.gate import LOOKS
from vidbench.measure import measure
from vidbench.records import Environment, Measurement
from vidbench.results import Run
from vidbench.sweep import Point
from vidbench.timing import Budget, Samples, Timer, sample
from vidkernels import OPS

CASE = {"in_channels": 6, "out_channels": 6, "clip_length": 4, "batch_size": 2, "height": 9, "width": 8}
QUICK = Budget(seconds=0.02)
Adversary = Callable[..., Tensor]


def machine(flops_per_s: float) -> Environment:
    return Environment("m", flops_per_s={"cpu/fp32": flops_per_s}, bytes_per_s={"cpu/1000": 1e15})


UNLIMITED = machine(1e18)
"""So fast that no time is impossible."""


@pytest.fixture
def attack(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Measurement]:
    """Measures conv3d as an adversary computes it."""
    monkeypatch.setattr(module, "raise_ceilings", lambda *_: None)
    conv3d = OPS["conv3d"]

    def measured(
        fn: Adversary, on: Environment = UNLIMITED, sampler: module.Sampler = sample, **case: Any
    ) -> Measurement:
        adversary = replace(conv3d["library"], name="adversary", fn=fn)
        monkeypatch.setitem(conv3d.implementations, "adversary", adversary)
        point = Point("conv3d", "op", "adversary", case={**CASE, **case})
        return measure(point, on, budget=QUICK, sampler=sampler)

    return measured


def honest(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    y: Tensor = OPS["conv3d"]["library"].fn(x, *args, **kwargs)
    return y


# --- wrong numbers ----------------------------------------------------------------------------------------------------


def caches() -> Adversary:
    """Returns its first answer for ever."""
    kept: list[Tensor] = []

    def conv3d(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not kept:
            kept.append(honest(x, *args, **kwargs))
        return kept[0]

    return conv3d


def not_a_number() -> Adversary:
    """One NaN among all numbers."""

    def conv3d(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = honest(x, *args, **kwargs)
        y.view(-1)[7] = float("nan")
        return y

    return conv3d


def forgets_the_border() -> Adversary:
    """Three millionths too much where padding is met; a fifth of the positions, so that the whole passes its gate."""

    def conv3d(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = honest(x, *args, **kwargs)
        inside = y[:, :, 1:-1, 1:-1, 1:-1].clone()
        y = y * (1 + 3e-6)
        y[:, :, 1:-1, 1:-1, 1:-1] = inside
        return y

    return conv3d


def spoils_its_input() -> Adversary:
    def conv3d(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = honest(x, *args, **kwargs)
        x.zero_()
        return y

    return conv3d


def scales_its_weight() -> Adversary:
    def conv3d(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = honest(x, weight, *args, **kwargs)
        weight.mul_(2.0)
        return y

    return conv3d


def returns_its_input() -> Adversary:
    """A view of the right shape: no memory, no work."""
    return lambda x, *args, **kwargs: x.view_as(x)


def answers_in_its_input() -> Adversary:
    """The right numbers, in memory that is not its own."""
    return lambda x, *args, **kwargs: x.copy_(honest(x, *args, **kwargs)).view_as(x)


def knows_one_shape() -> Adversary:
    """Right for a batch of one."""
    return lambda x, *args, **kwargs: honest(x, *args, **kwargs) * (len(x) == 1)


def tires() -> Adversary:
    """Right as often as it is called before the samples; then it does nothing."""
    answers: list[Tensor] = []

    def conv3d(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(answers) < 4:  # the library's part in the check is not asked here
            answers.append(honest(x, *args, **kwargs))
        return answers[-1]

    return conv3d


@pytest.mark.parametrize(
    ("adversary", "reason"),
    [
        (caches, "output error"),
        (not_a_number, "output error nan"),
        (forgets_the_border, "border error"),
        (spoils_its_input, "the inputs were changed"),
        (scales_its_weight, "the inputs were changed"),
        (returns_its_input, "output error"),
        (answers_in_its_input, "the inputs were changed"),
        (knows_one_shape, "output error"),
        (tires, "output error"),
    ],
)
def test_wrong_numbers_have_no_latency(
    attack: Callable[..., Measurement], adversary: Callable[[], Adversary], reason: str
) -> None:
    large = {"clip_length": 16, "height": 32, "width": 32} if adversary is forgets_the_border else {}
    row = attack(adversary(), **large)
    assert (row.status, row.reason.startswith(reason)) == ("failed", True), row.reason
    assert not row.samples_s
    assert row.error is not None


def test_what_is_right_is_not_called_wrong(attack: Callable[..., Measurement]) -> None:
    assert attack(honest).status == "ok"
    assert attack(knows_one_shape(), batch_size=1).status == "ok"


def test_what_tires_is_caught_by_the_check_after_the_samples(
    attack: Callable[..., Measurement], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[None] = []
    warm_up = timing.warm_up
    monkeypatch.setattr(module, "warm_up", lambda *args, **kwargs: begun.append(warm_up(*args, **kwargs)))
    assert attack(tires()).status == "failed"
    assert begun  # so the check before has passed


@pytest.mark.parametrize(
    ("model", "reason"),
    [("NotANumber", "output error nan"), ("Caches", "output error"), ("Mutates", "the inputs were changed")],
)
def test_wrong_models_have_no_latency(monkeypatch: pytest.MonkeyPatch, model: str, reason: str) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    case = {"clip_length": 4, "batch_size": 2, "height": 8, "width": 8}
    row = measure(Point(f"user_models:{model}", "model", "eager", case=case), UNLIMITED, budget=QUICK)
    assert row.status == "failed"
    assert reason in row.reason
    assert not row.samples_s
    assert row.error is not None


# --- right numbers, impossible times ----------------------------------------------------------------------------------


def remembers_addresses() -> Adversary:
    """Computes what it has not seen, so that fresh inputs are answered well; the timed ones it knows by their place."""
    known: dict[int, tuple[Tensor, Tensor]] = {}

    def conv3d(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.data_ptr() not in known:
            known[x.data_ptr()] = (x, honest(x, *args, **kwargs))  # x is kept, lest its place be taken by another
        return known[x.data_ptr()][1]

    return conv3d


class Promise(Tensor):
    """Works when it is looked at."""

    work: Callable[[], Tensor]

    @staticmethod
    def of(shape: Sequence[int], work: Callable[[], Tensor]) -> Promise:
        made = Tensor._make_wrapper_subclass(Promise, shape, dtype=torch.float32)
        made.work = work
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        given = [arg.work() if isinstance(arg, Promise) else arg for arg in args]
        return func(*given, **(kwargs or {}))


def promises() -> Adversary:
    return lambda x, *args, **kwargs: Promise.of(x.shape, lambda: honest(x, *args, **kwargs))


@pytest.mark.parametrize("adversary", [remembers_addresses, promises])
def test_an_answer_that_costs_nothing_is_faster_than_the_machine(
    attack: Callable[..., Measurement], adversary: Callable[[], Adversary]
) -> None:
    work = {"clip_length": 8, "height": 64, "width": 64}  # 127 million operations
    row = attack(adversary(), machine(1e11), **work)
    assert row.status == "failed", row.trust_reasons
    assert "times the device's measured ceiling: not a possible time" in row.reason
    assert attack(honest, machine(1e12), **work).status == "ok"


def test_work_on_another_stream_lowers_trust(attack: Callable[..., Measurement]) -> None:
    row = attack(honest, sampler=lambda *_: Samples([1e-3] * 10, hidden=6))
    assert row.trust == "poor"
    assert row.trust_reasons[0] == "the device went on working on another stream when the call's own had ended"


class TwoStreams:
    """torch.cuda as a device of two streams: what is launched on either is done at a time, whoever asks for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.own, self.side = 0.0, 0.0, 0.0
        fakes = {"Event": lambda **_: self.event(), "synchronize": self.synchronize, "_sleep": self.hold}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def hold(self, cycles: int) -> None:
        self.own = max(self.now, self.own) + cycles / timing.CLOCK_HZ

    def launch(self, *, own: float, side: float) -> None:
        self.own = max(self.now, self.own) + own
        self.side = max(self.now, self.side) + side
        self.now += 1e-5

    def synchronize(self) -> None:
        self.now = max(self.now, self.own, self.side)

    def event(self) -> Any:
        made = SimpleNamespace(at=0.0)
        made.record = lambda: setattr(made, "at", max(self.now, self.own))
        made.synchronize = lambda: setattr(self, "now", max(self.now, made.at))
        made.elapsed_time = lambda end: (end.at - made.at) * 1e3
        return made


@pytest.mark.parametrize(("own", "side", "hidden"), [(1e-3, 5e-3, 10), (5e-3, 5e-3, 0), (5e-3, 0.0, 0)])
def test_the_timer_sees_a_device_that_goes_on_working(
    monkeypatch: pytest.MonkeyPatch, own: float, side: float, hidden: int
) -> None:
    device = TwoStreams(monkeypatch)
    timer = Timer("cuda", "hot")
    for _ in range(10):
        assert timer(lambda: device.launch(own=own, side=side))[0] == pytest.approx(own, abs=2e-5)
    assert timer.hidden == hidden


def test_a_device_never_waits_for_the_launches_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    device = TwoStreams(monkeypatch)  # where launching takes longer than the work
    timer = Timer("cuda", "hot")
    timer(lambda: device.launch(own=3e-6, side=0.0))
    assert timer(lambda: device.launch(own=3e-6, side=0.0), 100)[0] == pytest.approx(3e-6)


# --- a little slower --------------------------------------------------------------------------------------------------


class Noisy:
    """A timer whose processes differ by about 2 % and more now and then, and whose samples are disturbed at times."""

    cuda = cold = False
    hidden = 0
    step_s = 0.0

    def __init__(self, seconds: float, generator: np.random.Generator) -> None:
        self.seconds = seconds * float(np.exp(0.015 * generator.standard_t(3)))
        self.generator = generator

    def __call__(self, call: Callable[[], Any], calls: int = 1) -> tuple[float, float]:
        noise = np.exp(0.01 * self.generator.standard_normal())
        disturbed = 1.5 if self.generator.random() < 0.05 else 1.0
        seconds = float(self.seconds * noise * disturbed)
        return seconds, seconds


def gated(factors: Sequence[float], seed: int) -> Iterator[Comparison]:
    """What a gate's looks find of points whose head takes so many times the base's time."""
    generator = np.random.default_rng(seed)
    sides: list[list[Measurement]] = [[], [], []]
    for round in range(1, LOOKS[-1] + 1):
        for number, factor in enumerate(factors):
            point = Point("conv3d", "op", "library", case={"clip_length": number})
            for side, by in zip(sides, (1.0, factor, 1.0), strict=True):
                taken = sample(lambda: None, Noisy(1e-2 * by, generator), Budget(seconds=60.0, most=8))  # type: ignore[arg-type]
                side.append(Measurement(point, round, "ok", samples_s=taken.device_s))
        if round in LOOKS:
            base, head, again = (
                Run(1, name, "s", "", (), Environment("m"), "", None, side, (), Path(name))
                for name, side in zip(("base", "head", "again"), sides, strict=True)
            )
            yield compare(base, head, again=again, rate=FALSE_DISCOVERY_RATE / len(LOOKS))


@pytest.mark.parametrize("seed", range(3))
def test_three_percent_slower_is_found_and_nothing_else_is(seed: int) -> None:
    factors = [1.0, 1.0, 1.03, 1.0]
    named: dict[object, str] = {}
    for look in gated(factors, seed):
        for one in look.points:
            if one.verdict in ("SLOWER", "FASTER"):
                named.setdefault(one.point.case["clip_length"], one.verdict)
    assert named == {2: "SLOWER"}
