"""Frames in, one or many predictions out: recurrent shapes, TCNs per frame, backbones, SVMs on descriptors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.svm import LinearSVC
from torch import Tensor, nn

from vidbench.info import without_memory
from vidbench.models import create
from vidbench.models.ed_tcn import EncoderDecoderTcn
from vidbench.models.linear_svm import fit_svm
from vidbench.models.resnet2d import resnet18, resnet50
from vidbench.models.two_stream import stacked_scores
from vidbench.sweep import RequestError

SMALL = {"num_classes": 5, "input_size": 32, "width_multiplier": 0.125}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


# CNN + RNN, CNN + LSTM: one and many


def unrolled(rnn: nn.Module, x: Tensor) -> Tensor:
    """Outputs of every step, gate by gate: (N, T, F) → (N, T, H)."""
    w_x, w_h = rnn.weight_ih_l0, rnn.weight_hh_l0
    bias = rnn.bias_ih_l0 + rnn.bias_hh_l0
    h = c = x.new_zeros(len(x), w_h.shape[1])
    outputs = []
    for t in range(x.shape[1]):
        z = x[:, t] @ w_x.T + h @ w_h.T + bias
        if isinstance(rnn, nn.LSTM):
            i, f, g, o = z.chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        else:
            h = z.tanh()
        outputs.append(h)
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("name", ["cnn_rnn", "cnn_lstm"])
def test_the_four_shapes_of_a_recurrent_model(name: str) -> None:
    model = create(name, **SMALL).eval()
    clip = torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad():
        features = torch.stack([model.backbone(clip[:, :, t]) for t in range(4)], dim=1)
        many = model.fc(unrolled(model.rnn, features))
        alone = torch.cat((features[:, :1], torch.zeros(2, 5, features.shape[2])), dim=1)
        from_one = model.fc(unrolled(model.rnn, alone))

        many_to_many, many_to_one = model.frame_logits(clip), model(clip)
        one_to_one, one_to_many = model(clip[:, :, :1]), model.frame_logits(clip[:, :, :1], steps=6)
    assert many_to_many.shape == (2, 4, 5)
    assert one_to_many.shape == (2, 6, 5)
    assert torch.allclose(many_to_many, many, atol=1e-5)
    assert torch.allclose(many_to_one, many[:, -1], atol=1e-5)
    assert torch.allclose(one_to_one, many[:, 0], atol=1e-5)
    assert torch.allclose(one_to_many, from_one, atol=1e-5)
    with pytest.raises(ValueError, match="steps=3 are fewer than the 4 frames"):
        model.frame_logits(clip, steps=3)


def test_lrcn_averages_the_probabilities_of_all_steps() -> None:
    model = create("cnn_lstm", readout="mean", **SMALL).eval()
    clip = torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model(clip).exp(), model.frame_logits(clip).softmax(2).mean(1), atol=1e-6)
    with pytest.raises(RequestError, match="readout='first' is neither last nor mean"):
        create("cnn_lstm", readout="first", **SMALL)


# TCNs, frame by frame


def test_a_tcn_labels_every_frame_from_the_frames_before_it() -> None:
    model = create("tcn", num_classes=3, hidden_size=6, input_features=4, clip_length=20).eval()
    features = torch.randn(2, 20, 4)
    with torch.no_grad():
        frames = model.frame_logits(features)
        assert frames.shape == (2, 20, 3)
        for t in (1, 7, 20):
            assert torch.allclose(frames[:, t - 1], model(features[:, :t]), atol=1e-5)


def keras_ed_tcn(w: dict[str, Tensor], x: Tensor, layers: int) -> Tensor:
    """(N, T, F), T a multiple of 2^layers, as the authors' code has it."""

    def layer(name: str, x: Tensor) -> Tensor:
        y = F.conv1d(x, w[f"{name}.conv.weight"], w[f"{name}.conv.bias"], padding="same").relu()
        return y / (y.abs().amax(1, keepdim=True) + 1e-5)

    x = x.transpose(1, 2)
    for i in range(layers):
        x = layer(f"encoder.{i}", x)
        x = torch.maximum(x[:, :, ::2], x[:, :, 1::2])
    for i in range(layers):
        x = layer(f"decoder.{i}", F.interpolate(x, scale_factor=2.0, mode="nearest"))
    return x.transpose(1, 2) @ w["fc.weight"].T + w["fc.bias"]


