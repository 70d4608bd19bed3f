"""`vidbench tune`: every way is checked and timed, the table is what `auto` reads, and a second run goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vidbench import weigh
from vidbench.cli import app
from vidbench.layers import LAYERS, Layer
from vidbench.sweep import RequestError
from vidkernels import OPS, choosing, tuning

SMALL = Layer("conv3d", {"in_channels": 4, "out_channels": 4, "clip_length": 3, "height": 6, "width": 6})
DEPTHWISE = Layer("depthwise_conv3d", {"in_channels": 4, "clip_length": 3, "height": 6, "width": 6})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VIDKERNELS_CACHE", str(tmp_path))
    tuning.table.cache_clear()
    return tmp_path / "tables" / "cpu.json"


def test_every_way_is_timed_and_auto_takes_the_fastest(cache: Path) -> None:
    found = [
        one for _, _, one in weigh.weigh_layers([SMALL, DEPTHWISE], cache, device="cpu", dtypes=["fp32"], seconds=0.002)
    ]
    assert [(one.layer.op, one.direction) for one in found] == [
        ("conv3d", "forward"),
        ("conv3d", "train"),
        ("depthwise_conv3d", "forward"),
        ("depthwise_conv3d", "train"),
    ]
    assert set(found[0].seconds) == {"library:contiguous", "library:channels_last", "onednn"}
    assert all(0 < seconds < 1 for one in found for seconds in one.seconds.values())
    op = OPS["conv3d"]
    choice = choosing.choose(op, op.case({"batch_size": 1, **SMALL.case}))
    assert choice.source == "exact"
    assert choice.seconds == found[0].seconds
    assert choice.seconds[_way(choice)] == min(choice.seconds.values())


def _way(choice: choosing.Choice) -> str:
    return f"{choice.implementation}:{choice.memory_format}" if choice.memory_format else choice.implementation


def test_a_wrong_way_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS["conv3d"]
    right = op["onednn"]
    monkeypatch.setitem(
        op.implementations, "onednn", replace(right, fn=lambda *args, **kwargs: 1.001 * right.fn(*args, **kwargs))
    )
    found = weigh.weigh(op, dict(SMALL.case), dtype="fp32", device="cpu", direction="forward", seconds=0.001)
    assert "onednn" not in found.seconds
    assert "output error 1.00e-03 exceeds 2.0e-06" in found.reasons["onednn"]


def test_what_is_known_is_passed_over(cache: Path) -> None:
    def run() -> int:
        layers = weigh.weigh_layers(
            [SMALL], cache, device="cpu", dtypes=["fp32"], directions=["forward"], seconds=0.001
        )
        return len(list(layers))

    assert (run(), run()) == (1, 0)
    assert list(json.loads(cache.read_text())["implementations"]) == ["conv3d/forward"]


def test_layers_of_a_request() -> None:
    chosen = weigh.RequestedLayers(models=("x3d_m", "x3d_m"), ops=("depthwise_conv3d",))
    assert {layer.op for layer in chosen.layers()} == {"depthwise_conv3d"}
    assert len(chosen.layers()) == len([layer for layer in LAYERS["x3d_m"] if layer.op == "depthwise_conv3d"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "c4d"], "unknown model 'c4d'"),
        (["--op", "conv4d"], "unknown op 'conv4d'"),
        (["--dtype", "fp8"], "unknown dtype 'fp8'"),
        (["--mode", "stream"], "unknown mode 'stream'"),
        (["--device", "tpu"], "unknown device 'tpu'"),
    ],
)
def test_a_wrong_request_is_one_line(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["tune", *arguments])
    assert isinstance(result.exception, RequestError)
    assert message in str(result.exception)


def test_the_command_fills_the_table(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYERS, "c3d", (SMALL,))
    result = CliRunner().invoke(app, ["tune", "--model", "c3d", "--mode", "forward"])
    assert result.exit_code == 0, result.output
    assert "[1/1] conv3d batch_size=1" in result.output
    assert result.output.strip().endswith(str(cache))
    assert json.loads(cache.read_text())["implementations"]["conv3d/forward"]
