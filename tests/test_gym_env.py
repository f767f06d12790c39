"""Gymnasium's environments: actions as JSON, what the student sees, ends, and whole runs."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st
from running import environment, train, train_rows
from test_envs import call
from test_evaluate_env import evaluated
from test_evaluate_env import settings as chosen
from test_rollout import ScriptedPolicy, specs

from reopold_agent.cli.groups import prepare_groups
from reopold_agent.common.pixels import PixelLimits
from reopold_agent.config import TrainConfig
from reopold_agent.envs.actions import Actions
from reopold_agent.envs.from_config import make_env
from reopold_agent.envs.gym_env import GymnasiumEnv, _picture
from reopold_agent.envs.in_words import can_say, coloured_in_words, find_picture, in_words
from reopold_agent.envs.registration import task_seed
from reopold_agent.errors import (
    ConfigError,
    EnvironmentCodeError,
    MissingExtraError,
    ModelError,
    ToolError,
)
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.rollout.runner import RolloutLimits, RolloutRunner
from reopold_agent.tools import Isolation
from reopold_agent.tools.schema import check_by_schema
from reopold_agent.train.settings import compose_run
from reopold_agent.types import IMAGE_MARK, Sampling, StopReason

PIXELS = PixelLimits(56 * 56, 56 * 56)
TAXI = max(id for id in gymnasium.registry if id.startswith("Taxi-"))

pytest.importorskip("minigrid", reason='needs minigrid: pip install -e ".[gym]"')
pytest.importorskip("pygame", reason='needs pygame: pip install -e ".[gym]"')


class Room(gymnasium.Env[Any, Any]):
    """Ends with ``end`` after so many steps; everything it does can be set."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}  # type: ignore[misc]

    def __init__(
        self,
        steps: int = 2,
        reward: Any = 1.0,
        end: tuple[bool, bool] = (True, False),
        info: dict[str, Any] | None = None,
        action_space: Any = None,
        observation_space: Any = None,
        observation: Any = 0,
        fails: str = "",
        render_mode: str | None = None,
    ) -> None:
        self.steps, self.reward, self.end = steps, reward, end
        self.info, self.observation, self.fails = info or {}, observation, fails
        self.render_mode = render_mode
        self.action_space = action_space or spaces.Discrete(3)
        self.observation_space = observation_space or spaces.Discrete(5)
        self.closed = False

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.at = 0
        self.seed = seed
        if self.fails == "reset":
            raise RuntimeError("no room")
        return self.observation, {}

    def step(self, action: Any) -> Any:
        self.at += 1
        if self.fails == "step":
            raise RuntimeError("the room fell down")
        ended = self.end if self.at >= self.steps else (False, False)
        return self.observation, self.reward, *ended, self.info

    def render(self) -> Any:
        return None

    def close(self) -> None:
        self.closed = True


class Drawn(Room):
    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}  # type: ignore[misc]

    def render(self) -> Any:
        return np.full((40, 60, 3), 10 * self.at, dtype=np.uint8)


gymnasium.register("reopold-test/Room-v0", Room)
gymnasium.register("reopold-test/Drawn-v0", Drawn)
gymnasium.register("reopold-test/Threshold-v0", Room, reward_threshold=1.5)
gymnasium.register("reopold-test/Limited-v0", Room, max_episode_steps=2)


def room(name: str = "Room", **kwargs: Any) -> GymnasiumEnv:
    own = {key: kwargs.pop(key) for key in list(kwargs) if key in OWN}
    return GymnasiumEnv(gym_id=f"reopold-test/{name}-v0", kwargs=kwargs, **own)


OWN = ("show", "success_return", "action_names", "max_turns", "num_tasks", "tool_isolation")


def act(action: Any = 0) -> str:
    return call("act", {"action": action})


def played(env: gymnasium.Env[Any, Any], *turns: str) -> Any:
    env.reset(seed=0)
    for turn in turns:
        result = env.step(turn)
    return result


# Actions as JSON

SPACES: dict[str, spaces.Space[Any]] = {
    "discrete": spaces.Discrete(4),
    "discrete from -2": spaces.Discrete(5, start=-2),
    "multi-discrete": spaces.MultiDiscrete([2, 3, 4], start=[1, 0, -1]),
    "multi-discrete 2x2": spaces.MultiDiscrete([[2, 3], [4, 5]]),
    "multi-binary": spaces.MultiBinary(3),
    "multi-binary 2x3": spaces.MultiBinary((2, 3)),
    "box": spaces.Box(-1.0, 2.0, (2,)),
    "box of one number": spaces.Box(np.float32(0.1), np.float32(0.3), ()),
    "box unbounded": spaces.Box(-np.inf, np.inf, (2, 2)),
    "box half bounded": spaces.Box(np.array([0.0, -np.inf]), np.array([np.inf, 1.0])),
    "box float64": spaces.Box(-1.0, 1.0, (2,), dtype=np.float64),
    "box float16": spaces.Box(np.float16(-0.1), np.float16(0.7), (3,), dtype=np.float16),
    "box uint8": spaces.Box(0, 255, (3,), dtype=np.uint8),
    "box int64": spaces.Box(-(2**63), 2**63 - 1, (2,), dtype=np.int64),
    "box of many different bounds": spaces.Box(
        np.zeros(80, dtype=np.float32), np.arange(1, 81, dtype=np.float32)
    ),
    "text": spaces.Text(6),
    "text of odd characters": spaces.Text(5, min_length=0, charset="^]-\\a \n'\"é漢{}"),
    "dict": spaces.Dict({"go": spaces.Discrete(2), "how": spaces.Box(0, 1, (2,))}),
    "dict in dict": spaces.Dict({"a": spaces.Dict({"state": spaces.MultiBinary(2)})}),
    "tuple": spaces.Tuple((spaces.Discrete(2), spaces.Text(3), spaces.Box(0, 1, ()))),
    "sequence": spaces.Sequence(spaces.Discrete(3)),
    "one of": spaces.OneOf((spaces.Discrete(2), spaces.Box(-1, 1, (1,)))),
    "all": spaces.Dict({"x": spaces.Tuple((spaces.Sequence(spaces.Dict({"t": spaces.Text(2)})),))}),
}


