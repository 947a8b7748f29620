"""Shows progress on standard error. Standard output is for results."""

import sys
from contextlib import AbstractContextManager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

console = Console(stderr=True, highlight=False)


class ConsoleProgress(AbstractContextManager["ConsoleProgress"]):
    """A progress display with one line per step: a bar on a terminal, plain text elsewhere."""

    def __init__(self) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def step(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` units of `what` are finished; a total of 0 means unknown."""
        if what not in self._tasks:
            if not console.is_terminal:
                print(what, file=sys.stderr, flush=True)
            self._tasks[what] = self._progress.add_task(what, total=total or None)
        self._progress.update(self._tasks[what], completed=done, total=total or None)

    def close(self) -> None:
        """Clear the bars so that results can be printed."""
        self._progress.stop()

    def __enter__(self) -> "ConsoleProgress":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
