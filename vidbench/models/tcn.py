"""Temporal convolutional networks, after Bai, Kolter & Koltun (2018), arXiv:1803.01271."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from vidbench.models.backbones import encode_frames, make_backbone
from vidbench.models.sizes import FrameSize, scaled
from vidkernels.shapes import tcn_receptive_field


class TcnState(NamedTuple):
    """What a TCN carries from frame to frame."""

    frames: int
    """Frames seen."""
    rings: tuple[Tensor, ...]
    """The past inputs of every convolution, (N, C, (K-1)·dilation) each; frame t lies at t modulo the length.
    They are written in place: a state serves one step, and a branch of the stream needs a copy."""


class CausalConv1d(nn.Conv1d):
    """A dilated convolution whose output at t depends on inputs ≤ t: arXiv:1803.01271, §3.2-3.3."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, dilation: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, dilation=dilation)
        self.reach = (kernel_size - 1) * dilation
        """Frames back that the oldest tap meets."""

    def forward(self, x: Tensor, ring: Tensor | None = None, t: int = 0) -> Tensor:
        """(N, C, T) → (N, out_channels, T).

        With a ring: frame t of a stream, (N, C) → (N, out_channels); the frame is written into the ring of its past.
        """
        if ring is None:
            return super().forward(F.pad(x, (self.reach, 0)))
        past = [ring[:, :, (t - back) % self.reach] for back in range(self.reach, 0, -self.dilation[0])]
        window = torch.stack((*past, x), dim=2)
        if self.reach:
            ring[:, :, t % self.reach] = x
        return F.conv1d(window, self.weight, self.bias).squeeze(2)

    def ring(self, x: Tensor) -> Tensor:
        """The past before the first frame: zeros, as the padding of a whole clip."""
        return x.new_zeros(x.shape[0], self.in_channels, self.reach)


class TemporalBlock(nn.Module):
    """Two weight-normalised causal convolutions, each with ReLU and dropout, beside a residual: figure 1(b).

    Args:
        in_channels: C of the input; where it is not `out_channels`, a 1×1 convolution fits the residual.
        out_channels: C of the output.
        kernel_size: Taps.
        dilation: Distance between taps, in frames.
        dropout: Probability that a feature is dropped in training.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = weight_norm(CausalConv1d(in_channels, out_channels, kernel_size, dilation))
        self.conv2 = weight_norm(CausalConv1d(out_channels, out_channels, kernel_size, dilation))
        self.relu = nn.ReLU()
        self.dropout1, self.dropout2 = nn.Dropout(dropout), nn.Dropout(dropout)
        self.downsample: nn.Conv1d | None = None
        if in_channels != out_channels:
            self.downsample = nn.Conv1d(in_channels, out_channels, 1)
            # The authors' N(0, 0.01) of conv1 and conv2 is undone by weight norm; this one alone takes effect.
            nn.init.normal_(self.downsample.weight, 0, 0.01)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T) → (N, out_channels, T)."""
        y = self.dropout1(self.relu(self.conv1(x)))
        y = self.dropout2(self.relu(self.conv2(y)))
        residual = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(y + residual)
        return out

    def step(self, x: Tensor, rings: Sequence[Tensor], t: int) -> Tensor:
        """Frame t, (N, C) → (N, out_channels); `rings` are those of the two convolutions."""
        y = self.dropout1(self.relu(self.conv1(x, rings[0], t)))
        y = self.dropout2(self.relu(self.conv2(y, rings[1], t)))
        residual = x if self.downsample is None else self.downsample(x.unsqueeze(2)).squeeze(2)
        out: Tensor = self.relu(y + residual)
        return out


class TemporalConvNet(nn.Module):
    """Blocks with dilation 1, 2, 4, … on (N, C, T); output t depends on inputs ≤ t alone.

    Args:
        in_channels: C of the input.
        channels: Channels of each block; as many blocks.
        kernel_size: Taps.
        dropout: Probability that a feature is dropped in training. Single features are dropped, as in the authors'
            code; the paper's text speaks of spatial dropout.

    Module names are those of the authors' code, whose files load; their classifier is passed over.

    Source: Bai, Kolter & Koltun (2018), arXiv:1803.01271, §3.
    """

    unused: ClassVar[tuple[str, ...]] = ("linear",)

    def __init__(self, in_channels: int, channels: Sequence[int], kernel_size: int = 2, dropout: float = 0.2) -> None:
        super().__init__()
        if not channels:
            raise ValueError("channels is empty: a TemporalConvNet has one block per entry")
        widths = (in_channels, *channels)
        self.network = nn.Sequential(
            *(TemporalBlock(widths[i], widths[i + 1], kernel_size, 2**i, dropout) for i in range(len(channels)))
        )
        self.receptive_field = tcn_receptive_field(kernel_size, (2**i for i in range(len(channels))))
        """Frames that the last output depends on."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, T) → (N, channels[-1], T), for any T."""
        out: Tensor = self.network(x)
        return out

    def step(self, x: Tensor, state: TcnState | None = None) -> tuple[Tensor, TcnState]:
        """One frame (N, in_channels) of a stream → (N, channels[-1]), and the state to hand to the next step."""
        blocks = [block for block in self.network if isinstance(block, TemporalBlock)]
        if state is None:
            convolutions = [conv for block in blocks for conv in (block.conv1, block.conv2)]
            state = TcnState(0, tuple(conv.ring(x) for conv in convolutions))
        for i, block in enumerate(blocks):
            x = block.step(x, state.rings[2 * i : 2 * i + 2], state.frames)
        return x, TcnState(state.frames + 1, state.rings)