def as_json(space: spaces.Space[Any], action: Any) -> Any:
    """Writes an action as a model does."""
    if isinstance(space, spaces.Dict):
        return {key: as_json(each, action[key]) for key, each in space.items()}
    if isinstance(space, spaces.Tuple):
        return [as_json(s, a) for s, a in zip(space.spaces, action, strict=True)]
    if isinstance(space, spaces.Sequence):
        return [as_json(space.feature_space, each) for each in action]
    if isinstance(space, spaces.OneOf):
        return {"choice": int(action[0]), "value": as_json(space.spaces[action[0]], action[1])}
    return action if isinstance(action, str) else action.tolist()


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, tuple):
        pairs = zip(one, other, strict=True)
        return isinstance(other, tuple) and all(same(a, b) for a, b in pairs)
    if isinstance(one, str):
        return bool(one == other)
    return bool(np.array_equal(one, other) and one.dtype == other.dtype)


def through(actions: Actions, arguments: Any) -> Any:
    text = json.dumps(arguments)
    return actions.action(check_by_schema(actions.schema, json.loads(text)))


@pytest.mark.parametrize("kind", SPACES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_action_can_be_written(kind: str, seed: int) -> None:
    space = SPACES[kind]
    space.seed(seed)
    wanted = space.sample()
    written = as_json(space, wanted)
    actions = Actions(space)
    arguments = written if isinstance(space, spaces.Dict) else {"action": written}
    found = through(actions, arguments)
    assert space.contains(found)
    assert same(found, wanted), (wanted, found)


WRONG: list[tuple[str, Any]] = [
    ("discrete", 4),
    ("discrete", -1),
    ("discrete", True),
    ("discrete", "1"),
    ("discrete", 1.5),
    ("discrete", None),
    ("discrete", [1]),
    ("discrete from -2", 3),
    ("multi-discrete", [0, 0, 0]),
    ("multi-discrete", [1, 0]),
    ("multi-discrete", [1, 3, 0]),
    ("multi-discrete 2x2", [1, 1, 1, 1]),
    ("multi-binary", [0, 1, 2]),
    ("box", [0.0]),
    ("box", [0.0, 2.5]),
    ("box", 0.5),
    ("box unbounded", [[0, 0], [0, 1e39]]),
    ("box unbounded", [[0, 0], [0, 1e400]]),
    ("box half bounded", [-1, 0]),
    ("box uint8", [0, 0, 256]),
    ("box uint8", [0, 0, 0.5]),
    ("box int64", [0, 2**63]),
    ("box of many different bounds", [80.0] * 80),
    ("text", ""),
    ("text", "1234567"),
    ("text", "a-b"),
    ("text", "abc\n"),
    ("text of odd characters", "b"),
    ("tuple", [0, "ab"]),
    ("tuple", [0, "ab", 0.5, 1]),
    ("sequence", [0, 3]),
    ("one of", {"choice": 0, "value": [0.5]}),
    ("one of", {"choice": 2, "value": 0}),
]


@pytest.mark.parametrize(("kind", "value"), WRONG)
def test_other_values_are_refused_with_a_message(kind: str, value: Any) -> None:
    with pytest.raises(ToolError, match=r"^\S"):
        through(Actions(SPACES[kind]), {"action": value})


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"choice": 0, "value": 7}, "'action.value': 7 is greater than the maximum of 1."),
        ({"choice": 1, "value": [3]}, "'action.value[0]': 3 is greater than the maximum of 1.0."),
        ({"choice": 1, "value": 3}, "'action.value': 3 is not of type 'array'."),
        ({"choice": 1}, "'action': 'value' is a required property."),
        ({"value": 1}, "'action': 'choice' is a required property."),
        ({"choice": 5, "value": 0}, "'action.choice': 5 is not one of [0, 1, 2]."),
        (
            {"choice": 2, "value": {"choice": 0, "value": "abc"}},
            "'action.value.value': 'abc' is too long.",
        ),
        (3, "'action': 3 is not of type 'object'."),
    ],
)
def test_the_message_is_about_the_alternative_that_was_chosen(value: Any, told: str) -> None:
    inner = spaces.OneOf((spaces.Text(2), spaces.Discrete(2)))
    space = spaces.OneOf((spaces.Discrete(2), spaces.Box(-1, 1, (1,)), inner))
    with pytest.raises(ToolError) as caught:
        through(Actions(space), {"action": value})
    assert str(caught.value) == told


@pytest.mark.parametrize(
    "arguments", [{"go": 1}, {"go": 1, "how": [0, 0], "more": 1}, {"go": 2, "how": [0, 0]}, {}]
)
def test_a_dict_has_exactly_its_keys_as_arguments(arguments: Any) -> None:
    with pytest.raises(ToolError):
        through(Actions(SPACES["dict"]), arguments)


