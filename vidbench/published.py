"""Published parameters and multiply-adds of every model beside ours.

python -m vidbench.published            is docs/models.md what these sources make?
python -m vidbench.published --write    write it
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

from vidbench.models import MODELS

PAGE = Path("docs/models.md")


@dataclass(frozen=True)
class Figure:
    """What was published of one model at one size."""

    model: str
    num_classes: int
    clip: tuple[int, int]
    """Frames, and pixels of the square frame."""
    params: str = ""
    """As printed, such as 33.3M; empty where nothing was."""
    macs: str = ""
    """As printed, such as 41.5G, whatever it was called."""
    source: str = ""
    note: str = ""
    """Why ours differs, where it does."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `vidbench.models.create`."""


_TORCHVISION = "torchvision"
_VMZ = "VMZ (the authors' code)"
_CUT = "the figure is cut off, not rounded"
_I3D_MACS = (
    "108 is none of the ways to count the published layers: 111.15 with the taps on padding, 104.40 without them; "
    "the network that was counted is not published"
)
_THOP = (
    "the authors' counter divides strided outputs by the stride a second time, counts a linear layer twice, and adds "
    "batch norm and ReLU"
)

FIGURES: tuple[Figure, ...] = (
    Figure("single_frame", 487, (1, 170)),
    Figure("frame_pool_avg", 1000, (1, 224), "11,689,512", "1.814G", "torchvision, ResNet-18"),
    Figure(
        "frame_pool_avg",
        1000,
        (1, 224),
        "25,557,032",
        "4.089G",
        "torchvision, ResNet-50",
        options={"backbone": "resnet50"},
    ),
    Figure("frame_pool_max", 400, (16, 224)),
    Figure("frame_pool_svm", 400, (16, 224)),
    Figure("early_fusion", 487, (10, 170)),
    Figure("late_fusion", 487, (16, 170)),
    Figure("slow_fusion", 487, (10, 170)),
    Figure("two_stream", 101, (11, 224)),
    Figure("cnn_rnn", 400, (16, 224)),
    Figure("cnn_lstm", 400, (16, 224)),
    Figure("cnn_tcn", 400, (16, 224)),
    Figure(
        "tcn",
        1,
        (600, 0),
        "70K",
        "",
        "arXiv:1803.01271, table 1: adding problem, T = 600",
        options={"input_features": 2, "hidden_size": 24, "kernel_size": 8, "levels": 8},
    ),
    Figure("ed_tcn", 18, (64, 0)),
    Figure("c3d", 101, (16, 112), "78.4M", "38.5G", "mmaction2"),
    Figure("i3d_rgb", 400, (64, 224), "", "108G", "arXiv:1812.03982, table 2", _I3D_MACS),
    Figure("i3d_flow", 400, (65, 224)),
    Figure("i3d_two_stream", 400, (65, 224), "25M", "", "arXiv:1705.07750, table 1"),
    Figure("r3d_18", 400, (16, 112), "33,371,472", "40.697G", _TORCHVISION),
    Figure("r3d_34", 400, (16, 112)),
    Figure("mc3_18", 400, (16, 112), "11,695,440", "43.343G", _TORCHVISION),
    Figure("r2plus1d_18", 400, (16, 112), "31,505,325", "40.519G", _TORCHVISION),
    Figure(
        "r2plus1d_18",
        400,
        (16, 112),
        "33.3M",
        "41.5G",
        _VMZ,
        _CUT,
        {"mid_channels": "per_convolution"},
    ),
    Figure("r2plus1d_34", 400, (32, 128), "63.6M", "199.0G", _VMZ, _CUT),
    Figure("x3d_s", 400, (13, 160), "3.79M", "1.96G", "pytorchvideo, PySlowFast"),
    Figure("x3d_m", 400, (16, 224), "3.79M", "4.73G", "pytorchvideo, PySlowFast"),
    Figure("mobilenet_v2_3d", 600, (16, 112), "3.12M", "446M", "arXiv:1904.02422, table 2", _THOP),
    Figure(
        "shufflenet_v2_3d",
        600,
        (16, 112),
        "6.64M",
        "360M",
        "arXiv:1904.02422, table 2",
        _THOP,
        {"width_multiplier": 2.0},
    ),
)
"""At least one line a model; those without a published figure tell ours."""

_LETTERS = {"K": 10**3, "M": 10**6, "G": 10**9}


def agrees(printed: str, ours: int) -> bool:
    """Whether a count rounds to a printed figure, such as 33.4M or 33,371,472."""
    factor = _LETTERS.get(printed[-1], 1)
    digits = Decimal(printed.rstrip("KMG").replace(",", ""))
    half = Decimal(factor).scaleb(int(digits.as_tuple().exponent)) / 2
    return abs(ours - digits * factor) <= (half if factor > 1 else 0)


@cache
def _ours(position: int) -> tuple[int, int]:
    from vidbench.info import count_modules, without_memory
    from vidbench.models import create, input_shapes

    figure = FIGURES[position]
    frames, pixels = figure.clip
    with without_memory():
        model = create(
            figure.model,
            num_classes=figure.num_classes,
            clip_length=frames,
            input_size=pixels or None,
            **figure.options,
        )
    features = figure.options.get("input_features")
    inputs = input_shapes(
        figure.model, clip_length=frames, height=pixels or None, width=pixels or None, input_features=features
    )
    modules, _ = count_modules(model, inputs)
    return sum(module.params for module in modules), sum(module.macs for module in modules)


def ours(figure: Figure) -> tuple[int, int]:
    """Our (parameters, multiply-adds) of the same model at the same size."""
    return _ours(FIGURES.index(figure))


def page() -> str:
    """docs/models.md."""
    lines = [
        "# Models: published figures and ours",
        "",
        "Made by `python -m vidbench.published --write`; a test holds it against the sources. Of one clip;",
        "multiply-adds (MACs), whatever the source calls them. `vidbench info MODEL` has the same by layer.",
        "",
        "| model | classes | clip | parameters, published | ours | MACs, published | ours | published by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    notes: list[str] = []
    for figure in FIGURES:
        frames, pixels = figure.clip
        clip = f"{frames}×{pixels}²" if pixels else f"{frames} × {figure.options.get('input_features', 256)}"
        params, macs = ours(figure)
        options = "".join(f", {key}={value}" for key, value in figure.options.items() if key != "input_features")
        mark = ""
        if figure.note:
            if figure.note not in notes:
                notes.append(figure.note)
            mark = f" [{notes.index(figure.note) + 1}]"
        counted = f"{macs / 1e9:.3f}G" if macs >= 1e9 else f"{macs / 1e6:.2f}M"
        shown = {
            "params": figure.params + (mark if figure.params and not agrees(figure.params, params) else ""),
            "macs": figure.macs + (mark if figure.macs and not agrees(figure.macs, macs) else ""),
        }
        cells = (
            f"`{figure.model}`{options}",
            str(figure.num_classes),
            clip,
            shown["params"],
            f"{params:,}",
            shown["macs"],
            counted,
            figure.source,
        )
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |"))
    lines += ["", *(f"{number}. {note[0].upper()}{note[1:]}." for number, note in enumerate(notes, start=1)), ""]
    lines += ["Papers:", ""]
    lines += [f"- `{spec.name}`: {spec.paper}" for spec in MODELS.values()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes the page, or says that it is out of date (exit code 1)."""
    parser = argparse.ArgumentParser(prog="python -m vidbench.published", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the page instead of comparing it")
    if parser.parse_args().write:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
        sys.exit(f"{PAGE} is out of date: python -m vidbench.published --write")


if __name__ == "__main__":
    main()
