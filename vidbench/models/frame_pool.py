"""Frame-level aggregation: a 2D CNN on every frame, then an order-blind pool over time.

Source: Ng et al. (2015), "Beyond Short Snippets", arXiv:1503.08909, §3.1; the average is the segmental consensus of
Wang et al. (2016), "Temporal Segment Networks", arXiv:1608.00859, §3.1.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidbench.models.backbones import encode_frames, make_backbone
from vidbench.models.linear_svm import fit_svm
from vidbench.models.sizes import FrameSize


class FramePool(nn.Module):
    """A 2D CNN per frame, a pool of its features over time, one linear layer.

    The linear layer commutes with the average: `pool="avg"` equals the mean of per-frame logits.

    Args:
        pool: avg or max.
        normalise: Whether the pooled features are divided by their L2 norm, as a descriptor for a linear SVM is.
        num_classes: Classes told apart.
        input_size: Pixels of a frame, or (H, W).
        width_multiplier: Factor on every channel count.
        backbone: resnet18, resnet50, or `package.module:factory`.
    """

    heads: ClassVar[tuple[str, ...]] = ("fc",)

    def __init__(
        self,
        pool: str,
        *,
        normalise: bool = False,
        num_classes: int = 400,
        input_size: FrameSize = 224,
        width_multiplier: float = 1.0,
        backbone: str = "resnet18",
    ) -> None:
        super().__init__()
        if pool not in ("avg", "max"):
            raise ValueError(f"pool={pool!r} is neither avg nor max")
        self.pool, self.normalise = pool, normalise
        self.backbone, features = make_backbone(backbone, input_size=input_size, width_multiplier=width_multiplier)
        self.fc = nn.Linear(features, num_classes)

    def descriptor(self, rgb: Tensor) -> Tensor:
        """The pooled features of a clip (N, 3, T, H, W): (N, F)."""
        sequence = encode_frames(self.backbone, rgb)
        pooled = sequence.mean(dim=1) if self.pool == "avg" else torch.amax(sequence, dim=1)
        return F.normalize(pooled, dim=1) if self.normalise else pooled

    def forward(self, rgb: Tensor) -> Tensor:
        """(N, 3, T, H, W) → logits (N, num_classes), for any T."""
        logits: Tensor = self.fc(self.descriptor(rgb))
        return logits

    def fit_svm(self, descriptors: Tensor, labels: Tensor, *, c: float = 1.0) -> None:
        """Makes the linear layer a linear SVM on `descriptor`s (M, F) of clips with these labels (M,).

        Raises:
            RequestError: As `linear_svm.fit_svm`.
        """
        fit_svm(self.fc, descriptors, labels, c=c)


def frame_pool_avg(
    *, num_classes: int = 400, input_size: FrameSize = 224, width_multiplier: float = 1.0, backbone: str = "resnet18"
) -> FramePool:
    """The average over time: arXiv:1608.00859, §3.1."""
    return FramePool(
        "avg",
        num_classes=num_classes,
        input_size=input_size,
        width_multiplier=width_multiplier,
        backbone=backbone,
    )


def frame_pool_max(
    *, num_classes: int = 400, input_size: FrameSize = 224, width_multiplier: float = 1.0, backbone: str = "resnet18"
) -> FramePool:
    """The maximum over time: arXiv:1503.08909, §3.1, the best of its pools."""
    return FramePool(
        "max",
        num_classes=num_classes,
        input_size=input_size,
        width_multiplier=width_multiplier,
        backbone=backbone,
    )


def frame_pool_svm(
    *, num_classes: int = 400, input_size: FrameSize = 224, width_multiplier: float = 1.0, backbone: str = "resnet18"
) -> FramePool:
    """A linear SVM, which `fit_svm` fits, on the L2-normalised average over time: arXiv:1412.0767, §4."""
    return FramePool(
        "avg",
        normalise=True,
        num_classes=num_classes,
        input_size=input_size,
        width_multiplier=width_multiplier,
        backbone=backbone,
    )
