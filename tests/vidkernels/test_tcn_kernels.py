"""The Triton kernels of causal convolutions and TCN blocks: many tiles, every configuration, dropout, streaming."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from vidkernels import OPS, Inputs, WeightNorm, launch, tuning
from vidkernels.causal_conv1d.triton_phased import phased_tiles
from vidkernels.checking import compare, oracle, relative_error, run
from vidkernels.op import TOLERANCES, Tolerance
from vidkernels.tcn_block import triton_fused
from vidkernels.tcn_block.case import TcnState
from vidkernels.tcn_block.triton_fused import tcn_block

CONV, BLOCK = OPS["causal_conv1d"], OPS["tcn_block"]
NAMES = {"causal_conv1d": "triton_phased", "tcn_block": "triton_fused"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """fp32 means fp32."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


# ReLUs make gradients of 16-bit features a matter of which side of the kink they fall on.
HALF = Tolerance(1e-3, 4e-2, 4e-2)


def _check(op_name: str, dtype: str = "fp32", *, training: bool = True, **values: Any) -> None:
    op = OPS[op_name]
    case = op.case(values, dtype=dtype, training=training)
    inputs = op.inputs(case, device=DEVICE)
    got = run(op[NAMES[op_name]].fn, inputs, gradients=training)
    errors = compare(op, got, oracle(op, case, inputs, gradients=training))
    gate = HALF if dtype == "fp16" and op is BLOCK else TOLERANCES[dtype]
    assert errors.output <= gate.forward
    if training:
        assert errors.input_gradient is not None
        assert errors.weight_gradient is not None
        assert errors.input_gradient <= (gate.input_gradient or gate.forward)
        assert errors.weight_gradient <= gate.weight_gradient


def _choices(op_name: str, dtype: str, architecture: str, **values: Any) -> list[tuning.Chosen]:
    """What a forward and backward pass would choose among, without a pass."""
    op = OPS[op_name]
    inputs = op.inputs(op.case(values, dtype=dtype, training=True)).map(
        lambda tensor: tensor.to("meta").requires_grad_()
    )
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with launch.assume(launch.TARGETS[architecture]), tuning.watching() as found:
        op[NAMES[op_name]].fn(*inputs.args, **inputs.kwargs).sum().backward()
    torch.backends.cudnn.allow_tf32 = tf32
    return found


_MANY_TILES = {"batch_size": 2, "in_channels": 20, "out_channels": 36, "clip_length": 41, "kernel_size": 3}


@pytest.mark.parametrize(
    ("op_name", "architecture"),
    [
        ("causal_conv1d", "sm_80"),
        pytest.param("causal_conv1d", "sm_90", marks=pytest.mark.slow),
        pytest.param("tcn_block", "sm_90", marks=pytest.mark.slow),
        pytest.param("tcn_block", "sm_80", marks=pytest.mark.slow),
    ],
)
def test_many_tiles(op_name: str, architecture: str) -> None:
    with launch.assume(launch.TARGETS[architecture]):
        _check(op_name, dilation=2, **_MANY_TILES)


def _configurations() -> Iterator[Any]:
    for op_name, dtype in (("causal_conv1d", "fp16"), ("tcn_block", "fp16"), ("tcn_block", "fp32")):
        for chosen in _choices(op_name, dtype, "sm_90", **_EVERY):
            for config in chosen.candidates:
                name = "-".join([op_name, dtype, chosen.kernel.rpartition("/")[2], *map(str, config.values())])
                fast = (op_name, dtype) == ("tcn_block", "fp16") and chosen.kernel.endswith("forward")
                fast = fast and config["num_warps"] == 8 and (config["BLOCK_M"], config["BLOCK_N"]) == (128, 64)
                yield pytest.param(op_name, dtype, chosen, config, id=name, marks=() if fast else (pytest.mark.slow,))


_EVERY = {"batch_size": 1, "in_channels": 72, "out_channels": 136, "clip_length": 150, "kernel_size": 2, "dilation": 1}


@pytest.mark.parametrize(("op_name", "dtype", "chosen", "config"), list(_configurations()))
def test_every_configuration(op_name: str, dtype: str, chosen: tuning.Chosen, config: tuning.Config) -> None:
    training = not chosen.kernel.endswith("forward")
    with tuning.forced(chosen.kernel, chosen.key, config):
        _check(op_name, dtype, training=training, **_EVERY)


