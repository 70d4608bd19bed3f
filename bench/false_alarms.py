"""How often verdicts are wrong: false alarms and power of the gate, of `compare` and of the peers' rules, on like data.

    python bench/false_alarms.py record --rounds 60 --out reports/noise/NAME       # three sides of ten points, in turn
    python bench/false_alarms.py judge reports/noise/NAME --sweeps 1000 --out reports/verdicts

An A/A sweep measures the same code on both sides: whatever it calls slower is a false alarm. `judge` makes such sweeps
of 50 points from what `record` has recorded and from simulated machines, and sweeps of 10 points of which one was made
slower, and hands all of them to `vidbench.gate.judge`, look by look, and to the rules of other tools. Every part is
written as soon as it is done, and a part that is there already is not done again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.append(str(Path(__file__).parents[1]))  # `bench` is no installed package

from bench.noise import MACHINES, RECORDING, Numbers, Recorded, Simulated, record
from vidbench import compare as compare_module
from vidbench import gate as gate_module
from vidbench import significance
from vidbench.compare import compare
from vidbench.gate import LOOKS, SIDES, judge, undecided
from vidbench.progress import Bar
from vidbench.records import Environment, Measurement
from vidbench.results import Run
from vidbench.sweep import Point

AA_POINTS = 50
POWER_POINTS = 10
SLOWDOWNS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2)
BASELINES = 5
CHUNK = 10
"""Sweeps that one process judges at a time."""

MACHINE = Environment(machine="simulated", cores=2, threads=2, git_commit="0" * 40)


# --- rules ------------------------------------------------------------------------------------------------------------


def _points(count: int) -> list[Point]:
    return [Point("conv3d", "op", "library", case={"in_channels": number}) for number in range(1, count + 1)]


def _run(name: str, measurements: Sequence[Measurement]) -> Run:
    return Run(1, name, "simulated", "2026-01-01T00:00:00Z", (), MACHINE, "", None, list(measurements), (), Path(name))


def gate_verdicts(seconds: Numbers, looks: Sequence[int] = LOOKS) -> list[dict[int, str]]:
    """What `vidbench gate` says after each look, by number of the point; the last look's stands to the end."""
    points = _points(seconds.shape[1])
    numbers = {point.key: number for number, point in enumerate(points)}
    lines: dict[str, list[Measurement]] = {side: [] for side in SIDES}
    still = set(numbers)
    found: list[dict[int, str]] = []
    done = 0
    for look in looks:
        if still:
            for side, times in zip(SIDES, seconds, strict=True):
                lines[side] += [
                    Measurement(points[number], turn + 1, "ok", samples_s=_taken(times[number, turn]))
                    for number in sorted(numbers[key] for key in still)
                    for turn in range(done, look)
                ]
            comparison = judge(*(_run(side, lines[side]) for side in SIDES), rounds=look)
            still = undecided(comparison)
            verdicts = {numbers[one.point.key]: str(one.verdict) for one in comparison.points}
        found.append(verdicts)
        done = look
    return found


def _taken(samples: Numbers) -> list[float]:
    found: list[float] = samples[~np.isnan(samples)].tolist()
    return found


def compare_verdicts(seconds: Numbers) -> dict[int, str]:
    """What `vidbench compare` says of two stored runs of six rounds; further sides are baselines."""
    points = _points(seconds.shape[1])
    medians = np.median(seconds, axis=3)
    runs = [
        _run(
            f"run {side}",
            [
                Measurement(point, turn + 1, "ok", samples_s=(medians[side, number, turn],))
                for number, point in enumerate(points)
                for turn in range(LOOKS[0])
            ],
        )
        for side in range(len(seconds))
    ]
    base, new, *others = runs
    return {number: str(one.verdict) for number, one in enumerate(compare(base, new, baselines=others).points)}


Rule = Callable[[Numbers, Numbers], npt.NDArray[np.bool_]]
"""Which points are slower, from the samples of both sides, (points, samples)."""


def pytest_benchmark(base: Numbers, new: Numbers) -> npt.NDArray[np.bool_]:
    """`--benchmark-compare-fail=mean:5%`, by pytest-benchmark's own check."""
    from pytest_benchmark.utils import parse_compare_fail

    check = parse_compare_fail("mean:5%")
    pairs = zip(np.nanmean(base, axis=1), np.nanmean(new, axis=1), strict=True)
    return np.array([bool(check.fails({"mean": after}, {"mean": before})) for before, after in pairs])


