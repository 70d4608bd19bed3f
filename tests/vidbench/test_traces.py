"""What is read from a profiler's events: nesting, kernels, layers, idle time by cause, memory; from made-up events."""

from __future__ import annotations

from pathlib import Path

import pytest

from vidbench.sweep import RequestError
from vidbench.traces import (
    CALL,
    LAYER,
    MEMORY,
    SUMMARY,
    Event,
    Gap,
    Row,
    bars,
    busy,
    conversion_s,
    device_gaps,
    differences,
    host_gaps,
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


def host(name: str, start_ms: float, ms: float, *, id: int = 0, shapes: str = "") -> Event:
    return Event(name, start_ms * MS, ms * MS, "thread 1", shapes=shapes, id=id)


def kernel(name: str, start_ms: float, ms: float, by: int = 0) -> Event:
    return Event(name, start_ms * MS, ms * MS, "stream 7", True, launched_by=by)


def test_time_belongs_to_the_innermost_operator() -> None:
    events = [
        SCOPE,
        host("aten::conv3d", 1, 10, shapes="1x3"),
        host("aten::convolution", 2, 8, shapes="1x3"),
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


@pytest.mark.parametrize(
    ("meanwhile", "cause"),
    [
        ([], "Python between operators"),
        ([host("aten::conv3d", 4.2, 5.5), host("cudaLaunchKernel", 9, 0.5)], "launching"),
        ([host("aten::item", 4.1, 5.8), host("cudaStreamSynchronize", 4.2, 5.5)], "waiting for the device"),
        ([host("aten::empty", 4.1, 5.8), host("cudaMalloc", 4.2, 5.5)], "allocating"),
    ],
)
def test_a_gap_between_kernels_has_the_cause_that_took_most_of_it(meanwhile: list[Event], cause: str) -> None:
    events = [SCOPE, kernel("a", 0, 4), kernel("b", 10, 10), *meanwhile]
    (gap,) = device_gaps(events, nested(events), SCOPE)
    assert (gap.cause, gap.count) == (cause, 1)
    assert gap.seconds == pytest.approx(6 * MS)


def test_what_comes_after_the_last_kernel_is_the_calls_end_and_overlapping_kernels_are_one() -> None:
    events = [SCOPE, kernel("a", 0, 6), kernel("b", 3, 5), kernel("c", 8.0005, 2)]
    assert device_gaps(events, nested(events), SCOPE) == [Gap("the call's end", 1, pytest.approx(9.9995 * MS))]


def test_on_a_cpu_idle_is_what_no_operator_covers() -> None:
    spans = nested([SCOPE, host(LAYER + "stem", 0, 20), host("aten::conv3d", 2, 8), host("aten::relu", 12, 8)])
    assert host_gaps(spans, SCOPE) == [Gap("Python between operators", 2, pytest.approx(4 * MS))]


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
    found = bars([scope, inside, before], nested([scope, inside, before]), scope)
    assert [(bar.name, bar.start_s, bar.duration_s, bar.depth) for bar in found] == [("aten::relu", 0.25, 0.5, 1)]


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


def test_what_changed_between_two_profiles_comes_first_by_time() -> None:
    base = [Row("gemm", 1, 4 * MS), Row("relu", 2, 1 * MS)]
    new = [Row("igemm", 1, 1 * MS), Row("relu", 2, 1.5 * MS)]
    found = [(one.name, one.base is None, one.new is None, one.change_s) for one in differences(base, new)]
    assert found == [
        ("gemm", False, True, pytest.approx(-4 * MS)),
        ("igemm", True, False, pytest.approx(1 * MS)),
        ("relu", False, False, pytest.approx(0.5 * MS)),
    ]


@pytest.mark.parametrize("content", [b"", b"[]", b'{"schema_version": 1}', b"\xff\xfe", b'{"schema_version": 1'])
def test_a_damaged_profile_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SUMMARY).write_bytes(content)
    with pytest.raises(RequestError, match=r"profile\.json cannot be read"):
        load(tmp_path)


def test_no_profile_is_refused_with_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"holds no profile\.json: give the --out of `vidbench profile`"):
        load(tmp_path)