def test_names_and_defaults() -> None:
    space = spaces.Dict({"go": spaces.Discrete(2, start=3), "how": spaces.Box(0, 1, (2,))})
    actions = Actions(space, {"go": ["left", "right"]}, {"how": [0.5, 0]})
    assert actions.schema["properties"]["go"] == {"type": "string", "enum": ["left", "right"]}
    assert actions.schema["required"] == ["go"]
    found = through(actions, {"go": "right"})
    assert found["go"] == 4
    assert found["how"].tolist() == [0.5, 0.0]
    with pytest.raises(ToolError, match=r"'go': 'up' is not one of \['left', 'right'\]"):
        through(actions, {"go": "up"})
    assert through(Actions(spaces.Discrete(2), ["a", "b"]), {"action": "b"}) == 1


@pytest.mark.parametrize(
    ("space", "names", "defaults", "told"),
    [
        (spaces.Discrete(3), ["a", "b"], None, "3 values, but the names are a, b.\nGive each"),
        (spaces.Discrete(2), ["a", "a"], None, "2 values, but the names are a, a.\n"),
        (spaces.Discrete(2), {"go": ["a", "b"]}, None, "names for 'go', but no such Discrete"),
        (spaces.Box(0, 1, (2,)), ["a", "b"], None, "names for the whole action"),
        (spaces.Discrete(2), None, {"go": 1}, "defaults for 'go', but no such arguments.\n"),
        (spaces.Discrete(2), None, {"action": 2}, "does not fit: 'action': 2 is greater than"),
        (SPACES["text"], None, {"action": "ab\n"}, 'the default "ab\\n" of'),
        (SPACES["dict"], None, {"how": [0, 2]}, "does not fit: 'how[1]': 2 is greater than"),
        (spaces.Graph(spaces.Discrete(2), None), None, None, "the part Graph, which cannot"),
        (spaces.Tuple([spaces.Graph(spaces.Discrete(2), None)]), None, None, "the part Graph"),
        (spaces.Sequence(spaces.Discrete(2), stack=True), None, None, "stacked Sequence"),
        (spaces.Box(0, 1, (84, 84)), None, None, "an array of 7056 numbers; a call holds 2000.\n"),
    ],
)
def test_what_cannot_become_a_schema(space: Any, names: Any, defaults: Any, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        Actions(space, names, defaults)
    assert told in str(error.value)
    assert str(error.value).count("\n") == 1


# What the student sees


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.int64(5), "5"),
        (np.array([0.123456, -2.0]), "[0.1235, -2]"),
        (np.zeros(33), ""),
        ("a text", "a text"),
        ({"image": np.zeros((7, 7, 3)), "mission": "go", "at": np.int64(3)}, "mission: go\nat: 3"),
        ({"a": {"b": "two\nlines"}}, "a: \n  b: \n    two\n    lines"),
        ((np.int64(1), {"tag": "DIV", "n": np.float32(0.5)}), "[1, {tag: DIV, n: 0.5}]"),
        (np.array([199.99, 999.96, 48.85661]), "[199.99, 999.96, 48.8566]"),
        (np.array([1000.00049, 1234.5, 12345678.9]), "[1000.0005, 1234.5, 12345678.9]"),
        (np.array([[0.000012345, 0.99999, -1e-7]]), "[[1.234e-05, 1, -1e-07]]"),
        (np.array([1e15, 123456789012345678.0]), "[1000000000000000, 1.2345678901234568e+17]"),
        (np.array([123456.7, 0.1, 3e38], np.float32), "[123456.7, 0.1, 3e+38]"),
        (np.array(48.85661, np.float16), "48.84"),
        (np.array([np.nan, -np.inf, 5.0]), "[nan, -inf, 5]"),
        (np.array([np.float32(0.1), "a"], object), "[0.1, a]"),
        (None, ""),
    ],
)
def test_observations_in_words(value: Any, said: str) -> None:
    assert in_words(value, 32) == said


def test_named_numbers() -> None:
    assert in_words((12, 3), 32, ("yours", "theirs")) == "yours: 12\ntheirs: 3"


@pytest.mark.parametrize(
    ("space", "says", "pictures"),
    [
        (spaces.Discrete(2), True, None),
        (spaces.Box(0, 1, (33,)), False, None),
        (spaces.Dict({"a": spaces.Box(0, 1, (99,)), "b": spaces.Text(3)}), True, None),
        (spaces.Box(0, 255, (40, 50, 3), dtype=np.uint8), False, ()),
        (spaces.Box(0, 255, (40, 50), dtype=np.uint8), False, ()),
        (spaces.Box(0, 255, (7, 7, 3), dtype=np.uint8), False, None),
        (spaces.Box(0, 255, (40, 50, 4), dtype=np.uint8), False, None),
        (
            spaces.Dict({"see": spaces.Box(0, 255, (40, 50, 1), dtype=np.uint8)}),
            False,
            ("see",),
        ),
        (spaces.Graph(spaces.Discrete(2), None), False, None),
    ],
)
def test_what_a_space_can_show(space: Any, says: bool, pictures: Any) -> None:
    assert (can_say(space, 32), find_picture(space)) == (says, pictures)


def test_a_terminals_colours_become_words() -> None:
    assert coloured_in_words("\x1b[41mS\x1b[0mFF\n|\x1b[34;1mR\x1b[0m|\x1b[43m \x1b[0m\n") == (
        "[red S]FF\n|[blue R]|[yellow]"
    )


