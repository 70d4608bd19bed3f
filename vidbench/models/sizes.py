"""Sizes and layouts that the models share: scaled channel counts, frame sizes, where the channels of filters lie."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Memory formats by number of axes."""

FrameSize = int | tuple[int, int]
"""Pixels of a square frame, or (H, W)."""


def scaled(channels: int, width_multiplier: float) -> int:
    """A published channel count times the width multiplier, at least 1."""
    return max(1, round(channels * width_multiplier))


def height_width(size: FrameSize) -> tuple[int, int]:
    """(H, W) of a frame size."""
    return (size, size) if isinstance(size, int) else size


def channels_last_filters(model: nn.Module) -> None:
    """Puts the channels of all filters innermost; convolutions then choose that layout for their outputs too."""
    for parameter in model.parameters():
        if parameter.dim() in CHANNELS_LAST:
            parameter.data = parameter.data.contiguous(memory_format=CHANNELS_LAST[parameter.dim()])


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
