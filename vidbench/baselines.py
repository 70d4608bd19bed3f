"""Baselines: runs of a known revision, kept for each machine, that later runs are compared with."""

from __future__ import annotations

import shutil
from pathlib import Path

from vidbench.results import HEADER, LINES, Run, folder_name, load
from vidbench.sweep import RequestError

FOLDER = Path("reports") / "baselines"


def place_of(run: Run, root: Path = FOLDER) -> Path:
    """Where baselines of a run's machine and suite lie."""
    return root / folder_name(run.environment.machine or "unknown machine", run.suite)


def save(run: Run, root: Path = FOLDER) -> Path:
    """Keeps a run as a baseline; its report stays behind.

    Raises:
        RequestError: It is kept already, or the place cannot be written.
    """
    folder = place_of(run, root) / run.id
    if folder.exists():
        raise RequestError(f"{folder} is there already: this run was saved before")
    try:
        folder.mkdir(parents=True)
        for name in (LINES, HEADER):  # the header last: a folder without one is no run
            shutil.copy2(run.folder / name, folder / name)
    except OSError as problem:
        raise RequestError(f"cannot save to {folder}: {problem.strerror}") from None
    return folder


def stored(root: Path = FOLDER) -> list[Run]:
    """Every baseline, oldest first within its machine and suite."""
    return [load(path.parent) for path in sorted(root.glob(f"*/*/*/{HEADER}"))]


def of(run: Run, root: Path = FOLDER) -> list[Run]:
    """The baselines of a run's machine and suite, oldest first, the run itself left out.

    Raises:
        RequestError: There is none.
    """
    place = place_of(run, root)
    found = sorted((load(path.parent) for path in place.glob(f"*/{HEADER}")), key=lambda one: one.created_utc)
    found = [one for one in found if one.id != run.id]
    if not found:
        raise RequestError(f"no baseline in {place}: make one by `vidbench baseline save RUN`")
    return found


def same_revision(baselines: list[Run]) -> list[Run]:
    """Of baselines those of the newest one's revision and versions: what differs between them is noise."""
    newest = baselines[-1].environment.identity
    return [one for one in baselines if one.environment.identity == newest]
