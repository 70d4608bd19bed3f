"""What is measured, in order of importance: a call may end at any time. Pure data, no torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vidbench.layers import Layer, distinct

DTYPES = ("bf16", "fp16", "tf32", "fp32")

SECONDS, ROUNDS = 0.03, 3
"""Sampling of one implementation in one regime in one round, and how often all of them take turns."""

TUNING_SECONDS = 0.02

TEMPORAL_OPS = ("rnn", "lstm", "tcn_block", "causal_conv1d")


def _conv(channels: tuple[int, int], size: tuple[int, int], kernel: tuple[int, int, int], **more: Any) -> Layer:
    sizes = {"clip_length": size[0], "height": size[1], "width": size[1]}
    return Layer("conv3d", {**sizes, "in_channels": channels[0], "out_channels": channels[1], "kernel_size": kernel,
                            **more})  # fmt: skip


def _depthwise(channels: int, size: int, **more: Any) -> Layer:
    sizes = {"clip_length": 16, "height": size, "width": size}
    return Layer("depthwise_conv3d", {**sizes, "in_channels": channels, "kernel_size": (3, 3, 3), **more})


def _tcn(channels: int, clip_length: int, batch_size: int, dilation: int) -> Layer:
    return Layer("tcn_block", {"clip_length": clip_length, "in_channels": channels, "out_channels": channels,
                               "kernel_size": 3, "dilation": dilation, "batch_size": batch_size})  # fmt: skip


def _lstm(hidden: int, clip_length: int) -> Layer:
    return Layer("lstm", {"clip_length": clip_length, "input_features": hidden, "hidden_size": hidden})


CUBE, POINT = (3, 3, 3), (1, 1, 1)

HEADLINES: tuple[Layer, ...] = (
    _depthwise(54, 56),
    _conv((64, 64), (16, 56), CUBE),
    _tcn(64, 1024, 32, 4),
    _lstm(256, 64),
    Layer("conv2plus1d", {"clip_length": 16, "height": 56, "width": 56, "in_channels": 64, "out_channels": 64,
                          "mid_channels": 144}),
    _conv((3, 64), (16, 112), CUBE, bias=True),
    _depthwise(108, 28),
    _conv((256, 256), (8, 28), CUBE, bias=True),
    _conv((192, 64), (32, 28), POINT),
    _conv((3, 64), (69, 229), (7, 7, 7), stride=(2, 2, 2), padding=(0, 0, 0), batch_size=1),
    _tcn(128, 4096, 8, 16),
    _lstm(128, 64),
    _conv((3, 45), (16, 112), (1, 7, 7), stride=(1, 2, 2), padding=(0, 3, 3)),
    _depthwise(432, 7),
    _conv((512, 512), (2, 7), CUBE, bias=True),
    _conv((512, 512), (2, 7), CUBE, bias=True, batch_size=1),
    _lstm(512, 64),
    _depthwise(54, 112, stride=(1, 2, 2)),
    _conv((64, 64), (16, 56), CUBE, bias=True, residual=True, activation="relu"),
    Layer("causal_conv1d", {"clip_length": 512, "in_channels": 64, "out_channels": 64, "dilation": 32,
                            "kernel_size": 3}),
)  # fmt: skip
"""The shapes on which the kernels' goals and floors are stated, the most important first."""

COMPILED = 7
"""So many of the first headlines are also compiled with max-autotune, forward: it takes tens of seconds each."""


SHARES = {"check": 35, "sanitize": 10, "baselines": 25, "kernels": 30, "tune": 20, "models": 10}
"""The parts in their order; of the time that is left each takes its share against those of the parts still to come."""


def batch_size(layer: Layer) -> int:
    """Clips in a batch, where the layer names none."""
    if layer.op in TEMPORAL_OPS:
        return 32 if int(layer.case["clip_length"]) <= 1024 else 8  # type: ignore[arg-type]
    return 8


def values_of(layer: Layer) -> dict[str, Any]:
    """The case of a layer without dtype, layout and training."""
    return {"batch_size": batch_size(layer), **layer.case}


def directions(op: str) -> tuple[str, ...]:
    """What is timed of an op: steps of a recurrence cannot be taken apart from their forward pass usefully."""
    if op in ("conv3d", "depthwise_conv3d"):
        return ("forward", "input_gradient", "weight_gradient")
    return ("forward", "train")


def rest() -> tuple[Layer, ...]:
    """Every other layer, the ops in turn."""
    known = {text_of(layer.op, values_of(layer)) for layer in HEADLINES}
    by_op: dict[str, list[Layer]] = {}
    for layer in distinct():
        if text_of(layer.op, values_of(layer)) not in known:
            by_op.setdefault(layer.op, []).append(layer)
    rows = itertools.zip_longest(*by_op.values())
    return tuple(layer for row in rows for layer in row if layer is not None)


