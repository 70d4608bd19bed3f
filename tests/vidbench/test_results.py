"""The run folder: what is written is read back, whatever killed the writer, and damage is named."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from array import array
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vidbench.records import Accuracy, Ceilings, Counts, Environment, Error, Measurement, Memory
from vidbench.results import HEADER, LINES, RunError, RunWriter, load
from vidbench.run_format import LineReader, encode_line
from vidbench.sweep import DEVICES, DTYPES, MEMORY_FORMATS, REGIMES, TIMED_MODES, Point, Sweep

SWEEPS = (
    Sweep(
        "conv3d",
        axes={"clip_length": (8, 16), "kernel_size": (3, (1, 3, 3)), "implementation": ("reference", "library")},
        fixed={"bias": True, "width_multiplier": 1.0, "seed": 0},
        skip=({"clip_length": 8, "kernel_size": 3},),
    ),
)
ENVIRONMENT = Environment("m-2", torch="2.11.0", triton="3.6.0", git_commit="abc", clocks={"sm": math.nan})
POINTS = list(SWEEPS[0].points())


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def create(folder: Path, **changes: Any) -> RunWriter:
    return RunWriter.create(folder, **{**_request(), **changes})


def resume(folder: Path, **changes: Any) -> RunWriter:
    return RunWriter.resume(folder, **{**_request(), **changes})


def _request() -> dict[str, Any]:
    return {"suite": "ops", "sweeps": SWEEPS, "environment": ENVIRONMENT, "command": "vidbench sweep ops"}


def measured(index: int = 0, number: int = 0) -> Measurement:
    return Measurement(POINTS[index], number, "ok", samples_s=(0.1 + index, 0.25), counts=Counts(5, {"meta": 5}))


def written(folder: Path, count: int = 3) -> Path:
    with create(folder) as writer:
        for index in range(count):
            writer.append(measured(index))
    return folder


def plain(measurement: Measurement) -> Measurement:
    """With tuples of samples, which compare equal whatever held them."""
    return replace(
        measurement, samples_s=tuple(measurement.samples_s), host_samples_s=tuple(measurement.host_samples_s)
    )


def same(left: object, right: object) -> bool:
    """Equality in which NaN equals itself."""
    return repr(left) == repr(right)


def test_a_run_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    run = load(written(tmp_path / "run"))
    assert (run.suite, run.command, run.input, run.schema_version) == ("ops", "vidbench sweep ops", None, 1)
    assert run.sweeps == SWEEPS
    assert [list(sweep.axes) for sweep in run.sweeps] == [list(sweep.axes) for sweep in SWEEPS]
    assert [point for sweep in run.sweeps for point in sweep.points()] == POINTS
    assert same(run.environment, ENVIRONMENT)
    assert [plain(m) for m in run.measurements] == [measured(index) for index in range(3)]
    assert isinstance(run.measurements[0].samples_s, array)
    assert run.warnings == ()
    assert "-ops-" in run.id
    assert run.created_utc.endswith("Z")


def test_run_json_can_be_named_itself(tmp_path: Path) -> None:
    assert load(written(tmp_path / "run") / HEADER).folder == tmp_path / "run"


def test_two_runs_of_one_second_differ_in_id(tmp_path: Path) -> None:
    assert load(written(tmp_path / "a")).id != load(written(tmp_path / "b")).id


def test_rounds_of_a_point_share_it(tmp_path: Path) -> None:
    with create(tmp_path / "run") as writer:
        writer.append(measured(0, 0))
        writer.append(measured(0, 1))
    first, second = load(tmp_path / "run").measurements
    assert first.point is second.point


finite = st.floats(allow_nan=False, allow_infinity=False)
any_float = st.floats()
word = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
count = st.integers(0, 2**53)
value = st.one_of(
    st.integers(-(2**40), 2**40), finite, word, st.booleans(), st.lists(st.integers(0, 99), max_size=3).map(tuple)
)
measurements = st.builds(
    Measurement,
    point=st.builds(
        Point,
        workload=word,
        kind=st.sampled_from(["op", "model", "stage", "task"]),
        implementation=word,
        mode=st.sampled_from((*TIMED_MODES, "evaluate")),
        regime=st.sampled_from(REGIMES),
        device=st.sampled_from(DEVICES),
        dtype=st.sampled_from(DTYPES),
        memory_format=st.sampled_from(MEMORY_FORMATS),
        case=st.dictionaries(word, value, max_size=4),
    ),
    round=st.integers(0, 30),
    status=st.sampled_from(["ok", "skipped", "failed", "oom", "timeout", "crashed"]),
    reason=word,
    samples_s=st.lists(any_float, max_size=4).map(tuple),
    host_samples_s=st.lists(finite, max_size=4).map(tuple),
    cold_start_s=st.none() | any_float,
    stop=word,
    memory=st.none() | st.builds(Memory, count, count, st.none() | count),
    counts=st.none() | st.builds(Counts, st.none() | count, st.dictionaries(word, count, max_size=2)),
    params=st.none() | count,
    bytes_moved=st.none() | count,
    error=st.none() | st.builds(Error, any_float, finite, st.none() | any_float, st.none() | any_float),
    accuracy=st.none()
    | st.builds(Accuracy, word, count, finite, finite, count, any_float, st.dictionaries(word, any_float, max_size=2)),
    ceilings=st.none() | st.builds(Ceilings, any_float, finite),
    energy_j=st.none() | any_float,
    trust=st.sampled_from(["good", "fair", "poor"]),
    trust_reasons=st.lists(word, max_size=2).map(tuple),
    wall_s=st.none() | finite,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(measurements)
def test_any_measurement_survives_its_line(measurement: Measurement) -> None:
    line = encode_line(measurement)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    back, key = LineReader().read(line)
    assert key == measurement.point.key
    for f in fields(Measurement):
        assert same(_sorted(getattr(plain(back), f.name)), _sorted(getattr(measurement, f.name))), f.name
    assert encode_line(back) == line


def _sorted(value: object) -> object:
    if isinstance(value, Point):
        return replace(value, case=dict(sorted(value.case.items())))
    return value


def test_undecodable_output_of_a_process_can_be_a_reason(tmp_path: Path) -> None:
    with create(tmp_path / "run") as writer:
        writer.append(Measurement(POINTS[0], 0, "crashed", os.fsdecode(b"bad \xff byte\n")))
    assert load(tmp_path / "run").measurements[0].reason == "bad \\udcff byte\n"


def test_killed_at_any_byte_every_finished_line_loads(tmp_path: Path) -> None:
    folder = written(tmp_path / "run")
    content = (folder / LINES).read_bytes()
    ends = [index + 1 for index, byte in enumerate(content) if byte == ord("\n")]
    for cut in range(len(content) + 1):
        (folder / LINES).write_bytes(content[:cut])
        run = load(folder)
        finished = sum(end <= cut for end in ends)
        assert len(run.measurements) == finished, cut
        assert len(run.warnings) == (cut not in (0, *ends)), cut
        if run.warnings:
            assert f"line {finished + 1}" in run.warnings[0]
            assert "torn" in run.warnings[0]


@pytest.mark.parametrize("cut", [1, 40, -1, -30])
def test_resume_cuts_the_torn_line_off_and_goes_on(tmp_path: Path, cut: int) -> None:
    folder = written(tmp_path / "run", count=2)
    content = (folder / LINES).read_bytes()
    second = content.index(b"\n") + 1
    (folder / LINES).write_bytes(content[: second + cut] if cut > 0 else content[:cut])
    with resume(folder) as writer:
        assert "torn" in writer.warnings[0]
        assert writer.done == {(POINTS[0].key, 0)}
        writer.append(measured(1))
        assert writer.done == {(POINTS[0].key, 0), (POINTS[1].key, 0)}
    assert (folder / LINES).read_bytes() == content
    assert load(folder).warnings == ()


def test_a_last_line_of_zero_bytes_is_torn(tmp_path: Path) -> None:
    folder = written(tmp_path / "run")
    with (folder / LINES).open("ab") as file:
        file.write(bytes(64) + b"\n")
    run = load(folder)
    assert len(run.measurements) == 3
    assert "line 4: torn" in run.warnings[0]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (b"{not json}\n", "not JSON"),
        (b"\xff\xfe\n", "not JSON"),
        (b'{"point":3}\n', "got `int`"),
        (b"[]\n", "Expected `object`"),
        (b"\n", "not JSON"),
    ],
)
def test_a_damaged_middle_line_is_named(tmp_path: Path, damage: bytes, said: str) -> None:
    folder = written(tmp_path / "run")
    lines = (folder / LINES).read_bytes().splitlines(keepends=True)
    (folder / LINES).write_bytes(lines[0] + damage + lines[2])
    for read in (load, resume):
        with pytest.raises(RunError, match=rf"{LINES}, line 2: ") as caught:
            read(folder)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
    assert (folder / LINES).read_bytes() == lines[0] + damage + lines[2]


@pytest.mark.parametrize(
    ("field", "wrong"), [("status", "fine"), ("round", "0"), ("samples_s", ["x"]), ("colour", 1), ("samples_s", [None])]
)
def test_a_wrong_value_is_damage_even_in_the_last_line(tmp_path: Path, field: str, wrong: object) -> None:
    folder = written(tmp_path / "run", count=1)
    record = json.loads((folder / LINES).read_text())
    (folder / LINES).write_text(json.dumps({**record, field: wrong}) + "\n")
    with pytest.raises(RunError, match=r"line 1: .*(Expected|Invalid|unknown field)"):
        load(folder)


def test_nonfinite_may_only_name_what_is_null(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", count=1)
    record = json.loads((folder / LINES).read_text())
    for path in (["samples_s", 0], ["samples_s", 7], ["error", "output"], 3):
        (folder / LINES).write_text(json.dumps({**record, "nonfinite": [[path, "NaN"]]}) + "\n")
        with pytest.raises(RunError, match=r"line 1: .*nonfinite"):
            load(folder)


def test_a_line_that_is_there_twice_is_damage(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", count=1)
    content = (folder / LINES).read_bytes()
    (folder / LINES).write_bytes(content * 2)
    with pytest.raises(RunError, match=r"line 2: conv3d/.*round 0, is there already"):
        load(folder)


def test_an_unknown_schema_says_what_can_be_read(tmp_path: Path) -> None:
    folder = written(tmp_path / "run")
    header = json.loads((folder / HEADER).read_text())
    (folder / HEADER).write_text(json.dumps({**header, "schema_version": 7, "shape": "new"}))
    with pytest.raises(RunError, match="schema_version is 7; this release reads 1"):
        load(folder)
    with pytest.raises(RunError, match="schema_version is 7"):
        resume(folder)


@pytest.mark.parametrize("content", ["", "{", '{"schema_version": "1"}', "[1]", '{"schema_version": 1}'])
def test_a_damaged_run_json_is_named(tmp_path: Path, content: str) -> None:
    folder = written(tmp_path / "run")
    (folder / HEADER).write_text(content)
    with pytest.raises(RunError, match=rf"{HEADER}: .*restore the file"):
        load(folder)


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such folder"):
        load(tmp_path / "absent")
    with pytest.raises(RunError, match=f"has no {HEADER}"):
        load(tmp_path)


def test_a_run_without_measurements_loads(tmp_path: Path) -> None:
    assert load(written(tmp_path / "run", count=0)).measurements == []
    (tmp_path / "run" / LINES).unlink()
    assert load(tmp_path / "run").measurements == []


def test_create_refuses_another_run_and_other_files(tmp_path: Path) -> None:
    folder = written(tmp_path / "run")
    with pytest.raises(RunError, match="holds a run already; continue it with --resume"):
        create(folder)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("")
    for start in (create, resume):
        with pytest.raises(RunError, match=r"other files \(thesis.tex\)"):
            start(other)
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("start", [create, resume])
def test_a_folder_killed_before_run_json_was_whole_counts_as_empty(tmp_path: Path, start: Any) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / LINES).touch()
    (folder / ".run.json.tmp").write_text('{"schema_ver')
    with start(folder) as writer:
        writer.append(measured())
    assert len(load(folder).measurements) == 1
    assert sorted(path.name for path in folder.iterdir()) == [LINES, HEADER]


def test_resume_starts_where_there_is_nothing_and_keeps_the_id(tmp_path: Path) -> None:
    with resume(tmp_path / "deep" / "run") as writer:
        writer.append(measured())
        identifier = writer.id
    with resume(tmp_path / "deep" / "run", command="vidbench sweep ops --resume") as writer:
        assert writer.id == identifier
        assert writer.done == {(POINTS[0].key, 0)}
    assert load(tmp_path / "deep" / "run").command == "vidbench sweep ops"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"environment": replace(ENVIRONMENT, torch="2.12.0")}, "torch was '2.11.0' and is '2.12.0'"),
        ({"environment": replace(ENVIRONMENT, machine="n-4")}, "machine was 'm-2' and is 'n-4'"),
        ({"environment": replace(ENVIRONMENT, git_commit=None)}, "git_commit was 'abc' and is None"),
        ({"environment": replace(ENVIRONMENT, driver="570")}, "driver was None and is '570'"),
        ({"suite": "models"}, "suite was 'ops' and is 'models'"),
        ({"input": "clip.mp4"}, "input was None and is 'clip.mp4'"),
        ({"sweeps": SWEEPS * 2}, "number of sweeps was 1 and is 2"),
        (
            {"sweeps": [SWEEPS[0].override({"clip_length": (8, 32)})]},
            r"sweeps\[0\].axes.clip_length was \(8, 16\) and is \(8, 32\)",
        ),
        (
            {"sweeps": [replace(SWEEPS[0], axes=dict(reversed(SWEEPS[0].axes.items())))]},
            r"order of sweeps\[0\].axes was 'clip_length, .*' and is 'implementation, ",
        ),
    ],
)
def test_resume_refuses_another_run_with_both_values(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    folder = written(tmp_path / "run")
    before = (folder / LINES).read_bytes()
    with pytest.raises(RunError, match=said):
        resume(folder, **changes)
    assert (folder / LINES).read_bytes() == before


def test_a_point_and_round_has_one_line(tmp_path: Path) -> None:
    with create(tmp_path / "run") as writer:
        writer.append(measured(0, 0))
        writer.append(measured(0, 1))
        with pytest.raises(RunError, match=r"conv3d/.*, round 1, has a line already"):
            writer.append(measured(0, 1))
    with resume(tmp_path / "run") as writer, pytest.raises(RunError, match="has a line already"):
        writer.append(measured(0, 0))
    with pytest.raises(RunError, match="closed"):
        writer.append(measured(1, 0))


def test_a_second_writer_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    with create(tmp_path / "run"):
        with pytest.raises(RunError, match="another process is writing"):
            resume(tmp_path / "run")
        assert load(tmp_path / "run").measurements == []
    resume(tmp_path / "run").close()


def test_a_forked_child_does_not_hold_the_run(tmp_path: Path) -> None:
    script = f"""
