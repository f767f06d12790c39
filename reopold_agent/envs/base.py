"""The general tool environment: a question, tools, an answer.

A third party subclasses `ToolEnv`, adds tasks and perhaps tools and prompts, and registers the
class (`reopold_agent.envs.register_env`). `step` never raises because of the student's text: a bad
tool call gets an error message and the episode continues.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar, Literal, TypeAlias

import gymnasium
import numpy as np
from gymnasium import spaces
from PIL import Image

from reopold_agent.common.pictures import to_rgb
from reopold_agent.common.pixels import ShownSizes, smaller, stated
from reopold_agent.envs.checks import (
    check_answers,
    checked_source,
    checked_task,
    opened_pictures,
    outcome,
)
from reopold_agent.envs.spaces import Pictures, UnicodeText, as_observation, succeeded
from reopold_agent.errors import ConfigError, ToolError, suggestion
from reopold_agent.judges import JUDGES, Judge, Verdict
from reopold_agent.judges.registry import RULES, STATED
from reopold_agent.judges.rules import asks_for_another_form
from reopold_agent.tools import (
    BASE_PROMPT,
    TOOLS,
    EpisodeState,
    Isolation,
    Tool,
    ToolResult,
    find_tool_call,
)
from reopold_agent.tools.base import failure
from reopold_agent.tools.mcp import is_server, server_tools
from reopold_agent.tools.processes import runners_for
from reopold_agent.tools.prompt import with_tools
from reopold_agent.tools.schema import shorten
from reopold_agent.types import IMAGE_MARK, Observation, Task, TaskSource, ToolCall

ToolChoice: TypeAlias = "str | Mapping[str, Any] | Tool | Callable[..., ToolResult]"
"""A tool, its name, a function of which one is made (`Tool.of`), or a mapping with ``name`` and
what the model is shown instead of the tool's own: ``as`` (a name), ``description``, ``parameters``
(a JSON schema). ``mcp:...``, or a mapping with ``mcp``, stands for the tools of a server
(`reopold_agent.tools.mcp`)."""


class ToolEnv(gymnasium.Env[Observation, str]):
    """A multi-turn environment with tools.

    An action is an assistant's turn as text. It calls one tool (``<tool_call>`` with a JSON
    object), or it is the answer. An answer, or a tool that says so (`ToolResult.done`), ends the
    episode as ``terminated``, a budget as ``truncated``. A call in the last turn is run: it may be
    the one that succeeds.

    ``reset`` takes ``options``: ``task`` (a `Task`), or ``split`` ("train" or "eval", default
    "train") and ``index``; without ``task`` and ``index``, the seed picks a task. Its info holds
    ``task_id``, ``system_prompt`` and, for a task with earlier turns, ``history``: a list of
    (role, observation). The info of ``step`` holds ``tool_call`` (`ToolCall` or None)
    and, at the end, ``success``, ``answer`` (None unless the student gave one), and ``time_limit``
    or ``cut_short`` if that ended the episode.

    Args:
        tools: tools that the student may call, in the order shown; None for the class's default.
        tool_options: per tool (by name or alias), settings that it finds in ``state.options``.
        max_turns: assistant turns; a tool call in the last one truncates the episode, unless the
            tool ends it.
        max_response_tokens: budget for all text after the prompt, counted by ``count_tokens``
            without pictures. (Rollouts have an exact budget in token ids.)
        count_tokens: number of tokens of a text.
        tool_call_policy: which of several calls in one turn runs, "first" or "last".
        tool_time_limit_s: time limit of all tool calls of an episode together, seconds.
        tool_isolation: which tools run in worker processes, and what these may do: an
            `Isolation`, its settings, or only its ``mode``. By default none do.
        overview_max_side: limit of the longer side of the prompt's pictures as shown, pixels;
            tools work on the originals. A task's metadata may override it.
        system_message: text before the tool block; None for the task's own (metadata
            ``system_message``, from rows of verl), or the class's default if it has none.
        guideline: text after the question; None for the class's default.
        judge: grades the answer: a name (``rules``, or a plugin's) or a `Judge`.
        max_text, max_side, max_pictures: bounds of the observation space, in characters, pixels
            and pictures. Longer texts are cut at the end, larger pictures scaled down.
        render_mode: ``"rgb_array"`` or None.
        **source: settings for `load_tasks`.

    Attributes:
        tools: the tools as the model is shown them.
        sizes: how the caller resizes the pictures for the model; boxes in pixels, and the sizes in
            texts, are those of the result. `show_as` sets it; by default there is no resize.
        cut_short: whether a token budget of the caller cut the turn that the next ``step`` gets;
            `take_turn` sets it.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 1}  # noqa: RUF012  # Gymnasium declares it so
    default_tools: ClassVar[Sequence[ToolChoice]] = ()
    default_guideline: ClassVar[str] = "Put your final answer within \\boxed{}."
    default_system_message: ClassVar[str] = BASE_PROMPT

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
        system_message: str | None = None,
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
        choices = self.default_tools if tools is None else tools
        self.tools = [tool for choice in choices for tool in _choose(choice)]
        names = [tool.name for tool in self.tools]
        if len(set(names)) != len(names):
            raise ConfigError(
                f"two tools are shown under one name: {', '.join(names)}\nGive one another: "
                "{name: NAME, as: OTHER}, or for a server's tools {mcp: ..., as: 'files_*'}."
            )
        self._tool_options = _by_own_name(
            tool_options or {}, self.tools, self.default_tool_options()
        )
        self.tools = [each.with_options(_options(each, self._tool_options)) for each in self.tools]
        self._schemas = [each.schema() for each in self.tools]
        self.sizes = ShownSizes()
        self.cut_short = False
        self._max_turns, self._policy = max_turns, tool_call_policy
        self._max_tokens, self._count_tokens = max_response_tokens, count_tokens
        self._tool_seconds = tool_time_limit_s
        self._runners = runners_for(self.tools, _isolation(tool_isolation), self._tool_options)
        self._overview_max_side = overview_max_side
        self._guideline = self.default_guideline if guideline is None else guideline
        self._judge = JUDGES.get(judge) if isinstance(judge, str) else judge
        self._max_text, self._max_side, self._max_pictures = max_text, max_side, max_pictures
        self._system_message = system_message
        self._source = self._known(source)
        _state_of(self.reward, None)
        self._tasks: dict[str, TaskSource] = {}
        self.observation_space = spaces.Dict(
            {"text": UnicodeText(max_text), "images": Pictures(max_pictures, max_side)}
        )  # type: ignore[assignment]  # an Observation is such a dict
        self.action_space = UnicodeText(max_text)
        self._state: EpisodeState | None = None
        self._turns = self._tokens = 0
        self._seconds_left = 0.0
        self._last_shown: list[Image.Image] = []  # only if `render` needs them

    # What subclasses define

    def default_tool_options(self) -> Mapping[str, Mapping[str, Any]]:
        """Returns options by the tools' registered names, which ``tool_options`` overrides."""
        return {}

    def load_tasks(self, split: str, *args: Any, **source: Any) -> TaskSource:
        """Returns the tasks of a split.

        Subclasses define ``load_tasks(self, split)``, with further parameters for settings of the
        tasks: the constructor passes those that it does not know, and refuses those that this
        method does not know either. (``args`` is in the signature so that type checkers accept
        this.)

        Args:
            split: "train" or "eval".
            *args: not used.
            **source: settings of the tasks.

        Raises:
            ConfigError, DataError: they cannot be loaded.
        """
        raise ConfigError(f"{type(self).__name__} has no tasks; override load_tasks")

    def question(self, task: Task) -> str:
        """Returns the text of the first user turn, which follows its pictures."""
        return f"{task.question}\n\n{self._guideline}" if self._guideline else task.question

    def system_message(self, task: Task) -> str:
        """Returns the text of the system message, without the tools."""
        message = self._system_message
        if message is None:
            message = self.own_system_message(task)
        return self.default_system_message if message is None else message

    def system_prompt(self, task: Task) -> str:
        """Returns the system message: its text, and the tools."""
        return self.with_tools(self.system_message(task))

    def with_tools(self, message: str) -> str:
        """Returns a system message's text with the tools behind it."""
        return with_tools(message, self._schemas)

    def teacher_prompt(self, task: Task) -> str | None:
        """Returns what only a teacher is told of a task, after the question; here nothing.

        It is read with ``model.teacher.view.hint=environment``. The student never sees it.
        """
        return None

    def own_system_message(self, task: Task) -> str | None:
        """Returns the task's own system message if it counts; None otherwise.

        One that has a tool block (VerlTool's) does not: the block says which tools this environment
        has.
        """
        own: str | None = task.metadata.get("system_message")
        return None if self._system_message is not None or "<tools>" in (own or "") else own

    def opened(self, task: Task) -> Task:
        """Returns a task as this episode asks it; here it stays as it is.

        Called first at each reset, for an environment whose first observation comes about only
        then.
        """
        return task

    def without_pictures(self) -> None:
        """Prepares for a model that reads text only; here nothing is to be done.

        Raises:
            ModelError: the environment cannot do without pictures.
        """

    def begin(self, task: Task, state: EpisodeState) -> None:
        """Prepares an episode, before its first observation; here it does nothing.

        What the tools change in the course of the episode belongs in ``state.extra``.
        """

    def reward(self, task: Task, answer: str, *args: Any, **kwargs: Any) -> tuple[float, bool]:
        """Returns the reward at the end of an episode, and its success: here 1 or 0, by the judge.

        Subclasses define ``reward(self, task, answer)``, where the answer decides, or
        ``reward(self, task, answer, state)``, where the state does. (Any further arguments are in
        the signature so that type checkers accept both.)

        Args:
            task: the question.
            answer: the student's last turn; empty if a tool ended the episode.
            *args: the `EpisodeState`, with what the tools noted in ``extra``.
            **kwargs: not used.

        Raises:
            EnvironmentCodeError: the rules are to compare the answer, but the task has none.
        """
        if self._judge is RULES:
            check_answers(task, type(self).__name__)
        correct = self._graded(task, answer).correct
        return float(correct), correct

    def truncation_reward(self, task: Task, state: EpisodeState) -> tuple[float, bool]:
        """Returns reward and success of an episode that a budget ends: here 0 and no success.

        Budgets are turns, tokens and the time of tools, of the environment or of its caller. A turn
        without a call that a token budget of the caller cut is such an end only where a subclass
        overrides this; otherwise it is graded, since it may hold an answer (`reward`).
        """
        return 0.0, False

    # Gymnasium

    @property
    def episode(self) -> EpisodeState | None:
        """The running episode, for a viewer; None between episodes."""
        return self._state

    @property
    def max_turns(self) -> int:
        """Most assistant turns of an episode."""
        return self._max_turns

    @property
    def max_pictures(self) -> int:
        """Most pictures of an observation."""
        return self._max_pictures

    def num_tasks(self, split: str) -> int:
        """Returns the number of tasks of a split."""
        return len(self._split(split))

    def task(self, split: str, index: int) -> Task:
        """Returns a task of a split."""
        return self._choose_task({"split": split, "index": index})

    def verdict(self, task: Task, answer: str) -> Verdict | None:
        """Returns how the judge reads an answer; None if `reward` does not ask the judge."""
        if type(self).reward is not ToolEnv.reward:
            return None
        return self._graded(task, answer)

    def _graded(self, task: Task, answer: str) -> Verdict:
        judge = self._judge
        if judge is RULES:
            prompt = f"{self.system_message(task)}\n{self.question(task)}"
            judge = STATED if asks_for_another_form(prompt) else RULES
        return judge.verdict(answer, task)

    def end_episode(self) -> None:
        """Ends the episode, if one is running, and lets go of its pictures."""
        self._state = None

    def truncate(self) -> tuple[float, bool]:
        """Ends the running episode at a budget of the caller; returns its reward and success."""
        if self._state is None:
            raise gymnasium.error.ResetNeeded("call reset before truncate")
        given = self.truncation_reward(self._state.task, self._state)
        verdict = outcome(given, f"{type(self).__name__}.truncation_reward")
        self.end_episode()
        return verdict

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Starts an episode; the class documents ``options``."""
        super().reset(seed=seed)
        task = self._choose_task(options or {})
        self.end_episode()  # before pictures are opened
        task = self.opened(task)
        images = list(map(to_rgb, opened_pictures(task, type(self).__name__)))
        side = task.metadata.get("overview_max_side", self._overview_max_side)
        self._state = EpisodeState(
            task=task,
            images=images,
            frames=len(images) if task.is_video else 0,
            options=self._tool_options,
            sizes=self.sizes,
            overview_side=side,
            side=self._max_side,
        )
        self._turns = self._tokens = 0
        self._seconds_left = self._tool_seconds
        self._last_shown = []
        self.begin(task, self._state)
        shown = [_smaller(image, side) for image in images]
        texts = [*(text for _, text in task.history), self.question(task)]
        if not images or sum(text.count(IMAGE_MARK) for text in texts) != len(images):
            # A mark would stand for a picture that does not exist.
            texts = [text.replace(IMAGE_MARK, " ") for text in texts]
            texts[-1] = IMAGE_MARK * len(images) + ("\n" if images else "") + texts[-1]
        texts[-1] += self._sizes_of(self._state)
        remaining = iter(shown)
        observations = [
            self._observe(text, list(itertools.islice(remaining, text.count(IMAGE_MARK))))
            for text in texts
        ]
        info: dict[str, Any] = {"task_id": task.id, "system_prompt": self.system_prompt(task)}
        if task.history:
            roles = [role for role, _ in task.history]
            info["history"] = list(zip(roles, observations, strict=False))
        return observations[-1], info

    def step(self, action: str) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Takes one assistant turn; the class documents ``info``."""
        state = self._state
        if state is None:
            raise gymnasium.error.ResetNeeded("call reset before step")
        cut, self.cut_short = self.cut_short, False
        self._turns += 1
        self._tokens += self._count(action)
        if self._over_budget():
            return self._cut_off({"tool_call": None, "cut_short": True})
        done = self._run_call(action, state)
        if done is None:
            if cut and type(self).truncation_reward is not ToolEnv.truncation_reward:
                return self._cut_off({"tool_call": None, "cut_short": True})
            return self._end({"tool_call": None, "answer": action}, self._verdict(action, state))
        call, result = done
        info: dict[str, Any] = {"tool_call": call}
        if result.done:
            return self._end({**info, "answer": None}, self._decided(result, state), result)
        self._tokens += self._count(result.text)
        reward = float(result.reward or 0.0)
        if self._turns >= self._max_turns:
            return self._cut_off(info, reward)
        if self._seconds_left <= 0:
            return self._cut_off({**info, "time_limit": True}, reward)
        if self._over_budget():
            return self._cut_off({**info, "cut_short": True}, reward)
        state.images.extend(result.images)
        return self._observe(result.text, result.images), reward, False, False, info

    def render(self) -> Any:
        """Returns the last shown pictures side by side: (height, width, 3) uint8.

        None without ``render_mode="rgb_array"``; a grey square if no picture was shown.
        """
        if self.render_mode is None:
            return None
        if not self._last_shown:
            return np.full((56, 56, 3), 128, dtype=np.uint8)
        pictures = [np.asarray(picture) for picture in self._last_shown]
        height = max(picture.shape[0] for picture in pictures)
        padded = [
            np.pad(p, ((0, height - p.shape[0]), (0, 0), (0, 0)), constant_values=255)
            for p in pictures
        ]
        return np.concatenate(padded, axis=1)

    # Parts of a step

    def _run_call(
        self, text: str, state: EpisodeState
    ) -> tuple[ToolCall | None, ToolResult] | None:
        """Returns the turn's call and its result; None if the turn has no call.

        A subclass whose episodes go on after such a turn returns no call and a result.
        """
        try:
            parsed = find_tool_call(text, self._policy)
        except ToolError as error:
            return ToolCall("", {}, False, str(error)), failure(str(error))
        if parsed is None:
            return None
        shown = parsed.arguments if isinstance(parsed.arguments, Mapping) else {}
        # The shown name of one tool takes precedence over an alias of another.
        byname = sorted(self.tools, key=lambda tool: tool.name != parsed.name)
        tool = next((tool for tool in byname if tool.answers_to(parsed.name)), None)
        if tool is None:
            names = ", ".join(tool.name for tool in self.tools) or "none"
            reason = f"There is no tool '{shorten(parsed.name)}'. Tools: {names}."
            return ToolCall(shorten(parsed.name), shown, False, reason), failure(reason)
        call, result = tool.call(
            state, parsed.arguments, seconds=self._seconds_left, run=self._runners[tool.name]
        )
        self._seconds_left -= call.seconds
        if len(result.images) > self._max_pictures and not result.done:
            reason = (
                f"The result has {len(result.images)} images; {self._max_pictures} can be shown."
            )
            return replace(call, ok=False, error=reason), failure(reason)
        return call, result

    def _verdict(self, answer: str, state: EpisodeState) -> tuple[float, bool]:
        positional, named = _state_of(self.reward, state)
        given = self.reward(state.task, answer, *positional, **named)
        return outcome(given, f"{type(self).__name__}.reward")

    def _decided(self, result: ToolResult, state: EpisodeState) -> tuple[float, bool]:
        """Returns reward and success of an episode that a tool ends."""
        if result.reward is None:
            return self._verdict("", state)
        success = result.reward > 0 if result.success is None else result.success
        return float(result.reward), bool(success)

    def _end(
        self, info: dict[str, Any], verdict: tuple[float, bool], result: ToolResult | None = None
    ) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        reward, success = verdict
        self.end_episode()
        last = Observation(text="", images=())
        if result is not None:  # a game's last picture, say
            fits = len(result.images) <= self._max_pictures
            text = result.text if fits else result.text.replace(IMAGE_MARK, " ")
            last = self._observe(text, result.images if fits else ())
        return last, reward, True, False, {**info, "success": success}

    def _cut_off(
        self, info: dict[str, Any], reward: float = 0.0
    ) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        last, success = self.truncate()
        info = {**info, "success": success, "answer": None}
        return Observation(text="", images=()), reward + last, False, True, info

    def _observe(self, text: str, images: Sequence[Image.Image]) -> Observation:
        if len(images) > self._max_pictures:
            raise ConfigError(
                f"an observation with {len(images)} pictures; max_pictures is {self._max_pictures}"
            )
        pictures = [_smaller(image, self._max_side) for image in images]
        if pictures and self.render_mode is not None:
            self._last_shown = pictures  # until there are new ones
        shown = tuple(np.array(picture) for picture in pictures)
        return Observation(text=_shorter(text, self._max_text), images=shown)

    def _sizes_of(self, state: EpisodeState) -> str:
        """Returns the sizes of the question's pictures, for tools whose words refer to them."""
        if not state.images or not any(tool.needs_sizes for tool in self.tools):
            return ""
        shown = [state.shown(number) for number in range(1, len(state.images) + 1)]
        return f"\n\n(Image {stated(shown)})"

    def _over_budget(self) -> bool:
        return self._max_tokens is not None and self._tokens > self._max_tokens

    def _count(self, text: str) -> int:
        return 0 if self._count_tokens is None else self._count_tokens(text)

    def _known(self, source: dict[str, Any]) -> dict[str, Any]:
        """Returns settings for `load_tasks`, which would otherwise fail at the first task.

        Raises:
            ConfigError: neither it nor a constructor has such a setting.
        """
        own = inspect.signature(self.load_tasks).parameters
        if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in own.values()):
            return source
        known = {*own, *_settings(type(self))} - {"split"}
        for name in source:
            if name not in own or name == "split":
                raise ConfigError(
                    f"{type(self).__name__} has no setting '{name}'\n{suggestion(name, known)}"
                    f"Known: {', '.join(sorted(known))}."
                )
        return source

    def _split(self, split: str) -> TaskSource:
        if split not in ("train", "eval"):
            raise ConfigError(f"split is 'train' or 'eval', got '{split}'")
        if split not in self._tasks:
            given = self.load_tasks(split, **self._source)
            tasks = checked_source(given, f"{type(self).__name__}.load_tasks('{split}')")
            if not len(tasks):
                raise ConfigError(f"the split '{split}' has no tasks")
            self._tasks[split] = tasks
        return self._tasks[split]

    def _choose_task(self, options: Mapping[str, Any]) -> Task:
        task = options.get("task")
        if task is not None:
            if not isinstance(task, Task):
                raise ConfigError(f"options['task'] must be a Task, got {type(task).__name__}")
            return self._checked(task)
        tasks = self._split(str(options.get("split", "train")))
        index = options.get("index")
        if index is None:
            index = int(self.np_random.integers(len(tasks)))
        if not 0 <= int(index) < len(tasks):
            raise ConfigError(f"there is no task {index}; the split has {len(tasks)}")
        return self._checked(tasks[int(index)])

    def _checked(self, task: Any) -> Task:
        checked = checked_task(task, type(self).__name__)
        judged = type(self).reward is ToolEnv.reward and self._judge is RULES
        if judged and not self.tools:  # a tool may decide
            check_answers(checked, type(self).__name__)
        return checked


