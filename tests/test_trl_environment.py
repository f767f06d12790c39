"""Environments as TRL's trainer uses them: methods for tools, rewards at the end.

`test_peers_full_env` runs TRL's own trainer on one.
"""

from __future__ import annotations

import inspect
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from test_state_decides import Walk
from transformers.utils.chat_template_utils import get_json_schema

from reopold_agent.envs.base import ToolEnv
from reopold_agent.envs.gym_env import GymnasiumEnv
from reopold_agent.envs.trl import environment_factory, reward, rows
from reopold_agent.errors import ConfigError
from reopold_agent.tools import EpisodeState, Tool, ToolResult
from reopold_agent.types import IMAGE_MARK, Task

SAID = {"role": "assistant", "content": "\\boxed{3}"}
RESULT = {"role": "tool", "name": "move", "content": "You are at 1."}


def embedded() -> ToolEnv:
    env = gymnasium.make("reopold_agent.envs:reopold/PixelReasoner-v0", max_turns=3)
    assert isinstance(env.unwrapped, ToolEnv)
    return env.unwrapped


def started(**settings: Any) -> Any:
    made: Any = environment_factory(lambda: Walk(**settings))()
    made.reset(index=0, prompt=[])
    return made


def optional(state: EpisodeState, side: str, times: int = 1) -> ToolResult:
    return ToolResult(f"{side} {times}")


SCHEMA = {
    "type": "object",
    "properties": {"to": {"type": "string", "enum": ["a", "b"]}, "deep": {"type": "object"}},
    "required": ["to"],
}


def given(state: EpisodeState, **arguments: Any) -> ToolResult:
    return ToolResult(str(arguments))


def test_trl_reads_the_schemas_that_our_prompt_has() -> None:
    environment = environment_factory(embedded)()
    for tool in embedded().tools:
        assert get_json_schema(getattr(environment, tool.name)) == tool.schema()


def test_trl_takes_nothing_else_for_a_tool() -> None:
    made = environment_factory(embedded)
    # As TRL does: also `embedded` itself would be shown to the model.
    functions = dict(inspect.getmembers(made, inspect.isfunction))
    shown = {name for name in functions if not name.startswith("_")} - {"reset"}
    assert shown == {tool.name for tool in embedded().tools}


def test_optional_arguments_and_schemas_of_servers() -> None:
    tools = [Tool("turn", optional, "Turns."), Tool("go", given, "Goes.", input_schema=SCHEMA)]
    made: Any = environment_factory(lambda: Walk(tools=tools))()
    made.reset(index=0)
    assert get_json_schema(made.turn)["function"]["parameters"]["required"] == ["side"]
    assert made.turn(side="left") == "left 1"
    assert made.turn(side="left", times=2) == "left 2"
    shown = get_json_schema(made.go)["function"]["parameters"]["properties"]
    assert shown["to"]["enum"] == ["a", "b"]
    assert made.go(to="c").startswith("Execution error:")
    assert made.go(to="a", deep={"x": [1]}) == "{'to': 'a', 'deep': {'x': [1]}}"


def environment_with(properties: dict[str, Any], *required: str, **schema: Any) -> Any:
    schema = {"type": "object", "properties": properties, "required": required, **schema}
    tools = [Tool("find", given, "Finds.", input_schema=schema)]
    made: Any = environment_factory(lambda: Walk(tools=tools))()
    made.reset(index=0)
    return made


TEXT, NUMBER, NONE = {"type": "string"}, {"type": "number"}, {"type": "null"}
LIST = {"type": "array"}


@pytest.mark.parametrize(
    ("schema", "shown"),
    [
        ({"anyOf": [TEXT, NONE], "default": None}, {**TEXT, "nullable": True}),
        ({"oneOf": [TEXT, NUMBER]}, {"type": ["number", "string"]}),
        ({"type": ["string", "null"]}, {**TEXT, "nullable": True}),
        ({"type": ["array", "null"], "items": TEXT}, {**LIST, "items": TEXT, "nullable": True}),
        ({"type": "string", "anyOf": [{"pattern": "a"}, {"pattern": "b"}]}, TEXT),
        ({"anyOf": [{**LIST, "items": TEXT}, {**LIST, "items": NUMBER}]}, {**LIST, "items": {}}),
        ({"anyOf": [TEXT, {"const": "a"}, {"enum": [1, 2]}]}, {"type": ["integer", "string"]}),
        ({"anyOf": [TEXT, {}]}, {}),
        ({"$ref": "#/$defs/Kind"}, {**TEXT, "enum": ["a", "b"]}),
        ({"allOf": [{"$ref": "#/$defs/Kind"}], "default": "a"}, {**TEXT, "enum": ["a", "b"]}),
        ({"const": "a"}, {**TEXT, "enum": ["a"]}),
        ({**LIST, "prefixItems": [NUMBER, TEXT]}, {**LIST, "prefixItems": [NUMBER, TEXT]}),
        ({**LIST, "prefixItems": [TEXT]}, {**LIST, "items": TEXT}),
        ({**LIST, "items": {"$ref": "#/$defs/Tree"}}, {**LIST, "items": {**LIST, "items": {}}}),
        (LIST, {**LIST, "items": {}}),
        ({"properties": {"x": TEXT}}, {"type": "object"}),
        ({}, {}),
        (True, {}),
        (NONE, NONE),
        (
            {**TEXT, "description": "Words.\nNote: long"},
            {**TEXT, "description": "Words. Note: long"},
        ),
    ],
)
def test_schemas_of_servers_keep_their_types(schema: Any, shown: dict[str, Any]) -> None:
    defs = {
        "Kind": {"type": "string", "enum": ["a", "b"]},
        "Tree": {"type": "array", "items": {"$ref": "#/$defs/Tree"}},
    }
    made = environment_with({"q": schema}, "q", **{"$defs": defs})
    found = get_json_schema(made.find)["function"]["parameters"]["properties"]["q"]
    assert found == {"description": "q", **shown}