def _forced(fused: int, dtype: str, **values: Any) -> ExitStack:
    """Both directions of a block in one launch, or in two; the largest tiles that are not more than 64 frames."""
    stack = ExitStack()
    for chosen in _choices("tcn_block", dtype, "sm_90", **values)[:2]:
        configs = [c for c in chosen.candidates if c["FUSED"] == fused and c["BLOCK_M"] <= 64]
        config = max(configs, key=lambda config: (config["BLOCK_M"], config["BLOCK_N"]))
        stack.enter_context(tuning.forced(chosen.kernel, chosen.key, config))
    return stack


@pytest.mark.parametrize("fused", [pytest.param(0, marks=pytest.mark.slow), 1], ids=["halves", "fused"])
@pytest.mark.parametrize(
    "values",
    [
        {"clip_length": 150, "kernel_size": 3, "dilation": 1, "in_channels": 18},
        {"clip_length": 133, "kernel_size": 5, "dilation": 2, "batch_size": 1},
        {"clip_length": 40, "kernel_size": 5, "dilation": 16, "weight_norm": False, "bias": False},
        {"clip_length": 5, "kernel_size": 4, "dilation": 512, "batch_size": 15},
        {"clip_length": 1, "kernel_size": 2, "dilation": 1, "batch_size": 70, "out_channels": 9},
    ],
    ids=["many tiles", "long filters", "short phases", "dilated beyond the clip", "one frame"],
)
def test_phases(values: dict[str, Any], fused: int) -> None:
    values = {"in_channels": 9, "out_channels": 18, **values}
    with _forced(fused, "fp32", **values):
        _check("tcn_block", **values)


@pytest.mark.parametrize("halo", [0, 2, 7, 40])
@pytest.mark.parametrize(("batch", "frames", "dilation"), [(1, 1, 1), (3, 100, 1), (2, 101, 7), (5, 9, 9), (64, 31, 4)])
def test_every_frame_is_owned_once(batch: int, frames: int, dilation: int, halo: int) -> None:
    """By the arithmetic of `phased_rows`, and behind all that its outputs depend on within the tile."""
    tiles = phased_tiles(batch, frames, dilation, halo, 32)
    if tiles is None:
        assert halo >= 32
        return
    owned = []
    for tile in range(tiles.total):
        part, group = tile % tiles.per_phase, tile // tiles.per_phase
        for m in range(32):
            q, phase = m // tiles.block_p, group * tiles.block_p + m % tiles.block_p
            clip, t = phase // dilation, (part * (tiles.block_q - halo) + q) * dilation + phase % dilation
            if clip < batch and t < frames and (part == 0 or q >= halo):
                owned.append((clip, t))
    assert sorted(owned) == [(clip, t) for clip in range(batch) for t in range(frames)]


def test_filters_longer_than_a_tile_take_two_launches() -> None:
    values = {"in_channels": 2, "out_channels": 3, "clip_length": 300, "kernel_size": 140}
    for chosen in _choices("tcn_block", "fp16", "sm_90", **values)[:2]:
        assert all(not config["FUSED"] for config in chosen.candidates)