def welch(base: Numbers, new: Numbers) -> npt.NDArray[np.bool_]:
    """Welch's t test of the samples of each point by itself at 0.05."""
    from scipy.stats import ttest_ind

    found = ttest_ind(base, new, axis=1, equal_var=False, nan_policy="omit")
    return np.asarray((found.pvalue < 0.05) & (np.nanmean(new, 1) > np.nanmean(base, 1)))


def asv(base: Numbers, new: Numbers) -> npt.NDArray[np.bool_]:
    """`asv continuous` (0.6): Mann-Whitney at 0.002, and medians that differ by a factor of 1.1.

    Of fewer than six samples on either side nothing is called: the test cannot reach 0.002.
    """
    from scipy.stats import mannwhitneyu

    differ = mannwhitneyu(base, new, axis=1, nan_policy="omit").pvalue < 0.002
    return np.asarray(differ & (np.nanmedian(base, axis=1) < np.nanmedian(new, axis=1) / 1.1))


def nvbench(base: Numbers, new: Numbers) -> npt.NDArray[np.bool_]:
    """`nvbench_compare.py`: means further apart than the smaller of both relative standard deviations."""
    mean_base, mean_new = np.nanmean(base, 1), np.nanmean(new, 1)
    noise = np.minimum(np.nanstd(base, 1, ddof=1) / mean_base, np.nanstd(new, 1, ddof=1) / mean_new)
    return np.asarray(mean_new / mean_base - 1 > noise)


PEERS: Mapping[str, Rule] = {
    "pytest-benchmark, mean:5%": pytest_benchmark,
    "Welch at 0.05": welch,
    "asv continuous, 1.1": asv,
    "nvbench_compare": nvbench,
}


def peer_verdicts(seconds: Numbers) -> dict[str, npt.NDArray[np.bool_]]:
    """What other tools call slower: given one process of either side, as they are used, and given all of them."""
    base, new = seconds[:2]
    found = {}
    for name, rule in PEERS.items():
        found[f"{name}; 1 process"] = rule(base[:, 0], new[:, 0])
        found[f"{name}; {LOOKS[-1]} processes"] = rule(*(side.reshape(len(side), -1) for side in (base, new)))
    return found


# --- parts ------------------------------------------------------------------------------------------------------------

GATE = "vidbench gate"
ANY_BUDGET = f"{GATE}, ended by its budget"
COMPARE = f"vidbench compare, {BASELINES} baselines"
BLIND = "vidbench compare, no baselines"


def _slowed(seconds: Numbers, slowdown: float) -> Numbers:
    """The sweep with the first point of the second side slower."""
    seconds = seconds.copy()
    seconds[1, 0] *= 1 + slowdown
    return seconds


def alarms(noise: Simulated | Recorded, seed: int) -> dict[str, bool]:
    """Of one A/A sweep: which rules call anything slower."""
    rng = np.random.default_rng(seed)
    seconds = noise.draw(rng, AA_POINTS)
    looks = gate_verdicts(seconds)
    found = {f"{GATE}, {look} rounds": "SLOWER" in said.values() for look, said in zip(LOOKS, looks, strict=True)}
    end = int(rng.integers(LOOKS[0], LOOKS[-1] + 1))
    last = gate_verdicts(seconds, [*(look for look in LOOKS if look < end), end])[-1]
    found[ANY_BUDGET] = "SLOWER" in last.values()
    found |= {name: bool(slower.any()) for name, slower in peer_verdicts(seconds).items()}
    if isinstance(noise, Simulated):
        apart = noise.draw(rng, AA_POINTS, sides=1 + BASELINES, apart=True)
        found[COMPARE] = "SLOWER" in compare_verdicts(apart).values()
        found[BLIND] = "SLOWER" in compare_verdicts(apart[:2]).values()
    return found


