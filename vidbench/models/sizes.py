"""Sizes that the models share: scaled channel counts, frame sizes, and the check of a clip against them."""

from __future__ import annotations

from torch import Tensor

FrameSize = int | tuple[int, int]
"""Pixels of a square frame, or (H, W)."""


def scaled(channels: int, width_multiplier: float) -> int:
    """A published channel count times the width multiplier, at least 1."""
    return max(1, round(channels * width_multiplier))


def height_width(size: FrameSize) -> tuple[int, int]:
    """(H, W) of a frame size."""
    return (size, size) if isinstance(size, int) else size


def expect_clip(rgb: Tensor, clip_length: int, frame: tuple[int, int]) -> None:
    """Checks a clip against the sizes that fully connected layers were built for.

    Raises:
        ValueError: rgb is not (N, C, clip_length, H, W).
    """
    if rgb.dim() != 5 or tuple(rgb.shape[2:]) != (clip_length, *frame):
        wanted = "x".join(map(str, (clip_length, *frame)))
        raise ValueError(
            f"input {tuple(rgb.shape)} is not (N, C, T, H, W) with TxHxW = {wanted}, "
            "for which this model was built: create it with that clip_length and input_size"
        )
