"""Claims: what a verdict rests on, and that nothing done is lost."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

from vidbench.claims import (
    Claim,
    Experiment,
    Outcome,
    Plot,
    Prediction,
    at_best_rate,
    frame,
    judge,
    page,
    per_seed,
)
from vidbench.claims.costs import _slopes, _speedup
from vidbench.claims.experiments import AMPLITUDES, BETWEEN, SALIENT_FRAMES
from vidbench.claims.investigate import LINES, investigate, load
from vidbench.claims.protocols import SIZES, threshold
from vidbench.claims.textbook import claims
from vidbench.sweep import RequestError

ALL = [
    pytest.param(claim, id=f"{claim.name}-{size}-{device}")
    for size, device in (*((size, "cpu") for size in SIZES), ("full", "cuda"))
    for claim in claims(size, device)
]
PLOT = Plot("model", "top1", "model", "", "top-1 accuracy")
HERE = Path(__file__).parent


def claim_of(*values: float, margin: float = 5.0, **more: Any) -> tuple[Claim, list[Outcome]]:
    """A claim of one prediction, and outcomes that give it these effects."""
    experiments = tuple(Experiment("made_up", {"model": "m"}, seed) for seed in range(len(values)))
    prediction = Prediction("it helps", "points", margin, lambda table: list(per_seed(table, "top1", model="m")))
    claim = Claim("c", "It helps.", "nobody", "none", experiments, (prediction,), PLOT)
    outcomes = [Outcome(one, [{"top1": value}], 1.0) for one, value in zip(experiments, values, strict=True)]
    return replace(claim, **more), outcomes


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((20.0, 21.0, 22.0), "SUPPORTED"),
        ((1.0, 1.5, 2.0), "REFUTED"),
        ((-20.0, -21.0, -19.0), "REFUTED"),
        ((4.0, 6.0, 8.0), "UNDECIDED"),
        ((0.0, 30.0, 60.0), "UNDECIDED"),
        ((30.0,), "UNDECIDED"),
    ],
)
def test_the_whole_interval_decides(values: Sequence[float], verdict: str) -> None:
    finding = judge(*claim_of(*values))
    assert finding.verdict == verdict
    assert finding.predictions[0].interval is not None
    assert finding.predictions[0].interval.mean == pytest.approx(sum(values) / len(values))


def test_one_refuted_prediction_refutes_and_an_undecided_one_leaves_it_open() -> None:
    claim, outcomes = claim_of(20.0, 21.0, 22.0)
    (holds,) = claim.predictions
    fails, open_ = replace(holds, says="more", margin=50.0), replace(holds, says="about", margin=21.0)
    assert judge(replace(claim, predictions=(holds, open_, fails)), outcomes).verdict == "REFUTED"
    reason = judge(replace(claim, predictions=(holds, open_, fails)), outcomes).reason
    assert reason == "more: 21 (18.5 to 23.5) points, wanted more than 50; but it helps"
    undecided = judge(replace(claim, predictions=(open_,)), outcomes)
    assert undecided.verdict == "UNDECIDED"
    assert undecided.reason == "about: 21 (18.5 to 23.5) points, wanted more than 21"
    fewer = replace(holds, says="little", margin=50.0, less=True)
    assert judge(replace(claim, predictions=(fewer,)), outcomes).verdict == "SUPPORTED"
    assert judge(replace(claim, predictions=(replace(fewer, margin=2.0),)), outcomes).verdict == "REFUTED"
    silent = replace(holds, effect=lambda table: [20.0, math.nan, 22.0])
    assert judge(replace(claim, predictions=(silent,)), outcomes).reason == "it helps: 1 of 3 seeds do not tell"


def test_what_was_not_done_or_failed_or_had_no_control_decides_nothing() -> None:
    claim, outcomes = claim_of(20.0, 21.0, 22.0)
    assert judge(claim, outcomes[:2]).reason == "1 of 3 experiments were not done"
    failed = [*outcomes[:2], replace(outcomes[2], rows=[], failure="oom: killed")]
    assert judge(claim, failed).verdict == "UNDECIDED"
    assert judge(claim, failed).reason == "1 of 3 experiments failed, the first with oom: killed"
    control = replace(claim.predictions[0], says="it can be learnt", margin=20.5)
    finding = judge(replace(claim, controls=(control,)), outcomes)
    assert (finding.verdict, finding.reason) == ("UNDECIDED", "a control does not hold: it can be learnt")
    # It holds where it does in every seed, however wide the interval is.
    assert judge(replace(claim, controls=(replace(control, margin=19.9),)), outcomes).verdict == "SUPPORTED"


def test_what_is_counted_needs_no_interval() -> None:
    claim, outcomes = claim_of(2.0, margin=1.8)
    exact = replace(claim, predictions=(replace(claim.predictions[0], exact=True),))
    assert judge(exact, outcomes).verdict == "SUPPORTED"


Given = Any
Accuracies = Callable[[Given], float]


def _trials(accuracy: Accuracies, gradient: Callable[[Given, int], float] = lambda given, lag: 0.9**lag) -> Any:
    """A world in which networks have these accuracies and gradients."""

    def rows(experiment: Experiment) -> list[dict[str, Any]]:
        given, wobble = experiment.given, 0.001 * (experiment.seed % 3)
        if experiment.kind == "gradient":
            return [{"lag": lag, "norm": gradient(given, lag) * (1 + wobble)} for lag in range(64)]
        assert experiment.kind == "trial"
        share = accuracy(given) - wobble
        return [{"top1": share, "shuffled": 0.5, "reversed": 0.0, "frozen": 0.5, "loss": 1 - share}]

    return rows


def _salience(of_half: float) -> Any:
    """A world in which eight salient frames of sixteen are answered so often."""

    def rows(experiment: Experiment) -> list[dict[str, Any]]:
        preferences = (0.0, of_half / 4, of_half / 2, of_half, 0.95, 1.0)
        return [
            {"share": n / 16, "salient": p, "faint": 1 - p, "preference": p - 0.001 * (experiment.seed % 3)}
            for n, p in zip(SALIENT_FRAMES, preferences, strict=True)
        ]

    return rows


def _transfer(gains: dict[str, float]) -> Any:
    def rows(experiment: Experiment) -> list[dict[str, Any]]:
        gain = gains[str(experiment.given["model"])] - 0.001 * (experiment.seed % 3)
        return [{"begun": b, "top1": t} for b, t in (("source", 0.98), ("pre-trained", 0.3 + gain), ("scratch", 0.3))]

    return rows


def _amplitudes(thresholds: Sequence[float]) -> Any:
    """A world in which the networks of a claim, in order, see a motion from these octaves above the smallest on."""
    seen: dict[str, float] = {}

    def rows(experiment: Experiment) -> list[dict[str, Any]]:
        name = str(experiment.given["model"])
        if name not in seen:
            seen[name] = thresholds[len(seen)]
        octave = seen[name] + 0.01 * (experiment.seed % 3)
        pattern = str(experiment.given["pattern"])
        return [
            {"amplitude": amplitude, "top1": min(max(0.75 + 0.2 * (place - octave), 0.5), 1.0)}
            for place, amplitude in enumerate(sorted((*AMPLITUDES[pattern], *BETWEEN[pattern])))
        ]

    return rows


def _streams(both: float, spatial: float = 0.5, temporal: float = 0.33, c3d: float = 0.99) -> Any:
    def rows(experiment: Experiment) -> list[dict[str, Any]]:
        wobble = 0.001 * (experiment.seed % 3)
        if experiment.kind == "trial":
            return [{"top1": c3d - wobble}]
        of = {"spatial_stream": spatial, "temporal_stream": temporal, "both": both}
        return [{"model": f"vidbench.claims.contenders:{name}", "top1": top1 - wobble} for name, top1 in of.items()]

    return rows


def _scaling(powers: dict[str, float], speedups: dict[str, float]) -> Any:
    def rows(experiment: Experiment) -> list[dict[str, Any]]:
        found = []
        lengths = experiment.given["lengths"]
        assert isinstance(lengths, tuple)
        for network, power in powers.items():
            for length in lengths:
                latency = 1e-4 * length ** (power + 0.001 * experiment.seed)
                of = {"network": network, "line": f"{network}, {experiment.given['mode']}", "clip_length": length}
                found.append({**of, "cores": "all", "latency_s": latency})
            if speedups:
                found.append({**of, "cores": "one", "latency_s": latency * speedups[network]})
        return found

    return rows


def _by_model(value: str, of: dict[str, float], **more: float) -> Any:
    return lambda experiment: [{value: of[str(experiment.given["model"]).rpartition(":")[2]], **more}]


def _costs(macs: float, seconds: float) -> Any:
    return lambda experiment: [
        {"model": "i3d_rgb", "macs": 1000, "latency_s": 0.1 + 1e-4 * experiment.seed},
        {
            "model": "vidbench.claims.contenders:i3d_without_bottlenecks",
            "macs": 1000 * macs,
            "latency_s": 0.1 * seconds,
        },
    ]


def _is(given: Given, *names: str) -> bool:
    return str(given["model"]).rpartition(":")[2] in names


WORLDS: dict[str, tuple[Any, Any]] = {
    "pooling_loses_order": (
        _trials(lambda g: 1.0 if _is(g, "cnn_lstm") or g["task"] == "appearance" else 0.17),
        _trials(lambda g: 0.95),
    ),
    "average_pooling_favours_salient_frames": (_salience(0.9), _salience(0.5)),
    "max_pooling_favours_salient_frames": (_salience(0.9), _salience(0.5)),
    "conv3d_beats_pooling_on_order": (
        _trials(lambda g: 1.0 if _is(g, "c3d") or g["task"] == "appearance" else 0.3),
        _trials(lambda g: 0.95),
    ),
    "rnn_forgets_lstm_remembers": (
        _trials(
            lambda g: 0.25 if _is(g, "rnn") and g["length"] > 16 else 1.0,
            lambda g, lag: (0.5 if _is(g, "rnn") else 0.99) ** lag,
        ),
        _trials(lambda g: 1.0, lambda g, lag: 0.9**lag),
    ),
    "orthogonal_rnn_forgets": (
        _trials(lambda g: 0.25 if _is(g, "rnn_orthogonal") and g["length"] > 16 else 1.0),
        _trials(lambda g: 1.0),
    ),
    "default_lstm_remembers": (
        _trials(lambda g: 0.5 if _is(g, "rnn") else 1.0, lambda g, lag: (0.5 if _is(g, "rnn") else 0.99) ** lag),
        _trials(lambda g: 1.0 if _is(g, "lstm_forget_bias") else 0.5, lambda g, lag: 0.5**lag),
    ),
    "lstm_is_serial_tcn_is_not": (
        _scaling({"lstm": 1.0, "tcn": 0.5}, {"lstm": 1.0, "tcn": 1.9}),
        _scaling({"lstm": 1.0, "tcn": 1.0}, {"lstm": 1.5, "tcn": 1.5}),
    ),
    "tcn_field_is_flexible": (_trials(lambda g: 1.0 if g["field"] >= 40 else 0.26), _trials(lambda g: 0.97)),
    "tcn_gradients_are_stable": (
        _trials(lambda g: 1.0, lambda g, lag: (0.99 if _is(g, "tcn") else 0.7) ** lag),
        _trials(lambda g: 1.0, lambda g, lag: (1.5 if _is(g, "tcn") else 0.99) ** lag),
    ),
    "tcn_gradients_against_open_gates": (
        _trials(lambda g: 1.0, lambda g, lag: (0.99 if _is(g, "tcn") else 0.7) ** lag),
        _trials(lambda g: 1.0, lambda g, lag: (0.8 if _is(g, "tcn") else 0.99) ** lag),
    ),
    "tcn_trains_in_less_memory": (
        _by_model("peak_bytes", {"lstm": 200, "tcn": 100}),
        _by_model("peak_bytes", {"lstm": 100, "tcn": 100}),
    ),
    "tcn_streams_in_less_memory": (
        _by_model("state_bytes", {"lstm": 900, "tcn": 100}),
        _by_model("state_bytes", {"lstm": 100, "tcn": 100}),
    ),
    "pre_training_transfers_for_tcn_not_lstm": (
        _transfer({"cnn_tcn": 0.5, "cnn_lstm": 0.0}),
        _transfer({"cnn_tcn": 0.5, "cnn_lstm": 0.5}),
    ),
    "lstm_is_poor_on_small_data": (
        _trials(lambda g: 1.0 if _is(g, "tcn") or "examples" not in g else 0.4),
        _trials(lambda g: 1.0),
    ),
    "open_lstm_is_poor_on_small_data": (
        _trials(lambda g: 1.0 if _is(g, "tcn") or "examples" not in g else 0.4),
        _trials(lambda g: 1.0 if g["count"] > 64 else 0.3),
    ),
    "lstm_misses_subtle_change": (_amplitudes((2.5, 1.5)), _amplitudes((1.5, 2.5))),
    "rigid_kernels_miss_subtle_motion": (_amplitudes((2.5, 1.5)), _amplitudes((2.0, 2.0))),
    "flow_is_short_term": (
        _trials(lambda g: 0.5 if _is(g, "temporal_stream") and "delay" in g["task"] else 0.97),
        _trials(lambda g: 0.97),
    ),
    "two_streams_complement_each_other": (_streams(0.9), _streams(0.51)),
    "two_streams_are_not_aligned": (_streams(0.5), _streams(0.99)),
    "slow_fusion_is_best": (_trials(lambda g: 0.95 if _is(g, "slow_fusion") else 0.7), _trials(lambda g: 0.9)),
    "r2plus1d_doubles_nonlinearities": (
        lambda experiment: [{"relus": 34 if _is(experiment.given, "r2plus1d_18") else 17, "params": 100}],
        lambda experiment: [{"relus": 34, "params": 100}],
    ),
    "r2plus1d_is_easier_to_optimise": (
        _trials(lambda g: 0.5 if _is(g, "r3d_18") else 0.9),
        _trials(lambda g: 0.9 if _is(g, "r3d_18") else 0.5),
    ),
    "inception_bottlenecks_pay": (_costs(2.5, 2.0), _costs(2.5, 1.0)),
}
"""Of each claim: a world in which it is true, and one in which it is not."""


@pytest.mark.parametrize("truth", [True, False])
@pytest.mark.parametrize("claim", ALL)
def test_a_claim_is_supported_where_it_is_true_and_refuted_where_it_is_not(claim: Claim, truth: bool) -> None:
    assert len({one.key for one in claim.experiments}) == len(claim.experiments)
    world = WORLDS[claim.name][not truth]
    outcomes = [Outcome(one, world(one), 1.0) for one in claim.experiments]
    finding = judge(claim, outcomes)
    assert finding.verdict == ("SUPPORTED" if truth else "REFUTED"), finding
    assert page.draw(claim, frame(outcomes)) is not None


@pytest.mark.parametrize("size", SIZES)
def test_claims_have_names_of_their_own(size: str) -> None:
    names = [claim.name for claim in claims(size)]
    assert len(names) == len(set(names)) >= 16
    with pytest.raises(RequestError, match="unknown size 'smal': did you mean 'small'"):
        claims("smal")


def test_a_threshold_is_where_the_curve_passes_three_quarters() -> None:
    def curve(seed: int, middle: float) -> list[dict[str, Any]]:
        """A psychometric function that is a straight line in log2 of the amplitude around its middle."""
        return [
            {
                "kind": "amplitude",
                "model": "m",
                "seed": seed,
                "amplitude": amplitude,
                "top1": min(max(0.75 + 0.2 * (math.log2(amplitude) - middle), 0.5), 1.0),
            }
            for amplitude in AMPLITUDES["disc"]
        ]

    found = threshold(pd.DataFrame([*curve(0, 1.5), *curve(1, 0.25), *curve(2, 9.0), *curve(3, -9.0)]), "m")
    assert found[0] == pytest.approx(1.5)
    assert found[1] == pytest.approx(0.25)
    assert math.isnan(found[2])  # never seen
    assert math.isnan(found[3])  # always seen


def test_an_exponent_is_found_again_over_the_longer_lengths_on_all_threads() -> None:
    table = pd.DataFrame(
        [
            {
                "network": "lstm", "mode": "train", "seed": seed, "clip_length": t, "cores": cores,
                "latency_s": (3e-4 * t**power if t > 20 else 1.0) * (2 if cores == "one" else 1),
            }
            for seed, power in ((1, 0.5), (2, 1.0))
            for t in (8, 16, 32, 64, 128, 256)
            for cores in (("all", "one") if t == 256 else ("all",))
        ]
    )  # fmt: skip
    assert _slopes(table, "lstm", "train").to_dict() == {1: pytest.approx(0.5), 2: pytest.approx(1.0)}
    assert _speedup(table, "lstm", "train").to_dict() == {1: pytest.approx(2.0), 2: pytest.approx(2.0)}


def test_each_side_is_taken_at_its_better_rate() -> None:
    table = pd.DataFrame(
        [
            {"model": model, "learning_rate": rate, "seed": seed, "top1": top1 + 0.01 * seed, "loss": 1 - top1}
            for model, rate, top1 in (("a", 1e-3, 0.9), ("a", 1e-2, 0.5), ("b", 1e-3, 0.4), ("b", 1e-2, 0.8))
            for seed in (0, 1)
        ]
    )
    assert per_seed(table, "top1", model="a").tolist() == pytest.approx([0.9, 0.91])
    assert per_seed(table, "top1", model="b").tolist() == pytest.approx([0.8, 0.81])
    assert per_seed(table, "loss", model="b").tolist() == pytest.approx([0.2, 0.2])  # of a loss less is better
    best = at_best_rate(table, "top1", "model")
    assert sorted(set(zip(best["model"], best["learning_rate"], strict=True))) == [("a", 1e-3), ("b", 1e-2)]


COUNTED = next(claim for claim in claims("small") if claim.name == "r2plus1d_doubles_nonlinearities")
STREAMED = next(claim for claim in claims("small") if claim.name == "tcn_streams_in_less_memory")


def test_an_investigation_is_gone_on_with_and_not_begun_twice(tmp_path: Path) -> None:
    out = tmp_path / "claims"
    _, findings, outcomes = investigate([COUNTED], out, size="small", jobs=2)
    assert findings[0].verdict == "SUPPORTED"
    assert len(outcomes) == 2
    with pytest.raises(RequestError, match="holds an investigation already: go on with it by --resume"):
        investigate([COUNTED], out, size="small")
    with pytest.raises(RequestError, match="is of another size: small, not full"):
        investigate([COUNTED], out, size="full", resume=True)
    before = (out / LINES).read_bytes()
    steps: list[Any] = []
    investigate([COUNTED], out, size="small", resume=True, progress=steps.append)
    assert (out / LINES).read_bytes() == before
    assert steps == []
    # A torn last line is done again, and nothing else.
    (out / LINES).write_bytes(before[:-7])
    _, findings, outcomes = investigate([COUNTED, STREAMED], out, size="small", resume=True, progress=steps.append)
    assert [finding.verdict for finding in findings] == ["SUPPORTED", "REFUTED"]
    assert sum(step.outcome is not None for step in steps) == 1 + len(STREAMED.experiments)
    keys = [outcome.experiment.key for outcome in load(out)[1]]
    assert len(keys) == len(set(keys)) == 2 + len(STREAMED.experiments)
    lines = (out / LINES).read_bytes().splitlines(keepends=True)
    (out / LINES).write_bytes(b"".join([lines[0], b"{]\n", *lines[1:]]))
    with pytest.raises(RequestError, match=r"experiments\.jsonl, line 2: "):
        load(out)


def test_a_process_that_dies_costs_its_own_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    recipe = {"task": "appearance:clip_length=2", "steps": 1, "width_multiplier": 1.0, "learning_rate": 0.1}
    dies = Experiment("trial", {"model": "user_models:Segfaults", **recipe}, 0)
    raises = Experiment("trial", {"model": "user_models:Raises", **recipe}, 0)
    claim = replace(COUNTED, experiments=(dies, raises, *COUNTED.experiments))
    _, findings, outcomes = investigate([claim], tmp_path / "out", size="small", jobs=2)
    failures = {str(outcome.experiment.given["model"]): outcome.failure for outcome in outcomes}
    assert failures["user_models:Segfaults"] == "crashed: the process ended with SIGSEGV"
    assert failures["user_models:Raises"] == "IndexError: list index out of range"
    assert failures["r3d_18"] == failures["r2plus1d_18"] == ""
    assert findings[0].verdict == "UNDECIDED"
    assert "2 of 4 experiments failed" in findings[0].reason


def vidbench(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vidbench.cli", "claims", *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=cwd,
    )  # fmt: skip


def test_the_command_says_the_verdicts_and_writes_a_page(tmp_path: Path) -> None:
    ended = vidbench(COUNTED.name, "--out", "run", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[0] == f"SUPPORTED  {COUNTED.says}"
    assert "1 claim: 1 supported, 0 refuted, 0 undecided" in ended.stdout
    assert "[2/2] relus model=r" in ended.stderr
    html = (tmp_path / "run" / "claims.html").read_text()
    assert COUNTED.says in html
    assert "http" not in html.replace("http://www.w3.org/", "")  # nothing outside itself
    assert "| SUPPORTED |" in (tmp_path / "run" / "claims.md").read_text()
    assert (tmp_path / "run" / "figures" / f"{COUNTED.name}.svg").exists()
    table = pd.read_csv(tmp_path / "run" / "experiments.csv")
    assert sorted(table["relus"]) == [17, 34]
    again = vidbench(COUNTED.name, "--out", "run", "--resume", "--format", "json", cwd=tmp_path)
    (found,) = json.loads(again.stdout)
    assert found["verdict"] == "SUPPORTED"
    assert found["predictions"][0]["effect"] == 2.0
    assert again.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pooling_loses_ordr"], "unknown claim 'pooling_loses_ordr': did you mean 'pooling_loses_order'?"),
        (["--resume"], "--resume needs --out DIR: the folder to go on with"),
        (["--out", "."], "is not empty and holds no claims.json: choose another --out"),
    ],
)
def test_a_bad_request_is_one_line_and_exit_code_2(arguments: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    ended = vidbench(*arguments, cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.startswith("vidbench: error: ")
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert (tmp_path / "mine.txt").read_text() == "kept"


def _session(leader: int) -> list[str]:
    """Command lines of the processes of a session that are at work."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_what_was_found_survives_a_kill(ending: signal.Signals, tmp_path: Path) -> None:
    names = ("tcn_gradients_are_stable", "tcn_gradients_against_open_gates", "tcn_streams_in_less_memory")
    command = [sys.executable, "-m", "vidbench.cli", "claims", *names, "--out", "run", "--jobs", "1"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    lines = tmp_path / "run" / LINES
    deadline = time.monotonic() + 60
    while not (lines.exists() and lines.read_bytes().count(b"\n") >= 2):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, ending)
    _, said = process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while _session(process.pid):  # nobody goes on working for a parent that is gone
        assert time.monotonic() < deadline, _session(process.pid)
        time.sleep(0.1)
    before = lines.read_bytes()
    kept = before[: before.rfind(b"\n") + 1]
    if ending == signal.SIGINT:
        assert process.returncode == 130
        assert said.splitlines()[-1].startswith("vidbench: interrupted; what was found is kept: add --resume --out")
    ended = vidbench(*names, "--out", "run", "--resume", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert lines.read_bytes().startswith(kept)
    keys = {one.key for claim in claims("small") if claim.name in names for one in claim.experiments}
    outcomes = load(tmp_path / "run")[1]
    assert {outcome.experiment.key for outcome in outcomes} == keys
    assert not any(outcome.failure for outcome in outcomes)
