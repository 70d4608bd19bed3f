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
from vidkernels.checking import Results, compare, oracle, relative_error, run
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


def _gradients(case: Conv2plus1dCase, *wanted: int, fn: Any = FUSED) -> list[Tensor]:
    """Those of `run` by the tensors of these places alone: 0 x, 1 w_spatial, 2, 3 batch norm, 6 w_temporal."""
    inputs = OP.inputs(case)
    leaves = [inputs.tensors()[place].requires_grad_() for place in wanted]
    y = fn(*inputs.args, **inputs.kwargs)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return list(torch.autograd.grad(y, leaves, noise))


def _assert_gradients(case: Conv2plus1dCase, *wanted: int) -> None:
    want = _oracle(case, True).gradients
    for place, got in zip(wanted, _gradients(case, *wanted), strict=True):
        exact = want[place]
        assert exact is not None
        assert relative_error(got, exact) <= OP.tolerances[case.dtype].weight_gradient


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
            for place, config in enumerate(choice.candidates):
                text = ",".join(f"{key}={value}" for key, value in config.items())
                # Only the tile matters here: warps and stages are the compiler's.
                tile = name, *(item for item in config.items() if not item[0].startswith("num_"))
                if config and tile not in seen:
                    seen.add(tile)
                    # The best guess, and whatever is of 8 warps, in every run.
                    often = place == 0 or config["num_warps"] == 8
                    marks = [] if often else [pytest.mark.slow]
                    yield pytest.param(
                        arch, training, choice.kernel, choice.key, config, id=f"{name}-{text}", marks=marks
                    )


@pytest.mark.parametrize(("arch", "training", "kernel", "key", "config"), [*_configurations()])
def test_every_configuration(arch: str, training: bool, kernel: str, key: tuning.Key, config: tuning.Config) -> None:
    case = OP.case(WIDE, dtype="fp16", training=training)
    with launch.assume(launch.TARGETS[arch]), tuning.forced(kernel, key, config):
        if kernel.endswith("/hidden_gradient"):
            _assert_gradients(case, 2, 3)
        elif kernel.endswith("/temporal_weight"):
            _assert_gradients(case, 6)
        else:
            got = run(FUSED, OP.inputs(case))
            assert not compare(OP, got, _oracle(case, False)).failures(OP, case)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3, 6)])
def test_gradients_where_they_are_wanted(arch: str, wanted: tuple[int, ...]) -> None:
    with launch.assume(launch.TARGETS[arch]):
        _assert_gradients(OP.case(SMALL, dtype="fp32", training=True), *wanted)


def test_only_what_is_wanted_is_launched() -> None:
    case = OP.case(SMALL, training=True)
    inputs = OP.inputs(case).map(lambda tensor: tensor.to("meta"))
    inputs.tensors()[6].requires_grad_()
    y = FUSED(*inputs.args, **inputs.kwargs)
    with launch.recording(launch.TARGETS["sm_90"]) as launches:
        y.backward(torch.empty_like(y))
    assert [call.kernel.rpartition(":")[2] for call in launches] == ["temporal_weight", "sum_splits"]


def test_training_updates_the_running_statistics() -> None:
    case = OP.case(SMALL, training=True)
    ours, theirs = OP.inputs(case), OP.inputs(case)
    FUSED(*ours.args, **ours.kwargs)
    OP["library"].fn(*theirs.args, **theirs.kwargs)
    torch.testing.assert_close(ours.args[2].mean, theirs.args[2].mean)
    torch.testing.assert_close(ours.args[2].var, theirs.args[2].var)


def test_training_without_running_statistics() -> None:
    case = OP.case(SMALL, training=True)
    x, w_spatial, bn, w_temporal = OP.inputs(case).args
    parameters = {"stride": case.stride, "padding": case.pad, "training": True}
    alone = FUSED(x, w_spatial, bn._replace(mean=None, var=None), w_temporal, **parameters)
    torch.testing.assert_close(alone, FUSED(x, w_spatial, bn, w_temporal, **parameters), rtol=0, atol=0)


