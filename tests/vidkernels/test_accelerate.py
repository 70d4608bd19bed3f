"""`accelerate` swaps what agrees, keeps what does not, and says why."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vidkernels.nn as vk
from vidbench import models
from vidkernels import OPS
from vidkernels.acceleration import Report, accelerate
from vidkernels.checking import relative_error

LIBRARY = dict.fromkeys(OPS, "library")
REFERENCE = dict.fromkeys(OPS, "reference")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class SqueezeExcite(nn.Module):
    """A scale for every channel, after Hu et al. (2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv3d(channels, 4, 1), nn.Conv3d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3, 4), keepdim=True)))))


class X3dBlock(nn.Module):
    """Expand, depthwise, squeeze and excite, swish, project: Feichtenhofer (2020), figure 2 and table 1."""

    def __init__(self, channels: int, inner: int, stride: int = 1) -> None:
        super().__init__()
        strides = (1, stride, stride)
        self.expand = nn.Sequential(nn.Conv3d(channels, inner, 1, bias=False), nn.BatchNorm3d(inner), nn.ReLU())
        self.depthwise = nn.Conv3d(inner, inner, 3, strides, 1, groups=inner, bias=False)
        self.norm, self.excite, self.swish = nn.BatchNorm3d(inner), SqueezeExcite(inner), nn.SiLU(inplace=True)
        self.project = nn.Sequential(nn.Conv3d(inner, channels, 1, bias=False), nn.BatchNorm3d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.swish(self.excite(self.norm(self.depthwise(self.expand(x))))))
        return torch.relu(x + y) if y.shape == x.shape else y


class X3d(nn.Module):
    """A stem of a spatial and a depthwise temporal convolution, and blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(3, 6, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False),
            nn.Conv3d(6, 6, (5, 1, 1), 1, (2, 0, 0), groups=6, bias=False),
            nn.BatchNorm3d(6),
            nn.ReLU(inplace=True),
        )
        self.blocks = nn.Sequential(X3dBlock(6, 12), X3dBlock(6, 12, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x)).mean((2, 3, 4))


def _lived(model: nn.Module) -> nn.Module:
    for part in model.modules():
        if isinstance(part, nn.BatchNorm3d):
            nn.init.uniform_(part.running_var, 0.5, 1.5)
            nn.init.normal_(part.running_mean, std=0.1)
    return model.eval()


def _kinds(report: Report) -> dict[str, str]:
    return {row.name: row.kind for row in report.swapped}


@pytest.mark.parametrize("implementation", [LIBRARY, REFERENCE], ids=["library", "reference"])
def test_every_depthwise_layer_of_x3d_is_swapped(implementation: dict[str, str]) -> None:
    model, clip = _lived(X3d()), torch.randn(2, 3, 3, 12, 10)
    new, report = accelerate(model, clip, implementation=implementation)
    assert _kinds(report) == {
        "stem.0": "Conv3d",
        "stem.1-3": "ConvBnAct3d",
        **{
            f"blocks.{i}.{name}": kind
            for i in (0, 1)
            for name, kind in {
                "expand.0-2": "ConvBnAct3d",
                "depthwise": "Conv3d",
                "excite.squeeze": "Conv3d",
                "excite.excite": "Conv3d",
                "project.0-1": "ConvBnAct3d",
            }.items()
        },
    }
    assert not report.kept
    depthwise = [row for row in report.swapped if row.op == "depthwise_conv3d"]
    assert [row.name for row in depthwise] == ["stem.1-3", "blocks.0.depthwise", "blocks.1.depthwise"]
    assert {row.implementation for row in depthwise} == {implementation["depthwise_conv3d"]}
    with torch.no_grad():
        assert relative_error(new(clip), model(clip)) < 1e-5
    assert isinstance(model.stem[2], nn.BatchNorm3d), "the model itself is left as it is"


def test_every_pair_of_r2plus1d_is_swapped() -> None:
    model = _lived(models.create("r2plus1d_18", num_classes=5, width_multiplier=0.125))
    clip = torch.randn(1, 3, 4, 16, 16)
    new, report = accelerate(model, clip, implementation={"conv2plus1d": "reference"})
    pairs = [row for row in report.swapped if row.kind == "Conv2plus1d"]
    assert len(pairs) == 17  # the stem, and two in each of eight blocks
    assert len(report.swapped) == 17
    assert {row.reason for row in report.kept} == {"no implementation of conv3d is named"}
    with torch.no_grad():
        assert relative_error(new(clip), model(clip)) < 1e-5
    assert list(new.layer1.state_dict()) == list(model.layer1.state_dict())


def test_tcn_and_lstm_keep_their_streams() -> None:
    tcn = models.create("cnn_tcn", num_classes=5, width_multiplier=0.125, input_size=32).temporal.eval()
    features = torch.randn(2, 6, tcn.tcn.network[0].conv1.in_channels)
    new, report = accelerate(tcn, features, implementation=REFERENCE)
    assert {row.kind for row in report.swapped} == {"TcnBlock"}
    assert not report.kept
    with torch.no_grad():
        state = None
        for t in range(6):
            y, state = new.step(features[:, t], state)
        torch.testing.assert_close(y, tcn(features))

    lstm = nn.LSTM(4, 5, batch_first=True)
    new, report = accelerate(lstm, torch.randn(2, 3, 4), implementation=REFERENCE)
    assert isinstance(new, vk.LSTM)
    assert [row.kind for row in report.swapped] == ["LSTM"]


def test_auto_keeps_what_torch_does_best() -> None:
    _, report = accelerate(nn.Sequential(nn.LSTM(4, 5, batch_first=True)), torch.randn(2, 3, 4))
    (row,) = report.rows
    assert (row.implementation, row.reason) == ("library", "torch's own is the fastest known")


@pytest.mark.parametrize(
    "case", ["tolerance", "hooks", "called otherwise", "packed", "apart", "unused", "limits", "unknown", "groups"]
)
def test_what_is_kept_has_a_reason(case: str) -> None:
    conv: nn.Module = nn.Conv3d(3, 4, 3, padding=1, groups=1)
    options: dict[str, Any] = {"implementation": "reference"}
    example: Any = torch.randn(1, 3, 2, 4, 4)
    model: nn.Module = nn.Sequential(conv)
    if case == "tolerance":
        options["tolerance"], why = 0.0, "its outputs differ: error"
    elif case == "hooks":
        conv.register_forward_hook(lambda *_: None)
        why = "it has hooks"
    elif case == "called otherwise":
        model, example, why = _Stateful(), torch.randn(1, 2, 4), "it was called with more than features"
    elif case == "packed":
        model, example, why = _Packed(), torch.randn(1, 2, 4), "or with something else"
    elif case == "apart":
        model, why = _Apart(), "its layers are called apart as well"
    elif case == "unused":
        model, why = _Unused(), "it was not called on the example"
    elif case == "limits":
        options["implementation"], why = "matmul", "padding=(1, 1, 1): it takes 0 alone"
    elif case == "unknown":
        options["implementation"], why = "nonesuch", "conv3d has no implementation 'nonesuch'"
    else:
        model, why = nn.Sequential(nn.Conv3d(4, 4, 1, groups=2)), "groups=2 is neither 1 nor each"
        example = torch.randn(1, 4, 2, 4, 4)
    _, report = accelerate(model, example, **options)
    assert not report.swapped
    assert why in report.kept[0].reason
    assert why in str(report)


class _Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(4, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rnn(x, torch.ones(1, x.shape[0], 5))[0]
        return y


class _Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(4, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_sequence(list(x))
        y: Tensor = self.rnn(packed)[1]
        return y


class _Apart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x) + self.layers[0](x)
        return y


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x


class _Chaotic(nn.Module):
    """Any rounding decides what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.frac(self.conv(x) * 2**24)