def levels_covering(clip_length: int, kernel_size: int) -> int:
    """The fewest blocks whose receptive field covers a clip: arXiv:1803.01271, §3.3."""
    if kernel_size < 2 and clip_length > 1:
        raise ValueError(f"kernel_size={kernel_size} sees no frame but the present one: at least 2")
    levels = 1
    while tcn_receptive_field(kernel_size, (2**i for i in range(levels))) < clip_length:
        levels += 1
    return levels


class Tcn(nn.Module):
    """A TCN on features per frame, the last time step classified.

    Args:
        num_classes: Classes told apart.
        clip_length: Frames that the receptive field must cover; longer sequences run, but are not seen whole.
        width_multiplier: Factor on the hidden size.
        hidden_size: Channels of every block; 256 times the multiplier where not given.
        input_features: Features per frame.
        kernel_size: Taps.
        levels: Blocks; the fewest whose receptive field covers the clip where not given.
        dropout: Probability that a feature is dropped in training.

    Source: arXiv:1803.01271, §3.
    """

    heads: ClassVar[tuple[str, ...]] = ("fc",)

    def __init__(
        self,
        *,
        num_classes: int = 400,
        clip_length: int = 64,
        width_multiplier: float = 1.0,
        hidden_size: int | None = None,
        input_features: int = 256,
        kernel_size: int = 3,
        levels: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = scaled(256, width_multiplier) if hidden_size is None else hidden_size
        levels = levels_covering(clip_length, kernel_size) if levels is None else levels
        self.tcn = TemporalConvNet(input_features, [hidden] * levels, kernel_size, dropout)
        self.fc = nn.Linear(hidden, num_classes)

    def frame_logits(self, features: Tensor) -> Tensor:
        """(N, T, input_features) → logits of every frame (N, T, num_classes), from it and the frames before it."""
        logits: Tensor = self.fc(self.tcn(features.transpose(1, 2)).transpose(1, 2))
        return logits

    def forward(self, features: Tensor) -> Tensor:
        """(N, T, input_features) → logits (N, num_classes) from the last time step."""
        logits: Tensor = self.fc(self.tcn(features.transpose(1, 2))[:, :, -1])
        return logits

    def step(self, frame: Tensor, state: TcnState | None = None) -> tuple[Tensor, TcnState]:
        """One frame's features (N, input_features) → logits of the clip so far, and the state for the next step."""
        y, state = self.tcn.step(frame, state)
        return self.fc(y), state


class CnnTcn(nn.Module):
    """A 2D CNN per frame and a TCN over the frames, the last time step classified.

    Args:
        num_classes: Classes told apart.
        clip_length: Frames that the receptive field must cover.
        input_size: Pixels of a frame, or (H, W).
        width_multiplier: Factor on every channel count.
        hidden_size: Channels of every block; 256 times the multiplier where not given.
        dropout: Probability that a feature is dropped in training.
        backbone: resnet18, resnet50, or `package.module:factory`.

    Source: arXiv:1803.01271, §3, over the frame encoder of He et al. (2016), arXiv:1512.03385.
    """

    heads: ClassVar[tuple[str, ...]] = ("temporal.fc",)

    def __init__(
        self,
        *,
        num_classes: int = 400,
        clip_length: int = 16,
        input_size: FrameSize = 224,
        width_multiplier: float = 1.0,
        hidden_size: int | None = None,
        dropout: float = 0.0,
        backbone: str = "resnet18",
    ) -> None:
        super().__init__()
        self.backbone, features = make_backbone(backbone, input_size=input_size, width_multiplier=width_multiplier)
        self.temporal = Tcn(
            num_classes=num_classes,
            clip_length=clip_length,
            width_multiplier=width_multiplier,
            hidden_size=hidden_size,
            input_features=features,
            dropout=dropout,
        )

    def forward(self, rgb: Tensor) -> Tensor:
        """(N, 3, T, H, W) → logits (N, num_classes) from the last time step."""
        logits: Tensor = self.temporal(encode_frames(self.backbone, rgb))
        return logits

    def step(self, frame: Tensor, state: TcnState | None = None) -> tuple[Tensor, TcnState]:
        """One frame (N, 3, H, W) of a stream → logits of the clip so far, and the state to hand to the next step."""
        return self.temporal.step(self.backbone(frame), state)
