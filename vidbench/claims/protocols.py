"""What the claims share: sizes, recipes, and effects that follow from the outcomes of their experiments."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vidbench.claims import Experiment, Plot, Prediction, at_best_rate, per_seed
from vidbench.sweep import Value

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Size:
    """How much is done."""

    name: str
    seeds: int
    patience: int
    """Factor on the steps of every training."""
    memory_lengths: tuple[int, ...]
    """Frames over which something is to be remembered."""
    timed_lengths: tuple[int, ...]
    """Frames of the clips that are timed: fields of a TCN of three taps, which so is no deeper than it must be."""
    device: str = "cpu"
    """Where it is done: what is parallel shows in another way on a few cores than on a GPU."""


SIZES = {
    size.name: size
    for size in (
        Size("small", 3, 1, (8, 12, 16, 24, 32, 64), (29, 61, 125, 253, 509, 1021)),
        Size("full", 5, 3, (8, 12, 16, 24, 32, 64, 128, 256), (29, 61, 125, 253, 509, 1021, 2045, 4093)),
    )
}

FIRST_SEED = 200
"""Recipes and protocols were found on the seeds below, some of them after a whole run on 100 to 102."""

OWN = "vidbench.claims.contenders"
POINTS = "points"
PERCENT = "%"
MATTERS = 5.0
"""Points of accuracy that would change anybody's choice."""
CLEARLY = 20.0
"""Points of accuracy between what can and what cannot."""
TIMES = 1.2
"""Ratio of costs that would change anybody's choice."""

RNN, ORTHOGONAL, LSTM, BIASED = (f"{OWN}:{name}" for name in ("rnn", "rnn_orthogonal", "lstm", "lstm_forget_bias"))
SPATIAL, TEMPORAL, BOTH = (f"{OWN}:{name}" for name in ("spatial_stream", "temporal_stream", "both"))
LONG_KERNEL, FACTORISED = f"{OWN}:c3d_long_first_kernel", f"{OWN}:r2plus1d_18_of_equal_parameters"


def _recipe(width: float, rate: float, batch_size: int = 24, **more: Value) -> dict[str, Value]:
    return {"width_multiplier": width, "learning_rate": rate, "batch_size": batch_size, **more}


_RECIPES: dict[str, dict[str, Value]] = {
    **dict.fromkeys(("frame_pool_avg", "frame_pool_max", "cnn_lstm"), _recipe(0.0625, 5e-3)),
    "cnn_tcn": _recipe(0.0625, 3e-3),
    **dict.fromkeys(("c3d", LONG_KERNEL), _recipe(0.0625, 2e-3, dropout=0.0)),
    **dict.fromkeys(("r3d_18", FACTORISED), _recipe(0.0625, 1e-2)),
    **dict.fromkeys(("early_fusion", "late_fusion", "slow_fusion"), _recipe(0.125, 2e-3, dropout=0.0)),
    **dict.fromkeys((SPATIAL, TEMPORAL), _recipe(0.125, 2e-3)),
    **dict.fromkeys((RNN, ORTHOGONAL, LSTM, BIASED, "tcn"), _recipe(0.25, 2e-3, 32)),
}
"""How each network is trained on two cores; what is compared within a claim sees equally many clips."""

TWO_RATES = (2e-3, 5e-3)
"""Networks whose outcome hangs on the rate are trained at both, and taken at the better one."""


def seeds(size: Size) -> range:
    """Those that verdicts rest on."""
    return range(FIRST_SEED, FIRST_SEED + size.seeds)


def experiments(
    kind: str,
    size: Size,
    model_names: Sequence[str],
    steps: int,
    *,
    rates: Sequence[float] = (),
    given: Mapping[str, Value] | None = None,
    **more: Value,
) -> tuple[Experiment, ...]:
    """One experiment for every model, seed and learning rate, the models side by side; `given` and `more` are one."""
    asked = {**(given or {}), **more}
    return tuple(
        Experiment(kind, {"model": name, **_RECIPES[name], "steps": steps * size.patience, **asked, **at}, seed)
        for seed in seeds(size)
        for name in model_names
        for at in ([{"learning_rate": rate} for rate in rates] or [{}])
    )


def streams(size: Size, steps: int, task: str) -> tuple[Experiment, ...]:
    """Both streams trained by themselves, and the average of their scores: outcomes of SPATIAL, TEMPORAL and BOTH."""
    given = {**_RECIPES[SPATIAL], "steps": steps * size.patience, "task": task}
    return tuple(Experiment("streams", given, seed) for seed in seeds(size))


Effect = Callable[["pd.DataFrame"], list[float]]


def accuracy(**where: Value) -> Effect:
    """Top-1 accuracy of every seed, in per cent."""
    return lambda table: [100 * one for one in per_seed(table, "top1", **where)]


def difference(
    one: dict[str, Value], other: dict[str, Value], value: str = "top1", scale: float = 100.0, **where: Value
) -> Effect:
    """Of every seed, a value of one less that of the other; accuracies become points."""

    def effect(table: pd.DataFrame) -> list[float]:
        gap = per_seed(table, value, **where, **one) - per_seed(table, value, **where, **other)
        return [scale * seed for seed in gap]

    return effect


def ratio(value: str, one: dict[str, Value], other: dict[str, Value], **where: Value) -> Effect:
    """Of every seed, a value of one over that of the other."""
    return lambda table: list(per_seed(table, value, **where, **one) / per_seed(table, value, **where, **other))


def named(name: str) -> dict[str, Value]:
    return {"model": name}


def reaches(says: str, percent: float, **where: Value) -> Prediction:
    """A control: an accuracy of more than so many per cent."""
    return Prediction(says, PERCENT, percent, accuracy(**where))


def threshold(table: pd.DataFrame, model: str) -> pd.Series:
    """Of every seed, log2 of the amplitude at which accuracy passes 75 %, between neighbours on a logarithmic scale.

    NaN where the largest amplitude does not reach it, or the smallest does.
    """
    import pandas as pd

    found: dict[object, float] = {}
    chosen = at_best_rate(table[(table["kind"] == "amplitude") & (table["model"] == model)], "top1")
    for seed, part in chosen.groupby("seed"):
        curve = part.sort_values("amplitude")
        x, y = curve["amplitude"].map(math.log2).tolist(), curve["top1"].tolist()
        found[seed] = math.nan
        for i in range(len(x) - 1, -1, -1):  # from the largest amplitude down, as long as it is told
            if y[i] < 0.75:
                if i + 1 < len(x):
                    found[seed] = x[i] + (x[i + 1] - x[i]) * (0.75 - y[i]) / (y[i + 1] - y[i])
                break
    return pd.Series(found, dtype=float)


AMPLITUDE_STEPS = 480

AMPLITUDE_PLOT = Plot(
    "amplitude", "top1", "model", "motion in all, pixels", "top-1 accuracy", log_x=True, percent=True, level=0.5,
    one_training=True,
)  # fmt: skip


def coarser(says: str, one: str, other: str) -> Prediction:
    """That the threshold of one is larger than that of the other, in octaves."""
    return Prediction(says, "octaves", 0.25, lambda table: list(threshold(table, one) - threshold(table, other)))
