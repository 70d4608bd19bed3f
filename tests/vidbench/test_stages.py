"""From a video file to the models: stages, and models fed with what the stages make."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from vidbench.engine import runs
from vidbench.environment import describe
from vidbench.measure import measure
from vidbench.models import input_shapes
from vidbench.records import Environment, Measurement
from vidbench.sweep import Point, RequestError
from vidbench.timing import Budget
from vidbench.workload.stage import model_inputs

QUICK = Budget(seconds=0.02)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise that moves two pixels to the right in every frame."""
    path = tmp_path_factory.mktemp("video") / "moving.avi"
    noise = np.random.default_rng(0).integers(0, 255, (48, 128, 3), np.uint8).repeat(2, 0).repeat(2, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(25), options={"qscale": "1"})
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for index in range(16):
            picture = np.ascontiguousarray(noise[:, 64 - 2 * index : 192 - 2 * index])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def environment() -> Environment:
    return describe("cpu", ["fp32"])


def stage(name: str, implementation: str, clip: Path | None, environment: Environment) -> Measurement:
    case = {"batch_size": 2, "clip_length": 4, "height": 32, "width": 32, "video": "moving.avi"}
    point = Point(name, "stage", implementation, case=case)
    return measure(point, environment, budget=QUICK, video=str(clip) if clip else None)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [("decode", "pyav"), ("resize_normalise", "torch"), ("optical_flow", "opencv_dis"),
     ("optical_flow", "opencv_farneback")],
)  # fmt: skip
def test_every_stage_is_timed(name: str, implementation: str, clip: Path, environment: Environment) -> None:
    row = stage(name, implementation, clip, environment)
    assert (row.status, row.reason) == ("ok", "")
    assert row.median_s is not None
    assert row.counts is None
    assert row.memory is None, "what PyAV and OpenCV allocate is not torch's"
    assert (row.error is not None) == (name == "resize_normalise")


def test_a_stage_without_a_video_is_skipped(environment: Environment) -> None:
    row = stage("decode", "pyav", None, environment)
    assert (row.status, row.reason) == ("skipped", "a stage of the video pipeline needs --input VIDEO")


def test_flow_that_opencv_cannot_compute_is_skipped_with_why(clip: Path, environment: Environment) -> None:
    case = {"batch_size": 1, "clip_length": 4, "height": 8, "width": 8}
    row = measure(Point("optical_flow", "stage", "opencv_dis", case=case), environment, video=str(clip))
    assert row.status == "skipped"
    assert "16" in row.reason


def test_models_are_fed_with_what_the_file_shows(clip: Path) -> None:
    shapes = input_shapes("two_stream", batch_size=2, clip_length=6, height=96, width=96)
    rgb, flow = model_inputs(str(clip), shapes)
    assert (tuple(rgb.shape), tuple(flow.shape)) == (shapes["rgb"], shapes["flow"])
    moved = flow[:, :, :, 24:72, 24:72].median(-1).values.median(-1).values * 20
    torch.testing.assert_close(moved[:, 0], torch.full_like(moved[:, 0], 2.0), atol=0.3, rtol=0)
    torch.testing.assert_close(moved[:, 1], torch.zeros_like(moved[:, 1]), atol=0.3, rtol=0)


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_a_model_on_clips_of_a_file(clip: Path, environment: Environment, memory_format: str) -> None:
    case = {"clip_length": 8, "batch_size": 2, "height": 32, "width": 32, "width_multiplier": 0.125}
    point = Point("cnn_lstm", "model", "eager", memory_format=memory_format, case={**case, "video": clip.name})
    row = measure(point, environment, budget=QUICK, video=str(clip))
    assert (row.status, row.reason) == ("ok", "")


def test_a_sweep_over_a_file_has_a_row_per_stage_and_model(clip: Path, tmp_path: Path) -> None:
    axes = {"clip_length": (4,), "input_size": (32,), "width_multiplier": (0.125,)}
    (done,) = runs("models", models=["c3d"], axes=axes, video=clip, out=tmp_path / "run", seconds=0.02)
    assert [(m.point.workload, m.status) for m in done.measurements] == [
        ("decode", "ok"), ("resize_normalise", "ok"), ("c3d", "ok"),
    ]  # fmt: skip
    assert done.input is not None
    assert done.input.startswith("moving.avi sha256:")
    other = tmp_path / clip.name
    other.write_bytes(clip.read_bytes() + b"\0")
    with pytest.raises(RequestError, match="input was 'moving"):
        runs("models", models=["c3d"], axes=axes, video=other, out=tmp_path / "run", resume=True)
