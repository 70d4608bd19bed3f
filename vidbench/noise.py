"""How far the same code lies apart on this machine: measured, three sides in turn, as the gate has them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import psutil

from vidbench.compare import FALSE_DISCOVERY_RATE
from vidbench.engine.local import LocalEngine, in_turn
from vidbench.gate import LOOKS, SIDES
from vidbench.measure import steal_since
from vidbench.significance import Effect, ratio_of
from vidbench.sweep import Point, RequestError, Value

ROUNDS = 6
SAMPLING_S = 0.15


@dataclass(frozen=True)
class Noise:
    """How far the same code lies apart here: robust standard deviations, as shares."""

    device: str
    sample: float
    """Of samples of one process."""
    process: float
    """Of processes, one after the other: what a sweep of one round cannot know."""
    turn: float
    """Of a round's change where both sides take samples in turn, as the gate has it."""
    steal: float
    """Of processor time that the hypervisor gave to others meanwhile."""
    rounds: int


def robust_deviation(values: Sequence[float]) -> float:
    """The standard deviation of a normal distribution with this median absolute deviation."""
    middle = statistics.median(values)
    return statistics.median(abs(value - middle) for value in values) / 0.6745


def noise(device: str, rounds: int = ROUNDS) -> Noise:
    """Measures three sides of the same code, in turn, each round in fresh processes; half a minute.

    Raises:
        RequestError: The device is not there.
    """
    points = _short_points(device)
    times: dict[tuple[str, str], list[list[float]]] = {}
    before = psutil.cpu_times()
    with ExitStack() as stack:
        engines = {side: stack.enter_context(LocalEngine(timeout_s=120, takes_turns=True)) for side in SIDES}
        environment, _ = engines["head"].describe(device, ("fp32",), {one.workload: one.kind for one in points})
        for number in range(1, rounds + 1):
            for engine in engines.values():
                engine.retire()
            for point in points:
                works: Any = {
                    side: engine.measuring(point, number, environment, seconds=SAMPLING_S, in_turn=True)
                    for side, engine in engines.items()
                }
                for side, measured in in_turn(works, SAMPLING_S):
                    if measured.status != "ok":
                        raise RequestError(f"{point.key} did not run here: {measured.status}: {measured.reason}")
                    logs = [math.log(sample) for sample in measured.samples_s]
                    times.setdefault((point.key, side), []).append(logs)
    return noise_of(times, device, steal_since(before))


def _short_points(device: str) -> list[Point]:
    clip: dict[str, Value] = {"clip_length": 8, "batch_size": 1}
    layer: dict[str, Value] = {
        **clip,
        "in_channels": 32,
        "out_channels": 32,
        "kernel_size": 3,
        "height": 28,
        "width": 28,
    }
    recurrent: dict[str, Value] = {**clip, "input_features": 128, "hidden_size": 128}
    network: dict[str, Value] = {**clip, "height": 32, "width": 32, "width_multiplier": 0.125, "num_classes": 6}
    return [
        Point("conv3d", "op", "library", device=device, case=layer),
        Point("lstm", "op", "library", device=device, case=recurrent),
        Point("frame_pool_avg", "model", "eager", device=device, case=network),
    ]


def noise_of(times: Mapping[tuple[str, str], list[list[float]]], device: str, steal: float) -> Noise:
    """From logarithms of samples, by point and side, round by round."""
    keys = tuple(dict.fromkeys(key for key, _ in times))
    within = [robust_deviation(logs) for rounds in times.values() for logs in rounds]
    middles = {of: [statistics.median(logs) for logs in rounds] for of, rounds in times.items()}
    between, turns = [], []
    for key in keys:
        between.append(robust_deviation([middle for side in SIDES for middle in middles[key, side]]))
        rounds = zip(*(times[key, side] for side in SIDES), strict=True)
        turns.append(
            robust_deviation(
                [
                    statistics.median(new - (old + once) / 2 for old, new, once in zip(*sides, strict=False))
                    for sides in rounds
                ]
            )
        )
    count = len(times[keys[0], SIDES[0]])
    sample, process, turn = map(statistics.median, (within, between, turns))
    return Noise(device, sample, process, turn, steal, count)


FOUND = 0.9
"""Share of the gates that are to find a change that is said to be told."""


def tells(found: Noise, rounds: int, points: int = 10) -> float:
    """The smallest change of one of so many points that a gate finds nine times in ten, after so many rounds.

    What is just significant is found every other time: the noise may as well lessen it.
    """
    effect = Effect(0.0, found.turn / math.sqrt(rounds), rounds - 1)
    significant = effect.half_width(1 - FALSE_DISCOVERY_RATE / len(LOOKS) / points)
    return ratio_of(significant + effect.half_width(2 * FOUND - 1)) - 1
