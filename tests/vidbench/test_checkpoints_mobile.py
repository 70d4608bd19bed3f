"""Files of Efficient-3DCNNs: MobileNet-v2 and ShuffleNet-v2, trained under DataParallel; see `test_checkpoints`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from weight_files import Layout, State, agree, batch_norm, filled, norm_layout, saved

from vidbench.models import create


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seq(w: State, name: str, x: Tensor, layers: str, step: int | tuple[int, int, int] = 1) -> Tensor:
    """A Sequential, layer by layer: p pointwise, d depthwise, c dense convolution, n batch norm, r ReLU, 6 ReLU6."""
    for i, layer in enumerate(layers):
        if layer in "pdc":
            weight = w[f"{name}.{i}.weight"]
            groups, stride = (x.shape[1] if layer == "d" else 1), (1 if layer == "p" else step)
            x = F.conv3d(x, weight, None, stride, weight.shape[2] // 2, 1, groups)
        elif layer == "n":
            x = batch_norm(w, f"{name}.{i}", x)
        else:
            x = x.relu() if layer == "r" else x.clamp(0, 6)
    return x


def seq_layout(name: str, layers: str, channels: list[int]) -> Layout:
    """Its names and shapes; `channels` before and after each convolution."""
    layout: Layout = {}
    at = 0
    for i, layer in enumerate(layers):
        if layer in "pdc":
            into, out, size = channels[at], channels[at + 1], 1 if layer == "p" else 3
            layout[f"{name}.{i}.weight"] = (out, 1 if layer == "d" else into, size, size, size)
            at += 1
        elif layer == "n":
            layout |= norm_layout(f"{name}.{i}", channels[at])
    return layout


MOBILE = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]


def mobile_blocks() -> list[tuple[int, int, int, int]]:
    """Channels before, inside and after, and the stride, of every block."""
    blocks, before = [], 32
    for expansion, width, repeats, stride in MOBILE:
        for i in range(repeats):
            blocks.append((before, before * expansion, width, stride if i == 0 else 1))
            before = width
    return blocks


def test_efficient_3d_mobilenet(tmp_path: Path) -> None:
    layout = seq_layout("features.0", "cn6", [3, 32]) | seq_layout("features.18", "pn6", [320, 1280])
    for i, (before, inner, width, _) in enumerate(mobile_blocks(), start=1):
        if before == inner:
            layout |= seq_layout(f"features.{i}.conv", "dn6pn", [before, inner, width])
        else:
            layout |= seq_layout(f"features.{i}.conv", "pn6dn6pn", [before, inner, inner, width])
    state = filled(layout | {"classifier.1.weight": (600, 1280), "classifier.1.bias": (600,)})
    file = {"epoch": 1, "arch": "mobilenetv2", "state_dict": {f"module.{k}": v for k, v in state.items()}}
    model = create("mobilenet_v2_3d", num_classes=600, weights=saved(file, tmp_path / "mobilenetv2.pth"))

    clip = torch.randn(1, 3, 8, 48, 48)
    x = seq(state, "features.0", clip, "cn6", (1, 2, 2))
    for i, (before, inner, width, stride) in enumerate(mobile_blocks(), start=1):
        y = seq(state, f"features.{i}.conv", x, "dn6pn" if before == inner else "pn6dn6pn", stride)
        x = x + y if stride == 1 and before == width else y
    x = seq(state, "features.18", x, "pn6").mean((2, 3, 4))
    agree(model, clip, F.linear(x, state["classifier.1.weight"], state["classifier.1.bias"]))


def test_efficient_3d_shufflenet(tmp_path: Path) -> None:
    layout = seq_layout("conv1", "cnr", [3, 24]) | seq_layout("conv_last", "pnr", [464, 1024])
    units, before = [], 24
    for width, repeats in ((116, 4), (232, 8), (464, 4)):
        for i in range(repeats):
            units.append((before, width // 2, 2 if i == 0 else 1))
            before = width
    for i, (before, half, stride) in enumerate(units):
        into = before if stride == 2 else half
        layout |= seq_layout(f"features.{i}.banch2", "pnrdnpnr", [into, half, half, half])
        if stride == 2:
            layout |= seq_layout(f"features.{i}.banch1", "dnpnr", [before, before, half])
    state = filled(layout | {"classifier.1.weight": (600, 1024), "classifier.1.bias": (600,)})
    file = {"state_dict": {f"module.{k}": v for k, v in state.items()}}
    model = create("shufflenet_v2_3d", num_classes=600, weights=saved(file, tmp_path / "shufflenetv2.pth"))

    clip = torch.randn(1, 3, 8, 64, 64)
    x = F.max_pool3d(seq(state, "conv1", clip, "cnr", (1, 2, 2)), 3, 2, 1)
    for i, (_, half, stride) in enumerate(units):
        if stride == 2:
            left = seq(state, f"features.{i}.banch1", x, "dnpnr", 2)
            right = seq(state, f"features.{i}.banch2", x, "pnrdnpnr", 2)
        else:
            left, right = x[:, :half], seq(state, f"features.{i}.banch2", x[:, half:], "pnrdnpnr")
        x = torch.stack((left, right), dim=2).flatten(1, 2)  # a, b, a, b, …: the shuffle of two groups
    x = seq(state, "conv_last", x, "pnr").mean((2, 3, 4))
    agree(model, clip, F.linear(x, state["classifier.1.weight"], state["classifier.1.bias"]))
