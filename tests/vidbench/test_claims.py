"""Claims: what a verdict rests on, what the experiments measure, and that nothing done is lost."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from vidbench.claims import Claim, Experiment, Outcome, Plot, Prediction, frame, judge, page, per_seed
from vidbench.claims.contenders import ClipStreams, i3d_without_bottlenecks, lstm, lstm_forget_bias
from vidbench.claims.experiments import AMPLITUDES, SALIENT_FRAMES, Mixed, perform
from vidbench.claims.investigate import LINES, investigate, load
from vidbench.claims.textbook import SIZES, _slope, _threshold, claims
from vidbench.data.tasks import create
from vidbench.sweep import RequestError
from vidbench.trials import TaskData

ALL = [claim for size in SIZES for claim in claims(size)]
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
    assert "more" in judge(replace(claim, predictions=(holds, open_, fails)), outcomes).reason
    undecided = judge(replace(claim, predictions=(holds, open_)), outcomes)
    assert undecided.verdict == "UNDECIDED"
    assert undecided.reason == "about: the interval includes 21 points"


def test_what_was_not_done_or_failed_or_had_no_control_decides_nothing() -> None:
    claim, outcomes = claim_of(20.0, 21.0, 22.0)
    assert judge(claim, outcomes[:2]).reason == "1 of 3 experiments were not done"
    failed = [*outcomes[:2], replace(outcomes[2], rows=[], failure="oom: killed")]
    assert judge(claim, failed).verdict == "UNDECIDED"
    assert judge(claim, failed).reason == "1 of 3 experiments failed, the first with oom: killed"
    control = replace(claim.predictions[0], says="it can be learnt", margin=90.0)
    finding = judge(replace(claim, controls=(control,)), outcomes)
    assert (finding.verdict, finding.reason) == ("UNDECIDED", "a control does not hold: it can be learnt")


def test_what_is_counted_needs_no_interval() -> None:
    claim, outcomes = claim_of(2.0, margin=1.8)
    exact = replace(claim, predictions=(replace(claim.predictions[0], exact=True),))
    assert judge(exact, outcomes).verdict == "SUPPORTED"


def _plausible(experiment: Experiment) -> list[dict[str, Any]]:
    """Rows as the experiment makes them."""
    if experiment.kind == "trial":
        return [
            {"top1": 0.9, "shuffled": 0.5, "reversed": 0.1, "frozen": 0.5, "loss": 0.3, "params": 9, "train_s": 1.0}
        ]
    if experiment.kind == "transfer":
        return [{"begun": begun, "top1": 0.5} for begun in ("source", "pre-trained", "scratch")]
    if experiment.kind == "amplitude":
        return [{"amplitude": amplitude, "top1": 0.8} for amplitude in AMPLITUDES[str(experiment.given["pattern"])]]
    if experiment.kind == "salience":
        return [{"share": frames / 16, "salient": 0.5, "faint_answers": 0.4} for frames in SALIENT_FRAMES]
    if experiment.kind == "gradient":
        return [{"lag": lag, "norm": 0.9**lag} for lag in range(64)]
    if experiment.kind == "timing":
        return [{"latency_s": 0.1, "peak_bytes": 100, "macs": 1000, "params": 10}]
    if experiment.kind == "relus":
        return [{"relus": 17, "rectified": 100, "params": 10}]
    assert experiment.kind == "stream_state"
    return [{"state_bytes": 100, "params": 10}]


@pytest.mark.parametrize("claim", ALL, ids=lambda claim: claim.name)
def test_every_prediction_finds_what_its_experiments_make(claim: Claim) -> None:
    outcomes = [Outcome(one, _plausible(one), 1.0) for one in claim.experiments]
    assert len({one.key for one in claim.experiments}) == len(claim.experiments)
    table = frame(outcomes)
    for prediction in (*claim.predictions, *claim.controls):
        effects = prediction.effect(table)
        assert len(effects) == (1 if prediction.exact and table["seed"].nunique() == 1 else table["seed"].nunique())
        assert all(map(math.isfinite, effects))
    assert page.draw(claim, table) is not None
    assert claim.experiments[0].seed + (claim.experiments[0].kind != "timing") <= 1


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

    table = pd.DataFrame([*curve(0, 1.5), *curve(1, 0.25), *curve(2, 9.0), *curve(3, -9.0)])
    found = _threshold(table, "m")
    assert found[0] == pytest.approx(1.5)
    assert found[1] == pytest.approx(0.25)
    assert found[2] == pytest.approx(math.log2(AMPLITUDES["disc"][-1]) + 1)  # never: twice the largest
    assert found[3] < math.log2(AMPLITUDES["disc"][0])


def test_an_exponent_is_found_again() -> None:
    table = pd.DataFrame(
        [
            {"workload": "lstm", "mode": "train", "seed": seed, "clip_length": t, "latency_s": 3e-4 * t**power}
            for seed, power in ((1, 0.5), (2, 1.0))
            for t in (16, 64, 256)
        ]
    )
    assert _slope(table, "lstm", "train") == {1: pytest.approx(0.5), 2: pytest.approx(1.0)}


def rows_of(kind: str, seed: int = 0, **given: Any) -> list[dict[str, Any]]:
    return [dict(row) for row in perform(Experiment(kind, given, seed), "cpu")]


def test_rectifications_are_those_of_the_papers_networks() -> None:
    """34 and 17 in one forward pass, 61.85 and 20.27 million values: counted by running torchvision's."""
    (factorised,), (whole,) = (rows_of("relus", model=name) for name in ("r2plus1d_18", "r3d_18"))
    assert (factorised["relus"], whole["relus"]) == (34, 17)
    assert factorised["rectified"] == pytest.approx(61.85e6, rel=1e-3)
    assert whole["rectified"] == pytest.approx(20.27e6, rel=1e-3)


