"""Generated run folders, most of them broken, given to the loader and to whatever comes after loading.

    python bench/fuzz.py [--inputs 1000000] [--seed 0] [--first 0] [--out runs/fuzz]

Input i is a function of the seed and of i, so that `--first` goes on where it was left and `--inputs 1 --first i` makes
one again. Only a RunError or RequestError of one line may come out: a traceback, a hang, the death of the process
or memory above a limit is an offence, and the folder that caused it is kept in `--out`. Exits 1 if there was one.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

sys.path.append(str(Path(__file__).parents[1]))  # `bench` is no installed package

from bench.fuzz_inputs import ENVIRONMENT, MEASUREMENTS, SHARES, SWEEP, Input, make, put
from vidbench.results import HEADER, LINES, Run, RunWriter, load
from vidbench.sweep import RequestError
from vidbench.worker import end_with_parent

LIMIT_S = {"line": 10.0, "header": 10.0, "place": 10.0, "after": 60.0, "report": 300.0}
MEMORY_BYTES = 4 << 30
"""Of address space, for the process that tries the inputs."""

OUTCOMES = ("loads", "loads, its torn end dropped", "refused", "RAISED", "HUNG", "DIED")
OFFENCES = OUTCOMES[3:]

# --- what may not happen ----------------------------------------------------------------------------------------------


class Offence(Exception):
    """Something other than an error of one line came out."""


def attempt(kind: str, folder: Path, good: Run) -> str:
    """Loads the run and does with it what its kind says; its outcome.

    Raises:
        Exception: Whatever should not have been raised.
    """
    try:
        run = load(folder)
        if kind in ("after", "report"):
            after(run, good)
        if kind == "report":
            reported(run, folder / "report")
    except RequestError as error:
        if not str(error).isprintable():
            raise Offence(f"the error is not one line of text: {str(error)[:300]!r}") from error
        return OUTCOMES[2]
    return OUTCOMES[1] if run.warnings else OUTCOMES[0]


def _strict(name: str) -> None:
    raise Offence(f"{name} in JSON")


def after(run: Run, good: Run) -> None:
    """The frame of a run, and its comparisons in every format."""
    from vidbench.compare import compare
    from vidbench.compare_text import FORMATS

    frame = run.frame()
    if len(frame) != len({one.point.key for one in run.measurements}):
        raise Offence("a point is not one row")
    for base, new in ((run, good), (good, run), (run, run)):
        found = compare(base, new)
        written = {name: form(found, base, new) for name, form in FORMATS.items()}
        json.loads(written["json"], parse_constant=_strict)
        ElementTree.fromstring(written["junit"])
        if "<script" in written["markdown"] or "<img" in written["markdown"]:
            raise Offence("an element in Markdown")


class _Page(HTMLParser):
    """Finds what a browser would run."""

    scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        if tag in ("img", "iframe", "object", "embed", "base"):
            raise Offence(f"<{tag}> in the page")
        for name, value in attrs:
            if name.startswith("on") or (value or "").strip().startswith("javascript:"):
                raise Offence(f"{name}={value!r} in the page")


def reported(run: Run, out: Path) -> None:
    """The report of a run, in which nothing of it may be more than text."""
    from vidbench.report import report

    page = report([run], out)
    parser = _Page()
    parser.feed(page.read_text(encoding="utf-8"))
    if parser.scripts != SCRIPTS:
        raise Offence(f"{parser.scripts} scripts in the page")
    for picture in (out / "figures").iterdir():
        ElementTree.fromstring(picture.read_text(encoding="utf-8"))
    lines = (out / "report.md").read_text(encoding="utf-8").split("\n")
    if any(mark in line for line in lines if not line.startswith("    ") for mark in ("<script", "<img", "<svg")):
        raise Offence("an element in Markdown")


SCRIPTS = 4
"""Elements of a page: its data, the table, Plotly and the explorer."""


# --- the loop ---------------------------------------------------------------------------------------------------------

KINDS = tuple(SHARES)


def _try_all(seed: int, first: int, codes: mmap.mmap, place: Path, out: Path) -> None:
    """Tries every input from `first` on that is not done yet; a process of its own, which may die."""
    end_with_parent()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    warnings.simplefilter("ignore")
    good = load(place / "good")
    header = (place / "good" / HEADER).read_bytes()
    folder, lines = place / "input", place / "lines"
    put(Input("line", {HEADER: header}), lines)
    for index in range(codes.find(b"\0"), len(codes)):
        made = make(seed, first + index, header)
        kind = KINDS.index(made.kind) * len(OUTCOMES) + 1
        codes[index] = kind + OUTCOMES.index("HUNG")  # until it is known better
        if made.kind == "line":
            where = lines  # run.json stays
            (lines / LINES).write_bytes(made.files[LINES])  # type: ignore[arg-type]
        else:
            where = folder
            put(made, folder)
        try:
            outcome = attempt(made.kind, where, good)
        except Exception:  # noqa: BLE001  any but the right one is an offence
            outcome = "RAISED"
            _keep(made, first + index, out, traceback.format_exc())
        codes[index] = kind + OUTCOMES.index(outcome)


def _keep(made: Input, index: int, out: Path, said: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    put(made, out / str(index))
    (out / f"{index}.txt").write_text(said)
    print(f"input {index} ({made.kind}): {said.strip().splitlines()[-1][:200]}; kept in {out / str(index)}", flush=True)


def run(inputs: int, seed: int, first: int, out: Path, tell: Callable[[int, float], None]) -> Counter[tuple[str, str]]:
    """Tries inputs; how many of each kind had which outcome."""
    codes = mmap.mmap(-1, inputs)  # shared with the process that tries them, which may die at any of them
    os.environ["MPLBACKEND"] = "agg"
    import vidbench.compare_text
    import vidbench.report.figures  # noqa: F401  imported once, before the first fork

    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as temporary:
        place = Path(temporary)
        known: dict[str, Any] = {"suite": "fuzz", "sweeps": (SWEEP,), "environment": ENVIRONMENT, "command": "fuzz.py"}
        with RunWriter.create(place / "good", **known) as writer:
            for number in (1, 2):
                for one in MEASUREMENTS:
                    writer.append(replace(one, round=number))
        header = (place / "good" / HEADER).read_bytes()
        started = time.monotonic()
        while (at := codes.find(b"\0")) >= 0:
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    _try_all(seed, first, codes, place, out)
                    status = 0
                except BaseException:
                    traceback.print_exc()
                    raise
                finally:
                    sys.stdout.flush()
                    os._exit(status)
            at, since = _watch(child, codes, started, tell)
            if at < 0:
                break
            made = make(seed, first + at, header)
            outcome = "HUNG" if since >= LIMIT_S[made.kind] else "DIED"
            codes[at] = KINDS.index(made.kind) * len(OUTCOMES) + 1 + OUTCOMES.index(outcome)
            _keep(made, first + at, out, f"{outcome} after {since:.0f} s")
        tell(inputs, time.monotonic() - started)
    return Counter((KINDS[(code - 1) // len(OUTCOMES)], OUTCOMES[(code - 1) % len(OUTCOMES)]) for code in codes[:])


def _watch(child: int, codes: mmap.mmap, started: float, tell: Callable[[int, float], None]) -> tuple[int, float]:
    """Waits until the child ends, or hangs and is killed; the input it was at, or -1, and for how long."""
    at, since, told = -1, time.monotonic(), time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        following = codes.find(b"\0")
        if following < 0:
            following = len(codes)
        now = time.monotonic()
        if ended:
            if status == 0:
                return -1, 0.0
            return following - 1, now - since
        if following != at:
            at, since = following, now
        if now - told > 60:
            told = now
            tell(at, now - started)
        if now - since > max(LIMIT_S.values()) or (at > 0 and now - since > LIMIT_S[_kind(codes[at - 1])]):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return max(at, 1) - 1, now - since
        time.sleep(0.05)


def _kind(code: int) -> str:
    return KINDS[(code - 1) // len(OUTCOMES)]


def table(found: Mapping[tuple[str, str], int]) -> str:
    """Kinds by outcomes."""
    rows: list[Sequence[object]] = [("inputs", *OUTCOMES)]
    rows += [(kind, *(found.get((kind, outcome), 0) for outcome in OUTCOMES)) for kind in KINDS]
    rows.append(("all", *(sum(found.get((kind, outcome), 0) for kind in KINDS) for outcome in OUTCOMES)))
    widths = [max(len(f"{row[column]:,}" if column and number else str(row[column])) for number, row in enumerate(rows))
              for column in range(len(rows[0]))]  # fmt: skip
    return "\n".join(
        "  ".join(f"{one:>{w},}" if isinstance(one, int) else f"{one:<{w}}" for one, w in zip(row, widths, strict=True))
        for row in rows
    )


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"), help="where offending inputs are kept")
    given = parser.parse_args()
    started = time.monotonic()

    def tell(done: int, seconds: float) -> None:
        print(f"{done:,} of {given.inputs:,} inputs, {done / seconds:,.0f} per second", flush=True)

    found = run(given.inputs, given.seed, given.first, given.out, tell)
    seconds = time.monotonic() - started
    print(table(found))
    bad = sum(number for (_, outcome), number in found.items() if outcome in OFFENCES)
    print(f"{given.inputs:,} inputs of seed {given.seed} in {seconds:.0f} s: {bad} offending")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
