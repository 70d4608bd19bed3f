"""What the report says in words and tables: the answer, how far to trust it, and rows in units for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vidbench.metrics import METRICS, POINT_COLUMNS, SEVERITY, SIZE_COLUMNS, TRUST, case_columns
from vidbench.report.figures import accuracies, speed_up
from vidbench.report.style import missing

if TYPE_CHECKING:
    import pandas as pd

    from vidbench.results import Run


@dataclass(frozen=True)
class Shown:
    """How a column is shown: its head, its unit for people and the factor from SI."""

    head: str
    unit: str = ""
    factor: float = 1.0


SHOWN = {
    "latency_s": Shown("latency", "ms", 1e3),
    "latency_low_s": Shown("low", "ms", 1e3),
    "latency_high_s": Shown("high", "ms", 1e3),
    "throughput_clips_per_s": Shown("throughput", "clips/s"),
    "peak_memory_bytes": Shown("peak memory", "MiB", 2.0**-20),
    "flops": Shown("work", "GFLOP", 1e-9),
    "params": Shown("parameters", "M", 1e-6),
    "bytes_moved": Shown("moved", "MiB", 2.0**-20),
    "achieved_flops_per_s": Shown("speed", "GFLOP/s", 1e-9),
    "roofline_fraction": Shown("of attainable", "%", 100.0),
    "relative_error": Shown("error"),
    "top1_accuracy": Shown("top-1", "%", 100.0),
    "energy_j": Shown("energy", "J"),
    "samples": Shown("samples"),
    "rounds": Shown("rounds"),
}
"""The figures of the page's table, in its order."""

LAST = ("status", "trust", "reason", "trust_reasons", "uncounted")


def digits(value: float, places: int = 3) -> str:
    """A number in `places` significant digits without an exponent where it can be helped: 12.3, 0.0456, 1,230."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.{places - 1}e}"
    if abs(value) >= 10 ** (places - 1):
        return f"{value:,.0f}"
    return f"{value:.{max(0, places - 1 - math.floor(math.log10(abs(value))))}f}"


def shown(name: str, value: Any, *, unit: bool = True) -> str:
    """A figure in the unit for people: 12.3 ms; a dash where it is NA."""
    if missing(value):
        return "–"
    how = SHOWN[name]
    return digits(float(value) * how.factor) + (f" {how.unit}" if unit and how.unit else "")


def constants(frame: pd.DataFrame) -> dict[str, str]:
    """The keys of a point that have one value in every row, which a table need not repeat."""
    names = ("run_id", "suite", *POINT_COLUMNS, *case_columns(frame))
    return {
        name: str(frame[name].iloc[0])
        for name in names
        if len(frame) and name != "workload" and frame[name].notna().all() and frame[name].nunique() == 1
    }


def varying(frame: pd.DataFrame) -> list[str]:
    """The keys of a point that a table must show: workload and implementation first."""
    fixed = constants(frame)
    names = ("workload", "implementation", "kind", *POINT_COLUMNS, *case_columns(frame), "task", "run_id")
    present = [n for n in dict.fromkeys(names) if n not in fixed and (n == "workload" or frame[n].notna().any())]
    return [name for name in present if name not in ("kind", "suite")]


def sparse(frame: pd.DataFrame) -> list[str]:
    """The keys of a case that only some workloads have; as columns they would be mostly empty."""
    return [n for n in varying(frame) if n in case_columns(frame) and n not in SIZE_COLUMNS and frame[n].isna().any()]


def case_texts(frame: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """These keys of each row in one text: hidden_size=256 kernel_size=3."""
    return [
        " ".join(f"{name}={value}" for name, value in zip(names, row, strict=True) if not missing(value))
        for row in frame[list(names)].itertuples(index=False, name=None)
    ]


# --- the answer -------------------------------------------------------------------------------------------------------


def verdicts(frame: pd.DataFrame) -> list[str]:
    """Up to three sentences: the fastest, the leanest in memory, the most accurate."""
    timed = frame[(frame["status"] == "ok") & frame["latency_s"].notna() & (frame["mode"] != "evaluate")]
    models = timed[timed["kind"] == "model"]
    said = []
    if models["workload"].nunique() > 1:
        said += _of_models(models)
    elif len(timed):
        said += _of_workloads(timed)
    if accuracy := _most_accurate(frame):
        said.append(accuracy)
    return said


def _arena(rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The rows of the case that most models share (batch 1 and forward before others), and its name."""
    keys = [
        "run_id",
        "mode",
        "regime",
        "device",
        "dtype",
        "memory_format",
        "clip_length",
        "batch_size",
        "height",
        "width",
    ]
    parts = [part for _, part in rows.groupby(keys, dropna=False, sort=True)]
    part = max(parts, key=lambda p: (p["workload"].nunique(), p["mode"].iloc[0] == "forward", len(p)))
    first = part.iloc[0]
    size = [f"{first['clip_length']} frames"] if not missing(first["clip_length"]) else []
    if str(first["height"]).isdigit() and str(first["width"]).isdigit():
        size.append(f"of {first['height']}×{first['width']}")
    if str(first["batch_size"]).isdigit():
        size.append(f"in batches of {first['batch_size']}")
    where = ", ".join((str(first["device"]), str(first["dtype"]), str(first["mode"]), str(first["regime"])))
    return part, f"{' '.join(size)} ({where})"


