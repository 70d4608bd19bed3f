"""Which kernels a call ran, and what a comparison says of why a time changed."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vidbench import kernel_names
from vidbench.causes import causes
from vidbench.compare import compare
from vidbench.compare_text import FORMATS
from vidbench.kernel_names import Ran, device_kernels, operators, short_name
from vidbench.memory import memory_and_operators
from vidbench.records import DeviceState, Environment, Measurement
from vidbench.results import Run
from vidbench.sweep import Point

# --- names ------------------------------------------------------------------------------------------------------------


def test_the_operators_that_do_work_are_named() -> None:
    layer, x = torch.nn.Linear(8, 4), torch.randn(3, 2, 4)

    def call() -> None:
        with torch.inference_mode():
            torch.tanh(layer(x.flatten(1))).view(-1).t()

    _, ran = memory_and_operators("cpu", call, 0)
    assert {"addmm", "tanh"} <= ran.keys() <= {"addmm", "tanh", "copy_"}  # addmm may copy its bias first
    assert set(ran.values()) == {1}
    assert memory_and_operators("cpu", call, 0)[1] == ran


@dataclass
class Event:
    text: str
    start: int
    end: int
    thread: int = 1

    def name(self) -> str:
        return self.text

    def start_ns(self) -> int:
        return self.start

    def duration_ns(self) -> int:
        return self.end - self.start

    def start_thread_id(self) -> int:
        return self.thread


def test_who_passes_work_on_is_not_named_and_who_asks_for_help_is() -> None:
    events = [
        Event("aten::linear", 0, 90),
        Event("aten::t", 1, 5),
        Event("aten::addmm", 10, 80),
        Event("aten::copy_", 20, 30),
        Event("aten::conv3d", 100, 200),
        Event("vidkernels::conv3d", 110, 190),
        Event("aten::empty", 120, 125),
        Event("aten::mm", 130, 140, thread=2),  # meanwhile, on another thread
        Event("autograd::engine::evaluate_function: AddmmBackward0", 210, 300),
        Event("[memory]", 220, 220),
        Event("aten::mm", 230, 240),
    ]
    assert operators(events) == {"addmm": 1, "copy_": 1, "mm": 2, "vidkernels::conv3d": 1}


def test_a_thousand_kernels_stay_a_short_list() -> None:
    events = [Event(f"aten::op{number}", 10 * i, 10 * i + 5) for i, number in enumerate([*range(100), 7, 7])]
    ran = operators(events)
    assert len(ran) == kernel_names.MOST_NAMES + 1
    assert ran["op7"] == 3
    assert sum(ran.values()) == 102


@pytest.mark.parametrize(
    ("kernel", "short"),
    [
        (
            "void cudnn::ops::nchwToNhwcKernel<float, float, float, false, true, (cudnnKernelDataType_t)2>"
            "(cudnn::ops::nchw2nhwc_params_t<float>, float const*, float*)",
            "cudnn::ops::nchwToNhwcKernel",
        ),
        (
            "void at::native::(anonymous namespace)::max_pool3d_kernel<float>(int, float*)",
            "at::native::max_pool3d_kernel",
        ),
        (
            "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_s1688fprop_optimized_tf32_128x128_16x4_nhwc_align4>(P)",
            "cutlass_tensorop_s1688fprop_optimized_tf32_128x128_16x4_nhwc_align4",
        ),
        ("triton_igemm_kernel", "triton_igemm_kernel"),
        ("Memset (Device)", "Memset"),
    ],
)
def test_names_of_kernels_are_shortened_to_what_tells_them_apart(kernel: str, short: str) -> None:
    assert short_name(kernel) == short


def fake_profile(names: Sequence[str]) -> Callable[..., Any]:
    """torch.profiler.profile that has seen these kernels, among what the host did."""
    cuda, cpu = torch.profiler.DeviceType.CUDA, torch.profiler.DeviceType.CPU
    events = [
        SimpleNamespace(name=lambda n=n: n, device_type=lambda d=d: d, is_user_annotation=lambda: False)
        for n, d in [*((name, cuda) for name in names), ("cudaLaunchKernel", cpu)]
    ]

    class Profile:
        profiler = SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: events))

        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    return lambda **_: Profile()


def test_kernels_of_a_device_come_with_the_registers_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks: list[Callable[[Any], None]] = []
    runtime = SimpleNamespace(launch_enter_hook=SimpleNamespace(add=hooks.append, remove=hooks.remove))
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(knobs=SimpleNamespace(runtime=runtime)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.profiler, "profile", fake_profile(["igemm", "igemm", "void fill<float>(float*)"]))
    compiled = {7: {4: 168, 3: 16}, 9: {4: 255, 3: 0}}  # registers, bytes of local memory

    def attribute(value: Any, which: int, function: ctypes.c_void_p) -> int:
        value._obj.value = compiled[function.value or 0][which]
        return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(cuFuncGetAttribute=attribute))

    def call() -> None:
        for function in (7, 9, 7):
            for hook in hooks:
                hook(SimpleNamespace(data={"name": "igemm", "function": function, "stream": 0}))

    assert device_kernels(call) == Ran({"fill": 1, "igemm": 2}, registers=255, spills=4)
    assert hooks == []


def test_triton_has_the_hooks_that_are_asked() -> None:
    triton = pytest.importorskip("triton")
    with kernel_names._triton_functions() as functions:
        triton.knobs.runtime.launch_enter_hook(SimpleNamespace(data={"function": 5}))
    assert functions == {5}


def test_without_cupti_there_are_no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**_: Any) -> None:
        raise RuntimeError("CUPTI_ERROR_NOT_INITIALIZED")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.profiler, "profile", refused)
    assert device_kernels(lambda: None) == Ran()


# --- causes -----------------------------------------------------------------------------------------------------------

POINT = Point("conv3d", "op", "library", case={"clip_length": 8})


def rounds(middle: float = 1.0, seed: int = 0, **fields: Any) -> list[Measurement]:
    times = middle * np.exp(0.002 * np.random.default_rng(seed).standard_normal(12))
    return [Measurement(POINT, number, "ok", samples_s=[float(one)] * 3, **fields) for number, one in enumerate(times)]


def state(clock: float = 2e9, **limits: int) -> DeviceState:
    return DeviceState(10, sm_clock_hz=clock, clock_limits=limits)


@pytest.mark.parametrize(
    ("base", "new", "said"),
    [
        ({}, {}, []),
        ({"kernels": {"mm": 1}}, {"kernels": {"mm": 1}}, []),
        ({"kernels": {"mm": 1}}, {}, []),  # an older run does not tell
        (
            {"kernels": {"mkldnn_convolution": 2, "relu": 1}},
            {"kernels": {"slow_conv3d_forward": 2, "relu": 1}},
            ["other kernels ran: came slow_conv3d_forward ×2; went mkldnn_convolution ×2"],
        ),
        ({"kernels": {"mm": 1}}, {"kernels": {"mm": 3}}, ["how often: mm 1 → 3"]),
        (
            {"kernels": {"fprop": 1}},
            {"kernels": {"fprop": 1, "cudnn::ops::nchwToNhwcKernel": 2}},
            ["other kernels ran: came cudnn::ops::nchwToNhwcKernel ×2", "copies and changes of layout 0 → 2"],
        ),
        (
            {"kernels": {}},
            {"kernels": {"a": 1}},
            [],
        ),
        (
            {"kernels": {"x": 1}},
            {"kernels": dict.fromkeys("abcde", 1)},
            ["other kernels ran: came a, b, c and 2 more; went x"],
        ),
        ({"device_state": state(2e9)}, {"device_state": state(1.84e9)}, ["the SM clock is 8.0% lower"]),
        ({"device_state": state(2e9)}, {"device_state": state(1.99e9)}, []),
        ({"device_state": state(0.0)}, {"device_state": state(2e9)}, []),  # a driver that does not know
        (
            {"device_state": state(sw_power_cap=1)},
            {"device_state": state(sw_power_cap=9, hw_thermal=1)},
            ["clock held down by sw_power_cap in 90% of the readings, was 10%"],
        ),
        ({"host_samples_s": [0.5]}, {"host_samples_s": [1.5]}, ["launch-bound now"]),
        ({"host_samples_s": [1.5]}, {"host_samples_s": [0.5]}, ["no longer launch-bound"]),
    ],
)
def test_what_is_not_as_it_was(base: dict[str, Any], new: dict[str, Any], said: list[str]) -> None:
    assert list(causes(rounds(**base), rounds(**new))) == said


def test_rounds_that_disagree_among_themselves_are_told() -> None:
    """A library that picks its kernel by a trial in every process."""
    new = rounds(kernels={"fast": 1})
    new[3:5] = [replace(one, kernels={"slow": 1}) for one in new[3:5]]
    said = list(causes(rounds(kernels={"fast": 1}), new))
    assert said == ["2 of 12 rounds of NEW ran other kernels than the rest"]


def run(measurements: Sequence[Measurement], machine: str = "m", gpu: str = "g") -> Run:
    return Run(1, "r", "s", "", (), Environment(machine, gpu=gpu), "", None, list(measurements), (), Path("r"))


def test_why_stands_on_the_points_line() -> None:
    base, again = (rounds(seed=seed, kernels={"mkldnn_convolution": 1}) for seed in (0, 1))
    new = rounds(1.3, 2, kernels={"slow_conv3d_forward": 1})
    found = compare(run(base), run(new), again=run(again))
    why = "why: other kernels ran: came slow_conv3d_forward; went mkldnn_convolution"
    text = FORMATS["text"](found, run(base), run(new))
    assert [line for line in text.splitlines() if why in line and line.startswith("  conv3d/library: 1 s → 1.3")]
    assert why in FORMATS["markdown"](found, run(base), run(new)).replace("\\_", "_")
    document = json.loads(FORMATS["json"](found, run(base), run(new)))
    assert document["points"][0]["causes"] == [why.removeprefix("why: ")]


def test_what_did_not_change_needs_no_reason() -> None:
    base, again, new = (rounds(seed=seed, kernels={name: 1}) for seed, name in ((0, "a"), (1, "a"), (2, "b")))
    found = compare(run(base), run(new), again=run(again))
    assert found.points[0].verdict == "SAME"
    assert "why:" not in FORMATS["text"](found, run(base), run(new))


def test_spills_are_compared_exactly_and_registers_are_told() -> None:
    base = run(rounds(registers=128, spills=0))
    spilt = compare(base, run(rounds(registers=255, spills=12)))
    assert [(c.metric, c.base, c.new, c.worse) for c in spilt.points[0].changes] == [
        ("registers", 128, 255, False), ("spills", 0, 12, True),
    ]  # fmt: skip
    assert spilt.exit_code == 1
    assert compare(base, run(rounds(registers=255, spills=0))).exit_code == 0
    # Of another GPU they are another compiler's.
    elsewhere = compare(base, run(rounds(registers=255, spills=12, kernels={"b": 1}), gpu="another"))
    assert (elsewhere.points[0].changes, elsewhere.points[0].causes) == ((), ())