def test_actions_of_several_numbers_are_lists_of_them() -> None:
    class Car(gymnasium.Env[Any, Any]):
        observation_space = spaces.Discrete(2)
        action_space = spaces.Box(np.float32([-1, 0]), np.float32([1, 1]))

    gymnasium.register("TrlCar-v0", Car)
    made: Any = environment_factory(lambda: GymnasiumEnv(gym_id="TrlCar-v0"))
    found = get_json_schema(made.act)["function"]["parameters"]["properties"]["action"]
    assert found == {**LIST, "prefixItems": [NUMBER, NUMBER], "description": "action"}


def test_null_is_given_where_it_is_a_value() -> None:
    optional = {"anyOf": [TEXT, NONE]}
    made = environment_with({"must": optional, "may": optional, "name": TEXT}, "must")
    assert made.find(must=None, may=None, name=None) == "{'must': None, 'may': None}"


@pytest.mark.parametrize(
    ("name", "schema", "told"),
    [
        ("from", TEXT, "no name of a Python parameter"),
        ("class", TEXT, "no name of a Python parameter"),
        ("user-id", TEXT, "no name of a Python parameter"),
        ("self", TEXT, "no name of a Python parameter"),
        ("q", {"enum": [[1], [2]]}, "values are lists or objects"),
        ("q", {"$ref": "https://example.org/a.json"}, "nothing is at its reference https://exam"),
        ("q", {"type": "any"}, "type 'any' is none of JSON's"),
        ("q", {"allOf": [TEXT, NUMBER]}, "several types at once"),
        ("q", {"type": "array", "items": False}, "no value is allowed"),
    ],
)
def test_arguments_that_trl_cannot_be_told_of(name: str, schema: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' of the tool 'find': .*{told}.*\nChange") as e:
        environment_with({name: schema})
    assert str(e.value).count("\n") == 1


def test_an_episode_with_pictures_is_decided_by_its_answer() -> None:
    environment: Any = environment_factory(embedded, split="eval")()
    first = environment.reset(index=3)
    assert [block["type"] for block in first] == ["image", "text"]
    shown = environment.crop_image(bbox_2d=[0, 0, 0.5, 0.5], target_image=1)
    assert [block["type"] for block in shown] == ["text", "image"]
    right = embedded().task("eval", 3).answers[0]
    answered = [{"role": "assistant", "content": [{"type": "text", "text": f"\\boxed{{{right}}}"}]}]
    assert reward([answered], [environment], index=[3]) == [1.0]
    assert reward([answered], [environment]) == [1.0]  # asked again, it says the same
    over = environment.crop_image(bbox_2d=[0, 0, 1, 1], target_image=1)
    assert over == "The episode is over."


@pytest.mark.parametrize(
    ("moves", "messages", "total"),
    [
        ([1, 2], [SAID], 0.9),  # the tool ended it; what is said later does not count
        ([2], [SAID], 0.4),  # the state decides
        ([1], [RESULT], -1.1),  # cut off by the trainer: the hook at truncation
        ([1], [{"role": "assistant", "content": "", "tool_calls": [{}]}], -1.1),
        ([], [SAID], 0.5),
    ],
)
def test_rewards_are_those_of_the_environment(
    moves: list[int], messages: list[dict[str, Any]], total: float
) -> None:
    environment = started()
    for by in moves:
        environment.move(by=by)
    assert reward([messages], [environment]) == [pytest.approx(total)]


def test_bad_calls_are_messages() -> None:
    assert "must be an integer" in started().move(by="far")
    assert "contain </tool_call>" in started().move(by="</tool_call>")


@pytest.mark.parametrize("name", ["reset", "get_reward", "_hidden", "a-b", "class!"])
def test_names_that_trl_cannot_call_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot call a tool '{name}'"):
        environment_factory(lambda: Walk(tools=[Tool(name, optional, "Does.")]))


def test_rows_hold_system_message_and_earlier_turns() -> None:
    class Talk(Walk):
        def load_tasks(self, split: str, **source: Any) -> list[Task]:
            history = (("user", "First?"), ("assistant", "Yes."))
            return [Task("t", "Then?", ("3",), history=history)] * 3  # type: ignore[arg-type]

    (row, _) = rows(Talk, limit=2)
    assert [(m["role"], m["content"]) for m in row["prompt"]] == [
        ("system", "You are a helpful assistant."),
        ("user", "First?"),
        ("assistant", "Yes."),
        ("user", ""),
    ]
    assert len(rows(Talk)) == 3

    class Seen(Walk):
        def load_tasks(self, split: str, **source: Any) -> list[Task]:
            return [Task("t", "Then?", ("3",), history=(("user", f"{IMAGE_MARK}?"),))]

    with pytest.raises(ConfigError, match="pictures in earlier turns"):
        rows(Seen)