def _who(row: pd.Series) -> str:
    return f"{row['workload']} ({row['implementation']})"


def _of_models(rows: pd.DataFrame) -> list[str]:
    part, where = _arena(rows)
    said = []
    ranked = part.sort_values("latency_s")
    best = ranked.iloc[0]
    said.append(
        f"Fastest of {part['workload'].nunique()} models at {where}: {_who(best)}, "
        f"{shown('latency_s', best['latency_s'])} per call{_interval(best)}{_ahead(ranked)}."
    )
    if part["peak_memory_bytes"].notna().any():
        lean = part.sort_values("peak_memory_bytes").iloc[0]
        said.append(
            f"Leanest there: {_who(lean)}, {shown('peak_memory_bytes', lean['peak_memory_bytes'])} at its peak."
        )
    return said


def _interval(row: pd.Series) -> str:
    if missing(row["latency_low_s"]) or missing(row["latency_high_s"]):
        return ""
    low, high = shown("latency_low_s", row["latency_low_s"], unit=False), shown("latency_high_s", row["latency_high_s"])
    return f" (95 % interval {low} to {high})"


def _ahead(ranked: pd.DataFrame) -> str:
    """How far the first is ahead of the next workload, or that the intervals cannot tell them apart."""
    best = ranked.iloc[0]
    others = ranked[ranked["workload"] != best["workload"]]
    if others.empty:
        return ""
    second = others.iloc[0]
    ratio = float(second["latency_s"]) / float(best["latency_s"])
    ends = best["latency_high_s"], second["latency_low_s"]
    apart = not any(missing(end) for end in ends) and float(ends[0]) < float(ends[1])
    return f"; next is {_who(second)}, {ratio:.2f}× as long" + (
        "" if apart else ", but their intervals do not tell them apart"
    )


def _of_workloads(rows: pd.DataFrame) -> list[str]:
    """Which implementation wins how many cases of each workload, in one sentence, and which needs least memory."""
    same = ["run_id", *(n for n in (*POINT_COLUMNS, *case_columns(rows)) if n != "implementation")]
    said = []
    for column, what in (("latency_s", "Fastest"), ("peak_memory_bytes", "Leanest")):
        known = rows.dropna(subset=[column])
        contested = known[known.groupby(same, dropna=False)["implementation"].transform("nunique") > 1]
        if contested.empty:
            continue
        winners = contested.loc[contested.groupby(same, dropna=False)[column].idxmin()].sort_index()
        gains = speed_up(contested) if column == "latency_s" else None
        parts = []
        for workload, part in winners.groupby("workload", sort=False):
            counts = part["implementation"].value_counts()
            name, wins = str(counts.index[0]), int(counts.iloc[0])
            text = f"{workload} {name} ({wins} of {len(part)} cases"
            if gains is not None and len(
                mine := gains[(gains["workload"] == workload) & (gains["implementation"] == name)]
            ):
                mean = math.exp(float(mine["speed_up"].map(math.log).mean()))
                text += f", {mean:.2f}× over {mine['implementation_base'].iloc[0]} in the mean"
            parts.append(f"{text})")
        more = f"; and {len(parts) - 5} more workloads" if len(parts) > 5 else ""
        said.append(f"{what}: {'; '.join(parts[:5])}{more}.")
    if not said:
        best = rows.sort_values("latency_s").iloc[0]
        said.append(f"Fastest point: {_who(best)}, {shown('latency_s', best['latency_s'])} per call{_interval(best)}.")
    return said


