"""Published weight files: written here in the original's names and shapes, loaded, and computed a second time.

Each network is written out functionally, from the file's tensors alone, after the code that published the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from weight_files import Layout, State, agree, batch_norm, filled, norm_layout, saved

from vidbench.models import TemporalConvNet, create, load_weights
from vidbench.sweep import RequestError


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# torchvision: r3d_18, mc3_18, r2plus1d_18

MIDDLE = {1: (144, 144), 2: (230, 230), 3: (460, 460), 4: (921, 921)}
"""torchvision's middle channels of the first block of each layer; the second blocks have 144, 288, 576, 1152."""


def torchvision_layout(kind: str) -> Layout:
    if kind == "r2plus1d_18":
        layout: Layout = {"stem.0.weight": (45, 3, 1, 7, 7), **norm_layout("stem.1", 45)}
        layout |= {"stem.3.weight": (64, 45, 3, 1, 1), **norm_layout("stem.4", 64)}
    else:
        layout = {"stem.0.weight": (64, 3, 3, 7, 7), **norm_layout("stem.1", 64)}
    before = 64
    for layer, width in enumerate((64, 128, 256, 512), start=1):
        for block in (0, 1):
            for conv in (1, 2):
                name, into = f"layer{layer}.{block}.conv{conv}", before if (block, conv) == (0, 1) else width
                if kind == "r2plus1d_18":
                    middle = MIDDLE[layer][conv - 1] if block == 0 else (144, 288, 576, 1152)[layer - 1]
                    layout |= {f"{name}.0.0.weight": (middle, into, 1, 3, 3), **norm_layout(f"{name}.0.1", middle)}
                    layout[f"{name}.0.3.weight"] = (width, middle, 3, 1, 1)
                else:
                    taps = 1 if kind == "mc3_18" and layer > 1 else 3
                    layout[f"{name}.0.weight"] = (width, into, taps, 3, 3)
                layout |= norm_layout(f"{name}.1", width)
            if block == 0 and layer > 1:
                layout[f"layer{layer}.0.downsample.0.weight"] = (width, before, 1, 1, 1)
                layout |= norm_layout(f"layer{layer}.0.downsample.1", width)
        before = width
    return {**layout, "fc.weight": (400, 512), "fc.bias": (400,)}


