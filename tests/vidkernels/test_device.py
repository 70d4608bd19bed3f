"""What only a GPU shows: every launch configuration, CUDA graphs, streams, large offsets, autocast, torch.compile."""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vidbench.environment import precision
from vidbench.tune import PEERS, bind, case_of, errors, truth, tune
from vidkernels import OPS, Inputs, Op
from vidkernels.checking import Results, relative_error
from vidkernels.op import Case, Unavailable, tensors_of

DEVICE = "cuda"
DTYPES = ("bf16", "fp16", "tf32", "fp32")
DIRECTIONS = ("forward", "input_gradient", "weight_gradient")

pytestmark = pytest.mark.gpu

_CLIP = {"batch_size": 2, "clip_length": 6, "height": 20, "width": 24}
_RAGGED = {"batch_size": 1, "clip_length": 5, "height": 17, "width": 13}
_SEQUENCE = {"batch_size": 3, "clip_length": 300}

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "conv3d": {
        "several tiles": {**_CLIP, "in_channels": 72, "out_channels": 136, "bias": True},
        "ragged": {**_RAGGED, "in_channels": 19, "out_channels": 21, "stride": (1, 2, 2)},
        "stem": {**_CLIP, "in_channels": 3, "out_channels": 64, "kernel_size": (3, 7, 7), "stride": (1, 2, 2)},
        "pointwise": {**_CLIP, "in_channels": 72, "out_channels": 136, "kernel_size": (1, 1, 1)},
    },
    "depthwise_conv3d": {
        "several tiles": {**_CLIP, "in_channels": 72, "bias": True, "activation": "silu"},
        "ragged": {**_RAGGED, "in_channels": 19, "stride": (1, 2, 2)},
    },
    "conv2plus1d": {
        "several tiles": {**_CLIP, "in_channels": 64, "out_channels": 72, "mid_channels": 144},
        "ragged": {**_RAGGED, "in_channels": 19, "out_channels": 21, "stride": (2, 2, 2)},
    },
    "causal_conv1d": {
        "several tiles": {**_SEQUENCE, "in_channels": 72, "out_channels": 136, "dilation": 4},
        "ragged": {"batch_size": 1, "clip_length": 77, "in_channels": 19, "out_channels": 21, "dilation": 3},
    },
    "tcn_block": {
        "several tiles": {**_SEQUENCE, "in_channels": 64, "out_channels": 64, "dilation": 4},
        "ragged": {"batch_size": 1, "clip_length": 77, "in_channels": 19, "out_channels": 21, "dilation": 3},
    },
    "rnn": {
        "several tiles": {"batch_size": 33, "clip_length": 9, "input_features": 72, "hidden_size": 128},
        "ragged": {"batch_size": 5, "clip_length": 4, "input_features": 19, "hidden_size": 21},
        "wide": {"batch_size": 17, "clip_length": 5, "input_features": 64, "hidden_size": 512},
    },
    "lstm": {
        "several tiles": {"batch_size": 33, "clip_length": 9, "input_features": 72, "hidden_size": 128},
        "ragged": {"batch_size": 5, "clip_length": 4, "input_features": 19, "hidden_size": 21},
        "wide": {"batch_size": 17, "clip_length": 5, "input_features": 64, "hidden_size": 512},
    },
}
"""Cases of more than one block, with remainders."""

CUSTOM = [(op.name, name) for op in OPS.values() for name in op.implementations if name not in PEERS]


@pytest.fixture(autouse=True)
def _a_device() -> None:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _arithmetic(request: pytest.FixtureRequest) -> Iterator[None]:
    """fp32 means fp32, but for tf32."""
    dtype = request.node.callspec.params.get("dtype", "fp32") if hasattr(request.node, "callspec") else "fp32"
    with precision(dtype):
        yield


def _case(op: Op, name: str, values: dict[str, Any], dtype: str, direction: str) -> Case:
    case = case_of(op, values, dtype, direction)
    if why := op[name].why_not(case, DEVICE):
        pytest.skip(why)
    return case


def _typical(op_name: str, name: str, dtype: str, direction: str) -> tuple[Op, Case, Inputs]:
    """The first of an op's cases that an implementation takes."""
    op, reason = OPS[op_name], ""
    for values in CASES[op_name].values():
        case = case_of(op, values, dtype, direction)
        if (why := op[name].why_not(case, DEVICE)) is None:
            return op, case, op.inputs(case, device=DEVICE)
        reason = why
    pytest.skip(reason)


def _tensors(results: Results) -> list[Tensor]:
    return [tensor for tensor in (*results.outputs, *results.gradients) if tensor is not None]


