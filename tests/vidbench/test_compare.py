"""Verdicts: against scipy's tests, on planted changes, and as a shell and a pull request see them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy import stats

from vidbench import baselines
from vidbench.compare import Comparison, PointVerdict, compare
from vidbench.compare_text import FORMATS, apart, headline, label
from vidbench.records import Accuracy, Counts, Environment, Measurement, Memory
from vidbench.results import Run, RunWriter, load
from vidbench.significance import discoveries, paired, unpaired
from vidbench.sweep import Point, RequestError

MACHINE = Environment(machine="test bench", cores=2, threads=2, torch="2.13.0", git_commit="a" * 40)


def point(name: str = "conv3d", **case: Any) -> Point:
    return Point(name, "op", "library", case={"clip_length": 8, **case})


def measured(at: Point, round_: int, seconds: float, **more: Any) -> Measurement:
    return Measurement(at, round_, "ok", samples_s=[0.99 * seconds, seconds, 1.01 * seconds], **more)


def run_of(measurements: Sequence[Measurement], name: str = "run", environment: Environment = MACHINE) -> Run:
    return Run(1, name, "quick", "2026-01-01T00:00:00Z", (), environment, "vidbench sweep quick", None,
               list(measurements), (), Path(name))  # fmt: skip


def rounds_of(at: Point, seconds: Sequence[float], **more: Any) -> list[Measurement]:
    return [measured(at, number, one, **more) for number, one in enumerate(seconds, 1)]


def noisy(middle: float, spread: float, rounds: int, seed: int) -> list[float]:
    return (middle * np.exp(spread * np.random.default_rng(seed).standard_normal(rounds))).tolist()


def test_few_pairs_are_the_plain_paired_t_test() -> None:
    base, new = noisy(1.0, 0.02, 7, 0), noisy(1.03, 0.02, 7, 1)
    found = paired(np.log(new) - np.log(base))
    want = stats.ttest_rel(np.log(new), np.log(base))
    assert found is not None
    assert found.p == pytest.approx(want.pvalue)
    low, high = want.confidence_interval(0.95)
    assert found.log_ratio == pytest.approx((low + high) / 2)
    assert found.half_width() == pytest.approx((high - low) / 2)


def test_many_rounds_apart_are_yuens_test() -> None:
    base, new = noisy(1.0, 0.02, 20, 2), noisy(1.01, 0.05, 12, 3)
    found = unpaired(base, new)
    want = stats.ttest_ind(np.log(new), np.log(base), equal_var=False, trim=0.1)
    assert found is not None
    assert found.p == pytest.approx(want.pvalue)
    assert found.degrees == pytest.approx(want.df)
    assert unpaired([1.0], [1.0, 2.0]) is None


def test_a_slow_process_in_twenty_changes_little() -> None:
    base, new = noisy(1.0, 0.01, 20, 4), noisy(1.05, 0.01, 20, 5)
    clean = paired(np.log(new) - np.log(base))
    new[3] *= 3.0
    disturbed = paired(np.log(new) - np.log(base))
    assert clean is not None
    assert disturbed is not None
    assert disturbed.log_ratio == pytest.approx(clean.log_ratio, abs=0.005)
    assert disturbed.p < 1e-6
    assert stats.ttest_rel(np.log(new), np.log(base)).pvalue > 0.03  # what the plain test would say


def test_a_repeated_base_never_makes_the_noise_smaller_than_it_is() -> None:
    """Under no change p-values below 1 % come in at most about 1 % of cases, few rounds or many, heavy tails or not."""
    generator = np.random.default_rng(6)
    for rounds in (6, 12):
        for tail in (generator.standard_normal, lambda size: generator.standard_t(2, size)):
            alarms = 0
            for _ in range(3000):
                base, new, again = 0.02 * tail((3, rounds))
                found = paired(new - (base + again) / 2, again - base)
                assert found is not None
                alarms += found.p < 0.01
            assert alarms <= 45  # 1.5 %: three deviations above 1 %


def test_a_run_effect_widens_what_is_known() -> None:
    base, new = noisy(1.0, 0.001, 6, 7), noisy(1.05, 0.001, 6, 8)
    sharp = unpaired(base, new)
    blurred = unpaired(base, new, run_deviation=0.05)
    assert sharp is not None
    assert blurred is not None
    assert sharp.p < 1e-6
    assert blurred.p > 0.3
    assert blurred.standard_error == pytest.approx(math.hypot(sharp.standard_error, 0.05 * math.sqrt(2)))


def test_false_discoveries_are_controlled_as_scipy_does() -> None:
    p = [0.0001, 0.2, 0.011, 0.0009, 0.9]
    assert discoveries(p, 0.01) == [True, False, False, True, False]
    assert discoveries([], 0.01) == []


def verdicts(found: Comparison) -> dict[str, str]:
    return {f"{one.point.workload} {one.point.case['clip_length']}": one.verdict for one in found.points}


def test_planted_changes_are_found_and_others_are_not() -> None:
    changes = {8: 1.0, 16: 1.1, 32: 0.8, 64: 1.0}
    base = [m for t in changes for m in rounds_of(point(clip_length=t), noisy(1e-2, 0.005, 12, t))]
    again = [m for t in changes for m in rounds_of(point(clip_length=t), noisy(1e-2, 0.005, 12, t + 1))]
    new = [m for t, by in changes.items() for m in rounds_of(point(clip_length=t), noisy(by * 1e-2, 0.005, 12, t + 2))]
    found = compare(run_of(base), run_of(new), again=run_of(again))
    assert verdicts(found) == {"conv3d 8": "SAME", "conv3d 16": "SLOWER", "conv3d 32": "FASTER", "conv3d 64": "SAME"}
    assert found.exit_code == 1
    slower = next(one for one in found.points if one.verdict == "SLOWER")
    assert slower.effect is not None
    assert slower.effect.ratio == pytest.approx(1.1, rel=0.01)


def test_what_slows_all_samples_of_a_moment_alike_is_no_noise() -> None:
    generator = np.random.default_rng(8)

    def taken(moments: list[float], factor: float) -> list[Measurement]:
        return [
            Measurement(point(), number, "ok", samples_s=[1e-2 * factor * one for one in moments])
            for number in range(1, 7)
        ]

    moments = np.exp(0.5 * generator.standard_normal(21)).tolist()  # half as fast, twice as fast
    found = compare(run_of(taken(moments, 1.0)), run_of(taken(moments, 1.05)), again=run_of(taken(moments, 1.0)))
    (one,) = found.points
    assert one.verdict == "SLOWER"
    assert one.effect is not None
    assert one.effect.ratio == pytest.approx(1.05)
    # Where a side has other numbers of samples, they are no pairs, and medians are compared.
    fewer = run_of([replace(m, samples_s=m.samples_s[:15]) for m in taken(moments, 1.05)])
    (one,) = compare(run_of(taken(moments, 1.0)), fewer, again=run_of(taken(moments, 1.0))).points
    assert one.effect is not None
    assert one.effect.ratio == pytest.approx(1.05 * np.median(moments[:15]) / np.median(moments))


def test_runs_taken_apart_are_judged_by_the_noise_between_runs() -> None:
    at = point()
    base, new = (
        run_of(rounds_of(at, noisy(1e-2, 0.002, 6, 0)), "b"),
        run_of(rounds_of(at, noisy(1.1e-2, 0.002, 6, 1)), "n"),
    )
    unknown = compare(base, new)
    assert unknown.points[0].verdict == "UNDECIDED"
    assert unknown.points[0].reason.startswith("could have seen ")
    assert "two runs taken apart may differ by 20% without a cause" in unknown.run_noise
    far = compare(base, run_of(rounds_of(at, noisy(1.5e-2, 0.002, 6, 1)), "n"))
    assert far.points[0].verdict == "SLOWER"
    quiet = [run_of(rounds_of(at, noisy(1e-2 * (1 + 0.002 * i), 0.002, 6, i)), f"q{i}") for i in range(5)]
    assert compare(base, new, baselines=quiet).points[0].verdict == "SLOWER"
    noisy_machine = [run_of(rounds_of(at, noisy(1e-2 * (1 + 0.1 * i), 0.002, 6, i)), f"l{i}") for i in range(5)]
    assert compare(base, new, baselines=noisy_machine).points[0].verdict == "UNDECIDED"


def test_rounds_that_have_nothing_in_common_are_told_all_the_same() -> None:
    """Found by fuzzing: the logarithm of a ratio may be beyond what a number holds."""
    from vidbench.compare_text import FORMATS
    from vidbench.significance import FARTHEST, Effect

    wild = Effect(1400.0, 1e-3, 1)
    assert wild.ratio == FARTHEST
    assert wild.ratio_interval == (FARTHEST, FARTHEST)
    assert Effect(-1400.0, 900.0, 1).ratio_interval == (1 / FARTHEST, FARTHEST)
    base, new = (run_of(rounds_of(point(), times)) for times in ([1e-300, 1e300], [1e300, 1e-300]))
    found = compare(base, new)
    assert found.points[0].verdict == "UNDECIDED"
    assert all(form(found, base, new) for form in FORMATS.values())


def test_of_a_point_that_few_baselines_have_the_noise_between_runs_is_not_known() -> None:
    old, young = point("old"), point("young")
    quiet = [run_of(rounds_of(old, noisy(1e-2, 0.002, 6, i)), f"q{i}") for i in range(4)]
    base, new = (
        run_of([*rounds_of(old, noisy(1e-2, 0.002, 6, seed)), *rounds_of(young, noisy(seconds, 0.002, 6, seed))], name)
        for name, seconds, seed in (("b", 1e-2, 7), ("n", 1.1e-2, 8))
    )
    found = {one.point.workload: one for one in compare(base, new, baselines=quiet).points}
    assert found["young"].verdict == "UNDECIDED"  # a tenth slower, as two runs may be without a cause
    grown = [
        run_of([*run.measurements, *rounds_of(young, noisy(1e-2, 0.002, 6, seed))], run.id)
        for seed, run in enumerate(quiet)
    ]
    found = {one.point.workload: one for one in compare(base, new, baselines=grown).points}
    assert found["young"].verdict == "SLOWER"


def test_what_could_have_been_seen_is_what_would_have_been_called() -> None:
    """A point slower by a little more than what stands beside it is named, by a little less is not."""
    noise = [np.random.default_rng(seed).normal(0, 0.02, 6) for seed in range(8)]

    def verdict(number: int, slower: float) -> PointVerdict:
        sides: tuple[list[Measurement], ...] = ([], [], [])
        for at in range(8):
            rises = np.exp(noise[at] - noise[at].mean() + (np.log1p(slower) if at == number else 0.0))
            for side, times in zip(sides, (np.ones(6), rises, np.ones(6)), strict=True):
                side.extend(rounds_of(point(f"p{at}"), list(1e-2 * times)))
        base, new, again = (run_of(side, name) for side, name in zip(sides, "bna", strict=True))
        return compare(base, new, again=again).points[number]

    said = verdict(2, 0.0).reason
    smallest = float(said.removeprefix("could have seen ").removesuffix("%")) / 100
    assert verdict(2, 1.05 * smallest).verdict == "SLOWER"
    assert verdict(2, 0.95 * smallest).verdict == "UNDECIDED"


def test_many_points_tell_how_far_two_runs_lie_apart() -> None:
    points = [point(clip_length=t) for t in range(1, 21)]

    def taken(spread: float, seed: int, slower: float = 1.0) -> Run:
        at_once = noisy(1e-2, spread, len(points), seed)
        times = [at_once[0] * slower, *at_once[1:]]
        return run_of([m for at, s in zip(points, times, strict=True) for m in rounds_of(at, noisy(s, 0.002, 6, seed))])

    assert compare(taken(0.01, 1), taken(0.01, 2, slower=1.3)).points[0].verdict == "SLOWER"
    assert compare(taken(0.2, 1), taken(0.2, 2, slower=1.3)).points[0].verdict == "UNDECIDED"
    whole_run = compare(taken(0.01, 1), run_of([replace(m, samples_s=[2 * s for s in m.samples_s])
                                                for m in taken(0.01, 2).measurements]))  # fmt: skip
    assert {one.verdict for one in whole_run.points} == {"UNDECIDED"}


def test_against_baselines_a_run_of_one_round_is_judged_as_a_run() -> None:
    logs = np.log(noisy(1e-2, 0.01, 5, 3))
    runs = [run_of(rounds_of(point(), [math.exp(one)]), f"b{i}") for i, one in enumerate(logs)]
    new = run_of(rounds_of(point(), [2e-2]), "new")
    found = compare(runs[0], new, baselines=runs[1:]).points[0]
    assert found.effect is not None
    # The textbook's prediction interval: mean ± t·s·√(1 + 1/n).
    t = (math.log(2e-2) - logs.mean()) / (logs.std(ddof=1) * math.sqrt(1 + 1 / 5))
    assert found.effect.p == pytest.approx(2 * stats.t.sf(t, 4))
    assert found.verdict == "SLOWER"


def test_one_round_decides_nothing_and_alone_exits_0() -> None:
    found = compare(run_of(rounds_of(point(), [1.0])), run_of(rounds_of(point(), [3.0])))
    assert found.points[0].verdict == "UNDECIDED"
    assert found.points[0].reason.startswith("one round tells nothing of the noise between processes")
    assert found.exit_code == 0
    assert headline(found).startswith("UNDECIDED: 1 of 1 points")


def test_what_is_gone_or_no_longer_runs_is_missing() -> None:
    here, gone, broken, fresh = (point(clip_length=t) for t in (1, 2, 3, 4))
    base = [m for at in (here, gone, broken) for m in rounds_of(at, [1.0, 1.0, 1.0])]
    oom = [measured(broken, 1, 1.0), Measurement(broken, 2, "oom", "killed by the kernel: out of memory")]
    new = [*rounds_of(here, [1.0, 1.0, 1.0]), *oom, *rounds_of(fresh, [1.0, 1.0, 1.0])]
    found = compare(run_of(base), run_of(new))
    assert verdicts(found) == {"conv3d 1": "UNDECIDED", "conv3d 2": "MISSING", "conv3d 3": "MISSING", "conv3d 4": "NEW"}
    reasons = {one.point.case["clip_length"]: one.reason for one in found.points}
    assert reasons[2] == "it is not in NEW"
    assert reasons[3] == "oom: killed by the kernel: out of memory"
    assert found.exit_code == 1
    skipped = [Measurement(gone, 1, "skipped", "needs a CUDA device")]
    assert compare(run_of(skipped), run_of(skipped)).points == ()  # never ran


def test_exact_figures_are_compared_on_any_machine() -> None:
    def exact(macs: int, peak: int, seconds: float) -> list[Measurement]:
        memory, counts = Memory(live_before_bytes=0, peak_bytes=peak), Counts(macs)
        return rounds_of(point(), [seconds] * 3, memory=memory, counts=counts, params=10)

    elsewhere = replace(MACHINE, machine="another bench")
    more = compare(run_of(exact(100, 10_000, 1.0)), run_of(exact(150, 20_000, 9.0), environment=elsewhere))
    assert more.points[0].verdict == "NOT COMPARED"
    assert [(change.metric, change.worse) for change in more.points[0].changes] == [
        ("macs", True), ("peak_memory_bytes", True),
    ]  # fmt: skip
    assert more.exit_code == 1
    assert "times of unlike machines are not compared" in more.not_compared
    same = compare(run_of(exact(100, 10_000, 1.0)), run_of(exact(100, 10_200, 9.0), environment=elsewhere))
    assert same.points[0].changes == ()  # within what an allocator rounds to
    assert same.exit_code == 0
    less = compare(run_of(exact(100, 20_000, 1.0)), run_of(exact(90, 10_000, 1.0)))
    assert not any(change.worse for change in less.points[0].changes)
    assert less.exit_code == 0


def evaluated(top1: float, seed: int, examples: int = 600) -> Measurement:
    at = Point("c3d", "task", "eager", mode="evaluate", case={"task": "frame_order", "seed": seed})
    accuracy = Accuracy("frame_order", seed, top1, 1 / 6, examples, 1.0)
    return Measurement(at, 1, "ok", accuracy=accuracy)


@pytest.mark.parametrize(
    ("base", "new", "verdict"),
    [
        ((0.9, 0.91, 0.92), (0.9, 0.91, 0.92), "SAME"),
        ((0.9, 0.91, 0.92), (0.8, 0.80, 0.82), "LOWER"),
        ((0.8, 0.81, 0.82), (0.9, 0.90, 0.92), "HIGHER"),
        ((0.9, 0.91, 0.92), (0.8, 0.95, 0.92), "UNDECIDED"),
        ((0.95,), (0.80,), "LOWER"),
        ((0.90,), (0.89,), "UNDECIDED"),
    ],
)
def test_accuracy_is_judged_over_seeds(base: Sequence[float], new: Sequence[float], verdict: str) -> None:
    sides = [run_of([evaluated(top1, seed) for seed, top1 in enumerate(side)]) for side in (base, new)]
    found = compare(*sides)
    assert [one.verdict for one in found.accuracies] == [verdict]
    assert found.exit_code == (verdict == "LOWER")
    assert found.points == ()


def test_what_differs_between_the_machines_is_told() -> None:
    after = replace(MACHINE, torch="2.14.0", git_commit="b" * 40)
    found = compare(run_of(rounds_of(point(), [1.0] * 3)), run_of(rounds_of(point(), [1.0] * 3), environment=after))
    assert found.causes == {"torch": ("2.13.0", "2.14.0"), "git_commit": ("a" * 40, "b" * 40)}


def example() -> tuple[Comparison, Run, Run]:
    ways = {1: 1.0, 2: 1.3, 3: 0.7, 4: 1.0}
    spread = {1: 0.002, 2: 0.002, 3: 0.002, 4: 0.2}
    sides = [
        run_of(
            [
                m
                for t, by in ways.items()
                for m in rounds_of(
                    point(clip_length=t), noisy((by if side == 1 else 1.0) * 1e-2, spread[t], 12, 9 * t + side)
                )
            ],
            ("base", "new", "again")[side],
        )
        for side in range(3)
    ]
    sides[0].measurements.extend(rounds_of(point("gone_<b>|`x`"), [1.0] * 12))
    return compare(sides[0], sides[1], again=sides[2]), sides[0], sides[1]


def test_the_text_begins_with_the_verdict_and_what_is_undecided() -> None:
    found, base, new = example()
    lines = FORMATS["text"](found, base, new).splitlines()
    assert lines[0] == "WORSE: 1 slower, 1 missing of 5 points"
    order = [line.split(":")[0] for line in lines if line.split(":")[0].isupper() and not line.startswith(" ")]
    assert order == ["WORSE", "UNDECIDED", "SLOWER", "MISSING", "FASTER", "SAME"]
    undecided = lines[lines.index("UNDECIDED: 1") + 1]
    assert "could have seen" in undecided
    slower = lines[lines.index("SLOWER: 1") + 1]
    assert slower.startswith("  conv3d/library clip_length=2: ")
    assert "→" in slower
    assert "+30" in slower.replace("+29.", "+30.")


def test_a_comment_is_short_and_says_nothing_of_its_own() -> None:
    found, base, new = example()
    said = FORMATS["markdown"](found, base, new)
    assert said.startswith("**WORSE: 1 slower, 1 missing of 5 points**")
    assert "gone\\_&lt;b&gt;\\|\\`x\\`" in said
    many = [m for t in range(40) for m in rounds_of(point(clip_length=t), [1.0] * 6)]
    slow = [m for t in range(40) for m in rounds_of(point(clip_length=t), noisy(2.0, 0.001, 6, t))]
    long = compare(run_of(many), run_of(slow), again=run_of(many))
    text = FORMATS["markdown"](long, run_of(many), run_of(slow))
    assert len(text.splitlines()) < 25
    assert "… and 30 more" in text


def test_json_has_everything() -> None:
    found, base, new = example()
    document = json.loads(FORMATS["json"](found, base, new))
    assert document["worse"] is True
    assert document["counts"] == {"SAME": 1, "SLOWER": 1, "FASTER": 1, "UNDECIDED": 1, "MISSING": 1}
    slower = next(one for one in document["points"] if one["verdict"] == "SLOWER")
    assert slower["ratio_interval"][0] < slower["ratio"] < slower["ratio_interval"][1]


def test_junit_fails_what_is_worse_and_skips_what_is_undecided() -> None:
    found, base, new = example()
    suite = ElementTree.fromstring(FORMATS["junit"](found, base, new))
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("5", "2", "1")
    assert sum(case.find("failure") is not None for case in suite) == 2


def test_a_label_says_what_tells_points_apart() -> None:
    points = [point(clip_length=t, batch_size=1) for t in (8, 16)] + [replace(point(batch_size=1), dtype="fp16")]
    names = apart(points)
    assert names == ["dtype", "clip_length"]
    assert label(points[1], names) == "conv3d/library fp32 clip_length=16"


def written(folder: Path, seconds: Sequence[float], environment: Environment = MACHINE) -> Path:
    with RunWriter.create(folder, suite="quick", sweeps=(), environment=environment, command="x") as writer:
        for one in rounds_of(point(), seconds):
            writer.append(one)
    return folder


def vidbench(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vidbench.cli", *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=cwd,
    )  # fmt: skip


def test_exit_codes_tell_worse_from_cannot(tmp_path: Path) -> None:
    written(tmp_path / "a", noisy(1.0, 0.001, 6, 0))
    written(tmp_path / "b", noisy(2.0, 0.001, 6, 1))
    slower = vidbench("compare", "a", "b", cwd=tmp_path)
    assert (slower.returncode, slower.stderr) == (1, "")
    assert slower.stdout.startswith("WORSE: 1 slower of 1 points")
    faster = vidbench("compare", "b", "a", "--format", "json", cwd=tmp_path)
    assert faster.returncode == 0
    assert json.loads(faster.stdout)["counts"] == {"FASTER": 1}
    none = vidbench("compare", "a", "nowhere", cwd=tmp_path)
    assert none.returncode == 2
    assert none.stderr.startswith("vidbench: error: ")


def test_baselines_are_kept_for_each_machine(tmp_path: Path) -> None:
    root = tmp_path / "reports" / "baselines"
    runs = [load(written(tmp_path / str(i), noisy(1.0, 0.01, 6, i))) for i in range(5)]
    kept = [baselines.save(run, root) for run in runs]
    assert kept[0].parent == root / "test-bench" / "quick"
    with pytest.raises(RequestError, match="is there already: this run was saved before"):
        baselines.save(runs[0], root)
    assert [run.id for run in baselines.stored(root)] == sorted(run.id for run in runs)
    other = load(written(tmp_path / "other", [1.0, 1.0], replace(MACHINE, machine="another")))
    with pytest.raises(RequestError, match=r"no baseline in .*another.*: make one by `vidbench baseline save RUN`"):
        baselines.of(other, root)
    assert len(baselines.same_revision(baselines.of(runs[0], root))) == 4

    written(tmp_path / "new", noisy(1.5, 0.01, 6, 9))
    compared = vidbench("compare", "baseline", "new", cwd=tmp_path)
    assert compared.returncode == 1, compared.stderr
    assert "noise between runs from 5 baselines" in compared.stdout
    listed = vidbench("baseline", "list", cwd=tmp_path)
    assert len(listed.stdout.splitlines()) == 5
    shown = vidbench("baseline", "show", kept[0], cwd=tmp_path)
    assert "conv3d" in shown.stdout
