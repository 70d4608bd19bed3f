"""Video networks that start from an image network: inflation, the boring video, filters for other modalities."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vidbench.models import create
from vidbench.models.inflation import cross_modality, inflate, inflate_filter
from vidbench.sweep import RequestError

State = dict[str, Tensor]
MIXED = ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c")
NAMES_2D = ("inception3a", "inception3b", *(f"inception4{x}" for x in "abcde"), "inception5a", "inception5b")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def image_weights(width: float) -> State:
    """A 2D Inception-v1 under I3D's names: the 3D network's shapes without their time axis, other values."""
    state = create("i3d_rgb", num_classes=4, width_multiplier=width).state_dict()
    image: State = {}
    for name, tensor in state.items():
        if tensor.dim() == 5:
            fan_in = tensor.shape[1] * tensor.shape[3] * tensor.shape[4]
            image[name] = torch.randn(*tensor.shape[:2], *tensor.shape[3:]) * (2 / fan_in) ** 0.5
        elif name.endswith("running_var"):
            image[name] = torch.rand_like(tensor) + 0.5
        elif tensor.is_floating_point():
            image[name] = torch.randn_like(tensor) * 0.1 + (1.0 if name.endswith("bn.weight") else 0.0)
    return image


def inception_v1(w: State, image: Tensor) -> Tensor:
    """(N, 3, H, W) → the last inception module's (N, C, H / 32, W / 32), with SAME padding."""

    def same(x: Tensor, size: int, step: int) -> Tensor:
        pads: list[int] = []
        for length in reversed(x.shape[2:]):
            total = max((-(-length // step) - 1) * step + size - length, 0)
            pads += [total // 2, total - total // 2]
        return F.pad(x, pads)

    def unit(name: str, x: Tensor, step: int = 1) -> Tensor:
        weight = w[f"{name}.conv3d.weight"]
        x = F.conv2d(same(x, weight.shape[2], step), weight, None, step)
        norm = [w[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *norm, False, 0.0, 1e-3).relu()

    def pool(x: Tensor, size: int, step: int) -> Tensor:
        return F.max_pool2d(same(x, size, step), size, step)

    x = pool(unit("Conv3d_1a_7x7", image, 2), 3, 2)
    x = pool(unit("Conv3d_2c_3x3", unit("Conv3d_2b_1x1", x)), 3, 2)
    for name in MIXED:
        if name == "4b":
            x = pool(x, 3, 2)
        if name == "5b":
            x = pool(x, 2, 2)
        m = f"Mixed_{name}"
        branches = (
            unit(f"{m}.b0", x),
            unit(f"{m}.b1b", unit(f"{m}.b1a", x)),
            unit(f"{m}.b2b", unit(f"{m}.b2a", x)),
            unit(f"{m}.b3b", pool(x, 3, 1)),
        )
        x = torch.cat(branches, dim=1)
    return x


def googlenet_names(w: State) -> State:
    """The same weights under torchvision's names."""
    named: State = {}
    for name, tensor in w.items():
        new = name.replace("Conv3d_1a_7x7", "conv1").replace("Conv3d_2b_1x1", "conv2").replace("Conv3d_2c_3x3", "conv3")
        for ours, theirs in zip(MIXED, NAMES_2D, strict=True):
            new = new.replace(f"Mixed_{ours}.", f"{theirs}.")
        new = re.sub(r"\.b0\.", ".branch1.", new)
        new = re.sub(r"\.b([12])([ab])\.", lambda f: f".branch{int(f[1]) + 1}.{'ab'.index(f[2])}.", new)
        named[new.replace(".b3b.", ".branch4.1.").replace("conv3d.weight", "conv.weight")] = tensor
    named.pop("logits.conv.weight", None)
    named.pop("logits.conv3d.bias", None)
    return {**named, "fc.weight": torch.zeros(1000, 8), "aux1.conv.bn.weight": torch.zeros(3)}


def test_an_inflated_filter_answers_a_repeated_image_as_the_image() -> None:
    weight, image = torch.randn(4, 3, 3, 3), torch.randn(2, 3, 8, 8)
    video = image.unsqueeze(2).repeat(1, 1, 7, 1, 1)
    answer = F.conv3d(video, inflate_filter(weight, 5))
    assert answer.shape == (2, 4, 3, 6, 6)
    assert torch.allclose(answer, F.conv2d(image, weight).unsqueeze(2).expand_as(answer), atol=1e-5)


@pytest.mark.parametrize("names", ["own", "torchvision"])
def test_the_boring_video(names: str) -> None:
    """Away from the temporal borders, whose zeros no image has, the inflated net is the 2D net."""
    width = 0.125
    weights = image_weights(width)
    net = create("i3d_rgb", num_classes=4, width_multiplier=width).eval()
    left = inflate(net, weights if names == "own" else googlenet_names(weights))
    assert {name for name in left if "num_batches" not in name} == {"logits.conv3d.weight", "logits.conv3d.bias"}
    image = torch.randn(1, 3, 48, 40)
    wanted = inception_v1(weights, image)
    assert wanted.std() > 1e-3
    with torch.no_grad():
        answer = net.features(image.unsqueeze(2).repeat(1, 1, 136, 1, 1))
    errors = ((answer - wanted.unsqueeze(2)).abs() / wanted.abs().max()).amax((0, 1, 3, 4))
    # Seventeen steps of eight frames: a step that sees 99 frames is free of the borders from the seventh to the tenth.
    assert errors[7:10].max() < 1e-5
    assert min(errors[0], errors[-1]) > 1e-2


def test_i3d_for_flow_starts_from_rgb_filters() -> None:
    weights = image_weights(0.125)
    net = create("i3d_flow", num_classes=4, width_multiplier=0.125)
    inflate(net, weights)
    first, image = net.Conv3d_1a_7x7.conv3d.weight, weights["Conv3d_1a_7x7.conv3d.weight"]
    assert torch.allclose(first[:, 0], first[:, 1])
    assert torch.allclose(first.sum(2)[:, 1], image.mean(1), atol=1e-6)


def test_weights_that_do_not_inflate() -> None:
    weights = image_weights(0.125)
    net = create("i3d_rgb", num_classes=4, width_multiplier=0.125)
    with pytest.raises(RequestError, match=r"lacks Mixed_3b\.b0\.conv3d\.weight of I3D"):
        inflate(net, {name: tensor for name, tensor in weights.items() if name != "Mixed_3b.b0.conv3d.weight"})
    wide = {**weights, "Mixed_3b.b0.conv3d.weight": torch.zeros(9, 24, 1, 1)}
    with pytest.raises(RequestError, match=r"Mixed_3b\.b0\.conv3d\.weight \(9, 24, 1, 1, 1\) does not inflate to"):
        inflate(net, wide)


def test_rgb_filters_for_flow_channels() -> None:
    rgb = torch.randn(4, 3, 5, 5)
    flow = cross_modality(rgb, 20)
    assert flow.shape == (4, 20, 5, 5)
    for channel in range(20):
        assert torch.allclose(flow[:, channel], (rgb[:, 0] + rgb[:, 1] + rgb[:, 2]) / 3, atol=1e-6)


def test_the_temporal_stream_starts_from_the_spatial_one() -> None:
    model = create("two_stream", num_classes=4, clip_length=6, input_size=32, width_multiplier=0.1)
    head = model.temporal.full8.weight.clone()
    model.start_temporal_from_spatial()
    spatial, temporal = model.spatial.state_dict(), model.temporal.state_dict()
    assert temporal["conv1.weight"].shape[1] == 10
    assert torch.allclose(
        temporal["conv1.weight"], spatial["conv1.weight"].mean(1, keepdim=True).expand(-1, 10, -1, -1)
    )
    assert all(torch.equal(temporal[n], spatial[n]) for n in spatial if n != "conv1.weight" and "full8" not in n)
    assert torch.equal(temporal["full8.weight"], head)


def test_two_stream_i3d_averages_logits_over_the_same_moments() -> None:
    model = create("i3d_two_stream", num_classes=3, width_multiplier=0.125).eval()
    rgb, flow = torch.randn(2, 3, 9, 32, 32), torch.randn(2, 2, 8, 32, 32)
    with torch.no_grad():
        wanted = (model.rgb(rgb[:, :, :8]) + model.flow(flow)) / 2
        assert torch.allclose(model(rgb, flow), wanted, atol=1e-6)
