"""Another revision of this repository: its sources in a worktree, the points of its suites, its own versions."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec

import vidbench
from vidbench.suites import Axes
from vidbench.sweep import Point, RequestError


def git(*arguments: str, cwd: Path | None = None) -> str:
    """What git says.

    Raises:
        RequestError: git is not there, this is no repository, or there is no such revision.
    """
    try:
        ran = subprocess.run(("git", *arguments), capture_output=True, text=True, check=True, cwd=cwd, timeout=300)
    except FileNotFoundError:
        raise RequestError("a gate needs git, to take the base revision's sources") from None
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = str(error.stderr or error).strip().splitlines()
        raise RequestError(f"git {' '.join(arguments)}: {said[-1] if said else 'failed'}") from None
    return ran.stdout.strip()


@contextlib.contextmanager
def checkout(commit: str, out: Path) -> Iterator[Path]:
    """The sources of a commit, in a worktree that is removed in the end; what a kill has left of one is made anew."""
    place = (out / "source").resolve()
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    git("worktree", "prune")
    git("worktree", "add", "--detach", str(place), commit)
    try:
        if not (place / "kernels" / "vidkernels").is_dir() or not (place / "vidbench" / "suites.py").is_file():
            raise RequestError(
                f"revision {commit[:12]} has no kernels/vidkernels or no vidbench: nothing to compare with"
            )
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(RequestError):
            git("worktree", "prune")


_LIST_POINTS = """
import json, sys
from dataclasses import asdict
from vidbench.suites import SUITES, plan
axes = {
    name: tuple(tuple(value) if isinstance(value, list) else value for value in values)
    for name, values in json.loads(sys.argv[2]).items()
}
points = [] if sys.argv[1] not in SUITES else [
    asdict(point) for sweep in plan(sys.argv[1], axes=axes).sweeps for point in sweep.points() if point.kind != "task"
]
print(json.dumps(points))
"""


def points_of(source: Path, suite: str, axes: Axes) -> dict[str, Point]:
    """The points that a suite has in another checkout."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join((str(source), str(source / "kernels")))}
    asked = (sys.executable, "-P", "-c", _LIST_POINTS, suite, json.dumps(axes))
    ran = subprocess.run(asked, capture_output=True, text=True, check=False, env=environ, cwd=source)
    if ran.returncode:
        said = ran.stderr.strip().splitlines()
        raise RequestError(f"the base revision cannot list the points of {suite!r}: {said[-1] if said else 'no word'}")
    points = msgspec.json.decode(ran.stdout, type=list[Point])
    found = [
        replace(point, case={k: tuple(v) if isinstance(v, list) else v for k, v in point.case.items()})
        for point in points
    ]
    return {point.key: point for point in found}


def environment_of(source: Path, out: Path) -> Path | None:
    """The base's own interpreter where it is tested with other versions than head; None where they are the same."""
    theirs, ours = source / "constraints.txt", Path(git("rev-parse", "--show-toplevel")) / "constraints.txt"
    if not theirs.exists() or not ours.exists() or theirs.read_bytes() == ours.read_bytes():
        return None
    folder = out / "environment"
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if not ready.exists():
        venv.create(folder, with_pip=True, clear=True)
        install = (str(python), "-m", "pip", "install", "-q", "-c", str(theirs), str(source))
        ran = subprocess.run(install, capture_output=True, text=True, check=False)
        if ran.returncode:
            said = ran.stderr.strip().splitlines()
            raise RequestError(f"the base's versions cannot be installed: {said[-1] if said else 'no word'}")
        where = (str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
        harness = Path(subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip()) / "vidbench"
        shutil.rmtree(harness)  # head's measures both
        shutil.copytree(Path(vidbench.__file__).parent, harness)
        ready.touch()
    return python
