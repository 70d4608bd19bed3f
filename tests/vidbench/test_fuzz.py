"""Whatever a run folder holds and whatever is typed: one line of error, never a traceback, and no work begun."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vidbench import cli
from vidbench.results import HEADER, LINES, RunError, RunWriter, load
from vidbench.sweep import RequestError

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # `bench` is no installed package

from bench import fuzz, fuzz_inputs  # noqa: E402

RECORD: dict[str, Any] = json.loads(fuzz_inputs.GOOD[0])
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that loads."""
    from dataclasses import replace

    folder = tmp_path_factory.mktemp("fuzz") / "good"
    known: dict[str, Any] = {
        "suite": "fuzz",
        "sweeps": (fuzz_inputs.SWEEP,),
        "environment": fuzz_inputs.ENVIRONMENT,
        "command": "x",
    }
    with RunWriter.create(folder, **known) as writer:
        for number in (1, 2):
            for one in fuzz_inputs.MEASUREMENTS:
                writer.append(replace(one, round=number))
    return folder


def _loads_or_says_why(folder: Path) -> bool:
    try:
        load(folder)
    except RunError as error:
        said = str(error)
    else:
        return True
    assert said.isprintable()
    assert str(folder) in said
    return False


@QUICK
@given(st.data())
def test_bytes_that_went_astray_are_refused_or_do_no_harm(good: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([HEADER, LINES]))
    content = (good / name).read_bytes()
    first, second = sorted(data.draw(st.integers(0, len(content))) for _ in range(2))
    broken = good.parent / "broken"
    broken.mkdir(exist_ok=True)
    for other in (HEADER, LINES):
        (broken / other).write_bytes((good / other).read_bytes())
    (broken / name).write_bytes(content[:first] + data.draw(st.binary(max_size=20)) + content[second:])
    _loads_or_says_why(broken)


@QUICK
@given(st.sampled_from(sorted({*RECORD, "accuracy", "nonfinite", "colour"})), ANY_JSON)
def test_any_value_of_any_field_is_refused_or_can_be_framed(good: Path, field: str, value: object) -> None:
    broken = good.parent / "field"
    broken.mkdir(exist_ok=True)
    (broken / HEADER).write_bytes((good / HEADER).read_bytes())
    line = json.dumps({**RECORD, field: value}).encode("utf-8", "surrogatepass")
    (broken / LINES).write_bytes(line + b"\n" + fuzz_inputs.GOOD[1])
    if _loads_or_says_why(broken) and (found := load(broken)).measurements:
        assert len(found.frame()) == len(found.measurements)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("samples_s", [0.1, -0.1], "samples_s has -0.1: a time is from 1e-12 to 1e+09 s"),
        ("samples_s", [0.1, 0.0], "samples_s has 0.0: a time"),
        ("round", -1, "round is -1"),
        ("params", 2**62, f"params is {2**62}"),
        ("ceilings", {"flops_per_s": 0.0, "bytes_per_s": 1.0}, "a ceiling is 0"),
        ("memory", {"live_before_bytes": 1, "peak_bytes": -5}, "memory.peak_bytes is -5"),
        (
            "accuracy",
            {"task": "t", "seed": 0, "top1": 1.5, "chance": 0.5, "examples": 6, "train_s": 1.0},
            "accuracy is no share of clips",
        ),
        ("point", {**RECORD["point"], "case": {"clip_length": "long"}}, "the point's clip_length is 'long'"),
        ("point", {**RECORD["point"], "case": {"batch_size": 0}}, "the point's batch_size is 0"),
        ("point", {**RECORD["point"], "case": {"free": 2**70}}, f"the point's free is {2**70}"),
        ("point", {**RECORD["point"], "workload": "a\x1b[31m"}, "has letters that cannot be shown"),
        ("wall_s", "\x00", "Expected"),
    ],
)
def test_what_no_measurement_can_be_is_refused(good: Path, field: str, value: object, said: str) -> None:
    broken = good.parent / "impossible"
    broken.mkdir(exist_ok=True)
    (broken / HEADER).write_bytes((good / HEADER).read_bytes())
    (broken / LINES).write_text(json.dumps({**RECORD, field: value}) + "\n")
    with pytest.raises(RunError) as caught:
        load(broken)
    assert f"{broken / LINES}, line 1: " in str(caught.value)
    assert said in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", [HEADER, LINES])