def torchvision_net(kind: str, w: State, x: Tensor) -> Tensor:
    if kind == "r2plus1d_18":
        x = batch_norm(w, "stem.1", F.conv3d(x, w["stem.0.weight"], None, (1, 2, 2), (0, 3, 3))).relu()
        x = batch_norm(w, "stem.4", F.conv3d(x, w["stem.3.weight"], None, 1, (1, 0, 0))).relu()
    else:
        x = batch_norm(w, "stem.1", F.conv3d(x, w["stem.0.weight"], None, (1, 2, 2), (1, 3, 3))).relu()

    def conv(name: str, x: Tensor, step: int, t_step: int) -> Tensor:
        if kind == "r2plus1d_18":
            x = F.conv3d(x, w[f"{name}.0.0.weight"], None, (1, step, step), (0, 1, 1))
            x = F.conv3d(batch_norm(w, f"{name}.0.1", x).relu(), w[f"{name}.0.3.weight"], None, (step, 1, 1), (1, 0, 0))
        else:
            weight = w[f"{name}.0.weight"]
            x = F.conv3d(x, weight, None, (t_step, step, step), (weight.shape[2] // 2, 1, 1))
        return batch_norm(w, f"{name}.1", x)

    for layer in (1, 2, 3, 4):
        for block in (0, 1):
            name = f"layer{layer}.{block}"
            step = 2 if layer > 1 and block == 0 else 1
            t_step = 1 if kind == "mc3_18" else step
            y = conv(f"{name}.conv2", conv(f"{name}.conv1", x, step, t_step).relu(), 1, 1)
            if step == 2:
                x = F.conv3d(x, w[f"{name}.downsample.0.weight"], None, (t_step, 2, 2))
                x = batch_norm(w, f"{name}.downsample.1", x)
            x = (x + y).relu()
    return F.linear(x.mean((2, 3, 4)), w["fc.weight"], w["fc.bias"])


@pytest.mark.parametrize(("kind", "tensors"), [("r3d_18", 122), ("mc3_18", 122), ("r2plus1d_18", 224)])
def test_torchvision(kind: str, tensors: int, tmp_path: Path) -> None:
    state = filled(torchvision_layout(kind))
    assert len(state) == tensors
    model = create(kind, num_classes=400, weights=saved(state, tmp_path / f"{kind}.pth"))
    clip = torch.randn(1, 3, 6, 24, 24)
    agree(model, clip, torchvision_net(kind, state, clip))


# pytorch-i3d: rgb_imagenet.pt, flow_imagenet.pt, rgb_charades.pt

MIXED = {
    "3b": (192, (64, 96, 128, 16, 32, 32)),
    "3c": (256, (128, 128, 192, 32, 96, 64)),
    "4b": (480, (192, 96, 208, 16, 48, 64)),
    "4c": (512, (160, 112, 224, 24, 64, 64)),
    "4d": (512, (128, 128, 256, 24, 64, 64)),
    "4e": (512, (112, 144, 288, 32, 64, 64)),
    "4f": (528, (256, 160, 320, 32, 128, 128)),
    "5b": (832, (256, 160, 320, 32, 128, 128)),
    "5c": (832, (384, 192, 384, 48, 128, 128)),
}


def i3d_layout(channels: int, classes: int) -> Layout:
    def unit(name: str, into: int, out: int, size: int) -> Layout:
        return {f"{name}.conv3d.weight": (out, into, size, size, size), **norm_layout(f"{name}.bn", out)}

    layout = unit("Conv3d_1a_7x7", channels, 64, 7) | unit("Conv3d_2b_1x1", 64, 64, 1)
    layout |= unit("Conv3d_2c_3x3", 64, 192, 3)
    for name, (into, (b0, b1a, b1b, b2a, b2b, b3b)) in MIXED.items():
        layout |= unit(f"Mixed_{name}.b0", into, b0, 1) | unit(f"Mixed_{name}.b1a", into, b1a, 1)
        layout |= unit(f"Mixed_{name}.b1b", b1a, b1b, 3) | unit(f"Mixed_{name}.b2a", into, b2a, 1)
        layout |= unit(f"Mixed_{name}.b2b", b2a, b2b, 3) | unit(f"Mixed_{name}.b3b", into, b3b, 1)
    return {**layout, "logits.conv3d.weight": (classes, 1024, 1, 1, 1), "logits.conv3d.bias": (classes,)}


def same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Zeros on both sides as the published code puts them, axis by axis."""
    pads: list[int] = []
    for size, k, s in reversed(list(zip(x.shape[2:], kernel, stride, strict=True))):
        total = max(k - s, 0) if size % s == 0 else max(k - size % s, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


def i3d_net(w: State, x: Tensor) -> Tensor:
    def unit(name: str, x: Tensor, step: int = 1) -> Tensor:
        weight = w[f"{name}.conv3d.weight"]
        x = F.conv3d(same(x, tuple(weight.shape[2:]), (step,) * 3), weight, None, step)
        return batch_norm(w, f"{name}.bn", x, 1e-3).relu()

    def pool(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        return F.max_pool3d(same(x, kernel, stride), kernel, stride)

    x = pool(unit("Conv3d_1a_7x7", x, 2), (1, 3, 3), (1, 2, 2))
    x = pool(unit("Conv3d_2c_3x3", unit("Conv3d_2b_1x1", x)), (1, 3, 3), (1, 2, 2))
    for name in MIXED:
        if name == "4b":
            x = pool(x, (3, 3, 3), (2, 2, 2))
        if name == "5b":
            x = pool(x, (2, 2, 2), (2, 2, 2))
        m = f"Mixed_{name}"
        pooled = unit(f"{m}.b3b", pool(x, (3, 3, 3), (1, 1, 1)))
        x = torch.cat(
            [
                unit(f"{m}.b0", x),
                unit(f"{m}.b1b", unit(f"{m}.b1a", x)),
                unit(f"{m}.b2b", unit(f"{m}.b2a", x)),
                pooled,
            ],
            dim=1,
        )
    x = F.avg_pool3d(x, (2, 7, 7), 1)
    return F.conv3d(x, w["logits.conv3d.weight"], w["logits.conv3d.bias"]).mean((2, 3, 4))


@pytest.mark.parametrize(
    ("name", "channels", "classes", "counters", "tensors"),
    [("i3d_rgb", 3, 157, False, 287), ("i3d_flow", 2, 400, True, 344)],
)
def test_pytorch_i3d(name: str, channels: int, classes: int, counters: bool, tensors: int, tmp_path: Path) -> None:
    state = filled(i3d_layout(channels, classes), counters=counters)
    assert len(state) == tensors
    model = create(name, num_classes=classes, weights=saved(state, tmp_path / "i3d.pt"))
    # 193 pixels are the fewest that leave 7 positions; an odd size pads unlike an even one.
    clip = torch.rand(1, channels, 10, 193, 194) * 2 - 1
    agree(model, clip, i3d_net(state, clip))


# C3D: c3d.pickle (DavideA), c3d-pretrained.pth (jfzhang95)

C3D_CONVS = {
    "conv1": (64, 3, 3, 3, 3),
    "conv2": (128, 64, 3, 3, 3),
    "conv3a": (256, 128, 3, 3, 3),
    "conv3b": (256, 256, 3, 3, 3),
    "conv4a": (512, 256, 3, 3, 3),
    "conv4b": (512, 512, 3, 3, 3),
    "conv5a": (512, 512, 3, 3, 3),
    "conv5b": (512, 512, 3, 3, 3),
}
C3D_FULL = {"fc6": (4096, 8192), "fc7": (4096, 4096)}
JFZHANG = dict(
    zip(
        (*C3D_CONVS, *C3D_FULL),
        (*(f"features.{i}" for i in (0, 3, 6, 8, 11, 13, 16, 18)), "classifier.0", "classifier.3"),
        strict=True,
    )
)


def c3d_layout() -> Layout:
    weights = {**C3D_CONVS, **C3D_FULL, "fc8": (487, 4096)}
    return {
        f"{name}.{part}": s if part == "weight" else s[:1] for name, s in weights.items() for part in ("weight", "bias")
    }


def c3d_fc7(w: State, x: Tensor) -> Tensor:
    for name in C3D_CONVS:
        x = F.conv3d(x, w[f"{name}.weight"], w[f"{name}.bias"], 1, 1).relu()
        if name == "conv1":
            x = F.max_pool3d(x, (1, 2, 2), (1, 2, 2))
        elif name == "conv5b":
            x = F.max_pool3d(x, 2, 2, (0, 1, 1))
        elif name in ("conv2", "conv3b", "conv4b"):
            x = F.max_pool3d(x, 2, 2)
    x = F.linear(x.reshape(-1, 8192), w["fc6.weight"], w["fc6.bias"]).relu()
    return F.linear(x, w["fc7.weight"], w["fc7.bias"]).relu()


def test_c3d(tmp_path: Path) -> None:
    """Both files, since the full network takes seconds."""
    state = filled(c3d_layout())
    clip = torch.randn(1, 3, 16, 112, 112)
    fc7 = c3d_fc7(state, clip)
    path = tmp_path / "c3d.pickle"
    torch.save(state, path, _use_new_zipfile_serialization=False)  # as torch 0.4 did
    model = create("c3d", num_classes=487, weights=path)
    agree(model, clip, F.linear(fc7, state["fc8.weight"], state["fc8.bias"]))
    path.unlink()

    other = {
        f"{theirs}.{part}": state[f"{ours}.{part}"] for ours, theirs in JFZHANG.items() for part in ("weight", "bias")
    }
    saved(other, tmp_path / "c3d-pretrained.pth")
    for parameter in model.parameters():
        parameter.data.zero_()
    with pytest.raises(
        RequestError, match=r"missing fc8\.weight, fc8\.bias; all but the classifier fits: replace_head"
    ):
        load_weights(model, tmp_path / "c3d-pretrained.pth")
    load_weights(model, tmp_path / "c3d-pretrained.pth", replace_head=True)
    assert torch.equal(model.fc8.weight, torch.zeros(487, 4096))
    for ours in JFZHANG:
        assert torch.equal(model.get_submodule(ours).weight, state[f"{ours}.weight"])
        assert torch.equal(model.get_submodule(ours).bias, state[f"{ours}.bias"])


# locuslab's TCN


def tcn_file(into: int, widths: tuple[int, ...], kernel: int, classes: int) -> State:
    """Keys of the authors' `TCN`: every filter of a block under `conv` and again, the same tensor, in `net`."""
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.empty(shape).uniform_(-0.5, 0.5, generator=generator)

    state: State = {}
    for level, width in enumerate(widths):
        block, before = f"tcn.network.{level}", widths[level - 1] if level else into
        for conv, net, channels in ((1, 0, before), (2, 4, width)):
            tensors = {
                "bias": values(width),
                "weight_g": values(width, 1, 1).abs() + 0.5,
                "weight_v": values(width, channels, kernel),
            }
            for part, tensor in tensors.items():
                state[f"{block}.conv{conv}.{part}"] = state[f"{block}.net.{net}.{part}"] = tensor
        if before != width:
            state |= {f"{block}.downsample.weight": values(width, before, 1), f"{block}.downsample.bias": values(width)}
    return {**state, "linear.weight": values(classes, widths[-1]), "linear.bias": values(classes)}


def tcn_net(w: State, x: Tensor, levels: int) -> Tensor:
    """(N, C, T) → (N, C, T): pad both sides, cut the end off, as the authors do."""
    for level in range(levels):
        block, y = f"tcn.network.{level}", x
        for conv in (1, 2):
            v, g = w[f"{block}.conv{conv}.weight_v"], w[f"{block}.conv{conv}.weight_g"]
            weight = g * v / v.flatten(1).norm(dim=1)[:, None, None]
            pad = (v.shape[2] - 1) * 2**level
            y = F.conv1d(y, weight, w[f"{block}.conv{conv}.bias"], 1, pad, 2**level)[:, :, :-pad].relu()
        if f"{block}.downsample.weight" in w:
            x = F.conv1d(x, w[f"{block}.downsample.weight"], w[f"{block}.downsample.bias"])
        x = (x + y).relu()
    return x


def test_locuslab_tcn(tmp_path: Path) -> None:
    widths = (9, 9, 9, 9)
    state = tcn_file(2, widths, 5, 10)
    path = saved(state, tmp_path / "tcn.pt")
    features = torch.randn(3, 41, 2)
    expected = tcn_net(state, features.transpose(1, 2), 4)
    sizes = {"num_classes": 10, "input_features": 2, "hidden_size": 9, "kernel_size": 5, "levels": 4}
    model = create("tcn", weights=path, **sizes)
    agree(model, features, F.linear(expected[:, :, -1], state["linear.weight"], state["linear.bias"]))
    assert torch.allclose(
        model.frame_logits(features),
        F.linear(expected.transpose(1, 2), state["linear.weight"], state["linear.bias"]),
        atol=1e-4,
    )

    trunk = TemporalConvNet(2, widths, 5, 0.2)
    load_weights(trunk, path)
    agree(trunk, features.transpose(1, 2), expected)
    bare = {name.removeprefix("tcn."): tensor for name, tensor in state.items() if name.startswith("tcn.")}
    again = TemporalConvNet(2, widths, 5, 0.2)
    load_weights(again, saved(bare, tmp_path / "bare.pt"))
    agree(again, features.transpose(1, 2), expected)

    state["tcn.network.0.net.0.bias"] = state["tcn.network.0.conv1.bias"] + 1
    with pytest.raises(RequestError, match=r"tcn\.network\.0\.net\.0\.bias, which are both .* and differ"):
        load_weights(model, saved(state, tmp_path / "torn.pt"))


# pytorchvideo's X3D

X3D_STAGES = ((24, 54, 8, 3), (48, 108, 8, 5), (96, 216, 16, 11), (192, 432, 32, 7))
"""Channels, inner channels, channels of squeeze-and-excitation, blocks."""


def x3d_layout() -> Layout:
    layout: Layout = {"blocks.0.conv.conv_t.weight": (24, 3, 1, 3, 3), "blocks.0.conv.conv_xy.weight": (24, 1, 5, 1, 1)}
    layout |= norm_layout("blocks.0.norm", 24)
    before = 24
    for stage, (width, inner, squeezed, depth) in enumerate(X3D_STAGES, start=1):
        for i in range(depth):
            block = f"blocks.{stage}.res_blocks.{i}"
            if i == 0:
                layout[f"{block}.branch1_conv.weight"] = (width, before, 1, 1, 1)
                if before != width:
                    layout |= norm_layout(f"{block}.branch1_norm", width)
            layout |= {f"{block}.branch2.conv_a.weight": (inner, before, 1, 1, 1)}
            layout |= norm_layout(f"{block}.branch2.norm_a", inner)
            layout |= {f"{block}.branch2.conv_b.weight": (inner, 1, 3, 3, 3)}
            layout |= norm_layout(f"{block}.branch2.norm_b.0", inner)
            if i % 2 == 0:
                squeeze = f"{block}.branch2.norm_b.1.block"
                layout |= {f"{squeeze}.0.weight": (squeezed, inner, 1, 1, 1), f"{squeeze}.0.bias": (squeezed,)}
                layout |= {f"{squeeze}.2.weight": (inner, squeezed, 1, 1, 1), f"{squeeze}.2.bias": (inner,)}
            layout |= {f"{block}.branch2.conv_c.weight": (width, inner, 1, 1, 1)}
            layout |= norm_layout(f"{block}.branch2.norm_c", width)
            before = width
    layout |= {"blocks.5.pool.pre_conv.weight": (432, 192, 1, 1, 1), **norm_layout("blocks.5.pool.pre_norm", 432)}
    layout["blocks.5.pool.post_conv.weight"] = (2048, 432, 1, 1, 1)
    return {**layout, "blocks.5.proj.weight": (400, 2048), "blocks.5.proj.bias": (400,)}


def x3d_net(w: State, x: Tensor) -> Tensor:
    x = F.conv3d(x, w["blocks.0.conv.conv_t.weight"], None, (1, 2, 2), (0, 1, 1))
    x = F.conv3d(x, w["blocks.0.conv.conv_xy.weight"], None, 1, (2, 0, 0), 1, 24)
    x = batch_norm(w, "blocks.0.norm", x).relu()
    for stage, (_, inner, _, depth) in enumerate(X3D_STAGES, start=1):
        for i in range(depth):
            block = f"blocks.{stage}.res_blocks.{i}"
            b, step = f"{block}.branch2", 2 if i == 0 else 1
            y = batch_norm(w, f"{b}.norm_a", F.conv3d(x, w[f"{b}.conv_a.weight"])).relu()
            y = F.conv3d(y, w[f"{b}.conv_b.weight"], None, (1, step, step), 1, 1, inner)
            y = batch_norm(w, f"{b}.norm_b.0", y)
            if i % 2 == 0:
                s = f"{b}.norm_b.1.block"
                z = F.conv3d(y.mean((2, 3, 4), keepdim=True), w[f"{s}.0.weight"], w[f"{s}.0.bias"]).relu()
                y = y * F.conv3d(z, w[f"{s}.2.weight"], w[f"{s}.2.bias"]).sigmoid()
            y = batch_norm(w, f"{b}.norm_c", F.conv3d(y * y.sigmoid(), w[f"{b}.conv_c.weight"]))
            if i == 0:
                x = F.conv3d(x, w[f"{block}.branch1_conv.weight"], None, (1, 2, 2))
            if f"{block}.branch1_norm.weight" in w:
                x = batch_norm(w, f"{block}.branch1_norm", x)
            x = (x + y).relu()
    x = batch_norm(w, "blocks.5.pool.pre_norm", F.conv3d(x, w["blocks.5.pool.pre_conv.weight"])).relu()
    x = F.avg_pool3d(x, x.shape[2:], 1)
    x = F.conv3d(x, w["blocks.5.pool.post_conv.weight"]).relu().flatten(1)
    return F.linear(x, w["blocks.5.proj.weight"], w["blocks.5.proj.bias"])


@pytest.mark.parametrize("name", ["x3d_s", "x3d_m"])
def test_pytorchvideo_x3d(name: str, tmp_path: Path) -> None:
    state = filled(x3d_layout())
    path = saved({"model_state": state, "epoch": 299, "cfg": "TRAIN: …"}, tmp_path / "X3D.pyth")
    model = create(name, num_classes=400, weights=path)
    clip = torch.randn(1, 3, 5, 64, 64)
    agree(model, clip, x3d_net(state, clip))


# What does not fit


def test_another_number_of_classes_is_named_and_its_head_can_be_replaced(tmp_path: Path) -> None:
    path = saved({"model_state": filled(x3d_layout())}, tmp_path / "X3D.pyth")
    with pytest.raises(RequestError) as error:
        create("x3d_m", num_classes=7, weights=path)
    assert "wrongly shaped blocks.5.proj.weight (400, 2048) instead of (7, 2048)" in str(error.value)
    assert str(error.value).endswith("all but the classifier fits: replace_head=True leaves that one as it is")
    assert "\n" not in str(error.value)
    model = create("x3d_m", num_classes=7, weights=path, replace_head=True)
    assert model(torch.randn(1, 3, 2, 32, 32)).shape == (1, 7)


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    path = saved(filled(x3d_layout()), tmp_path / "x3d.pth")
    with pytest.raises(RequestError) as error:
        create("mobilenet_v2_3d", weights=path)
    assert re.search(
        r"do not fit MobileNetV2: missing features\.0\.0\.weight, .* and \d+ more; unexpected blocks\.0\.",
        str(error.value),
    )
    assert "replace_head" not in str(error.value)


def test_a_file_with_code_is_refused(tmp_path: Path) -> None:
    path = saved(nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(RequestError, match=r"no file of torch\.save with tensors alone"):
        load_weights(nn.Linear(2, 2), path)