def layers(dtypes: Iterable[str] = DTYPES) -> Iterator[tuple[Layer, str, bool]]:
    """(layer, dtype, whether it is a headline): headlines in bf16, all others in bf16, then the other dtypes."""
    first, *others = dtypes
    yield from ((layer, first, True) for layer in HEADLINES)
    yield from ((layer, first, False) for layer in rest())
    for dtype in others:
        yield from ((layer, dtype, True) for layer in HEADLINES)
    for dtype in others:
        yield from ((layer, dtype, False) for layer in rest())


def text_of(op: str, values: Mapping[str, Any]) -> str:
    """A case in a few words: `conv3d 64→64 16×56×56 k3×3×3 n8`."""
    words = [op]
    pair = [values.get(name) for name in ("in_channels", "mid_channels", "out_channels") if values.get(name)]
    pair += [values[name] for name in ("input_features", "hidden_size") if name in values]
    words.append("→".join(map(str, pair)))
    words.append("×".join(str(values[name]) for name in ("clip_length", "height", "width") if name in values))
    for name, short in (("kernel_size", "k"), ("stride", "s"), ("padding", "p"), ("dilation", "d")):
        value = values.get(name)
        if value is not None and value != 1 and value != (1, 1, 1):
            words.append(short + ("×".join(map(str, value)) if isinstance(value, tuple | list) else str(value)))
    words += [name for name in ("bias", "residual") if values.get(name)]
    words += [str(values["activation"])] if values.get("activation") else []
    return " ".join([*filter(None, words), f"n{values['batch_size']}"])


_ODD = {"batch_size": 2, "in_channels": 5, "clip_length": 3, "height": 6, "width": 5}
_EVEN = {"batch_size": 1, "in_channels": 64, "clip_length": 4, "height": 8, "width": 16}

SMALL: dict[str, dict[str, dict[str, Any]]] = {
    "conv3d": {
        "odd": {**_ODD, "out_channels": 7, "stride": (1, 2, 2), "bias": True},
        "even": {**_EVEN, "out_channels": 64},
        "stem": {**_EVEN, "in_channels": 3, "out_channels": 64, "kernel_size": (3, 7, 7), "stride": (2, 2, 2)},
    },
    "depthwise_conv3d": {"odd": _ODD, "even": {**_EVEN, "bias": True, "activation": "silu"}},
    "conv2plus1d": {
        "odd": {**_ODD, "out_channels": 7},
        "even": {**_EVEN, "out_channels": 64, "mid_channels": 144},
    },
    "causal_conv1d": {
        "odd": {"batch_size": 2, "in_channels": 5, "out_channels": 7, "clip_length": 11, "dilation": 3},
        "even": {"batch_size": 2, "in_channels": 64, "out_channels": 64, "clip_length": 128, "dilation": 4},
    },
    "tcn_block": {
        "odd": {"batch_size": 2, "in_channels": 5, "out_channels": 7, "clip_length": 11, "dilation": 3},
        "even": {"batch_size": 2, "in_channels": 64, "out_channels": 64, "clip_length": 128, "dilation": 4},
    },
    "rnn": {
        "odd": {"batch_size": 3, "clip_length": 5, "input_features": 5, "hidden_size": 7},
        "even": {"batch_size": 16, "clip_length": 6, "input_features": 64, "hidden_size": 128},
    },
    "lstm": {
        "odd": {"batch_size": 3, "clip_length": 5, "input_features": 5, "hidden_size": 7},
        "even": {"batch_size": 16, "clip_length": 6, "input_features": 64, "hidden_size": 128},
        "cluster": {"batch_size": 16, "clip_length": 4, "input_features": 64, "hidden_size": 256},
    },
}
"""Small cases of every op, for compute-sanitizer: ragged edges, and what takes the wide paths."""

MODELS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("r2plus1d_18", {"clip_length": 16, "input_size": 112, "batch_size": 8}),
    ("c3d", {"clip_length": 16, "input_size": 112, "batch_size": 8}),
    ("i3d_rgb", {"clip_length": 64, "input_size": 224, "batch_size": 4}),
    ("tcn", {"clip_length": 512, "input_features": 512, "hidden_size": 256, "batch_size": 32}),
    ("cnn_lstm", {"clip_length": 16, "input_size": 224, "batch_size": 8}),
    ("x3d_m", {"clip_length": 16, "input_size": 224, "batch_size": 8}),
)
"""Whole models; those that the suite does not have yet are rows that say so."""

SMOKE_LAYERS: tuple[Layer, ...] = (
    Layer("causal_conv1d", {"clip_length": 4, "in_channels": 4, "out_channels": 4, "kernel_size": 2, "batch_size": 1}),
    _conv((4, 4), (1, 4), (1, 1, 1), batch_size=1),  # one tap: the interpreter takes its time for each
)
SMOKE_MODELS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("tcn", {"clip_length": 8, "input_features": 8, "hidden_size": 8, "num_classes": 4, "batch_size": 1}),
)
"""What is done without a GPU, to try the whole of this out."""
