"""Many runs: what is kept of them, in which order they stand, which changes are found, and which are not made up."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet
import pytest

from vidbench.change_points import change_points
from vidbench.changes import Change, changes
from vidbench.history import CACHE, History, read
from vidbench.history_text import FORMATS, labels
from vidbench.records import Accuracy, Counts, Environment, Measurement, Memory
from vidbench.report.timeline import MOST_PANELS, draw, write
from vidbench.results import load
from vidbench.run_format import encode_line, encode_record
from vidbench.sweep import Point, RequestError

BENCH = Environment("test bench", cores=2, threads=2, torch="2.13.0", python="3.12", flags={"a": "1"})
Numbers = npt.NDArray[np.float64]


def point(clip_length: int = 8, implementation: str = "library") -> Point:
    return Point("conv3d", "op", implementation, case={"clip_length": clip_length, "kernel_size": (1, 3, 3)})


def measured(at: Point, seconds: float, round_: int = 1, **more: object) -> Measurement:
    samples = [0.99 * seconds, seconds, 1.01 * seconds]
    return replace(Measurement(at, round_, "ok", samples_s=samples), **more)  # type: ignore[arg-type]


def write_run(
    folder: Path, number: int, lines: Sequence[Measurement], environment: Environment = BENCH, **header: object
) -> Path:
    """A run as a sweep leaves it, of an hour of one's choice."""
    environment = replace(environment, git_commit=environment.git_commit or f"{number:040x}")
    created = (pd.Timestamp("2026-01-01") + pd.Timedelta(hours=number)).strftime("%Y-%m-%dT%H:%M:%SZ")
    record = {"schema_version": 1, "id": f"run-{number:04d}", "suite": "quick", "created_utc": created, "sweeps": (),
              "environment": environment, "command": "vidbench sweep quick", **header}  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "run.json").write_bytes(encode_record(record))
    (folder / "measurements.jsonl").write_bytes(b"".join(map(encode_line, lines)))
    return folder


def write_runs(top: Path, *seconds: tuple[Point, Sequence[float] | Numbers]) -> Path:
    """As many runs as each point has seconds."""
    for number in range(len(seconds[0][1])):
        write_run(top / f"{number:04d}", number, [measured(at, of[number]) for at, of in seconds])
    return top


def noisy(runs: int, seed: int, spread: float = 0.01, middle: float = 0.01) -> Numbers:
    found: Numbers = middle * np.exp(spread * np.random.default_rng(seed).standard_normal(runs))
    return found


def found_in(top: Path) -> list[Change]:
    return list(changes(read(top)).found)


def reads_of(top: Path) -> tuple[History, int]:
    """The history, and how many runs were read for it."""
    told: list[int] = []
    return read(top, lambda done, _of: told.append(done)), len(told)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_rows_are_those_of_the_runs_own_frames(tmp_path: Path) -> None:
    task = Point("c3d", "task", "eager", mode="evaluate", case={"task": "frame_order", "seed": 1})
    lines = [
        *(measured(point(8), s, r, memory=Memory(0, 100 + r), counts=Counts(7)) for r, s in ((1, 0.010), (2, 0.012))),
        replace(measured(point(16), 0.02), samples_s=[0.02 + i / 1e4 for i in range(9)], params=3, bytes_moved=5),
        measured(point(32), 0.03),
        Measurement(point(32), 2, "oom", "killed by the kernel: out of memory"),
        Measurement(task, 1, "ok", accuracy=Accuracy("frame_order", 1, 0.75, 1 / 6, 600, 1.0)),
    ]
    run = load(write_run(tmp_path / "runs" / "a", 1, lines))
    kept, whole = read(tmp_path / "runs").frame, run.frame()
    shared = [name for name in kept if name in whole]
    assert {"latency_s", "latency_low_s", "latency_high_s", "peak_memory_bytes", "macs", "params", "bytes_moved",
            "status", "reason", "rounds", "top1_accuracy", "clip_length", "kernel_size"} <= set(shared)  # fmt: skip
    for name in shared:
        assert kept[name].astype(object).where(kept[name].notna(), None).tolist() == pytest.approx(
            whole[name].astype(object).where(whole[name].notna(), None).tolist()
        ), name
    assert kept["peak_memory_low_bytes"].iloc[0] == 101
    assert (kept["torch"].iloc[0], kept["flags"].iloc[0]) == ("2.13.0", '{"a":"1"}')


