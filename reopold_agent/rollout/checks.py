"""Checks a run's chat template and rows before any model is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import track

from reopold_agent.config import TrainConfig
from reopold_agent.data.checks import RowError
from reopold_agent.envs.data_env import DataEnv
from reopold_agent.envs.from_config import BadTasks, checked_tasks
from reopold_agent.envs.registration import task_seed
from reopold_agent.errors import DataError, ModelError
from reopold_agent.policies.loading import Processing
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.rollout.from_config import make_runner
from reopold_agent.rollout.lengths import prompt_limit
from reopold_agent.rollout.runner import EpisodeSpec, RolloutRunner
from reopold_agent.rollout.task_teachers import (
    check_task_teachers,
    taught_splits,
    teacher_problem,
)
from reopold_agent.types import IMAGE_MARK, Message

_MARKS = 32
"""Most tokens that a picture adds besides its own: marks around it, and its size in words."""


def checked_run(
    config: TrainConfig, student: Processing, contexts: Iterable[int | None], report: Path
) -> tuple[TrainConfig, dict[str, dict[str, int]]]:
    """Checks chat template and rows of a run.

    Args:
        config: the run's.
        student: tokenizer and picture processor of the student.
        contexts: longest sequence of each model (``max_position_embeddings``), if it has one.
        report: file for the report on the rows.

    Returns:
        The configuration with the longest prompt and the tasks to leave out filled in, and the
        number of the other tasks by environment and split.

    Raises:
        ModelError: the template rewrites earlier turns, and several turns are possible.
        ConfigError, DataError: rows cannot be used, or no prompt fits the models.
    """
    runners = {name: checked_runner(each, student) for name, each in config.members.items()}
    context = min((each for each in contexts if each is not None), default=None)
    most = prompt_limit(config, context)
    why = f"at most {most} fit the models' context of {context} beside rollout.max_response_tokens"
    if config.engine.max_prompt_tokens is not None or context is None:
        why = f"engine.max_prompt_tokens is {most}"
    left_out: dict[str, dict[str, list[int]]] = {name: {} for name in runners}
    examined: set[tuple[str, str]] = set()

    def examine(name: str, env: DataEnv, split: str) -> BadTasks:
        examined.add((name, split))
        member = config.members[name]
        found = _bad_tasks(env, split, runners[name], most, why)
        if split in taught_splits(config):
            found = {**_without_teacher(name, env, split, member), **found}
        if found:
            left_out[name][split] = sorted(found)
        return found

    counts = checked_tasks(config, report, examine)
    for name, runner in runners.items():
        for split in counts[name]:
            if (name, split) not in examined and most is not None:
                _check_first_prompt(runner, name, split, most, why)
        runner.close()
    engine = replace(config.engine, max_prompt_tokens=most)
    config = replace(config.leaving_out(left_out), engine=engine)
    check_task_teachers(config)
    return config, counts


def _check_first_prompt(runner: RolloutRunner, name: str, split: str, most: int, why: str) -> None:
    """Checks the length of a prompt that is made by the environment, not read from a file.

    One tells of all: such prompts differ by a few words, and there may be a million of them.

    Raises:
        DataError: it is too long.
    """
    tokens = runner.prompt_tokens(EpisodeSpec(split, 0))
    if tokens is not None and tokens > most:
        raise DataError(
            f"the prompt of the first task of '{split}' in env={name} has {tokens} tokens; {why}.\n"
            "Change these settings, or make the prompts shorter: fewer tools, pixels or words."
        )


def checked_runner(config: TrainConfig, student: Processing) -> RolloutRunner:
    """Returns a runner of one environment whose chat template suits the turns that it may have.

    Raises:
        ModelError: the template rewrites earlier turns, and several turns are possible; or the
            student reads text only, and the environment cannot do without pictures.
    """
    chat = ChatRenderer(student.tokenizer, stop_at_tool_call=config.rollout.stop_at_tool_call)
    turns = max(config.max_turns(split) for split in config.splits)
    runner = make_runner(config, chat, student.vision, max_turns=turns)
    runner.check_template()
    runner.check_pictures()
    return runner


def _without_teacher(
    name: str, env: DataEnv, split: str, config: TrainConfig
) -> dict[int, tuple[str, DataError]]:
    """Returns the tasks of which ``model.teachers`` does not have the teacher that they name."""
    found: dict[int, tuple[str, DataError]] = {}
    for index in range(env.num_tasks(split)) if config.model.teacher_key is not None else ():
        task = env.task(split, index)
        problem = teacher_problem(config, name, task)
        if problem is not None:
            found[index] = task.id, problem
    return found


def _bad_tasks(
    env: DataEnv, split: str, runner: RolloutRunner, most: int | None, why: str
) -> BadTasks:
    """Returns tasks with more pictures or longer prompts than an episode may have.

    Raises:
        ModelError: a task has pictures, but the student reads text only.
    """
    template = _template_tokens(runner.chat)
    found: dict[int, tuple[str, DataError]] = {}
    long: list[int] = []
    for index in range(env.num_tasks(split)):
        task = env.task(split, index)
        texts = [*(text for _, text in task.history), env.question(task)]
        pictures = len(task.images)
        at_once = max(text.count(IMAGE_MARK) for text in texts) if task.history else pictures
        if pictures and runner.vision is None:
            raise ModelError(
                f"the student reads text only and cannot see the pictures of {task.id}.\n"
                "Give a vision-language checkpoint, or data without pictures."
            )
        if at_once > env.max_pictures:
            why_not = f"{at_once} pictures; env.kwargs.max_pictures is {env.max_pictures}"
            found[index] = task.id, RowError("too many pictures", why_not)
        elif most is not None:
            # A token is at least one byte, so that few rows need to be tokenised and opened.
            words = [env.system_prompt(task), *texts]
            size = sum(len(text.encode("utf-8", "replace")) + template for text in words)
            if size + pictures * (_picture_tokens(runner) + _MARKS) > most:
                long.append(index)
    console = Console(stderr=True)
    for index in track(
        long,
        f"measuring long prompts, {split}",
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ):
        name = env.task(split, index).id
        options = {"split": split, "index": index}
        try:
            shown = env.reset(seed=task_seed(split, index), options=options)
        except DataError as error:
            found[index] = name, error
            continue
        tokens = len(runner.prompt(*shown)[0])
        if most is not None and tokens > most:
            found[index] = name, RowError("long prompt", f"{tokens} tokens; {why}")
    return found


def _picture_tokens(runner: RolloutRunner) -> int:
    factor = 28 if runner.vision is None else runner.vision.factor
    return runner.prompt_pixels.max_pixels // factor**2


def _template_tokens(chat: ChatRenderer) -> int:
    """Returns the tokens of the longer of the prompts with and without a system message."""
    user = Message("user", ("?\n",))
    return max(len(chat.prompt([*system, user])[0]) for system in ([], [Message("system", ("?",))]))
