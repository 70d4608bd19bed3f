"""Profiles of real calls on a CPU: what ran, what it computes, and what is made of it."""

from __future__ import annotations

import gzip
import json
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vidbench import ncu
from vidbench.cli import app
from vidbench.profile import take
from vidbench.report import profile_page, report
from vidbench.results import RunWriter
from vidbench.results import load as load_run
from vidbench.suites import point_named
from vidbench.sweep import Point, RequestError, Sweep, Value
from vidbench.traces import PAGE, SUMMARY, TRACE, Profile, load

CASE: dict[str, Value] = {
    "in_channels": 8,
    "out_channels": 8,
    "clip_length": 4,
    "batch_size": 2,
    "height": 12,
    "width": 12,
}
CONV = Point("conv3d", "op", "library", case=CASE)
MODEL = Point(
    "frame_pool_avg", "model", "eager",
    case={"clip_length": 2, "batch_size": 1, "height": 32, "width": 32, "width_multiplier": 0.125, "num_classes": 4},
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profiles")


@pytest.fixture(scope="module")
def conv(folder: Path) -> Profile:
    return take(CONV, folder / "conv", tensorboard=folder / "board", command="vidbench profile conv3d")


@pytest.fixture(scope="module")
def model(folder: Path) -> Profile:
    return take(MODEL, folder / "model")


def test_a_convolution_is_found_with_its_shapes_and_what_it_computes(conv: Profile) -> None:
    (place,) = [one for one in conv.places if one.name == "aten::convolution"]
    assert place.calls == 1
    assert place.shapes.startswith("2x8x4x12x12, 8x8x3x3x3")
    assert place.macs == conv.macs == 2 * 4 * 12 * 12 * 8 * 8 * 27
    # Clip in, clip out, filters: whatever lies between is the library's own.
    assert place.bytes == 4 * (2 * (2 * 8 * 4 * 12 * 12) + 8 * 8 * 27)
    assert 0 < place.seconds <= conv.profiled_s
    assert place.bytes_per_s > 0
    assert any("conv3d" in row.name for row in conv.operators)


def test_an_op_is_under_the_roof_as_a_whole_whatever_runs_in_it(conv: Profile, model: Profile) -> None:
    whole = conv.places[0]
    assert (whole.name, whole.calls, whole.seconds) == ("conv3d, the whole call", 1, conv.latency_s)
    assert (whole.macs, whole.bytes) == (conv.macs, conv.bytes_moved)
    assert not any("whole call" in place.name for place in model.places)


def test_an_operator_without_a_formula_is_named() -> None:
    from vidbench.profile import _counted

    def call() -> None:
        x, w = torch.randn(2, 5, 4), [torch.randn(12, 4), torch.randn(12, 3), torch.randn(12), torch.randn(12)]
        torch.lstm(x, (torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)), w, True, 1, 0.0, False, False, True)
        torch.relu(x @ torch.randn(4, 3))

    done = _counted(call)
    assert ("aten::relu", 0) in {(name, macs) for name, macs, _ in done}
    assert any(macs for _, macs, _ in done)


def test_times_of_a_call_add_up(conv: Profile, model: Profile) -> None:
    for profile in (conv, model):
        inside = sum(row.seconds for row in profile.operators)
        assert 0 < inside <= profile.profiled_s * 1.001
        assert profile.busy_s + sum(gap.seconds for gap in profile.gaps) == pytest.approx(profile.profiled_s)
        assert all(0 <= bar.start_s <= profile.profiled_s for bar in profile.bars)


def test_every_layer_of_a_model_is_named(model: Profile) -> None:
    from vidbench import models

    made = models.create("frame_pool_avg", num_classes=4, clip_length=2, input_size=32, width_multiplier=0.125)
    leaves = {name for name, module in made.named_modules() if next(module.children(), None) is None}
    named = {row.name for row in model.layers}
    assert named <= leaves
    assert {name for name in leaves if "conv" in name} <= named