def test_a_later_call_reads_what_is_new_or_has_changed(tmp_path: Path) -> None:
    top = write_runs(tmp_path / "runs", (point(), [1.0, 1.0, 1.0]))
    first, number = reads_of(top)
    assert (number, first.runs) == (3, 3)
    again, number = reads_of(top)
    assert number == 0
    pd.testing.assert_frame_equal(again.frame, first.frame)
    with (top / "0001" / "measurements.jsonl").open("ab") as file:
        file.write(encode_line(measured(point(16), 2.0)))
    write_run(top / "deeper" / "3", 3, [measured(point(), 4.0)])
    shutil.rmtree(top / "0000")
    grown, number = reads_of(top)
    assert number == 2
    assert grown.frame[["run_id", "latency_s"]].astype({"run_id": str}).to_numpy().tolist() == [
        ["run-0001", 1.0], ["run-0001", 2.0], ["run-0002", 1.0], ["run-0003", 4.0],
    ]  # fmt: skip
    (top / CACHE).unlink()
    fresh, number = reads_of(top)
    assert number == 3
    assert fresh.frame.astype(str).equals(grown.frame.astype(str))


def test_a_cache_that_is_damaged_or_of_another_version_is_made_anew(tmp_path: Path) -> None:
    top = write_runs(tmp_path / "runs", (point(), [1.0, 2.0]))
    first = read(top)
    whole = (top / CACHE).read_bytes()
    other = pyarrow.parquet.read_table(top / CACHE).replace_schema_metadata({"vidbench_history": "0"})
    for damage in (whole[:-100], b"", b"no parquet"):
        (top / CACHE).write_bytes(damage)
        again, number = reads_of(top)
        assert number == 2
        pd.testing.assert_frame_equal(again.frame, first.frame)
        assert reads_of(top)[1] == 0
    pyarrow.parquet.write_table(other, top / CACHE)
    assert reads_of(top)[1] == 2


def test_a_cache_that_cannot_be_kept_is_said_and_no_more(tmp_path: Path) -> None:
    top = write_runs(tmp_path / "runs", (point(), [1.0]))
    (top / CACHE / "in the way").mkdir(parents=True)
    found = read(top)
    assert found.runs == 1
    assert len(found.warnings) == 1
    assert found.warnings[0].startswith(f"cannot keep {top / CACHE}: ")
    assert sorted(path.name for path in top.iterdir()) == ["0000", CACHE]


