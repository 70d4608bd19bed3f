"""Runs as a page, a short text, tables and pictures. Needs neither torch nor a network: it opens on any laptop."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vidbench.sweep import RequestError

if TYPE_CHECKING:
    from vidbench.results import Run

__all__ = ["profile_folder", "report"]


def report(runs: Sequence[Run], out: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Writes report.html, report.md, measurements.csv, measurements.parquet and figures/*.svg into `out`.

    Several runs are joined, with `run_id` as a column. Figures of an earlier report in `out` are replaced.

    Returns:
        The path of report.html.

    Raises:
        RequestError: No run, or `out` cannot be written.
    """
    if not runs:
        raise RequestError("no run to report: name at least one run folder")
    import pandas as pd
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    from vidbench.report import html, markdown, style
    from vidbench.report.figures import FIGURES

    frame = pd.concat([run.frame() for run in runs], ignore_index=True) if len(runs) > 1 else runs[0].frame()
    suites = list(dict.fromkeys(run.suite for run in runs))
    title = title or f"Video classification benchmark: {', '.join(suites)}"
    folder = Path(out)
    pictures = folder / "figures"
    colours = style.palette(frame["implementation"].unique())
    environments = {run.id: run.environment for run in runs}
    drawn: list[tuple[str, str, str]] = []
    absent: list[tuple[str, str]] = []
    for entry in FIGURES:
        extra = {"environments": environments} if entry.takes_environments else {}
        figure = entry.draw(frame, colours, **extra)
        if figure is None:
            absent.append((entry.title, entry.needs))
        else:
            drawn.append((entry.name, entry.title, style.svg(figure)))
    page = folder / "report.html"
    try:
        pictures.mkdir(parents=True, exist_ok=True)
        for entry in FIGURES:
            (pictures / f"{entry.name}.svg").unlink(missing_ok=True)
        for name, _, svg in drawn:
            (pictures / f"{name}.svg").write_text(svg, encoding="utf-8")
        table = pyarrow.Table.from_pandas(frame, preserve_index=False)
        pyarrow.csv.write_csv(table, folder / "measurements.csv", pyarrow.csv.WriteOptions(quoting_style="needed"))
        pyarrow.parquet.write_table(table, folder / "measurements.parquet")
        links = [(name, heading) for name, heading, _ in drawn]
        (folder / "report.md").write_text(markdown.render(runs, frame, title, links), encoding="utf-8")
        page.write_text(html.render(runs, frame, title, drawn, absent, _profiles(runs, folder)), encoding="utf-8")
    except OSError as problem:
        raise RequestError(f"cannot write the report to {folder}: {problem.strerror}") from None
    return page


PROFILES = "profiles"


def profile_folder(run: Run, key: str) -> Path:
    """Where the profile of a point is kept with a run, for `report` to find it."""
    return run.folder / PROFILES / hashlib.sha256(key.encode()).hexdigest()[:12]


def _profiles(runs: Sequence[Run], folder: Path) -> dict[str, str]:
    """By point, the page of its profile, from the report's folder."""
    from vidbench.traces import PAGE, load

    found = {}
    for run in runs:
        for page in sorted((run.folder / PROFILES).glob(f"*/{PAGE}")):
            with contextlib.suppress(RequestError):  # of another version, or not finished
                found[load(page.parent).point] = Path(os.path.relpath(page, folder)).as_posix()
    return found
