"""The statistics of a comparison: effects of logarithms by trimmed t tests, and control of false discoveries.

Docs: docs/comparing.md says which tests were tried on recorded and on simulated noise, and which held up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr, stdtrit

TRIM = 0.1
"""Share of the rounds left out at either end: now and then a process is slow as a whole."""

Numbers = npt.NDArray[np.float64]


FARTHEST = 1e6
"""Ratios beyond it, either way, are said to be it: two rounds that have nothing in common make any."""


def ratio_of(log_ratio: float) -> float:
    """The ratio of a logarithm, at most `FARTHEST` either way."""
    return min(max(math.exp(min(max(log_ratio, -700.0), 700.0)), 1 / FARTHEST), FARTHEST)


@dataclass(frozen=True, slots=True)
class Effect:
    """By how much the logarithm of a time changed."""

    log_ratio: float
    """Of new over base; above 0 is slower."""
    standard_error: float
    degrees: float
    """Of freedom, of `standard_error`."""

    @property
    def ratio(self) -> float:
        """New over base."""
        return ratio_of(self.log_ratio)

    @property
    def ratio_interval(self) -> tuple[float, float]:
        """Of 95 %."""
        half = self.half_width()
        return ratio_of(self.log_ratio - half), ratio_of(self.log_ratio + half)

    @property
    def p(self) -> float:
        """Two-sided, of no change."""
        if self.standard_error == 0:
            return float(self.log_ratio == 0)
        return float(2 * stdtr(self.degrees, -abs(self.log_ratio) / self.standard_error))

    def half_width(self, confidence: float = 0.95) -> float:
        """Of the interval of `log_ratio`; also the smallest effect that could have been told from none."""
        return float(stdtrit(self.degrees, (1 + confidence) / 2)) * self.standard_error


def _trimmed(values: Sequence[float] | Numbers) -> tuple[float, float, int]:
    """Trimmed mean, the variance of its estimate, and how many values are left."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    count = len(ordered)
    cut = int(TRIM * count)
    left = count - 2 * cut
    winsorised = np.clip(ordered, ordered[cut], ordered[count - 1 - cut])
    mean = float(ordered[cut : count - cut].mean())
    variance = float(winsorised.var(ddof=1)) * (count - 1) / (left * (left - 1))
    return mean, variance, left


AGAIN_FACTOR = 0.75
"""A round's new time against the mean of two base times has this much of the variance of one base time against the
other, where all three are alike: (1 + 1/2) σ² of 2 σ²."""


def paired(changes: Sequence[float], repeats: Sequence[float] | None = None) -> Effect | None:
    """The effect where the sides of a round ran side by side: Tukey & McLaughlin's trimmed t on the rounds' changes.

    Args:
        changes: Of each round, the logarithm of the new time over the base's.
        repeats: Of as many, that of the base's time over the base's once more, where `changes` are from the mean of
            both. How far they lie apart tells of the noise too. The larger of the two estimates counts, as the new side
            may have noise of its own.

    Returns:
        The effect; None of fewer than two rounds.

    Source: Tukey & McLaughlin (1963), Sankhya A 25(3):331.
    """
    if len(changes) != len(changes if repeats is None else repeats):
        raise ValueError(f"{len(changes)} rounds against {len(repeats or ())}: they are the same rounds")
    if len(changes) < 2:
        return None
    mean, variance, left = _trimmed(changes)
    if repeats is not None:
        pooled = (variance + AGAIN_FACTOR * _trimmed(repeats)[1]) / 2
        if pooled > variance:
            return Effect(mean, math.sqrt(pooled), 2 * (left - 1))
    return Effect(mean, math.sqrt(variance), left - 1)


def unpaired(base: Sequence[float], new: Sequence[float], *, run_deviation: float = 0.0) -> Effect | None:
    """The effect where the rounds of both were taken apart: Yuen's trimmed t.

    Args:
        base: Seconds, one for each round.
        new: As well, of any number.
        run_deviation: What is assumed of the noise between runs, of which rounds know nothing: the standard deviation
            of the logarithm of a whole run's time.

    Returns:
        The effect; None where either has fewer than two rounds.

    Source: Yuen (1974), Biometrika 61(1):165.
    """
    if min(len(base), len(new)) < 2:
        return None
    mean_base, variance_base, left_base = _trimmed(np.log(base))
    mean_new, variance_new, left_new = _trimmed(np.log(new))
    variance = variance_base + variance_new
    spread = variance_base**2 / (left_base - 1) + variance_new**2 / (left_new - 1)
    degrees = variance**2 / spread if spread > 0 else min(left_base, left_new) - 1
    return Effect(mean_new - mean_base, math.sqrt(variance + 2 * run_deviation**2), degrees)


def foretold(runs: Sequence[float], new: float) -> Effect:
    """The effect against several runs of the base, a run being the unit: whether one more of them could be like NEW.

    Args:
        runs: Seconds, one for each run, at least two.
        new: Seconds of the new run.

    Source: the prediction interval of a normal sample, Whitmore (1986), The American Statistician 40(2):141.
    """
    logs = np.log(runs)
    deviation = float(logs.std(ddof=1))
    return Effect(math.log(new) - float(logs.mean()), deviation * math.sqrt(1 + 1 / len(logs)), len(logs) - 1)


def discoveries(p_values: Sequence[float], rate: float) -> list[bool]:
    """Which of many effects are no chance: at most the share `rate` of those named are, in expectation.

    Where there is nothing to be found, the chance that anything is named is at most `rate`.

    Source: Benjamini & Hochberg (1995), J. R. Stat. Soc. B 57(1):289.
    """
    from scipy.stats import false_discovery_control

    if not p_values:
        return []
    return [bool(adjusted <= rate) for adjusted in false_discovery_control(np.asarray(p_values))]
