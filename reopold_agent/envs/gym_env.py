"""Any registered Gymnasium environment, played through one tool: ``env=gym:ID``."""

from __future__ import annotations

import enum
import importlib
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec, load_env_creator
from PIL import Image
from typing_extensions import override

from reopold_agent.common.bounded import DeadlineError, run_bounded
from reopold_agent.common.pictures import to_rgb
from reopold_agent.envs.actions import Actions
from reopold_agent.envs.base import ToolEnv
from reopold_agent.envs.in_words import can_say, coloured_in_words, find_picture, in_words
from reopold_agent.envs.registration import task_seed
from reopold_agent.envs.spaces import succeeded
from reopold_agent.errors import (
    ConfigError,
    MissingExtraError,
    ModelError,
    ReopoldError,
    ToolError,
    first_line,
    suggestion,
)
from reopold_agent.tools import EpisodeState, Tool, ToolResult
from reopold_agent.tools.base import failure
from reopold_agent.tools.schema import shorten
from reopold_agent.types import IMAGE_MARK, Observation, Task, TaskSource, ToolCall

_log = logging.getLogger(__name__)

SHOW = ("auto", "text", "picture", "both")

START_SECONDS = 120.0
"""Limit of the first start of an environment."""

VALUES_BESIDE_PICTURE, VALUES_ALONE = 32, 1024
"""Largest part of an observation that is stated beside a picture, and where there is none."""

_PACKAGES = {
    "MiniGrid-": ("minigrid", "gym"),
    "BabyAI-": ("minigrid", "gym"),
    "miniwob/": ("miniwob", "miniwob"),
}
"""By the beginning of an id: the module that registers it, and our extra that installs it."""

_NO_CALL = (
    "Your turn has no tool call, so nothing has happened. Only the tool act changes the "
    "environment; call it."
)

_ACTIONS = {
    "FrozenLakeEnv": ("left", "down", "right", "up"),
    "CliffWalkingEnv": ("up", "right", "down", "left"),
    "TaxiEnv": ("south", "north", "east", "west", "pick up", "drop off"),
    "BlackjackEnv": ("stick", "hit"),
    "CartPoleEnv": ("push left", "push right"),
    "MountainCarEnv": ("accelerate left", "do not accelerate", "accelerate right"),
    "AcrobotEnv": ("torque -1", "torque 0", "torque 1"),
}
"""Names of the actions of Gymnasium's own environments, by class."""

_OBSERVATIONS = {
    "BlackjackEnv": ("your sum", "the dealer's card", "you have a usable ace"),
    "CartPoleEnv": ("cart position", "cart velocity", "pole angle (rad)", "pole angular velocity"),
    "MountainCarEnv": ("position", "velocity"),
    "Continuous_MountainCarEnv": ("position", "velocity"),
    "PendulumEnv": ("cos(angle)", "sin(angle)", "angular velocity"),
    "AcrobotEnv": (
        *("cos(angle 1)", "sin(angle 1)", "cos(angle 2)", "sin(angle 2)"),
        *("angular velocity 1", "angular velocity 2"),
    ),
}
"""Names of the numbers that they show."""


