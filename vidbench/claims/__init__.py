"""What the textbooks say, as predictions about numbers that are then measured. Pure data, no torch.

A claim asks for experiments, and predicts effects that follow from their outcomes, each with the least size that would
matter. Seeds (of a timing: fresh processes) give an effect its interval, and the interval decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from vidbench.metrics import Interval, interval
from vidbench.sweep import Value, text_of

if TYPE_CHECKING:
    import pandas as pd

Verdict = Literal["SUPPORTED", "REFUTED", "UNDECIDED"]

Row = Mapping[str, Value]
"""One outcome of an experiment; an experiment may have several, such as one for every lag."""


@dataclass(frozen=True)
class Experiment:
    """One thing done once. Claims that ask for experiments with one key share the outcome."""

    kind: str
    """What is done: a name of `vidbench.claims.experiments.KINDS`."""
    given: Mapping[str, Value]
    seed: int
    """Of weights and data; of a timing the number of the fresh process; of a count 0."""

    @property
    def key(self) -> str:
        """Stable text of everything above."""
        given = " ".join(f"{name}={text_of(self.given[name])}" for name in sorted(self.given))
        return f"{self.kind} {given} seed={self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What came of an experiment."""

    experiment: Experiment
    rows: Sequence[Row]
    """Empty where it failed."""
    wall_s: float
    failure: str = ""


@dataclass(frozen=True)
class Prediction:
    """An effect that is more, or less, than a margin."""

    says: str
    unit: str
    margin: float
    """What tells an effect that matters from one that does not."""
    effect: Callable[[pd.DataFrame], Sequence[float]]
    """From a frame of outcomes to the effect of every seed; NaN where a seed does not tell."""
    less: bool = False
    """Whether the effect is to be less than the margin, rather than more."""
    exact: bool = False
    """Whether it is counted rather than measured, and so has no interval."""


@dataclass(frozen=True)
class Plot:
    """What a claim's figure shows: lines over x where that is a number, else a column of points for each x."""

    x: str
    y: str
    hue: str
    x_label: str
    y_label: str
    where: Mapping[str, Value] = field(default_factory=dict)
    """Only the outcomes that have these values."""
    log_x: bool = False
    log_y: bool = False
    percent: bool = False
    """Whether y is a share."""
    level: float | None = None
    """A line across, such as chance."""
    one_training: bool = False
    """Whether one training has all x, so that its learning rate is chosen for all of them at once."""


@dataclass(frozen=True)
class Claim:
    """A sentence of the textbooks, and how it is put to the test."""

    name: str
    says: str
    source: str
    """Who says so."""
    protocol: str
    experiments: tuple[Experiment, ...]
    predictions: tuple[Prediction, ...]
    """All must be SUPPORTED for the claim to be."""
    plot: Plot
    controls: tuple[Prediction, ...] = ()
    """What must hold in every seed for the outcome to mean anything, such as that a task can be learnt at all."""


@dataclass(frozen=True)
class Judged:
    """A prediction and what became of it."""

    prediction: Prediction
    interval: Interval | None
    """None where nothing was measured, or a seed does not tell."""
    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True)
class Finding:
    """A claim and what became of it."""

    claim: Claim
    verdict: Verdict
    reason: str
    predictions: tuple[Judged, ...]
    controls: tuple[Judged, ...]


