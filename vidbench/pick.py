"""Which model within a budget: the rows of a run that no other row beats in accuracy, latency and memory at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vidbench.sweep import RequestError

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("workload", "implementation", "dtype", "clip_length", "batch_size", "width_multiplier")
"""What names a choice, as far as the run has it."""

_WANTED = {"top1_accuracy": False, "latency_s": True, "peak_memory_bytes": True}
"""Whether less is better."""


def within(
    frame: pd.DataFrame, *, latency_s: float | None = None, memory_bytes: float | None = None, task: str | None = None
) -> pd.DataFrame:
    """The Pareto-optimal choices of a run within a budget, the most accurate first.

    Args:
        frame: Of `Run.frame`, with latencies and accuracies of models.
        latency_s: The most that one call may take.
        memory_bytes: The most that it may hold at its peak.
        task: The task whose accuracy counts; not needed where the run has but one.

    Returns:
        Rows of `frame`, with `COLUMNS`, `task`, `top1_accuracy`, `latency_s` and `peak_memory_bytes`.

    Raises:
        RequestError: No row has both latency and accuracy, there are several tasks, or none is within the budget.
    """
    rows = frame[(frame["kind"] == "model") & (frame["mode"] == "forward") & (frame["status"] == "ok")]
    rows = rows[rows["latency_s"].notna() & rows["top1_accuracy"].notna()]
    if rows.empty:
        raise RequestError(
            "no model of this run has both a latency and an accuracy: add accuracies by `vidbench train … --out RUN`, "
            "at the clip length, size and width_multiplier that were timed"
        )
    tasks: Sequence[str] = sorted(rows["task"].dropna().unique())
    if task is None and len(tasks) > 1:
        raise RequestError(f"accuracies on several tasks: {', '.join(tasks)}; choose one with --task")
    if task is not None:
        if task not in tasks:
            raise RequestError(f"no accuracy on task {task!r}; this run has {', '.join(tasks)}")
        rows = rows[rows["task"] == task]
    fits = rows
    if latency_s is not None:
        fits = fits[fits["latency_s"] <= latency_s]
    if memory_bytes is not None:
        fits = fits[fits["peak_memory_bytes"].notna() & (fits["peak_memory_bytes"] <= memory_bytes)]
    if fits.empty:
        seconds, name = min(zip(rows["latency_s"].astype(float), rows["workload"], strict=True))
        raise RequestError(
            f"none of {len(rows)} choices is within the budget; the fastest is {name} with {1e3 * seconds:.3g} ms"
        )
    named = [name for name in (*COLUMNS, "task", *_WANTED) if name in fits.columns]
    return _frontier(fits)[named].sort_values(["top1_accuracy", "latency_s"], ascending=[False, True])


def _frontier(rows: pd.DataFrame) -> pd.DataFrame:
    import numpy as np

    # Less is better in every column; unknown memory counts as the most.
    values = np.stack(
        [
            (1 if less else -1) * rows[name].astype("Float64").fillna(np.inf if less else 0.0).to_numpy(np.float64)
            for name, less in _WANTED.items()
        ],
        axis=1,
    )
    kept = [not any((other <= row).all() and (other < row).any() for other in values) for row in values]
    return rows.loc[kept]