def take_turn(
    env: gymnasium.Env[Any, Any], turn: str, finish: Literal["stop", "length"] = "stop"
) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
    """Takes a step; asks the hook of a `ToolEnv` whose episode a wrapper (a time limit) ended.

    Args:
        env: the environment.
        turn: the student's.
        finish: how it ended (`Turn.finish`); "length" says that a token budget cut it.

    Raises:
        ValueError: the episode goes on, and what the environment shows is no observation.
    """
    inner = env.unwrapped
    if isinstance(inner, ToolEnv):
        inner.cut_short = finish == "length"
    observation, reward, terminated, truncated, info = env.step(turn)
    ended = terminated or truncated
    if ended and isinstance(inner, ToolEnv) and inner.episode is not None:
        last, success = inner.truncate()
        reward, info = float(reward) + last, {**info, "success": success}
    try:
        shown = as_observation(observation)
    except ValueError:
        if not ended:
            raise
        shown = Observation(text="", images=())  # nobody answers it
    return shown, float(reward), terminated, truncated, info


def truncate_episode(env: gymnasium.Env[Any, Any], info: Mapping[str, Any]) -> tuple[float, bool]:
    """Ends an episode at a budget of its caller; returns the reward for that and the success.

    An environment that is no `ToolEnv` is not asked; only its word in ``info``, of its last step,
    makes this a success.
    """
    inner = env.unwrapped
    return inner.truncate() if isinstance(inner, ToolEnv) else (0.0, succeeded(info, 0.0))