def test_statistics_do_not_cancel_about_a_large_mean() -> None:
    """Σ v² − n·mean² would lose a variance of 10⁻⁷ of the squared mean; what is left is the rounding of the mean."""
    case = OP.case({**SMALL, "in_channels": 1, "kernel_size": (1, 1, 1)}, training=True)
    x, w_spatial, bn, w_temporal = OP.inputs(case).args
    x, w_spatial = (x.sign() + 4096.0), torch.ones_like(w_spatial)
    args = x, w_spatial, bn, w_temporal
    y = FUSED(*args, stride=1, padding=0, training=True)
    wide = OP["reference"].fn(
        *(arg.double() if isinstance(arg, Tensor) else BatchNorm(*(t.double() for t in arg[:4])) for arg in args),
        stride=1,
        padding=0,
        training=True,
    )
    assert relative_error(y, wide) < 1e-3


@pytest.mark.parametrize("batch_statistics", [True, False])
def test_padded_frames_are_zero_after_the_batch_norm(batch_statistics: bool) -> None:
    """With a bias alone every hidden value is 1, and the ends of the clip meet one tap less."""
    case = OP.case(SMALL)
    x, w_spatial, bn, w_temporal = OP.inputs(case).args
    bn = bn._replace(weight=torch.zeros_like(bn.weight).requires_grad_(), bias=torch.ones_like(bn.bias))
    y = FUSED(x, w_spatial, bn, torch.ones_like(w_temporal), stride=1, padding=1, training=batch_statistics)
    taps = torch.tensor([2.0, 3.0, 2.0])[:, None, None]
    torch.testing.assert_close(y, (9 * taps).expand_as(y))


def test_it_repeats_bit_for_bit() -> None:
    case = OP.case(SMALL, dtype="fp16", training=True)
    first, second = (_gradients(case, 0, 1, 2, 3, 6) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("training", [False, True])
def test_it_compiles_as_one_graph(training: bool) -> None:
    case = OP.case(SMALL, training=training)
    compiled = torch.compile(FUSED, fullgraph=True, backend="aot_eager")
    if training:
        for got, want in zip(_gradients(case, 3, 6, fn=compiled), _gradients(case, 3, 6), strict=True):
            torch.testing.assert_close(got, want)
        return
    inputs, others = OP.inputs(case), OP.inputs(case)
    torch.testing.assert_close(compiled(*inputs.args, **inputs.kwargs), FUSED(*others.args, **others.kwargs))


def test_a_compiled_graph_updates_the_running_statistics() -> None:
    case = OP.case(SMALL, training=True)
    inputs, others = OP.inputs(case), OP.inputs(case)
    torch.compile(FUSED, fullgraph=True, backend="aot_eager")(*inputs.args, **inputs.kwargs)
    FUSED(*others.args, **others.kwargs)
    torch.testing.assert_close(inputs.args[2], others.args[2], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_the_custom_ops_are_sound(training: bool) -> None:
    x, w_spatial, bn, w_temporal = OP.inputs(OP.case(SMALL)).args
    rows = x.permute(0, 2, 3, 4, 1).contiguous()
    normalisation = [bn.weight, bn.bias, *((None, None) if training else (bn.mean, bn.var))]
    tail = w_temporal, 1e-5, [1, 1, 1], [1, 1, 1]
    if not training:
        torch.library.opcheck(
            torch.ops.vidkernels.conv2plus1d_evaluation.default, (rows, w_spatial, *normalisation, *tail)
        )
    for tensor in (rows, w_spatial, bn.weight, bn.bias, w_temporal):
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.vidkernels.conv2plus1d_forward.default, (rows, w_spatial, *normalisation, *tail))


def test_autocast_casts_the_data_and_leaves_batch_norm() -> None:
    case = OP.case(SMALL, training=True)
    x, w_spatial, bn, w_temporal = OP.inputs(case).map(lambda tensor: tensor.requires_grad_()).args
    with torch.autocast("cpu", torch.float16):
        y = FUSED(x, w_spatial, bn, w_temporal, stride=1, padding=1, training=True)
    assert y.dtype is torch.float16
    y.float().sum().backward()
    assert {x.grad.dtype, w_spatial.grad.dtype, bn.weight.grad.dtype, w_temporal.grad.dtype} == {torch.float32}
    half = OP.inputs(case, seed=0)
    want = FUSED(half.args[0].half(), half.args[1].half(), half.args[2], half.args[3].half(), **half.kwargs)
    torch.testing.assert_close(y, want, rtol=0, atol=0)


def test_unlike_dtypes_are_refused() -> None:
    x, w_spatial, bn, w_temporal = OP.inputs(OP.case(SMALL)).args
    with pytest.raises(ValueError, match=r"x is torch.float32, w_spatial torch.float16 and w_temporal torch.float32"):
        FUSED(x, w_spatial.half(), bn, w_temporal)
