"""The game: connects an environment with a player at a terminal, by the rules of a rollout."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reopold_agent.envs.base import ToolEnv, take_turn, truncate_episode
from reopold_agent.envs.from_config import num_tasks
from reopold_agent.envs.registration import task_seed
from reopold_agent.envs.spaces import Part, as_observation, parts_of, succeeded
from reopold_agent.errors import ReopoldError
from reopold_agent.play.calls import BadWordsError, call_text, usage
from reopold_agent.play.lines import Lines
from reopold_agent.play.record import Recorder
from reopold_agent.play.screen import Screen
from reopold_agent.play.timed import TimedEnv
from reopold_agent.tools import Tool
from reopold_agent.types import PixelArray, StopReason, Task, ToolCall

if TYPE_CHECKING:
    from reopold_agent.play.budget import Budget

HELP = """
What you type is the model's turn, word for word: a tool call in <tool_call> tags (on one line or
several), or the answer, for example \\boxed{7}. Lines that begin with / are commands:
  /call TOOL VALUES...   call a tool: /call crop_image 0.1 0.1 0.5 0.5 1, or with names:
                         /call crop_image bbox_2d=0.1,0.1,0.5,0.5 target_image=1
  /raw                   a turn of several lines, up to a line /end
  /tools, /system        the tools' schemas; the system message
  /look [N]              show the pictures again, or only number N
  /state                 turns, tokens and pictures so far
  /next, /task INDEX     go to the next task, or to that one; abandons a running episode
  /help, /quit           (the end of the input and Ctrl-C quit as well)