import os, signal
from vidbench.records import Environment
from vidbench.results import RunWriter
writer = RunWriter.create({str(tmp_path / "run")!r}, suite="s", sweeps=[], environment=Environment("m"), command="")
ready, started = os.pipe()
if os.fork() == 0:
    os.write(started, b"x")
    signal.alarm(5)
    signal.pause()
os.read(ready, 1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    resume(tmp_path / "run", suite="s", sweeps=[], environment=Environment("m")).close()


def test_closing_frees_the_run_whatever_a_child_holds(tmp_path: Path) -> None:
    writer = create(tmp_path / "run")
    copy = os.dup(writer._descriptor)
    writer.close()
    resume(tmp_path / "run").close()
    os.close(copy)


def test_a_notebook_shows_a_run_as_a_table_and_its_names_as_text(tmp_path: Path) -> None:
    run = replace(load(written(tmp_path)), suite="<script>x</script>")
    shown = run._repr_html_()
    assert "<script>" not in shown
    assert "latency_s" in shown
    assert "NaN" not in shown


def test_a_full_disk_leaves_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    with create(tmp_path / "run") as writer:
        writer.append(measured(0))
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:20]))
            with pytest.raises(RunError, match=r"20 of .* bytes were taken"):
                writer.append(measured(1))
        writer.append(measured(1))
    run = load(tmp_path / "run")
    assert len(run.measurements) == 2
    assert run.warnings == ()


