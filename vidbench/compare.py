"""Two runs compared: a verdict for every point from raw samples grouped by process. Needs no torch.

The process is the unit: samples of one process agree with each other far better than two processes do. What can be
counted (multiply-adds, parameters, bytes) is compared for equality, and on any machine.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from vidbench.causes import causes
from vidbench.metrics import SEVERITY, Interval, interval
from vidbench.records import Accuracy, Environment, Measurement
from vidbench.results import Run
from vidbench.significance import Effect, discoveries, foretold, paired, ratio_of, unpaired
from vidbench.sweep import Point

Verdict = Literal["FASTER", "SLOWER", "SAME", "UNDECIDED", "MISSING", "NEW", "NOT COMPARED"]

FALSE_DISCOVERY_RATE = 0.01
MATTERS = 0.01
"""Changes of a time by less than this are the same to everybody."""

EQUIVALENT = 0.03
"""A time is the SAME where the whole interval of its change lies within this, or within the noise between runs."""

UNKNOWN_RUN_NOISE = 0.2
"""How far two runs taken apart may lie without a cause, where nobody has measured it on their machine."""

ENOUGH_BASELINES = 5
ENOUGH_POINTS = 10
"""So many points of two runs tell themselves how far runs lie apart: most have not changed."""

ALLOCATION_BYTES = 512
"""The step in which allocators count memory."""

MACHINE = ("machine", "gpu", "cores", "threads")
"""Fields of an environment that make two machines unlike for times."""

CAUSES = ("torch", "triton", "cuda", "cudnn", "driver", "python", "platform", "vidbench", "git_commit", "flags")
"""Fields that may be why a time changed."""


@dataclass(frozen=True)
class Change:
    """An exact figure that is not what it was."""

    metric: str
    base: float
    new: float
    worse: bool


@dataclass(frozen=True)
class PointVerdict:
    """What became of one point."""

    point: Point
    verdict: Verdict
    reason: str = ""
    effect: Effect | None = None
    base_s: float | None = None
    new_s: float | None = None
    changes: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()
    """What is doubtful about either side."""
    causes: tuple[str, ...] = ()
    """What else is not as it was, and may be why."""

    @property
    def worse(self) -> bool:
        """Whether a gate has to stop it."""
        return self.verdict in ("SLOWER", "MISSING") or any(change.worse for change in self.changes)


@dataclass(frozen=True)
class AccuracyVerdict:
    """What became of a model's accuracy on a task."""

    what: str
    base: Interval
    new: Interval
    difference: Interval
    verdict: Literal["HIGHER", "LOWER", "SAME", "UNDECIDED"]

    @property
    def worse(self) -> bool:
        """Whether a gate has to stop it."""
        return self.verdict == "LOWER"


@dataclass(frozen=True)
class Comparison:
    """All verdicts of one comparison."""

    points: tuple[PointVerdict, ...]
    accuracies: tuple[AccuracyVerdict, ...]
    not_compared: str = ""
    """Why times are not; empty where they are."""
    causes: Mapping[str, tuple[object, object]] = field(default_factory=dict)
    """What differs between the two environments, and may be why."""
    run_noise: str = ""
    """What is known of the noise between runs."""

    @property
    def worse(self) -> bool:
        """Whether anything became worse."""
        return any(one.worse for one in self.points) or any(one.worse for one in self.accuracies)

    @property
    def exit_code(self) -> int:
        """1 where anything became worse, else 0."""
        return int(self.worse)

    def counts(self) -> dict[str, int]:
        """How many points there are of each verdict."""
        found: dict[str, int] = {}
        for one in self.points:
            found[one.verdict] = found.get(one.verdict, 0) + 1
        return found


@dataclass
class _Side:
    """What one run has of a point."""

    point: Point
    rounds: dict[int, Measurement] = field(default_factory=dict)

    @property
    def worst(self) -> Measurement:
        return max(self.rounds.values(), key=lambda one: SEVERITY.index(one.status))

    @property
    def ok(self) -> bool:
        return self.worst.status == "ok"

    def times(self) -> dict[int, float]:
        """Seconds of every round: the median of its samples."""
        return {number: one.median_s for number, one in self.rounds.items() if one.median_s is not None}


