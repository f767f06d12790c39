"""The general tool environment: a question, tools, an answer.

A third party subclasses `ToolEnv`, gives tasks and perhaps tools and prompts of its own, and
registers it (`reopold_agent.envs.register_env`). Whatever the student says is input: a bad tool
call gets a message and the episode goes on; `step` raises nothing on account of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar, Literal, TypeAlias

import gymnasium
import numpy as np
from gymnasium import spaces
from PIL import Image

from reopold_agent.envs.spaces import Pictures, UnicodeText
from reopold_agent.errors import ConfigError, ToolError
from reopold_agent.judges import JUDGES, Judge
from reopold_agent.tools import (
    BASE_PROMPT,
    TOOLS,
    EpisodeState,
    Isolation,
    Tool,
    ToolResult,
    find_tool_call,
    system_prompt,
)
from reopold_agent.tools.base import failure
from reopold_agent.tools.isolation import runs
from reopold_agent.tools.schema import shorten
from reopold_agent.types import IMAGE_MARK, Observation, Task, TaskSource, ToolCall

ToolChoice: TypeAlias = "str | Mapping[str, Any] | Tool"
"""A tool by name, the tool itself, or a mapping with ``name`` and what the model is to be shown
instead: ``as`` (a name), ``description``, ``parameters`` (a JSON schema)."""


class ToolEnv(gymnasium.Env[Observation, str]):
    """A multi-turn environment with tools.

    An action is an assistant's turn as text. It either calls one tool (``<tool_call>`` with a
    JSON object) or is the answer. Episodes end ``terminated`` by an answer, ``truncated`` by a
    budget.

    ``reset`` takes ``options``: ``task`` (a `Task`), or ``split`` ("train" or "eval", default
    "train") and ``index``; without either, the seed picks a task. Its info holds ``task_id`` and
    ``system_prompt``. ``step``'s info holds ``tool_call`` (`ToolCall` or None) and, at the end,
    ``success``, ``answer``, and ``time_limit`` if that was the reason.

    Args:
        tools: what the student may call, in the order shown; None for the class's default.
        tool_options: per tool (by name or alias), settings that it looks up in ``state.options``.
        max_turns: assistant turns; a tool call in the last one truncates the episode.
        max_response_tokens: budget over all the text after the prompt, counted by
            ``count_tokens``; pictures are not counted. (Rollouts keep an exact budget of their
            own, in ids.)
        count_tokens: number of tokens of a text.
        tool_call_policy: which of several calls in one turn is run, "first" or "last".
        tool_time_limit_s: seconds that the tools of one episode may take together.
        tool_isolation: which tools run in worker processes, and what those may do: an
            `Isolation`, its settings, or only its ``mode``. By default all run on threads.
        overview_max_side: show the prompt's pictures no larger than this on their longer side,
            pixels; tools still work on the originals. A task may set its own in its metadata.
        system_message: what precedes the tool block.
        guideline: what follows the question; None for the class's default.
        judge: who grades the answer: a name (``rules``, or a plugin's) or a `Judge`.
        max_text, max_side, max_pictures: bounds of the observation space. Longer texts are cut
            at the end, larger pictures shown smaller.
        render_mode: ``"rgb_array"`` or None.
        **source: settings of the tasks, for `load_tasks`.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 1}  # noqa: RUF012  # Gymnasium declares it so
    default_tools: ClassVar[tuple[str, ...]] = ()
    default_guideline: ClassVar[str] = "Put your final answer within \\boxed{}."

    def __init__(
        self,
        *,
        tools: Sequence[ToolChoice] | None = None,
        tool_options: Mapping[str, Mapping[str, Any]] | None = None,
        max_turns: int = 5,
        max_response_tokens: int | None = None,
        count_tokens: Callable[[str], int] | None = None,
        tool_call_policy: Literal["first", "last"] = "first",
        tool_time_limit_s: float = 60.0,
        tool_isolation: Isolation | Mapping[str, Any] | str = "none",
        overview_max_side: int | None = None,
        system_message: str = BASE_PROMPT,
        guideline: str | None = None,
        judge: str | Judge = "rules",
        max_text: int = 100_000,
        max_side: int = 16_384,
        max_pictures: int = 64,
        render_mode: str | None = None,
        **source: Any,
    ) -> None:
        if max_turns < 1:
            raise ConfigError(f"max_turns must be at least 1, got {max_turns}")
        if max_response_tokens is not None and count_tokens is None:
            raise ConfigError(
                "max_response_tokens needs count_tokens, for example "
                "lambda text: len(tokenizer(text).input_ids)"
            )
        if tool_call_policy not in ("first", "last"):
            raise ConfigError(f"tool_call_policy is 'first' or 'last', got '{tool_call_policy}'")
        if render_mode not in (None, "rgb_array"):
            raise ConfigError(f"render_mode is 'rgb_array' or None, got '{render_mode}'")
        self.render_mode = render_mode
        self.tools = [_choose(each) for each in (self.default_tools if tools is None else tools)]
        names = [tool.name for tool in self.tools]
        if len(set(names)) != len(names):
            raise ConfigError(f"two tools are shown under one name: {', '.join(names)}")
        self._tool_options = _by_own_name(tool_options or {}, self.tools)
        self._max_turns, self._policy = max_turns, tool_call_policy
        self._max_tokens, self._count_tokens = max_response_tokens, count_tokens
        self._tool_seconds = tool_time_limit_s
        self._runs = runs(self.tools, _isolation(tool_isolation), self._tool_options)
        self._overview_max_side = overview_max_side
        self._guideline = self.default_guideline if guideline is None else guideline
        self._judge = JUDGES.get(judge) if isinstance(judge, str) else judge
        self._max_text, self._max_side, self._max_pictures = max_text, max_side, max_pictures
        self._system_prompt = system_prompt(system_message, self.tools)
        self._source = source
        self._tasks: dict[str, TaskSource] = {}
        self.observation_space = spaces.Dict(
            {"text": UnicodeText(max_text), "images": Pictures(max_pictures, max_side)}
        )  # type: ignore[assignment]  # an Observation is such a dict
        self.action_space = UnicodeText(max_text)
        self._state: EpisodeState | None = None
        self._turns = self._tokens = 0
        self._seconds_left = 0.0
        self._shown: tuple[np.ndarray[Any, np.dtype[np.uint8]], ...] = ()

    # What subclasses give

    def load_tasks(self, split: str, **source: Any) -> TaskSource:
        """The tasks of a split, from the settings that the constructor did not know.

        Raises:
            ConfigError, DataError: they cannot be had.
        """
        raise ConfigError(f"{type(self).__name__} has no tasks; override load_tasks")

    def question(self, task: Task) -> str:
        """The words of the first user turn, after its pictures."""
        return f"{task.question}\n\n{self._guideline}" if self._guideline else task.question

    def reward(self, task: Task, answer: str) -> tuple[float, bool]:
        """Outcome reward and success of the final turn's text; here 1 or 0, as the judge says."""
        correct = self._judge.grade(answer, task.answers).correct
        return float(correct), correct

    # Gymnasium

    @property
    def episode(self) -> EpisodeState | None:
        """The episode that is being played, for those who look on; None between episodes."""
        return self._state

    def num_tasks(self, split: str) -> int:
        """How many tasks a split has."""
        return len(self._split(split))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Starts an episode; see the class for ``options``."""
        super().reset(seed=seed)
        task = self._choose_task(options or {})
        images = [source.open() for source in task.images]
        self._state = EpisodeState(
            task=task,
            images=images,
            frames=len(images) if task.is_video else 0,
            options=self._tool_options,
        )
        self._turns = self._tokens = 0
        self._seconds_left = self._tool_seconds
        self._shown = ()
        side = task.metadata.get("overview_max_side", self._overview_max_side)
        # Marks in a question would stand for pictures that are not there.
        words = self.question(task).replace(IMAGE_MARK, " ")
        text = IMAGE_MARK * len(images) + ("\n" if images else "") + words
        observation = self._observe(text, [_smaller(image, side) for image in images])
        return observation, {"task_id": task.id, "system_prompt": self._system_prompt}

    def step(self, action: str) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Takes one assistant turn; see the class for ``info``."""
        if self._state is None:
            raise gymnasium.error.ResetNeeded("call reset before step")
        self._turns += 1
        self._tokens += self._count(action)
        if self._over_budget():
            return self._cut_off({"tool_call": None})
        call, result = self._run_call(action, self._state)
        if result is None and call is None:
            return self._answer(action, self._state)
        info: dict[str, Any] = {"tool_call": call}
        if result is None:
            return self._cut_off(info)
        if self._seconds_left <= 0:
            info["time_limit"] = True
            return self._cut_off(info)
        self._tokens += self._count(result.text)
        if self._over_budget():
            return self._cut_off(info)
        self._state.images.extend(result.images)
        return self._observe(result.text, result.images), 0.0, False, False, info

    def render(self) -> Any:
        """The pictures the student was shown last, side by side: (height, width, 3) uint8.

        None without ``render_mode="rgb_array"``; a grey square while there is no picture.
        """
        if self.render_mode is None:
            return None
        if not self._shown:
            return np.full((56, 56, 3), 128, dtype=np.uint8)
        height = max(picture.shape[0] for picture in self._shown)
        padded = [
            np.pad(p, ((0, height - p.shape[0]), (0, 0), (0, 0)), constant_values=255)
            for p in self._shown
        ]
        return np.concatenate(padded, axis=1)

    # Parts of a step

    def _run_call(
        self, text: str, state: EpisodeState
    ) -> tuple[ToolCall | None, ToolResult | None]:
        """The turn's call and result; (None, None) without a call, no result if out of turns."""
        try:
            parsed = find_tool_call(text, self._policy)
        except ToolError as error:
            call = ToolCall("", {}, False, str(error))
            return call, None if self._turns >= self._max_turns else failure(str(error))
        if parsed is None:
            return None, None
        shown = parsed.arguments if isinstance(parsed.arguments, Mapping) else {}
        if self._turns >= self._max_turns:
            reason = "The last turn must answer; the tool was not run."
            return ToolCall(shorten(parsed.name), shown, False, reason), None
        # A name that is shown goes before another tool's alias.
        byname = sorted(self.tools, key=lambda tool: tool.name != parsed.name)
        tool = next((tool for tool in byname if tool.answers_to(parsed.name)), None)
        if tool is None:
            names = ", ".join(tool.name for tool in self.tools) or "none"
            reason = f"There is no tool '{shorten(parsed.name)}'. Tools: {names}."
            return ToolCall(shorten(parsed.name), shown, False, reason), failure(reason)
        call, result = tool.call(
            state, parsed.arguments, seconds=self._seconds_left, run=self._runs[tool.name]
        )
        self._seconds_left -= call.seconds
        if len(result.images) > self._max_pictures:
            reason = (
                f"The result has {len(result.images)} images; {self._max_pictures} can be shown."
            )
            return replace(call, ok=False, error=reason), failure(reason)
        return call, result

    def _answer(
        self, text: str, state: EpisodeState
    ) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        reward, success = self.reward(state.task, text)
        info = {"tool_call": None, "success": success, "answer": text}
        self._state = None
        return Observation(text="", images=()), reward, True, False, info

    def _cut_off(
        self, info: dict[str, Any]
    ) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        self._state = None
        return (
            Observation(text="", images=()),
            0.0,
            False,
            True,
            {**info, "success": False, "answer": None},
        )

    def _observe(self, text: str, images: Sequence[Image.Image]) -> Observation:
        if len(images) > self._max_pictures:
            raise ConfigError(
                f"an observation with {len(images)} pictures; max_pictures is {self._max_pictures}"
            )
        shown = tuple(np.array(_smaller(image, self._max_side).convert("RGB")) for image in images)
        if shown:  # a message without pictures leaves the last ones on the screen
            self._shown = shown
        return Observation(text=_shorter(text, self._max_text), images=shown)

    def _over_budget(self) -> bool:
        return self._max_tokens is not None and self._tokens > self._max_tokens

    def _count(self, text: str) -> int:
        return 0 if self._count_tokens is None else self._count_tokens(text)

    def _split(self, split: str) -> TaskSource:
        if split not in ("train", "eval"):
            raise ConfigError(f"split is 'train' or 'eval', got '{split}'")
        if split not in self._tasks:
            tasks = self.load_tasks(split, **self._source)
            if not len(tasks):
                raise ConfigError(f"the split '{split}' has no tasks")
            self._tasks[split] = tasks
        return self._tasks[split]

    def _choose_task(self, options: Mapping[str, Any]) -> Task:
        task = options.get("task")
        if task is not None:
            if not isinstance(task, Task):
                raise ConfigError(f"options['task'] must be a Task, got {type(task).__name__}")
            return task
        tasks = self._split(str(options.get("split", "train")))
        index = options.get("index")
        if index is None:
            index = int(self.np_random.integers(len(tasks)))
        if not 0 <= int(index) < len(tasks):
            raise ConfigError(f"there is no task {index}; the split has {len(tasks)}")
        return tasks[int(index)]


