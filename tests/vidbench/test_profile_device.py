"""Profiles of a GPU that is made up: operators, calls of the driver, kernels, scopes and memory, as kineto has them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import DeviceType

from vidbench import profile
from vidbench.profile import take
from vidbench.records import Cost, Counts, Environment
from vidbench.report import profile_page
from vidbench.sweep import Point, RequestError
from vidbench.timing import Samples
from vidbench.traces import CALL, LAYER, MEMORY, TRACE, Event, Profile, launched, layers, nested

EPOCH_NS = 1_700_000_000_000_000_000
POINT = Point("c3d", "model", "eager", device="cuda", case={"clip_length": 16})


@dataclass
class Kineto:
    """One of `torch._C._autograd._KinetoEvent`."""

    text: str
    start_us: float
    us: float
    own: int = 0
    """Of an operator or a scope torch's correlation, of the driver's calls and kernels CUPTI's."""
    linked: int = 0
    """torch's correlation of the operator that a call or a kernel belongs to."""
    device: DeviceType = DeviceType.CPU
    thread: int = 1
    annotation: bool = False
    changed: int = 0

    def name(self) -> str:
        return self.text

    def start_ns(self) -> int:
        return EPOCH_NS + round(1e3 * self.start_us)

    def duration_ns(self) -> int:
        return round(1e3 * self.us)

    def device_type(self) -> DeviceType:
        return self.device

    def is_user_annotation(self) -> bool:
        return self.annotation

    def correlation_id(self) -> int:
        return self.own

    def linked_correlation_id(self) -> int:
        return self.linked

    def start_thread_id(self) -> int:
        return self.thread

    def device_resource_id(self) -> int:
        return 7

    def shapes(self) -> list[list[int]]:
        return [[1, 3, 8], []] if self.text.startswith("aten::") else []

    def nbytes(self) -> int:
        return self.changed


def kernel(name: str, start_us: float, us: float, *, own: int, linked: int = 0) -> Kineto:
    return Kineto(name, start_us, us, own, linked, DeviceType.CUDA)


COPY = (
    "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<"
    "at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()#3}>(int)"
)
GEMM = "void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_128x128>(cutlass_80_tensorop_s1688gemm_128x128::Params)"


def one_call(at: float = 0.0) -> list[Kineto]:
    """A call of two layers: a convolution, a copy and .item() in A; in B a Triton kernel that no operator launches."""
    gpu_scope = Kineto(LAYER + "a", at + 20, 30, 41, device=DeviceType.CUDA, annotation=True)
    events = [
        Kineto(CALL, 0, 200, 30, annotation=True),
        Kineto(LAYER + "a", 5, 80, 31, annotation=True),
        Kineto("aten::convolution", 10, 20, 40),
        Kineto("cudaLaunchKernel", 12, 5, 90, linked=40, thread=99),
        Kineto(MEMORY, 13, 0, device=DeviceType.CUDA, changed=4096),
        Kineto("aten::copy_", 31, 8, 42),
        Kineto("cudaLaunchKernel", 32, 5, 91, linked=42),
        Kineto("aten::item", 45, 40, 43),
        Kineto("cudaStreamSynchronize", 46, 36, 92, linked=43),
        Kineto(LAYER + "b", 90, 60, 32, annotation=True),
        Kineto("cuLaunchKernelEx", 140, 5, 40),  # CUPTI's 40 is not torch's
        Kineto(MEMORY, 150, 0, device=DeviceType.CUDA, changed=-4096),
        Kineto("cudaDeviceSynchronize", 152, 45, 93),
        kernel(GEMM, 20, 30, own=90, linked=40),
        kernel(COPY, 51, 29, own=91, linked=42),
        kernel("triton_igemm", 145, 40, own=40),
    ]
    for one in events:
        one.start_us += at
    return [*events, gpu_scope]


class Profiler:
    """torch.profiler.profile that has seen these events."""

    def __init__(self, events: list[Kineto]) -> None:
        self.profiler = SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: events))

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def export_chrome_trace(self, path: str) -> None:
        Path(path).write_bytes(b"")


def read(events: list[Kineto]) -> list[Event]:
    return profile._events(Profiler(events))


def test_torchs_and_cuptis_numbers_are_not_mixed_up() -> None:
    found = {one.name: one for one in read(one_call())}
    assert (found["aten::convolution"].id, found["aten::convolution"].launch) == (40, 0)
    assert (found["cuLaunchKernelEx"].id, found["cuLaunchKernelEx"].launch) == (0, 40)
    gemm = found["cutlass_80_tensorop_s1688gemm_128x128"]
    assert (gemm.id, gemm.launched_by, gemm.launch) == (0, 40, 90)
    assert (gemm.lane, gemm.detail, gemm.is_kernel) == ("stream 7", GEMM, True)
    assert found["triton_igemm"].detail == ""
    assert found["aten::convolution"].detail == "1x3x8"
    assert not found[MEMORY].is_kernel