class GymnasiumEnv(ToolEnv):
    """``reopold/Gymnasium-v0``: a registered Gymnasium environment.

    A call of the tool ``act`` is a step. Rewards and ends are the environment's: its terminated
    and truncated episodes are so here too. A turn without a call, or with an action that the space
    does not contain, gets a message; it costs a turn, but the environment takes no step. So only
    the environment and the budgets end an episode; the student cannot end it by words.

    An episode that the environment ends succeeds by the first of these that there is:
    ``success`` or ``is_success`` in its info, ``success_return``, the ``reward_threshold`` that the
    environment is registered with (the return reaches it), a return above 0. One that a budget of
    the rollout ends is unfinished: it succeeds only if the info says so.

    A task is a seed of the environment. Those of the splits are disjoint
    (`reopold_agent.envs.registration.task_seed`).

    Args:
        gym_id: Gymnasium's id, also ``module:id``.
        kwargs: arguments of `gymnasium.make` (``max_episode_steps``, and those of the environment).
        show: what the student sees: ``picture`` (what the environment renders, or else a picture
            in its observations), ``text`` (the observation in words; drawn as text where the
            environment can), ``both``, or ``auto``: what there is, pictures only for a model that
            reads them.
        max_values: parts of an observation with more values are not put into words; by default 32
            beside a picture and 1,024 without.
        action_names: see `reopold_agent.envs.actions.Actions`; by default the environment's own
            names where they are known.
        action_defaults: arguments that the student may leave out; likewise.
        about: what the student is told of the environment; by default the first paragraph of its
            documentation.
        success_return: return from which an episode is a success.
        num_tasks: number of tasks of each split.
        tools: tools besides ``act``.
        max_turns, **settings: of `ToolEnv`.

    Raises:
        ConfigError: there is no such environment, it cannot be made, its action space cannot
            become a schema, or it shows nothing.
        MissingExtraError: its package is not installed.
    """

    default_guideline: ClassVar[str] = ""

    def __init__(
        self,
        *,
        gym_id: str,
        kwargs: Mapping[str, Any] | None = None,
        show: str = "auto",
        max_values: int | None = None,
        action_names: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
        action_defaults: Mapping[str, Any] | None = None,
        about: str | None = None,
        success_return: float | None = None,
        num_tasks: int = 2**20,
        tools: Sequence[Any] | None = None,
        max_turns: int = 20,
        **settings: Any,
    ) -> None:
        self._name = f"env=gym:{gym_id}"
        if show not in SHOW:
            raise ConfigError(f"show is one of {', '.join(SHOW)}, got '{show}'")
        if num_tasks < 1:
            raise ConfigError(f"num_tasks must be at least 1, got {num_tasks}")
        if success_return is not None and not isinstance(success_return, (int, float)):
            raise ConfigError(f"success_return must be a number, got '{success_return}'")
        own = inspect.signature(ToolEnv.__init__).parameters
        for setting in settings:
            if setting not in own:
                raise ConfigError(
                    f"{self._name} has no setting '{setting}'.\nArguments of the environment "
                    f"itself go into env.kwargs.kwargs: +env.kwargs.kwargs.{setting}=VALUE."
                )
        self._kwargs, self._show, self._most = dict(kwargs or {}), show, max_values
        self._sees_pictures = True
        self._spec = find_registered(gym_id)
        self._num_tasks = num_tasks
        self._env = self._make()
        inner: Any = self._env.unwrapped
        names, defaults = _known_actions(inner, self._env.action_space)
        try:
            self._actions = Actions(
                self._env.action_space,
                names if action_names is None else action_names,
                defaults if action_defaults is None else action_defaults,
            )
        except ConfigError as error:
            self._env.close()
            raise ConfigError(f"{self._name}: {error}") from error
        self._about = _first_paragraph(inner) if about is None else about
        self._least = self._spec.reward_threshold if success_return is None else success_return
        self._played = self._cut = False
        self._return = 0.0
        self._info: Mapping[str, Any] = {}
        act = Tool(
            "act",
            _act,
            "Takes one step in the environment with the given action.",
            input_schema=self._actions.schema,
            inline=True,
        )
        super().__init__(tools=[act, *(tools or ())], max_turns=max_turns, **settings)

    @override
    def num_tasks(self, split: str) -> int:
        """Returns the number of tasks of a split.

        All commands ask this before they load a model, so the environment is tried here, once.

        Raises:
            ConfigError: it cannot be started, or shows nothing.
        """
        if not self._played:
            try:
                run_bounded(lambda: self._opened(task_seed(split, 0)), START_SECONDS)
            except DeadlineError:
                raise ConfigError(
                    f"{self._name} did not start within {START_SECONDS:g} s (its reset hangs).\n"
                    "Check its arguments (env.kwargs.kwargs), and that it runs by itself."
                ) from None
            except ReopoldError:
                raise
            except Exception as error:
                raise self._unusable("be started", error) from error
        return super().num_tasks(split)

    @override
    def load_tasks(self, split: str) -> TaskSource:
        return _Seeds(self._spec.id, split, self._num_tasks, self._words())

    @override
    def opened(self, task: Task) -> Task:
        text, pictures = self._opened(task.metadata.get("seed"))
        return replace(
            task,
            question=f"{task.question.replace(IMAGE_MARK, ' ')}\n\n{text}",
            images=tuple(map(_InMemory, pictures)),
        )

    @override
    def without_pictures(self) -> None:
        if self._show in ("picture", "both"):
            raise ModelError(
                f"the student reads text only, and {self._name} is to show pictures.\n"
                "Set env.kwargs.show=text, or give a vision-language checkpoint."
            )
        if self._sees_pictures:
            self._sees_pictures = False
            self._env.close()
            self._env = self._make()

    @override
    def truncation_reward(self, task: Task, state: EpisodeState) -> tuple[float, bool]:
        """Returns 0, and the success that the info of the last step tells, if any."""
        return 0.0, succeeded(self._info, 0.0)

    @override
    def step(self, action: str) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Takes one assistant turn; an end that the environment calls truncated is so here too."""
        self._cut = False
        observation, reward, terminated, truncated, info = super().step(action)
        if self._cut:
            terminated, truncated = False, True
        return observation, reward, terminated, truncated, info

    def close(self) -> None:
        """Closes the environment that is played."""
        super().close()
        self._env.close()

    @override
    def _run_call(
        self, text: str, state: EpisodeState
    ) -> tuple[ToolCall | None, ToolResult] | None:
        done = super()._run_call(text, state)
        if done is None:
            return None, failure(_NO_CALL)
        call, _ = done
        if call is None or call.name != "act" or not call.ok:
            return done
        try:
            action = self._actions.action(call.arguments)
        except ToolError as error:
            return replace(call, ok=False, error=str(error)), failure(str(error))
        return call, self._advance(action)  # what this raises ends the episode, not only the call

    # The environment that is played

    def _make(self) -> gymnasium.Env[Any, Any]:
        """Makes the environment and says what it shows.

        Raises:
            ConfigError: it cannot be made, or does not show what it is to show.
        """
        wanted = ("rgb_array",) if self._wants_pictures else ()
        wanted = (*wanted, "ansi") if self._show != "picture" else wanted
        try:
            creator: Any = self._spec.entry_point
            creator = load_env_creator(creator) if isinstance(creator, str) else creator
            mode = self._kwargs.get("render_mode") or _mode_of(creator, wanted)
            env = self._made(mode)
            late = None if mode else _mode_of(env, wanted)
            if late is not None and not _has_modes(creator):  # a function told nothing
                env.close()
                mode, env = late, self._made(late)
        except Exception as error:
            raise self._unusable("be made", error) from error
        self._mode = mode
        self._place = None if mode == "rgb_array" else find_picture(env.observation_space)
        self._pictures = self._wants_pictures and (mode == "rgb_array" or self._place is not None)
        if self._most is None:
            most = VALUES_BESIDE_PICTURE if self._pictures else VALUES_ALONE
        else:
            most = self._most
        self._stated = most
        says = mode == "ansi" or can_say(env.observation_space, most)
        self._says = says and self._show != "picture"
        self._named = _own(_OBSERVATIONS, env.unwrapped) if _unchanged(env) else ()
        missing = [
            kind
            for kind, there in (("picture", self._pictures), ("text", self._says))
            if not there and self._show in (kind, "both")
        ]
        if missing or not (self._pictures or self._says):
            env.close()
            raise self._silent(missing, env.observation_space)
        return env

    @property
    def _wants_pictures(self) -> bool:
        return self._show != "text" and self._sees_pictures

    def _made(self, mode: str | None) -> gymnasium.Env[Any, Any]:
        if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
            # pygame draws in memory without it too, but prints that it looked for a display.
            os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
        kwargs = {"render_mode": mode, **self._kwargs} if mode is not None else self._kwargs
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an older version, of a lacking render mode
            return gymnasium.make(self._spec, disable_env_checker=True, **kwargs)

    def _unusable(self, what: str, error: Exception) -> ConfigError:
        told = first_line(error)
        if isinstance(error, (ImportError, gymnasium.error.DependencyNotInstalled)):
            advice = "Run: pip install PACKAGE, with the package that it names."
            missing = getattr(error, "name", None)
            commands = re.findall(r"`(pip install [^`]+)`", told)
            if commands:
                advice = f"Run: {' && '.join(commands)}"
            elif missing:
                advice = f"Run: pip install {missing.partition('.')[0]}"
            return ConfigError(f"{self._name} needs a package: {told}.\n{advice}")
        advice = (
            "Check its arguments (env.kwargs.kwargs); REOPOLD_DEBUG=1 shows where this was raised."
        )
        kind = "" if isinstance(error, TypeError) else f"{type(error).__name__}: "
        return ConfigError(f"{self._name} cannot {what}: {kind}{shorten(told, 400)}\n{advice}")

    def _silent(self, missing: Sequence[str], space: spaces.Space[Any]) -> ReopoldError:
        if not missing:
            what = "renders no picture and shows nothing that could be put into words"
            advice = "Wrap it so that it renders (rgb_array), or raise env.kwargs.max_values."
            if not self._sees_pictures:
                what = "shows nothing in words, and the student reads text only"
                advice = "Give a vision-language checkpoint, or raise env.kwargs.max_values."
        else:
            what = f"has no {missing[0]} to show (show={self._show})"
            advice = "Use env.kwargs.show=auto."
        kind = ConfigError if self._sees_pictures else ModelError
        return kind(f"{self._name} {what}; it observes {shorten(space, 200)}.\n{advice}")

    def _words(self) -> str:
        about = f"\n\n{self._about}" if self._about else ""
        return (
            f"You are in the environment {self._spec.id}.{about}\n\n"
            "Act in it by calling the tool act; each call is one step. The environment decides "
            "when the episode ends and how it is rewarded; you are not told its rewards. Play it "
            "as well as you can."
        )

    def _opened(self, seed: int | None) -> tuple[str, tuple[Image.Image, ...]]:
        """Starts an episode of the environment; returns its first observation as it is shown."""
        self._played, self._return, self._info = True, 0.0, {}
        observation, self._info = self._env.reset(seed=seed)
        text, pictures = self._shown(observation)
        if not text:
            raise self._silent((), self._env.observation_space)
        return text, pictures

    def _advance(self, action: Any) -> ToolResult:
        observation, reward, terminated, truncated, self._info = self._env.step(action)
        self._return += float(reward)
        done = bool(terminated or truncated)
        self._cut = done and not terminated
        success = succeeded(self._info, self._return, least=self._least) if done else None
        text, pictures = self._shown(observation)
        return ToolResult(text, pictures, done=done, reward=float(reward), success=success)

    def _shown(self, observation: Any) -> tuple[str, tuple[Image.Image, ...]]:
        """Returns an observation as the student sees it: text with marks, and pictures."""
        pictures: tuple[Image.Image, ...] = ()
        if self._pictures:
            found: Any = self._env.render() if self._place is None else observation
            for key in self._place or ():
                found = found[key]
            pictures = (_picture(found),)
        said = ""
        if self._says:
            drawn: Any = self._env.render() if self._mode == "ansi" else ""
            said = in_words(observation, self._stated, self._named)
            if isinstance(drawn, str) and drawn.strip():
                said = f"{said}\n{coloured_in_words(drawn)}"
        said = said.replace(IMAGE_MARK, " ").strip("\n")
        if said:
            said = f"Observation:{' ' if chr(10) not in said else chr(10)}{said}"
        return "\n".join([*(IMAGE_MARK for _ in pictures), *([said] if said else [])]), pictures


def _act(state: EpisodeState, /, **arguments: Any) -> ToolResult:
    """Does nothing: the arguments are checked by the schema, and the environment takes the step.

    So it can run in another process, as other tools do, which the environment cannot.
    """
    return ToolResult("")


@dataclass(frozen=True)
class _InMemory:
    image: Image.Image

    def open(self) -> Image.Image:
        return self.image


@dataclass(frozen=True)
class _Seeds:
    """Tasks, each of which is a seed."""

    name: str
    split: str
    count: int
    words: str

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> Task:
        if not 0 <= index < self.count:
            raise IndexError(index)
        seed = task_seed(self.split, index)
        return Task(f"{self.name}-{self.split}-{index}", self.words, (), metadata={"seed": seed})


def find_registered(id: str) -> EnvSpec:
    """Returns what Gymnasium knows under an id, after importing the package that registers it.

    Raises:
        ConfigError: nothing has that id; the message suggests the closest.
        MissingExtraError: its package is not installed.
    """
    module, colon, name = id.rpartition(":")
    for beginning, (package, extra) in _PACKAGES.items():
        if name.startswith(beginning):
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise MissingExtraError(package, extra, f"env=gym:{id}") from error
    try:
        if colon:
            importlib.import_module(module)
    except ImportError as error:
        package = (getattr(error, "name", None) or module).partition(".")[0]
        raise ConfigError(
            f"env=gym:{id}: the module '{module}' cannot be imported: {first_line(error)}.\n"
            f"Install the package that it is in (perhaps: pip install {package}), or correct the "
            "name."
        ) from error
    if name not in gymnasium.registry:
        _import_others()
    try:
        return gymnasium.spec(name)
    except (gymnasium.error.Error, ValueError) as error:
        hint = suggestion(name, gymnasium.registry, prefix="gym:")
        raise ConfigError(
            f"env=gym:{id}: {first_line(error).partition(' Did you ')[0].rstrip('.')}.\n{hint}"
            "An environment of a package is found by the module that registers it: "
            "env=gym:MODULE:ID."
        ) from error


def _import_others() -> None:
    """Imports the packages that name their environments in Gymnasium's entry points.

    Gymnasium reads these entry points no longer, but the import registers the environments.
    """
    for point in metadata.entry_points(group="gymnasium.envs"):
        try:
            point.load()
        except (Exception, SystemExit) as error:  # another package's fault
            _log.warning("the environments of %s cannot be imported: %s", point.value, error)


def _has_modes(made: Any) -> bool:
    told = getattr(made, "metadata", None)
    return isinstance(told, Mapping) and "render_modes" in told


def _mode_of(made: Any, wanted: Sequence[str]) -> str | None:
    """Returns the first wanted render mode that a class or an environment has."""
    modes = made.metadata["render_modes"] if _has_modes(made) else ()
    return next((mode for mode in wanted if mode in modes), None)


def _picture(found: Any) -> Image.Image:
    """Returns what an environment renders as a picture.

    Raises:
        ValueError: it is none.
    """
    pixels = np.asarray(found[-1] if isinstance(found, list) and found else found)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or not pixels.size:
        raise ValueError(f"render() returned {shorten(found)}, which is no picture")
    return to_rgb(Image.fromarray(pixels))


def _unchanged(env: gymnasium.Env[Any, Any]) -> bool:
    return bool(env.observation_space == env.unwrapped.observation_space)


def _own(table: Mapping[str, tuple[str, ...]], inner: Any) -> tuple[str, ...]:
    kind = type(inner)
    return table.get(kind.__name__, ()) if kind.__module__.startswith("gymnasium.") else ()


def _known_actions(
    inner: Any, space: spaces.Space[Any]
) -> tuple[Sequence[str] | Mapping[str, Sequence[str]] | None, Mapping[str, Any] | None]:
    """Returns names and defaults of an environment's actions, where they are known."""
    if space != inner.action_space:  # a wrapper has changed it
        return None, None
    config = getattr(inner, "action_space_config", None)  # MiniWoB++'s
    if config is not None and isinstance(space, spaces.Dict):
        kinds = [str(getattr(each, "value", each)) for each in config.action_types]
        keys = {"action_type": kinds, "key": list(config.allowed_keys)}
        zeros = {"coords": [0, 0], "ref": 0, "text": " ", "field": 0, "key": keys["key"][0]}
        return (
            {key: names for key, names in keys.items() if key in space.keys()},  # noqa: SIM118
            {key: value for key, value in zeros.items() if key in space.keys()},  # noqa: SIM118
        )
    if not isinstance(space, spaces.Discrete):
        return None, None
    names: Sequence[str] = _own(_ACTIONS, inner)
    actions = getattr(inner, "actions", None)  # MiniGrid's
    if isinstance(actions, enum.EnumMeta) and issubclass(actions, enum.IntEnum):
        by_number = {int(each): each.name for each in actions}
        names = [by_number.get(int(space.start) + i, "") for i in range(int(space.n))]
    elif callable(getattr(inner, "get_action_meanings", None)):  # Atari's
        names = [str(name).lower() for name in inner.get_action_meanings()]
    fits = len(names) == space.n and all(names) and len(set(names)) == len(names)
    return (names if fits else None), None


def _first_paragraph(inner: Any) -> str:
    """Returns the first paragraph of an environment's documentation, without headings."""
    for paragraph in inspect.cleandoc(type(inner).__doc__ or "").split("\n\n"):
        lines = [line.strip() for line in paragraph.split("\n") if not line.startswith("#")]
        text = " ".join(line for line in lines if line)
        if text:
            return shorten(text, 600)
    return ""
