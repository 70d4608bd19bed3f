"""The command that puts the field's claims to the test."""

from __future__ import annotations

import datetime
import json
import math
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vidbench.cli_training import As, Device, Output
from vidbench.progress import Bar
from vidbench.sweep import RequestError, text_of, unknown

if TYPE_CHECKING:
    from vidbench.claims import Finding, Judged
    from vidbench.claims.investigate import Step


class SizeName(StrEnum):
    """How much is done."""

    small = "small"
    full = "full"


def claims(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[CLAIM]…", help="Only these: `vidbench list claims`.")
    ] = None,
    size: Annotated[
        SizeName, typer.Option(help="small: three seeds, 90 minutes on two cores; full: five seeds, longer, for a GPU.")
    ] = SizeName.small,
    device: Device = "cpu",
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Experiments side by side; default: the cores, at most 8.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the outcomes; default: runs/<utc>-claims.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Do only what the folder given by --out lacks.")] = False,
    output: As = Output.text,
) -> None:
    """Put what the textbooks say to the test: supported, refuted or undecided, with effects and intervals."""
    from vidbench.claims import judge, page
    from vidbench.claims.investigate import investigate
    from vidbench.claims.textbook import claims as all_claims

    if resume and out is None:
        raise RequestError("--resume needs --out DIR: the folder to go on with")
    known = {claim.name: claim for claim in all_claims(size.value, device)}
    for name in names or ():
        if name not in known:
            raise unknown("claim", name, known)
    chosen = [known[name] for name in dict.fromkeys(names or known)]
    folder = out or Path("runs") / f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}-claims"
    command = shlex.join(["vidbench", *sys.argv[1:]])
    bar = Bar(sys.stderr)
    try:
        header, findings, outcomes = investigate(
            chosen, folder, size=size.value, device=device, resume=resume, jobs=jobs,
            command=command, progress=lambda step: _tell(bar, step),
        )  # fmt: skip
    except KeyboardInterrupt:
        typer.echo(f"vidbench: interrupted; what was found is kept: add --resume --out {folder} to go on", err=True)
        raise typer.Exit(130) from None
    finally:
        bar.close()
    done = {outcome.experiment.key for outcome in outcomes}
    others = [c for c in known.values() if c not in chosen and any(one.key in done for one in c.experiments)]
    shown = {finding.claim.name: finding for finding in (*findings, *(judge(claim, outcomes) for claim in others))}
    written = page.write(header, [shown[name] for name in known if name in shown], outcomes, folder)
    if output is Output.json:
        typer.echo(json.dumps([_as_json(finding) for finding in findings], indent=2))
        return
    for finding in findings:
        typer.echo(f"{finding.verdict:<9}  {finding.claim.says}")
        if finding.reason:
            typer.echo(f"           {finding.reason}")
    typer.echo(f"{page.summary(findings)}; {written}")


def _tell(bar: Bar, step: Step) -> None:
    one = step.experiment
    given = " ".join(f"{name}={text_of(value)}" for name, value in one.given.items() if name in SHOWN)
    what = f"{one.kind} {given} seed={one.seed}".replace("vidbench.claims.contenders:", "")
    bar.update(step.done, step.total, what)
    if step.outcome is None:
        return
    left = "" if step.seconds_left is None else f", {step.seconds_left / 60:.0f} min left"
    said = step.outcome.failure or f"{step.outcome.wall_s:.1f} s"
    bar.say(f"[{step.done}/{step.total}] {what}: {said}{left}", notable=bool(step.outcome.failure))


SHOWN = (
    "model",
    "task",
    "source",
    "pattern",
    "examples",
    "mode",
    "clip_length",
    "levels",
    "kernel_size",
    "learning_rate",
)
"""What of an experiment tells it from its like."""


def _as_json(finding: Finding) -> dict[str, object]:
    return {
        "claim": finding.claim.name,
        "says": finding.claim.says,
        "verdict": finding.verdict,
        "reason": finding.reason,
        "predictions": [_judged(judged) for judged in finding.predictions],
        "controls": [_judged(judged) for judged in finding.controls],
    }


def _judged(judged: Judged) -> dict[str, object]:
    found = judged.interval
    return {
        "says": judged.prediction.says,
        "unit": judged.prediction.unit,
        "margin": judged.prediction.margin,
        "effect": None if found is None else found.mean,
        "interval": None if found is None or math.isnan(found.low) else [found.low, found.high],
        "verdict": judged.verdict,
    }
