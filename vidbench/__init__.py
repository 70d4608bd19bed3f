"""vidbench: which architecture and which kernel for this clip length, batch size and machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vidbench.sweep import RequestError, parse_axes, text_of

if TYPE_CHECKING:
    from vidbench.results import Run

__version__ = "0.1.0"
__all__ = ["RequestError", "__version__", "load", "sweep"]


def load(path: str | Path) -> Run:
    """The run in a folder.

    Raises:
        RequestError: No run is there, or it is damaged; file and line are named.
    """
    from vidbench.results import load

    return load(path)


def sweep(
    suite: str,
    *,
    axes: Mapping[str, Sequence[object]] | None = None,
    models: Sequence[str] = (),
    implementations: Sequence[str] = (),
    rounds: int | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    timeout_s: float = 600.0,
    video: str | Path | None = None,
) -> Run:
    """Measures a suite, as `vidbench sweep` does, and returns the run.

    Args:
        suite: Its name, such as `quick`.
        axes: Values by axis, such as `{"clip_length": [8, 16], "dtype": ["bf16"]}`.
        models: Models instead of the suite's own; `package.module:factory` measures yours.
        implementations: Only these.
        rounds: Fresh processes that each take every point once; None takes the suite's number.
        out: Run folder; None makes `runs/<utc>-<suite>`.
        resume: Does only what the folder lacks.
        timeout_s: Seconds after which a point is given up.
        video: A video file that the models' clips are taken from.

    Raises:
        RequestError: The request cannot be carried out, said in one line.
    """
    from vidbench.engine import runs

    texts = [f"{name}={','.join(map(_text, values))}" for name, values in (axes or {}).items()]
    (done,) = runs(
        suite,
        axes=parse_axes(texts),
        models=models,
        implementations=implementations,
        rounds=rounds,
        out=Path(out) if out is not None else None,
        resume=resume,
        timeout_s=timeout_s,
        video=Path(video) if video is not None else None,
    )
    return done


def _text(value: object) -> str:
    return text_of(value) if isinstance(value, bool | int | float | tuple) else str(value)
