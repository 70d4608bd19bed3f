"""Networks that the claims compare and that nobody has published by themselves."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidbench.data.flow import optical_flow
from vidbench.models.c3d import C3D
from vidbench.models.i3d import I3D, Mixed, Unit3D, i3d_rgb
from vidbench.models.two_stream import TwoStream
from vidbench.models.video_resnet import r2plus1d_18

Stream = Literal["spatial", "temporal"]


class FeatureRecurrent(nn.Module):
    """One recurrent layer on features per frame, its last output classified.

    Args:
        cell: `nn.RNN` (tanh) or `nn.LSTM`.
        num_classes: Classes told apart.
        input_features: Features per frame.
        hidden_size: Width of the state.
        forget_bias: What is added to an LSTM's forget gate at the start; torch's initialisation has about 0.
        orthogonal: Whether an RNN begins with a recurrent matrix that keeps the length of its state.
    """

    def __init__(
        self,
        cell: type[nn.RNN] | type[nn.LSTM],
        *,
        num_classes: int,
        input_features: int,
        hidden_size: int = 64,
        forget_bias: float = 0.0,
        orthogonal: bool = False,
    ) -> None:
        super().__init__()
        self.rnn = cell(input_features, hidden_size, batch_first=True)
        self.fc = nn.Linear(hidden_size, num_classes)
        if forget_bias:
            with torch.no_grad():  # gates lie in the order input, forget, cell, output
                self.rnn.get_parameter("bias_ih_l0")[hidden_size : 2 * hidden_size] += forget_bias
        if orthogonal:
            nn.init.orthogonal_(self.rnn.get_parameter("weight_hh_l0"))

    def forward(self, features: Tensor) -> Tensor:
        """(N, T, input_features) → logits (N, num_classes)."""
        outputs, _ = self.rnn(features)
        logits: Tensor = self.fc(outputs[:, -1])
        return logits

    def step(self, frame: Tensor, state: object = None) -> tuple[Tensor, object]:
        """One frame (N, input_features) of a stream → logits of the clip so far, and the state for the next step."""
        outputs, after = self.rnn(frame.unsqueeze(1), state)
        return self.fc(outputs[:, -1]), after


def rnn(*, num_classes: int, input_features: int, hidden_size: int = 64) -> FeatureRecurrent:
    """A vanilla RNN: Elman (1990)."""
    return FeatureRecurrent(nn.RNN, num_classes=num_classes, input_features=input_features, hidden_size=hidden_size)


def rnn_orthogonal(*, num_classes: int, input_features: int, hidden_size: int = 64) -> FeatureRecurrent:
    """A vanilla RNN that begins with an orthogonal recurrent matrix, as an LSTM may begin by remembering.

    Source: Saxe, McClelland & Ganguli (2014), arXiv:1312.6120; Le, Jaitly & Hinton (2015), arXiv:1504.00941.
    """
    return FeatureRecurrent(
        nn.RNN, num_classes=num_classes, input_features=input_features, hidden_size=hidden_size, orthogonal=True
    )


def lstm(*, num_classes: int, input_features: int, hidden_size: int = 64) -> FeatureRecurrent:
    """An LSTM as torch initialises it: Hochreiter & Schmidhuber (1997)."""
    return FeatureRecurrent(nn.LSTM, num_classes=num_classes, input_features=input_features, hidden_size=hidden_size)


def lstm_forget_bias(*, num_classes: int, input_features: int, hidden_size: int = 64) -> FeatureRecurrent:
    """An LSTM that begins by remembering, with a forget bias of 5: Józefowicz et al. (2015) have 1."""
    return FeatureRecurrent(
        nn.LSTM, num_classes=num_classes, input_features=input_features, hidden_size=hidden_size, forget_bias=5.0
    )


class ClipStreams(nn.Module):
    """One of the two streams on RGB clips; the optical flow is computed from them (DIS).

    The temporal stream sees ten flow fields at a time. It is trained on ten from a random place, and tested on those
    from every fifth frame on, its scores averaged, as in the paper. Frames are doubled in size where they have fewer
    than 64 pixels, as CNN-M-2048 leaves a single position of 32.

    Args:
        stream: `spatial` or `temporal`.
        num_classes: Classes told apart.
        clip_length: T, at least 2.
        input_size: Pixels of a frame.
        width_multiplier: Factor on the channel counts.

    Source: Simonyan & Zisserman (2014), arXiv:1406.2199, §3 and 5.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        num_classes: int,
        clip_length: int,
        input_size: int,
        width_multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        if stream not in get_args(Stream):
            raise ValueError(f"stream={stream!r} is neither spatial nor temporal")
        self.scale = 2 if input_size < 64 else 1
        both = TwoStream(
            num_classes=num_classes,
            clip_length=clip_length,
            input_size=self.scale * input_size,
            width_multiplier=width_multiplier,
        )
        self.fields = both.flow_fields
        # A tenth of the features dropped: the paper's nine tenths in the temporal stream are made for 4,096.
        both.spatial.dropout.p = both.temporal.dropout.p = 0.1
        self.spatial = both.spatial if stream == "spatial" else None
        self.temporal = both.temporal if stream == "temporal" else None

    def forward(self, rgb: Tensor) -> Tensor:
        """(N, 3, T, H, W), standardised as the tasks' clips are, → logits (N, num_classes)."""
        shown = rgb
        if self.scale > 1:
            shown = F.interpolate(rgb, scale_factor=(1, self.scale, self.scale), mode="nearest")
        if self.temporal is None:
            assert self.spatial is not None  # it is one of the two
            return cast(Tensor, self.spatial(shown[:, :, rgb.shape[2] // 2]))
        starts = range(0, rgb.shape[2] - self.fields, FIELDS_APART)
        if self.training:
            first = starts[int(torch.randint(len(starts), ()))]
            shown, starts = shown[:, :, first : first + self.fields + 1], range(1)
        levels = shown.add(2).mul(63.75).round().clamp(0, 255).to("cpu", torch.uint8)
        # Of the range of 20 pixels a motion takes a twentieth or two: to the scale of standardised frames.
        flow = optical_flow(levels.permute(0, 2, 3, 4, 1)).to(rgb.device).mul(10)
        stacks = [flow[:, :, at : at + self.fields].transpose(1, 2).flatten(1, 2) for at in starts]
        return cast(Tensor, self.temporal(torch.cat(stacks)).unflatten(0, (len(starts), -1)).mean(dim=0))


FIELDS_APART = 5

spatial_stream = partial(ClipStreams, "spatial")
temporal_stream = partial(ClipStreams, "temporal")


class Averaged(nn.Module):
    """The average of two networks' scores.

    Source: Simonyan & Zisserman (2014), arXiv:1406.2199, §2.
    """

    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other = one, other

    def forward(self, clips: Tensor) -> Tensor:
        """Clips → logarithms of the averaged probabilities (N, num_classes)."""
        return torch.logaddexp(self.one(clips).log_softmax(1), self.other(clips).log_softmax(1)) - math.log(2)


r2plus1d_18_of_equal_parameters = partial(r2plus1d_18, mid_channels="per_convolution")
"""The paper's rule for the channels between two convolutions gives as many parameters as R3D-18 has."""


def c3d_long_first_kernel(*, num_classes: int, clip_length: int, input_size: int, width_multiplier: float = 1.0) -> C3D:
    """C3D whose first kernel extends over eleven frames instead of three."""
    model = C3D(
        num_classes=num_classes, clip_length=clip_length, input_size=input_size, width_multiplier=width_multiplier
    )
    model.conv1 = nn.Conv3d(3, model.conv1.out_channels, (11, 3, 3), padding=(5, 1, 1))
    nn.init.kaiming_normal_(model.conv1.weight, nonlinearity="relu")
    nn.init.zeros_(model.conv1.get_parameter("bias"))
    return model


def i3d_without_bottlenecks(*, num_classes: int = 400, width_multiplier: float = 1.0) -> I3D:
    """I3D whose 3×3×3 convolutions take a block's whole input, as the naive Inception block's do.

    Source: Szegedy et al. (2015), arXiv:1409.4842, figure 2(a).
    """
    model = i3d_rgb(num_classes=num_classes, width_multiplier=width_multiplier)
    for block in list(model.modules()):
        if isinstance(block, Mixed):
            channels = block.b0.conv3d.in_channels
            block.b1a, block.b2a = nn.Identity(), nn.Identity()
            block.b1b = Unit3D(channels, block.b1b.conv3d.out_channels, 3)
            block.b2b = Unit3D(channels, block.b2b.conv3d.out_channels, 3)
    return model