def test_a_stream_carries_the_state_or_the_history() -> None:
    own = "vidbench.claims.contenders:lstm"
    (recurrent,) = rows_of("stream_state", model=own, clip_length=64, hidden_size=32)
    assert recurrent["state_bytes"] == 2 * 32 * 4
    (convolutional,) = rows_of("stream_state", model="tcn", clip_length=64, hidden_size=32)
    reach = sum(2 * 2 * 2**level for level in range(5))  # two convolutions a level, three taps: field 125
    assert convolutional["state_bytes"] == reach * 32 * 4


def test_no_gradient_reaches_beyond_a_receptive_field() -> None:
    rows = rows_of("gradient", model="tcn", task="token_memory:clip_length=24", steps=0, levels=2, width_multiplier=0.1)
    norms = {row["lag"]: row["norm"] for row in rows}
    assert sorted(norms) == list(range(24))
    assert all(norms[lag] > 0 for lag in (0, 6, 12))
    assert all(norms[lag] == 0 for lag in range(13, 24))


def test_the_gradient_is_that_of_finite_differences() -> None:
    """The mean over clips of the norm of ∂loss/∂frame, of an RNN, against central differences in float64."""
    name = "vidbench.claims.contenders:rnn"
    rows = rows_of("gradient", model=name, task="token_memory:clip_length=8", steps=0, hidden_size=4, seed=3)
    from vidbench.claims.experiments import TEST_EXAMPLES
    from vidbench.training import seeded
    from vidbench.trials import model_for

    data = TaskData(create("token_memory:clip_length=8"), test_examples=TEST_EXAMPLES)
    with seeded(3, "cpu"):
        model = model_for(name, data, 1.0, hidden_size=4).double()
    features, labels = next(iter(data.testing(TEST_EXAMPLES, 3, "normal")))
    features = features.double()
    squares = torch.zeros(len(features), dtype=torch.float64)
    for feature in range(features.shape[2]):
        nudge = torch.zeros_like(features)
        nudge[:, 2, feature] = 1e-5
        with torch.no_grad():
            change = [
                nn.functional.cross_entropy(model(features + s * nudge), labels, reduction="none") for s in (1, -1)
            ]
        squares += ((change[0] - change[1]) / 2e-5) ** 2
    assert rows[5]["norm"] == pytest.approx(float(squares.sqrt().mean()), rel=1e-4)  # frame 2 of 8 lies 5 back


def test_tasks_take_turns() -> None:
    tasks = tuple(TaskData(create(f"subtle_motion:clip_length=4:amplitude={a}")) for a in (1, 8))
    mixed = Mixed(tasks).training(4, 5, 3)
    labels = next(mixed)[1]
    clips = next(mixed)[0]
    first = tasks[0].training(4, 5, 0)
    again = [next(first)[0] for _ in range(3)]
    assert torch.equal(clips, again[2])  # steps 0, 2, 4 are the first task's
    assert labels.tolist() == [(3 * i) % 2 for i in range(4, 8)]
    easy_first = Mixed(tasks, alone=2).training(4, 5, 0)
    ahead = tasks[1].training(4, 1005, 0)
    for _ in range(2):
        assert torch.equal(next(easy_first)[0], next(ahead)[0])
    assert torch.equal(next(easy_first)[0], next(tasks[0].training(4, 5, 0))[0])


def test_what_was_learnt_is_gone_on_with() -> None:
    given: dict[str, Any] = {
        "model": "frame_pool_avg", "source": "appearance:clip_length=2",
        "target": "appearance:clip_length=2:contrast=200", "examples": 8, "steps": 2, "tuning_steps": 1,
        "width_multiplier": 0.0625, "learning_rate": 1e-3, "batch_size": 4,
    }  # fmt: skip
    rows = {row["begun"]: row["top1"] for row in rows_of("transfer", **given)}
    assert sorted(rows) == ["pre-trained", "scratch", "source"]
    assert all(0 <= share <= 1 for share in rows.values())


