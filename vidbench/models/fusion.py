"""Time fused into an AlexNet: one frame, early, late and slow fusion.

Source: Karpathy et al. (2014), "Large-scale Video Classification with Convolutional Neural Networks", CVPR, §3.1-3.2.
The paper leaves the padding open; here the first convolution has none and the others keep their size.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from vidbench.models.sizes import FrameSize, expect_clip, height_width, scaled


def _normalisation() -> nn.LocalResponseNorm:
    """k = 2, n = 5, α = 1e-4, β = 0.5 (§3); α multiplies the sum there and the mean here."""
    return nn.LocalResponseNorm(5, alpha=5e-4, beta=0.5, k=2.0)


class _Trunk(nn.Sequential):
    """C(96,11,3)-N-P-C(256,5,1)-N-P-C(384,3,1)-C(384,3,1)-C(256,3,1)-P over (N, 3, T, H, W), flattened.

    Args:
        frames: T.
        frame: (H, W).
        width_multiplier: Factor on every channel count.
        extents: Temporal extent of the first three convolutions; an axis that is shorter shortens them.
        temporal_stride: Their stride in time.
    """

    def __init__(
        self,
        frames: int,
        frame: tuple[int, int],
        width_multiplier: float,
        extents: tuple[int, int, int] = (1, 1, 1),
        temporal_stride: int = 1,
    ) -> None:
        super().__init__()
        c96, c256, c384 = (scaled(c, width_multiplier) for c in (96, 256, 384))
        if min(frame) < 11:
            raise ValueError(f"a frame of {frame[0]}x{frame[1]} is smaller than the first filter, 11x11")
        t, (h, w) = frames, frame

        def conv(name: str, channels: tuple[int, int], size: int, stride: int, padding: int, extent: int) -> None:
            nonlocal t, h, w
            extent = min(extent, t)
            kernel, strides = (extent, size, size), (temporal_stride if extent > 1 else 1, stride, stride)
            self.add_module(name, nn.Conv3d(*channels, kernel, strides, (0, padding, padding)))
            self.add_module(f"{name}_relu", nn.ReLU(inplace=True))
            t, h, w = (
                (s + 2 * p - k) // step + 1
                for s, p, k, step in zip((t, h, w), (0, padding, padding), kernel, strides, strict=True)
            )

        def pool(name: str) -> None:
            nonlocal h, w
            kernel = (1, min(2, h), min(2, w))
            self.add_module(name, nn.MaxPool3d(kernel))
            h, w = h // kernel[1], w // kernel[2]

        conv("conv1", (3, c96), 11, 3, 0, extents[0])
        self.norm1 = _normalisation()
        pool("pool1")
        conv("conv2", (c96, c256), 5, 1, 2, extents[1])
        self.norm2 = _normalisation()
        pool("pool2")
        conv("conv3", (c256, c384), 3, 1, 1, extents[2])
        conv("conv4", (c384, c384), 3, 1, 1, 1)
        conv("conv5", (c384, c256), 3, 1, 1, 1)
        pool("pool5")
        self.flatten = nn.Flatten()
        self.out_features = c256 * t * h * w
        """Features per clip."""


class _Fusion(nn.Module):
    """A trunk and FC(4096)-FC(4096)-FC(num_classes)."""

    heads: ClassVar[tuple[str, ...]] = ("fc8",)

    def __init__(self, trunk: _Trunk, views: int, num_classes: int, width_multiplier: float) -> None:
        super().__init__()
        c4096 = scaled(4096, width_multiplier)
        self.trunk = trunk
        self.fc6 = nn.Linear(views * trunk.out_features, c4096)
        self.fc7 = nn.Linear(c4096, c4096)
        self.fc8 = nn.Linear(c4096, num_classes)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.5)

    def _classify(self, features: Tensor) -> Tensor:
        x = self.dropout(self.relu(self.fc6(features)))
        logits: Tensor = self.fc8(self.dropout(self.relu(self.fc7(x))))
        return logits


class SingleFrame(_Fusion):
    """The middle frame of the clip alone: what motion is compared with.

    Args:
        num_classes: Classes told apart.
        input_size: Pixels of a frame, or (H, W).
        width_multiplier: Factor on every channel count.

    Source: Karpathy et al. (2014), §3.1, Single-frame.
    """

    def __init__(self, *, num_classes: int = 400, input_size: FrameSize = 170, width_multiplier: float = 1.0) -> None:
        self.frame = height_width(input_size)
        super().__init__(_Trunk(1, self.frame, width_multiplier), 1, num_classes, width_multiplier)

    def forward(self, rgb: Tensor) -> Tensor:
        """(N, 3, T, H, W) → logits (N, num_classes), for any T."""
        middle = rgb.shape[2] // 2
        frame = rgb[:, :, middle : middle + 1]
        expect_clip(frame, 1, self.frame)
        return self._classify(self.trunk(frame))


class EarlyFusion(_Fusion):
    """The first convolution extends over the whole clip: 11×11×T.

    Args:
        num_classes: Classes told apart.
        clip_length: T.
        input_size: Pixels of a frame, or (H, W).
        width_multiplier: Factor on every channel count.

    Source: Karpathy et al. (2014), §3.1, Early Fusion.
    """

    def __init__(
        self,
        *,
        num_classes: int = 400,
        clip_length: int = 10,
        input_size: FrameSize = 170,
        width_multiplier: float = 1.0,
    ) -> None:
        self.clip_length, self.frame = clip_length, height_width(input_size)
        trunk = _Trunk(clip_length, self.frame, width_multiplier, (clip_length, 1, 1))
        super().__init__(trunk, 1, num_classes, width_multiplier)

    def forward(self, rgb: Tensor) -> Tensor:
        """(N, 3, T, H, W) → logits (N, num_classes)."""
        expect_clip(rgb, self.clip_length, self.frame)
        return self._classify(self.trunk(rgb))


class LateFusion(_Fusion):
    """Two towers with shared weights see the first and the last frame and meet in the first fully connected layer.

    Args:
        num_classes: Classes told apart.
        input_size: Pixels of a frame, or (H, W).
        width_multiplier: Factor on every channel count.

    Source: Karpathy et al. (2014), §3.1, Late Fusion: the two frames lie 15 apart, as those of a clip of 16.
    """

    def __init__(self, *, num_classes: int = 400, input_size: FrameSize = 170, width_multiplier: float = 1.0) -> None:
        self.frame = height_width(input_size)
        super().__init__(_Trunk(1, self.frame, width_multiplier), 2, num_classes, width_multiplier)

    def forward(self, rgb: Tensor) -> Tensor:
        """(N, 3, T, H, W) → logits (N, num_classes), for any T."""
        pair = torch.cat((rgb[:, :, :1], rgb[:, :, -1:]))
        expect_clip(pair, 1, self.frame)
        first, last = self.trunk(pair).chunk(2)
        return self._classify(torch.cat((first, last), dim=1))


class SlowFusion(_Fusion):
    """Time is fused over three convolutions, with extents 4, 2, 2 and stride 2: 10 frames become 4, 2, 1.

    Args:
        num_classes: Classes told apart.
        clip_length: T; where fewer frames are left than a convolution extends over, it extends over those.
        input_size: Pixels of a frame, or (H, W).
        width_multiplier: Factor on every channel count.

    Source: Karpathy et al. (2014), §3.1, Slow Fusion.
    """

    def __init__(
        self,
        *,
        num_classes: int = 400,
        clip_length: int = 10,
        input_size: FrameSize = 170,
        width_multiplier: float = 1.0,
    ) -> None:
        self.clip_length, self.frame = clip_length, height_width(input_size)
        trunk = _Trunk(clip_length, self.frame, width_multiplier, (4, 2, 2), temporal_stride=2)
        super().__init__(trunk, 1, num_classes, width_multiplier)

    def forward(self, rgb: Tensor) -> Tensor:
        """(N, 3, T, H, W) → logits (N, num_classes)."""
        expect_clip(rgb, self.clip_length, self.frame)
        return self._classify(self.trunk(rgb))
