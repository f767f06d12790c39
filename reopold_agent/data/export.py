"""Writing tasks as verl's parquet rows, with their pictures beside them."""

from __future__ import annotations

from pathlib import Path

from reopold_agent.data.formats import verl_row
from reopold_agent.errors import DataError
from reopold_agent.types import TaskSource


def write_verl(tasks: TaskSource, file: Path, *, split: str) -> None:
    """Writes tasks so that verl, VerlTool and `load_tasks` (source ``verl``) read them.

    Pictures become PNG files in a folder beside the file, named after it. The rows hold their paths
    relative to the file's folder, so that both can be moved together. If any task has several
    acceptable answers, all ``ground_truth`` values are lists: a parquet column has one type.
    Options, which the questions show, are also in a column ``options``, if any task has some.

    Args:
        tasks: read one at a time.
        file: the parquet file; its folder is created.
        split: name of the split, for ``extra_info``.

    Raises:
        DataError: there are no tasks, or a picture cannot be opened.
    """
    import pyarrow
    import pyarrow.parquet

    if not len(tasks):
        raise DataError(f"no tasks to write to {file}")
    folder = file.parent / f"{file.stem}_pictures"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(len(tasks)):
        task = tasks[index]
        paths = []
        for number, picture in enumerate(task.images):
            # Numbers, not ids: an id may hold any characters.
            name = f"{folder.name}/{index:06d}_{number:02d}.png"
            picture.open().save(file.parent / name)
            paths.append(name)
        rows.append(verl_row(task, index, split, paths))
    truths = [row["reward_model"] for row in rows]
    if any(isinstance(truth["ground_truth"], list) for truth in truths):
        for truth in truths:
            answers = truth["ground_truth"]
            truth["ground_truth"] = answers if isinstance(answers, list) else [answers]
    if any("options" in row for row in rows):
        rows = [{"options": [], **row} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