@pytest.mark.parametrize("kernel", [5, 20, 25])
@pytest.mark.parametrize(("layers", "frames"), [(2, 16), (2, 13), (3, 9), (1, 1), (2, 2)])
def test_encoder_decoder_tcn(kernel: int, layers: int, frames: int) -> None:
    tcn = EncoderDecoderTcn(4, 3, [6, 5, 7][:layers], kernel).eval()
    features = torch.randn(2, frames, 4)
    filled = F.pad(features, (0, 0, 0, -frames % 2**layers))
    with torch.no_grad():
        labels = tcn(features)
        assert labels.shape == (2, frames, 3)
        assert torch.allclose(labels, keras_ed_tcn(tcn.state_dict(), filled, layers)[:, :frames], atol=1e-5)


def test_ed_tcn_of_a_clip_is_the_mean_of_its_frames() -> None:
    model = create("ed_tcn", num_classes=3, input_features=4).eval()
    features = torch.randn(2, 11, 4)
    with torch.no_grad():
        assert torch.allclose(model(features), model.frame_logits(features).mean(1))
    assert [layer.conv.out_channels for layer in (*model.tcn.encoder, *model.tcn.decoder)] == [64, 96, 96, 64]
    with pytest.raises(ValueError, match="channels is empty"):
        EncoderDecoderTcn(4, 3, [])


# Backbones


def test_resnets_have_the_published_sizes_and_names() -> None:
    with without_memory():
        small, large = resnet18(), resnet50()
    counts = [sum(parameter.numel() for parameter in net.parameters()) for net in (small, large)]
    assert counts == [11_689_512 - 513_000, 25_557_032 - 2_049_000]
    assert (small.features, large.features) == (512, 2048)
    state = large.state_dict()
    assert state["layer1.0.downsample.0.weight"].shape == (256, 64, 1, 1)
    assert state["layer4.2.conv3.weight"].shape == (2048, 512, 1, 1)
    assert len(state) == 318  # torchvision's 320 without fc


