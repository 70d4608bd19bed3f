"""How far long work is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from typing import Any


class Bar:
    """Shows progress on a stream; nothing is drawn until it is told of the first step.

    Args:
        stream: Where to, such as sys.stderr.
        every_s: Off a terminal, the least seconds from one line to the next; 0 prints every line.
    """

    def __init__(self, stream: Any, *, every_s: float = 0.0) -> None:
        self.stream, self.every_s = stream, every_s
        self.terminal = stream.isatty()
        self.told = time.monotonic()
        self.bar: Any = None

    def update(self, done: int, total: int, what: str) -> None:
        """Draws the bar; does nothing off a terminal."""
        if not self.terminal:
            return
        if self.bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                BarColumn(24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}", markup=False),
                console=Console(file=self.stream),
            )
            self.row = self.bar.add_task(what, total=total)
            self.bar.start()
        self.bar.update(self.row, total=total, completed=done, description=what)

    def say(self, line: str, *, last: bool = False, notable: bool = False) -> None:
        """A line of the log; on a terminal only where it is notable, above the bar.

        Args:
            line: What to say.
            last: Whether it is said however recently the one before was.
            notable: Whether it is worth a line on a terminal too.
        """
        if self.terminal:
            if notable and self.bar is not None:
                self.bar.console.print(line, highlight=False, markup=False)
            return
        now = time.monotonic()
        if last or now - self.told >= self.every_s:
            self.told = now
            print(line, file=self.stream, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self.bar is not None:
            self.bar.stop()