def _block_inputs(dtype: str = "fp32", **values: Any) -> Inputs:
    sizes = {"batch_size": 2, "in_channels": 6, "out_channels": 10, "clip_length": 20, "dilation": 2}
    return BLOCK.inputs(BLOCK.case({**sizes, **values}, dtype=dtype), device=DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("op_name", list(NAMES))
def test_results_repeat(op_name: str) -> None:
    op = OPS[op_name]
    inputs = op.inputs(op.case(_MANY_TILES, training=True), device=DEVICE)
    one, other = (run(op[NAMES[op_name]].fn, inputs, gradients=True) for _ in range(2))
    for was, now in zip((*one.outputs, *one.gradients), (*other.outputs, *other.gradients), strict=True):
        assert torch.equal(was, now)  # type: ignore[arg-type]


@pytest.mark.parametrize("wanted", ["x", "v1", "g2", "b1", "w_down", "b_down"])
def test_gradients_only_where_wanted(wanted: str) -> None:
    inputs = _block_inputs()
    x, w1, b1, w2, _, w_down, b_down = inputs.args
    leaf = {"x": x, "v1": w1.v, "g2": w2.g, "b1": b1, "w_down": w_down, "b_down": b_down}[wanted]
    leaf.requires_grad_()
    got, want = (
        torch.autograd.grad(BLOCK[name].fn(*inputs.args, **inputs.kwargs).square().sum(), leaf)[0]
        for name in ("triton_fused", "reference")
    )
    assert relative_error(got, want) < 1e-5


def test_some_filters_normed() -> None:
    inputs = _block_inputs()
    x, w1, b1, w2, *rest = inputs.args
    mixed = Inputs((x, w1, b1, w2.v, *rest), inputs.kwargs)
    got, want = (run(BLOCK[name].fn, mixed, gradients=True) for name in ("triton_fused", "reference"))
    assert relative_error(got.outputs[0], want.outputs[0]) < 1e-6
    assert all(relative_error(g, w) < 1e-5 for g, w in zip(got.gradients, want.gradients, strict=True))  # type: ignore[arg-type]


def test_results_are_channels_last() -> None:
    inputs = _block_inputs()
    y = tcn_block(*inputs.args, **inputs.kwargs)
    assert y.transpose(1, 2).is_contiguous()


def test_dtypes_that_differ_are_refused() -> None:
    x, *rest = _block_inputs().args
    with pytest.raises(ValueError, match=r"x is torch.float16 and a parameter torch.float32"):
        tcn_block(x.half(), *rest, dilation=1)
    with pytest.raises(ValueError, match=r"x is torch.float16 and a parameter torch.float32"):
        CONV["triton_phased"].fn(x.half(), torch.zeros(3, 6, 2))


def test_autocast() -> None:
    inputs = _block_inputs().map(lambda tensor: tensor.requires_grad_())
    with torch.autocast(DEVICE, torch.float16):
        y = tcn_block(*inputs.args, **inputs.kwargs)
        z = CONV["triton_phased"].fn(inputs.args[0], inputs.args[1].v)
    assert y.dtype is z.dtype is torch.float16
    y.sum().backward()
    assert inputs.args[1].v.grad.dtype is torch.float32
    half = tcn_block(*inputs.map(lambda tensor: tensor.detach().half()).args, **inputs.kwargs)
    assert torch.equal(y, half)


# ---- dropout ----


def _dropped(x: Tensor, p: float, **more: Any) -> Tensor:
    """The second half's dropout alone: its convolution yields ones."""
    zeros, ones = torch.zeros(x.shape[1], x.shape[1], 1).to(x), torch.ones(x.shape[1]).to(x)
    return tcn_block(x, zeros, ones, zeros, ones, dilation=1, dropout_p=p, training=True, **more)


@pytest.mark.parametrize("p", [0.1, pytest.param(0.5, marks=pytest.mark.slow), 0.9])
def test_dropout_keeps_its_rate_and_mean(p: float) -> None:
    torch.manual_seed(0)
    y = _dropped(torch.zeros(1, 40, 256, device=DEVICE), p)
    n = y.numel()
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=4 * (p * (1 - p) / n) ** 0.5)
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / (1 - p)))
    # No frame and no channel is drawn as another is.
    kept = (y != 0).float().flatten(0, 1)
    for sample in (kept.T, kept, kept.reshape(-1, 8).T):
        spread = sample.mean(1)
        assert (spread - (1 - p)).abs().max() < 5 * (p * (1 - p) / sample.shape[1]) ** 0.5
    assert abs(torch.corrcoef(y.flatten(0, 1)[:8]).triu(1)).max() < 0.3


def test_dropout_draws_anew_and_repeats_by_seed() -> None:
    x = torch.zeros(1, 16, 64, device=DEVICE)
    torch.manual_seed(5)
    one, other = _dropped(x, 0.5), _dropped(x, 0.5)
    assert not torch.equal(one, other)
    torch.manual_seed(5)
    assert torch.equal(_dropped(x, 0.5), one)
    whole = BLOCK["triton_fused"].fn(x, *(torch.eye(16)[..., None].to(x), torch.ones(16).to(x)) * 2, dilation=1)
    assert torch.equal(whole, torch.full_like(whole, 2.0))


def test_both_dropouts_differ() -> None:
    """With identity filters the first one's zeros would be the second one's, were they drawn alike."""
    torch.manual_seed(0)
    x, eye, ones = torch.zeros(1, 32, 200), torch.eye(32)[..., None], torch.ones(32)
    y = tcn_block(x, eye, ones, eye, None, dilation=1, dropout_p=0.5, training=True)
    assert (y == 0).float().mean().item() == pytest.approx(0.75, abs=0.03)


def test_dropout_does_not_depend_on_the_tiles() -> None:
    values = {"batch_size": 1, "in_channels": 20, "out_channels": 20, "clip_length": 90, "kernel_size": 2}
    inputs = BLOCK.inputs(BLOCK.case({**values, "dropout_p": 0.4}, training=True))
    results = []
    for fused in (0, 1):
        torch.manual_seed(1)
        with _forced(fused, "fp32", **values):
            results.append(tcn_block(*inputs.args, **inputs.kwargs))
    torch.testing.assert_close(*results)