def test_time_goes_to_the_layer_that_launched_and_not_to_who_has_the_same_number() -> None:
    events = [
        Kineto(CALL, 0, 100, 30),
        Kineto(LAYER + "a", 1, 40, 31),
        Kineto("aten::convolution", 2, 30, 40),
        Kineto("cudaLaunchKernel", 3, 5, 7, linked=40),
        Kineto(LAYER + "b", 50, 40, 32),
        Kineto("aten::relu", 51, 10, 41),
        Kineto("cudaLaunchKernel", 52, 5, 40, linked=41),
        kernel("conv", 10, 20, own=7, linked=40),
        kernel("relu", 60, 3, own=40, linked=41),
    ]
    spans = nested(read(events))
    found = {row.name: row.seconds for row in layers(spans, launched(read(events), spans))}
    assert found == pytest.approx({"a": 20e-6, "b": 3e-6})


def test_a_call_of_the_drivers_is_on_its_operators_thread() -> None:
    spans = nested(read(one_call()))
    launch = next(one for one in spans if one.event.launch == 90)
    assert spans[launch.parent].event.name == "aten::convolution"


def test_the_devices_copy_of_a_scope_is_no_kernel() -> None:
    assert [one.name for one in read(one_call()) if one.is_kernel] == [
        "cutlass_80_tensorop_s1688gemm_128x128", "at::native::elementwise_kernel", "triton_igemm",
    ]  # fmt: skip


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[Kineto]:
    """What the profiler sees, of three calls; the rest of a GPU is made up too."""
    seen = [*one_call(), *one_call(1000), *one_call(2000)]
    work = SimpleNamespace(
        cost=lambda: Cost(Counts(10**6), 77), check=lambda: None, prepare=lambda: lambda: None, running=None
    )
    environment = Environment(
        "H9", flops_per_s={"cuda/fp32": 1e13}, bytes_per_s={"cuda/65536": 5e12, "cuda/1000": 1e12}
    )

    class Clock:
        cuda, cold, own_bytes = True, False, 0

        def __init__(self, *_: str) -> None:
            pass

        def __call__(self, call: Any, calls: int = 1) -> tuple[float, float]:
            return 1e-4, 1e-5

        def flush(self) -> None:
            pass

    for name, fake in {
        "describe": lambda *_: environment,
        "workload": lambda *_: work,
        "Timer": Clock,
        "measure_memory": lambda *_: SimpleNamespace(live_before_bytes=1000),
        "warm_up": lambda *_, seconds: None,
        "sample": lambda *_: Samples([1e-4] * 6, [1e-5] * 6),
        "counters": lambda *_: ([], "ncu is not installed"),
    }.items():
        monkeypatch.setattr(profile, name, fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: Profiler(seen))
    return seen


def test_a_call_on_a_gpu_is_told_kernel_by_kernel(gpu: list[Kineto], tmp_path: Path) -> None:
    found = take(POINT, tmp_path)
    assert [(row.name, row.seconds) for row in found.kernels] == [
        ("triton_igemm", pytest.approx(40e-6)),
        ("cutlass_80_tensorop_s1688gemm_128x128", pytest.approx(30e-6)),
        ("at::native::elementwise_kernel", pytest.approx(29e-6)),
    ]
    assert found.conversion_s == pytest.approx(29e-6)
    assert {row.name: row.seconds for row in found.layers} == pytest.approx({"a": 59e-6, "b": 40e-6})
    assert {gap.cause: gap.seconds for gap in found.gaps} == pytest.approx(
        {
            "no operator of torch's ran (Python, autograd, compiled code, other libraries)": 20e-6,
            "the device's own, between queued kernels": 1e-6,
            "a synchronising call": 65e-6,
            "the call's end": 15e-6,
        }
    )
    assert found.busy_s == pytest.approx(99e-6)
    assert [alive for _, alive in found.memory] == [1000, 5096, 1000, 1000]
    assert (tmp_path / TRACE).exists()


def test_what_is_said_of_a_gpu_says_what_each_time_is(gpu: list[Kineto], tmp_path: Path) -> None:
    found = take(POINT, tmp_path)
    said = profile_page.findings(found)
    assert "100 µs on the device, as `vidbench sweep` measures it" in said[0]
    assert said[0].endswith("200 µs under the profiler.")
    assert said[1].startswith("Of its kernels' time: 40 % triton_igemm, 30 % cutlass_80")
    assert "a profiled call, whose host the profiler slows; the largest part, 64 %: a synchronising call." in said[2]
    assert said[3] == "29 % of the kernels' time only copies, or changes layouts."
    assert said[4].endswith("what it must move is not known, and so not what bounds it.")
    page = profile_page.render(found)
    assert "Time of the kernels that each launched." in page
    assert "direct_copy_kernel_cuda" in page
    assert "direct_copy_kernel_cuda" not in profile_page.text(found)
    ((what, rows),) = profile_page.compared(found, found)
    assert (what, len(rows)) == ("kernels", 3)


