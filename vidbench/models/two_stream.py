"""Two streams, one on a frame and one on stacked optical flow, averaged.

Source: Simonyan & Zisserman (2014), "Two-Stream Convolutional Networks for Action Recognition", arXiv:1406.2199; each
stream is CNN-M-2048 of Chatfield et al. (2014), arXiv:1405.3531.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidbench.models.inflation import cross_modality
from vidbench.models.linear_svm import fit_svm
from vidbench.models.sizes import FrameSize, height_width, scaled

FLOW_FIELDS = 10
"""L, the flow fields that are stacked: arXiv:1406.2199, §3.1."""

Fusion = Literal["average", "svm"]


class CnnM2048(nn.Module):
    """CNN-M-2048 on (N, in_channels, H, W): figure 1 of arXiv:1406.2199.

    Args:
        in_channels: 3 for RGB, 2 L for flow.
        num_classes: Classes told apart.
        frame: (H, W).
        width_multiplier: Factor on every channel count.
        second_norm: Whether a response normalisation follows conv2; the temporal stream has none, to save memory.
        dropout: Of both fully connected layers.

    Pools are 3×3 with stride 2 (§5) and round up, as Caffe's do: 224×224 ends in 6×6.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        num_classes: int,
        frame: tuple[int, int],
        width_multiplier: float = 1.0,
        second_norm: bool = True,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        c96, c256, c512, c4096, c2048 = (scaled(c, width_multiplier) for c in (96, 256, 512, 4096, 2048))
        sizes = frame
        if min(frame) < 17:
            raise ValueError(
                f"a frame of {frame[0]}x{frame[1]} leaves nothing to the second convolution: at least 17x17"
            )

        def conv(channels_in: int, channels: int, size: int, stride: int, padding: int) -> nn.Conv2d:
            nonlocal sizes
            sizes = ((sizes[0] + 2 * padding - size) // stride + 1, (sizes[1] + 2 * padding - size) // stride + 1)
            return nn.Conv2d(channels_in, channels, size, stride, padding)

        def pool() -> nn.MaxPool2d:
            nonlocal sizes
            kernel = (min(3, sizes[0]), min(3, sizes[1]))
            sizes = (math.ceil((sizes[0] - kernel[0]) / 2) + 1, math.ceil((sizes[1] - kernel[1]) / 2) + 1)
            return nn.MaxPool2d(kernel, 2, ceil_mode=True)

        self.conv1 = conv(in_channels, c96, 7, 2, 0)
        self.norm1 = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)
        self.pool1 = pool()
        self.conv2 = conv(c96, c256, 5, 2, 1)
        self.norm2 = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0) if second_norm else nn.Identity()
        self.pool2 = pool()
        self.conv3 = conv(c256, c512, 3, 1, 1)
        self.conv4 = conv(c512, c512, 3, 1, 1)
        self.conv5 = conv(c512, c512, 3, 1, 1)
        self.pool5 = pool()
        self.full6 = nn.Linear(c512 * sizes[0] * sizes[1], c4096)
        self.full7 = nn.Linear(c4096, c2048)
        self.full8 = nn.Linear(c2048, num_classes)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) → logits (N, num_classes)."""
        x = self.pool1(self.norm1(self.relu(self.conv1(x))))
        x = self.pool2(self.norm2(self.relu(self.conv2(x))))
        x = self.relu(self.conv4(self.relu(self.conv3(x))))
        x = self.pool5(self.relu(self.conv5(x))).flatten(1)
        x = self.dropout(self.relu(self.full6(x)))
        logits: Tensor = self.full8(self.dropout(self.relu(self.full7(x))))
        return logits


def stacked_scores(*logits: Tensor) -> Tensor:
    """What a fusing SVM sees: each stream's softmax scores, L2-normalised, side by side: (N, streams · K).

    Source: arXiv:1406.2199, §5.
    """
    return torch.cat([F.normalize(stream.softmax(dim=1), dim=1) for stream in logits], dim=1)


class TwoStream(nn.Module):
    """A spatial stream on the middle frame, a temporal one on L = min(10, T-1) flow fields around it.

    Args:
        num_classes: Classes told apart.
        clip_length: T, at least 2; the temporal stream's first convolution is sized by it.
        input_size: Pixels of a frame, or (H, W).
        width_multiplier: Factor on every channel count.
        fusion: How the streams are fused (§5): `average` of the softmax scores, or a linear `svm` on them.

    What the average returns is its logarithm: its softmax is the average itself, and cross-entropy on it trains both
    streams at once (the paper trains them apart). The SVM returns its margins; `fit_svm` fits it on trained streams.

    Source: arXiv:1406.2199, §2-3 and 5.
    """

    def __init__(
        self,
        *,
        num_classes: int = 400,
        clip_length: int = 11,
        input_size: FrameSize = 224,
        width_multiplier: float = 1.0,
        fusion: Fusion = "average",
    ) -> None:
        super().__init__()
        if clip_length < 2:
            raise ValueError(f"clip_length={clip_length} has no optical flow: at least 2")
        if fusion not in get_args(Fusion):
            raise ValueError(f"fusion={fusion!r} is neither average nor svm")
        self.frame = height_width(input_size)
        self.flow_fields = min(FLOW_FIELDS, clip_length - 1)
        """L."""
        self.spatial = CnnM2048(3, num_classes=num_classes, frame=self.frame, width_multiplier=width_multiplier)
        self.temporal = CnnM2048(
            2 * self.flow_fields,
            num_classes=num_classes,
            frame=self.frame,
            width_multiplier=width_multiplier,
            second_norm=False,
            dropout=0.9,
        )
        self.svm = nn.Linear(2 * num_classes, num_classes) if fusion == "svm" else None

    @property
    def heads(self) -> tuple[str, ...]:
        """The classifiers."""
        return ("spatial.full8", "temporal.full8", *(("svm",) if self.svm is not None else ()))

    def streams(self, rgb: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        """rgb (N, 3, T, H, W) and flow (N, 2, T-1, H, W) → logits of the spatial and of the temporal stream.

        Raises:
            ValueError: Frames of another size, or fewer flow fields, than the model was built for.
        """
        if tuple(rgb.shape[3:]) != self.frame or tuple(flow.shape[3:]) != self.frame:
            raise ValueError(f"rgb {tuple(rgb.shape)} and flow {tuple(flow.shape)} are not of {self.frame} pixels")
        if flow.shape[2] < self.flow_fields:
            raise ValueError(f"flow {tuple(flow.shape)} has fewer than the {self.flow_fields} fields that are stacked")
        start = (flow.shape[2] - self.flow_fields) // 2
        fields = flow[:, :, start : start + self.flow_fields]
        # Equation 1: channels are x of the first field, y of the first field, x of the second, …
        stacked = fields.transpose(1, 2).flatten(1, 2)
        return self.spatial(rgb[:, :, rgb.shape[2] // 2]), self.temporal(stacked)

    def forward(self, rgb: Tensor, flow: Tensor) -> Tensor:
        """rgb (N, 3, T, H, W) and flow (N, 2, T-1, H, W) → logits (N, num_classes).

        Raises:
            ValueError: As `streams`.
        """
        spatial, temporal = self.streams(rgb, flow)
        if self.svm is not None:
            margins: Tensor = self.svm(stacked_scores(spatial, temporal))
            return margins
        return torch.logaddexp(spatial.log_softmax(dim=1), temporal.log_softmax(dim=1)) - math.log(2)

    def fit_svm(self, scores: Tensor, labels: Tensor, *, c: float = 1.0) -> None:
        """Fuses the streams by a linear SVM, on the `stacked_scores` (M, 2 · num_classes) of clips with labels (M,).

        Raises:
            RequestError: As `linear_svm.fit_svm`.
        """
        full8 = self.spatial.full8
        svm = nn.Linear(2 * full8.out_features, full8.out_features, device=full8.weight.device)
        fit_svm(svm, scores, labels, c=c)
        self.svm = svm

    def start_temporal_from_spatial(self) -> None:
        """Starts the temporal stream from the spatial one's weights; its first filters are those of `cross_modality`.

        The classifier stays as it was initialised.

        Source: Wang et al. (2016), arXiv:1608.00859, §3.2.
        """
        started = {name: tensor for name, tensor in self.spatial.state_dict().items() if not name.startswith("full8.")}
        started["conv1.weight"] = cross_modality(started["conv1.weight"], 2 * self.flow_fields)
        self.temporal.load_state_dict(started, strict=False)