def test_gradients_with_dropout_are_slopes() -> None:
    """Along a random direction in all arguments, with the same seed on either side."""
    values = {"batch_size": 2, "in_channels": 5, "out_channels": 7, "clip_length": 12, "dropout_p": 0.3}
    case = BLOCK.case(values, training=True)
    inputs = BLOCK.inputs(case, device=DEVICE)
    generator = torch.Generator().manual_seed(7)
    directions = [torch.randn(t.shape, generator=generator).to(t) for t in inputs.tensors()]
    noise = torch.randn(2, 7, 12, generator=generator).to(DEVICE)

    def loss(step: float) -> Tensor:
        moves = iter(directions)
        moved = inputs.map(lambda tensor: tensor + step * next(moves))
        torch.manual_seed(3)
        return (tcn_block(*moved.args, **moved.kwargs) * noise).double().sum()

    leaves = inputs.map(lambda tensor: tensor.requires_grad_())
    torch.manual_seed(3)
    y = tcn_block(*leaves.args, **leaves.kwargs)
    gradients = torch.autograd.grad((y * noise).sum(), leaves.tensors())
    slope = sum((g * d).sum().item() for g, d in zip(gradients, directions, strict=True))
    with torch.no_grad():
        secant = (loss(1e-4) - loss(-1e-4)).item() / 2e-4
    assert secant == pytest.approx(slope, rel=2e-2)


# ---- streaming ----


@pytest.mark.parametrize("chunk", [1, 4, 20])
@pytest.mark.parametrize("op_name", list(NAMES))
def test_streaming_is_the_whole_clip(op_name: str, chunk: int) -> None:
    op = OPS[op_name]
    inputs = op.inputs(
        op.case({"batch_size": 3, "in_channels": 5, "out_channels": 7, "clip_length": 20, "dilation": 3}), device=DEVICE
    )
    step, state, outputs = op[NAMES[op_name]].step, None, []
    other = None
    for x_t in inputs.args[0].split(chunk, 2):
        y_t, state = step(x_t, *inputs.args[1:], state=state, **inputs.kwargs)  # type: ignore[misc]
        _, other = op["reference"].step(x_t, *inputs.args[1:], state=other, **inputs.kwargs)  # type: ignore[misc]
        outputs.append(y_t)
    want = op["reference"].fn(*inputs.args, **inputs.kwargs)
    assert relative_error(torch.cat(outputs, 2), want) < 1e-6
    for got, wanted in zip(*((s,) if isinstance(s, Tensor) else s for s in (state, other)), strict=True):
        assert relative_error(got, wanted) < 1e-6


