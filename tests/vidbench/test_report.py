"""The report: what a reader finds in its files, whatever the run holds."""

from __future__ import annotations

import csv
import json
import math
import random
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from vidbench.metrics import frame as frame_of
from vidbench.records import Accuracy, Ceilings, Counts, Environment, Error, Measurement, Memory
from vidbench.report import report, style
from vidbench.report.figures import FIGURES, roofline, speed_up, speed_up_map
from vidbench.report.html import script_safe
from vidbench.report.markdown import cell
from vidbench.report.tables import digits, standing, verdicts
from vidbench.results import Run
from vidbench.sweep import Point, RequestError, Sweep, Value

ENVIRONMENT = Environment(
    "xeon-2", cpu="Intel Xeon @ 2.20 GHz", cores=2, threads=2, memory_bytes=8 * 2**30, torch="2.11.0", python="3.12.3",
    platform="Linux", git_commit="0123456789abcdef", git_dirty=True, flags={"allow_tf32": "false"},
    flops_per_s={"cpu/fp32": 9e10}, bytes_per_s={"cpu/1048576": 4e10, "cpu/268435456": 1.1e10},
)  # fmt: skip

Case = dict[str, Value]


def measured(point: Point, latency: float, rounds: int = 3, **fields: Any) -> Iterator[Measurement]:
    noise = random.Random(point.key)
    for number in range(rounds):
        base = latency * noise.lognormvariate(0, 0.03)
        samples = tuple(base * (1 + abs(noise.gauss(0, 0.02))) for _ in range(12))
        yield Measurement(point, number, "ok", samples_s=samples, ceilings=Ceilings(9e10, 1.1e10), **fields)