def show_as(env: gymnasium.Env[Any, Any], sizes: ShownSizes) -> None:
    """Tells an environment how pictures are resized for the model, from its next episode on.

    Environments that are no `ToolEnv` do not know of sizes and stay as they are.
    """
    inner = env.unwrapped
    if isinstance(inner, ToolEnv):
        inner.sizes = sizes


def without_pictures(env: gymnasium.Env[Any, Any]) -> None:
    """Tells an environment that the model reads text only.

    Environments that are no `ToolEnv` are not told.

    Raises:
        ModelError: the environment cannot do without pictures.
    """
    inner = env.unwrapped
    if isinstance(inner, ToolEnv):
        inner.without_pictures()


def end_episode(env: gymnasium.Env[Any, Any]) -> None:
    """Lets a `ToolEnv` go of the pictures of an episode that its caller gives up."""
    inner = env.unwrapped
    if isinstance(inner, ToolEnv):
        inner.end_episode()


def _settings(environment: type) -> set[str]:
    """Returns the names of the settings of all constructors of a class."""
    made = [vars(each)["__init__"] for each in environment.__mro__ if "__init__" in vars(each)]
    named = [each for one in made for each in inspect.signature(one).parameters.values()]
    return {each.name for each in named if each.kind is inspect.Parameter.KEYWORD_ONLY}


