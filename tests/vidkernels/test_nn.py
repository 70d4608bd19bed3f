"""Modules over the ops behave as the layers of torch that they come from."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import vidkernels.nn as vk


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Causal(nn.Conv1d):
    """A layer that pads by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, ((self.kernel_size[0] - 1) * self.dilation[0], 0)))


class Block(nn.Module):
    """After the authors' code, with a method of its own."""

    def __init__(self, c_in: int, c_out: int, dilation: int, norm: Any = weight_norm) -> None:
        super().__init__()
        self.conv1 = norm(Causal(c_in, c_out, 3, dilation=dilation))
        self.conv2 = norm(Causal(c_out, c_out, 3, dilation=dilation))
        self.dropout1, self.dropout2 = nn.Dropout(0.5), nn.Dropout(0.5)
        self.downsample = nn.Conv1d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout1(self.conv1(x).relu())
        y = self.dropout2(self.conv2(y).relu())
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))

    def width(self) -> int:
        return self.conv2.out_channels


def _pair(stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(3, 6, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False),
        nn.BatchNorm3d(6),
        nn.ReLU(inplace=True),
        nn.Conv3d(6, 5, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False),
    )


def _lived(module: nn.Module) -> nn.Module:
    """Batch norms with statistics and scales of their own."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm3d):
            for tensor in (part.weight, part.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (part.bias, part.running_mean):
                nn.init.normal_(tensor)
    return module


CLIP = (2, 3, 4, 6, 5)
LAYERS: dict[str, tuple[Any, tuple[int, ...], Any]] = {
    "conv3d": (lambda: nn.Conv3d(3, 4, (1, 3, 3), 2, "valid", bias=False), CLIP, vk.Conv3d.of),
    "same padding": (lambda: nn.Conv3d(3, 4, 3, padding="same", dilation=(1, 2, 1)), CLIP, vk.Conv3d.of),
    "depthwise": (lambda: nn.Conv3d(3, 3, 3, padding=1, groups=3), CLIP, vk.Conv3d.of),
    "pair": (_pair, CLIP, vk.Conv2plus1d.of),
    "strided pair": (lambda: _pair(2), CLIP, vk.Conv2plus1d.of),
    "causal": (lambda: Causal(3, 4, 3, dilation=2), (2, 3, 9), vk.CausalConv1d.of),
    "block": (lambda: Block(3, 4, 2), (2, 3, 9), vk.TcnBlock.of),
    "plain block": (lambda: Block(4, 4, 2, norm=lambda conv: conv), (2, 4, 9), vk.TcnBlock.of),
    "old weight norm": (lambda: Block(3, 4, 1, norm=torch.nn.utils.weight_norm), (2, 3, 9), vk.TcnBlock.of),
    "rnn": (lambda: nn.RNN(3, 5, batch_first=True), (2, 4, 3), vk.RNN.of),
    "lstm": (lambda: nn.LSTM(3, 5, batch_first=True, bias=False), (2, 4, 3), vk.LSTM.of),
    "two layers": (lambda: nn.LSTM(3, 5, 2, batch_first=True), (2, 4, 3), vk.LSTM.of),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("what", LAYERS)
def test_a_module_is_the_layer_it_comes_from(what: str, training: bool) -> None:
    """Outputs, gradients, running statistics and names."""
    make, size, of = LAYERS[what]
    layer = _lived(make()).double()
    for part in layer.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    layer.train(training)
    # Layers with torch's old weight norm cannot be deep-copied.
    twin = make().double().train(training)
    twin.load_state_dict(layer.state_dict())
    for part in twin.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    module = of(twin, implementation="library")
    assert isinstance(module, type(layer))
    assert {id(p) for p in module.parameters()} == {id(p) for p in twin.parameters()}
    x = torch.randn(size, dtype=torch.float64)
    want, got = layer(x), module(x)
    torch.testing.assert_close(got, want)
    for result in (want, got):
        (result if isinstance(result, Tensor) else result[0]).square().sum().backward()
    for one, other in zip(module.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    state, expected = module.state_dict(), layer.state_dict()
    assert list(state) == list(expected)
    torch.testing.assert_close(dict(state), dict(expected))
    assert "implementation='library'" in repr(module)
    if what != "old weight norm":
        copied = copy.deepcopy(module)
        torch.testing.assert_close(copied(x), module(x))


def test_recurrent_state_is_carried_over() -> None:
    layer = nn.LSTM(3, 5, 2, batch_first=True)
    module = vk.LSTM.of(layer, implementation="reference")
    x = torch.randn(2, 6, 3)
    whole, last = layer(x)
    first, state = module(x[:, :2])
    second, state = module(x[:, 2:], state)
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole)
    torch.testing.assert_close(state, last)


def test_other_methods_stay() -> None:
    block = vk.TcnBlock.of(Block(3, 4, 1))
    assert isinstance(block, Block)
    assert block.width() == 4


ACTIVATIONS = {"none": None, "relu": nn.ReLU(), "silu": nn.SiLU()}


def _folded(activation: str, groups: int = 1, bias: bool = True) -> tuple[nn.Sequential, vk.ConvBnAct3d]:
    conv = nn.Conv3d(3, 4 if groups == 1 else 3, 3, padding=1, groups=groups, bias=bias)
    parts = [conv, nn.BatchNorm3d(conv.out_channels), ACTIVATIONS[activation]]
    layers = _lived(nn.Sequential(*(part for part in parts if part is not None))).double()
    return layers, vk.ConvBnAct3d.of(*copy.deepcopy(layers), implementation="library")


@pytest.mark.parametrize("groups", [1, 3], ids=["dense", "depthwise"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_folded_convolution_is_the_layers(activation: str, groups: int) -> None:
    layers, module = _folded(activation, groups, bias=activation == "relu")
    x = torch.randn(CLIP, dtype=torch.float64)
    for training in (False, True, False):
        layers.train(training)
        module.train(training)
        want, got = layers(x), module(x)
        torch.testing.assert_close(got, want)
        want.square().sum().backward()
        got.square().sum().backward()
        for one, other in zip(module.parameters(), layers.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(dict(module.bn.named_buffers()), dict(layers[1].named_buffers()))


@torch.no_grad()
def test_filters_are_folded_once_until_something_changes() -> None:
    layers, module = _folded("relu")
    layers.eval()
    module.eval()
    x = torch.randn(CLIP, dtype=torch.float64)
    first = module._folded()[0]
    assert module._folded()[0] is first
    for conv, bn in (layers[:2], (module.conv, module.bn)):
        conv.weight.mul_(2)
        bn.running_var.add_(1)
    torch.testing.assert_close(module(x), layers(x))
    for conv in (layers[0], module.conv):
        conv.load_state_dict({name: value * 1.5 for name, value in conv.state_dict().items()})
    torch.testing.assert_close(module(x), layers(x))
    torch.testing.assert_close(module.float()(x.float()), layers.float()(x.float()))


@torch.no_grad()
def test_half_precision_filters_are_folded_in_float32() -> None:
    layers, module = _folded("none")
    layers.eval()
    module.eval()
    weight, bias = module.half().fold()
    exact, _ = vk.ConvBnAct3d.of(*copy.deepcopy(layers).half().double()).fold()
    assert weight.dtype is bias.dtype is torch.float16
    assert ((weight.double() - exact).abs() <= exact.abs() * 2**-11 + 2**-25).all()


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_a_whole_graph_compiles(training: bool) -> None:
    x = torch.randn(CLIP, dtype=torch.float64)
    for module in (_folded("silu")[1], vk.Conv2plus1d.of(_lived(_pair()).double(), implementation="library")):
        module.train(training)
        want = copy.deepcopy(module)(x)
        torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), want)


def test_autocast() -> None:
    for module in (_folded("silu")[1].float().eval(), vk.Conv3d.of(nn.Conv3d(3, 4, 3), implementation="library")):
        with torch.autocast("cpu", torch.bfloat16):
            assert module(torch.randn(CLIP)).dtype is torch.bfloat16


BAD: dict[str, tuple[Any, nn.Module, str]] = {
    "groups": (vk.Conv3d.of, nn.Conv3d(4, 4, 1, groups=2), "groups=2 is neither 1 nor each of 4 channels"),
    "reflecting": (vk.Conv3d.of, nn.Conv3d(4, 4, 1, padding_mode="reflect"), "padding_mode='reflect' is not 'zeros'"),
    "lopsided": (vk.Conv3d.of, nn.Conv3d(4, 4, 2, padding="same"), "padding='same' of an even kernel is lopsided"),
    "no pair": (vk.Conv2plus1d.of, nn.Sequential(nn.ReLU()), "it is not Conv3d, BatchNorm3d, ReLU, Conv3d"),
    "both ends": (vk.CausalConv1d.of, nn.Conv1d(2, 2, 3, padding=1), r"padding=\(1,\) reaches beyond both ends"),
    "no block": (vk.TcnBlock.of, nn.ReLU(), "ReLU cannot be taken over: it has no conv1 and conv2"),
    "frames first": (vk.LSTM.of, nn.LSTM(2, 2), "batch_first is False"),
    "two directions": (vk.LSTM.of, nn.LSTM(2, 2, batch_first=True, bidirectional=True), "it is bidirectional"),
    "projected": (vk.LSTM.of, nn.LSTM(2, 4, batch_first=True, proj_size=2), "proj_size=2 is not 0"),
    "relu cell": (vk.RNN.of, nn.RNN(2, 2, batch_first=True, nonlinearity="relu"), "its cell is RNN_RELU"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_no_op_computes_is_refused(what: str) -> None:
    of, layer, why = BAD[what]
    with pytest.raises(ValueError, match=why):
        of(layer)


def test_what_cannot_be_folded_is_refused() -> None:
    conv = nn.Conv3d(2, 4, 1)
    with pytest.raises(ValueError, match="no running statistics"):
        vk.ConvBnAct3d.of(conv, nn.BatchNorm3d(4, track_running_stats=False))
    with pytest.raises(ValueError, match="num_features=3 and the convolution yields 4"):
        vk.ConvBnAct3d.of(conv, nn.BatchNorm3d(3))
    with pytest.raises(ValueError, match="Tanh cannot be taken over: it is not one of ReLU, SiLU"):
        vk.ConvBnAct3d.of(conv, nn.BatchNorm3d(4), nn.Tanh())