class Brightest(nn.Module):
    """Answers by the shape that `SHAPES` would make of the frame with the strongest contrast: a stand-in."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.seen = nn.Parameter(torch.zeros(num_classes))

    def forward(self, clip: Tensor) -> Tensor:
        return self.seen.expand(len(clip), -1)


def test_salience_counts_both_answers() -> None:
    """A model that always answers class 0 is right of the salient shape in one clip of four, at any share of frames."""
    given: dict[str, Any] = {
        "model": "test_claims:Brightest", "strong": 256, "faint": 160, "steps": 1, "width_multiplier": 1.0,
        "learning_rate": 0.0, "batch_size": 20,
    }  # fmt: skip
    for row in rows_of("salience", **given):
        assert row["salient"] == pytest.approx(0.25, abs=0.01)
        assert row["faint_answers"] == pytest.approx(0.25, abs=0.01)


def test_streams_see_what_they_are_for() -> None:
    torch.manual_seed(0)
    clip = create("time_direction").make(range(4), seed=0)[0]
    spatial, temporal, both = (
        ClipStreams(kind, num_classes=3, clip_length=16, input_size=32, width_multiplier=0.0625).eval()  # type: ignore[arg-type]
        for kind in ("spatial", "temporal", "both")
    )
    others = clip.clone()
    others[:, :, :8] = 0
    others[:, :, 9:] = 0
    with torch.inference_mode():
        assert torch.equal(spatial(clip), spatial(others))  # the middle frame alone
        assert not torch.equal(temporal(clip), temporal(others))
        outside = clip.clone()
        outside[:, :, :3] = 0
        outside[:, :, 14:] = 0
        assert torch.equal(temporal(clip), temporal(outside))  # ten fields, of frames 3 to 13
        assert both(clip).exp().sum(dim=1) == pytest.approx(2.0, abs=1e-5)  # two distributions
    with pytest.raises(ValueError, match="neither spatial, temporal nor both"):
        ClipStreams("audio", num_classes=3, clip_length=16, input_size=32)  # type: ignore[arg-type]


def test_a_forget_bias_of_five_is_added_to_the_forget_gate_alone() -> None:
    torch.manual_seed(1)
    plain = lstm(num_classes=2, input_features=3, hidden_size=4)
    torch.manual_seed(1)
    biased = lstm_forget_bias(num_classes=2, input_features=3, hidden_size=4)
    gap = biased.rnn.get_parameter("bias_ih_l0") - plain.rnn.get_parameter("bias_ih_l0")
    assert gap.tolist() == pytest.approx(4 * [0.0] + 4 * [5.0] + 8 * [0.0])


def test_without_bottlenecks_the_large_filters_take_the_whole_input() -> None:
    model = i3d_without_bottlenecks(num_classes=5, width_multiplier=0.125)
    block = model.get_submodule("Mixed_3b")
    assert block.get_parameter("b1b.conv3d.weight").shape == (16, 24, 3, 3, 3)  # 128 of 192, at an eighth
    assert model.eval()(torch.zeros(1, 3, 8, 32, 32)).shape == (1, 5)


COUNTED = next(claim for claim in claims("small") if claim.name == "r2plus1d_doubles_nonlinearities")
STREAMED = next(claim for claim in claims("small") if claim.name == "tcn_streams_in_more_memory")


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
    assert [finding.verdict for finding in findings] == ["SUPPORTED", "SUPPORTED"]
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
    assert "1 claims: 1 supported, 0 refuted, 0 undecided" in ended.stdout
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


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_what_was_found_survives_a_kill(ending: signal.Signals, tmp_path: Path) -> None:
    name = "tcn_gradients_are_stable"
    command = [sys.executable, "-m", "vidbench.cli", "claims", name, "--out", "run", "--jobs", "1"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    lines = tmp_path / "run" / LINES
    deadline = time.monotonic() + 60
    while not (lines.exists() and lines.read_bytes().count(b"\n") >= 2):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, ending)
    _, said = process.communicate(timeout=60)
    before = lines.read_bytes()
    kept = before[: before.rfind(b"\n") + 1]
    if ending == signal.SIGINT:
        assert process.returncode == 130
        assert said.splitlines()[-1].startswith("vidbench: interrupted; what was found is kept: add --resume --out")
    ended = vidbench(name, "--out", "run", "--resume", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert lines.read_bytes().startswith(kept)
    experiments = next(claim for claim in claims("small") if claim.name == name).experiments
    assert [outcome.failure for outcome in load(tmp_path / "run")[1]] == [""] * len(experiments)
