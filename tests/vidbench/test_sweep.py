"""Points, axes and suites as data."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidbench.models import MODELS
from vidbench.suites import SUITES, plan, point_like
from vidbench.sweep import AXES, Point, RequestError, Sweep, parse_axes, text_of


def test_points_are_the_product_with_implementations_side_by_side() -> None:
    sweep = Sweep("conv3d", axes={"implementation": ("reference", "library"), "clip_length": (8, 16)})
    assert [(p.case["clip_length"], p.implementation) for p in sweep.points()] == [
        (8, "reference"), (8, "library"), (16, "reference"), (16, "library"),
    ]  # fmt: skip


def test_skip_leaves_out_matching_combinations_alone() -> None:
    sweep = Sweep(
        "conv3d",
        axes={"clip_length": (8, 16), "batch_size": (1, 2), "implementation": ("library",)},
        skip=({"clip_length": 16, "batch_size": 2},),
    )
    assert [(p.case["clip_length"], p.case["batch_size"]) for p in sweep.points()] == [(8, 1), (8, 2), (16, 1)]


def test_input_size_sets_height_and_width() -> None:
    (point,) = Sweep("c3d", "model", fixed={"implementation": "eager", "input_size": 64}).points()
    assert point.case == {"height": 64, "width": 64}


def test_overriding_height_replaces_input_size() -> None:
    sweep = Sweep("c3d", "model", fixed={"implementation": "eager", "input_size": 64})
    (point,) = sweep.override({"height": (32,), "width": (48,)}).points()
    assert point.case == {"height": 32, "width": 48}
    (point,) = sweep.override({"height": (32,)}).override({"input_size": (16,)}).points()
    assert point.case == {"height": 16, "width": 16}


def test_overriding_height_alone_keeps_the_width() -> None:
    (point,) = (
        Sweep("c3d", "model", fixed={"implementation": "eager", "input_size": 64}).override({"height": (32,)}).points()
    )
    assert point.case == {"height": 32, "width": 64}


def test_key_does_not_depend_on_the_order_of_the_case() -> None:
    a = Point("conv3d", "op", "library", case={"stride": (1, 2, 2), "bias": True})
    b = Point("conv3d", "op", "library", case={"bias": True, "stride": (1, 2, 2)})
    assert a.key == b.key == "conv3d/library/forward/hot/cpu/fp32/contiguous/bias=true,stride=1x2x2"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("clip_lenth=8", "unknown axis 'clip_lenth': did you mean 'clip_length'?"),
        ("clip_length", "is not name=value"),
        ("clip_length=", "is not name=value"),
        ("clip_length=0", "clip_length='0' is not a positive integer"),
        ("clip_length=-1", "not a positive integer"),
        ("clip_length=8,x", "clip_length='x' is not a positive integer"),
        ("clip_length=8.5", "not a positive integer"),
        ("width_multiplier=nan", "not a positive number"),
        ("width_multiplier=inf", "not a positive number"),
        ("kernel_size=3x0x3", "not positive integers as 3 or 3x3x3"),
        ("bias=maybe", "not true or false"),
        ("dtype=fp31", "unknown dtype 'fp31': did you mean"),
    ],
)
def test_a_bad_axis_is_one_clear_line(text: str, said: str) -> None:
    with pytest.raises(RequestError) as error:
        parse_axes([text])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_values_are_taken_once_and_in_order() -> None:
    assert parse_axes(["clip_length=16,8,16", "kernel_size=3,1x3x3", "padding=0"]) == {
        "clip_length": (16, 8),
        "kernel_size": (3, (1, 3, 3)),
        "padding": (0,),
    }


@given(
    st.one_of(
        st.tuples(st.just("clip_length"), st.integers(1, 10**6)),
        st.tuples(st.just("kernel_size"), st.tuples(*[st.integers(1, 99)] * 3)),
        st.tuples(st.just("width_multiplier"), st.integers(1, 4000).map(lambda n: n / 1000)),
        st.tuples(st.just("bias"), st.booleans()),
    )
)
def test_text_of_is_read_back(named: tuple[str, object]) -> None:
    name, value = named
    assert AXES[name].parse(text_of(value)) == value  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_has_distinct_points_of_known_axes(name: str) -> None:
    points = [point for sweep in SUITES[name].sweeps for point in sweep.points()]
    assert points
    assert len({point.key for point in points}) == len(points)
    assert {key for point in points for key in point.case} <= {*AXES, "task"}


def test_models_suite_holds_every_family() -> None:
    families = {MODELS[sweep.workload].family for sweep in SUITES["models"].sweeps}
    assert families == {spec.family for spec in MODELS.values() if "features" not in spec.inputs}


def test_plan_overrides_where_a_sweep_has_the_axis() -> None:
    planned = plan("quick", axes={"clip_length": (4,), "dtype": ("fp16",)})
    timed = [p for sweep in planned.sweeps for p in sweep.points() if p.kind != "task"]
    assert {p.case["clip_length"] for p in timed} == {4}
    assert {p.dtype for p in timed} == {"fp16"}
    tasks = [p for sweep in planned.sweeps for p in sweep.points() if p.kind == "task"]
    assert {(p.case["clip_length"], p.dtype) for p in tasks} == {(16, "fp32")}


def test_plan_refuses_an_axis_that_nothing_has() -> None:
    with pytest.raises(RequestError, match=r"suite 'conv3d' has no axis 'hidden_size': it has .*clip_length"):
        plan("conv3d", axes={"hidden_size": (8,)})


def test_another_workload_is_taken_at_the_same_sizes_as_far_as_it_has_them() -> None:
    axes = {"hidden_size": (64,), "input_features": (48,), "clip_length": (32,)}
    block, model = point_like("tcn_block", axes), point_like("tcn", axes)
    assert (block.case["in_channels"], block.case["out_channels"], block.case["clip_length"]) == (64, 64, 32)
    assert not {"hidden_size", "input_features"} & block.case.keys()
    assert (model.case["hidden_size"], model.case["clip_length"]) == (64, 32)


def test_plan_suggests_the_nearest_names() -> None:
    with pytest.raises(RequestError, match="did you mean 'quick'"):
        plan("quik")
    with pytest.raises(RequestError, match="did you mean 'c3d'"):
        plan("models", model_names=["c3"])


def test_a_video_puts_the_stages_before_the_models() -> None:
    planned = plan("models", model_names=["c3d", "two_stream"], axes={"clip_length": (8,)}, video="clip.mp4")
    kinds = [sweep.kind for sweep in planned.sweeps]
    assert kinds == sorted(kinds, key=["stage", "model"].index)
    assert [sweep.workload for sweep in planned.sweeps] == [
        "decode", "resize_normalise", "resize_normalise", "optical_flow", "c3d", "two_stream",
    ]  # fmt: skip
    assert {p.case["video"] for sweep in planned.sweeps for p in sweep.points()} == {"clip.mp4"}


def test_a_video_needs_models() -> None:
    with pytest.raises(RequestError, match="suite 'conv3d' has none"):
        plan("conv3d", video="clip.mp4")


def test_planning_imports_no_torch() -> None:
    code = "import sys, vidbench.suites; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