def test_every_append_is_one_write_of_one_line_and_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    write = os.write

    def counted(descriptor: int, line: bytes) -> int:
        calls.append("write")
        return write(descriptor, line)

    with create(tmp_path / "run") as writer:
        monkeypatch.setattr(os, "write", counted)
        monkeypatch.setattr(os, "fsync", lambda _: calls.append("fsync"))
        writer.append(measured())
    assert calls == ["write", "fsync"]


def test_a_process_killed_while_it_writes_leaves_a_run(tmp_path: Path) -> None:
    script = f"""
import os, signal, sys
from vidbench.records import *
from vidbench.results import RunWriter
from vidbench.sweep import *
write = os.write
os.write = lambda descriptor, line: (write(descriptor, line[:50]), os.kill(os.getpid(), signal.SIGKILL))
sweep = Sweep("conv3d", axes={{"clip_length": (8,), "implementation": ("library",)}})
known = dict(suite="s", sweeps=[sweep], environment=Environment("m"), command="")
writer = RunWriter.create({str(tmp_path / "run")!r}, **known)
writer.append(Measurement(next(sweep.points()), 0, "ok"))
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert "torn" in load(tmp_path / "run").warnings[0]
    sweep = Sweep("conv3d", axes={"clip_length": (8,), "implementation": ("library",)})
    resume(tmp_path / "run", suite="s", sweeps=[sweep], environment=Environment("m")).close()
    assert load(tmp_path / "run").warnings == ()


def test_reading_a_run_needs_neither_torch_nor_pandas() -> None:
    script = "import vidbench.results, vidbench.metrics, vidbench.report, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"torch", "pandas", "numpy", "scipy", "matplotlib"} & set(done.stdout.split())
