"""The layers of published networks, one clip each at the published size: what a kernel library must be good at.

Pure data, no torch. `tests/vidbench/test_layers.py` holds the lists of C3D, I3D and R(2+1)D-18 against the models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vidbench.sweep import Value

Case = Mapping[str, Value]


@dataclass(frozen=True)
class Layer:
    """One op of a network with its sizes, and how many of the kind it has."""

    op: str
    case: Case
    """As `vidkernels.OPS[op].case` takes it, without dtype and batch size."""
    count: int = 1


def _conv(channels: tuple[int, int], size: tuple[int, int], kernel: Value, count: int = 1, **more: Value) -> Layer:
    """A dense convolution of (C_in, C_out) on (T, H = W)."""
    return Layer("conv3d", {**_sizes(size), **_pair(channels), "kernel_size": kernel, **more}, count)


def _depthwise(channels: int, size: tuple[int, int], kernel: Value, count: int = 1, **more: Value) -> Layer:
    return Layer("depthwise_conv3d", {**_sizes(size), "in_channels": channels, "kernel_size": kernel, **more}, count)


def _factorised(
    channels: tuple[int, int], mid: int, size: tuple[int, int], stride: Value = (1, 1, 1), count: int = 1
) -> Layer:
    """A (2+1)D pair with M mid channels."""
    return Layer("conv2plus1d", {**_sizes(size), **_pair(channels), "mid_channels": mid, "stride": stride}, count)


def _sizes(size: tuple[int, int]) -> dict[str, Value]:
    return {"clip_length": size[0], "height": size[1], "width": size[1]}


def _pair(channels: tuple[int, int]) -> dict[str, Value]:
    return {"in_channels": channels[0], "out_channels": channels[1]}


_POINT, _CUBE = (1, 1, 1), (3, 3, 3)

_C3D = (
    _conv((3, 64), (16, 112), _CUBE, bias=True),
    _conv((64, 128), (16, 56), _CUBE, bias=True),
    _conv((128, 256), (8, 28), _CUBE, bias=True),
    _conv((256, 256), (8, 28), _CUBE, bias=True),
    _conv((256, 512), (4, 14), _CUBE, bias=True),
    _conv((512, 512), (4, 14), _CUBE, bias=True),
    _conv((512, 512), (2, 7), _CUBE, 2, bias=True),
)

# Input size, C_in, and the widths of an Inception block: 1×1×1; 1×1×1 and 3³; 1×1×1 and 3³; 1×1×1 after pooling.
_INCEPTION = (
    ((32, 28), 192, 64, 96, 128, 16, 32, 32),
    ((32, 28), 256, 128, 128, 192, 32, 96, 64),
    ((16, 14), 480, 192, 96, 208, 16, 48, 64),
    ((16, 14), 512, 160, 112, 224, 24, 64, 64),
    ((16, 14), 512, 128, 128, 256, 24, 64, 64),
    ((16, 14), 512, 112, 144, 288, 32, 64, 64),
    ((16, 14), 528, 256, 160, 320, 32, 128, 128),
    ((8, 7), 832, 256, 160, 320, 32, 128, 128),
    ((8, 7), 832, 384, 192, 384, 48, 128, 128),
)


def _i3d() -> Iterator[Layer]:
    # "Same" padding of an even size at stride 2 is lopsided: the input is padded before the convolution.
    yield Layer(
        "conv3d",
        {"in_channels": 3, "out_channels": 64, "clip_length": 69, "height": 229, "width": 229, "kernel_size": (7, 7, 7),
         "stride": (2, 2, 2), "padding": (0, 0, 0)},
    )  # fmt: skip
    yield _conv((64, 64), (32, 56), _POINT)
    yield _conv((64, 192), (32, 56), _CUBE)
    for size, c_in, b0, b1a, b1b, b2a, b2b, b3 in _INCEPTION:
        yield from (_conv((c_in, width), size, _POINT) for width in (b0, b1a, b2a, b3))
        yield from (_conv(pair, size, _CUBE) for pair in ((b1a, b1b), (b2a, b2b)))
    yield _conv((1024, 400), (7, 1), _POINT, bias=True)


_R2PLUS1D_18 = (
    _conv((3, 45), (16, 112), (1, 7, 7), stride=(1, 2, 2), padding=(0, 3, 3)),
    _conv((45, 64), (16, 56), (3, 1, 1)),
    _factorised((64, 64), 144, (16, 56), count=4),
    _conv((64, 128), (16, 56), _POINT, stride=(2, 2, 2)),
    _factorised((64, 128), 230, (16, 56), (2, 2, 2)),
    _factorised((128, 128), 230, (8, 28)),
    _factorised((128, 128), 288, (8, 28), count=2),
    _conv((128, 256), (8, 28), _POINT, stride=(2, 2, 2)),
    _factorised((128, 256), 460, (8, 28), (2, 2, 2)),
    _factorised((256, 256), 460, (4, 14)),
    _factorised((256, 256), 576, (4, 14), count=2),
    _conv((256, 512), (4, 14), _POINT, stride=(2, 2, 2)),
    _factorised((256, 512), 921, (4, 14), (2, 2, 2)),
    _factorised((512, 512), 921, (2, 7)),
    _factorised((512, 512), 1152, (2, 7), count=2),
)


def _x3d_m() -> Iterator[Layer]:
    """16 frames of 224²; Feichtenhofer (2020), arXiv:2004.04730, table 3, with pytorchvideo's shortcuts and widths."""
    yield _conv((3, 24), (16, 224), (1, 3, 3), stride=(1, 2, 2))
    yield _depthwise(24, (16, 112), (5, 1, 1))
    before, size = 24, 112
    for width, depth, squeezed in ((24, 3, 8), (48, 5, 8), (96, 11, 16), (192, 7, 32)):
        inner, after = width * 9 // 4, size // 2
        yield _conv((before, width), (16, size), _POINT, stride=(1, 2, 2))  # shortcut
        yield _conv((before, inner), (16, size), _POINT)
        yield _depthwise(inner, (16, size), _CUBE, stride=(1, 2, 2))
        yield _conv((inner, width), (16, after), _POINT, depth)
        yield _conv((width, inner), (16, after), _POINT, depth - 1)
        yield _depthwise(inner, (16, after), _CUBE, depth - 1)
        excited = (depth + 1) // 2  # squeeze and excitation in every other block
        yield _conv((inner, squeezed), (1, 1), _POINT, excited, bias=True)
        yield _conv((squeezed, inner), (1, 1), _POINT, excited, bias=True)
        before, size = width, after
    yield _conv((192, 432), (16, 7), _POINT)
    yield _conv((432, 2048), (1, 1), _POINT)