def _most_accurate(frame: pd.DataFrame) -> str:
    found = accuracies(frame)
    if found.empty:
        return ""
    tasks = []
    for task, part in found.groupby("task", sort=True):
        best = part.sort_values("mean", ascending=False).iloc[0]
        chance = f", guessing {digits(float(best['chance']) * 100)} %" if not missing(best["chance"]) else ""
        seeds = int(best["size"])
        tasks.append(
            f"{best['workload']} on {task}, {digits(float(best['mean']) * 100)} % top-1 "
            f"({seeds} {'seed' if seeds == 1 else 'seeds'}{chance})"
        )
    more = f"; and {len(tasks) - 3} more tasks" if len(tasks) > 3 else ""
    return f"Most accurate: {'; '.join(tasks[:3])}{more}."


def standing(frame: pd.DataFrame) -> str:
    """How far to trust it: how many points ran, with what trust, in how many rounds."""
    ran = int((frame["status"] == "ok").sum())
    counts = frame["status"].value_counts()
    gone = ", ".join(f"{counts[status]:,} {status}" for status in SEVERITY[1:] if counts.get(status))
    trust = frame["trust"].value_counts()
    levels = ", ".join(f"{trust[level]:,} {level}" for level in TRUST if trust.get(level))
    rounds = sorted({int(n) for n in frame["rounds"]})
    span = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}" if rounds else "0"
    text = f"{ran:,} of {len(frame):,} points ran" + (f" ({gone})" if gone else "") + "."
    if levels:
        text += f" Trust: {levels}."
    text += f" {span} {'round' if span == '1' else 'rounds'}, each a fresh process"
    return text + ("; one round cannot know its own noise." if span == "1" else ".")


# --- rows -------------------------------------------------------------------------------------------------------------


def gone(frame: pd.DataFrame) -> pd.DataFrame:
    """The points that did not run, worst first."""
    rows = frame[frame["status"] != "ok"]
    return rows.iloc[(-rows["status"].map(SEVERITY.index)).argsort(kind="stable")] if len(rows) else rows


def embedded(frame: pd.DataFrame) -> dict[str, Any]:
    """Every row for the page's table, column by column; text with its distinct values once. Missing is null."""
    apart = sparse(frame)
    names = [*varying(frame), *(n for n in SHOWN if frame[n].notna().any()), *LAST, "point"]
    columns: list[dict[str, Any]] = []
    for name in names:
        how = SHOWN.get(name, Shown(name.replace("_", " ")))
        head: dict[str, Any] = {
            "name": name,
            "head": how.head,
            "unit": how.unit,
            "hint": METRICS[name].label if name in METRICS else "",
            "better": METRICS[name].better if name in METRICS else None,
        }
        if name in apart:
            # Still sorted and filtered by, but shown with the others of its kind in one column.
            head["apart"] = True
        if name in SHOWN:
            columns.append({**head, "values": _rounded(frame[name], how.factor)})
        elif frame[name].dtype.kind in "iuf":
            columns.append({**head, "values": _rounded(frame[name], 1.0)})
        elif name == "point":
            columns.append({**head, "texts": frame[name].tolist()})
        else:
            codes, texts = frame[name].astype("string").factorize()
            columns.append({**head, "texts": texts.tolist(), "codes": codes.tolist()})
    return {"rows": len(frame), "columns": columns, "metrics": [*SHOWN]}


def _rounded(values: pd.Series, factor: float) -> list[float | str | None]:
    """Four significant digits, which is more than any of these figures has; infinities as text."""
    numbers = values.to_numpy(float, na_value=float("nan"))
    rounded = [float(f"{v * factor:.4g}") for v in numbers.tolist()]  # what is finite may be so no more
    return [None if v != v else v if math.isfinite(v) else "inf" if v > 0 else "-inf" for v in rounded]


@dataclass(frozen=True)
class SideBySide:
    """Points that several runs have."""

    runs: tuple[str, ...]
    rows: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    """Key of the point, and of each run what it says and whether it is `slower` or `faster` than the first."""
    count: int
    """Of all such points; `rows` has those that differ most."""


SIDE_BY_SIDE = 100


def side_by_side(frame: pd.DataFrame) -> SideBySide | None:
    """Latencies of the points that two runs or more have, the largest difference first; None of a single run.

    A difference is marked where the intervals do not overlap: what may be concluded from it, `vidbench compare` says.
    """
    runs = [str(run) for run in frame["run_id"].unique()]
    timed = frame[frame["mode"] != "evaluate"]
    if len(runs) < 2 or timed.empty:
        return None
    found: dict[str, dict[str, Any]] = {}
    names = ("run_id", "point", "status", "latency_s", "latency_low_s", "latency_high_s")
    for run, point, *figures in timed[list(names)].itertuples(index=False, name=None):
        found.setdefault(str(point), {})[str(run)] = figures
    shared = {point: sides for point, sides in found.items() if len(sides) > 1}
    lines = [(point, *_beside(sides, runs)) for point, sides in shared.items()]
    lines.sort(key=lambda line: -line[2])
    return SideBySide(tuple(runs), tuple((point, cells) for point, cells, _ in lines[:SIDE_BY_SIDE]), len(shared))