def test_memory_ends_where_it_began(conv: Profile) -> None:
    (first, *_, last) = conv.memory
    assert first[0] == 0.0
    peak = max(alive for _, alive in conv.memory)
    assert peak - first[1] >= 2 * 8 * 4 * 12 * 12 * 4  # the output
    assert last[1] == first[1]


def test_what_is_written_is_read_again_and_the_trace_is_chromes(folder: Path, conv: Profile) -> None:
    assert load(folder / "conv") == conv
    with gzip.open(folder / "conv" / TRACE) as file:
        events = json.load(file)["traceEvents"]
    assert any(event.get("name") == "aten::conv3d" for event in events)
    (copy,) = (folder / "board").iterdir()
    assert copy.name.endswith(".pt.trace.json.gz")
    assert copy.read_bytes() == (folder / "conv" / TRACE).read_bytes()


def test_the_page_stands_alone_and_its_pictures_are_well_formed(conv: Profile, model: Profile) -> None:
    page = profile_page.render(model, conv)
    for part in page.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + part.partition("</svg>")[0].replace("&nbsp;", " ") + "</svg>")
    assert page.count("<svg") >= 2
    assert "src=" not in page
    assert "<link" not in page
    assert "Against conv3d/library" in page
    assert profile_page.timeline(model).count("<rect") == len([b for b in model.bars if b.depth <= 9])


def test_hostile_names_stay_text(conv: Profile) -> None:
    from vidbench.traces import Bar, Row

    evil = "<script>alert(1)</script>"
    page = profile_page.render(
        replace(conv, operators=[Row(evil, 1, 1.0, evil)], bars=[Bar(evil, evil, 0, 0.0, 1.0, evil)], command=evil)
    )
    assert evil not in page


def test_two_implementations_are_told_apart_by_what_they_run(folder: Path, conv: Profile) -> None:
    reference = take(replace(CONV, implementation="reference"), folder / "reference")
    compared = dict(profile_page.compared(conv, reference))
    assert compared.keys() <= {"operators", "kernels of oneDNN, within the operators"}
    found = {one.name: (one.base is None, one.new is None) for one in compared["operators"]}
    assert (False, True) in found.values() or (True, False) in found.values()
    text = profile_page.against_text(conv, reference)
    assert "× as " in text.splitlines()[2]
    assert "operators" in text.splitlines()
    assert "<h3>Operators</h3>" in profile_page.render(reference, conv)