@pytest.mark.parametrize(
    ("drawn", "said"),
    [
        ("\x1b[31m@\x1b[39m..#", "[red @]..#"),
        ("\x1b[1;97mk\x1b[22;39m#", "[white k]#"),
        ("\x1b[34m\x1b[41mA\x1b[49mB\x1b[39mC", "[red A][blue B]C"),
        ("\x1b[38;5;214mO\x1b[0m.", "[yellow O]."),
        ("\x1b[38;5;9;1mO\x1b[m.\x1b[48;5;4mO\x1b[0;4m.", "[red O].[blue O]."),
        ("\x1b[38;5;240mO\x1b[38;5;250mO\x1b[38;5;52mO", "[grey O][white O][red O]"),
        ("\x1b[38;2;40;44;52mO\x1b[38;2;0;31;139mO", "[grey O][blue O]"),
        (
            "\x1b[38:5:46mO\x1b[38:2::255:0:255mO\x1b[38:2:0:255:255mO",
            "[green O][magenta O][cyan O]",
        ),
        ("\x1b[58;5;31mO\x1b[4:3mO\x1b[58:2::31:0:0mO", "OOO"),  # lines below the text
        ("\x1b[31mO\x1b[38;5mO\x1b[38mO\x1b[48;9;1mO", "[red O]OOO"),  # cut: no colour
        ("\x1b[2J\x1b[?25l\x1b[>4;2m\x1b]0;title\x07\x1b[31mO\x1b(B\x1b[mX", "[red O]X"),
    ],
)
def test_colours_end_and_are_told_in_several_forms(drawn: str, said: str) -> None:
    assert coloured_in_words(drawn) == said


def test_frozen_lake_shows_a_picture_and_the_square() -> None:
    env = GymnasiumEnv(gym_id="FrozenLake-v1", kwargs={"is_slippery": False})
    observation, info = env.reset(seed=1)
    assert "crossing a frozen lake" in observation["text"]
    assert observation["text"].endswith(f"{IMAGE_MARK}\nObservation: 0")
    assert observation["images"][0].shape == (256, 256, 3)
    assert '"enum": ["left", "down", "right", "up"]' in info["system_prompt"]
    before = observation["images"][0]
    observation, reward, terminated, truncated, info = env.step(act("down"))
    assert observation["text"] == f"{IMAGE_MARK}\nObservation: 4"
    assert not np.array_equal(observation["images"][0], before)
    assert (reward, terminated, truncated) == (0.0, False, False)
    for step in ("down", "right", "right", "down"):
        env.step(act(step))
    observation, reward, terminated, truncated, info = env.step(act("right"))
    assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)
    assert observation["images"]  # the goal
    env.close()


def test_by_text_alone_the_lake_is_drawn_as_text() -> None:
    env = GymnasiumEnv(gym_id="FrozenLake-v1", show="text", kwargs={"is_slippery": False})
    observation, _ = env.reset(seed=1)
    assert observation["images"] == ()
    assert observation["text"].endswith("Observation:\n0\n[red S]FFF\nFHFH\nFFFH\nHFFG")
    assert "S[red F]FF" in env.step(act("right"))[0]["text"]


@pytest.mark.parametrize(
    ("id", "action", "shows"),
    [
        (TAXI, "pick up", "Observation: "),
        ("CartPole-v1", "push left", "pole angle (rad): "),
        ("MiniGrid-Empty-5x5-v0", "forward", "mission: get to the green goal square"),
        ("minigrid:MiniGrid-Empty-5x5-v0", "left", "direction: 0"),
        ("Blackjack-v1", "stick", "the dealer's card: "),
        ("Pendulum-v1", [0.5], "angular velocity: "),
        ("MountainCar-v0", "do not accelerate", "velocity: 0"),
    ],
)
def test_environments_are_played(id: str, action: Any, shows: str) -> None:
    env = GymnasiumEnv(gym_id=id)
    observation, _ = env.reset(seed=3)
    assert shows in observation["text"]
    assert len(observation["images"]) == 1
    assert observation in env.observation_space
    *_, info = env.step(act(action))
    assert info["tool_call"].ok, info["tool_call"].error
    env.close()


def test_pictures_in_observations_are_shown() -> None:
    picture = np.full((40, 50, 1), 7, dtype=np.uint8)
    space = spaces.Dict(
        {"screen": spaces.Box(0, 255, (40, 50, 1), dtype=np.uint8), "say": spaces.Text(9)}
    )
    env = room(observation={"screen": picture, "say": "hello"}, observation_space=space)
    observation, _ = env.reset(seed=0)
    assert observation["text"].endswith(f"{IMAGE_MARK}\nObservation: say: hello")
    assert observation["images"][0].shape == (40, 50, 3)
    assert np.all(observation["images"][0] == 7)