@pytest.mark.parametrize(
    ("other", "said"),
    [
        (os.mkfifo, "it is not a file"),
        (os.mkdir, "it is not a file"),
        (lambda path: os.symlink("/dev/zero", path), "it is not a file"),
        (lambda path: os.symlink(path, path), "Too many levels of symbolic links"),
        (fuzz_inputs._sparse, f"longer than {2**26} bytes"),
    ],
    ids=["pipe", "folder", "device", "circle", "endless"],
)
def test_what_is_no_file_is_neither_waited_for_nor_read_without_end(
    good: Path, tmp_path: Path, name: str, other: Callable[[Path], None], said: str
) -> None:
    for kept in {HEADER, LINES} - {name}:
        (tmp_path / kept).write_bytes((good / kept).read_bytes())
    other(tmp_path / name)
    with pytest.raises(RunError, match=said):
        load(tmp_path)


def test_a_runs_id_is_no_way_to_other_folders(good: Path, tmp_path: Path) -> None:
    header = json.loads((good / HEADER).read_text())
    for bad in ("../../home", "", ".hidden", "a\nb", "x" * 300):
        (tmp_path / HEADER).write_text(json.dumps({**header, "id": bad}))
        with pytest.raises(RunError, match="is not a name"):
            load(tmp_path)


# --- the fuzzer itself ------------------------------------------------------------------------------------------------


def test_generated_folders_do_no_harm(tmp_path: Path) -> None:
    found = fuzz.run(300, 11, 0, tmp_path / "kept", lambda *_: None)
    assert sum(found.values()) == 300
    assert not (tmp_path / "kept").exists(), list((tmp_path / "kept").glob("*.txt"))
    assert found["line", "refused"] > 100
    assert found["line", "loads"] > 20


def test_an_input_is_a_function_of_seed_and_number() -> None:
    header = b'{"schema_version": 1}'
    first = [fuzz_inputs.make(5, index, header) for index in range(30)]
    assert [made.files for made in first] == [fuzz_inputs.make(5, index, header).files for index in range(30)]
    assert first[0].files != fuzz_inputs.make(6, 0, header).files


def test_the_fuzzer_finds_what_raises_hangs_and_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = fuzz.attempt
    count = multiprocessing.Value("i", 0)  # seen by every process that tries inputs

    def bad(*arguments: Any) -> Any:
        with count:
            number, count.value = count.value, count.value + 1
        match number:
            case 3:
                raise KeyError("planted")
            case 5:
                signal.pause()
            case 7:
                os._exit(9)
        return honest(*arguments)

    monkeypatch.setattr(fuzz, "attempt", bad)
    monkeypatch.setattr(fuzz, "LIMIT_S", dict.fromkeys(fuzz.LIMIT_S, 2.0))
    found = fuzz.run(10, 0, 0, tmp_path / "kept", lambda *_: None)
    assert {path.name for path in (tmp_path / "kept").glob("*.txt")} == {"3.txt", "5.txt", "7.txt"}
    assert "KeyError: 'planted'" in (tmp_path / "kept" / "3.txt").read_text()
    assert "HUNG after" in (tmp_path / "kept" / "5.txt").read_text()
    assert (tmp_path / "kept" / "3" / LINES).exists()
    assert [sum(n for (_, o), n in found.items() if o == outcome) for outcome in fuzz.OFFENCES] == [1, 1, 1]
    assert sum(found.values()) == 10


# --- the command line -------------------------------------------------------------------------------------------------


class Begun(RequestError):
    """Work would begin here."""


