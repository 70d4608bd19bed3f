"""What is read from a profiler's events: nesting, kernels, layers, idle time by cause, memory; from made-up events."""

from __future__ import annotations

from pathlib import Path

import pytest

from vidbench.idle import OUTSIDE, busy, device_gaps, host_gaps
from vidbench.kernel_kinds import lays_out
from vidbench.sweep import RequestError
from vidbench.traces import (
    CALL,
    LAYER,
    MEMORY,
    MOST_BARS,
    SCHEMA_VERSION,
    SUMMARY,
    Event,
    Gap,
    Row,
    bars,
    conversion_s,
    differences,
    kernels,
    launched,
    layers,
    load,
    memory_over_time,
    nested,
    onednn_primitives,
    operators,
)

MS = 1e-3
SCOPE = Event(CALL, 0.0, 20 * MS, "thread 1")


def host(name: str, start_ms: float, ms: float, *, id: int = 0, detail: str = "", launch: int = 0) -> Event:
    return Event(name, start_ms * MS, ms * MS, "thread 1", detail=detail, id=id, launch=launch)


def kernel(name: str, start_ms: float, ms: float, by: int = 0, launch: int = 0, detail: str = "") -> Event:
    return Event(name, start_ms * MS, ms * MS, "stream 7", True, detail=detail, launched_by=by, launch=launch)


def test_time_belongs_to_the_innermost_operator() -> None:
    events = [
        SCOPE,
        host("aten::conv3d", 1, 10, detail="1x3"),
        host("aten::convolution", 2, 8, detail="1x3"),
        host("aten::relu", 12, 2),
        host("aten::relu", 15, 1),
        Event("aten::add", 2 * MS, 5 * MS, "thread 2"),
    ]
    found = {(row.name, row.calls): row.seconds for row in operators(nested(events))}
    assert found == pytest.approx(
        {
            ("aten::conv3d", 1): 2 * MS,
            ("aten::convolution", 1): 8 * MS,
            ("aten::relu", 2): 3 * MS,
            ("aten::add", 1): 5 * MS,
        }
    )
    spans = {span.event.name: span for span in nested(events)}
    assert spans["aten::convolution"].depth == spans["aten::conv3d"].depth + 1
    assert spans["aten::add"].depth == 0


def test_kernels_are_added_up_and_those_of_a_layer_are_found_by_who_launched_them() -> None:
    events = [
        SCOPE,
        host(LAYER + "stem", 0.5, 3),
        host("aten::conv3d", 1, 2, id=5),
        host("aten::convolution", 1.5, 1, id=6),
        host(LAYER + "head", 4, 2),
        host("aten::addmm", 4.5, 1, id=7),
        kernel("gemm", 2, 6, by=6),
        kernel("gemm", 9, 1, by=7),
        kernel("copy", 11, 1),
        Event(MEMORY, 3 * MS, 0.0, "stream 7", True, bytes=512),
    ]
    assert kernels(events) == [Row("gemm", 2, pytest.approx(7 * MS)), Row("copy", 1, pytest.approx(1 * MS))]
    spans = nested(events)
    found = {row.name: row.seconds for row in layers(spans, launched(events, spans))}
    assert found == pytest.approx({"stem": 6 * MS, "head": 1 * MS})
    on_cpu = {row.name: row.seconds for row in layers(spans, None)}
    assert on_cpu == pytest.approx({"stem": 3 * MS, "head": 2 * MS})


def test_a_kernel_that_no_operator_launched_belongs_to_the_scope_around_its_launch() -> None:
    events = [
        SCOPE,
        host(LAYER + "stem", 0.5, 3, id=3),
        host("cuLaunchKernelEx", 1, 0.1, launch=40),
        host(LAYER + "head", 4, 2, id=40),  # torch's 40 is another than CUPTI's
        kernel("triton_igemm", 2, 6, launch=40),
        kernel("of nobody", 9, 1, launch=41),
    ]
    spans = nested(events)
    found = {row.name: row.seconds for row in layers(spans, launched(events, spans))}
    assert found == pytest.approx({"stem": 6 * MS, "head": 0})


LATE = host("cudaLaunchKernel", 9, 0.5, launch=2)


