"""Problems in the rows of a data set: found while reading, counted, reported as one table."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from reopold_agent.errors import DataError
from reopold_agent.judges.rules import reference_problem
from reopold_agent.types import IMAGE_MARK, Task

_log = logging.getLogger(__name__)

Columns: TypeAlias = Sequence[tuple[str, ...]]
"""The columns that a row must have, each as its alternative names."""

DUPLICATE = "duplicate id"
NO_QUESTION = "no question"
NO_PICTURE = "missing picture"
_EXAMPLES = 3
_LONGEST = 300
"""Characters of an example that are kept: a message may quote a whole row."""


class RowError(DataError):
    """A row, or one of its pictures, cannot be used; the report counts errors by ``kind``."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(kind, message)

    def __str__(self) -> str:
        return str(self.args[1])


class BadRowsError(DataError):
    """Rows of a data set cannot be used, and the settings say to stop.

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
    """The result of reading and checking the rows of one split.

    Attributes:
        source: format of the rows.
        path: file or folder.
        rows: number of rows read, including unreadable lines.
        usable: number of rows that became tasks.
        pictures: number of pictures that were opened to check them.
        problems: by kind, in the order in which they were found.
        references: answers that no rule can compare, by reason; their rows are used.
        unread: rows by a column that looks like pictures and is not read.
        optionless: rows whose answer is a letter from A to J, though they show no options.
        blind: rows that are used without a picture, by a column in which others have one.
    """

    source: str
    path: str
    rows: int = 0
    usable: int = 0
    pictures: int = 0
    problems: dict[str, Problem] = field(default_factory=dict)
    references: dict[str, Problem] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)
    optionless: dict[str, Problem] = field(default_factory=dict)
    blind: dict[str, Problem] = field(default_factory=dict)

    def add(self, where: str, error: DataError) -> None:
        """Counts a problem; errors without a kind are counted as "other"."""
        kind = error.kind if isinstance(error, RowError) else "other"
        _count(self.problems, kind, where, str(error))

    def check_references(self, where: str, task: Task, kind: str = "auto") -> None:
        """Counts a task if no rule can compare an answer with any of its references.

        Responses to it that do not repeat a reference are undecided, not wrong. A task whose answer
        is the letter of an option, but which shows no options, is counted too.

        Args:
            where: label of the row.
            task: the row's task.
            kind: kind of the answers if the task does not say.
        """
        kind = str(task.metadata.get("answer_kind") or kind)
        options = task.metadata.get("options")
        reasons = [reference_problem(answer, kind, options) for answer in task.answers]
        if reasons and all(reasons):
            _count(self.references, reasons[0], where, task.answers[0])
        if not options and kind in ("auto", "option", "math") and _lacks_options(task):
            _count(self.optionless, "letter", where, f"the answer '{task.answers[0]}'")

    def note_unread(self, columns: Iterable[str]) -> None:
        """Counts a row with columns that look like pictures and are not read."""
        for column in columns:
            self.unread[column] = self.unread.get(column, 0) + 1

    def note_blind(self, where: str, columns: Iterable[str]) -> None:
        """Counts a row without a picture by its empty columns for pictures."""
        for column in columns:
            _count(self.blind, column, where, "null")

    def table(self) -> str:
        """Formats the problems: kind, number of rows, and the first examples, one per line."""
        return _table(self.problems)

    def warn(self) -> None:
        """Logs references that seem wrong, and columns that may be pictures."""
        for column, count in self.unread.items():
            _log.warning(
                "%d of %d rows of %s have a column '%s' that looks like pictures and is not read."
                "\nIf it holds the question's pictures, put them all into one column 'images'.",
                *(count, self.rows, self.path, column),
            )
        for column, problem in self.blind.items():
            _log.warning(
                "%d of %d rows of %s have no picture in '%s', where others have one, and are used "
                "without it:\n%s\nPut their pictures there, an empty list if there is none, or "
                "leave the rows out.",
                *(problem.rows, self.rows, self.path, column, _table({column: problem})),
            )
        for problem in self.optionless.values():
            _log.warning(
                "%d of %d rows of %s have a letter as the answer and show no options:\n%s\n"
                "If they have options, put them into one column 'options', as a list.",
                *(problem.rows, self.rows, self.path, _table(self.optionless)),
            )
        rows = sum(problem.rows for problem in self.references.values())
        if rows:
            _log.warning(
                "%d of %d rows of %s have a reference answer that no rule can compare:\n%s\n"
                "Responses that do not repeat it are undecided: correct these references, or leave "
                "the rows out.",
                *(rows, self.rows, self.path, _table(self.references)),
            )

    def record(self) -> dict[str, Any]:
        """Returns the report as JSON values, for ``data_report.json``."""
        return {
            "source": self.source,
            "path": self.path,
            "rows": self.rows,
            "usable": self.usable,
            "pictures_checked": self.pictures,
            "problems": _recorded(self.problems),
            **({"references": _recorded(self.references)} if self.references else {}),
            **({"without_options": _recorded(self.optionless)} if self.optionless else {}),
            **({"without_pictures": _recorded(self.blind)} if self.blind else {}),
            **({"unread_columns": self.unread} if self.unread else {}),
        }


_LETTER = re.compile(r"(?<![A-Za-z])(?:[A-J](?![A-Za-z])|[a-j](?=[).]))")
"""A letter that may be an option's, or the name of a thing that is asked for."""