def test_what_is_drawn_on_a_transparent_ground_is_shown_on_white() -> None:
    made = _picture(np.array([[[0, 0, 0, 0], [0, 0, 0, 255]]], np.uint8))
    assert np.asarray(made)[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize(
    ("show", "pictures", "says"),
    [("auto", 1, True), ("both", 1, True), ("picture", 1, False), ("text", 0, True)],
)
def test_show_says_what_is_shown(show: str, pictures: int, says: bool) -> None:
    env = room("Drawn", show=show)
    observation, _ = env.reset(seed=0)
    assert len(observation["images"]) == pictures
    assert ("Observation: 0" in observation["text"]) is says
    observation, *_ = env.step(act())
    assert (len(observation["images"]), "Observation: 0" in observation["text"]) == (pictures, says)


def test_a_student_that_reads_text_only_is_shown_no_pictures() -> None:
    env = room("Drawn")
    env.without_pictures()
    observation, _ = env.reset(seed=0)
    assert observation["images"] == ()
    assert observation["text"].endswith("Observation: 0")
    with pytest.raises(ModelError, match=r"reads text only, and env=gym:.*\nSet env.kwargs.show"):
        room("Drawn", show="picture").without_pictures()
    large = spaces.Box(0, 1, (5000,))
    with pytest.raises(ModelError, match="shows nothing in words, and the student reads text only"):
        room("Drawn", observation_space=large).without_pictures()


# Ends, rewards and success


def test_a_turn_without_an_action_costs_a_turn_but_no_step() -> None:
    env = room(max_turns=9)
    env.reset(seed=0)
    inner: Any = env._env.unwrapped
    for turn in ("I am done: \\boxed{1}", act(3), call("jump"), "<tool_call>{", call("act")):
        observation, reward, terminated, truncated, info = env.step(turn)
        assert observation["text"].startswith("Execution error:\n"), turn
        assert (reward, terminated, truncated) == (0.0, False, False)
        tool_call = info["tool_call"]
        assert tool_call is None if turn.startswith("I am") else not tool_call.ok
        assert inner.at == 0
    assert env.step(act(2))[1] == 1.0
    assert inner.at == 1


@pytest.mark.parametrize("end", [(True, False), (False, True), (True, True)])
def test_ends_are_the_environments_own(end: tuple[bool, bool]) -> None:
    *_, terminated, truncated, info = played(room(end=end), act(), act())
    assert (terminated, truncated) == (end[0], not end[0])
    assert info["answer"] is None


def test_its_time_limit_truncates() -> None:
    _, reward, terminated, truncated, info = played(room("Limited", steps=9), act(), act())
    assert (reward, terminated, truncated, info["success"]) == (1.0, False, True, True)
    made = room(steps=9, max_episode_steps=1)
    assert played(made, act())[2:4] == (False, True)


@pytest.mark.parametrize(
    ("name", "settings", "success"),
    [
        ("Room", {"reward": 1.0}, True),
        ("Room", {"reward": 0.0}, False),
        ("Room", {"reward": 1.0, "info": {"success": False}}, False),
        ("Room", {"reward": 0.0, "info": {"is_success": True}}, True),
        ("Room", {"reward": 0.0, "info": {"success": None, "is_success": True}}, True),
        ("Room", {"reward": 0.0, "info": {"success": np.array([1.0])}}, True),
        ("Room", {"reward": 1.0, "info": {"success": np.array(0.0)}}, False),
        ("Room", {"reward": 0.0, "info": {"success": torch.tensor([True])}}, True),
        ("Room", {"reward": 1.0, "success_return": 2.0}, True),
        ("Room", {"reward": 1.0, "success_return": 2.5}, False),
        ("Room", {"reward": -1.0, "success_return": -2.0}, True),
        ("Threshold", {"reward": 1.0}, True),
        ("Threshold", {"reward": 0.7}, False),
        ("Threshold", {"reward": 0.7, "success_return": 1.4}, True),
        ("Threshold", {"reward": 0.7, "info": {"is_success": True}}, True),
        ("Room", {"reward": np.float32(0.5)}, True),
    ],
)
def test_success(name: str, settings: dict[str, Any], success: bool) -> None:
    _, reward, _, _, info = played(room(name, **settings), act(), act())
    assert info["success"] is success
    assert reward == settings["reward"]
    assert type(reward) is float


@pytest.mark.parametrize("word", ["success", "is_success"])
@pytest.mark.parametrize("said", ["false", 0.5, np.zeros(2), np.array(["a"]), torch.ones(9, 9), []])
def test_a_word_that_is_neither_true_nor_false(word: str, said: Any) -> None:
    with pytest.raises(EnvironmentCodeError, match=f"info has {word}=.*neither True nor") as error:
        played(room(info={"success": None, word: said}), act(), act())
    assert str(error.value).count("\n") == 1


@pytest.mark.parametrize(("info", "success"), [({}, False), ({"is_success": True}, True)])
def test_an_unfinished_episode_succeeds_only_if_the_info_says_so(
    info: dict[str, Any], success: bool
) -> None:
    env = room(steps=9, max_turns=2, info=info, success_return=-5.0)
    _, reward, terminated, truncated, told = played(env, act(), act())
    assert (reward, terminated, truncated, told["success"]) == (1.0, False, True, success)


def test_the_end_in_the_last_turn_is_the_environments() -> None:
    assert played(room(max_turns=2), act(), act())[2:4] == (True, False)


def test_the_return_starts_anew() -> None:
    env = room(success_return=3.0)
    for _ in range(2):
        assert played(env, act(), act())[4]["success"] is False


def test_tools_in_worker_processes_do_not_take_the_environment_along() -> None:
    env = room(tool_isolation=Isolation(mode="process"))
    assert played(env, act(), act())[1:3] == (1.0, True)


# Tasks and seeds


def test_seeds_of_the_splits_are_disjoint_by_their_last_bit() -> None:
    for index in [*range(300), 2**20 - 1]:
        assert task_seed("train", index) % 2 == 0
        assert task_seed("eval", index) % 2 == 1
        assert 0 <= task_seed("train", index) < 2**31
    assert len({task_seed("train", index) for index in range(300)}) == 300


def test_a_task_is_a_seed_of_the_environment() -> None:
    env = GymnasiumEnv(gym_id="CartPole-v1", show="text", num_tasks=10)
    assert env.num_tasks("train") == env.num_tasks("eval") == 10
    texts = {}
    for split in ("train", "eval"):
        for index in (0, 9):
            options = {"split": split, "index": index}
            first = env.reset(seed=1, options=options)[0]["text"]
            assert env.reset(seed=2, options=options)[0]["text"] == first
            texts[split, index] = first
    assert len(set(texts.values())) == 4
    with pytest.raises(ConfigError, match="there is no task 10"):
        env.reset(options={"index": 10})


def test_gymnasiums_own_checker_passes() -> None:
    check_env(gymnasium.make("reopold/Gymnasium-v0", gym_id="FrozenLake-v1").unwrapped)


@pytest.mark.parametrize("shared", [False, True])
def test_vectors_of_environments(shared: bool) -> None:
    def make() -> gymnasium.Env[Any, Any]:
        return gymnasium.make("reopold/Gymnasium-v0", gym_id="CartPole-v1", show="text")

    def vector() -> AsyncVectorEnv:
        return AsyncVectorEnv([make, make], shared_memory=shared, context="fork")

    if shared:  # Gymnasium says what to do
        with pytest.raises(ValueError, match="`shared_memory=False`"):
            vector()
        return
    envs = vector()
    observations, _ = envs.reset(seed=[1, 2])
    assert len(observations["text"]) == 2
    observations, rewards, terminated, truncated, _ = envs.step((act("push left"), "hm"))
    assert rewards.tolist() == [1.0, 0.0]
    assert observations["text"][1].startswith("Execution error")
    assert not terminated.any()
    assert not truncated.any()
    envs.close()


# Bad input


def refused(**settings: Any) -> str:
    """Returns the message with which an environment is refused before any model is loaded."""
    with pytest.raises((ConfigError, MissingExtraError)) as error:
        GymnasiumEnv(**settings).num_tasks("train")
    return str(error.value)


@pytest.mark.parametrize(
    ("id", "told"),
    [
        ("FrozenLak-v1", "env=gym:FrozenLak-v1: Environment `FrozenLak` doesn't exist.\nDid you "
         "mean 'gym:FrozenLake-v1'? "),
        ("FrozenLake-v9", "\nDid you mean 'gym:FrozenLake-v1'? "),
        ("no_such_module:X-v0", "the module 'no_such_module' cannot be imported"),
        ("MiniGrid-Nothing-v0", "MiniGrid-Nothing"),
        ("a b", "env=gym:a b: "),
        ("", "env=gym:: "),
    ],
)  # fmt: skip
def test_unknown_ids(id: str, told: str) -> None:
    message = refused(gym_id=id)
    assert told in message
    assert message.count("\n") == 1


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "minigrid", None)
    assert refused(gym_id="MiniGrid-Empty-5x5-v0").endswith('pip install -e ".[gym]"')
    monkeypatch.setitem(sys.modules, "pygame", None)
    message = refused(gym_id="FrozenLake-v1")
    assert message.startswith("env=gym:FrozenLake-v1 needs a package: pygame is not installed")
    assert re.search(r'\nRun: pip install "gymnasium\[toy.text\]"$', message)