def test_all_is_undone_where_the_whole_differs() -> None:
    model, clip = _Chaotic(), torch.randn(1, 3, 4, 8, 8)
    new, report = accelerate(model, clip, implementation="reference")
    assert report.error is not None
    assert report.error > 1e-2
    assert not report.swapped
    assert report.kept[0].reason.startswith("all was undone: the whole model's error")
    assert type(new.conv) is nn.Conv3d


def test_a_group_that_fails_leaves_its_layers_to_be_swapped() -> None:
    pair = nn.Sequential(
        nn.Conv3d(3, 4, (1, 3, 3), bias=True), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 5, (3, 1, 1), bias=False)
    )
    _, report = accelerate(pair, torch.randn(1, 3, 4, 6, 6), implementation=LIBRARY)
    assert _kinds(report) == {"0-2": "ConvBnAct3d", "3": "Conv3d"}
    assert [row.reason for row in report.kept] == ["Sequential cannot be taken over: a convolution has a bias"]


def test_an_activation_after_a_convolution_is_taken_in() -> None:
    model = nn.Sequential(nn.Conv3d(3, 4, 3), nn.SiLU())
    new, report = accelerate(model, torch.randn(1, 3, 3, 4, 4), implementation=LIBRARY)
    assert _kinds(report) == {"0-1": "Conv3d"}
    assert isinstance(new[1], nn.Identity)


def test_the_report_is_a_table() -> None:
    _, report = accelerate(_lived(X3d()), torch.randn(1, 3, 3, 8, 8), implementation={"depthwise_conv3d": "reference"})
    text = str(report)
    assert text.splitlines()[0].split() == ["layer", "kind", "case", "implementation", "error"]
    assert "blocks.0.depthwise" in text
    assert "12 3×3×3 @3×4×4" in text
    assert "kept: no implementation of conv3d is named" in text
    assert f"{len(report.swapped)} of {len(report.rows)} swapped; the whole model's error is" in text


def test_layers_can_be_swapped_by_custom_kernels() -> None:
    """In Triton's interpreter; on a GPU the same."""
    model = nn.Sequential(nn.Conv3d(3, 4, (1, 3, 3), bias=False), nn.BatchNorm3d(4), nn.ReLU())
    _, report = accelerate(_lived(model), torch.randn(1, 3, 1, 4, 5), implementation={"conv3d": "triton_stem"})
    assert [(row.kind, row.implementation) for row in report.swapped] == [("ConvBnAct3d", "triton_stem")]


def test_a_copy_of_the_model_can_be_accelerated_again() -> None:
    model, clip = _lived(X3d()), torch.randn(1, 3, 3, 8, 8)
    new, _ = accelerate(model, clip, implementation=LIBRARY)
    again, report = accelerate(copy.deepcopy(new), clip, implementation=LIBRARY)
    assert not report.rows
    with torch.no_grad():
        torch.testing.assert_close(again(clip), new(clip))
