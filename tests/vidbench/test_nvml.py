"""What a GPU says of itself, from a faked pynvml: clocks, limits, other processes, energy, and all of it missing."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, repeat
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vidbench import measure as measure_module
from vidbench import nvml, timing
from vidbench.measure import measure
from vidbench.nvml import Watch, watch
from vidbench.records import DeviceState, Environment, Measurement
from vidbench.run_format import LineReader, encode_line
from vidbench.sweep import Point
from vidbench.timing import Budget, Timer, sample
from vidbench.trust import judge


class NotSupported(Exception):
    """NVMLError_NotSupported."""


class FakeNvml:
    """The functions of pynvml that are used; answers are played back, the last one for ever."""

    NVMLError = NotSupported

    def __init__(
        self,
        *,
        clocks_mhz: tuple[int, ...] = (1980,),
        reasons: tuple[int, ...] = (0,),
        pids: tuple[int, ...] = (),
        missing: tuple[str, ...] = (),
    ) -> None:
        self.clocks = chain(clocks_mhz, repeat(clocks_mhz[-1]))
        self.reasons = chain(reasons, repeat(reasons[-1]))
        self.pids = (os.getpid(), *pids)
        self.missing = missing
        self.asked: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in object.__getattribute__(self, "missing"):

            def refuse(*_: object) -> None:
                raise NotSupported

            return refuse
        return object.__getattribute__(self, name)

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked.append(uuid)
        if not uuid.startswith("GPU-"):
            raise NotSupported
        return "handle"

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        assert (handle, kind) == ("handle", 1)
        return next(self.clocks)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 350_000

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 61

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return next(self.reasons)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return [SimpleNamespace(pid=pid) for pid in self.pids]


FUNCTIONS = tuple(name for name in vars(FakeNvml) if name.startswith("nvmlDeviceGet") and "Handle" not in name)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time that passes when somebody sleeps."""
    passed = SimpleNamespace(now=0.0, watts=100.0, joules=0.0)

    def spend(seconds: float, watts: float = 100.0) -> None:
        passed.now += seconds
        passed.joules += seconds * watts

    passed.spend = spend
    fake = SimpleNamespace(perf_counter=lambda: passed.now, monotonic=lambda: passed.now, sleep=spend)
    monkeypatch.setattr(nvml, "time", fake)
    return passed


def read(fake: FakeNvml, readings: int, clock: SimpleNamespace) -> DeviceState:
    gpu = Watch(fake, "handle")
    for _ in range(readings - 1):
        gpu.look()
        clock.spend(nvml.EVERY_S + 1e-6)
    return gpu.state()


def doubts(state: DeviceState) -> tuple[str, tuple[str, ...]]:
    return judge([1e-3] * 10, state=state)


def test_a_calm_device_is_read_and_nothing_is_held_against_it(clock: SimpleNamespace) -> None:
    state = read(FakeNvml(clocks_mhz=(1965, 1980, 1995), reasons=(0x1 | 0x2,)), 3, clock)
    assert state == DeviceState(
        readings=3, sm_clock_hz=1.98e9, sm_clock_low_hz=1.965e9, sm_clock_high_hz=1.995e9,
        power_w=350.0, temperature_c=61.0, clock_limits={}, other_processes=0,
    )  # fmt: skip
    assert doubts(state) == ("good", ())


def test_it_is_read_at_most_every_few_hundredths_of_a_second(clock: SimpleNamespace) -> None:
    gpu = Watch(FakeNvml(), "handle")
    for _ in range(1000):
        gpu.look()
        clock.spend(1e-3)
    assert gpu.state().readings == pytest.approx(1 + 1 / nvml.EVERY_S, abs=2)


@pytest.mark.parametrize(
    ("bit", "trust", "said"),
    [
        (0x04, "good", None),
        (0x08, "poor", "throttled (hw_slowdown) in 2 of 4 readings"),
        (0x20, "fair", "throttled (sw_thermal) in 2 of 4 readings, at up to 61 °C"),
        (0x40, "poor", "throttled (hw_thermal) in 2 of 4 readings, at up to 61 °C"),
        (0x80, "poor", "throttled (hw_power_brake) in 2 of 4 readings"),
    ],
)
def test_a_throttled_device_lowers_trust(clock: SimpleNamespace, bit: int, trust: str, said: str | None) -> None:
    state = read(FakeNvml(reasons=(0, bit, bit, 0)), 4, clock)
    assert list(state.clock_limits.values()) == [2]
    assert doubts(state) == (trust, () if said is None else (said,))


def test_a_clock_that_moves_lowers_trust(clock: SimpleNamespace) -> None:
    state = read(FakeNvml(clocks_mhz=(1980, 1980, 1755)), 3, clock)
    assert doubts(state) == ("fair", ("the SM clock moved from 1755 to 1980 MHz while sampling",))
    assert doubts(read(FakeNvml(clocks_mhz=(1980, 1920)), 3, clock))[0] == "good"  # 3 %


def test_another_process_lowers_trust(clock: SimpleNamespace) -> None:
    one = read(FakeNvml(pids=(1,)), 2, clock)
    assert doubts(one) == ("fair", ("another process has a context on the GPU",))
    two = read(FakeNvml(pids=(1, 2**22 + 1)), 2, clock)  # the second is none of this machine's
    assert doubts(two)[1] == ("2 other processes have a context on the GPU",)


def test_of_processes_with_numbers_of_another_namespace_one_is_this(clock: SimpleNamespace) -> None:
    fake = FakeNvml()
    fake.pids = (4_194_305,)
    assert read(fake, 2, clock).other_processes == 0
    fake.pids = (4_194_305, 4_194_306)
    assert read(fake, 2, clock).other_processes == 1