@pytest.mark.parametrize(
    ("meanwhile", "cause"),
    [
        ([LATE], OUTSIDE),
        ([host("Torch-Compiled Region: 0/0", 3, 7), host("Optimizer.step#SGD.step", 3, 7), LATE], OUTSIDE),
        ([host("aten::conv3d", 4.2, 5.5), LATE], "launching"),
        ([host("aten::empty", 4.1, 4.8), host("cudaMalloc", 4.2, 4.5), LATE], "allocating"),
        # .item(): the host waited until the kernel had ended; what follows is Python's, but not Python's fault.
        ([host("aten::item", 1, 3.1), host("cudaStreamSynchronize", 1.1, 2.903), LATE], "a synchronising call"),
        ([host("cudaMemcpy", 1, 3.001), LATE], "a synchronising call"),
        ([host("aten::item", 0.5, 1), host("cudaStreamSynchronize", 0.6, 0.5), LATE], OUTSIDE),  # of an earlier kernel
        # All is enqueued, and the host waits for the end: nothing that it does keeps the device.
        ([host("cudaLaunchKernel", 0.5, 0.1, launch=2), host("cudaDeviceSynchronize", 0.7, 19.3)],
         "the device's own, between queued kernels"),
        ([host("cudaLaunchKernel", 0.5, 0.1, launch=77)], "a launch that was not seen"),
    ],
)  # fmt: skip
def test_a_gap_between_kernels_has_its_cause_before_the_launch_of_the_next(meanwhile: list[Event], cause: str) -> None:
    events = [SCOPE, kernel("a", 0, 4, launch=1), kernel("b", 10, 10, launch=2), *meanwhile]
    (gap,) = device_gaps(events, nested(events), SCOPE)
    assert (gap.cause, gap.count) == (cause, 1)
    assert gap.seconds == pytest.approx(6 * MS)


def test_who_launches_on_another_thread_is_asked_alone() -> None:
    elsewhere = Event("aten::conv3d", 4 * MS, 6 * MS, "thread 2")
    events = [SCOPE, kernel("a", 0, 4, launch=1), kernel("b", 10, 10, launch=2), LATE, elsewhere]
    assert [gap.cause for gap in device_gaps(events, nested(events), SCOPE)] == [OUTSIDE]


def test_what_comes_after_the_last_kernel_is_the_calls_end_and_overlapping_kernels_are_one() -> None:
    launch = host("cudaGraphLaunch", 0.1, 0.1, launch=5)  # one launch of all
    kernels = [kernel("a", 0, 6, launch=5), kernel("b", 3, 5, launch=5), kernel("c", 8.0005, 2, launch=5)]
    events = [SCOPE, launch, *kernels]
    assert device_gaps(events, nested(events), SCOPE) == [
        Gap("the call's end", 1, pytest.approx(9.9995 * MS)),
        Gap("the device's own, between queued kernels", 1, pytest.approx(0.0005 * MS)),
    ]


def test_on_a_cpu_idle_is_what_no_operator_covers() -> None:
    spans = nested([SCOPE, host(LAYER + "stem", 0, 20), host("aten::conv3d", 2, 8), host("aten::relu", 12, 8)])
    assert host_gaps(spans, SCOPE) == [Gap(OUTSIDE, 2, pytest.approx(4 * MS))]


def test_covered_times_are_joined() -> None:
    assert busy([(3.0, 4.0), (0.0, 1.0), (0.5, 2.0), (2.0, 2.5)]) == [(0.0, 2.5), (3.0, 4.0)]


def test_memory_goes_on_from_what_was_alive() -> None:
    changes = [(2, 100), (5, 50), (9, -120)]
    events = [Event(MEMORY, at * MS, 0.0, "thread 1", bytes=change) for at, change in changes]
    events.append(Event(MEMORY, 3 * MS, 0.0, "stream 7", True, bytes=7))
    events.append(Event(MEMORY, 30 * MS, 0.0, "thread 1", bytes=7))
    line = memory_over_time(events, SCOPE, False, 1000)
    assert [alive for _, alive in line] == [1000, 1100, 1150, 1030, 1030]
    assert [moment for moment, _ in line] == pytest.approx([0, 2 * MS, 5 * MS, 9 * MS, 20 * MS])


def test_bars_are_of_the_call_alone_and_in_its_time() -> None:
    scope = Event(CALL, 1.0, 1.0, "thread 1")
    inside, before = Event("aten::relu", 1.25, 0.5, "thread 1"), Event("aten::relu", 0.5, 0.1, "thread 1")
    found, left_out = bars([scope, inside, before], nested([scope, inside, before]), scope)
    assert left_out == 0
    assert [(bar.name, bar.start_s, bar.duration_s, bar.depth) for bar in found] == [("aten::relu", 0.25, 0.5, 1)]


