"""Checks a teacher's view against the run's tasks before any model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from reopold_agent.config import TeacherConfig, TrainConfig, ViewPixels
from reopold_agent.envs.base import ToolEnv
from reopold_agent.envs.data_env import tasks_to_check
from reopold_agent.envs.from_config import make_env
from reopold_agent.envs.registration import task_seed
from reopold_agent.errors import ConfigError, DataError
from reopold_agent.policies.loading import Processing
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.rollout.from_config import make_reader
from reopold_agent.rollout.reading import TEMPLATES, Reader, hint_of
from reopold_agent.types import Task

_MARKS = 32
"""Most tokens that a message or a picture adds besides its own."""


def check_view(
    config: TrainConfig,
    teacher: TeacherConfig | None,
    student: Processing,
    context: int | None,
    name: str = "model.teacher.view",
    taught: Callable[[Task], bool] = lambda task: True,
) -> None:
    """Checks that the tasks have the teacher's hint, and that its prompts fit.

    It looks at `tasks_to_check` of the training tasks and, if the teacher is evaluated, of the
    held-out tasks that it will play.

    Args:
        config: the run's, with the longest prompt filled in.
        teacher: its settings; None without one.
        student: its tokenizer and pictures are the teacher's.
        context: longest sequence of the teacher, if it has one.
        name: of the settings, for messages.
        taught: whether it teaches a task; others are passed over.

    Raises:
        ConfigError: the view cannot work with this student.
        DataError: a task has no such hint, or its prompt is too long for the teacher.
    """
    chat = ChatRenderer(student.tokenizer, stop_at_tool_call=config.rollout.stop_at_tool_call)
    reader = make_reader(config, teacher, chat, student.vision, context)
    if reader is None:
        return
    if student.vision is None and reader.view.pixels != ViewPixels():
        raise ConfigError(
            f"{name}.pixels limits pictures, but the student reads text only.\n"
            "Leave it out, or take a vision-language student."
        )
    made = make_env(config)
    try:
        env = made.unwrapped
        if not isinstance(env, ToolEnv):
            if reader.view.hint not in (None, "feedback"):
                hint_of(reader.view, env, None)
            return
        most = None if context is None else context - config.rollout.max_response_tokens - 1
        played = config.evaluation.tasks if config.evaluation.teacher else 0
        for split in ("train", "eval") if played else ("train",):
            indices = tasks_to_check(env, split, played if split == "eval" else None)
            _check_tasks(reader, env, split, indices, most, name, taught)
    finally:
        made.close()


def _check_tasks(
    reader: Reader,
    env: ToolEnv,
    split: str,
    indices: Sequence[int],
    most: int | None,
    name: str,
    taught: Callable[[Task], bool],
) -> None:
    view, factor = reader.view, reader.factor
    picture = reader.prompt_pixels.max_pixels // factor**2 + _MARKS
    for index in indices:
        task = env.task(split, index)
        if not taught(task):
            continue
        told = view.hint not in (None, "feedback")
        try:
            hint = hint_of(view, env, task) if told else None
        except DataError as error:
            if split == "train":
                raise
            way_out = "Or use evaluation.teacher=false: this task is held out."
            raise DataError(f"{error} {way_out}") from None
        if most is None:
            continue
        words = [
            env.system_prompt(task) if view.system is None else env.with_tools(view.system),
            *(text for _, text in task.history),
            env.question(task),
            hint or "",
            view.template or TEMPLATES.get(view.hint or "", ""),
        ]
        # A token is at least one byte, so that few prompts need to be rendered.
        size = sum(len(text.encode("utf-8", "replace")) + _MARKS for text in words)
        if size + len(task.images) * picture <= most:
            continue
        observation, info = env.reset(
            seed=task_seed(split, index), options={"split": split, "index": index}
        )
        shown = reader.begin(observation, info, reader.opening(env))
        tokens = len(reader.prompt(shown, hint)[0])
        if tokens > most:
            raise DataError(
                f"with {name} the teacher's prompt of task {task.id} has {tokens} tokens; at "
                f"most {most} fit its context beside rollout.max_response_tokens.\nShorten the "
                "view or lower its pixels, or lower rollout.max_response_tokens."
            )