LAYERS: dict[str, tuple[Layer, ...]] = {
    "c3d": _C3D,
    "i3d_rgb": tuple(_i3d()),
    "r2plus1d_18": _R2PLUS1D_18,
    "x3d_m": tuple(_x3d_m()),
}
"""By model. Convolutions of one shape in several places of a network may stand in several rows."""

TEMPORAL: tuple[Layer, ...] = (
    *(
        Layer(op, {"clip_length": length, "input_features": hidden, "hidden_size": hidden})
        for op in ("rnn", "lstm")
        for hidden in (64, 128, 256, 512, 1024)
        for length in (8, 64, 512, 4096)
    ),
    *(
        Layer("tcn_block", {"clip_length": length, **_pair(pair), "kernel_size": taps, "dilation": dilation})
        for pair in ((64, 64), (128, 128), (256, 256), (25, 25), (512, 256))
        for length, taps, dilation in ((8, 3, 1), (64, 3, 4), (512, 3, 32), (1024, 3, 1), (1024, 7, 16), (4096, 3, 512))
    ),
    *(
        Layer("causal_conv1d", {"clip_length": length, **_pair((width, width)), "kernel_size": 3, "dilation": dilation})
        for width in (64, 256)
        for length, dilation in ((8, 1), (512, 32), (4096, 512))
    ),
)
"""The temporal models' layers over clip lengths 8 to 4096."""


def distinct() -> tuple[Layer, ...]:
    """Every shape of all networks and of the temporal sweep once, with its count over all."""
    found: dict[tuple[str, str], Layer] = {}
    for layer in (*(layer for layers in LAYERS.values() for layer in layers), *TEMPORAL):
        key = layer.op, repr(sorted(layer.case.items()))
        count = found[key].count if key in found else 0
        found[key] = Layer(layer.op, layer.case, count + layer.count)
    return tuple(found.values())
