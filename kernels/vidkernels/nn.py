"""Modules over the ops: layers of torch, with their very parameters, computed by a chosen implementation.

`X.of(layer)` makes one from a layer of torch. It shares the layer's parameters and buffers, has its attributes and its
`state_dict`, and is an instance of the layer's class as well; the layer itself is left as it was. `ConvBnAct3d` alone
has other names: it holds two layers, as `conv` and `bn`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vidkernels
from vidkernels.conv2plus1d import BatchNorm
from vidkernels.conv3d.case import ACTIVATIONS, check_activation
from vidkernels.op import wants_gradients, wide
from vidkernels.shapes import Triple, triple
from vidkernels.tcn_block import WeightNorm

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and parameters of an op."""

Module = TypeVar("Module", bound=nn.Module)


class Layer(nn.Module):
    """A module that is a call of an op."""

    op: str
    """Its name in `OPS`."""
    implementation: str
    """A name in the op's implementations, or `auto`."""

    def call(self, x: Tensor) -> Call:
        """What the op is called with, for features x."""
        raise NotImplementedError

    def _run(self, x: Tensor) -> Any:
        args, parameters = self.call(x)
        function = getattr(vidkernels, self.op)
        return function(*args, **parameters, implementation=self.implementation)

    def extra_repr(self) -> str:
        """As of the layer, and the implementation."""
        return ", ".join(part for part in (super().extra_repr(), f"implementation={self.implementation!r}") if part)


def _turned_into(cls: type[Module], layer: nn.Module, **attributes: Any) -> Module:
    """A copy of a layer that shares its parameters, of a class that is `cls` and the layer's own at once."""
    whole: Any = _class_of(cls, type(layer))  # type: ignore[arg-type]
    copy = whole.__new__(whole)
    # Dictionaries of parameters and the like are copied: what is added to one is not added to the other.
    copy.__dict__ = {name: type(v)(v) if isinstance(v, dict) else v for name, v in layer.__dict__.items()}
    for name, value in attributes.items():
        setattr(copy, name, value)
    made: Module = copy
    return made


@cache
def _class_of(cls: Any, layer: Any) -> Any:
    if issubclass(cls, layer):
        return cls
    return type(f"{cls.__name__}_{layer.__name__}", (cls, layer), {"__module__": __name__})


def _require(condition: bool, what: str, why: str) -> None:
    if not condition:
        raise ValueError(f"{what} cannot be taken over: {why}")