def _state_of(
    reward: Callable[..., Any], state: EpisodeState | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the state as the arguments with which an environment's ``reward`` takes it, if any.

    It takes it as a third parameter that is required or named ``state``, or as a keyword ``state``.

    Raises:
        ConfigError: it needs other arguments than task, answer and state.
    """
    given = inspect.signature(reward).parameters.values()
    kinds = inspect.Parameter
    if any(each.kind is kinds.KEYWORD_ONLY and each.name == "state" for each in given):
        arguments: tuple[tuple[Any, ...], dict[str, Any]] = (), {"state": state}
    else:
        places = [
            e for e in given if e.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
        ]
        third = places[2] if len(places) > 2 else None
        takes = third is not None and (third.default is kinds.empty or third.name == "state")
        takes = takes or any(each.kind is kinds.VAR_POSITIONAL for each in given)
        arguments = ((state,) if takes else ()), {}
    try:
        inspect.signature(reward).bind("task", "answer", *arguments[0], **arguments[1])
    except TypeError as error:
        raise ConfigError(
            f"reward is called with a task, an answer and perhaps a state: {error}.\n"
            "Define it as reward(self, task, answer) or reward(self, task, answer, state)."
        ) from None
    return arguments


def _choose(choice: ToolChoice) -> list[Tool]:
    if isinstance(choice, Tool):
        return [choice]
    if is_server(choice):
        return server_tools(choice)
    if isinstance(choice, str):
        return [TOOLS.get(choice)]
    if callable(choice):
        return [Tool.of(choice)]
    unknown = set(choice) - {"name", "as", "description", "parameters"}
    if unknown or "name" not in choice:
        raise ConfigError(
            "a tool is given as a name, a function, or as {name, as, description, parameters}, "
            f"got {dict(choice)}"
        )
    shown = TOOLS.get(choice["name"]).shown_as(
        choice.get("as"),
        description=choice.get("description"),
        parameters=choice.get("parameters"),
    )
    return [shown]


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
    options: Mapping[str, Mapping[str, Any]],
    tools: Sequence[Tool],
    defaults: Mapping[str, Mapping[str, Any]],
) -> dict[str, Mapping[str, Any]]:
    """Returns options under the names that tools are registered by and look their options up by."""
    named = dict(defaults)
    for key, settings in options.items():
        passed = key not in TOOLS and any(tool.answers_to(key) for tool in tools)
        name = key if passed else TOOLS.get(key).name
        named[name] = {**named.get(name, {}), **settings}
    return named


def _options(tool: Tool, options: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    return next((options[name] for name in (tool.name, *tool.aliases) if name in options), {})


def _smaller(image: Image.Image, side: int | None) -> Image.Image:
    size = smaller(image.size, side)
    if size == image.size:
        return image
    # Bicubic with antialiasing, as image processors do it; averaging boxes first would be faster.
    return image.resize(size, Image.Resampling.BICUBIC)


def _shorter(text: str, most: int) -> str:
    """Cuts a text to so many characters that can be encoded, and keeps all image marks."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    kept, marks = text[:most], text.count(IMAGE_MARK)
    lost = marks - kept.count(IMAGE_MARK)
    while kept and len(kept) + lost > most:
        kept = kept[: max(0, most - lost)]
        lost = marks - kept.count(IMAGE_MARK)
    return kept + IMAGE_MARK * lost
