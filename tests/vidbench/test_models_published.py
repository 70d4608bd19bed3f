"""Every published figure of parameters and multiply-adds: equal, or the difference explained and the reason tested."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vidbench.info import without_memory
from vidbench.models import MODELS, create
from vidbench.published import FIGURES, Figure, agrees, ours, page

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def label(figure: Figure) -> str:
    return "-".join((figure.model, *map(str, figure.options.values())))


@pytest.mark.parametrize("figure", FIGURES, ids=label)
def test_ours_is_the_published_figure_or_says_why_not(figure: Figure) -> None:
    for printed, count in zip((figure.params, figure.macs), ours(figure), strict=True):
        if printed:
            assert agrees(printed, count) or figure.note, f"{printed} published, {count:,} ours"


def test_a_note_explains_a_difference_that_is_there() -> None:
    for figure in FIGURES:
        counts = zip((figure.params, figure.macs), ours(figure), strict=True)
        differs = any(printed and not agrees(printed, count) for printed, count in counts)
        assert differs == bool(figure.note), figure.model


def test_every_model_has_a_line() -> None:
    assert {figure.model for figure in FIGURES} == set(MODELS)


@pytest.mark.parametrize(
    ("printed", "count", "same"),
    [
        ("33.4M", 33_371_472, True),
        ("33.3M", 33_371_472, False),
        ("33,371,472", 33_371_472, True),
        ("33,371,472", 33_371_473, False),
        ("108G", 107_600_000_000, True),
        ("108G", 107_400_000_000, False),
        ("70K", 70_369, True),
    ],
)
def test_agrees(printed: str, count: int, same: bool) -> None:
    assert agrees(printed, count) is same


def _run(model: nn.Module, shape: tuple[int, ...], note: Callable[[nn.Module, Any, Any], None]) -> None:
    for module in model.modules():
        module.register_forward_hook(note)
    with torch.no_grad():
        model.eval()(torch.empty(shape, device="meta"))


def efficient_3d_count(name: str, width: float) -> int:
    """What the counter in the repository of Efficient-3DCNNs makes of a network."""
    total = 0

    def note(module: nn.Module, args: Any, y: Any) -> None:
        nonlocal total
        if isinstance(module, nn.Conv3d):
            taps = module.kernel_size[0] * module.kernel_size[1] * module.kernel_size[2]
            t, h, w = (size // step for size, step in zip(y.shape[2:], module.stride, strict=True))
            total += t * h * w * module.out_channels * (taps * module.in_channels // module.groups)
        elif isinstance(module, nn.BatchNorm3d):
            total += 2 * args[0].numel()
        elif isinstance(module, (nn.ReLU, nn.ReLU6)):
            total += args[0].numel()
        elif isinstance(module, nn.Linear):
            total += (2 * module.in_features - 1) * y.numel()

    with without_memory():
        model = create(name, num_classes=600, width_multiplier=width)
    _run(model, (1, 3, 16, 112, 112), note)
    return total


@pytest.mark.parametrize(
    ("name", "width", "printed"), [("mobilenet_v2_3d", 1.0, "446M"), ("shufflenet_v2_3d", 2.0, "360M")]
)
def test_the_mobile_networks_as_their_authors_count(name: str, width: float, printed: str) -> None:
    assert printed in {figure.macs for figure in FIGURES if figure.model == name}
    assert agrees(printed, efficient_3d_count(name, width))


def test_i3d_without_the_taps_on_padding() -> None:
    total = 0

    def inside(size: int, taps: int, step: int) -> int:
        """Taps of all outputs along an axis that meet a frame, a row or a column; SAME padding."""
        outputs = -(-size // step)
        before = max((outputs - 1) * step + taps - size, 0) // 2
        return sum(0 <= output * step - before + tap < size for output in range(outputs) for tap in range(taps))

    def note(module: nn.Module, args: Any, y: Any) -> None:
        nonlocal total
        if isinstance(module, nn.Conv3d):
            met = 1
            for size, taps, step in zip(args[0].shape[2:], module.kernel_size, module.stride, strict=True):
                met *= inside(size, taps, step)
            total += met * module.in_channels * module.out_channels

    with without_memory():
        model = create("i3d_rgb")
    _run(model, (1, 3, 64, 224, 224), note)
    assert agrees("104.40G", total)


def test_the_page_is_up_to_date() -> None:
    """Rewrite it with `python -m vidbench.published --write` and look at the difference."""
    assert PAGE.read_text(encoding="utf-8") == page()