def _padding(layer: nn.Conv3d) -> Triple:
    """Zeros at either end."""
    if layer.padding == "valid":
        return 0, 0, 0
    if layer.padding == "same":
        totals = [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        _require(not any(total % 2 for total in totals), "Conv3d", "padding='same' of an even kernel is lopsided")
        return triple((total // 2 for total in totals), "padding")
    return triple((int(size) for size in layer.padding), "padding")


def _check_conv3d(layer: nn.Conv3d) -> None:
    _require(layer.padding_mode == "zeros", "Conv3d", f"padding_mode={layer.padding_mode!r} is not 'zeros'")
    depthwise = layer.groups == layer.in_channels == layer.out_channels
    _require(
        layer.groups == 1 or depthwise,
        "Conv3d",
        f"groups={layer.groups} is neither 1 nor each of {layer.in_channels} channels to one of as many",
    )
    _padding(layer)


def _conv3d_op(layer: nn.Conv3d) -> str:
    return "conv3d" if layer.groups == 1 else "depthwise_conv3d"


def _conv3d_call(layer: nn.Conv3d, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Call:
    parameters: dict[str, Any] = {"stride": layer.stride, "padding": _padding(layer), "dilation": layer.dilation}
    if activation != "none":
        parameters["activation"] = activation
    return (x, weight, bias), parameters


class Conv3d(Layer, nn.Conv3d):
    """3D convolution, dense or depthwise, and an activation."""

    activation: str

    @classmethod
    def of(cls, layer: nn.Conv3d, *, implementation: str = "auto", activation: str = "none") -> Self:
        """The layer, followed by an activation.

        Args:
            layer: groups 1, or as many as it has channels.
            implementation: A name in the op's implementations, or `auto`.
            activation: `none`, `relu` or `silu`.

        Raises:
            ValueError: A layer that no op computes.
        """
        _check_conv3d(layer)
        check_activation(activation)
        op = _conv3d_op(layer)
        return _turned_into(cls, layer, op=op, implementation=implementation, activation=activation)

    def call(self, x: Tensor) -> Call:
        """What the op is called with, for features x (N, C, T, H, W)."""
        return _conv3d_call(self, x, self.weight, self.bias, self.activation)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, T, H, W) → (N, C_out, T', H', W')."""
        y: Tensor = self._run(x)
        return y


class ConvBnAct3d(Layer):
    """3D convolution, batch norm and an activation: one convolution in evaluation, three layers in training.

    The folded filters are w·γ/√(σ² + ε), in float32 and rounded once; they are worked out anew when a parameter or a
    running statistic was written to. Where a gradient to one of those is wanted, nothing is kept.

    Source: Jacob et al. (2017), arXiv:1712.05877, §3.2, equation 14.
    """

    def __init__(
        self, conv: nn.Conv3d, bn: nn.BatchNorm3d, *, activation: str = "none", implementation: str = "auto"
    ) -> None:
        super().__init__()
        _check_conv3d(conv)
        check_activation(activation)
        _require(bn.running_mean is not None, "BatchNorm3d", "it has no running statistics to evaluate with")
        _require(
            bn.num_features == conv.out_channels,
            "BatchNorm3d",
            f"num_features={bn.num_features} and the convolution yields {conv.out_channels}",
        )
        self.conv, self.bn, self.activation = conv, bn, activation
        self.op, self.implementation = _conv3d_op(conv), implementation
        self._kept: tuple[Any, Tensor, Tensor] | None = None

    @classmethod
    def of(
        cls,
        conv: nn.Conv3d,
        bn: nn.BatchNorm3d,
        activation: nn.Module | None = None,
        *,
        implementation: str = "auto",
    ) -> Self:
        """The layers, shared.

        Args:
            conv: groups 1, or as many as it has channels.
            bn: With running statistics.
            activation: ReLU, SiLU, or None.
            implementation: A name in the op's implementations, or `auto`.

        Raises:
            ValueError: Layers that no op computes.
        """
        name = "none" if activation is None else ACTIVATION_NAMES.get(type(activation))
        if name is None:
            known = ", ".join(kind.__name__ for kind in ACTIVATION_NAMES)
            raise ValueError(f"{type(activation).__name__} cannot be taken over: it is not one of {known}")
        return cls(conv, bn, activation=name, implementation=implementation)

    def fold(self) -> tuple[Tensor, Tensor]:
        """Filters and bias of the one convolution, in the dtype of the convolution's."""
        conv, bn = self.conv, self.bn
        assert bn.running_mean is not None  # checked at construction
        assert bn.running_var is not None
        scale = torch.rsqrt(wide(bn.running_var) + bn.eps)
        if bn.weight is not None:
            scale = scale * wide(bn.weight)
        shift = -wide(bn.running_mean) if conv.bias is None else wide(conv.bias) - wide(bn.running_mean)
        shift = shift * scale
        if bn.bias is not None:
            shift = shift + wide(bn.bias)
        weight = wide(conv.weight) * scale[:, None, None, None, None]
        return weight.to(conv.weight.dtype), shift.to(conv.weight.dtype)

    def _folded(self) -> tuple[Tensor, Tensor]:
        sources = (*self.conv.parameters(), *self.bn.parameters(), self.bn.running_mean, self.bn.running_var)
        if wants_gradients(*sources) or torch.compiler.is_compiling():
            return self.fold()
        stamp = tuple((t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype) for t in sources if t is not None)
        if self._kept is None or self._kept[0] != stamp:
            with torch.no_grad():
                self._kept = (stamp, *self.fold())
        return self._kept[1], self._kept[2]

    def call(self, x: Tensor) -> Call:
        """What the op is called with in evaluation, for features x (N, C, T, H, W)."""
        return _conv3d_call(self.conv, x, *self._folded(), self.activation)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, T, H, W) → (N, C_out, T', H', W')."""
        if self.bn.training:
            return ACTIVATIONS[self.activation](self.bn(self.conv(x)))
        y: Tensor = self._run(x)
        return y


ACTIVATION_NAMES: Mapping[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "silu"}
"""Modules that an op may end with."""


class Conv2plus1d(Layer, nn.Sequential):
    """1×k×k convolution, batch norm, ReLU, k×1×1 convolution, as the four layers of a Sequential."""

    op = "conv2plus1d"

    @classmethod
    def of(cls, pair: nn.Sequential, *, implementation: str = "auto") -> Self:
        """The Sequential of four layers.

        Args:
            pair: Conv3d, BatchNorm3d, ReLU, Conv3d; the convolutions without bias.
            implementation: A name in the op's implementations, or `auto`.

        Raises:
            ValueError: Layers that are no such pair.
        """
        what = type(pair).__name__
        kinds = (nn.Conv3d, nn.BatchNorm3d, nn.ReLU, nn.Conv3d)
        _require(type(pair).forward is nn.Sequential.forward, what, "it has a forward of its own")
        fits = len(pair) == 4 and all(isinstance(layer, kind) for layer, kind in zip(pair, kinds, strict=True))
        _require(fits, what, "it is not Conv3d, BatchNorm3d, ReLU, Conv3d")
        spatial, bn, _, temporal = pair
        assert isinstance(spatial, nn.Conv3d)
        assert isinstance(bn, nn.BatchNorm3d)
        assert isinstance(temporal, nn.Conv3d)
        for layer in (spatial, temporal):
            _check_conv3d(layer)
            _require(layer.groups == 1, what, f"groups={layer.groups} is not 1")
            _require(layer.bias is None, what, "a convolution has a bias")
            _require(layer.dilation == (1, 1, 1), what, f"dilation={layer.dilation} is not 1")
        apart = (
            spatial.kernel_size[0] == spatial.stride[0] == 1
            and temporal.kernel_size[1:] == temporal.stride[1:] == (1, 1)
            and _padding(spatial)[0] == 0
            and _padding(temporal)[1:] == (0, 0)
        )
        _require(apart, what, "the first convolution acts along T, or the second along H or W")
        _require(bn.affine and bn.momentum is not None, what, "its batch norm has no scale, or no momentum")
        return _turned_into(cls, pair, implementation=implementation)

    @property
    def _parts(self) -> tuple[Any, ...]:
        return tuple(self)

    def call(self, x: Tensor) -> Call:
        """What the op is called with, for features x (N, C, T, H, W)."""
        spatial, bn, _, temporal = self._parts
        statistics = BatchNorm(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps, bn.momentum)
        parameters = {
            "stride": (temporal.stride[0], *spatial.stride[1:]),
            "padding": (_padding(temporal)[0], *_padding(spatial)[1:]),
            "training": bn.training or bn.running_mean is None,
        }
        return (x, spatial.weight, statistics, temporal.weight), parameters

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, T, H, W) → (N, C_out, T', H', W')."""
        bn = self._parts[1]
        if bn.training and bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
        y: Tensor = self._run(x)
        return y


class CausalConv1d(Layer, nn.Conv1d):
    """Causal dilated 1-D convolution on (N, C, T), as a layer that pads by itself."""

    op = "causal_conv1d"

    @classmethod
    def of(cls, layer: nn.Conv1d, *, implementation: str = "auto") -> Self:
        """The layer.

        Args:
            layer: A convolution that is causal by a `forward` of its own, of stride 1; or one without padding, which
                becomes causal: (K−1)·dilation zeros stand before the first frame.
            implementation: A name in the op's implementations, or `auto`.

        Raises:
            ValueError: A layer that the op does not compute.
        """
        what = type(layer).__name__
        _require(layer.stride == (1,) and layer.groups == 1, what, "its stride or its groups are not 1")
        _require(layer.padding in ((0,), "valid"), what, f"padding={layer.padding} reaches beyond both ends")
        return _turned_into(cls, layer, implementation=implementation)

    def call(self, x: Tensor) -> Call:
        """What the op is called with, for features x (N, C, T)."""
        return (x, self.weight, self.bias), {"dilation": self.dilation[0]}

    def forward(self, x: Tensor, *state: Any) -> Tensor:
        """(N, C_in, T) → (N, C_out, T); with more arguments, what the layer does with them."""
        y: Tensor = super().forward(x, *state) if state else self._run(x)
        return y


class TcnBlock(Layer):
    """TCN residual block on (N, C, T), of a module with the names of Bai, Kolter & Koltun's code.

    Its class derives from the block's, whose other methods, such as one for a stream, stay what they are.
    """

    op = "tcn_block"

    @classmethod
    def of(cls, block: nn.Module, *, implementation: str = "auto") -> Self:
        """The block.

        Args:
            block: Has `conv1` and `conv2`, causal convolutions of one kernel size and dilation (weight-normalised or
                not), `downsample`, a 1×1 convolution or None, and `dropout1`.
            implementation: A name in the op's implementations, or `auto`.

        Raises:
            ValueError: A module that is no such block.
        """
        what = type(block).__name__
        first, second = getattr(block, "conv1", None), getattr(block, "conv2", None)
        _require(isinstance(first, nn.Conv1d) and isinstance(second, nn.Conv1d), what, "it has no conv1 and conv2")
        assert isinstance(first, nn.Conv1d)
        assert isinstance(second, nn.Conv1d)
        _require(
            isinstance(getattr(block, "dropout1", None), nn.Dropout) and hasattr(block, "downsample"),
            what,
            "it has no dropout1, or no downsample",
        )
        for layer in (first, second):
            _require(layer.stride == (1,) and layer.groups == 1, what, "a stride or groups are not 1")
        alike = first.kernel_size == second.kernel_size and first.dilation == second.dilation
        _require(alike, what, "its convolutions differ in kernel size or dilation")
        down = block.downsample
        _require(
            down is None or (isinstance(down, nn.Conv1d) and down.kernel_size == (1,)), what, "downsample is not 1×1"
        )
        return _turned_into(cls, block, implementation=implementation)

    def call(self, x: Tensor) -> Call:
        """What the op is called with, for features x (N, C, T)."""
        block: Any = self
        down = block.downsample
        filters = (part for conv in (block.conv1, block.conv2) for part in (_filters(conv), conv.bias))
        shortcut = (None, None) if down is None else (down.weight, down.bias)
        dropout = block.dropout1
        parameters = {"dilation": block.conv1.dilation[0], "dropout_p": dropout.p, "training": dropout.training}
        return (x, *filters, *shortcut), parameters

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, T) → (N, C_out, T)."""
        y: Tensor = self._run(x)
        return y


def _filters(conv: Any) -> Tensor | WeightNorm:
    """The filters, as weight norm holds them in torch's new and old way, or plain."""
    if hasattr(conv, "parametrizations"):
        held: Any = getattr(conv.parametrizations, "weight", ())
        if [type(part).__name__ for part in held] == ["_WeightNorm"] and held.original0.shape[1:] == (1, 1):
            return WeightNorm(held.original0, held.original1)
    elif hasattr(conv, "weight_g") and conv.weight_g.shape[1:] == (1, 1):
        return WeightNorm(conv.weight_g, conv.weight_v)
    weight: Tensor = conv.weight
    return weight


class _Recurrent(Layer, nn.RNNBase):
    """Layers of one cell, one above the other, on (N, T, F)."""

    @classmethod
    def of(cls, layer: nn.RNNBase, *, implementation: str = "auto") -> Self:
        """The layer, or stack of layers.

        Args:
            layer: batch_first, of one direction and without projection; an RNN of tanh.
            implementation: A name in the op's implementations, or `auto`.

        Raises:
            ValueError: A layer that the op does not compute.
        """
        what = type(layer).__name__
        _require(layer.batch_first, what, "batch_first is False")
        _require(not layer.bidirectional, what, "it is bidirectional")
        _require(layer.proj_size == 0, what, f"proj_size={layer.proj_size} is not 0")
        _require(layer.mode in ("LSTM", "RNN_TANH"), what, f"its cell is {layer.mode}")
        return _turned_into(cls, layer, implementation=implementation)

    def call(self, x: Tensor, state: Any = None, level: int = 0) -> Call:
        """What the op is called with in a layer of the stack, for features x (N, T, F)."""
        w_ih, w_hh, *biases = (getattr(self, f"{name}_l{level}") for name in self._names)
        return (x, w_ih, w_hh, biases[0] + biases[1] if biases else None, state), {}

    @property
    def _names(self) -> tuple[str, ...]:
        return ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if self.bias else 2]

    def _levels(self, x: Tensor, states: list[Any]) -> tuple[Tensor, list[Any]]:
        if not isinstance(x, Tensor) or x.dim() != 3:
            raise ValueError(f"{type(self).__name__} takes features (N, T, F), neither packed nor a single sequence")
        function, after = getattr(vidkernels, self.op), []
        for level, state in enumerate(states):
            if level and self.dropout and self.training:
                x = F.dropout(x, self.dropout)
            args, _ = self.call(x, state, level)
            x, last = function(*args, implementation=self.implementation)
            after.append(last)
        return x, after


class RNN(_Recurrent, nn.RNN):
    """`torch.nn.RNN` of tanh."""

    op = "rnn"

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(N, T, F), (layers, N, H) → (N, T, H), (layers, N, H)."""
        y, after = self._levels(x, [None] * self.num_layers if state is None else [*state])
        return y, torch.stack(after)


class LSTM(_Recurrent, nn.LSTM):
    """`torch.nn.LSTM`."""

    op = "lstm"

    def forward(  # type: ignore[override]
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(N, T, F), a pair of (layers, N, H) → (N, T, H), such a pair."""
        y, after = self._levels(x, [None] * self.num_layers if state is None else [*zip(*state, strict=True)])
        h, c = zip(*after, strict=True)
        return y, (torch.stack(h), torch.stack(c))