def test_an_interrupt_keeps_what_was_read(tmp_path: Path) -> None:
    top = write_runs(tmp_path / "runs", (point(), [1.0] * 5))

    def interrupt(done: int, _of: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read(top, interrupt)
    found, number = reads_of(top)
    assert (number, found.runs) == (2, 5)


def test_runs_that_cannot_be_read_are_passed_over_in_one_line_each(tmp_path: Path) -> None:
    top = write_runs(tmp_path / "runs", (point(), [1.0, 2.0, 3.0, 4.0]))
    (top / "0000" / "run.json").write_text("{}")
    (top / "0001" / "measurements.jsonl").write_bytes(b"{}\n{}\n")
    torn = top / "0002" / "measurements.jsonl"
    torn.write_bytes(torn.read_bytes() + b'{"point":')
    for _ in range(2):  # what cannot be read is no more to be read the second time
        found = read(top)
        assert found.frame["latency_s"].tolist() == [3.0, 4.0]
        assert [warning for warning in found.warnings if "passed over" in warning] == [
            warning for warning in found.warnings if "0000" in warning or "0001" in warning
        ]
        assert all(len(warning.splitlines()) == 1 for warning in found.warnings)
    shutil.rmtree(top / "0002")
    shutil.rmtree(top / "0003")
    with pytest.raises(RequestError, match=r"no run below .*0000.run\.json"):
        read(top)
    with pytest.raises(RequestError, match=r"no folder .*nowhere: name one that holds run folders"):
        read(tmp_path / "nowhere")


def test_a_run_still_written_is_read_as_far_as_it_is(tmp_path: Path) -> None:
    top = write_runs(tmp_path / "runs", (point(), [1.0]))
    lines = top / "0000" / "measurements.jsonl"
    whole = lines.read_bytes() + encode_line(measured(point(), 3.0, 2))
    lines.write_bytes(whole[:-20])
    found = read(top)
    assert found.frame["latency_s"].tolist() == [1.0]
    assert "torn" in found.warnings[0]
    lines.write_bytes(whole)
    assert read(top).frame["latency_s"].tolist() == [2.0]


def test_a_copy_of_a_run_counts_once_and_the_fuller_one(tmp_path: Path) -> None:
    top = write_runs(tmp_path / "runs", (point(), [1.0]))
    shutil.copytree(top / "0000", top / "a baseline")
    with (top / "0000" / "measurements.jsonl").open("ab") as file:
        file.write(encode_line(measured(point(16), 2.0)))
    found = read(top)
    assert found.runs == 1
    assert found.frame["latency_s"].tolist() == [1.0, 2.0]


# --- the order of commits ---------------------------------------------------------------------------------------------


def repository(folder: Path, commits: int) -> list[str]:
    """Commits on a line, all of one second."""
    folder.mkdir()
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    git = ("git", "-C", str(folder), *identity)
    subprocess.run((*git, "init", "-q"), check=True)
    made = []
    for number in range(commits):
        subprocess.run((*git, "commit", "-q", "--allow-empty", "-m", str(number)), check=True)
        head = subprocess.run((*git, "rev-parse", "HEAD"), check=True, capture_output=True, text=True)
        made.append(head.stdout.strip())
    return made


def test_runs_stand_in_the_order_of_commits_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = repository(tmp_path / "here", 4)
    top = tmp_path / "here" / "runs"
    for hour, of in enumerate((3, 1, 0, 1)):  # measured long after they were made
        environment = replace(BENCH, git_commit=commits[of])
        write_run(top / str(hour), hour, [measured(point(), 1.0 + hour)], environment)
    found = read(top)
    assert found.frame["latency_s"].tolist() == [3.0, 2.0, 4.0, 1.0]
    assert found.frame["place"].tolist() == [0, 1, 1, 2]
    assert found.order == "commits, as git has it"

    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(top, elsewhere)
    monkeypatch.chdir(tmp_path / "here")
    assert read(elsewhere).frame["latency_s"].tolist() == [3.0, 2.0, 4.0, 1.0]
    monkeypatch.chdir(tmp_path)
    unknown = read(elsewhere)
    assert unknown.frame["latency_s"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert unknown.order == "time, as git here does not know the commits of 4 of 4 runs"


# --- changes ----------------------------------------------------------------------------------------------------------


def test_a_planted_change_is_found_where_it_is_with_what_else_changed(tmp_path: Path) -> None:
    points = point(8), point(16), point(32)
    seconds = [noisy(30, seed) for seed in range(3)]
    seconds[0][18:] *= 1.08
    seconds[0][7] *= 3.0  # one slow run hides no change
    seconds[2][25] *= 3.0  # and is none
    for number in range(30):
        environment = replace(BENCH, torch="2.13.0" if number < 18 else "2.14.0")
        lines = [measured(at, of[number]) for at, of in zip(points, seconds, strict=True)]
        write_run(tmp_path / f"{number:02d}", number, lines, environment)
    (change,) = found_in(tmp_path)
    assert (change.kind, change.metric, change.series.point) == ("SLOWER", "latency_s", points[0])
    assert (change.last_before.run_id, change.first_after.run_id) == ("run-0017", "run-0018")
    assert change.runs == (18, 12)
    assert change.causes == {"torch": ("2.13.0", "2.14.0")}
    assert change.effect is not None
    assert change.effect.ratio == pytest.approx(1.08, rel=0.015)
    assert change.before == pytest.approx(0.01, rel=0.01)


def test_a_change_that_was_taken_back_is_found(tmp_path: Path) -> None:
    seconds = noisy(60, 3)
    seconds[25:35] *= 1.06
    found = found_in(write_runs(tmp_path, (point(), seconds)))
    assert [(change.kind, change.first_after.run_id) for change in found] == [
        ("SLOWER", "run-0025"), ("FASTER", "run-0035"),
    ]  # fmt: skip


def test_what_nobody_minds_and_what_the_last_run_says_is_no_change(tmp_path: Path) -> None:
    little, late = noisy(60, 4, spread=0.0005), noisy(60, 5, spread=0.005)
    little[30:] *= 1.008
    late[-1] *= 1.5
    assert found_in(write_runs(tmp_path, (point(8), little), (point(16), late))) == []


def test_machines_and_inputs_never_mix(tmp_path: Path) -> None:
    for number in range(40):
        here = number < 20
        write_run(
            tmp_path / "machines" / f"{number}", number, [measured(point(), 1.0 if here else 2.0)],
            BENCH if here else replace(BENCH, threads=1),
        )  # fmt: skip
        write_run(
            tmp_path / "inputs" / f"{number}", number, [measured(point(), 1.0 if here else 2.0)],
            input=None if here else "video.mp4",
        )  # fmt: skip
    for name in ("machines", "inputs"):
        found = changes(read(tmp_path / name))
        assert (len(found.series), found.found) == (2, [])


def test_exact_figures_memory_and_status(tmp_path: Path) -> None:
    macs = [100, 100, 80, 80, 80, 80]
    peaks = [10_000, 10_300, 10_000, 10_400, 12_000, 12_100]
    for number in range(6):
        counted = measured(point(8), 1.0, counts=Counts(macs[number]), memory=Memory(0, peaks[number]))
        ran = measured(point(16), 1.0)
        if number in (2, 3):
            ran = Measurement(point(16), 1, "crashed", "worker died of signal 11\n")
        write_run(tmp_path / str(number), number, [counted, ran])
    found = {change.kind: change for change in found_in(tmp_path)}
    assert list(found) == ["STOPPED", "MORE", "LESS"]
    less, more, stopped = found["LESS"], found["MORE"], found["STOPPED"]
    assert (less.metric, less.before, less.after, less.first_after.run_id) == ("macs", 100, 80, "run-0002")
    assert (more.metric, more.before, more.after) == ("peak_memory_bytes", 10_400, 12_000)
    assert (more.first_after.run_id, more.runs) == ("run-0004", (4, 2))
    assert (stopped.last_before.run_id, stopped.first_after.run_id, stopped.runs) == ("run-0001", "run-0002", (2, 2))
    assert stopped.again is not None
    assert stopped.again.run_id == "run-0004"


Noise = Callable[[np.random.Generator, tuple[int, int]], Numbers]


def gaussian(generator: np.random.Generator, shape: tuple[int, int]) -> Numbers:
    return generator.standard_normal(shape)


def heavy_tailed(generator: np.random.Generator, shape: tuple[int, int]) -> Numbers:
    return generator.standard_t(3, shape)


def alike(generator: np.random.Generator, shape: tuple[int, int]) -> Numbers:
    """Runs that follow each other share half of what disturbs them."""
    values = generator.standard_normal(shape)
    for index in range(1, shape[1]):
        values[:, index] = 0.5 * values[:, index - 1] + np.sqrt(0.75) * values[:, index]
    return values


@pytest.mark.parametrize("noise", [gaussian, heavy_tailed, alike])
def test_noise_has_no_change_points(noise: Noise) -> None:
    """At most 2 % of histories of 50 series and 40 runs may have one: of 10, none or by bad luck one."""
    generator = np.random.default_rng(7)
    alarms = 0
    for _ in range(10):
        series = list(0.02 * noise(generator, (50, 40)))
        alarms += any(change_points(series, ["bench"] * 50, rate=0.01, matters=0.01))
    assert alarms <= 1


@pytest.mark.parametrize(("step", "at", "least"), [(0.05, 20, 9), (0.1, 35, 13)])
def test_steps_are_found_to_a_run(step: float, at: int, least: int) -> None:
    """Of 15 histories with one step in one of 50 series, in noise of 2 %; half of those found are exact at least."""
    generator = np.random.default_rng(8)
    places = []
    for _ in range(15):
        series = 0.02 * generator.standard_normal((50, 40))
        series[0, at:] += np.log1p(step)
        places += [one.at for one in change_points(list(series), ["bench"] * 50, rate=0.01, matters=0.01)[0]]
    assert len(places) >= least
    assert sum(abs(place - at) <= 1 for place in places) >= 0.7 * len(places)


# --- what is shown ----------------------------------------------------------------------------------------------------


def eventful(top: Path) -> Path:
    """Eight points that became slower by 10 to 80 %, six of eight others that became faster."""
    seconds = [(point(t, "compiled"), noisy(30, t)) for t in range(1, 9)]
    for number, (_, of) in enumerate(seconds, 1):
        of[20:] *= 1 + number / 10
    others = [(point(t), noisy(30, 10 + t)) for t in range(1, 9)]
    for _, of in others[2:]:
        of[10:] *= 0.7
    return write_runs(top, *seconds, *others)


def test_the_text_begins_with_the_worst(tmp_path: Path) -> None:
    lines = FORMATS["text"](changes(read(eventful(tmp_path)))).splitlines()
    assert lines[0] == "8 slower, 6 faster"
    assert lines[1] == "  30 runs of 16 points on test bench, 2 threads"
    assert lines[3] == "SLOWER: 8"
    assert lines[4].startswith("  conv3d/compiled clip_length=8: 9.991 ms → 17.98 ms, +79.9% (")
    assert lines[5].startswith("    since 000000000 (2026-01-01), before it 000000000 (2026-01-01); 20 runs → 10 runs")


def test_json_has_everything(tmp_path: Path) -> None:
    document = json.loads(FORMATS["json"](changes(read(eventful(tmp_path)).only("/compiled/"))))
    assert (document["runs"], document["points"], len(document["changes"])) == (30, 8, 8)
    first = document["changes"][0]
    assert (first["kind"], first["first_after"]["run_id"]) == ("SLOWER", "run-0020")
    assert first["ratio"] == pytest.approx(1.8, rel=0.02)
    assert first["ratio_interval"][0] < first["ratio"] < first["ratio_interval"][1]
    with pytest.raises(RequestError, match="no point has 'lstm' in its key; a key is such as conv3d/compiled/"):
        read(tmp_path).only("lstm")


def test_the_figure_shows_what_changed_most(tmp_path: Path) -> None:
    found = changes(read(eventful(tmp_path / "runs")))
    titles = labels(found.series)
    figure = draw(found, titles)
    assert figure is not None
    assert len(figure.axes) == MOST_PANELS
    assert figure.axes[0].get_title(loc="left") == "conv3d/compiled clip_length=8"
    assert {ax.get_ylabel() for ax in figure.axes} == {"latency per call (ms)"}
    write(found, titles, tmp_path / "out")
    svg = (tmp_path / "out" / "history.svg").read_text()
    ElementTree.fromstring(svg)
    assert "2 more that changed are left out" in svg
    assert len(pd.read_csv(tmp_path / "out" / "history.csv")) == 30 * 16
    assert (tmp_path / "out" / "history.png").read_bytes().startswith(b"\x89PNG")


def test_the_command(tmp_path: Path) -> None:
    def vidbench(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "vidbench.cli", "history", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    (tmp_path / "empty").mkdir()
    none = vidbench("empty")
    assert (none.returncode, none.stdout) == (2, "")
    assert none.stderr.startswith("vidbench: error: no run below empty; a run is a folder with a run.json")
    write_runs(tmp_path / "runs", (point(8), [1.0] * 8), (point(16), [1.0] * 4 + [2.0] * 4))
    (tmp_path / "runs" / "0007" / "run.json").write_text("{}")
    said = vidbench("runs", "--point", "clip_length=16", "--out", "out")
    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines()[1] == "  7 runs of 1 points on test bench, 2 threads"
    assert said.stderr.splitlines()[-1].startswith("vidbench: warning: ")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["history.csv", "history.png", "history.svg"]


@pytest.mark.slow
def test_a_thousand_runs_of_fifty_points_are_read_once(tmp_path: Path) -> None:
    seconds = [(point(clip_length), noisy(1000, clip_length, spread=0.02)) for clip_length in range(1, 51)]
    seconds[6][1][600:] *= 1.05
    first, number = reads_of(write_runs(tmp_path, *seconds))
    assert (number, len(first.frame)) == (1000, 50_000)
    again, number = reads_of(tmp_path)
    assert number == 0
    (change,) = changes(again).found
    assert change.series.point == point(7)
    assert abs(change.row // 50 - 600) <= 5
