"""What is wrong with the rows of a data set: found as they are read, counted, told as one table."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from reopold_agent.errors import DataError
from reopold_agent.types import Task

Columns: TypeAlias = Sequence[tuple[str, ...]]
"""What a row must have: for each entry one of its names."""

DUPLICATE = "duplicate id"
_EXAMPLES = 3
_LONGEST = 300
"""Characters of an example: a message may quote a row."""


class RowError(DataError):
    """One row, or one picture of it, cannot be used. ``kind`` is what the report counts by."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(kind, message)

    def __str__(self) -> str:
        return str(self.args[1])


class BadRowsError(DataError):
    """Rows of a data set cannot be used, and the settings say to stop then.

    Attributes:
        report: the `DataReport`.
    """

    def __init__(self, message: str, report: DataReport) -> None:
        self.report = report
        super().__init__(message, report)

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass
class Problem:
    """One kind of problem: how many rows have it, and the first few (where, message)."""

    rows: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class DataReport:
    """What was found in the rows of one split.

    Attributes:
        source: format of the rows.
        path: file or folder.
        rows: how many were read, unreadable lines included.
        usable: how many became tasks.
        pictures: how many pictures were opened to check them.
        problems: by kind, in the order in which they were met.
    """

    source: str
    path: str
    rows: int = 0
    usable: int = 0
    pictures: int = 0
    problems: dict[str, Problem] = field(default_factory=dict)

    def add(self, where: str, error: DataError) -> None:
        """Counts a problem; errors without a kind are counted as "other"."""
        kind = error.kind if isinstance(error, RowError) else "other"
        problem = self.problems.setdefault(kind, Problem())
        problem.rows += 1
        if len(problem.examples) < _EXAMPLES:
            message = " ".join(str(error).encode("utf-8", "replace").decode("utf-8").split())
            short = message if len(message) <= _LONGEST else message[: _LONGEST - 3] + "..."
            problem.examples.append((where, short))

    def table(self) -> str:
        """Kind of problem, rows, and the first examples, a line each."""
        width = max(map(len, self.problems), default=0)
        lines = []
        for kind, problem in self.problems.items():
            for number, (where, message) in enumerate(problem.examples):
                left = f"{kind:<{width}}  {problem.rows:>6}" if not number else " " * (width + 8)
                lines.append(f"  {left}  {where}: {message}")
            hidden = problem.rows - len(problem.examples)
            if hidden:
                lines.append(f"  {' ' * (width + 8)}  and {hidden} more")
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """As JSON values, for ``data_report.json``."""
        return {
            "source": self.source,
            "path": self.path,
            "rows": self.rows,
            "usable": self.usable,
            "pictures_checked": self.pictures,
            "problems": {
                kind: {
                    "rows": problem.rows,
                    "examples": [
                        {"where": where, "message": message} for where, message in problem.examples
                    ],
                }
                for kind, problem in self.problems.items()
            },
        }


class CheckedTasks(Sequence[Task]):
    """Tasks in memory, with the report of the rows that they were made from."""

    def __init__(self, tasks: Sequence[Task], report: DataReport) -> None:
        self._tasks, self.report = tasks, report

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, index: Any, /) -> Any:
        return self._tasks[index]


def checked_task(
    make: Callable[[], Task], row: Mapping[str, Any], columns: Columns, name: str
) -> Task:
    """The task of a row, with what holds for every format.

    Args:
        make: makes it.
        row: the row.
        columns: what it must have.
        name: of the format, for messages.

    Raises:
        RowError: a column is absent, the question or every answer is empty, or a text has half a
            surrogate pair in it, which no tokenizer takes.
        DataError: the format's own complaint.
    """
    absent = [" or ".join(names) for names in columns if not any(n in row for n in names)]
    if absent:
        wanted = ", ".join(" or ".join(names) for names in columns)
        raise RowError(
            "missing column",
            f"no column {', '.join(absent)}; found: {_listed(row)}; {name} needs: {wanted}",
        )
    task = make()
    if not task.question.strip():
        raise RowError("no question", "no question: it is empty without its picture marks")
    if not any(answer.strip() for answer in task.answers):
        raise RowError("no answer", "no answer")
    for text in (task.id, task.question, *task.answers):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise RowError("wrong type", f"not a text: half a surrogate pair in {text[:40]!r}")
    return task


def _listed(row: Mapping[Any, Any]) -> str:
    names = [str(name)[:40] for name in row]
    return ", ".join(names[:12]) + (" ..." if len(names) > 12 else "") if names else "none"


def check_pictures(
    tasks: Sequence[tuple[str, Task]], which: str, report: DataReport
) -> Collection[int]:
    """Opens pictures, as an episode would, and counts those that cannot be.

    Args:
        tasks: each with the words that name its row.
        which: ``sample`` (64 tasks, evenly spread) or ``all``.
        report: takes what was found.

    Returns:
        Positions of the tasks with a bad picture.
    """
    from concurrent.futures import ThreadPoolExecutor

    from rich.console import Console
    from rich.progress import track

    chosen = list(range(len(tasks)))
    if which == "sample":
        chosen = sorted({round(i * (len(tasks) - 1) / 63) for i in range(64)}) if tasks else []
    bad = []
    console = Console(stderr=True)
    # Decoding lets go of the interpreter's lock, so threads do help.
    with ThreadPoolExecutor(max_workers=4) as pool:
        problems = pool.map(lambda position: _opened(tasks[position][1]), chosen)
        for position, error in zip(
            chosen,
            track(
                problems,
                f"checking pictures of {report.path}",
                total=len(chosen),
                console=console,
                disable=not console.is_terminal,
                transient=True,
            ),
            strict=True,
        ):
            report.pictures += len(tasks[position][1].images)
            if error is not None:
                report.add(tasks[position][0], RowError("unreadable picture", error))
                bad.append(position)
    return bad


def _opened(task: Task) -> str | None:
    for image in task.images:
        try:
            image.open()
        except DataError as error:
            return str(error)
    return None
