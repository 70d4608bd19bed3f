"""Another revision of this repository: its sources in a worktree, the points of its suites, its own versions."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

import vidbench
from vidbench.environment import sources
from vidbench.suites import Axes
from vidbench.sweep import Point, RequestError, implementations_of


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
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(RequestError):
            git("worktree", "prune")


def is_vidbench(checkout: Path) -> bool:
    """Whether a checkout is this repository's, or a fork's."""
    return (checkout / "kernels" / "vidkernels").is_dir() and (checkout / "vidbench" / "suites.py").is_file()


def require_installed(checkout: Path) -> None:
    """A gate measures what is installed and calls it the head: they have to be the same.

    Raises:
        RequestError: They are not.
    """
    if sources() != sources(checkout):
        raise RequestError(
            f"the vidbench that runs is not that of {checkout}: install it again (pip install -c constraints.txt .), "
            "or once with -e"
        )


def timed_points(suite: str, axes: Axes, models: Sequence[str]) -> list[Point]:
    """What a suite times, with those of the implementations asked for that a workload has; the base runs this as well.

    Raises:
        RequestError: As `plan`; a suite that is not there has no points.
    """
    from vidbench.suites import SUITES, plan
    from vidbench.workload import implementations

    if suite not in SUITES:
        return []
    wanted = axes.get("implementation", ())
    found: list[Point] = []
    for sweep in plan(suite, axes={k: v for k, v in axes.items() if k != "implementation"}, model_names=models).sweeps:
        if sweep.kind == "task":
            continue
        if wanted:
            mine = implementations_of(wanted, implementations(sweep.workload, sweep.kind))
            if not mine:
                continue
            sweep = sweep.override({"implementation": mine})
        found.extend(sweep.points())
    return found


_LIST_POINTS = """
axes = {
    name: tuple(tuple(value) if isinstance(value, list) else value for value in values)
    for name, values in json.loads(sys.argv[2]).items()
}
print(json.dumps([asdict(point) for point in timed_points(sys.argv[1], axes, json.loads(sys.argv[3]))]))
"""


def points_of(source: Path, suite: str, axes: Axes, models: Sequence[str]) -> dict[str, Point]:
    """What a suite times in another checkout of this repository.

    Raises:
        RequestError: It is none, or has no such axis or model.
    """
    if not is_vidbench(source):
        raise RequestError("the base revision has no kernels/vidkernels or no vidbench: nothing to compare with")
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join((str(source), str(source / "kernels")))}
    # The head's own functions, over the base's suites.
    lines = "from __future__ import annotations\nimport json, sys\nfrom dataclasses import asdict"
    functions = inspect.getsource(implementations_of), inspect.getsource(timed_points)
    program = "\n".join((lines, *functions, _LIST_POINTS))
    asked = (sys.executable, "-P", "-c", program, suite, json.dumps(axes), json.dumps(list(models)))
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


def environment_of(source: Path, repository: Path, out: Path) -> Path | None:
    """The base's own interpreter where it is tested with other versions than head; None where they are the same."""
    theirs, ours = source / "constraints.txt", repository / "constraints.txt"
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