""".strip()


@dataclass(frozen=True)
class Rules:
    """What to play and what to record.

    Attributes:
        split: ``train`` or ``eval``.
        max_turns: assistant turns, as in a rollout.
        seed: of the environment; None for the seed that a task has in every run.
        keep: which episodes to record: ``right`` or ``all``.
    """

    split: str
    max_turns: int
    seed: int | None = None
    keep: str = "right"


@dataclass
class Episode:
    """An episode as the player has seen it; ``task`` is None unless the env is a `ToolEnv`.

    The first ``earlier`` turns are the system message and those that the task begins with.
    """

    index: int
    task_id: str
    system: str
    task: Task | None
    turns: list[tuple[str, list[Part]]] = field(default_factory=list)
    earlier: int = 0
    shown: list[PixelArray] = field(default_factory=list)
    said: int = 0
    reward: float = 0.0
    success: bool = False
    stop: StopReason | None = None


class Game:
    """Plays episodes until the player quits.

    Args:
        env: an environment whose actions are texts, with its time limit.
        screen, lines: output to and input from the player.
        rules: what to play.
        recorder: saves finished episodes; None to save none.
        budget: counts tokens; None to count none.
    """

    def __init__(
        self,
        env: TimedEnv,
        screen: Screen,
        lines: Lines,
        rules: Rules,
        recorder: Recorder | None = None,
        budget: Budget | None = None,
    ) -> None:
        self._env, self._screen, self._lines, self._rules = env, screen, lines, rules
        self._recorder, self._budget = recorder, budget
        self._tasks = num_tasks(env.env, rules.split)
        self._episode: Episode | None = None
        self._index = 0
        self.finished: list[Episode] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: screen.say(HELP),
            "/tools": self._show_tools,
            "/system": self._show_system,
            "/call": self._call,
            "/raw": lambda _: self._say(lines.block()),
            "/look": self._look,
            "/state": self._show_state,
            "/next": lambda _: self._begin(self._index + 1),
            "/task": self._task,
        }

    def play(self, index: int) -> None:
        """Plays tasks from ``index`` on until ``/quit`` or the end of the input.

        Raises:
            ReopoldError: the first task cannot be loaded.
        """
        self._screen.say("Type what the model would say; /help lists commands.", "dim")
        self._begin(index)
        while (line := self._lines.line("> ")) is not None:
            word, _, rest = line.strip().partition(" ")
            if word == "/quit":
                return
            if not word:
                self._begin(self._index + 1) if self._over else None
            elif word in self._commands:
                self._commands[word](rest.strip())
            elif word.startswith("/"):
                known = ", ".join([*self._commands, "/quit"])
                self._problem(f"there is no command {word}; there are {known}")
            else:
                self._say(self._lines.rest_of_call(line))

    def score(self) -> str:
        """Returns a line that sums up the finished episodes."""
        count = len(self.finished)
        if not count:
            return "No episode was finished."
        right = sum(episode.success for episode in self.finished)
        mean = sum(episode.reward for episode in self.finished) / count
        return f"{count} episodes, {right} right ({right / count:.2f}), mean reward {mean:.2f}"

    def complete(self, line: str) -> Sequence[str]:
        """Returns the possible completions of the last word of a line."""
        before = line.split(" ")[:-1]
        if not before:
            return [*self._commands, "/quit"] if line.startswith("/") else []
        if before[0] != "/call":
            return []
        tools = {tool.name: tool for tool in self._tools}
        if len(before) == 1:
            return list(tools)
        if before[1] not in tools:
            return []
        return [f"{name}=" for name in tools[before[1]].schema()["function"]["parameters"]
                ["properties"]]  # fmt: skip

    # Episodes

    @property
    def _over(self) -> bool:
        return self._episode is None or self._episode.stop is not None

    @property
    def _tools(self) -> list[Tool]:
        inner = self._env.env.unwrapped
        return inner.tools if isinstance(inner, ToolEnv) else []

    def _begin(self, index: int) -> None:
        """Starts an episode; only a failure of the first one ends the game."""
        first = self._episode is None and not self.finished
        if not 0 <= index < self._tasks:
            self._problem(
                f"there is no task {index}: '{self._rules.split}' has {self._tasks}, from 0"
            )
            return
        seed = self._rules.seed
        seed = task_seed(self._rules.split, index) if seed is None else seed
        try:
            options = {"split": self._rules.split, "index": index}
            observation, info = self._env.ask(lambda env: env.reset(seed=seed, options=options))
            observation = as_observation(observation)
        except Exception as error:  # of a third party: only this episode is lost
            if first and isinstance(error, ReopoldError):
                raise
            self._failed("reset", error)
            self._episode = None
            return
        inner = self._env.env.unwrapped
        state = inner.episode if isinstance(inner, ToolEnv) else None
        name = str(info.get("task_id", f"{self._rules.split}-{index}"))
        system = str(info.get("system_prompt", ""))
        episode = Episode(index, name, system, None if state is None else state.task)
        self._episode, self._index = episode, index
        if system:
            episode.turns.append(("system", [system]))
        turns = self._rules.max_turns
        self._screen.say(
            f"\ntask {index} of {self._tasks} in {self._rules.split} ({name}), "
            f"{turns} turn{'s' if turns > 1 else ''}",
            "bold",
        )
        for role, turn in info.get("history", ()):
            self._screen.say(f"earlier turn of the {role}:", "dim")
            self._show(turn, role)
        episode.earlier = len(episode.turns)
        self._show(observation)
        self._count(lambda budget: budget.begin(observation, info))

    def _say(self, text: str) -> None:
        """Takes the player's turn: steps the environment and shows its observation."""
        episode = self._episode
        if episode is None or episode.stop is not None:
            self._problem(
                "the episode is over, so this was not sent; press Enter or type /next to continue"
            )
            return
        episode.said += 1
        episode.turns.append(("assistant", [text]))
        self._count(lambda budget: budget.turn(text))
        try:
            observation, reward, terminated, truncated, info = self._env.ask(
                lambda env: take_turn(env, text)
            )
        except Exception as error:  # as above
            self._failed("step", error)
            self._end(episode, StopReason.ENV_ERROR)
            return
        episode.reward += float(reward)
        ended = bool(terminated or truncated)
        self._tell_call(info.get("tool_call"), ended)
        if ended:
            episode.success = succeeded(info, episode.reward)
            if observation["text"]:
                self._show(observation)
            late = StopReason.TIME_LIMIT if info.get("time_limit") else StopReason.MAX_TURNS
            self._end(episode, StopReason.ANSWER if terminated else late)
            return
        self._show(observation)
        if episode.said >= self._rules.max_turns:
            self._truncate(episode, StopReason.MAX_TURNS, info)
            return
        self._count(lambda budget: budget.answer(observation))
        if self._budget is not None and not self._budget.fits:
            self._truncate(episode, StopReason.MAX_TOKENS, info)

    def _truncate(self, episode: Episode, stop: StopReason, info: Mapping[str, Any]) -> None:
        """Ends an episode at a budget that its environment does not know."""
        try:
            reward, episode.success = self._env.ask(lambda env: truncate_episode(env, info))
        except Exception as error:  # as above
            self._failed("truncation_reward", error)
            self._end(episode, StopReason.ENV_ERROR)
            return
        episode.reward += reward
        self._end(episode, stop)

    def _end(self, episode: Episode, stop: StopReason) -> None:
        episode.stop = stop
        self.finished.append(episode)
        right = "right" if episode.success else "wrong"
        style = "bold green" if episode.success else "bold red"
        self._screen.say(f"{right}: reward {episode.reward:g}, ended by {stop}", style)
        if episode.task is not None and episode.task.answers:
            self._screen.say(f"right answer: {' or '.join(episode.task.answers)}")
        self._record(episode)
        self._screen.say("Enter or /next for the next task, /task INDEX, /quit", "dim")

    def _record(self, episode: Episode) -> None:
        if self._recorder is None or episode.stop is StopReason.ENV_ERROR:
            return
        if self._rules.keep == "right" and not episode.success:
            self._screen.say("not recorded: it is wrong (keep=all records every episode)", "dim")
            return
        turns = episode.turns
        while turns and turns[-1][0] != "assistant":  # an observation without an answer
            turns = turns[:-1]
        facts = {
            "id": episode.task_id,
            "split": self._rules.split,
            "index": episode.index,
            "success": episode.success,
            "reward": episode.reward,
            "stop": str(episode.stop),
        }
        self._recorder.add(turns, facts, earlier=episode.earlier)
        self._screen.say("recorded", "dim")

    # What is shown

    def _show(self, observation: Any, role: str = "user") -> None:
        """Shows an observation and keeps it as a turn."""
        episode = self._episode
        if episode is None:
            return
        parts = parts_of(observation)
        episode.turns.append((role, parts))
        for part in parts:
            if isinstance(part, str):
                self._screen.say(part.strip("\n"))
            else:
                episode.shown.append(part)
                self._picture(episode, len(episode.shown))

    def _picture(self, episode: Episode, number: int) -> None:
        name = f"task-{episode.index}-picture-{number}"
        self._screen.picture(episode.shown[number - 1], name, f"picture {number}")

    def _tell_call(self, call: object, ended: bool) -> None:
        """Says how a call went, unless the next observation does."""
        if not isinstance(call, ToolCall):
            return
        if call.ok:
            self._screen.say(f"{call.name}: done in {call.seconds:.2f} s", "dim")
        elif ended:
            self._problem(f"{call.name or 'the call'}: {call.error}")

    def _count(self, count: Callable[[Budget], str]) -> None:
        if self._budget is None:
            return
        try:
            self._screen.say(count(self._budget), "dim")
        except (ReopoldError, ValueError, TypeError, KeyError) as error:
            # A rollout could not render this observation, but the game can go on.
            self._problem(f"tokens are not counted: {error}")

    def _problem(self, text: str) -> None:
        self._screen.say(text, "yellow")

    def _failed(self, where: str, error: Exception) -> None:
        told = str(error) if isinstance(error, ReopoldError) else traceback.format_exc()
        self._screen.say(f"the environment failed in {where}: {told}", "red")

    # Commands

    def _show_tools(self, _: str) -> None:
        if not self._tools:
            self._problem("this environment has no tools")
        for tool in self._tools:
            self._screen.say(usage(tool.schema()), "bold")
            self._screen.say(json.dumps(tool.schema(), indent=2, ensure_ascii=False))

    def _show_system(self, _: str) -> None:
        system = "" if self._episode is None else self._episode.system
        self._screen.say(system or "(no system message)")

    def _call(self, words: str) -> None:
        name, _, rest = words.partition(" ")
        tool = next((tool for tool in self._tools if tool.answers_to(name)), None)
        if tool is None:
            known = ", ".join(tool.name for tool in self._tools) or "none"
            self._problem(f"there is no tool '{name}'; there are: {known}")
            return
        if self._over:
            self._say("")  # reports that the episode is over
            return
        try:
            text = call_text(tool.schema(), rest)
        except BadWordsError as error:
            self._problem(str(error))
            return
        self._screen.say(text, "dim")
        self._say(text)

    def _look(self, words: str) -> None:
        episode = self._episode
        count = 0 if episode is None else len(episode.shown)
        chosen = range(1, count + 1)
        if words:
            if not words.isdecimal() or int(words) not in chosen:
                self._problem(f"there is no picture '{words}'; there are {count}, from 1")
                return
            chosen = range(int(words), int(words) + 1)
        for number in chosen:
            if episode is not None:
                self._picture(episode, number)
        if not count:
            self._problem("no picture was shown")

    def _show_state(self, _: str) -> None:
        episode = self._episode
        if episode is not None:
            ended = "" if episode.stop is None else f", ended by {episode.stop}"
            self._screen.say(
                f"task {episode.index}: turn {episode.said} of {self._rules.max_turns}, "
                f"reward {episode.reward:g}{ended}"
            )
            inner = self._env.env.unwrapped
            state = inner.episode if isinstance(inner, ToolEnv) else None
            for number, picture in enumerate(episode.shown, 1):
                shown = f"picture {number}: shown {picture.shape[1]}x{picture.shape[0]}"
                if state is not None and number <= len(state.images):
                    whole = state.images[number - 1]
                    shown += (
                        f", the model sees {state.shown(number)}"
                        f", tools work on {whole.width}x{whole.height}"
                    )
                self._screen.say(shown)
        if self._budget is not None:
            self._screen.say(f"tokens: prompt {self._budget.prompt}, after it {self._budget.used}")
        self._screen.say(self.score())

    def _task(self, words: str) -> None:
        if words.isdecimal():
            self._begin(int(words))
        else:
            self._problem(f"/task takes a number from 0 to {self._tasks - 1}")