@pytest.fixture
def shell(tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a good and a broken run, in which no command can begin to work."""
    from vidbench import gate, trials, weigh
    from vidbench.claims import investigate
    from vidbench.engine.local import LocalEngine

    def begin(*_: Any, **__: Any) -> Any:
        raise Begun("work would begin")

    monkeypatch.setattr(LocalEngine, "_ready", begin)
    monkeypatch.setattr(gate, "checkout", begin)
    monkeypatch.setattr(trials, "trial", begin)
    monkeypatch.setattr(investigate, "investigate", begin)
    monkeypatch.setattr(weigh, "tune_machine", begin)
    monkeypatch.chdir(tmp_path)
    for name in ("good", "broken"):
        (tmp_path / name).mkdir()
        for file in (HEADER, LINES):
            (tmp_path / name / file).write_bytes((good / file).read_bytes())
    (tmp_path / "broken" / LINES).write_bytes(b"{}\n" * 2)
    (tmp_path / "file").write_text("hello")
    handler = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, handler)


VALUES = st.sampled_from(
    ["good", "broken", "file", "nowhere", ".", "/dev/null", "", "-", "--", "0", "-1", "3", "1.5", "nan", "inf", "1e999",
     "9" * 40, "c3", "conv3d", "quick", "models", "clip_length=8", "clip_length=", "=8", "clip_length=0", "dtype=fp31",
     "x=y", "frame_order", "frame_order:clip_length=x", "a:b", ":", "json", "text", "cpu", "cuda", "fp32", "baseline",
     "x" * 300, "é", "<b>", "%s", "\u202e", "😀", "1,1", ",", "library"]
) | st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"], exclude_characters="/"), max_size=6)  # fmt: skip
OPTIONS = {
    "sweep": ("--axis", "--implementation", "--mode", "--device", "--dtype", "--model", "--input", "--rounds", "--out",
              "--resume", "--timeout"),
    "report": ("--out", "--nothing"),
    "compare": ("--again", "--format"),
    "gate": ("--base", "--axis", "--budget", "--out", "--resume", "--timeout", "--format"),
    "train": ("--task", "--data", "--seeds", "--steps", "--epochs", "--batch-size", "--learning-rate", "--amp",
              "--examples", "--width-multiplier", "--clip-length", "--out", "--resume", "--device", "--weights"),
    "evaluate": ("--weights", "--task", "--data", "--seed", "--batch-size"),
    "pick": ("--latency-ms", "--memory-mb", "--task", "--format"),
    "claims": ("--size", "--jobs", "--out", "--resume", "--format"),
    "baseline save": ("--root",),
    "baseline list": ("--root", "--format"),
    "baseline show": (),
    "info": ("--clip", "--clip-length", "--input-size", "--num-classes", "--depth", "--format"),
    "list": ("--format",),
    "profile": ("--axis", "--implementation", "--mode", "--device", "--dtype", "--against", "--run", "--out"),
    "tune": ("--model", "--op", "--device", "--dtype", "--mode", "--batch-size"),
    "nothing": ("--help",),
    "": ("--version", "--help"),
}  # fmt: skip


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_whatever_is_typed_ends_with_an_exit_code_and_a_line(
    shell: Path, capfd: pytest.CaptureFixture[str], data: st.DataObject
) -> None:
    command = data.draw(st.sampled_from(sorted(OPTIONS)), label="command")
    words = command.split() + data.draw(st.lists(VALUES, max_size=3), label="arguments")
    options = st.lists(st.sampled_from(OPTIONS[command]), max_size=3) if OPTIONS[command] else st.just([])
    for option in data.draw(options, label="options"):
        words.append(option)
        if option not in ("--resume", "--help", "--version"):
            words.append(data.draw(VALUES, label=option))
    if command == "report" and "good" in words:
        words = [word.replace("good", "nowhere") for word in words]  # a report takes seconds
    if command == "profile":
        words = ["conv9d" if word == "conv3d" else word for word in words]  # and so does a profile
    ended = _ended(words)
    said = capfd.readouterr()
    assert ended in (0, 1, 2), words
    assert "Traceback" not in said.out + said.err
    if ended == 1:
        assert command == "compare", words
    if ended == 2 and "Usage" not in said.err:
        lines = [line for line in said.err.splitlines() if not line.startswith("vidbench: warning: ")]
        assert len(lines) == 1, words
        assert lines[0].startswith("vidbench: error: ")


def _ended(words: list[str]) -> int:
    """The exit code of the command line in this process."""
    before, sys.argv = sys.argv, ["vidbench", *words]
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0
