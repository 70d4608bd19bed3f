"""Frame-level aggregation: a 2D CNN on every frame, then an order-blind pool over time.

Source: Ng et al. (2015), "Beyond Short Snippets", arXiv:1503.08909, §3.1; the average is the segmental consensus of
Wang et al. (2016), "Temporal Segment Networks", arXiv:1608.00859, §3.1.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from vidbench.models.resnet2d import ResNet18
from vidbench.models.sizes import FrameSize


class FramePool(nn.Module):
    """ResNet-18 per frame, a pool of its features over time, one linear layer.

    The linear layer commutes with the average: `pool="avg"` equals the mean of per-frame logits.

    Args:
        pool: avg or max.
        input_size: Pixels of a frame, or (H, W).
        width_multiplier: Factor on every channel count.
    """

    heads: ClassVar[tuple[str, ...]] = ("fc",)

    def __init__(
        self, pool: str, *, num_classes: int = 400, input_size: FrameSize = 224, width_multiplier: float = 1.0
    ) -> None:
        super().__init__()
        if pool not in ("avg", "max"):
            raise ValueError(f"pool={pool!r} is neither avg nor max")
        self.pool = pool
        self.backbone = ResNet18(input_size=input_size, width_multiplier=width_multiplier)
        self.fc = nn.Linear(self.backbone.features, num_classes)

    def forward(self, rgb: Tensor) -> Tensor:
        """(N, 3, T, H, W) → logits (N, num_classes), for any T."""
        sequence = self.backbone.per_frame(rgb)
        pooled = sequence.mean(dim=1) if self.pool == "avg" else torch.amax(sequence, dim=1)
        logits: Tensor = self.fc(pooled)
        return logits


def frame_pool_avg(*, num_classes: int = 400, input_size: FrameSize = 224, width_multiplier: float = 1.0) -> FramePool:
    """The average over time: arXiv:1608.00859, §3.1."""
    return FramePool("avg", num_classes=num_classes, input_size=input_size, width_multiplier=width_multiplier)


def frame_pool_max(*, num_classes: int = 400, input_size: FrameSize = 224, width_multiplier: float = 1.0) -> FramePool:
    """The maximum over time: arXiv:1503.08909, §3.1, the best of its pools."""
    return FramePool("max", num_classes=num_classes, input_size=input_size, width_multiplier=width_multiplier)