def _beside(sides: dict[str, Any], runs: Sequence[str]) -> tuple[tuple[tuple[str, str], ...], float]:
    """What each run says of a point and how it differs from the first that has it; and the largest difference."""
    first = next((sides[run] for run in runs if run in sides and sides[run][0] == "ok"), None)
    cells, largest = [], 0.0
    for run in runs:
        status, latency, low, high = sides.get(run, ("", None, None, None))
        if missing(latency):
            cells.append((str(status) or "–", ""))
            continue
        told, mark = shown("latency_s", latency), ""
        if first is not None and sides[run] is not first and not missing(first[1]):
            ratio = float(latency) / float(first[1])
            told += f" ({ratio:.2f}×)"
            largest = max(largest, abs(math.log(ratio)) if ratio > 0 else 0.0)
            if not any(map(missing, (low, high, first[2], first[3]))):
                mark = "slower" if low > first[3] else "faster" if high < first[2] else ""
        cells.append((told, mark))
    return tuple(cells), largest


def differing(rows: Sequence[Sequence[tuple[str, str]]]) -> set[str]:
    """Names of an environment's rows that are not alike in all runs."""
    tables = [dict(one) for one in rows]
    return {name for one in tables for name in one if len({other.get(name) for other in tables}) > 1}


def accuracy_rows(runs: Sequence[Run]) -> list[dict[str, str]]:
    """One row per training: task, model, case, seed, top-1, guessing, altered clips."""
    rows = []
    for run in runs:
        for m in run.measurements:
            if (found := m.accuracy) is None:
                continue
            case = m.point.case
            size = " × ".join(str(case[n]) for n in ("clip_length", "height", "width") if n in case)
            rows.append(
                {
                    "task": found.task,
                    "workload": m.point.workload,
                    "clip": size,
                    "seed": str(found.seed),
                    "top-1 (%)": digits(found.top1 * 100),
                    "guessing (%)": digits(found.chance * 100),
                    "examples": f"{found.examples:,}",
                    "training (s)": digits(found.train_s),
                    "altered clips": ", ".join(f"{k} {digits(v * 100)} %" for k, v in sorted(found.conditions.items())),
                }
            )
    return rows


def environment_rows(run: Run) -> list[tuple[str, str]]:
    """The machine and the software, as names and texts; what is unknown is left out."""
    e = run.environment
    commit = e.git_commit and e.git_commit + (" (with uncommitted changes)" if e.git_dirty else "")
    rows: list[tuple[str, Any]] = [
        ("machine", e.machine), ("processor", e.cpu), ("cores", e.cores or None), ("threads used", e.threads or None),
        ("memory", f"{e.memory_bytes / 2**30:.1f} GiB" if e.memory_bytes else None), ("GPU", e.gpu),
        ("driver", e.driver), ("CUDA", e.cuda), ("cuDNN", e.cudnn), ("torch", e.torch), ("triton", e.triton),
        ("Python", e.python), ("platform", e.platform), ("vidbench", e.vidbench), ("commit", commit),
    ]  # fmt: skip
    rows += [(f"clock, {name}", digits(value)) for name, value in e.clocks.items()]
    rows += [(name, value) for name, value in e.flags.items()]
    rows += [(f"ceiling, {name}", f"{digits(v / 1e9)} GFLOP/s") for name, v in e.flops_per_s.items()]
    rows += [(f"copy, {_footprint(name)}", f"{digits(v / 1e9)} GB/s") for name, v in e.bytes_per_s.items()]
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def _footprint(name: str) -> str:
    device, _, size = name.partition("/")
    return f"{device}, {int(size) / 2**20:,.4g} MiB" if size.isdigit() else name


def machine_line(run: Run) -> str:
    """The machine in one line."""
    e = run.environment
    parts = [e.gpu, e.cpu if e.cpu else e.machine, f"{e.cores} cores" if e.cores else None]
    parts += [f"torch {e.torch}" if e.torch else None, f"CUDA {e.cuda}" if e.gpu and e.cuda else None]
    if e.git_commit:
        parts.append(f"commit {e.git_commit[:10]}{'+' if e.git_dirty else ''}")
    return " · ".join(part for part in parts if part)
