"""What the textbooks say, as predictions about numbers that are then measured. Pure data, no torch.

A claim asks for experiments, and predicts effects that follow from their outcomes, each with the least size that would
matter. Seeds (of a timing: fresh processes) give an effect its interval, and the interval decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
    """An effect that is more than a margin."""

    says: str
    unit: str
    margin: float
    """The least effect that would matter: SUPPORTED is an interval above it, REFUTED one below it."""
    effect: Callable[[pd.DataFrame], Sequence[float]]
    """From a frame of outcomes to the effect of every seed."""
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
    """What must hold for the outcome to mean anything, such as that a task can be learnt at all."""


@dataclass(frozen=True)
class Judged:
    """A prediction and what became of it."""

    prediction: Prediction
    interval: Interval | None
    """None where nothing was measured."""
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


def per_seed(outcomes: pd.DataFrame, value: str, **where: Value) -> pd.Series:
    """The mean of a value over the outcomes with some values, by seed; empty where there is none."""
    import pandas as pd

    if value not in outcomes or any(name not in outcomes for name in where):
        return pd.Series(dtype=float)
    chosen = outcomes
    for name, wanted in where.items():
        chosen = chosen[chosen[name] == wanted]
    means: pd.Series = chosen.groupby("seed")[value].mean().dropna()
    return means


def judge(claim: Claim, outcomes: Sequence[Outcome]) -> Finding:
    """What the outcomes say of a claim.

    It is SUPPORTED where all its predictions are, REFUTED where one is, and UNDECIDED otherwise, or where a control
    does not hold: then the experiment did not test what it was made for.
    """
    keys = {experiment.key for experiment in claim.experiments}
    mine = [outcome for outcome in outcomes if outcome.experiment.key in keys]
    table = frame(mine)
    predictions = tuple(_judged(prediction, table) for prediction in claim.predictions)
    controls = tuple(_judged(control, table) for control in claim.controls)
    failed = [outcome for outcome in mine if outcome.failure]
    broken = [control for control in controls if control.verdict != "SUPPORTED"]
    if missing := len(keys) - len(mine):
        return Finding(claim, "UNDECIDED", f"{missing} of {len(keys)} experiments were not done", predictions, controls)
    if failed:
        reason = f"{len(failed)} of {len(keys)} experiments failed, the first with {failed[0].failure}"
        return Finding(claim, "UNDECIDED", reason, predictions, controls)
    if broken:
        reason = f"a control does not hold: {broken[0].prediction.says}"
        return Finding(claim, "UNDECIDED", reason, predictions, controls)
    verdicts = {judged.verdict for judged in predictions}
    if verdicts == {"SUPPORTED"}:
        return Finding(claim, "SUPPORTED", "", predictions, controls)
    if "REFUTED" in verdicts:
        reason = next(judged.prediction.says for judged in predictions if judged.verdict == "REFUTED")
        return Finding(claim, "REFUTED", f"not so: {reason}", predictions, controls)
    reason = next(judged.reason for judged in predictions if judged.verdict == "UNDECIDED")
    return Finding(claim, "UNDECIDED", reason, predictions, controls)


def _judged(prediction: Prediction, table: pd.DataFrame) -> Judged:
    values = [float(value) for value in prediction.effect(table)] if len(table) else []
    if not values:
        return Judged(prediction, None, "UNDECIDED", "not measured")
    if prediction.exact:
        mean = sum(values) / len(values)
        return Judged(prediction, Interval(mean, mean, mean), "SUPPORTED" if mean > prediction.margin else "REFUTED")
    found = interval(values)
    if found.low > prediction.margin:
        return Judged(prediction, found, "SUPPORTED")
    if found.high < prediction.margin:
        return Judged(prediction, found, "REFUTED")
    why = "a single seed has no interval" if len(values) == 1 else f"the interval includes {prediction.margin:g}"
    return Judged(prediction, found, "UNDECIDED", f"{prediction.says}: {why} {prediction.unit}".rstrip())