def _choose(choice: ToolChoice) -> Tool:
    if isinstance(choice, Tool):
        return choice
    if isinstance(choice, str):
        return TOOLS.get(choice)
    unknown = set(choice) - {"name", "as", "description", "parameters"}
    if unknown or "name" not in choice:
        raise ConfigError(
            "a tool is given as a name or as {name, as, description, parameters}, "
            f"got {dict(choice)}"
        )
    return TOOLS.get(choice["name"]).shown_as(
        choice.get("as"),
        description=choice.get("description"),
        parameters=choice.get("parameters"),
    )


def _isolation(given: Isolation | Mapping[str, Any] | str) -> Isolation:
    if isinstance(given, Isolation):
        return given
    settings = {"mode": given} if isinstance(given, str) else dict(given)
    unknown = set(settings) - {each.name for each in fields(Isolation)}
    if unknown:
        raise ConfigError(f"unknown settings of tool_isolation: {', '.join(sorted(unknown))}")
    fixed: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    return Isolation(**fixed)


def _by_own_name(
    options: Mapping[str, Mapping[str, Any]], tools: Sequence[Tool]
) -> dict[str, Mapping[str, Any]]:
    """The options under the names that the tools were registered by and look them up with."""
    named: dict[str, Mapping[str, Any]] = {}
    for key, settings in options.items():
        passed = key not in TOOLS and any(tool.answers_to(key) for tool in tools)
        name = key if passed else TOOLS.get(key).name
        named[name] = {**named.get(name, {}), **settings}
    return named


def _smaller(image: Image.Image, side: int | None) -> Image.Image:
    if side is None or max(image.size) <= side:
        return image
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Box-averaging first would be faster; bicubic with antialiasing is what processors do.
    return image.resize(size, Image.Resampling.BICUBIC)


def _shorter(text: str, most: int) -> str:
    """At most that many characters that can be encoded, with all image marks kept."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    kept, marks = text[:most], text.count(IMAGE_MARK)
    lost = marks - kept.count(IMAGE_MARK)
    while kept and len(kept) + lost > most:
        kept = kept[: max(0, most - lost)]
        lost = marks - kept.count(IMAGE_MARK)
    return kept + IMAGE_MARK * lost