def test_where_the_profiler_sees_no_kernel_nothing_is_claimed(gpu: list[Kineto], tmp_path: Path) -> None:
    gpu[:] = [one for one in gpu if one.device == DeviceType.CPU or one.text == MEMORY]
    with pytest.raises(
        RequestError, match=r"torch's profiler saw no kernel on the device; .*CUPTI.* end the other one"
    ):
        take(POINT, tmp_path)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to\nmore"), "out of memory: CUDA out of memory. "),
        (MemoryError(), "out of memory$"),
        (RuntimeError("backend='x' raised:\nCppCompileError: C++\nx"), "RuntimeError: backend='x' raised: CppCo"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory: Default"),
        (RuntimeError("CUDA error: an illegal memory access\nCompile with"), "RuntimeError: CUDA error: an i"),
    ],
)  # fmt: skip
def test_what_breaks_is_told_in_one_line(
    gpu: list[Kineto], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def breaks(*_: object) -> None:
        raise error

    monkeypatch.setattr(profile, "workload", breaks)
    with pytest.raises(RequestError, match=f"cannot be profiled: {said}") as refused:
        take(POINT, tmp_path)
    assert "\n" not in str(refused.value)


def profiled(**fields: Any) -> Profile:
    """A profile in which hardly anything is known."""
    empty: dict[str, Any] = {
        name: [] for name in ("operators", "kernels", "layers", "places", "gaps", "memory", "bars")
    }
    plain: dict[str, Any] = {
        "schema_version": 2, "point": "conv3d/library/forward/hot/cpu/fp32/contiguous/", "created_utc": "",
        "command": "", "machine": "m", "device": "cpu", "torch": "2", "latency_s": 1e-3, "wall_s": 1e-3,
        "profiled_s": 1e-3, "calls": 5, "conversion_s": 0.0, "flops_per_s": 1e12, "bytes_per_s": 1e11,
    }  # fmt: skip
    return Profile(**{**empty, **plain, **fields})


@pytest.mark.parametrize(
    ("macs", "moved", "said"),
    [
        (10**8, 10**6, "attains 20 % of what this device does at best, which is bound by arithmetic."),
        (10**6, 5 * 10**7, "attains 50 % of what this device does at best, which is bound by memory."),
        (0, 5 * 10**7, "attains 50 % of what this device does at best, which is bound by memory."),
        (10**8, None, "attains 20 % of this device's peak of products; what it must move is not known"),
        (None, 5 * 10**7, "attains 50 % of this device's rate of copies; its multiply-adds are not known."),
        (10**9, 10**6, "is faster than the ceilings that were measured here allow"),
    ],
)
def test_what_bounds_a_call_is_said_where_both_ceilings_are_known(
    macs: int | None, moved: int | None, said: str
) -> None:
    (*_, last) = profile_page.findings(profiled(macs=macs, bytes_moved=moved))
    assert said in last


def test_of_a_call_of_which_nothing_is_known_no_share_is_told() -> None:
    assert profile_page.findings(profiled()) == ["A call takes 1.00 ms."]


def test_what_is_left_out_is_told() -> None:
    from vidbench.traces import Bar

    bars = [Bar("aten::relu", "thread 1", depth, 0.0, 1e-3) for depth in range(12)]
    page = profile_page.render(profiled(bars=bars, bars_left_out=70))
    assert "Left out, and in the trace: 70 shorter bars of the fullest lanes, 2 that lie deeper." in page
    assert "Left out" not in profile_page.render(profiled())


def test_times_of_unlike_machines_are_said_to_be_such() -> None:
    base, new = profiled(), profiled(machine="other")
    assert "The other was profiled on m: times of unlike machines." in profile_page.against_text(base, new)
    assert "times of unlike machines" in profile_page.render(new, base)
    assert "unlike" not in profile_page.against_text(base, base) + profile_page.render(base, base)


def test_layers_of_a_training_step_are_said_to_be_forward_alone() -> None:
    from vidbench.traces import Row

    rows = [Row("stem", 1, 1e-3)]
    step = profiled(point="c3d/eager/train/hot/cpu/fp32/contiguous/", layers=rows)
    assert "Forward alone" in profile_page.render(step)
    assert "Forward alone" not in profile_page.render(profiled(layers=rows))


@pytest.mark.parametrize(
    ("busy", "said"), [(0.7, "0.7 of 2 processors busy, or spinning while they wait"), (1.9, None)]
)
def test_processors_that_rest_are_told(busy: float, said: str | None) -> None:
    found = " ".join(profile_page.findings(profiled(processors=busy, threads=2)))
    assert said in found if said else "processors" not in found


def test_a_place_above_its_ceiling_is_said_to_be_so() -> None:
    from vidbench.traces import Place

    places = [
        Place("hot", "1x8", 1, 1e-3, 10**6, 2 * 10**8, 1e11), Place("cached", "1x8", 1, 1e-3, 10**6, 2 * 10**8, 4e11),
        Place("products", "1x8", 1, 1e-3, 10**8, 0, 4e11),
    ]  # fmt: skip
    lines = [line.cells[-2:] for line in profile_page._place_lines(profiled(places=places), places)]
    assert lines == [("above the ceiling", "memory"), ("50 %", "memory"), ("20 %", "–")]