@pytest.mark.parametrize("missing", [*((name,) for name in FUNCTIONS), FUNCTIONS])
def test_what_a_device_cannot_tell_is_none(clock: SimpleNamespace, missing: tuple[str, ...]) -> None:
    state = read(FakeNvml(missing=missing), 2, clock)
    of = {
        "nvmlDeviceGetClockInfo": (state.sm_clock_hz, state.sm_clock_low_hz, state.sm_clock_high_hz),
        "nvmlDeviceGetPowerUsage": (state.power_w,),
        "nvmlDeviceGetTemperature": (state.temperature_c,),
        "nvmlDeviceGetComputeRunningProcesses": (state.other_processes,),
        "nvmlDeviceGetCurrentClocksEventReasons": (),
    }
    for name, values in of.items():
        assert all((value is None) == (name in missing) for value in values), name
    assert doubts(state) == ("good", ())


def test_a_release_without_a_function_is_as_one_that_refuses(clock: SimpleNamespace) -> None:
    bare = SimpleNamespace(NVMLError=NotSupported)
    assert read(bare, 2, clock) == DeviceState(readings=2)  # type: ignore[arg-type]
    assert Watch(bare, "handle").energy(lambda: None, 1) is None


# --- energy -----------------------------------------------------------------------------------------------------------


def with_counter(clock: SimpleNamespace, tick_s: float) -> Any:
    """NVML whose counter shows the joules of the last tick."""
    shown = SimpleNamespace(at=-1, millijoules=0)

    def counter(_: str) -> int:
        if (tick := int(clock.now / tick_s)) != shown.at:
            shown.at, shown.millijoules = tick, int(clock.joules * 1e3)
        return int(shown.millijoules)

    return SimpleNamespace(NVMLError=NotSupported, nvmlDeviceGetTotalEnergyConsumption=counter)


def test_energy_is_of_one_call_above_idling(clock: SimpleNamespace) -> None:
    gpu = Watch(with_counter(clock, 0.05), "handle")
    found = gpu.energy(lambda: clock.spend(0.01, 300.0), calls=5)
    assert found == pytest.approx(0.002 * (300 - 100), rel=0.02)
    assert gpu.idle_w == pytest.approx(100, rel=0.02)


def test_a_counter_slower_than_the_window_has_no_energy(clock: SimpleNamespace) -> None:
    assert Watch(with_counter(clock, 0.5), "handle").energy(lambda: clock.spend(0.01, 300.0), calls=5) is None


# --- in a measurement -------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu_of_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    def put(fake: Any) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", fake)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=f"00-{i}"))
    nvml._handle.cache_clear()
    yield put
    nvml._handle.cache_clear()


def test_the_gpu_is_found_by_its_uuid(gpu_of_torch: Callable[[Any], None]) -> None:
    fake = FakeNvml()
    gpu_of_torch(fake)
    assert watch("cuda") is not None
    assert fake.asked[-1] == "GPU-00-1"


def test_without_nvml_there_is_no_watch(gpu_of_torch: Callable[[Any], None]) -> None:
    assert watch("cpu") is None
    gpu_of_torch(FakeNvml(missing=("nvmlInit",)))
    assert watch("cuda") is None
    gpu_of_torch(FakeNvml(missing=("nvmlDeviceGetHandleByUUID",)))
    assert watch("cuda") is None
    gpu_of_torch(None)  # as if it were not installed
    assert watch("cuda") is None


def test_the_state_is_written_down_with_its_doubts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is watched between the samples, before the first and after the last."""
    fake = FakeNvml(reasons=(0x40,), clocks_mhz=(1980, 990))
    monkeypatch.setattr(measure_module, "watch", lambda _: Watch(fake, "handle"))
    case = {"in_channels": 4, "out_channels": 6, "clip_length": 4, "batch_size": 2, "height": 9, "width": 8}
    machine = Environment("m", flops_per_s={"cpu/fp32": 1e18}, bytes_per_s={"cpu/1000": 1e15})
    row = measure(Point("conv3d", "op", "library", case=case), machine, budget=Budget(seconds=0.02))
    assert row.device_state is not None
    assert row.device_state.readings >= 2
    assert row.trust == "poor"
    assert any(reason.startswith("throttled (hw_thermal) in ") for reason in row.trust_reasons)
    assert any(reason.startswith("the SM clock moved from 990 to 1980 MHz") for reason in row.trust_reasons)


def test_looks_are_no_part_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)

    def spend(seconds: float) -> None:
        clock.now += seconds

    def read() -> float:
        spend(1e-7)
        return clock.now

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=read))
    timer = Timer("cpu", "hot")
    timer.between = lambda: spend(0.05)
    found = sample(lambda: spend(1e-3), timer, Budget(most=20))
    assert max(found.device_s) == pytest.approx(1e-3, rel=0.01)


def test_old_lines_and_new_ones_are_read() -> None:
    old = Measurement(Point("conv3d", "op", "library"), 1, "ok", samples_s=(1.0,))
    state = DeviceState(3, sm_clock_hz=1.98e9, clock_limits={"sw_power_cap": 2}, other_processes=0)
    new = replace(old, device_state=state, kernels={"mkldnn_convolution": 2}, registers=168, spills=0)
    for name in ("device_state", "kernels", "registers", "spills"):
        assert name.encode() not in encode_line(old)
    for one in (old, new):
        back, _ = LineReader().read(encode_line(one))
        assert replace(back, samples_s=tuple(back.samples_s)) == replace(one, host_samples_s=back.host_samples_s)
