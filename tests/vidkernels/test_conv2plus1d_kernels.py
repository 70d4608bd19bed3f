"""What the contract leaves open of conv2plus1d's own kernels: every configuration, both paths, training's details."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from vidkernels import OPS, BatchNorm, launch, tuning
from vidkernels.checking import Results, compare, oracle, run
from vidkernels.conv2plus1d import Conv2plus1dCase

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("these run in Triton's interpreter", allow_module_level=True)

OP = OPS["conv2plus1d"]
FUSED = OP["triton_fused"].fn
WIDE = {
    "batch_size": 1,
    "in_channels": 64,
    "mid_channels": 70,
    "out_channels": 20,
    "clip_length": 2,
    "height": 8,
    "width": 8,
}
"""More than one tile along every axis that has tiles, mid channels with a tail, boxes for the copy engine."""
SMALL = {
    "batch_size": 2,
    "in_channels": 5,
    "mid_channels": 9,
    "out_channels": 7,
    "clip_length": 3,
    "height": 4,
    "width": 5,
}


@cache
def _oracle(case: Conv2plus1dCase, gradients: bool) -> Results:
    return oracle(OP, case, OP.inputs(case), gradients=gradients)


def _assert_agrees(case: Conv2plus1dCase, *, gradients: bool) -> Results:
    got = run(FUSED, OP.inputs(case), gradients=gradients)
    errors = compare(OP, got, _oracle(case, gradients))
    assert not errors.failures(OP, case)
    return got


def _choices(case: Conv2plus1dCase, gpu: launch.Gpu) -> Iterator[tuning.Chosen]:
    """What this op chooses for a case: every kernel's configurations."""
    meta = OP.inputs(case).map(lambda tensor: tensor.to("meta").requires_grad_(case.training))
    with tuning.watching() as chosen, launch.recording(gpu):
        y = FUSED(*meta.args, **meta.kwargs)
        if case.training:
            y.backward(torch.empty_like(y))
    return (choice for choice in chosen if choice.kernel.startswith("conv2plus1d/"))


def _configurations() -> Iterator[Any]:
    """Each once, whatever the architectures that would take it."""
    seen = set()
    for arch, training in product(("sm_90", "sm_80"), (True, False)):
        for choice in _choices(OP.case(WIDE, dtype="fp16", training=training), launch.TARGETS[arch]):
            name = choice.kernel.rpartition("/")[2]
            for config in choice.candidates:
                text = ",".join(f"{key}={value}" for key, value in config.items())
                # Only the tile matters here: warps and stages are the compiler's.
                tile = name, *(item for item in config.items() if not item[0].startswith("num_"))
                if config and tile not in seen:
                    seen.add(tile)
                    yield pytest.param(arch, training, choice.kernel, choice.key, config, id=f"{name}-{text}")


@pytest.mark.parametrize(("arch", "training", "kernel", "key", "config"), [*_configurations()])
def test_every_configuration(arch: str, training: bool, kernel: str, key: tuning.Key, config: tuning.Config) -> None:
    case = OP.case(WIDE, dtype="fp16", training=training)
    backward = kernel.endswith(("hidden_gradient", "temporal_weight"))
    with launch.assume(launch.TARGETS[arch]), tuning.forced(kernel, key, config):
        _assert_agrees(case, gradients=backward)