@pytest.mark.parametrize("channels", [24, 136], ids=["one launch", "two launches"])
@pytest.mark.parametrize("downsample", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_steps_of_narrow_and_wide_blocks(channels: int, downsample: bool) -> None:
    inputs = _block_inputs(in_channels=channels, out_channels=channels, clip_length=3, downsample=downsample)
    state, other = None, None
    for x_t in inputs.args[0].split(1, 2):
        y, state = BLOCK["triton_fused"].step(x_t, *inputs.args[1:], state=state, **inputs.kwargs)  # type: ignore[misc]
        want, other = BLOCK["reference"].step(x_t, *inputs.args[1:], state=other, **inputs.kwargs)  # type: ignore[misc]
        assert relative_error(y, want) < 1e-6
    assert isinstance(state, TcnState)
    for got, wanted in zip(state, other, strict=True):
        assert relative_error(got, wanted) < 1e-6


def test_a_step_takes_one_launch_and_no_gradient() -> None:
    inputs = _block_inputs(clip_length=1).map(lambda tensor: tensor.to("meta"))
    with launch.recording(launch.TARGETS["sm_90"]) as launches:
        triton_fused.step(*inputs.args, **inputs.kwargs)
    assert len(launches) == 1
    leaves = inputs.map(lambda tensor: tensor.requires_grad_())
    with pytest.raises(RuntimeError, match=r"a step has no gradient: call it under torch.no_grad\(\)"):
        triton_fused.step(*leaves.args, **leaves.kwargs)


def test_a_block_takes_two_launches_and_its_gradient_three() -> None:
    values = {"batch_size": 32, "clip_length": 1024}
    inputs = BLOCK.inputs(BLOCK.case(values, dtype="bf16")).map(lambda tensor: tensor.to("meta").requires_grad_())
    with launch.recording(launch.TARGETS["sm_90"]) as launches:
        y = tcn_block(*inputs.args, **inputs.kwargs)
        assert len(launches) == 2
        y.sum().backward()
    assert len(launches) == 5


# ---- torch ----


def test_opcheck_of_a_convolution() -> None:
    x, weight, bias = (torch.randn(s, device=DEVICE, requires_grad=True) for s in ((1, 4, 5), (6, 5, 2), (6,)))
    torch.library.opcheck(torch.ops.vidkernels.causal_conv1d_phased, (x, weight, bias, 2))


@pytest.mark.slow
def test_opcheck() -> None:
    ops, inputs = torch.ops.vidkernels, _block_inputs(clip_length=4)
    x, w1, b1, w2, b2, w_down, b_down = inputs.args
    frames = x.transpose(1, 2).contiguous()
    seed = torch.tensor([7], device=DEVICE)
    whole = (frames, w1.v, w1.g, b1, w2.v, w2.g, b2, w_down, b_down)
    grad = [tensor.clone().requires_grad_() for tensor in whole]
    torch.library.opcheck(ops.tcn_block_fused, (*grad, seed, 2, 0.25, True))
    plain = x.new_zeros(4, 4, 1)
    torch.library.opcheck(
        ops.tcn_block_fused, (x.new_zeros(1, 3, 4), plain, None, None, plain, *[None] * 5, 2, 0.0, False)
    )
    _, *kept = ops.tcn_block_fused(*whole, seed, 2, 0.25, True)
    dy = torch.randn(2, 4, 10, device=DEVICE)
    torch.library.opcheck(
        ops.tcn_block_fused_gradient, (dy, frames, *kept, w1.v, w1.g, w2.v, w2.g, True, 2, 0.25, [True] * 9)
    )
    torch.library.opcheck(ops.tcn_block_fused_step, (*whole, None, None, None, 2, 0.0))
    torch.library.opcheck(ops.causal_conv1d_phased_input_gradient, (dy, w1.v, 2))
    torch.library.opcheck(ops.causal_conv1d_phased_weight_gradient, (dy, frames, 3, 2))
    torch.library.opcheck(ops.causal_conv1d_phased_step, (frames, w1.v, b1, None, 2))


@pytest.mark.parametrize("op_name", list(NAMES))
def test_compiles_as_one_graph(op_name: str) -> None:
    op = OPS[op_name]
    values = {"batch_size": 2, "in_channels": 5, "out_channels": 7, "clip_length": 6}
    inputs = op.inputs(op.case(values, training=True), device=DEVICE)
    fn = op[NAMES[op_name]].fn
    got = run(torch.compile(fn, fullgraph=True, backend="aot_eager"), inputs, gradients=True)
    want = run(fn, inputs, gradients=True)
    for one, other in zip((*got.outputs, *got.gradients), (*want.outputs, *want.gradients), strict=True):
        torch.testing.assert_close(one, other)


def test_dropout_compiles() -> None:
    case = BLOCK.case({"in_channels": 5, "out_channels": 7, "clip_length": 6, "dropout_p": 0.5}, training=True)
    inputs = BLOCK.inputs(case, device=DEVICE)
    compiled = torch.compile(tcn_block, fullgraph=True, backend="aot_eager")
    one, other = (compiled(*inputs.args, **inputs.kwargs) for _ in range(2))
    assert not torch.equal(one, other)


# ---- laws, in the arithmetic that these kernels have ----


@pytest.mark.parametrize("op_name", list(NAMES))
def test_the_future_changes_nothing(op_name: str) -> None:
    op = OPS[op_name]
    inputs = op.inputs(op.case({"in_channels": 5, "out_channels": 7, "clip_length": 9, "dilation": 2}), device=DEVICE)
    x = inputs.args[0].clone()
    x[:, :, 5:] = float("nan")
    fn = op[NAMES[op_name]].fn
    got, want = fn(x, *inputs.args[1:], **inputs.kwargs), fn(*inputs.args, **inputs.kwargs)
    torch.testing.assert_close(got[:, :, :5], want[:, :, :5], rtol=0, atol=0)
    assert got[:, :, 5:].isnan().all()


def test_zero_filters_leave_the_shortcut() -> None:
    x = torch.randn(2, 8, 11, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    zeros = torch.zeros(8, 8, 3, device=DEVICE)
    assert torch.equal(tcn_block(x, zeros, None, zeros, None, dilation=2), x.relu())
    normed = WeightNorm(torch.zeros(8, 1, 1, device=DEVICE), torch.ones(8, 8, 3, device=DEVICE))
    assert torch.equal(tcn_block(x, normed, None, normed, None, dilation=2), x.relu())
