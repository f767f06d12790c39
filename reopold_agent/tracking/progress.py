"""Shows the progress of a run: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from typing_extensions import Self

from reopold_agent.common.terminal import duration, finite_number, is_terminal, write_plain


class Progress:
    """Shows the progress of a run; a context manager.

    On a terminal of at least 60 columns three to four lines are redrawn in place: a bar with step,
    phase and time left; success, reward, tool rate and tokens per second of the last step; the
    last evaluation; the current activity. Notes and evaluations are printed above and
    stay. Elsewhere (a file, a pipe, a dumb terminal) every step is one line without escape codes.

    No value makes a method raise: a missing one or one that is not a number shows as "-". The
    reward is the mean of ``log pi_teacher - log pi_student`` (``reward/mean``), or without a
    teacher the environment's.

    Args:
        total: number of steps; `start` may set it later.
        console: output; standard output by default.
        clock: monotonic seconds; for tests.
    """

    def __init__(
        self,
        total: int = 0,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console()
        self._clock = clock
        # Asks the stream, not rich, which takes a pipe for a terminal under FORCE_COLOR.
        self.is_live = is_terminal(self._console)
        self._live: Live | None = None
        self._total = _whole(total)
        self._done = self._done_before = 0
        self._started = clock()
        self._row: Mapping[str, Any] = {}
        self._evaluation = self._activity = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self, total: int, done: int = 0) -> None:
        """Begins; an earlier process has made ``done`` of the ``total`` steps."""
        self._total, self._done, self._done_before = _whole(total), _whole(done), _whole(done)
        self._started = self._clock()
        if self.is_live and self._live is None:
            self._live = Live(
                _Display(self), console=self._console, refresh_per_second=4, transient=False
            )
            self._live.start()

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Shows a finished training step, given its row of ``metrics.jsonl``."""
        if self._done == self._done_before:
            # Count from the start of this step, since an evaluation may precede it.
            self._started = self._clock() - (finite_number(metrics.get("time/step")) or 0.0)
        self._row, self._activity = metrics, ""
        at = finite_number(metrics.get("step"))
        self._done = self._done + 1 if at is None else int(at) + 1
        if self._live is None:
            self._print(
                f"step {self._done}/{self._total} {_word(metrics.get('phase'))}  "
                + "  ".join(f"{name} {value}" for name, value in self.values())
                + f"  {self.time_left()} left"
            )

    def activity(self, text: str) -> None:
        """Sets the activity within a step ("rollout 12/32"), which only the live display shows."""
        self._activity = _one_line(text)

    def note(self, text: str) -> None:
        """Prints a line that stays; line breaks in it become spaces."""
        self._print(_one_line(text))

    def lines(self, lines: Iterable[str]) -> None:
        """Prints lines that stay, with their spaces."""
        for line in lines:
            self._print("".join(c if c.isprintable() else " " for c in line))

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Prints an evaluation, given its "eval" row of ``metrics.jsonl``."""
        who, at = _word(row.get("who")), finite_number(row.get("step"))
        where = "" if at is None or who == "teacher" else f" after {int(at)} steps"
        interval = f"{show(row.get('low'))} to {show(row.get('high'))}"
        short = f"{who} {show(row.get('success'))} ({interval}){where}"
        if row.get("sampling") != "greedy" and who != "teacher":
            self._evaluation = short
        self._print(
            f"held-out: {short}, {_word(row.get('sampling'))}, "
            f"tool rate {show(row.get('tool_rate'))}, n {show(row.get('n'), '.0f')}"
        )

    def stop(self) -> None:
        """Ends the live display and restores the cursor; may be called twice."""
        if self._live is not None:
            self._activity = ""
            self._live.stop()
            self._live = None

    def values(self) -> list[tuple[str, str]]:
        """Returns names and formatted values of the last step, in the order shown."""
        row = self._row
        reward = row.get("reward/mean", row.get("rollout/reward"))
        return [
            ("success", show(row.get("rollout/success"))),
            ("reward", show(reward)),
            ("tools", show(row.get("rollout/tool_rate"))),
            ("tok/s", show(row.get("tokens_per_second"), ",.0f")),
        ]

    def time_left(self) -> str:
        """Estimates the time left from the mean seconds per step of this process."""
        made = self._done - self._done_before
        seconds = self._clock() - self._started
        # A first step without "time/step" gives no rate yet; 0 seconds would be wrong.
        if made <= 0 or seconds <= 0:
            return "-"
        return duration(seconds / made * max(0, self._total - self._done))

    def _print(self, line: str) -> None:
        if self.is_live:
            # Text, not str, so that brackets are not markup. Above the live display, if one runs.
            self._console.print(Text(line), highlight=False)
        else:
            write_plain(self._console.file, line)


class _Display:
    """Content of the live display, rendered at every refresh."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        progress = self._progress
        width = options.max_width
        total, done = progress._total, progress._done
        head = Table.grid(padding=(0, 1, 0, 0))
        step = Text(f"step {done}/{total}", "bold", no_wrap=True)
        phase = _word(progress._row.get("phase"))
        tail = Text(f"{phase if phase != '-' else 'start'}  ", "cyan", no_wrap=True)
        tail.append(f"{progress.time_left()} left", "default")
        bar = max(8, min(40, width - step.cell_len - tail.cell_len - 3))
        head.add_row(step, ProgressBar(max(total, 1), min(done, max(total, 1)), width=bar), tail)
        yield head
        numbers = Text(no_wrap=True, overflow="ellipsis")
        for name, value in progress.values():
            numbers.append(f"{name} ", "dim").append(f"{value}  ")
        yield numbers
        if progress._evaluation:
            line = Text("held-out ", "dim", no_wrap=True, overflow="ellipsis")
            yield line.append(progress._evaluation, "green")
        if progress._activity:
            yield Text(progress._activity, "dim", no_wrap=True, overflow="ellipsis")


def show(value: Any, form: str = ".2f") -> str:
    """Formats a number, or returns "-" for anything else (None, text, NaN, infinity)."""
    number = finite_number(value)
    return "-" if number is None else format(number, form)


def _whole(value: Any) -> int:
    return int(finite_number(value) or 0)


def _word(value: Any) -> str:
    return _one_line(str(value)) or "-" if value is not None else "-"


def _one_line(text: Any) -> str:
    # Control characters too: text of a model or a tool must not control the terminal.
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