def frame(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """A tidy frame of outcomes: what was given, the seed, and the values of every row; a failure has no row."""
    import pandas as pd

    return pd.DataFrame(
        [
            {"kind": outcome.experiment.kind, "seed": outcome.experiment.seed, **outcome.experiment.given, **row}
            for outcome in outcomes
            for row in outcome.rows
        ]
    )


RATE = "learning_rate"


def at_best_rate(outcomes: pd.DataFrame, value: str, *by: str) -> pd.DataFrame:
    """Of every group, the rows at the learning rate at which the median seed does best.

    Where both sides of a comparison are trained at several rates, each is taken at its best. The median, since a
    training that learns the task by chance in one seed of three says little of its rate.

    Args:
        outcomes: Rows of a frame.
        value: A loss, of which less is better, or anything else, of which more is.
        by: Columns of a group.
    """
    if RATE not in outcomes or outcomes[RATE].nunique() < 2:
        return outcomes
    sign = -1 if value == "loss" else 1
    of_seeds = (sign * outcomes[value]).groupby([outcomes[name] for name in (*by, RATE, "seed")], dropna=False).mean()
    middles = of_seeds.groupby(level=[*by, RATE], dropna=False).median()
    ranked = middles.sort_values(ascending=False, kind="stable").reset_index()[[*by, RATE]]
    chosen = ranked.drop_duplicates(list(by)) if by else ranked.head(1)
    return outcomes.merge(chosen, on=[*by, RATE])


def per_seed(outcomes: pd.DataFrame, value: str, **where: Value) -> pd.Series:
    """The mean of a value over the outcomes with some values, by seed, at the best learning rate; empty without any."""
    import pandas as pd

    if value not in outcomes or any(name not in outcomes for name in where):
        return pd.Series(dtype=float)
    chosen = outcomes
    for name, wanted in where.items():
        chosen = chosen[chosen[name] == wanted]
    means: pd.Series = at_best_rate(chosen.dropna(subset=[value]), value).groupby("seed")[value].mean()
    return means


def judge(claim: Claim, outcomes: Sequence[Outcome]) -> Finding:
    """What the outcomes say of a claim.

    It is SUPPORTED where all its predictions are, REFUTED where one is, and UNDECIDED otherwise, or where a control
    does not hold: then the experiment did not test what it was made for. What speaks for a claim that is not
    supported is told as well.
    """
    keys = {experiment.key for experiment in claim.experiments}
    mine = [outcome for outcome in outcomes if outcome.experiment.key in keys]
    table = frame(mine)
    predictions = tuple(_judged(prediction, table) for prediction in claim.predictions)
    controls = tuple(_held(control, table) for control in claim.controls)
    failed = [outcome for outcome in mine if outcome.failure]
    broken = [control for control in controls if control.verdict != "SUPPORTED"]

    def found(verdict: Verdict, reason: str = "") -> Finding:
        return Finding(claim, verdict, reason, predictions, controls)

    if missing := len(keys) - len(mine):
        return found("UNDECIDED", f"{missing} of {len(keys)} experiments were not done")
    if failed:
        return found(
            "UNDECIDED", f"{len(failed)} of {len(keys)} experiments failed, the first with {failed[0].failure}"
        )
    if broken:
        return found("UNDECIDED", f"a control does not hold: {broken[0].prediction.says}")
    for verdict in ("REFUTED", "UNDECIDED"):
        if judged := next((one for one in predictions if one.verdict == verdict), None):
            others = [one.prediction.says for one in predictions if one.verdict == "SUPPORTED"]
            return found(verdict, "; but ".join((judged.reason, " and ".join(others))) if others else judged.reason)
    return found("SUPPORTED")


def said(found: Interval, prediction: Prediction) -> str:
    """An effect in words: 12.3 (10.1 to 14.5) points."""
    if prediction.exact:
        return f"{found.mean:.4g} {prediction.unit}".rstrip()
    low, high = found.low, found.high
    if prediction.unit == "%":  # a t interval knows of no ends
        low, high = max(low, 0.0), min(high, 100.0)
    return f"{found.mean:.3g} ({low:.3g} to {high:.3g}) {prediction.unit}".rstrip()


def _held(control: Prediction, table: pd.DataFrame) -> Judged:
    """A control holds where it does in every seed; it is not estimated, so its interval has no say."""
    judged = _judged(control, table)
    if judged.interval is None:
        return judged
    held = (value < control.margin if control.less else value > control.margin for value in control.effect(table))
    return replace(judged, verdict="SUPPORTED" if all(held) else "UNDECIDED")


def _judged(prediction: Prediction, table: pd.DataFrame) -> Judged:
    values = [float(value) for value in prediction.effect(table)] if len(table) else []
    if not values:
        return Judged(prediction, None, "UNDECIDED", f"{prediction.says}: not measured")
    if silent := sum(map(math.isnan, values)):
        return Judged(prediction, None, "UNDECIDED", f"{prediction.says}: {silent} of {len(values)} seeds do not tell")
    if prediction.exact:
        mean = sum(values) / len(values)
        found = Interval(mean, mean, mean)
    else:
        found = interval(values)
    if math.isnan(found.low):
        return Judged(prediction, found, "UNDECIDED", f"{prediction.says}: a single seed has no interval")
    above, below = found.low > prediction.margin, found.high < prediction.margin
    if prediction.less:
        above, below = below, above
    if above:
        return Judged(prediction, found, "SUPPORTED")
    sides = "less" if prediction.less else "more"
    wanted = f"wanted {sides} than {prediction.margin:g}"
    if below or prediction.exact:
        return Judged(prediction, found, "REFUTED", f"{prediction.says}: {said(found, prediction)}, {wanted}")
    return Judged(prediction, found, "UNDECIDED", f"{prediction.says}: {said(found, prediction)}, {wanted}")
