"""`implementation="auto"`: measured before estimated, exact before near, and never silently something else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import TYPICAL

import vidkernels
from vidkernels import OPS, choosing, tuning
from vidkernels.checking import compare, oracle, run
from vidkernels.launch import TARGETS


@pytest.fixture(autouse=True)
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No tables but those that a test writes."""
    monkeypatch.setenv("VIDKERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "none")
    tuning.table.cache_clear()
    choosing._choices.clear()
    yield tmp_path / "tables"
    tuning.table.cache_clear()
    choosing._choices.clear()


FACADE = {name: getattr(vidkernels, name) for name in OPS}


@pytest.mark.parametrize("training", [False, True], ids=["forward", "train"])
@pytest.mark.parametrize("op_name", list(OPS))
def test_auto_computes_the_op(op_name: str, training: bool) -> None:
    op = OPS[op_name]
    case = op.case(TYPICAL[op_name], training=training)
    inputs = op.inputs(case)

    def auto(*args: Any, **kwargs: Any) -> Any:
        return FACADE[op_name](*args[: _positional(op_name)], **_named(op_name, args), **kwargs, implementation="auto")

    want = oracle(op, case, inputs, gradients=training)
    library = compare(op, run(op["library"].fn, inputs, gradients=training), want)
    assert not compare(op, run(auto, inputs, gradients=training), want).failures(op, case, library)


def _positional(op_name: str) -> int:
    return 3 if op_name == "conv3d" else 99


def _named(op_name: str, args: tuple[Any, ...]) -> dict[str, Any]:
    return {"residual": args[3]} if op_name == "conv3d" and len(args) > 3 else {}


def test_measured_times_decide(tables: Path) -> None:
    op = OPS["conv3d"]
    case = op.case({**TYPICAL["conv3d"], "kernel_size": (1, 1, 1)})
    key = choosing.case_key(op, case)
    times = {"library:contiguous": 3e-3, "library:channels_last": 1e-3, "matmul": 2e-3}
    tuning.extend(tables / "cpu.json", "implementations", "conv3d/forward", {key.text: times})
    choice = choosing.choose(op, case)
    assert (choice.implementation, choice.memory_format, choice.source) == ("library", "channels_last", "exact")
    assert choice.seconds == times
    larger = op.case({**TYPICAL["conv3d"], "kernel_size": (1, 1, 1), "batch_size": 16})
    assert choosing.choose(op, larger).source == f"nearest: {key.text}"
    training = op.case({**TYPICAL["conv3d"], "kernel_size": (1, 1, 1)}, training=True)
    assert choosing.choose(op, training).source == "estimate"


def test_what_cannot_run_is_not_chosen(tables: Path) -> None:
    op = OPS["conv3d"]
    case = op.case(TYPICAL["conv3d"])
    times = {"matmul": 1e-9, "library:contiguous": 1.0}
    key = choosing.case_key(op, case).text
    tuning.extend(tables / "cpu.json", "implementations", "conv3d/forward", {key: times})
    choice = choosing.choose(op, case)
    assert choice.implementation == "library"
    assert "matmul" in choice.refused


def test_cpu_takes_the_layout_and_library_that_are_fast_there() -> None:
    """Without a table: a channels-last depthwise convolution, and oneDNN for a single clip."""
    depthwise = choosing.choose(OPS["depthwise_conv3d"], OPS["depthwise_conv3d"].case({}))
    assert (depthwise.implementation, depthwise.memory_format) == ("library", "channels_last")
    assert choosing.choose(OPS["conv3d"], OPS["conv3d"].case({})).implementation == "onednn"
    half = OPS["conv3d"].case({}, dtype="fp16")
    assert choosing.choose(OPS["conv3d"], half).implementation == "library"


@pytest.mark.parametrize("op_name", list(OPS))
def test_reference_and_compiled_are_never_chosen(op_name: str) -> None:
    for device, gpu in (("cpu", None), ("meta", TARGETS["sm_80"]), ("meta", TARGETS["sm_90"])):
        choice = choosing.choose(OPS[op_name], OPS[op_name].case(TYPICAL[op_name]), device, gpu=gpu)
        assert not {"reference", "compiled"} & {way.partition(":")[0] for way in choice.seconds}


def test_explain_says_what_and_why() -> None:
    x = torch.empty(8, 54, 16, 56, 56, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(54, 1, 3, 3, 3, dtype=torch.bfloat16, device="meta")
    choice = vidkernels.explain("depthwise_conv3d", x, weight, padding=1, device="meta", gpu=TARGETS["sm_90"])
    assert choice.implementation in ("cuda_rolling", "triton_direct")
    text = str(choice)
    assert text.startswith(f"depthwise_conv3d: {choice.implementation} (estimate; bf16 54 k3,3,3,1,1,1,1,1,1 p19)")
    assert "library:channels_last" in text
    assert "estimated" in text


def test_explain_names_launch_configurations() -> None:
    x = torch.empty(2, 64, 512, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(64, 64, 3, dtype=torch.bfloat16, device="meta")
    choice = vidkernels.explain("causal_conv1d", x, weight, device="meta", gpu=TARGETS["sm_90"])
    assert choice.launches
    assert all(chosen.kernel.startswith("causal_conv1d/") for chosen in choice.launches)
    assert choice.launches[0].kernel in str(choice)


def test_unknown_op_is_named() -> None:
    with pytest.raises(ValueError, match=r"no op 'conv4d': known: conv3d, depthwise_conv3d"):
        vidkernels.explain("conv4d", torch.empty(1))


@pytest.mark.parametrize("op_name", list(OPS))
def test_auto_in_a_compiled_graph(op_name: str) -> None:
    """Shapes are constants of a graph, and the choice with them: no graph break."""
    op = OPS[op_name]
    inputs = op.inputs(op.case(TYPICAL[op_name]))
    call = FACADE[op_name]

    def auto(*args: Any) -> Any:
        return call(*args, **inputs.kwargs, implementation="auto")

    graph = torch.compile(auto, fullgraph=True, backend="aot_eager")
    got, want = graph(*inputs.args), auto(*inputs.args)
    for one, other in zip(_flat(got), _flat(want), strict=True):
        torch.testing.assert_close(one, other)
    torch.compiler.reset()


def _flat(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [tensor for part in value for tensor in _flat(part)]