def test_the_command_profiles_an_op_against_another_implementation(tmp_path: Path) -> None:
    sizes = ["in_channels=4", "out_channels=4", "clip_length=2", "input_size=8", "batch_size=1"]
    axes = [word for size in sizes for word in ("--axis", size)]
    out = tmp_path / "page"
    done = CliRunner().invoke(app, ["profile", "conv3d", *axes, "--against", "reference", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("conv3d/library/")
    assert {path.name for path in out.iterdir()} == {PAGE, SUMMARY, TRACE, "against"}
    assert "Against conv3d/reference" in (out / PAGE).read_text()


def test_a_profile_that_is_kept_with_a_run_is_linked_from_its_report(tmp_path: Path) -> None:
    from vidbench.environment import describe
    from vidbench.records import Measurement

    sweep = Sweep("conv3d", fixed={**CASE, "implementation": "library"})
    with RunWriter.create(
        tmp_path / "run", suite="conv3d", sweeps=[sweep], environment=describe("cpu", ()), command=""
    ) as writer:
        writer.append(Measurement(CONV, 1, "ok", samples_s=(1e-3,) * 6))
    done = CliRunner().invoke(app, ["profile", CONV.key, "--run", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    page = report([load_run(tmp_path / "run")], tmp_path / "run" / "report")
    data = page.read_text().partition('id="data">')[2].partition("</script>")[0]
    (link,) = json.loads(data)["profiles"].values()
    assert (page.parent / link).is_file()


@pytest.mark.parametrize(
    ("text", "axes", "said"),
    [
        ("conv9d", {}, "unknown model 'conv9d'"),
        ("conv3d/library", {}, "is no point's key"),
        ("conv3d/library/forward/hot/cpu/fp32/contiguous/clip_length", {}, "is not name=value"),
        ("conv3d/library/sideways/hot/cpu/fp32/contiguous/", {}, "sideways"),
        ("decode", {}, "give its whole key"),
        ("conv3d", {"clip_length": (8, 16)}, "one point has one value"),
    ],
)  # fmt: skip
def test_a_point_that_is_none_is_refused_in_one_line(text: str, axes: dict[str, tuple[Value, ...]], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        point_named(text, axes)


@pytest.mark.parametrize(
    "point", [CONV, MODEL, Point("decode", "stage", "pyav", case={"video": "a.mp4", "clip_length": 4})]
)
def test_a_key_is_read_back(point: Point) -> None:
    assert point_named(point.key, {}) == point


def test_what_cannot_run_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be profiled: tf32 needs a CUDA device"):
        take(replace(CONV, dtype="tf32"), tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(RequestError, match="torch sees no CUDA device"):
            take(replace(CONV, device="cuda"), tmp_path)


def refused(*words: str) -> str:
    done = CliRunner().invoke(app, ["profile", *words])
    assert isinstance(done.exception, RequestError), done.output
    assert "\n" not in str(done.exception)
    return str(done.exception)


VIDEO = "c3d/eager/forward/hot/cpu/fp32/contiguous/batch_size=1,clip_length=8,height=32,width=32,video=a.mp4"


def test_a_point_of_a_video_is_not_profiled_on_noise(tmp_path: Path) -> None:
    assert refused(VIDEO, "--out", str(tmp_path)).endswith("takes its clips from a.mp4: add --input FILE")
    assert "no such" in refused(VIDEO, "--input", str(tmp_path / "b.mp4")).lower()
    assert "conv3d takes none" in refused("conv3d", "--input", str(tmp_path / "b.mp4"))


def test_a_video_becomes_a_part_of_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vidbench.cli_inspect import _fed

    monkeypatch.setattr("vidbench.data.video.probe", lambda path: None)
    assert _fed(point_named(VIDEO, {}), tmp_path / "b.mp4").case["video"] == "b.mp4"
    assert _fed(MODEL, tmp_path / "b.mp4").key == replace(MODEL, case={**MODEL.case, "video": "b.mp4"}).key
    assert _fed(MODEL, None) is MODEL


def test_what_a_point_is_held_against(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vidbench.cli_inspect import _other

    axes: dict[str, tuple[Value, ...]] = {"implementation": ("library",), "dtype": ("bf16",), "clip_length": (4,)}
    assert _other("reference", CONV, axes) == replace(CONV, implementation="reference")
    assert _other(MODEL.key, CONV, axes) == MODEL  # a key keeps all that it says
    other = _other("tcn", CONV, axes)
    assert isinstance(other, Point)
    assert (other.implementation, other.dtype, other.case["clip_length"]) == ("eager", "bf16", 4)
    lstm = _other("lstm", CONV, {"implementation": ("reference",)})
    assert isinstance(lstm, Point)
    assert lstm.implementation == "reference"
    assert _other(str(tmp_path), CONV, axes) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reference").mkdir()  # the implementation, as there is no profile in it
    assert isinstance(_other("reference", CONV, axes), Point)


def test_what_cannot_be_held_against_is_refused(tmp_path: Path) -> None:
    same = [CONV.key, "--implementation", "reference", "--against", CONV.key]
    assert refused(CONV.key, "--against", CONV.key).endswith(f"names the same point: {CONV.key}")
    assert refused(*same, "--out", "/dev/null/x").startswith("cannot write the profile to /dev/null/x/against")
    assert "holds no profile.json: give the --out" in refused(CONV.key, "--against", str(tmp_path))


def test_a_run_without_the_point_is_refused(tmp_path: Path) -> None:
    from vidbench.environment import describe
    from vidbench.records import Measurement

    sweep = Sweep("conv3d", fixed={**CASE, "implementation": "library"})
    with RunWriter.create(
        tmp_path / "run", suite="conv3d", sweeps=[sweep], environment=describe("cpu", ()), command=""
    ) as writer:
        writer.append(Measurement(CONV, 1, "ok", samples_s=(1e-3,) * 6))
    assert f"has no point {MODEL.key}: take a key of its report" in refused(MODEL.key, "--run", str(tmp_path / "run"))


@pytest.mark.parametrize("which", ["out", "tensorboard"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path: Path, which: str) -> None:
    (tmp_path / "file").touch()
    steps: list[str] = []
    folders = {"out": tmp_path / "good", "tensorboard": tmp_path / "board", which: tmp_path / "file" / "below"}
    with pytest.raises(RequestError, match=rf"cannot write the profile to .*below: {tmp_path}/file is not a folder"):
        take(CONV, folders["out"], tensorboard=folders["tensorboard"], tell=steps.append)
    assert not steps
    assert not (tmp_path / "good").exists()


NCU = """==PROF== Connected to process 77
==PROF== Profiling "conv3d_kernel": 0%....100% - 8 passes
"ID","Process ID","Kernel Name","sm__throughput.avg.pct_of_peak_sustained_elapsed","launch__shared_mem_per_block"
"","","","%","Kbyte/block"
"0","77","conv3d_kernel","61.25","96.26"
"1","77","void relu<float>(float*, int)","8.5","0"
"""


def test_counters_are_read_from_among_ncus_messages() -> None:
    assert ncu.parse(NCU) == [
        {"kernel": "conv3d_kernel", "SM, % of peak": "61.25", "shared memory": "96.26 Kbyte/block"},
        {"kernel": "void relu<float>(float*, int)", "SM, % of peak": "8.5", "shared memory": "0 Kbyte/block"},
    ]
    assert ncu.parse("==ERROR== no permission\n") == []


def test_a_line_that_ncu_has_cut_short_is_passed_over() -> None:
    assert len(ncu.parse(NCU + '"2","77"\n')) == 2
    assert ncu.parse('"ID"\n"0"\n') == []


def fake_ncu(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "ncu"
    program.write_text(f'#!/bin/sh\necho "$@" > {folder}/arguments\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setattr(ncu.shutil, "which", lambda _: str(program))


def test_ncu_leaves_the_caches_as_they_are_unless_the_regime_is_cold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "table").write_text(NCU)
    fake_ncu(tmp_path, f"cat {tmp_path}/table", monkeypatch)
    rows, about = ncu.counters(CONV)
    assert (len(rows), about) == (2, "")
    assert "--cache-control none" in (tmp_path / "arguments").read_text()
    ncu.counters(replace(CONV, regime="cold"))
    assert "--cache-control all" in (tmp_path / "arguments").read_text()
    monkeypatch.setattr(ncu, "MOST_KERNELS", 1)
    assert ncu.counters(CONV) == (rows[:1], "of the first 1 kernels alone")


def test_why_ncu_has_no_counters_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ncu(tmp_path, 'echo "==ERROR== no permission"; echo "Traceback" >&2; echo "ValueError: x" >&2', monkeypatch)
    assert ncu.counters(CONV) == ([], "no permission; ValueError: x")
    fake_ncu(tmp_path, "true", monkeypatch)
    assert ncu.counters(CONV) == ([], "ncu told of no kernel")


def test_ncu_that_hangs_is_ended_with_what_it_has_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ncu(tmp_path, f"sleep 60 & echo $! > {tmp_path}/child; wait", monkeypatch)
    monkeypatch.setattr(ncu, "TIMEOUT_S", 0.5)
    assert ncu.counters(CONV) == ([], "ncu took longer than 0.5 s")
    child = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    deadline = time.monotonic() + 10
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] not in "ZX":
        assert time.monotonic() < deadline
        time.sleep(0.01)