@pytest.mark.parametrize(
    ("name", "kwargs", "told"),
    [
        ("Room", {"action_space": spaces.Graph(spaces.Discrete(2), None)}, "the part Graph"),
        (
            "Room",
            {"observation_space": spaces.Graph(spaces.Discrete(2), None)},
            "renders no picture and shows nothing that could be put into words",
        ),
        ("Room", {"observation": None}, "renders no picture and shows nothing"),
        ("Room", {"show": "picture"}, "has no picture to show (show=picture)"),
        ("Room", {"show": "both"}, "has no picture to show (show=both)"),
        ("Drawn", {"show": "both", "observation_space": spaces.Box(0, 1, (99,))}, "has no text"),
        ("Room", {"fails": "reset"}, "cannot be started: RuntimeError: no room"),
        ("Room", {"nonsense": 1}, "unexpected keyword argument 'nonsense'"),
        ("Room", {"show": "all"}, "show is one of auto, text, picture, both, got 'all'"),
        ("Room", {"action_names": ["a"]}, "3 values, but the names are a."),
        ("Room", {"num_tasks": 0}, "num_tasks must be at least 1"),
    ],
)
def test_what_cannot_be_played_is_refused_at_the_start(
    name: str, kwargs: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError) as error:
        room(name, **kwargs).num_tasks("train")
    assert told in str(error.value)
    assert str(error.value).count("\n") <= 1


def test_a_setting_of_the_environment_in_the_wrong_place() -> None:
    message = refused(gym_id="FrozenLake-v1", is_slippery=False)
    assert message == (
        "env=gym:FrozenLake-v1 has no setting 'is_slippery'.\nArguments of the environment itself "
        "go into env.kwargs.kwargs: +env.kwargs.kwargs.is_slippery=VALUE."
    )


def runner(chat: ChatRenderer, make: Callable[[], Any], **limits: Any) -> RolloutRunner:
    given = RolloutLimits(**{"max_turns": 4, **limits})
    return RolloutRunner(
        make, chat, None, prompt_pixels=PIXELS, observation_pixels=PIXELS, limits=given
    )