def compare(
    base: Run,
    new: Run,
    *,
    baselines: Sequence[Run] = (),
    again: Run | None = None,
    rate: float = FALSE_DISCOVERY_RATE,
) -> Comparison:
    """Judges every point of two runs.

    Args:
        base: What was.
        new: What is.
        baselines: Further runs of BASE's revision and machine; five with it tell how far runs lie apart by chance.
        again: BASE measured once more, where the samples of round i of all three were taken in turn.
        rate: Of false discoveries.
    """
    sides = _sides(base.measurements), _sides(new.measurements)
    not_compared = _unlike(base.environment, new.environment)
    floor, run_noise = _run_noise(base, baselines) if again is None else (0.0, "BASE and NEW were measured in turn")
    found = [_judge_presence(sides[0].get(key), sides[1].get(key)) for key in dict.fromkeys((*sides[0], *sides[1]))]
    points = [one for one in found if one is not None]
    if not_compared:
        points = [_on_unlike_machines(one) for one in points]
    else:
        repeated = None if again is None else _sides(again.measurements)
        points = _judge_times(points, sides, repeated, baselines, floor, rate)
    return Comparison(
        tuple(points),
        tuple(_accuracies(base.measurements, new.measurements)),
        not_compared,
        _causes(base.environment, new.environment),
        "" if not_compared else run_noise,
    )


def _sides(measurements: Sequence[Measurement]) -> dict[str, _Side]:
    """By point; evaluations are judged apart, over their seeds."""
    found: dict[str, _Side] = {}
    for one in measurements:
        if one.point.kind != "task":
            found.setdefault(one.point.key, _Side(one.point)).rounds[one.round] = one
    return found


def _unlike(base: Environment, new: Environment) -> str:
    """Why times of two machines cannot be compared; empty where they can."""
    for name in MACHINE:
        then, now = getattr(base, name), getattr(new, name)
        if then != now:
            return f"{name} was {then!r} and is {now!r}: times of unlike machines are not compared"
    return ""


def _causes(base: Environment, new: Environment) -> dict[str, tuple[object, object]]:
    pairs = {name: (getattr(base, name), getattr(new, name)) for name in CAUSES}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _run_noise(base: Run, baselines: Sequence[Run]) -> tuple[float, str]:
    """The change below which nothing is called between stored runs, and why."""
    count = len({run.id for run in (*baselines, base)})
    if count >= ENOUGH_BASELINES:
        return 0.0, f"noise between runs from {count} baselines"
    words = "baseline" if count == 1 else "baselines"
    return UNKNOWN_RUN_NOISE, (
        f"{count} {words} of this machine: two runs taken apart may differ by {UNKNOWN_RUN_NOISE:.0%} without a cause; "
        f"{ENOUGH_BASELINES} baselines would tell, or `vidbench gate`, which takes both in turn"
    )


def _judge_presence(base: _Side | None, new: _Side | None) -> PointVerdict | None:
    """MISSING, NEW, or UNDECIDED with its exact figures, until times are judged; None of what neither could do."""
    if base is None or not base.ok:
        return PointVerdict(new.point, "NEW", new_s=_middle(new)) if new is not None and new.ok else None
    if new is None:
        return PointVerdict(base.point, "MISSING", "it is not in NEW", base_s=_middle(base))
    if not new.ok:
        worst = new.worst
        return PointVerdict(base.point, "MISSING", f"{worst.status}: {worst.reason}", base_s=_middle(base))
    notes = tuple(
        f"{name}: {reason}"
        for name, side in (("BASE", base), ("NEW", new))
        for reason in dict.fromkeys(reason for one in side.rounds.values() for reason in one.trust_reasons)
    )
    return PointVerdict(
        base.point,
        "UNDECIDED",
        base_s=_middle(base),
        new_s=_middle(new),
        changes=tuple(_changes(base, new)),
        notes=notes,
        causes=tuple(causes(list(base.rounds.values()), list(new.rounds.values()))),
    )


def _on_unlike_machines(one: PointVerdict) -> PointVerdict:
    """Without times, and without what belongs to one machine."""
    changes = tuple(change for change in one.changes if change.metric not in COMPILED)
    verdict: Verdict = "NOT COMPARED" if one.verdict == "UNDECIDED" else one.verdict
    return replace(one, verdict=verdict, changes=changes, causes=())


def _middle(side: _Side) -> float | None:
    times = side.times().values()
    return statistics.median(times) if times else None


