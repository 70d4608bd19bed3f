"""A Workload: an op, a model or a stage of the video pipeline behind one face: cost, check, prepare.

The check compares with float64 of the same, already rounded, inputs, on inputs that the timed calls never see.
"""

from __future__ import annotations

import torch

from vidbench import models
from vidbench.sweep import Point
from vidbench.workload.base import CheckFailed, Unfit, Workload
from vidbench.workload.model import MODEL_IMPLEMENTATIONS, ModelWorkload
from vidbench.workload.op import OpWorkload
from vidbench.workload.stage import STAGES, StageWorkload
from vidkernels import OPS

__all__ = ["CheckFailed", "Unfit", "Workload", "implementations", "workload"]


def implementations(name: str, kind: str) -> tuple[str, ...]:
    """The implementations that a workload has, whether they can run here or not.

    Raises:
        RequestError: A user's model cannot be found.
    """
    if kind == "op":
        return tuple(OPS[name].implementations)
    if kind == "stage":
        return STAGES[name]
    models.load_factory(models.spec_of(name).factory)
    return MODEL_IMPLEMENTATIONS if kind == "model" else ("eager",)


def workload(point: Point, video: str | None = None) -> Workload:
    """The workload of a point.

    Args:
        point: What to measure.
        video: Path of the video file that clips are taken from, for points of `--input`.

    Raises:
        Unfit: The point cannot run here; the reason is its text.
    """
    if point.device == "cuda" and not torch.cuda.is_available():
        raise Unfit("no CUDA device is visible to torch")
    if point.regime == "graph" and point.device != "cuda":
        raise Unfit("graph replay needs a CUDA device")
    if point.regime == "graph" and point.mode == "stream":
        raise Unfit("graph replay of a stream would repeat one frame")
    if point.dtype == "tf32" and point.device != "cuda":
        raise Unfit("tf32 needs a CUDA device")
    if point.kind == "op":
        return OpWorkload(point)
    if point.kind == "model":
        return ModelWorkload(point, video)
    if point.kind == "stage":
        return StageWorkload(point, video)
    raise ValueError(f"a point of kind {point.kind!r} is not timed")