@pytest.mark.parametrize("kwargs", [{"fails": "step"}, {"reward": float("nan")}, {"reward": "x"}])
def test_an_environment_that_fails_costs_its_episode_only(
    chat: ChatRenderer, say: Callable[..., list[int]], kwargs: dict[str, Any]
) -> None:
    rooms: list[GymnasiumEnv] = []

    def make() -> GymnasiumEnv:
        rooms.append(room(**(kwargs if len(rooms) == 0 else {})))
        return rooms[-1]

    policy = ScriptedPolicy(lambda request, turn: say(act()))
    played = runner(chat, make, concurrency=1).run(policy, specs(2), Sampling(), (1,))
    assert [each.stop_reason for each in played] == [StopReason.ENV_ERROR, StopReason.ANSWER]
    assert (played[1].success, played[1].reward) == (True, 2.0)


def test_the_rollouts_turns_end_an_episode(
    chat: ChatRenderer, say: Callable[..., list[int]]
) -> None:
    policy = ScriptedPolicy(lambda request, turn: say(act()))
    make = lambda: room("Drawn", steps=99, max_turns=99)  # noqa: E731
    (played,) = runner(chat, make, max_turns=3).run(policy, specs(1), Sampling(), (1,))
    assert (played.stop_reason, len(played.turns), played.success) == (
        StopReason.MAX_TURNS,
        3,
        False,
    )
    assert played.images == []  # the runner's model reads text only


# On the command line


def run_of(*words: str) -> TrainConfig:
    return compose_run(words)


def test_env_gym_composes() -> None:
    config = run_of("env=gym:FrozenLake-v1", "+env.kwargs.kwargs.is_slippery=false")
    assert (config.env.name, config.env.id) == ("gym:FrozenLake-v1", "reopold/Gymnasium-v0")
    assert config.rollout.max_turns == config.evaluation.max_turns == 20
    env = make_env(config, max_turns=7)
    inner = env.unwrapped
    assert isinstance(inner, GymnasiumEnv)
    assert inner.max_turns == 7
    env.reset(seed=0)
    assert env.step(act("right"))[0]["text"].endswith("Observation: 1")  # never slips
    env.close()
    named = run_of("env=gym:minigrid:MiniGrid-Empty-5x5-v0", "env.kwargs.show=text")
    assert named.env.kwargs["gym_id"] == "minigrid:MiniGrid-Empty-5x5-v0"
    assert named.env.kwargs["show"] == "text"


def test_an_id_may_have_a_namespace() -> None:
    config = run_of("env=gym:reopold-test/Room-v0")
    assert config.env.name == "gym:reopold-test/Room-v0"
    make_env(config).close()


def test_a_model_for_any_data_plays_without_data() -> None:
    words = ["env=gym:FrozenLake-v1", "model=qwen2_5_vl", "data=none"]
    config = run_of(*words, "model.student.path=DIR", "model.teacher.path=DIR")
    assert (config.data.train, config.data.eval) == (None, None)
    make_env(config).close()
    assert chosen(*words, "model.student.path=DIR")["environments"]["gym:FrozenLake-v1"]["pixels"]


@pytest.mark.parametrize(
    "word", ["data=math_jsonl", "data.train.size=9", "+data.demonstrations={path: x}"]
)
def test_data_for_an_environment_that_takes_none_is_refused(word: str) -> None:
    lake = "gym:FrozenLake-v1"
    told = (
        rf"env={lake} makes its own tasks and takes no data\.\nLeave it out, or write data=none; "
    )
    with pytest.raises(ConfigError, match=rf"^'{word.strip('+').partition('=')[0]}': {told}"):
        run_of(f"env={lake}", word)
    words = [f"env=[pixel_reasoner,{lake}]", "model=demo"]
    with pytest.raises(ConfigError, match=rf"^mix\.envs\.{lake}: 'data': {told}"):
        run_of(*words, f"mix.envs.{lake}.data=math_jsonl")
    run_of(*words, f"mix.envs.{lake}.data=none", "mix.envs.pixel_reasoner.data.train.size=9")


def test_data_of_a_recipe_for_such_an_environment_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    for name, text in (
        ("rows", "data: {train: {source: math_jsonl, path: rows.jsonl}}"),
        ("plain", "steps: 3"),
    ):
        (tmp_path / "recipe" / f"{name}.yaml").write_text(f"# @package _global_\n{text}\n")
    words = [f"--config-dir={tmp_path}", "env=gym:FrozenLake-v1"]
    with pytest.raises(ConfigError, match=r"^'data\.train\.path': env=gym:.* takes no data\.\n"):
        run_of(*words, "recipe=rows")
    run_of(*words, "recipe=rows", "data=none")
    assert run_of(*words, "recipe=plain").steps == 3


@pytest.mark.parametrize(
    ("env", "model"),
    [
        ("gym:FrozenLake-v1", "demo"),
        ("gym:FrozenLake-v1", "arithmetic"),  # reads text only
        (f"gym:{TAXI}", "demo"),
        ("gym:CartPole-v1", "demo"),
        ("gym:MiniGrid-Empty-5x5-v0", "demo"),
    ],
)
def test_environments_are_trained_and_evaluated(env: str, model: str, tmp_path: Path) -> None:
    words = [f"env={env}", f"model={model}", "steps=2", "batch.prompts=2", "batch.mini_batch=2"]
    few = ["evaluation.tasks=1", "evaluation.every=0", "evaluation.teacher=false"]
    prepare_groups(words)
    summary = train(tmp_path / "run", *words, *few)
    assert (summary["env"], summary["steps"]) == (env, 2)
    rows = train_rows(tmp_path / "run")
    assert len(rows) == 2
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert not any("env_error" in key and row[key] for row in rows for key in row)
    found = evaluated(tmp_path / "eval", f"env={env}", f"model={tmp_path / 'run'}")
    assert found["benchmarks"][env]["questions"] == 1