def _changes(base: _Side, new: _Side) -> list[Change]:
    """Exact figures that differ; less of each is better, but of registers, which a kernel may use for the better."""
    found = []
    for metric, of in _EXACT.items():
        then = {value for one in base.rounds.values() if (value := of(one)) is not None}
        now = {value for one in new.rounds.values() if (value := of(one)) is not None}
        if len(then) == len(now) == 1 and then != now:
            found.append(Change(metric, min(then), min(now), min(now) > min(then) and metric not in NEITHER_WORSE))
    then = {one.memory.peak_bytes for one in base.rounds.values() if one.memory is not None}
    now = {one.memory.peak_bytes for one in new.rounds.values() if one.memory is not None}
    if then and now:
        # Peaks of rounds differ by what a library keeps: only what lies outside both their ranges has changed.
        if min(now) > max(then) + ALLOCATION_BYTES:
            found.append(Change("peak_memory_bytes", max(then), min(now), True))
        elif max(now) < min(then) - ALLOCATION_BYTES:
            found.append(Change("peak_memory_bytes", min(then), max(now), False))
    return found


def _macs(one: Measurement) -> int | None:
    return one.counts.macs if one.counts is not None else None


_EXACT: dict[str, Callable[[Measurement], int | None]] = {
    "macs": _macs,
    "params": lambda one: one.params,
    "bytes_moved": lambda one: one.bytes_moved,
    "registers": lambda one: one.registers,
    "spills": lambda one: one.spills,
}

NEITHER_WORSE = ("registers",)
"""More of it may be slower or faster: it is told, and the time decides."""

COMPILED = ("registers", "spills")
"""What a compiler makes of a kernel for one GPU is no figure of another's."""


def _judge_times(
    points: list[PointVerdict],
    sides: tuple[dict[str, _Side], dict[str, _Side]],
    again: dict[str, _Side] | None,
    baselines: Sequence[Run],
    floor: float,
    rate: float,
) -> list[PointVerdict]:
    """The verdicts of all points that both runs have, judged together, since many points make many chances."""
    timed = [one for one in points if one.verdict == "UNDECIDED" and one.base_s is not None and one.new_s is not None]
    floors: dict[str, float] = {}
    if again is not None:
        effects = {one.point.key: _in_turn(one.point.key, sides, again) for one in timed}
    else:
        effects = _taken_apart(timed, sides)
        if floor:
            floors = dict.fromkeys(effects, floor)
        else:
            against = _against_runs(timed, sides, baselines)
            floors = {key: UNKNOWN_RUN_NOISE for key in effects if key not in against}
            effects |= against
    judged = [_with(one, effects.get(one.point.key), in_turn=again is not None) for one in points]
    tested = [one for one in judged if one.effect is not None]
    found = discoveries([one.effect.p for one in tested if one.effect is not None], rate)
    named = {one.point.key for one, is_found in zip(tested, found, strict=True) if is_found}
    lone = rate / max(1, len(tested))
    return [
        _verdict_of(one, one.point.key in named, floors.get(one.point.key, 0.0), lone)
        if one.verdict == "UNDECIDED"
        else one
        for one in judged
    ]


def _with(one: PointVerdict, effect: Effect | None, *, in_turn: bool) -> PointVerdict:
    """The point with its effect, and with times that go with it: medians of either side by itself may not."""
    if effect is None or one.base_s is None or one.new_s is None:
        return replace(one, effect=effect)
    if in_turn:
        return replace(one, effect=effect, new_s=one.base_s * effect.ratio)
    return replace(one, effect=effect, base_s=one.new_s / effect.ratio)


def _verdict_of(one: PointVerdict, named: bool, floor: float, lone: float) -> PointVerdict:
    """The verdict of one point's time.

    Args:
        one: The point with its effect.
        named: Whether the effect is no chance, all points considered.
        floor: A change that may be without a cause.
        lone: The p below which a single effect among all points is no chance.
    """
    if one.base_s is None or one.new_s is None:
        return replace(one, verdict="SAME", reason="it has no times")
    if one.effect is None:
        return replace(one, reason="one round tells nothing of the noise between processes: take six or more")
    change = one.effect.log_ratio
    if named and abs(change) > math.log1p(max(floor, MATTERS)):
        return replace(one, verdict="SLOWER" if change > 0 else "FASTER")
    if named and floor and abs(change) > math.log1p(MATTERS):
        return replace(one, reason=f"{one.effect.ratio - 1:+.1%}, less than two runs may differ by without a cause")
    if abs(change) + one.effect.half_width() <= math.log1p(max(EQUIVALENT, floor)):
        return replace(one, verdict="SAME", reason=f"within {floor:.0%}" if floor > EQUIVALENT else "")
    return replace(one, reason=f"could have seen {_smallest(one.effect, floor, lone):.1%}")


def _smallest(effect: Effect, floor: float, lone: float) -> float:
    """The smallest slowdown that would have been told from none, had it been the only one."""
    return max(ratio_of(effect.half_width(1 - lone)) - 1, floor)


