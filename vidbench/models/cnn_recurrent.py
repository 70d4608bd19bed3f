"""A 2D CNN on every frame and a recurrent network over the frames.

Source: Donahue et al. (2015), "Long-term Recurrent Convolutional Networks", arXiv:1411.4389, §4, with ResNet-18 as the
frame encoder; the vanilla RNN is its baseline without gates.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from vidbench.models.backbones import encode_frames, make_backbone
from vidbench.models.sizes import FrameSize, scaled

Readout = Literal["last", "mean"]

RecurrentState = tuple[Tensor, ...]
"""(h,) of an RNN, (h, c) of an LSTM; each (1, N, hidden_size)."""


class _CnnRecurrent(nn.Module):
    """A 2D CNN per frame, one recurrent layer, a linear layer on its outputs.

    One or many frames go in, one or many predictions come out: `forward` gives one for the clip, `frame_logits` one
    for every step.

    Args:
        num_classes: Classes told apart.
        input_size: Pixels of a frame, or (H, W).
        width_multiplier: Factor on every channel count and on the hidden size.
        hidden_size: Width of the recurrent state; 256 (LRCN's on RGB) times the multiplier where not given.
        backbone: resnet18, resnet50, or `package.module:factory`.
        readout: Which steps make the clip's prediction: `last`, or the `mean` of the probabilities of all, as in LRCN.
    """

    heads: ClassVar[tuple[str, ...]] = ("fc",)
    cell: ClassVar[type[nn.RNN] | type[nn.LSTM]]
    rnn: nn.RNN | nn.LSTM

    def __init__(
        self,
        *,
        num_classes: int = 400,
        input_size: FrameSize = 224,
        width_multiplier: float = 1.0,
        hidden_size: int | None = None,
        backbone: str = "resnet18",
        readout: Readout = "last",
    ) -> None:
        super().__init__()
        if readout not in get_args(Readout):
            raise ValueError(f"readout={readout!r} is neither last nor mean")
        hidden = scaled(256, width_multiplier) if hidden_size is None else hidden_size
        self.readout = readout
        self.backbone, features = make_backbone(backbone, input_size=input_size, width_multiplier=width_multiplier)
        self.rnn = self.cell(features, hidden, batch_first=True)
        self.fc = nn.Linear(hidden, num_classes)

    def _recur(self, sequence: Tensor, state: RecurrentState | None) -> tuple[Tensor, RecurrentState]:
        """Outputs of all steps, and the state after the last."""
        if isinstance(self.rnn, nn.LSTM):
            outputs, carried = self.rnn(sequence, state)
            return outputs, carried
        outputs, hidden = self.rnn(sequence, None if state is None else state[0])
        return outputs, (hidden,)

    def frame_logits(self, rgb: Tensor, *, steps: int | None = None) -> Tensor:
        """(N, 3, T, H, W) → logits after every step (N, steps, num_classes).

        Args:
            rgb: The clip: many to many; of a single frame, one to one.
            steps: Of the recurrent layer; T where not given. Beyond the clip its input is zero, so that one frame
                makes many predictions: one to many.

        Raises:
            ValueError: Fewer steps than frames.
        """
        sequence = encode_frames(self.backbone, rgb)
        beyond = 0 if steps is None else steps - sequence.shape[1]
        if beyond < 0:
            raise ValueError(f"steps={steps} are fewer than the {sequence.shape[1]} frames of the clip")
        logits: Tensor = self.fc(self._recur(F.pad(sequence, (0, 0, 0, beyond)), None)[0])
        return logits

    def forward(self, rgb: Tensor) -> Tensor:
        """(N, 3, T, H, W) → logits (N, num_classes), for any T: many to one.

        With `readout="mean"`, the logarithm of the mean of the steps' probabilities.
        """
        if self.readout == "last":
            outputs, _ = self._recur(encode_frames(self.backbone, rgb), None)
            logits: Tensor = self.fc(outputs[:, -1])
            return logits
        steps = self.frame_logits(rgb)
        return steps.log_softmax(dim=2).logsumexp(dim=1) - math.log(steps.shape[1])

    def step(self, frame: Tensor, state: RecurrentState | None = None) -> tuple[Tensor, RecurrentState]:
        """One frame (N, 3, H, W) of a stream → logits of the last output, and the state to hand to the next step."""
        outputs, after = self._recur(self.backbone(frame).unsqueeze(1), state)
        return self.fc(outputs[:, -1]), after


class CnnRnn(_CnnRecurrent):
    """CNN + vanilla RNN (tanh): Elman (1990), "Finding structure in time", over LRCN's frame encoder."""

    cell = nn.RNN


class CnnLstm(_CnnRecurrent):
    """CNN + LSTM: arXiv:1411.4389, §3-4."""

    cell = nn.LSTM
