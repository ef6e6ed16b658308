"""What a person sees while something long goes on: spinners and bars on a terminal, else plain lines.

Everything here goes to stderr; stdout is for results (the `ready` line, an answer, a table).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

PLAIN_PROGRESS_STEPS = 10  # plain lines per download


class Display:
    def __init__(self) -> None:
        self._console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)

    def line(self, text: str) -> None:
        # When the terminal is gone there is nobody to tell, and what we were to do goes on.
        with suppress(OSError):
            self._console.print(text)

    @contextmanager
    def waiting(self, names: list[str]) -> Iterator[Callable[[str], None]]:
        """A spinner that lists `names`; call the result with a name when that one is ready."""
        remaining = list(names)
        with self._console.status(_waiting_text(remaining)) as status:

            def ready(name: str) -> None:
                remaining.remove(name)
                self.line(f"{name} ready")
                status.update(_waiting_text(remaining))

            yield ready

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """A spinner on a terminal, nothing elsewhere."""
        with self._console.status(what):
            yield

    @contextmanager
    def download(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """Call the result with (bytes done, bytes in all). Nothing is shown before the first call."""
        if not self._console.is_terminal:
            yield _plain_progress(title, self.line)
            return
        columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(title, total=None, visible=False)
            yield lambda done, total: progress.update(task, completed=done, total=total, visible=True)


def _waiting_text(names: list[str]) -> str:
    return f"starting {', '.join(names)}" if names else "ready"


def _plain_progress(title: str, line: Callable[[str], None]) -> Callable[[int, int], None]:
    shown = -1

    def show(done: int, total: int) -> None:
        nonlocal shown
        step = done * PLAIN_PROGRESS_STEPS // total
        if step > shown:
            line(f"{title}: {done / 1e6:.0f} of {total / 1e6:.0f} MB")
            shown = step

    return show
