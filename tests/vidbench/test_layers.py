"""The layer lists are those of the networks, and every layer has a custom kernel."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from vidbench import layers, models
from vidkernels import OPS

BUILT_IN = ("reference", "library", "compiled", "onednn")
DTYPES = ("bf16", "fp16", "tf32", "fp32")
REFUSALS = Path(__file__).with_name("refusals.json")


def _convolutions(name: str, clip: tuple[int, ...]) -> Counter[tuple[int, ...]]:
    """Channels, kernel, stride and output size of every convolution of a model."""
    with torch.device("meta"):
        model = models.create(name, num_classes=400).eval()
    found: Counter[tuple[int, ...]] = Counter()

    def note(module: torch.nn.Conv3d, _: object, y: torch.Tensor) -> None:
        found[(module.in_channels, module.out_channels, *module.kernel_size, *module.stride, *y.shape[2:])] += 1

    for module in model.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.register_forward_hook(note)
    with torch.no_grad():
        model(torch.empty(1, *clip, device="meta"))
    return found


def _listed(name: str) -> Counter[tuple[int, ...]]:
    found: Counter[tuple[int, ...]] = Counter()
    for layer in layers.LAYERS[name]:
        case = OPS[layer.op].case(layer.case)
        if layer.op == "conv2plus1d":
            (_, m, t, h, w), y = case.spatial_shape, case.y_shape
            s_t, s_h, s_w = case.stride
            found[(case.in_channels, m, 1, 3, 3, 1, s_h, s_w, t, h, w)] += layer.count
            found[(m, case.out_channels, 3, 1, 1, s_t, 1, 1, *y[2:])] += layer.count
        else:
            found[(case.in_channels, case.y_shape[1], *case.kernel_size, *case.stride, *case.y_shape[2:])] += (
                layer.count
            )
    return found


@pytest.mark.parametrize(
    ("name", "clip"),
    [
        ("c3d", (3, 16, 112, 112)),
        ("i3d_rgb", (3, 64, 224, 224)),
        ("r2plus1d_18", (3, 16, 112, 112)),
        ("x3d_m", (3, 16, 224, 224)),
    ],
)
def test_layers_are_those_of_the_model(name: str, clip: tuple[int, ...]) -> None:
    assert _listed(name) == _convolutions(name, clip)


def test_x3d_m_has_its_published_cost() -> None:
    """Feichtenhofer (2020), table 4: 4.73 GMACs at 16 × 224²; 2048 → 400 is not in the list."""
    macs = sum(layer.count * OPS[layer.op].case(layer.case).macs for layer in layers.LAYERS["x3d_m"])
    assert macs + 2048 * 400 == pytest.approx(4.73e9, rel=0.01)


def _refusals() -> dict[str, list[str]]:
    """For every custom implementation: the reasons for which it refuses some layer on a GPU, and how many."""
    counted: dict[str, Counter[str]] = {}
    cuda = torch.device("cuda")
    for layer in layers.distinct():
        op = OPS[layer.op]
        for name, implementation in op.implementations.items():
            if name in BUILT_IN:
                continue
            reasons = counted.setdefault(f"{op.name}/{name}", Counter())
            for dtype in DTYPES:
                for training in (False, True):
                    case = op.case(layer.case, dtype=dtype, training=training)
                    if why := implementation.why_not(case, cuda):
                        reasons[why] += 1
    return {name: sorted(f"{count} × {why}" for why, count in reasons.items()) for name, reasons in counted.items()}


@pytest.mark.parametrize("training", [False, True], ids=["forward", "train"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layer_has_a_custom_kernel(dtype: str, training: bool) -> None:
    for layer in layers.distinct():
        op = OPS[layer.op]
        case = op.case(layer.case, dtype=dtype, training=training)
        reasons = {
            name: implementation.why_not(case, torch.device("cuda"))
            for name, implementation in op.implementations.items()
            if name not in BUILT_IN
        }
        assert None in reasons.values(), f"{op.name} {dict(layer.case)}: {reasons}"


def test_refusals_only_shrink() -> None:
    """The table is committed: a kernel that refuses more than before fails, one that refuses less is written down.

    Rewrite it with `python tests/vidbench/test_layers.py` and look at the difference.
    """
    assert _refusals() == json.loads(REFUSALS.read_text())


if __name__ == "__main__":
    REFUSALS.write_text(json.dumps(_refusals(), indent=1, ensure_ascii=False) + "\n")
