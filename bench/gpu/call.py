"""One call's parts, in order of importance, each within its share of the time."""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.gpu import check, plan
from bench.gpu.plan import SHARES
from bench.gpu.pool import Unit, run
from bench.gpu.session import FINAL, Session
from bench.gpu.summary import summary
from vidbench.layers import Layer
from vidbench.tune import PEERS, case_of
from vidkernels import OPS, choosing, tuning

COMPILERS, SANITIZERS = 14, 4
"""Processes at once, on 16 cores."""

CHUNK = 24
"""Units that are compiled together before they are timed one by one."""

COMPILING_S, COMPILING_SHARE = 45.0, 0.6
"""For compiling a chunk, thrice as long where every configuration is; and at most this share of what is left."""

ENVIRONMENT_S = 90.0
TABLES = Path(tempfile.gettempdir()) / "vidbench-gpu-cache"
"""Cubins and tables: left where they are for the next call on the same machine."""


class Call:
    """What one call does."""

    def __init__(self, session: Session, *, device: str, smoke: bool, only: str) -> None:
        self.session = session
        self.device = device
        self.smoke = smoke
        self.only = only
        self.dtypes = ("fp32",) if device == "cpu" else plan.DTYPES
        self.log = session.raw / "workers.log"
        self.machine: dict[str, Any] = {}

    def carry_out(self, parts: Iterable[str]) -> bool:
        """Runs the parts and packs after each; True when everything was reached."""
        todo = [part for part in SHARES if part in set(parts)]
        if "baselines" in todo and "kernels" in todo:
            todo.remove("baselines")  # they are timed side by side
            self.ways = "both"
        else:
            self.ways = "baselines" if "baselines" in todo else "kernels"
        steps = {
            "check": self._check,
            "sanitize": self._sanitize,
            "baselines": self._layers,
            "kernels": self._layers,
            "tune": self._tune,
            "models": self._models,
        }
        self.session.say(f"call {self.session.call}: {', '.join(todo)}; {self.session.left():.0f} s")
        if not self._describe():
            self.session.pack(summary(self.session))
            return False
        for number, part in enumerate(todo):
            share = SHARES[part] / sum(SHARES[other] for other in todo[number:])
            deadline = time.monotonic() + share * max(0.0, self.session.left())
            self.session.say(f"{part}: {deadline - time.monotonic():.0f} s")
            try:
                steps[part](deadline)
            except Exception as error:  # noqa: BLE001  the parts to come must have their time
                traceback.print_exc()
                reason = f"{type(error).__name__}: {error}"
                self.session.record({"part": part, "unit": part, "status": "failed", "reason": reason})
                self.session.say(f"{part}: failed: {reason}")
            self.session.pack(summary(self.session))
        return not any(self.session.unreached.values())

    def _describe(self) -> bool:
        """The environment, anew in every call; False where there is no device."""
        unit = Unit("environment", "bench.gpu.machine:describe", {"device": self.device, "dtypes": self.dtypes})
        deadline = time.monotonic() + min(ENVIRONMENT_S, self.session.left())
        self._run("environment", [unit], deadline, processes=1)
        rows = [row for row in self.session.latest("environment") if "environment" in row]
        if not rows or rows[-1]["call"] != self.session.call:
            self.session.say("the machine could not be described: nothing else is tried")
            return False
        self.machine = rows[-1]["environment"]
        TABLES.joinpath("tables").mkdir(parents=True, exist_ok=True)
        self.table = TABLES / "tables" / tuning.table_name(self.machine["gpu"] or "sm_90")
        self.kept = self.session.out / "tables" / self.table.name
        self.table.unlink(missing_ok=True)
        if self.kept.exists():
            self.table.write_bytes(self.kept.read_bytes())
        os.environ["VIDKERNELS_CACHE"] = str(TABLES)  # where the kernels of the parts to come look
        return True

    def _check(self, deadline: float) -> None:
        check.check(self.session, deadline, device=self.device, only=self.only, smoke=self.smoke)

    def _sanitize(self, deadline: float) -> None:
        looks = [
            (tool, op, name, case, dtype)
            for tool, cases, dtype in (
                ("memcheck", None, self.dtypes[0]),
                ("racecheck", ("even", "cluster", "stem"), self.dtypes[0]),
                ("memcheck", ("odd",), self.dtypes[-1]),
            )
            for op, name in self._custom()
            for case in plan.SMALL[op]
            if cases is None or case in cases
        ]
        units = [
            Unit(
                " ".join(look), "bench.gpu.sanitize:look",
                dict(zip(("tool", "op", "implementation", "case_name", "dtype"), look, strict=True))
                | {"device": self.device},
                timeout_s=150,
            )
            for look in dict.fromkeys(looks)
        ]  # fmt: skip
        if self.smoke:
            small = {"op": plan.SMOKE_LAYERS[0].op, "case_name": "odd"}
            units = [unit for unit in units if small.items() <= unit.values.items()][:2]
        self._run("sanitize", units, deadline, processes=SANITIZERS)

    def _layers(self, deadline: float) -> None:
        """Baselines and kernels of every layer, a chunk at a time: compiled in parallel, timed alone."""
        units = []
        compiled = plan.HEADLINES[: plan.COMPILED]
        for layer, dtype, headline in self._plan():
            values = plan.values_of(layer)
            for direction in plan.directions(layer.op):
                given: dict[str, Any] = {
                    "op": layer.op,
                    "case": values,
                    "dtype": dtype,
                    "direction": direction,
                    "device": self.device,
                }
                given |= {"headline": headline, "only": self.ways, "ceilings": self._ceilings()}
                given["compiled"] = layer in compiled and direction == "forward" and dtype == self.dtypes[0]
                given |= {"seconds": 0.002 if self.smoke else plan.SECONDS, "rounds": 1 if self.smoke else plan.ROUNDS}
                key = f"{self.ways}: {plan.text_of(layer.op, values)} {dtype} {direction}"
                units.append(Unit(key, "bench.gpu.kernels:time_layer", given, 240 if given["compiled"] else 90))
        self._in_chunks("kernels", units, deadline, every=False)
        self._write_implementations()

    def _tune(self, deadline: float) -> None:
        units = []
        for layer, dtype, _ in self._plan():
            values = plan.values_of(layer)
            for name in (name for op, name in self._custom() if op == layer.op):
                for direction in plan.directions(layer.op):
                    given: dict[str, Any] = {"op": layer.op, "case": values, "dtype": dtype, "direction": direction}
                    given |= {"implementation": name, "device": self.device, "table": str(self.table)}
                    given["seconds"] = 0.001 if self.smoke else plan.TUNING_SECONDS
                    key = f"{name} {plan.text_of(layer.op, values)} {dtype} {direction}"
                    units.append(Unit(key, "bench.gpu.tune_part:tune_layer", given, 120))
        self._in_chunks("tune", units, deadline, every=True)
        self._keep_table()

    def _models(self, deadline: float) -> None:
        units = []
        for mode in ("forward", "train"):
            for model, case in plan.SMOKE_MODELS if self.smoke else plan.MODELS:
                for name in ("eager", "compiled", "accelerated"):
                    if self.smoke and (name == "compiled" or mode == "train"):
                        continue
                    given: dict[str, Any] = {"model": model, "case": case, "implementation": name, "mode": mode}
                    given |= {"dtype": self.dtypes[0], "device": self.device, "ceilings": self._ceilings()}
                    given["seconds"] = 0.01 if self.smoke else 0.3
                    key = f"{model} {name} {mode} {self.dtypes[0]}"
                    units.append(Unit(key, "bench.gpu.models:time_model", given, 150))
        self._run("models", units, deadline, processes=1)

    def _plan(self) -> Iterator[tuple[Layer, str, bool]]:
        if self.smoke:
            return iter([(layer, self.dtypes[0], True) for layer in plan.SMOKE_LAYERS])
        return plan.layers(self.dtypes)

    def _custom(self) -> list[tuple[str, str]]:
        """(op, implementation) of every kernel of ours."""
        return [(op.name, name) for op in OPS.values() for name in op.implementations if name not in PEERS]

    def _ceilings(self) -> dict[str, Any]:
        return {name: self.machine[name] for name in ("flops_per_s", "bytes_per_s")}

    def _in_chunks(self, part: str, units: list[Unit], deadline: float, *, every: bool) -> None:
        """Units in order of importance; before each chunk its kernels are compiled by many processes."""
        todo = self._todo(part, units)
        for start in range(0, len(todo), CHUNK):
            chunk = todo[start : start + CHUNK]
            if time.monotonic() < deadline and self.device == "cuda" and (every or self.ways != "baselines"):
                ahead = [
                    dataclasses.replace(
                        unit,
                        handler="bench.gpu.tune_part:compile_layer",
                        values={**unit.values, "implementation": name, "every": every},
                    )
                    for unit in chunk
                    for op, name in self._custom()
                    if op == unit.values["op"] and unit.values.get("implementation", name) == name
                ]
                now = time.monotonic()
                until = now + min(COMPILING_S * (3 if every else 1), COMPILING_SHARE * (deadline - now))
                run(ahead, lambda *_: None, processes=COMPILERS, deadline=until, log=self.log)
            self._run(part, chunk, deadline, processes=1)

    def _todo(self, part: str, units: Iterable[Unit]) -> list[Unit]:
        """Units that no call has begun, then those that ended badly."""
        known = self.session.statuses(part)
        wanted = [unit for unit in units if re.search(self.only, unit.key)]
        fresh = [unit for unit in wanted if unit.key not in known]
        return fresh + [unit for unit in wanted if known.get(unit.key, "ok") not in FINAL]

    def _run(self, part: str, units: list[Unit], deadline: float, *, processes: int) -> None:
        """Carries units out, with a line for each."""
        if part in ("sanitize", "models"):
            units = self._todo(part, units)
        heard: dict[str, list[Mapping[str, Any]]] = {}

        def record(unit: Unit, row: Mapping[str, Any]) -> None:
            named = {name: unit.values[name] for name in NAMES if name in unit.values}
            heard.setdefault(unit.key, []).append({"part": part, "unit": unit.key, **named, **row})

        def finished(unit: Unit) -> None:
            # All rows at once: a unit that the deadline stops must not seem to be done.
            rows = heard.pop(unit.key, [])
            for row in rows:
                self.session.record(row)
            self.session.say(f"{part}: {unit.key}: {_in_short(rows)}")

        left = run(units, record, processes=processes, deadline=deadline, log=self.log, finished=finished)
        if left:
            self.session.unreached[part] = self.session.unreached.get(part, 0) + len(left)

    def _write_implementations(self) -> None:
        """What `implementation="auto"` goes by: seconds of every way, by direction and key of the case."""
        found: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
        parts: dict[tuple[str, str, str], dict[str, float]] = {}
        for row in self.session.latest("kernels"):
            if row["status"] != "ok" or row["regime"] != "cold" or row["implementation"] in ("reference", "compiled"):
                continue
            if row["way"].endswith("benchmark=off"):
                continue
            op = OPS[row["op"]]
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in row["case"].items()}
            key = choosing.case_key(op, case_of(op, values, row["dtype"], "forward")).text
            layout = row["way"].split()[1]
            way = row["implementation"]
            if way == "library" and "height" in values:
                way = f"library:{layout}"
            if row["direction"] in ("forward", "train"):
                best = found.setdefault((row["op"], row["direction"]), {}).setdefault(key, {})
                best[way] = min(row["median_s"], best.get(way, float("inf")))
            parts.setdefault((row["op"], key, way), {})[row["direction"]] = row["median_s"]
        for (op_name, key, way), seconds in parts.items():
            # A convolution's training is its three products, one after another.
            if {"forward", "input_gradient", "weight_gradient"} <= set(seconds):
                found.setdefault((op_name, "train"), {}).setdefault(key, {})[way] = sum(seconds.values())
        for (op_name, direction), entries in found.items():
            tuning.extend(self.table, "implementations", f"{op_name}/{direction}", entries)
        self._keep_table()

    def _keep_table(self) -> None:
        if self.table.exists():
            self.kept.write_bytes(self.table.read_bytes())


NAMES = ("op", "implementation", "case", "dtype", "direction", "model", "mode", "tool", "case_name")
"""What a row says of its unit, whatever became of it."""


def _in_short(rows: list[Mapping[str, Any]]) -> str:
    """What became of a unit, in one line."""
    bad = [row for row in rows if row["status"] not in FINAL]
    if bad:
        return f"{bad[0]['status']}: {bad[0].get('way', bad[0].get('implementation', ''))}: {bad[0]['reason'][:160]}"
    timed = [(row["median_s"], row.get("way", "")) for row in rows if row.get("median_s") is not None]
    if timed and all(row.get("regime") for row in rows if row.get("median_s") is not None):
        cold = [(row["median_s"], row["way"]) for row in rows if row.get("regime") == "cold" and row.get("median_s")]
        return ", ".join(f"{way} {seconds * 1e6:.1f} µs" for seconds, way in sorted(cold))
    return f"{timed[0][0] * 1e3:.4g} ms" if timed else rows[-1]["status"] if rows else "nothing to do"