def _in_turn(key: str, sides: tuple[dict[str, _Side], dict[str, _Side]], again: dict[str, _Side]) -> Effect | None:
    """The effect of rounds that belong together, and in them of samples, the first with the first and so on."""
    timed = [side[key].times() if key in side else {} for side in (*sides, again)]
    changes, repeats = [], []
    for number in sorted(set.intersection(*(set(side) for side in timed))):
        logs = [np.log(side[key].rounds[number].samples_s) for side in (*sides, again)]
        if len(set(map(len, logs))) > 1:  # one of them was measured by itself
            logs = [np.median(one, keepdims=True) for one in logs]
        base, new, repeated = logs
        changes.append(float(np.median(new - (base + repeated) / 2)))
        repeats.append(float(np.median(repeated - base)))
    return paired(changes, repeats)


def _against_runs(
    timed: Sequence[PointVerdict], sides: tuple[dict[str, _Side], dict[str, _Side]], baselines: Sequence[Run]
) -> dict[str, Effect | None]:
    """Effects of the points that enough runs of the base have; of the two runs' rounds where they are less sure."""
    runs = [sides[0], *(_sides(run.measurements) for run in {run.id: run for run in baselines}.values())]
    found: dict[str, Effect | None] = {}
    for one in timed:
        key = one.point.key
        middles = [middle for run in runs if key in run and run[key].ok and (middle := _middle(run[key])) is not None]
        if len(middles) >= ENOUGH_BASELINES and one.new_s is not None:
            effect = unpaired(*(list(side[key].times().values()) for side in sides))
            by_runs = foretold(middles, one.new_s)
            found[key] = by_runs if effect is None or by_runs.p > effect.p else effect
    return found


def _taken_apart(
    timed: Sequence[PointVerdict], sides: tuple[dict[str, _Side], dict[str, _Side]]
) -> dict[str, Effect | None]:
    """Effects of two runs of whose noise nothing is known but what their points tell: how far most of them moved."""
    moved = [math.log(one.new_s / one.base_s) for one in timed if one.new_s and one.base_s]
    # Of few points nothing can be told: then what may be without a cause is two standard deviations of a difference.
    deviation = math.log1p(UNKNOWN_RUN_NOISE) / 2
    if len(moved) >= ENOUGH_POINTS:
        deviation = statistics.median(map(abs, moved)) / statistics.NormalDist().inv_cdf(0.75)
    return {
        one.point.key: unpaired(
            *(list(side[one.point.key].times().values()) for side in sides), run_deviation=deviation / math.sqrt(2)
        )
        for one in timed
    }


def _accuracies(base: Sequence[Measurement], new: Sequence[Measurement]) -> list[AccuracyVerdict]:
    """Of every model and task that both runs have: the difference over the seeds that they share."""
    then, now = _by_seed(base), _by_seed(new)
    found = []
    for what in then:
        seeds = sorted(then[what].keys() & now.get(what, {}).keys())
        if not seeds:
            continue
        before, after = ([side[what][seed] for seed in seeds] for side in (then, now))
        differences = [b.top1 - a.top1 for a, b in zip(before, after, strict=True)]
        if len(seeds) > 1:
            difference = interval(differences)
        else:
            # One seed: the chance in the test clips alone, which both were tested on or not.
            spread = math.sqrt(sum(one.top1 * (1 - one.top1) / one.examples for one in (before[0], after[0])))
            difference = Interval(differences[0], differences[0] - 1.96 * spread, differences[0] + 1.96 * spread)
        found.append(
            AccuracyVerdict(
                what,
                interval([one.top1 for one in before]),
                interval([one.top1 for one in after]),
                difference,
                _accuracy_verdict(differences, difference),
            )
        )
    return found


def _accuracy_verdict(differences: Sequence[float], found: Interval) -> Literal["HIGHER", "LOWER", "SAME", "UNDECIDED"]:
    if not any(differences):
        return "SAME"
    if found.high < 0:
        return "LOWER"
    if found.low > 0:
        return "HIGHER"
    return "SAME" if max(-found.low, found.high) <= EQUIVALENT else "UNDECIDED"


def _by_seed(measurements: Sequence[Measurement]) -> dict[str, dict[int, Accuracy]]:
    found: dict[str, dict[int, Accuracy]] = {}
    for one in measurements:
        if one.status == "ok" and one.accuracy is not None:
            case = {name: value for name, value in one.point.case.items() if name != "seed"}
            found.setdefault(replace(one.point, case=case).key, {})[one.accuracy.seed] = one.accuracy
    return found
