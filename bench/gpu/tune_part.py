"""Part `tune`: the launch configurations of every layer, written into the table of this GPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from bench.gpu.pool import Emit, Unit
from vidbench.environment import precision
from vidbench.tune import bind, case_of, held, inputs_of, tune, write
from vidbench.workload.base import TIMED_SEED
from vidkernels import OPS, Unavailable, tuning


def tune_layer(unit: Unit, emit: Emit) -> None:
    """A row for every kernel of one implementation on one layer in one direction."""
    given = unit.values
    op, table = OPS[given["op"]], Path(given["table"])
    common = {name: given[name] for name in ("op", "case", "dtype", "direction", "implementation")}
    try:
        found = tune(
            op,
            given["implementation"],
            given["case"],
            dtype=given["dtype"],
            device=given["device"],
            directions=(given["direction"],),
            seconds=given["seconds"],
            known=held(table),
        )
    except Unavailable as why:
        emit({**common, "status": "skipped", "reason": str(why)})
        return
    write(table, found)
    for tuned in found:
        best = tuned.best
        wrong = [f"{dict(trial.config)}: {trial.reason}" for trial in tuned.trials if trial.reason]
        emit(
            {
                **common,
                "status": "failed" if wrong else "ok",
                "reason": "; ".join(wrong)[:600],
                "kernel": tuned.kernel,
                "key": tuned.key,
                "before": dict(tuned.before),
                "source": tuned.source,
                "best": dict(best.config) if best else None,
                "trials": [dataclasses.asdict(trial) for trial in tuned.trials],
            }
        )
    if not found:
        emit({**common, "status": "ok", "reason": "nothing to choose, or known already"})


def compile_layer(unit: Unit, emit: Emit) -> None:
    """Runs every configuration once, several processes at a time, so that the compilers' caches are full.

    What goes wrong here goes wrong again where it is counted: it is left to that.
    """
    given = unit.values
    op, dtype, direction, device = OPS[given["op"]], given["dtype"], given["direction"], given["device"]
    case = case_of(op, given["case"], dtype, direction)
    if op[given["implementation"]].why_not(case, device):
        return
    with precision(dtype):
        call = bind(op[given["implementation"]].fn, inputs_of(op, given["case"], case, TIMED_SEED, device), direction)
        with tuning.watching() as chosen:
            call()
        for one in {(one.kernel, one.key.text): one for one in chosen}.values() if given["every"] else ():
            for config in one.candidates:
                _once(call, one, config)


def _once(call: Any, chosen: tuning.Chosen, config: tuning.Config) -> None:
    with tuning.forced(chosen.kernel, chosen.key, config):
        try:
            call()
        except Exception as error:  # noqa: BLE001  as the docstring above says
            print(f"{chosen.kernel} {dict(config)}: {error}", flush=True)
