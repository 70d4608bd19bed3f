"""vidkernels: kernels for video classification, each as a readable reference, the library's own, and custom ones.

Every function here takes `implementation=`: `library` is torch's own, `reference` the definition, `compiled`
torch.compile, `auto` the fastest known for the call on its device (`explain` tells which, and why);
`OPS[name].implementations` lists them all. One that cannot run a call raises `Unavailable`, with the
reason and those that can; nothing is put in its place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidkernels import choosing
from vidkernels.causal_conv1d import OP as _CAUSAL_CONV1D
from vidkernels.choosing import Choice
from vidkernels.conv2plus1d import OP as _CONV2PLUS1D
from vidkernels.conv2plus1d import BatchNorm
from vidkernels.conv3d import OP as _CONV3D
from vidkernels.depthwise_conv3d import OP as _DEPTHWISE_CONV3D
from vidkernels.launch import Gpu
from vidkernels.op import Case, Implementation, Inputs, Op, Tolerance, Unavailable
from vidkernels.recurrent import LSTM as _LSTM
from vidkernels.recurrent import RNN as _RNN
from vidkernels.shapes import Triple
from vidkernels.tcn_block import OP as _TCN_BLOCK
from vidkernels.tcn_block import WeightNorm

OPS: dict[str, Op] = {
    op.name: op for op in (_CONV3D, _DEPTHWISE_CONV3D, _CONV2PLUS1D, _CAUSAL_CONV1D, _TCN_BLOCK, _RNN, _LSTM)
}
"""Every op by name."""

__all__ = [
    "OPS",
    "BatchNorm",
    "Case",
    "Choice",
    "Implementation",
    "Inputs",
    "Op",
    "Tolerance",
    "Unavailable",
    "WeightNorm",
    "accelerate",
    "causal_conv1d",
    "conv2plus1d",
    "conv3d",
    "depthwise_conv3d",
    "explain",
    "lstm",
    "rnn",
    "tcn_block",
]

# The folders of the same names were imported above: from here on, `vidkernels.conv3d` is the function, while
# `from vidkernels.conv3d.case import …` still finds the folder.


def _call(op: Op, *args: Any, implementation: str, **kwargs: Any) -> Any:
    if implementation == "auto":
        return choosing.run(op, args, kwargs)
    return op(*args, implementation=implementation, **kwargs)


def explain(
    op: str, *args: Any, device: torch.device | str | None = None, gpu: Gpu | None = None, **kwargs: Any
) -> Choice:
    """What `implementation="auto"` takes for a call, what it rests on, and what the others would take; print it.

    Args:
        op: Name of the op.
        args: Arguments of the call; tensors of the meta device do, for none is read.
        device: Where the call would run; None: where its tensors lie. `meta` stands for a GPU that is not there.
        gpu: Which GPU that is: one of `vidkernels.launch.TARGETS`, or None for the device's own.
        kwargs: Parameters of the call.

    Raises:
        ValueError: An unknown op, or shapes that do not fit together.
    """
    if op not in OPS:
        raise ValueError(f"no op {op!r}: known: {', '.join(OPS)}")
    case = OPS[op].case_of_call(args, kwargs)
    return choosing.explain(OPS[op], case, args[0].device if device is None else device, gpu=gpu)


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Triple = 1,
    padding: int | Triple = 0,
    dilation: int | Triple = 1,
    residual: Tensor | None = None,
    activation: str = "none",
    implementation: str = "library",
) -> Tensor:
    """Dense 3D convolution.

    Args:
        x: Features, (N, C_in, T, H, W).
        weight: Filters, (C_out, C_in, kT, kH, kW).
        bias: (C_out,), or None.
        stride: Between outputs, for all of (T, H, W) or each.
        padding: Zeros at either end, likewise.
        dilation: Distance between taps, likewise.
        residual: Added to the result before the activation, (N, C_out, T', H', W'), or None.
        activation: Applied last: `none`, `relu` or `silu`.
        implementation: A name in `OPS["conv3d"].implementations`.

    Returns:
        (N, C_out, T', H', W'), dtype of x; T' = ⌊(T + 2·padding − dilation·(kT−1) − 1) / stride⌋ + 1, H', W' likewise.

    Raises:
        ValueError: Shapes that do not fit together, or an unknown implementation.
        Unavailable: The implementation cannot run this call here.

    Source: Tran et al. (2015), arXiv:1412.0767, §3.1.
    """
    y: Tensor = _call(
        _CONV3D,
        x,
        weight,
        bias,
        residual,
        stride=stride,
        padding=padding,
        dilation=dilation,
        activation=activation,
        implementation=implementation,
    )
    return y


def depthwise_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Triple = 1,
    padding: int | Triple = 0,
    dilation: int | Triple = 1,
    activation: str = "none",
    implementation: str = "library",
) -> Tensor:
    """Depthwise 3D convolution: every channel has one filter of its own.

    Args:
        x: Features, (N, C, T, H, W).
        weight: Filters, (C, 1, kT, kH, kW).
        bias: (C,), or None.
        stride: Between outputs, for all of (T, H, W) or each.
        padding: Zeros at either end, likewise.
        dilation: Distance between taps, likewise.
        activation: Applied last: `none`, `relu` or `silu`.
        implementation: A name in `OPS["depthwise_conv3d"].implementations`.

    Returns:
        (N, C, T', H', W'), dtype of x; sizes as of `conv3d`.

    Raises:
        ValueError: Shapes that do not fit together, or an unknown implementation.
        Unavailable: The implementation cannot run this call here.

    Source: Feichtenhofer (2020), arXiv:2004.04730, §3.1; Tran et al. (2019), arXiv:1904.02811, §3.
    """
    y: Tensor = _call(
        _DEPTHWISE_CONV3D,
        x,
        weight,
        bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        activation=activation,
        implementation=implementation,
    )
    return y


def conv2plus1d(
    x: Tensor,
    w_spatial: Tensor,
    bn: BatchNorm,
    w_temporal: Tensor,
    *,
    stride: int | Triple = 1,
    padding: int | Triple = 0,
    training: bool = False,
    implementation: str = "library",
) -> Tensor:
    """(2+1)D convolution: 1×k×k convolution, batch norm, ReLU, k×1×1 convolution.

    Args:
        x: Features, (N, C_in, T, H, W).
        w_spatial: (M, C_in, 1, kH, kW).
        bn: Batch norm of the M channels. In training its running statistics, where given, are updated in place.
        w_temporal: (C_out, M, kT, 1, 1).
        stride: Between outputs, for all of (T, H, W) or each: H and W in the first convolution, T in the second.
        padding: Zeros at either end, likewise.
        training: Normalise by the batch's statistics, not the running ones.
        implementation: A name in `OPS["conv2plus1d"].implementations`.

    Returns:
        (N, C_out, T', H', W'), dtype of x; sizes as of `conv3d` with a (kT, kH, kW) filter.

    Raises:
        ValueError: Shapes that do not fit together, no running statistics to evaluate with, one value a channel to
            train with, or an unknown implementation.
        Unavailable: The implementation cannot run this call here.

    Source: Tran et al. (2018), arXiv:1711.11248, §3.5.
    """
    y: Tensor = _call(
        _CONV2PLUS1D,
        x,
        w_spatial,
        bn,
        w_temporal,
        stride=stride,
        padding=padding,
        training=training,
        implementation=implementation,
    )
    return y


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: int = 1,
    implementation: str = "library",
) -> Tensor:
    """Causal dilated 1-D convolution: y[t] depends on x[≤ t] alone.

    Args:
        x: Features, (N, C_in, T).
        weight: Filters, (C_out, C_in, K); tap K-1 meets the present frame.
        bias: (C_out,), or None.
        dilation: Distance between taps, in frames.
        implementation: A name in `OPS["causal_conv1d"].implementations`.

    Returns:
        (N, C_out, T), dtype of x.

    Raises:
        ValueError: Shapes that do not fit together, or an unknown implementation.
        Unavailable: The implementation cannot run this call here.

    Source: Bai, Kolter & Koltun (2018), arXiv:1803.01271, §3.2-3.3.
    """
    y: Tensor = _call(_CAUSAL_CONV1D, x, weight, bias, dilation=dilation, implementation=implementation)
    return y


def tcn_block(
    x: Tensor,
    w1: Tensor | WeightNorm,
    b1: Tensor | None,
    w2: Tensor | WeightNorm,
    b2: Tensor | None,
    w_down: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    dilation: int,
    dropout_p: float = 0.0,
    training: bool = False,
    implementation: str = "library",
) -> Tensor:
    """TCN residual block: [causal convolution, ReLU, dropout] twice, plus the input, and a ReLU.

    Args:
        x: Features, (N, C_in, T).
        w1: Filters of the first convolution, (C_out, C_in, K), or their `WeightNorm`.
        b1: (C_out,), or None.
        w2: Filters of the second, (C_out, C_out, K), or their `WeightNorm`.
        b2: (C_out,), or None.
        w_down: 1×1 filters on the shortcut, (C_out, C_in, 1); needed where the widths differ.
        b_down: (C_out,), or None.
        dilation: Distance between taps, in frames.
        dropout_p: Probability that an element is dropped, in [0, 1). Every element is drawn by itself, as in the
            authors' code; the paper drops whole channels.
        training: Dropout acts.
        implementation: A name in `OPS["tcn_block"].implementations`.

    Returns:
        (N, C_out, T), dtype of x.

    Raises:
        ValueError: Shapes that do not fit together, widths that differ without `w_down`, or an unknown implementation.
        Unavailable: The implementation cannot run this call here.

    Source: Bai, Kolter & Koltun (2018), arXiv:1803.01271, §3.4, figure 1(b).
    """
    y: Tensor = _call(
        _TCN_BLOCK,
        x,
        w1,
        b1,
        w2,
        b2,
        w_down,
        b_down,
        dilation=dilation,
        dropout_p=dropout_p,
        training=training,
        implementation=implementation,
    )
    return y


def rnn(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    *,
    return_sequence: bool = True,
    implementation: str = "library",
) -> tuple[Tensor, Tensor]:
    """Plain recurrent layer: h[t] = tanh(W x[t] + U h[t−1] + b).

    Args:
        x: Features, (N, T, F).
        w_ih: W, (H, F).
        w_hh: U, (H, H).
        bias: b, (H,), or None.
        state: h before the first frame, (N, H); None is zeros.
        return_sequence: Outputs of every frame; otherwise of the last alone (many to one).
        implementation: A name in `OPS["rnn"].implementations`.

    Returns:
        y, (N, T, H) or (N, H), and h after the last frame, (N, H): the `state` of a next call. dtype of x.

    Raises:
        ValueError: Shapes that do not fit together, or an unknown implementation.
        Unavailable: The implementation cannot run this call here.

    Source: Elman (1990), Cognitive Science 14(2); Donahue et al. (2015), arXiv:1411.4389, §2.
    """
    y, last = _call(_RNN, x, w_ih, w_hh, bias, state, return_sequence=return_sequence, implementation=implementation)
    return y, last


def lstm(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
    *,
    return_sequence: bool = True,
    implementation: str = "library",
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """LSTM layer: c[t] = f ⊙ c[t−1] + i ⊙ g, h[t] = o ⊙ tanh(c[t]), the gates from x[t] and h[t−1].

    Args:
        x: Features, (N, T, F).
        w_ih: Input weights of the gates i, f, g, o in this order, as torch's, (4·H, F).
        w_hh: Recurrent weights likewise, (4·H, H).
        bias: (4·H,), or None; the sum of torch's two.
        state: (h, c) before the first frame, each (N, H); None is zeros.
        return_sequence: Outputs of every frame; otherwise of the last alone (many to one).
        implementation: A name in `OPS["lstm"].implementations`.

    Returns:
        y, (N, T, H) or (N, H), and (h, c) after the last frame, each (N, H): the `state` of a next call. dtype of x.

    Raises:
        ValueError: Shapes that do not fit together, or an unknown implementation.
        Unavailable: The implementation cannot run this call here.

    Source: Hochreiter & Schmidhuber (1997), Neural Computation 9(8), with the forget gate of Gers et al. (2000);
    Donahue et al. (2015), arXiv:1411.4389, §2.
    """
    y, last = _call(_LSTM, x, w_ih, w_hh, bias, state, return_sequence=return_sequence, implementation=implementation)
    return y, last


# Needs what is above.
from vidkernels.acceleration import accelerate  # noqa: E402