def test_long_bars_of_one_lane_push_out_no_short_ones_of_another() -> None:
    operators = [host(f"aten::op{i}", 0.01 * i, 0.01) for i in range(MOST_BARS)]
    kernels = [kernel(f"k{i}", 0.01 * i, 1e-4 * (i + 1)) for i in range(10)]
    found, left_out = bars([SCOPE, *operators, *kernels], nested([SCOPE, *operators]), SCOPE)
    assert {bar.name for bar in found} >= {one.name for one in kernels}
    assert (len(found), left_out) == (MOST_BARS, 10)
    found, left_out = bars([SCOPE, *operators, *kernels * 200], nested([SCOPE, *operators]), SCOPE)
    assert sum(bar.lane == "stream 7" for bar in found) == MOST_BARS // 2
    assert left_out == MOST_BARS + 2000 - MOST_BARS


VERBOSE = """onednn_verbose,v1,info,oneDNN v3.7.1
onednn_verbose,v1,info,cpu,isa:Intel AVX-512
some line of the program's own, exec,with,commas
onednn_verbose,v1,primitive,exec,cpu,reorder,jit:uni,undef,src:f32::blocked:abcd::f0 dst:f32,,,1x3x8x8,0.25
onednn_verbose,v1,primitive,create,cpu,convolution,jit:avx512_core,forward_training,x,y,alg:convolution_direct,mb1,9.5
onednn_verbose,v1,primitive,exec,cpu,convolution,jit:avx512_core,forward_training,x,y,alg:convolution_direct,mb1,1.5
onednn_verbose,exec,cpu,convolution,jit:avx512_core,forward_training,x,y,alg:convolution_direct,mb1,0.5
onednn_verbose,v1,primitive,exec,cpu,reorder
"""


def test_onednn_says_which_algorithms_ran_and_how_long() -> None:
    rows = onednn_primitives(VERBOSE)
    assert rows == [
        Row("convolution", 2, pytest.approx(2 * MS), "jit:avx512_core"),
        Row("reorder", 1, pytest.approx(0.25 * MS), "jit:uni"),
    ]
    assert conversion_s([Row("aten::copy_", 1, 1 * MS), Row("aten::relu", 1, 5 * MS)], rows) == pytest.approx(1.25 * MS)


@pytest.mark.parametrize(
    ("name", "full", "only_copies"),
    [
        ("cudnn::ops::nchwToNhwcKernel", "", True),
        ("at::native::elementwise_kernel", "void at::native::elementwise_kernel<128, 4, at::native::"
         "gpu_kernel_impl_nocast<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)> >(int)", True),
        ("at::native::elementwise_kernel", "void at::native::elementwise_kernel<4, CUDAFunctor_add<float> >", False),
        ("Memcpy DtoD", "Memcpy DtoD (Device -> Device)", True),
        ("Memset", "Memset (Device)", False),
        ("triton_poi_fused_clone_0", "", True),
        ("triton_poi_fused__to_copy_permute_view_12", "", True),
        ("triton_red_fused__to_copy_native_batch_norm_3", "", False),
        ("triton_poi_fused_add_clone_1", "", False),
        ("slow_conv_transpose3d", "", False),
        ("aten::copy_", "", True),
        ("reorder", "jit:uni", True),
    ],
)  # fmt: skip
def test_what_only_copies_is_known_by_its_name(name: str, full: str, only_copies: bool) -> None:
    assert lays_out(name, full) == only_copies
    assert conversion_s([], [Row(name, 1, 1.0, full)]) == only_copies


def test_what_changed_between_two_profiles_comes_first_by_time() -> None:
    base = [Row("gemm", 1, 4 * MS), Row("relu", 2, 1 * MS)]
    new = [Row("igemm", 1, 1 * MS), Row("relu", 2, 1.5 * MS)]
    found = [(one.name, one.base is None, one.new is None, one.change_s) for one in differences(base, new)]
    assert found == [
        ("gemm", False, True, pytest.approx(-4 * MS)),
        ("igemm", True, False, pytest.approx(1 * MS)),
        ("relu", False, False, pytest.approx(0.5 * MS)),
    ]


NOW = b'{"schema_version": %d}' % SCHEMA_VERSION


@pytest.mark.parametrize("content", [b"", b"[]", NOW, b"\xff\xfe", NOW[:-1], b'{"schema_version": "1"}'])
def test_a_damaged_profile_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SUMMARY).write_bytes(content)
    with pytest.raises(RequestError, match=r"profile\.json cannot be read"):
        load(tmp_path)


def test_no_profile_is_refused_with_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"holds no profile\.json: give the --out of `vidbench profile`"):
        load(tmp_path)


@pytest.mark.parametrize("content", [b'{"schema_version": 1}', b'{"schema_version": 99, "point": 7}'])
def test_a_profile_of_another_version_is_refused_with_what_to_do(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SUMMARY).write_bytes(content)
    with pytest.raises(RequestError, match=r"has schema_version \d+; wanted \d+: profile that point again"):
        load(tmp_path)