OWN = """
import torch
from torch import nn

class Mean(nn.Module):
    def __init__(self, width_multiplier):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, frames):
        return self.scale * frames.mean((2, 3))

def maps():
    return nn.Conv2d(3, 4, 1)

def nothing(input_size):
    return None
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_backbones.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_backbones", raising=False)
    return "own_backbones"


@pytest.mark.parametrize(
    "name", ["frame_pool_avg", "frame_pool_max", "frame_pool_svm", "cnn_rnn", "cnn_lstm", "cnn_tcn"]
)
def test_frame_models_take_any_backbone(name: str, own: str) -> None:
    clip = torch.randn(2, 3, 4, 32, 32)
    for backbone in ("resnet50", f"{own}:Mean"):
        model = create(name, backbone=backbone, **SMALL).eval()
        with torch.no_grad():
            assert model(clip).shape == (2, 5)
    if name == "frame_pool_avg":
        with torch.no_grad():
            assert torch.allclose(model(clip), model.fc(clip.mean((2, 3, 4))), atol=1e-5)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("resnet34", "backbone='resnet34' is none of resnet18, resnet50 and not package.module:factory"),
        ("own_backbones:maps", "made (1, 4, 32, 32) of frames (1, 3, H, W), wanted features (1, F)"),
        ("own_backbones:nothing", "made a NoneType, wanted a torch.nn.Module"),
        ("own_backbones:gone", "own_backbones has no 'gone'"),
    ],
)
def test_backbones_that_do_not_fit(own: str, backbone: str, message: str) -> None:
    with pytest.raises(RequestError) as error:
        create("cnn_lstm", backbone=backbone, **SMALL)
    assert message in str(error.value)


# Linear SVMs


def blobs(classes: int, features: int, per_class: int = 20) -> tuple[Tensor, Tensor]:
    """Descriptors around one centre a class."""
    centres = torch.randn(classes, features) * 3
    labels = torch.arange(classes).repeat(per_class)
    return centres[labels] + torch.randn(len(labels), features), labels


@pytest.mark.parametrize("classes", [2, 4])
def test_the_layer_answers_as_scikit_learn_does(classes: int) -> None:
    x, labels = blobs(classes, 6)
    layer = nn.Linear(6, classes)
    fit_svm(layer, x, labels, c=0.5)
    machine = LinearSVC(C=0.5, random_state=0).fit(x.double().numpy(), labels.numpy())
    margins = layer(x).detach().numpy()
    assert (margins.argmax(1) == machine.predict(x.double().numpy())).all()
    wanted = machine.decision_function(x.double().numpy())
    assert np.allclose(margins[:, 1] if classes == 2 else margins, wanted, atol=1e-4)


def test_what_an_svm_cannot_be_fitted_on() -> None:
    x, labels = blobs(3, 4)
    with pytest.raises(RequestError, match=r"descriptors \(60, 4\) and labels \(60,\) are not \(N, 5\) and \(N,\)"):
        fit_svm(nn.Linear(5, 3), x, labels)
    with pytest.raises(RequestError, match=r"4 classes needs every label from 0 to 3: see \[3\]"):
        fit_svm(nn.Linear(4, 4), x, labels)


def test_without_scikit_learn_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    with pytest.raises(RequestError, match=r"pip install 'vidbench\[svm\]'"):
        fit_svm(nn.Linear(4, 2), *blobs(2, 4))


def test_pooled_descriptors_with_an_svm() -> None:
    """Classes that differ in colour; the backbone is not trained."""
    model = create("frame_pool_svm", num_classes=3, input_size=32, width_multiplier=0.25).eval()
    labels = torch.arange(3).repeat(8)
    clips = 0.3 * torch.randn(24, 3, 2, 32, 32)
    clips[torch.arange(24), labels] += 2
    with torch.no_grad():
        descriptors = model.descriptor(clips)
        assert torch.allclose(descriptors.norm(dim=1), torch.ones(24), atol=1e-5)
        model.fit_svm(descriptors[:12], labels[:12], c=10.0)
        assert (model(clips[12:]).argmax(1) == labels[12:]).all()


def test_two_streams_fused_by_an_svm() -> None:
    """Each stream knows one half of the label; the average of their scores cannot tell, the SVM can."""
    sizes = {"num_classes": 4, "clip_length": 3, "input_size": 32, "width_multiplier": 0.1}
    model = create("two_stream", **sizes).eval()
    rgb, flow = torch.randn(2, 3, 3, 32, 32), torch.randn(2, 2, 2, 32, 32)
    with torch.no_grad():
        spatial, temporal = model.streams(rgb, flow)
        average = model(rgb, flow).softmax(1)
    assert torch.allclose(average, (spatial.softmax(1) + temporal.softmax(1)) / 2, atol=1e-6)

    labels = torch.arange(4).repeat(30)
    a, b = 3 * F.one_hot(labels // 2, 4) + torch.randn(120, 4), 3 * F.one_hot(labels % 2, 4) + torch.randn(120, 4)
    scores = stacked_scores(a, b)
    assert scores.shape == (120, 8)
    for half, logits in ((scores[:, :4], a), (scores[:, 4:], b)):
        probabilities = logits.exp() / logits.exp().sum(1, keepdim=True)
        assert torch.allclose(half, probabilities / probabilities.pow(2).sum(1, keepdim=True).sqrt(), atol=1e-6)
    model.fit_svm(scores, labels, c=10.0)
    assert model.heads == ("spatial.full8", "temporal.full8", "svm")
    assert (model.svm(scores).argmax(1) == labels).float().mean() > 0.8
    assert ((a.softmax(1) + b.softmax(1)).argmax(1) == labels).float().mean() < 0.6
    with torch.no_grad():
        assert torch.allclose(model(rgb, flow), model.svm(stacked_scores(spatial, temporal)), atol=1e-6)

    again = create("two_stream", fusion="svm", **sizes).eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(rgb, flow), model(rgb, flow))
    with pytest.raises(RequestError, match="fusion='max' is neither average nor svm"):
        create("two_stream", fusion="max", **sizes)