def _lacks_options(task: Task) -> bool:
    """Returns whether all answers are letters that the question does not mention, nor two others.

    "Which is larger, A or B?" mentions them, and so does a question about options A to D.
    """
    if not task.answers or not all(re.fullmatch("[A-J]", answer) for answer in task.answers):
        return False
    texts = [task.question, *(words for _, words in task.history)]
    shown = {letter.upper() for text in texts for letter in _LETTER.findall(text)}
    return len(shown) < 2 and shown.isdisjoint(task.answers)


def _count(problems: dict[str, Problem], kind: str, where: str, message: str) -> None:
    problem = problems.setdefault(kind, Problem())
    problem.rows += 1
    if len(problem.examples) < _EXAMPLES:
        message = " ".join(message.encode("utf-8", "replace").decode("utf-8").split())
        short = message if len(message) <= _LONGEST else message[: _LONGEST - 3] + "..."
        problem.examples.append((where, short))


def _table(problems: Mapping[str, Problem]) -> str:
    width = max(map(len, problems), default=0)
    lines = []
    for kind, problem in problems.items():
        for number, (where, message) in enumerate(problem.examples):
            left = f"{kind:<{width}}  {problem.rows:>6}" if not number else " " * (width + 8)
            lines.append(f"  {left}  {where}: {message}")
        hidden = problem.rows - len(problem.examples)
        if hidden:
            lines.append(f"  {' ' * (width + 8)}  and {hidden} more")
    return "\n".join(lines)


def _recorded(problems: Mapping[str, Problem]) -> dict[str, Any]:
    return {
        kind: {
            "rows": problem.rows,
            "examples": [
                {"where": where, "message": message} for where, message in problem.examples
            ],
        }
        for kind, problem in problems.items()
    }


class CheckedTasks(Sequence[Task]):
    """Tasks in memory, with the report on the rows they were made from."""

    def __init__(self, tasks: Sequence[Task], report: DataReport) -> None:
        self._tasks, self.report = tasks, report

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, index: Any, /) -> Any:
        return self._tasks[index]


def checked_task(
    make: Callable[[], Task], row: Mapping[str, Any], columns: Columns, name: str
) -> Task:
    """Makes a row's task and checks what every format requires.

    Args:
        make: makes the task.
        row: the row.
        columns: the columns it must have.
        name: name of the format, for messages.

    Raises:
        RowError: a column is missing, the question or every answer is empty, or a text contains
            half a surrogate pair, which no tokenizer accepts.
        DataError: raised by ``make``.
    """
    absent = [" or ".join(names) for names in columns if not any(n in row for n in names)]
    if absent:
        wanted = ", ".join(" or ".join(names) for names in columns)
        raise RowError(
            "missing column",
            f"no column {', '.join(absent)}; found: {_listed(row)}; {name} needs: {wanted}",
        )
    task = make()
    if not task.question.replace(IMAGE_MARK, "").strip():
        raise RowError(NO_QUESTION, "no question: it is empty without its picture marks")
    if not any(answer.strip() for answer in task.answers):
        raise RowError("no answer", "no answer")
    system = str(task.metadata.get("system_message", ""))
    earlier = (words for _, words in task.history)
    for text in (task.id, task.question, *task.answers, system, *earlier):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise RowError("wrong type", f"not a text: half a surrogate pair in {text[:40]!r}")
    return task


def _listed(row: Mapping[Any, Any]) -> str:
    names = [str(name)[:40] for name in row]
    return ", ".join(names[:12]) + (" ..." if len(names) > 12 else "") if names else "none"


def check_pictures(
    tasks: Sequence[tuple[str, Task]], which: str, report: DataReport
) -> Collection[int]:
    """Opens pictures, as an episode would, and reports those that cannot be opened.

    Args:
        tasks: each with the label of its row.
        which: ``sample`` (64 tasks, evenly spread) or ``all``.
        report: the unreadable pictures are added to it.

    Returns:
        Positions of the tasks with an unreadable picture.
    """
    from concurrent.futures import ThreadPoolExecutor

    from rich.console import Console
    from rich.progress import track

    chosen = list(range(len(tasks)))
    if which == "sample":
        chosen = sorted({round(i * (len(tasks) - 1) / 63) for i in range(64)}) if tasks else []
    bad = []
    console = Console(stderr=True)
    # Decoding releases the interpreter's lock, so threads help.
    with ThreadPoolExecutor(max_workers=4) as pool:
        problems = pool.map(lambda position: _picture_error(tasks[position][1]), chosen)
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


def _picture_error(task: Task) -> str | None:
    for image in task.images:
        try:
            image.open()
        except DataError as error:
            return str(error)
    return None