def finds(noise: Simulated | Recorded, seed: int) -> dict[str, bool]:
    """Of one sweep in which one point is slower: which rules call that point slower, by rule and slowdown."""
    rng = np.random.default_rng(seed)
    honest = noise.draw(rng, POWER_POINTS)
    apart = noise.draw(rng, POWER_POINTS, sides=1 + BASELINES, apart=True) if isinstance(noise, Simulated) else None
    found = {}
    for slowdown in SLOWDOWNS:
        seconds = _slowed(honest, slowdown)
        for look, said in zip(LOOKS, gate_verdicts(seconds), strict=True):
            found[f"{GATE}, {look} rounds @ {slowdown}"] = said[0] == "SLOWER"
        for name, slower in peer_verdicts(seconds).items():
            found[f"{name} @ {slowdown}"] = bool(slower[0])
        if apart is not None:
            found[f"{COMPARE} @ {slowdown}"] = compare_verdicts(_slowed(apart, slowdown))[0] == "SLOWER"
            found[f"{BLIND} @ {slowdown}"] = compare_verdicts(_slowed(apart, slowdown)[:2])[0] == "SLOWER"
    return found


def _count(part: Callable[[int], dict[str, bool]], seeds: Sequence[int]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for seed in seeds:
        for name, said in part(seed).items():
            counts[name] = counts.get(name, 0) + said
    return counts


def _counted(part: Callable[[int], dict[str, bool]], total: int, what: str) -> dict[str, int]:
    """How many of so many sweeps each rule has named."""
    bar = Bar(sys.stderr, every_s=20)
    counts: dict[str, int] = {}
    chunks = [range(first, min(first + CHUNK, total)) for first in range(0, total, CHUNK)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for number, found in enumerate(pool.map(partial(_count, part), chunks), 1):
            for name, count in found.items():
                counts[name] = counts.get(name, 0) + count
            bar.update(number, len(chunks), what)
            bar.say(f"{what}: {min(number * CHUNK, total)} of {total} sweeps", last=number == len(chunks))
    bar.close()
    return counts


def _digest(*files: Path) -> str:
    """Of what a part hangs on: a part of something else is done anew."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def judged(noises: Sequence[Simulated | Recorded], out: Path, sweeps: int, power_sweeps: int) -> dict[str, Any]:
    """All parts; those that `out` has already, of as many sweeps, are taken from there."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "verdicts.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    rules = _digest(*(Path(module.__file__ or "") for module in (compare_module, gate_module, significance)))
    for noise in noises:
        of = {"meaning": noise.meaning, "rules": rules}
        if isinstance(noise, Recorded):
            of["recording"] = _digest(noise.folder / RECORDING)
        if found.get(noise.name, {}).get("of") != of:
            found[noise.name] = {"of": of}
        entry = found[noise.name]
        if isinstance(noise, Recorded):
            entry["deviations"] = noise.deviations()
            if not math.isnan(took := noise.seconds_per_round()):
                entry["seconds_per_round"] = took
        for name, part, total in (("alarms", alarms, sweeps), ("finds", finds, power_sweeps)):
            if entry.get(name, {}).get("sweeps") != total:
                counts = _counted(partial(part, noise), total, f"{noise.name}, {name}")
                entry[name] = {"sweeps": total, "counts": counts}
            part_path = path.with_suffix(".tmp")
            part_path.write_text(json.dumps(found, indent=1) + "\n")
            part_path.replace(path)
    return found


# --- what is said of them ---------------------------------------------------------------------------------------------


def wilson(count: int, total: int) -> tuple[float, float]:
    """95 % interval of a share. Source: Wilson (1927), JASA 22(158):209."""
    z = statistics.NormalDist().inv_cdf(0.975)
    share = count / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def _share(part: Mapping[str, Any], name: str) -> str:
    if name not in part["counts"]:
        return "–"
    return f"{part['counts'][name] / part['sweeps']:.1%}".replace("%", " %")


def tables(found: Mapping[str, Any]) -> Iterator[str]:
    """Markdown: false alarms and power of every rule, then the power of the gate by slowdown and rounds."""
    first = next(iter(found.values()))
    sweeps, power_sweeps = first["alarms"]["sweeps"], first["finds"]["sweeps"]
    gates = [f"{GATE}, {look} rounds" for look in LOOKS]
    rules = [gates[-1], *(name for entry in found.values() for name in entry["alarms"]["counts"] if name not in gates)]
    rules = list(dict.fromkeys(rules))
    yield (
        f"**False alarms**: share of {sweeps} A/A sweeps of {AA_POINTS} points in which a rule calls anything slower; "
        f"behind the dash, how often it finds 5 % on one of {POWER_POINTS} points ({power_sweeps} sweeps).\n"
    )
    yield "| rule | " + " | ".join(found) + " |"
    yield "|---|" + "---|" * len(found)
    for rule in rules:
        cells = [f"{_share(one['alarms'], rule)} / {_share(one['finds'], f'{rule} @ 0.05')}" for one in found.values()]
        yield f"| {rule} | " + " | ".join(cells) + " |"
    for name, entry in found.items():
        low, high = wilson(entry["alarms"]["counts"][gates[-1]], entry["alarms"]["sweeps"])
        yield f"\n**{name}**: {entry['of']['meaning']}."
        yield f"False alarms of the gate between {low:.2%} and {high:.2%} (95 %)."
        if "deviations" in entry:
            least, *_, most = entry["deviations"]
            yield f"A round's change has a robust deviation of {least:.1%} to {most:.1%}, by point."
            if "seconds_per_round" in entry:
                yield f"A round of all points took {entry['seconds_per_round']:.1f} s."
            yield (
                "Sweeps are dealt from the rounds that there are: the interval is that of the dealing, not of other "
                "days of the machine."
            )
        yield f"\n| slowdown found by {GATE} | " + " | ".join(f"{look} rounds" for look in LOOKS) + " |"
        yield "|---|" + "---|" * len(LOOKS)
        for slowdown in SLOWDOWNS:
            cells = [_share(entry["finds"], f"{gate} @ {slowdown}") for gate in gates]
            yield f"| {slowdown:.0%} | " + " | ".join(cells) + " |"


def power_figure(found: Mapping[str, Any]) -> Any:
    """The share of planted slowdowns that are found, over their size; a line for each number of rounds."""
    import matplotlib.pyplot as plt

    from vidbench.report.style import DASHES, MARKERS, OTHERS, styled

    with styled():
        figure, axes = plt.subplots(1, len(found), figsize=(3.2 * len(found), 3.2), sharey=True, squeeze=False)
        for ax, (name, entry) in zip(axes[0], found.items(), strict=True):
            part = entry["finds"]
            for index, look in enumerate(LOOKS):
                shares = [part["counts"][f"{GATE}, {look} rounds @ {one}"] / part["sweeps"] for one in SLOWDOWNS]
                style = {"color": OTHERS[index], "marker": MARKERS[index], "linestyle": DASHES[index]}
                ax.plot(
                    [100 * one for one in SLOWDOWNS], [100 * one for one in shares], label=f"{look} rounds", **style
                )
            ax.axhline(95, color="#8c8c8c", linewidth=0.8)
            ax.set(title=name, xlabel="planted slowdown (%)", xscale="log", ylim=(-2, 102))
            ax.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
            ax.minorticks_off()
        axes[0][0].set_ylabel("found (%)")
        axes[0][-1].legend(loc="lower right")
        figure.tight_layout()
    return figure


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="take rounds of the same code in turn on this machine")
    recording.add_argument("--rounds", type=int, default=60)
    recording.add_argument("--seconds", type=float, default=0.3, help="budget for sampling a point in a round")
    recording.add_argument("--out", type=Path, required=True)
    judging = commands.add_parser("judge", help="count false alarms and what is found")
    judging.add_argument("recording", type=Path, nargs="?", help="a folder of `record`; without it, simulations alone")
    judging.add_argument("--sweeps", type=int, default=1000, help=f"A/A sweeps of {AA_POINTS} points")
    judging.add_argument("--power-sweeps", type=int, default=400, help=f"sweeps of {POWER_POINTS} points, one slower")
    judging.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.command == "record":
        record(given.out, given.rounds, given.seconds)
        return
    noises: list[Simulated | Recorded] = [Recorded(given.recording)] if given.recording else []
    found = judged([*noises, *MACHINES], given.out, given.sweeps, given.power_sweeps)
    text = "\n".join(tables(found)) + "\n"
    (given.out / "verdicts.md").write_text(text)
    figure = power_figure(found)
    for suffix in ("svg", "png"):
        figure.savefig(given.out / f"power.{suffix}", dpi=150)
    print(text)


if __name__ == "__main__":
    main()