def ops() -> Iterator[Measurement]:
    speed = {"reference": 0.6, "library": 4.0, "compiled": 5.2}
    for clip in (8, 16, 32):
        for batch in (1, 4):
            case: Case = {"clip_length": clip, "batch_size": batch, "height": 28, "width": 28, "in_channels": 64}
            macs = clip * batch * 28 * 28 * 64 * 64
            for workload, taps in (("conv3d", 27), ("conv2plus1d", 12), ("depthwise_conv3d", 1)):
                for name, rate in speed.items():
                    point = Point(workload, "op", name, case=case)
                    if name == "reference" and clip == 32 and workload == "conv3d":
                        yield Measurement(point, 0, "timeout", "no result within 60 s")
                        continue
                    if name == "compiled" and workload == "depthwise_conv3d":
                        yield Measurement(point, 0, "skipped", "compiled: needs a C++ compiler; none found")
                        continue
                    yield from measured(
                        point, macs * taps / (rate * 1e9) + 2e-4,
                        memory=Memory(10**6, macs // 40 + 10**6), counts=Counts(macs * taps, {"closed_form": macs}),
                        params=64 * 64 * taps, bytes_moved=clip * batch * 28 * 28 * 64 * 4 * 2, error=Error(3e-7, 2e-6),
                        trust="poor" if batch == 4 and name == "library" and clip == 16 else "good",
                        trust_reasons=("another process on the device",) if batch == 4 and clip == 16 else (),
                    )  # fmt: skip


def sequences() -> Iterator[Measurement]:
    for clip in (8, 32, 128, 512, 1024):
        for batch in (1, 16):
            for workload, step in (("rnn", 2e-5), ("lstm", 6e-5), ("tcn_block", 1.5e-5)):
                for name, factor in (("reference", 3.0), ("library", 1.0), ("compiled", 0.8)):
                    case: Case = {"clip_length": clip, "batch_size": batch, "input_features": 256, "hidden_size": 256}
                    if workload == "tcn_block":
                        case |= {"kernel_size": 3, "dilation": 2}
                    point = Point(workload, "op", name, case=case)
                    if workload == "lstm" and name == "compiled" and clip == 1024:
                        yield Measurement(
                            point, 0, "failed", "error 3.1e-3 exceeds the gate 2e-6", error=Error(3.1e-3, 2e-6)
                        )
                        continue
                    macs = clip * batch * 256 * 256 * (8 if workload == "lstm" else 2)
                    latency = step * factor * (clip**0.6 if workload == "tcn_block" else clip) * batch**0.4
                    yield from measured(
                        point, latency, memory=Memory(10**6, clip * batch * 4096 + 10**6), counts=Counts(macs),
                        params=10**5, bytes_moved=clip * batch * 2048, error=Error(1e-7, 2e-6),
                    )  # fmt: skip


MODELS = {"cnn_tcn": 0.9, "cnn_lstm": 1.0, "cnn_rnn": 0.95, "c3d": 3.2, "r3d_18": 4.1, "r2plus1d_18": 4.9, "x3d_s": 0.7}


def models() -> Iterator[Measurement]:
    for number, (name, cost) in enumerate(MODELS.items()):
        for clip in (8, 16, 32):
            for batch in (1, 4):
                for implementation, factor in (("eager", 1.0), ("compiled", 0.78)):
                    case: Case = {
                        "clip_length": clip,
                        "batch_size": batch,
                        "height": 112,
                        "width": 112,
                        "num_classes": 4,
                    }
                    point = Point(name, "model", implementation, case=case)
                    if clip == 32 and batch == 4 and cost > 4:
                        yield Measurement(point, 0, "oom", "out of memory: 3.1 GiB wanted, 2.2 GiB free")
                        continue
                    macs = int(cost * 1e9 * clip * batch / 2)
                    yield from measured(
                        point, cost * 4e-3 * clip * batch * factor, rounds=2,
                        memory=Memory(10**8, int(3e7 * cost * clip * batch)), counts=Counts(macs),
                        params=int(cost * 8e6),
                    )  # fmt: skip
        for seed in range(3):
            case = {"clip_length": 16, "height": 112, "width": 112, "num_classes": 4, "seed": seed}
            top1 = 0.45 + 0.06 * number + 0.02 * seed
            yield Measurement(
                Point(name, "task", "eager", "evaluate", case=case), 0, "ok",
                accuracy=Accuracy("frame_order", seed, top1, 0.25, 512, 31.0, {"shuffled": 0.26, "reversed": 0.31}),
            )  # fmt: skip


def stages() -> Iterator[Measurement]:
    for workload, name, latency in (
        ("decode", "pyav", 0.021), ("decode", "torch", 0.035), ("resize_normalise", "torch", 0.004),
        ("optical_flow", "opencv_dis", 0.16),
    ):  # fmt: skip
        point = Point(workload, "stage", name, case={"clip_length": 16, "height": 112, "width": 112, "batch_size": 1})
        yield from measured(point, latency)


def made(measurements: Iterable[Measurement], identifier: str = "20260101T000000Z-demo-0a1b", **fields: Any) -> Run:
    sweep = Sweep("conv3d", axes={"clip_length": (8, 16, 32)})
    known = {"suite": "demo", "command": "vidbench sweep demo --rounds 3", "input": None, "warnings": ()}
    return Run(
        schema_version=1, id=identifier, created_utc="2026-01-01T00:00:00Z", sweeps=(sweep,), environment=ENVIRONMENT,
        measurements=list(measurements), folder=Path("demo"), **{**known, **fields},
    )  # fmt: skip


def everything() -> list[Measurement]:
    return [*ops(), *sequences(), *models(), *stages()]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    assert report([made(everything())], folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return made(everything()).frame()


def embedded(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def column(data: dict[str, Any], name: str) -> list[Any]:
    (found,) = (c for c in data["columns"] if c["name"] == name)
    if "values" in found:
        return list(found["values"])
    if "codes" in found:
        return [None if code < 0 else found["texts"][code] for code in found["codes"]]
    return list(found["texts"])


def test_a_report_is_a_page_a_text_two_tables_and_pictures(written: Path) -> None:
    names = sorted(str(path.relative_to(written)) for path in written.rglob("*") if path.is_file())
    pictures = sorted(f"figures/{entry.name}.svg" for entry in FIGURES)
    assert names == [*pictures, "measurements.csv", "measurements.parquet", "report.html", "report.md"]
    for picture in pictures:
        root = ElementTree.fromstring((written / picture).read_text())
        assert root.tag.endswith("svg")


def markup(path: Path) -> str:
    """The page without what its scripts say: Plotly's names addresses, which the browser shows it not to ask for."""
    return re.sub(r"(<script[^>]*>).*?</script>", r"\1</script>", path.read_text(), flags=re.DOTALL)


def test_the_page_needs_nothing_from_elsewhere(written: Path) -> None:
    page = markup(written / "report.html")
    assert not re.search(r"""(?:src|href|action|data)\s*=\s*["']?\s*(?:https?:)?//""", page, re.IGNORECASE)
    assert not re.search(r"""(?:@import|url\(\s*["']?(?!#))""", page)
    assert "<link" not in page
    assert "prefers-color-scheme: dark" in page


def test_identifiers_in_the_page_are_unique_and_references_are_met(written: Path) -> None:
    page = markup(written / "report.html")
    identifiers = re.findall(r'\sid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)) <= {(i, "") for i in identifiers} | {
        ("", i) for i in identifiers
    }


def test_every_point_is_in_the_page_whether_it_ran_or_not(written: Path, frame: pd.DataFrame) -> None:
    data = embedded((written / "report.html").read_text())
    assert data["rows"] == len(frame)
    assert column(data, "point") == frame["point"].tolist()
    assert column(data, "status") == frame["status"].tolist()
    first = int((frame["status"] == "ok").to_numpy().argmax())
    assert column(data, "latency_s")[first] == float(f"{frame['latency_s'].iloc[first] * 1e3:.4g}")
    bad = int((frame["status"] == "oom").to_numpy().argmax())
    assert column(data, "reason")[bad] == "out of memory: 3.1 GiB wanted, 2.2 GiB free"
    assert column(data, "latency_s")[bad] is None


def test_what_did_not_run_is_listed_with_its_reason(written: Path) -> None:
    for name in ("report.html", "report.md"):
        text = (written / name).read_text()
        assert "no result within 60 s" in text
        assert "error 3.1e-3 exceeds the gate 2e-6" in text
    page = (written / "report.html").read_text()
    gone = page[page.index('<section id="gone">') :]
    assert gone.index("failed") < gone.index("oom") < gone.index("timeout") < gone.index("skipped")


def test_the_first_screen_says_what_where_and_how_sure(written: Path) -> None:
    head = (written / "report.html").read_text().split("<main>")[0]
    for text in ("Intel Xeon @ 2.20 GHz", "2 cores", "torch 2.11.0", "commit 0123456789+", "Fastest of 7 models",
                 "Leanest there: x3d_s", "Most accurate: x3d_s on frame_order, 83.0 % top-1 (3 seeds, guessing 25.0 %)",
                 "239 of 253 points ran", "2 failed", "4 oom", "2 timeout", "6 skipped", "3 poor"):  # fmt: skip
        assert text in head, text


def test_tables_are_in_si_units_and_complete(written: Path, frame: pd.DataFrame) -> None:
    parquet = pd.read_parquet(written / "measurements.parquet")
    assert list(parquet.columns) == list(frame.columns)
    assert parquet["latency_s"].tolist() == frame["latency_s"].tolist()
    assert parquet["macs"].dtype == "Int64"
    with (written / "measurements.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["point"] for row in rows] == frame["point"].tolist()
    bad = next(row for row in rows if row["status"] == "oom")
    assert bad["latency_s"] == ""
    good = next(row for row in rows if row["status"] == "ok" and row["latency_s"])
    assert float(good["latency_s"]) == frame.loc[frame["point"] == good["point"], "latency_s"].iloc[0]


def test_markdown_is_short_and_says_what_it_leaves_out(written: Path) -> None:
    text = (written / "report.md").read_text()
    assert len(text.splitlines()) < 90
    assert re.search(r"^\d+ slower points are left out; measurements.csv has every one\.$", text, re.MULTILINE)
    assert "- [Roofline](figures/roofline.svg)" in text
    assert "vidbench sweep demo --rounds 3" in text
    tables = [line for line in text.splitlines() if line.startswith("| tcn")]
    assert len({line.replace("\\|", "").count("|") for line in tables}) == 1


HOSTILE = "<script>alert('x')</script>&\"|`\u2028"


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    point = Point(HOSTILE, "op", "</script><b>", case={"clip_length": 8, "mode_of_x": HOSTILE})
    run = made(
        [*measured(point, 1.0), Measurement(Point(HOSTILE, "op", "x"), 0, "failed", HOSTILE)],
        command=HOSTILE, suite=HOSTILE, warnings=(HOSTILE,), input=HOSTILE,
    )  # fmt: skip
    page = report([run], tmp_path).read_text()
    assert "<script>alert" not in page
    assert "</script><b>" not in page
    assert column(embedded(page), "workload") == [HOSTILE, HOSTILE]
    # The data, the table, Plotly and the explorer; Plotly's text has the word too.
    page = markup(tmp_path / "report.html")
    assert page.count("</script>") == page.count("<script") == 4
    text = (tmp_path / "report.md").read_text().split("\n")
    assert not [line for line in text if "<script" in line and not line.startswith("    ")]
    for picture in (tmp_path / "figures").iterdir():
        ElementTree.fromstring(picture.read_text())


def test_a_figure_that_is_finite_in_seconds_alone_is_infinite_on_the_page(tmp_path: Path) -> None:
    point = Point("conv3d", "op", "library", case={"clip_length": 8})
    page = report([made([Measurement(point, 0, "ok", samples_s=(1.7e308,) * 6)])], tmp_path).read_text()
    assert column(embedded(page), "latency_s") == ["inf"]


def test_json_in_a_script_cannot_end_it() -> None:
    assert script_safe(["</script>", "<!--", "\u2028"]) == '["\\u003c/script\\u003e","\\u003c!--","\\u2028"]'


def test_markdown_cells_stay_cells() -> None:
    assert cell("a|b\n<i>*c*") == "a\\|b &lt;i&gt;\\*c\\*"


@pytest.mark.parametrize("entry", FIGURES, ids=lambda entry: entry.name)
def test_a_figure_without_its_data_is_none(entry: Any) -> None:
    assert entry.draw(frame_of([], run_id="r", suite="s")) is None
    gone = [Measurement(Point("conv3d", "op", "library", case={"clip_length": n}), 0, "oom", "full") for n in (8, 16)]
    assert entry.draw(frame_of(gone, run_id="r", suite="s")) is None


def test_a_run_in_which_nothing_ran_is_reported(tmp_path: Path) -> None:
    page = report(
        [made([Measurement(Point("c3d", "model", "eager"), 0, "crashed", "signal 11")])], tmp_path
    ).read_text()
    assert "No point ran" in page
    assert "signal 11" in page
    assert f"{len(FIGURES)} figures this run has no data for" in page
    assert "would need two clip lengths of one case" in page
    assert report([made([])], tmp_path).exists()


def test_an_earlier_report_leaves_no_figures_behind(tmp_path: Path) -> None:
    report([made(stages())], tmp_path)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["pipeline.svg"]
    report([made([])], tmp_path)
    assert list((tmp_path / "figures").iterdir()) == []


def test_several_runs_are_told_apart(tmp_path: Path) -> None:
    page = report([made(stages(), "first"), made(stages(), "second")], tmp_path).read_text()
    data = embedded(page)
    assert column(data, "run_id") == ["first"] * 4 + ["second"] * 4
    svg = (tmp_path / "figures" / "pipeline.svg").read_text()
    assert "run_id=first" in svg or "first" in svg
    assert "<h3>second</h3>" in page


def test_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no run to report"):
        report([], tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="cannot write the report"):
        report([made([])], tmp_path / "file")


def test_drawing_leaves_nothing_behind(frame: pd.DataFrame) -> None:
    import matplotlib
    from matplotlib import pyplot

    before = dict(matplotlib.rcParams)
    assert speed_up_map(frame) is not None
    assert dict(matplotlib.rcParams) == before
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize("factor", [1.0, 5.0, 100.0])
def test_the_speed_up_map_is_drawn_whatever_its_reach(frame: pd.DataFrame, factor: float) -> None:
    slower = frame.assign(latency_s=frame["latency_s"].where(frame["implementation"] != "compiled", factor))
    figure = speed_up_map(slower)
    assert figure is not None
    assert style.svg(figure).startswith("<svg")


def test_an_implementation_keeps_its_colour() -> None:
    few, many = style.palette(["compiled", "cuda_x"]), style.palette(["compiled", "cuda_x", "library", "triton_a"])
    assert few["compiled"] == many["compiled"]
    assert few["cuda_x"] == many["cuda_x"]
    assert len(set(many.values())) == 4


def test_the_roofline_shows_the_measured_ceilings(frame: pd.DataFrame) -> None:
    figure = roofline(frame, environments={str(frame["run_id"].iloc[0]): ENVIRONMENT})
    assert figure is not None
    labels = [text.get_text() for legend in (ax.get_legend() for ax in figure.axes) if legend for text in legend.texts]
    assert "ceiling, copy of 256 MiB" in labels
    assert "ceiling, copy of 1 MiB" in labels


def test_speed_up_is_over_the_library_in_the_same_case() -> None:
    def at(name: str, latency: float, clip: int) -> Iterator[Measurement]:
        for number in range(6):
            yield Measurement(
                Point("conv3d", "op", name, case={"clip_length": clip}), number, "ok", samples_s=(latency,)
            )

    rows = [*at("library", 4.0, 8), *at("compiled", 2.0, 8), *at("reference", 8.0, 8), *at("compiled", 1.0, 16)]
    found = speed_up(frame_of(rows, run_id="r", suite="s")).set_index("implementation")
    assert found["speed_up"].to_dict() == {"compiled": 2.0, "reference": 0.5}
    assert not found["overlap"].any()


def test_facets_are_capped_and_every_workload_has_one(frame: pd.DataFrame) -> None:
    parts, left_out = style.facets(frame, ("workload", "clip_length", "batch_size"))
    assert len(parts) == style.MAX_FACETS
    assert len({part["workload"].iloc[0] for _, part in parts}) == style.MAX_FACETS
    assert re.fullmatch(r"\d+ of \d+ panels are left out", left_out)


def test_exponents_are_in_the_legend(written: Path) -> None:
    assert re.search(
        r"library  ∝ T[⁰¹·²³⁴⁵⁶⁷⁸⁹]+ ± 0\.0\d", (written / "figures/latency_over_clip_length.svg").read_text()
    )


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.0, "0"),
        (1234.5, "1,234"),
        (123.4, "123"),
        (12.345, "12.3"),
        (0.012345, "0.0123"),
        (1e-7, "1.00e-07"),
        (math.inf, "∞"),
    ],
)
def test_numbers_are_short(number: float, text: str) -> None:
    assert digits(number) == text


def test_the_answer_of_kernels_counts_the_cases_won() -> None:
    said = verdicts(frame_of(list(ops()), run_id="r", suite="s"))
    assert re.match(r"Fastest: conv3d compiled \(6 of 6 cases, 1\.[23]\d× over library in the mean\); ", said[0])
    assert said[0].endswith("depthwise_conv3d library (6 of 6 cases).")


def test_standing_of_one_round_owns_up() -> None:
    text = standing(frame_of(list(measured(Point("c3d", "model", "eager"), 1.0, rounds=1)), run_id="r", suite="s"))
    assert "1 of 1 points ran. Trust: 1 fair." in text
    assert "one round cannot know its own noise" in text


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium on the PATH")
def test_a_browser_shows_the_table(written: Path) -> None:
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--dump-dom",
        (written / "report.html").as_uri(),
    ]
    page = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    table = page[page.index('<table id="table">') : page.index("</table>", page.index('<table id="table">'))]
    assert table.count("<tr") == 26
    assert "253 points" in page
    assert "1 of 11" in page


if __name__ == "__main__":  # pragma: no cover - writes a sample report to look at
    print(report([made(everything())], sys.argv[1]))
