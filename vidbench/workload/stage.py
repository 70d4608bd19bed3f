"""The video pipeline before the model, stage by stage: decode, resize and normalise, optical flow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidbench.data import flow, video
from vidbench.records import Cost, Error
from vidbench.sweep import Point
from vidbench.workload.base import CheckFailed, Unfit, Workload
from vidkernels.checking import relative_error

STAGES: dict[str, tuple[str, ...]] = {
    "decode": ("pyav",),
    "resize_normalise": ("torch",),
    "optical_flow": ("opencv_dis", "opencv_farneback"),
}
"""The implementations of each stage."""


class StageWorkload(Workload):
    """One stage on clips of a video file; a call takes the whole batch through it."""

    def __init__(self, point: Point, path: str | None) -> None:
        super().__init__(point)
        if path is None:
            raise Unfit("a stage of the video pipeline needs --input VIDEO")
        if point.device != "cpu":
            raise Unfit("decoding, resizing and optical flow run on the CPU")
        self.path = path
        self.batch_size, self.clip_length = int(point.case["batch_size"]), int(point.case["clip_length"])  # type: ignore[arg-type]
        self.height = int(point.case.get("height", 0))  # type: ignore[arg-type]
        self.width = int(point.case.get("width", 0))  # type: ignore[arg-type]

    def cost(self) -> Cost:
        return Cost()

    def prepare(self) -> Callable[[], Any]:
        if self.point.workload == "decode":
            # Past the cache of `_clips`: what is timed is opening the file and decoding up to the last frame needed.
            return lambda: video.read_clips(self.path, batch_size=self.batch_size, clip_length=self.clip_length)
        clips = _clips(self.path, self.batch_size, self.clip_length)
        if self.point.workload == "resize_normalise":
            return lambda: video.resize_normalise(clips, height=self.height, width=self.width)
        frames = _resized(clips, self.height, self.width)
        method: Any = self.point.implementation.removeprefix("opencv_")
        return lambda: flow.optical_flow(frames, method=method)

    def check(self) -> Error | None:
        """Resizing against the same arithmetic in float64; a decoder and a flow have no such reference."""
        if self.point.workload != "resize_normalise":
            return None
        clips = _clips(self.path, 1, min(self.clip_length, 2))
        got = video.resize_normalise(clips, height=self.height, width=self.width)
        want = _resize_normalise_exactly(clips, self.height, self.width)
        # Both round the resized frame to whole levels, one of them in fixed point: pixels may be off by one level.
        level = 1 / 255 / min(video.KINETICS_STD)
        gate = level / want.square().mean().sqrt().item()
        error = Error(output=relative_error(got, want), gate=gate)
        if not error.output <= error.gate:
            raise CheckFailed(f"output error {error.output:.2e} exceeds {error.gate:.1e}", error)
        return error


def model_inputs(path: str, shapes: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
    """What a model is fed with, from clips spread over a video: rgb normalised, flow between resized frames."""
    batch_size, _, clip_length, height, width = shapes.get("rgb") or _with_first_frame(shapes["flow"])
    clips = _clips(path, batch_size, clip_length)
    made = {"rgb": lambda: video.resize_normalise(clips, height=height, width=width)}
    made["flow"] = lambda: flow.optical_flow(_resized(clips, height, width))
    return [made[name]() for name in shapes]


def _with_first_frame(flow_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The clip behind T - 1 flow fields."""
    n, c, fields, height, width = flow_shape
    return n, c, fields + 1, height, width


@lru_cache(maxsize=2)
def _clips(path: str, batch_size: int, clip_length: int) -> Tensor:
    return video.read_clips(path, batch_size=batch_size, clip_length=clip_length)


def _resized(clips: Tensor, height: int, width: int) -> Tensor:
    """Frames at the model's size, (N, T, height, width, 3), uint8."""
    levels = video.resize_normalise(clips, height=height, width=width, mean=(0, 0, 0), std=(1, 1, 1)) * 255
    return levels.round().to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()


def _resize_normalise_exactly(clips: Tensor, height: int, width: int) -> Tensor:
    """`video.resize_normalise` in float64, straight from its definition."""
    n, t, h, w, _ = clips.shape
    scale = max(height / h, width / w)
    size = (max(height, round(h * scale)), max(width, round(w * scale)))
    frames = clips.permute(0, 1, 4, 2, 3).reshape(n * t, 3, h, w).double()
    resized = F.interpolate(frames, size=size, mode="bilinear", antialias=True, align_corners=False).round() / 255
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    cropped = resized[:, :, top : top + height, left : left + width].reshape(n, t, 3, height, width)
    mean, std = (torch.tensor(values).double() for values in (video.KINETICS_MEAN, video.KINETICS_STD))
    return ((cropped.permute(0, 1, 3, 4, 2) - mean) / std).permute(0, 4, 1, 2, 3)