def _assert_same(got: Results, want: Results) -> None:
    for g, w in zip(_tensors(got), _tensors(want), strict=True):
        assert torch.equal(g, w), f"relative difference {relative_error(g, w):.2e}"


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("op_name", "name", "what", "dtype"),
    [
        (op_name, name, what, dtype)
        for op_name, name in CUSTOM
        for what in CASES[op_name]
        # The other cases differ by size, not by dtype.
        for dtype in (DTYPES if what == "several tiles" else DTYPES[:1])
    ],
)
def test_every_configuration_agrees_with_float64(
    op_name: str, name: str, what: str, dtype: str, direction: str
) -> None:
    """The border alone too. Those of 8 warps are named: a compiler has got such wrong (pytorch#173068)."""
    op = OPS[op_name]
    _case(op, name, CASES[op_name][what], dtype, direction)
    try:
        tuned = tune(op, name, CASES[op_name][what], dtype=dtype, device=DEVICE, directions=(direction,), seconds=0)
    except Unavailable as why:
        pytest.skip(str(why))
    wrong = [
        f"{'8 WARPS ' if trial.config.get('num_warps') == 8 else ''}{one.kernel} {dict(trial.config)}: {trial.reason}"
        for one in tuned
        for trial in one.trials
        if trial.reason
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("direction", ["forward", "train"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op_name", "name"), CUSTOM)
def test_repeats_bit_for_bit(op_name: str, name: str, dtype: str, direction: str) -> None:
    op, _, inputs = _typical(op_name, name, dtype, direction)
    first, second = (bind(op[name].fn, inputs, direction)() for _ in range(2))
    _assert_same(first, second)


@pytest.mark.parametrize("direction", ["forward", "train"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("op_name", "name"), CUSTOM)
def test_a_graph_replays_the_same_on_other_data(op_name: str, name: str, dtype: str, direction: str) -> None:
    op, case, inputs = _typical(op_name, name, dtype, direction)
    call = bind(op[name].fn, inputs, direction)
    call()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    other = op.inputs(case, seed=5, device=DEVICE)
    with torch.no_grad():
        for mine, new in zip(inputs.tensors(), other.tensors(), strict=True):
            mine.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    _assert_same(captured, call())


@pytest.mark.parametrize("direction", ["forward", "train"])
@pytest.mark.parametrize(("op_name", "name"), CUSTOM)
def test_works_on_the_current_stream(op_name: str, name: str, direction: str) -> None:
    """Inputs that arrive late on a side stream: a kernel on any other stream would read what was there before."""
    op, case, inputs = _typical(op_name, name, "bf16", direction)
    want = bind(op[name].fn, inputs, direction)()
    late = op.inputs(case, seed=5, device=DEVICE)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), torch.no_grad():
        torch.cuda._sleep(100_000_000)
        for mine, new in zip(late.tensors(), inputs.tensors(), strict=True):
            mine.copy_(new)
    with torch.cuda.stream(side):
        got = bind(op[name].fn, late, direction)()
    side.synchronize()
    _assert_same(got, want)


@pytest.mark.parametrize(("op_name", "name"), CUSTOM)
def test_works_on_a_second_device(op_name: str, name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    op, case, inputs = _typical(op_name, name, "bf16", "forward")
    want = bind(op[name].fn, inputs, "forward")()
    got = bind(op[name].fn, op.inputs(case, device="cuda:1"), "forward")()
    for g, w in zip(_tensors(got), _tensors(want), strict=True):
        assert torch.equal(g.to(w.device), w)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("op_name", "name"), CUSTOM)
def test_autocast_computes_in_its_dtype(op_name: str, name: str, dtype: str) -> None:
    """float32 in, 16 bits out, float32 gradients: as the library does it."""
    op, _, rounded = _typical(op_name, name, dtype, "train")
    inputs = rounded.map(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
    with torch.autocast(DEVICE, dtype=rounded.args[0].dtype):
        got = bind(op[name].fn, inputs, "train", noise_dtype=rounded.args[0].dtype)()
    assert {output.dtype for output in got.outputs} == {rounded.args[0].dtype}
    assert {gradient.dtype for gradient in got.gradients if gradient is not None} == {torch.float32}
    case = case_of(op, _values(op_name, name, dtype), dtype, "train")
    want = truth(op, rounded, "train", dtype)
    library = errors(op, bind(op["library"].fn, rounded, "train")(), want)
    assert not errors(op, got, want).failures(op, case, library)


def _values(op_name: str, name: str, dtype: str) -> dict[str, Any]:
    op = OPS[op_name]
    possible = CASES[op_name].values()
    return next(v for v in possible if op[name].why_not(case_of(op, v, dtype, "train"), DEVICE) is None)


@pytest.mark.parametrize("direction", ["forward", "train"])
@pytest.mark.parametrize(("op_name", "name"), CUSTOM)
def test_compiles_in_one_graph(op_name: str, name: str, direction: str) -> None:
    op, _, inputs = _typical(op_name, name, "bf16", direction)
    want = bind(op[name].fn, inputs, direction)()
    torch._dynamo.reset()
    compiled: Callable[..., Any] = torch.compile(op[name].fn, fullgraph=True, dynamic=False)
    got = bind(compiled, inputs, direction)()
    for g, w in zip(_tensors(got), _tensors(want), strict=True):
        # What the compiler fuses around a kernel may round once less.
        assert relative_error(g, w) <= op.tolerances["bf16"].forward


# More elements than 31 bits count, with (N, C, …) sizes of which a few samples are compared.
_PAST_INT32: dict[str, tuple[tuple[int, ...], tuple[tuple[int, ...], ...], dict[str, Any]]] = {
    "conv3d": ((688, 64, 16, 56, 56), ((64, 64, 3, 3, 3),), {"padding": 1}),
    "depthwise_conv3d": ((688, 64, 16, 56, 56), ((64, 1, 3, 3, 3),), {"padding": 1}),
    "causal_conv1d": ((33_000, 64, 1024), ((64, 64, 3),), {"dilation": 4}),
}


@pytest.fixture
def _alone() -> Iterator[None]:
    """One after another, whatever the number of processes: each takes some 30 GiB."""
    with open(Path(tempfile.gettempdir()) / "vidkernels-large.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("op_name", "name"), [custom for custom in CUSTOM if custom[0] in _PAST_INT32])
def test_offsets_past_31_bits(op_name: str, name: str, direction: str) -> None:
    shape, weights, parameters = _PAST_INT32[op_name]
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free device memory")
    op, fn = OPS[op_name], OPS[op_name][name].fn
    generator = torch.Generator(DEVICE).manual_seed(0)
    channels_last = (shape[0], *shape[2:], shape[1])
    options: dict[str, Any] = {"generator": generator, "device": DEVICE, "dtype": torch.bfloat16}
    x = torch.randn(channels_last, **options).movedim(-1, 1)
    assert x.numel() > 2**31
    weight = [torch.randn(size, **options) / size[1:].numel() ** 0.5 for size in map(torch.Size, weights)]
    small = op.case_of(x[:2], *weight, **parameters)
    if why := op[name].why_not(small, DEVICE):
        pytest.skip(why)
    inputs = Inputs((x, *weight), parameters)
    got = bind(fn, inputs, direction)()
    if direction == "weight_gradient":
        want = _summed(op, inputs)
        for g, w in zip(got.gradients[1:], want, strict=True):
            assert g is not None
            assert relative_error(g, w) <= 2 * op.tolerances["bf16"].weight_gradient
        return
    (whole,) = _tensors(got)
    for rows in (slice(0, 2), slice(-2, None)):
        part = Inputs((x[rows], *weight), parameters)
        if direction == "forward":
            (want_part,) = tensors_of(op["library"].fn(*part.args, **parameters))
        else:
            # The noise of the whole, cut to these samples.
            leaf = x[rows].detach().requires_grad_()
            y = op["library"].fn(leaf, *weight, **parameters)
            (want_part,) = torch.autograd.grad(y, leaf, _noise_rows(y, shape[0], rows))
        assert relative_error(whole[rows], want_part.detach()) <= 2 * op.tolerances["bf16"].forward


def _noise_rows(y: Tensor, samples: int, rows: slice) -> Tensor:
    """What `bind` differentiates against, of some samples."""
    generator = torch.Generator(y.device).manual_seed(1)
    noise = torch.randn((samples, *y.shape[1:]), generator=generator, device=y.device)
    return noise[rows].to(y.dtype)


def _summed(op: Op, inputs: Inputs, samples: int = 16) -> list[Tensor]:
    """The library's weight gradients, a few samples at a time, summed in float32."""
    x, *weights = inputs.args
    sums = [torch.zeros(weight.shape, device=weight.device) for weight in weights]
    step = x.shape[0] // samples
    for start in range(0, x.shape[0], step):
        leaves = [weight.detach().requires_grad_() for weight in weights]
        y = op["library"].fn(x[start : start + step], *leaves, **inputs.kwargs)
        noise = _noise_rows(y, x.shape[0], slice(start, start + step))
        for total, gradient in zip(sums, torch.autograd.grad(y, leaves, noise), strict=True):
            total += gradient.float()
    return sums
