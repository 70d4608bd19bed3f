"""Part `models`: whole models by vidbench's own harness, eager, compiled, and with our kernels where they can be."""

from __future__ import annotations

import dataclasses

from bench.gpu.machine import state
from bench.gpu.pool import Emit, Unit
from vidbench.measure import measure
from vidbench.records import Environment
from vidbench.sweep import Sweep
from vidbench.timing import Budget


def time_model(unit: Unit, emit: Emit) -> None:
    """One row: a model in one mode and dtype by one implementation."""
    given = unit.values
    fixed = {**given["case"], **{name: given[name] for name in ("implementation", "mode", "dtype", "device")}}
    fixed |= {"memory_format": "channels_last", "regime": "hot"}
    (point,) = Sweep(given["model"], "model", fixed=fixed).points()
    environment = Environment(machine="", **given["ceilings"])
    common = {name: given[name] for name in ("model", "implementation", "mode", "dtype")}
    measured = measure(point, environment, budget=Budget(seconds=given["seconds"]))
    row = dataclasses.asdict(measured)
    row["samples_s"] = [list(measured.samples_s)]
    for name in ("point", "round", "energy_j", "accuracy", "host_samples_s"):
        row.pop(name)
    emit({**common, "case": dict(point.case), **row, "median_s": measured.median_s, "state": state()})