def test_a_text_only_student_plays_and_is_evaluated(tmp_path: Path) -> None:
    model = "model=demo:arithmetic_student"
    words = ["env=gym:FrozenLake-v1", model, "evaluation.tasks=2", "evaluation.max_turns=2"]
    found = evaluated(tmp_path / "eval", *words)
    assert found["benchmarks"]["gym:FrozenLake-v1"]["questions"] == 2
    rows = (tmp_path / "eval" / "responses.jsonl").read_text()
    assert "env_error" not in rows
    with pytest.raises(ModelError, match="cannot see the pictures of gym:FrozenLake-v1"):
        evaluated(tmp_path / "other", *words, "env.kwargs.show=picture")


def test_the_command_says_in_two_lines_what_is_wrong(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "reopold_agent.train", "env=gym:FrozenLak-v1"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    what, advice = done.stderr.strip().split("\n")
    assert what == "error: env=gym:FrozenLak-v1: Environment `FrozenLak` doesn't exist."
    assert advice.startswith("  Did you mean 'gym:FrozenLake-v1'?")
    assert list(tmp_path.iterdir()) == []


def test_play_and_doctor_know_it(tmp_path: Path) -> None:
    play = [
        sys.executable,
        "-m",
        "reopold_agent.play",
        "env=gym:FrozenLake-v1",
        f"folder={tmp_path}",
    ]
    done = subprocess.run(
        play,
        input="/call act down\nhello\n/quit\n",
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "act: done" in done.stdout
    assert "Only the tool act changes the environment" in done.stdout.replace("\n", " ")


# In a real browser


class Patient(gymnasium.Wrapper[Any, Any, Any, Any]):
    """MiniWoB++ without its limit of 10 seconds an episode, as in docs/environments.md."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        page: Any = self.unwrapped
        page.instance.driver.execute_script("core.EPISODE_MAX_TIME = 1e9")
        return self.env.reset(seed=seed, options=options)


gymnasium.register(
    "reopold-test/patient-v0",
    lambda **kwargs: Patient(gymnasium.make("miniwob:miniwob/click-test-v1", **kwargs)),
)


@pytest.mark.skipif(
    shutil.which("chromedriver") is None or importlib.util.find_spec("miniwob") is None,
    reason='needs a chromium with its driver, and pip install -e ".[miniwob]"',
)
def test_web_pages_are_clicked_in_a_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SE_OFFLINE", "true")  # selenium asks its maker for newer drivers
    env = GymnasiumEnv(gym_id="miniwob/click-test-2-v1")
    observation, info = env.reset(options={"index": 0})
    first = observation["images"][0]
    assert first.shape == (210, 160, 3)
    assert re.search(r"utterance: Click button (ONE|TWO)\.", observation["text"])
    assert "dom_elements" not in observation["text"]
    assert '"required": ["action_type"]' in info["system_prompt"]
    again = env.reset(options={"index": 0})[0]["images"][0]
    assert np.array_equal(first, again)
    coords = {"action_type": "CLICK_COORDS", "coords": [1.0, 209.0]}
    _, reward, terminated, _, info = env.step(call("act", coords))
    assert info["tool_call"].ok, info["tool_call"].error
    assert (reward, terminated) == (0.0, False)  # beside the buttons
    env.close()

    env = GymnasiumEnv(gym_id="reopold-test/patient-v0", show="text")
    for index in range(2):
        text = env.reset(options={"index": index})[0]["text"]
        button = re.search(r"ref: (\d+)[^{}]*tag: button", text)
        assert button is not None, text
        arguments = {"action_type": "CLICK_ELEMENT", "ref": int(button[1])}
        _, reward, terminated, _, info = env.step(call("act", arguments))
        assert (terminated, info["success"]) == (True, True)
        assert reward > 0.999  # without the page's clock, which lowers it
    env.close()


class Hanging(Room):
    """Never starts."""

    def reset(self, **options: Any) -> Any:
        time.sleep(30)


def test_an_environment_that_never_starts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reopold_agent.envs.gym_env.START_SECONDS", 0.2)
    gymnasium.register("reopold-test/Hanging-v0", Hanging)
    try:
        env = GymnasiumEnv(gym_id="reopold-test/Hanging-v0")
        with pytest.raises(ConfigError, match=r"did not start within 0.2 s \(its reset hangs\)\."):
            env.num_tasks("train")
    finally:
        del gymnasium.registry["reopold-test/Hanging-v0"]


def test_success_return_must_be_a_number() -> None:
    with pytest.raises(ConfigError, match="success_return must be a number, got 'high'"):
        GymnasiumEnv(gym_id="reopold-test/Room-v0", success_return="high")  # type: ignore[arg-type]


def test_the_bounds_of_short_floats_are_round() -> None:
    actions = Actions(spaces.Box(-0.7, 0.7, (1,), np.float32))
    assert "0.7" in json.dumps(actions.schema)
    assert "0.69" not in json.dumps(actions.schema)
