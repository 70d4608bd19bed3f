"""Dense optical flow between neighbouring frames, by OpenCV (the extra `flow`)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vidbench.sweep import RequestError, unknown

BOUND = 20.0
"""Pixels of displacement that become ±1; what is beyond is clipped."""

Method = Literal["dis", "farneback"]
METHODS: tuple[Method, ...] = ("dis", "farneback")


def _cv2() -> Any:
    try:
        import cv2
    except ImportError:
        raise RequestError('optical flow needs OpenCV: pip install "vidbench[flow]"') from None
    return cv2


def optical_flow(frames: Tensor, *, method: Method = "dis") -> Tensor:
    """Flow from each frame to the next one: channel 0 to the right, channel 1 downwards.

    Displacements are clipped to ±20 pixels and divided by 20. I3D takes them so, though its own are TV-L1, which is
    in OpenCV's contributed modules alone; DIS is the fastest of OpenCV's own, Farnebäck the one most often used.

    Args:
        frames: RGB, (N, T, H, W, 3), uint8, on the CPU.
        method: `dis` (dense inverse search, preset medium) or `farneback`.

    Returns:
        (N, 2, T - 1, H, W), float32, in [-1, 1].

    Raises:
        RequestError: OpenCV is not installed, the method is not known, there are fewer than two frames, or they are
            smaller than 16 × 16.
        ValueError: `frames` has another shape or dtype.

    Source: Carreira & Zisserman (2017), arXiv:1705.07750, §3.1 (scaling); Kroeger et al. (2016), arXiv:1603.03590
        (DIS); Farnebäck (2003), SCIA.
    """
    if method not in METHODS:
        raise unknown("flow method", method, METHODS)
    if frames.dtype != torch.uint8 or frames.dim() != 5 or frames.shape[-1] != 3:
        raise ValueError(f"frames are {tuple(frames.shape)} {frames.dtype}; wanted (N, T, H, W, 3) torch.uint8")
    clips, clip_length, height, width, _ = frames.shape
    if clip_length < 2:
        raise RequestError(f"clip_length={clip_length} has no flow; wanted at least 2 frames")
    if min(height, width) < 16:
        raise RequestError(f"frames of {height}x{width} pixels are too small for flow; wanted at least 16x16")
    cv2 = _cv2()
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM) if method == "dis" else None
    out = np.empty((clips, 2, clip_length - 1, height, width), dtype=np.float32)
    for clip in range(clips):
        grey = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in frames[clip].contiguous().numpy()]
        for step in range(clip_length - 1):
            if dis is not None:
                moved = dis.calc(grey[step], grey[step + 1], None)
            else:
                # pyramid scale 0.5, 3 levels, window 15, 3 iterations, neighbourhood 5, sigma 1.2, no flags
                moved = cv2.calcOpticalFlowFarneback(grey[step], grey[step + 1], None, 0.5, 3, 15, 3, 5, 1.2, 0)
            out[clip, :, step] = np.moveaxis(moved, -1, 0)
    return torch.from_numpy(out).clamp_(-BOUND, BOUND).div_(BOUND)
