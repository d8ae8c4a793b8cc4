"""The live line of a running load on stderr: requests done, tokens per second, failures."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text
from typing_extensions import Self

from puzzle_trtllm.serve.metrics.records import RequestRecord

REFRESHES_PER_SECOND = 4
"""Drawing costs CPU time that a server on the same machine would miss."""


class LoadProgress:
    """A LoadObserver that draws; with `quiet` it only listens."""

    def __init__(self, label: str, *, num_requests: int, quiet: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            _Counters(self),
            TimeElapsedColumn(),
            console=Console(stderr=True, quiet=quiet),
            refresh_per_second=REFRESHES_PER_SECOND,
            disable=quiet,
        )
        self._task = self._progress.add_task(label, total=num_requests)
        self._tokens = 0
        self._problems = 0

    def counters(self) -> str:
        """What has happened so far, in words."""
        problems = f", {self._problems} not completed" if self._problems else ""
        return f"{self._tokens:,} tokens{problems}"

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def on_tokens(self, count: int) -> None:
        self._tokens += count

    def on_end(self, record: RequestRecord) -> None:
        self.add(ended=1, problems=record.status != "completed")

    def add(self, *, tokens: int = 0, ended: int = 0, problems: int = 0) -> None:
        """What has happened since the last call, in another process."""
        self._tokens += tokens
        self._problems += problems
        self._progress.advance(self._task, ended)


class _Counters(ProgressColumn):
    """Reads the counters when the line is drawn, so that a token costs one addition."""

    def __init__(self, progress: LoadProgress) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._load = progress

    def render(self, task: Task) -> Text:
        return Text(self._load.counters())
