"""Awkward cases of every op, and the implementations to run them on."""

from __future__ import annotations

from typing import Any

import pytest

from vidkernels import OPS, Op

_CONV = {
    "odd sizes": {"clip_length": 3, "height": 5, "width": 7},
    "one frame": {"clip_length": 1},
    "one position": {"clip_length": 1, "height": 1, "width": 1},
    "strided": {"stride": (2, 2, 2), "clip_length": 5},
    "uneven strides": {"stride": (1, 3, 2), "clip_length": 4},
    "dilated": {"dilation": (2, 1, 3), "clip_length": 6, "height": 5, "width": 9},
    "unpadded": {"padding": (0, 0, 0), "clip_length": 4},
    "even kernel": {"kernel_size": (2, 4, 2), "padding": (1, 1, 0), "clip_length": 3},
    "pointwise": {"kernel_size": (1, 1, 1)},
    "more padding than kernel": {"padding": (3, 3, 3), "clip_length": 2},
    "empty batch": {"batch_size": 0},
}
_CONV_SIZES = {"batch_size": 2, "in_channels": 5, "clip_length": 3, "height": 6, "width": 5}

_CAUSAL = {
    "odd sizes": {"clip_length": 7},
    "one frame": {"clip_length": 1},
    "dilated": {"dilation": 3, "clip_length": 11},
    "dilated beyond the clip": {"dilation": 8},
    "pointwise": {"kernel_size": 1},
    "no bias": {"bias": False},
    "equal widths": {"out_channels": 5},
    "empty batch": {"batch_size": 0},
}
_CAUSAL_SIZES = {"batch_size": 2, "in_channels": 5, "out_channels": 7, "clip_length": 6}

_RECURRENT = {
    "odd sizes": {"clip_length": 7},
    "one frame": {"clip_length": 1},
    "no bias": {"bias": False},
    "many to one": {"return_sequence": False},
    "one feature": {"input_features": 1, "hidden_size": 1},
    "32 units": {"hidden_size": 32, "clip_length": 3},
    "128 units": {"hidden_size": 128, "clip_length": 3, "batch_size": 2},
    "empty batch": {"batch_size": 0},
}
_RECURRENT_SIZES = {"batch_size": 3, "clip_length": 5, "input_features": 5, "hidden_size": 7}

# Batch statistics need two values a channel at least.
_PAIR = {name: case for name, case in _CONV.items() if name not in ("dilated", "one position")}

AWKWARD: dict[str, dict[str, dict[str, Any]]] = {
    "conv3d": {name: {**_CONV_SIZES, "out_channels": 7, **case} for name, case in _CONV.items()}
    | {
        "bias": {**_CONV_SIZES, "out_channels": 7, "bias": True},
        "three channels": {**_CONV_SIZES, "in_channels": 3, "out_channels": 7},
        "two channels, strided": {
            **_CONV_SIZES,
            "in_channels": 2,
            "out_channels": 8,
            "kernel_size": (3, 5, 5),
            "stride": (1, 2, 2),
        },
        "patches": {
            **_CONV_SIZES,
            "out_channels": 7,
            "kernel_size": (1, 2, 2),
            "stride": (1, 2, 2),
            "padding": (0, 0, 0),
        },
        "relu": {**_CONV_SIZES, "out_channels": 7, "bias": True, "activation": "relu"},
        "residual": {**_CONV_SIZES, "out_channels": 7, "residual": True, "activation": "silu"},
    },
    "depthwise_conv3d": {name: {**_CONV_SIZES, **case} for name, case in _CONV.items()}
    | {"bias": {**_CONV_SIZES, "bias": True}, "silu": {**_CONV_SIZES, "bias": True, "activation": "silu"}},
    "conv2plus1d": {name: {**_CONV_SIZES, "out_channels": 7, **case} for name, case in _PAIR.items()}
    | {"frozen statistics": {**_CONV_SIZES, "out_channels": 7, "batch_statistics": False}},
    "causal_conv1d": {name: {**_CAUSAL_SIZES, **case} for name, case in _CAUSAL.items()},
    "tcn_block": {name: {**_CAUSAL_SIZES, **case} for name, case in _CAUSAL.items()}
    | {
        "plain filters": {**_CAUSAL_SIZES, "weight_norm": False},
        "downsample of equal widths": {**_CAUSAL_SIZES, "out_channels": 5, "downsample": True},
    },
    "rnn": {name: {**_RECURRENT_SIZES, **case} for name, case in _RECURRENT.items()},
    "lstm": {name: {**_RECURRENT_SIZES, **case} for name, case in _RECURRENT.items()},
}
"""Cases by op and by what is awkward about them."""

TYPICAL: dict[str, dict[str, Any]] = {
    name: _CONV_SIZES | ({} if name == "depthwise_conv3d" else {"out_channels": 7}) for name in OPS if "conv" in name
} | {"causal_conv1d": _CAUSAL_SIZES, "tcn_block": _CAUSAL_SIZES, "rnn": _RECURRENT_SIZES, "lstm": _RECURRENT_SIZES}
"""A small ordinary case of every op."""


def implementations(op: Op, *, step: bool = False) -> list[Any]:
    """Parameters of a test: every implementation (with a step); what compiles is slow."""
    return [
        pytest.param(op.name, name, id=f"{op.name}-{name}", marks=[pytest.mark.slow] if name == "compiled" else [])
        for name, implementation in op.implementations.items()
        if implementation.step or not step
    ]
