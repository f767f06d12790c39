"""Tool environments for TRL's ``GRPOTrainer(environment_factory=...)``.

TRL makes one object per rollout, calls its public methods as tools, and renders the conversation
itself; it has no step of text. So each tool becomes a method that plays a turn of the environment,
and the last turn is given to the environment when TRL asks for rewards.
"""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias, Union, get_args, get_origin

from PIL import Image
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from reopold_agent.envs.base import ToolEnv
from reopold_agent.envs.registration import task_seed
from reopold_agent.envs.spaces import as_observation, parts_of
from reopold_agent.errors import ConfigError, ToolError
from reopold_agent.tools.parse import write_tool_call
from reopold_agent.types import IMAGE_MARK

_RESERVED = ("reset", "get_reward")

Content: TypeAlias = "str | list[dict[str, Any]]"
"""A turn: its text, or content blocks if it has pictures."""


class TrlEnvironment:
    """What an object of an `environment_factory` is; its public methods are the tools."""

    _make_env: ClassVar[Callable[[], ToolEnv]]
    _split: ClassVar[str]

    def __init__(self) -> None:
        self._env = type(self)._make_env()
        self._over = True
        self._reward = 0.0

    def reset(self, index: int, **row: Any) -> Content:
        """Starts the episode of a task; returns its first turn.

        Args:
            index: of the task in the split; a column of `rows`.
            **row: the row's other columns, which are not needed.
        """
        options = {"split": self._split, "index": index}
        observation, _ = self._env.reset(seed=task_seed(self._split, index), options=options)
        self._over, self._reward = False, 0.0
        return _content(observation)

    def _call(self, name: str, arguments: Mapping[str, Any]) -> Content:
        if self._over:
            return "The episode is over."
        try:
            turn = write_tool_call(name, arguments)
        except ToolError as error:
            return str(error)
        return _content(self._step(turn))

    def _step(self, turn: str) -> Any:
        observation, reward, terminated, truncated, _ = self._env.step(turn)
        self._reward += reward
        self._over = terminated or truncated
        return observation

    def _finish(self, answer: str | None) -> float:
        """Returns the sum of the episode's rewards.

        Args:
            answer: the last turn, or None if the trainer's budgets ended the episode before.
        """
        if not self._over and answer is not None:
            self._step(answer)
        if not self._over:
            self._reward += self._env.truncate()[0]
            self._over = True
        return self._reward


def environment_factory(
    make_env: Callable[[], ToolEnv], *, split: str = "train"
) -> type[TrlEnvironment]:
    """Returns a class for TRL's ``environment_factory``, to be trained on `rows` with `reward`.

    A tool's arguments are described to the model by TRL, from annotations; limits that only a
    JSON schema can say, and the keys of objects, are checked when the tool is called.

    Args:
        make_env: makes one environment.
        split: "train" or "eval".

    Raises:
        ConfigError: a tool has a name that TRL reserves, it or an argument has one that is no
            Python name, or an argument's schema has no annotation.
    """
    methods = {}
    for tool in make_env().tools:
        if not tool.name.isidentifier() or tool.name.startswith("_") or tool.name in _RESERVED:
            raise ConfigError(
                f"TRL cannot call a tool '{tool.name}'.\n"
                f"Show it under another name: tools=[{{name: {tool.name}, as: NAME}}]."
            )
        methods[tool.name] = _method(tool.schema()["function"])
    # TRL takes every function without an underscore for a tool.
    members = {"_make_env": staticmethod(make_env), "_split": split, **methods}
    return type("TrlEnvironment", (TrlEnvironment,), members)


def rows(
    make_env: Callable[[], ToolEnv], *, split: str = "train", limit: int | None = None
) -> list[dict[str, Any]]:
    """Returns the rows of a split for ``datasets.Dataset.from_list``: ``prompt`` and ``index``.

    The prompt holds the system message and earlier turns; TRL adds the tools, and ``reset`` the
    question.

    Args:
        make_env: makes one environment.
        split: "train" or "eval".
        limit: number of tasks, the first ones; None for all.

    Raises:
        ConfigError: a task has pictures in earlier turns.
    """
    env = make_env()
    count = env.num_tasks(split)
    return [_row(env, split, index) for index in range(min(count, limit or count))]


def _row(env: ToolEnv, split: str, index: int) -> dict[str, Any]:
    task = env.task(split, index)
    system = env.system_message(task)
    turns = [("system", system)] if system else []
    turns += [*task.history, ("user", "")]
    if any(IMAGE_MARK in text for _, text in task.history):
        raise ConfigError(
            f"task {task.id} has pictures in earlier turns, which TRL's environments cannot show.\n"
            "Leave such tasks out."
        )
    return {"prompt": [{"role": role, "content": text} for role, text in turns], "index": index}


def reward(
    completions: Sequence[Sequence[Mapping[str, Any]]],
    environments: Sequence[TrlEnvironment],
    **columns: Any,
) -> list[float]:
    """Returns the sum of each episode's rewards, for TRL's ``reward_funcs``.

    Args:
        completions: the messages of each rollout.
        environments: the object of each rollout.
        **columns: of the rows, which are not needed.
    """
    return [
        environment._finish(_answer(messages[-1]))
        for messages, environment in zip(completions, environments, strict=True)
    ]


def _answer(message: Mapping[str, Any]) -> str | None:
    """Returns the text of a last turn; None if it is no answer of the student."""
    if message["role"] != "assistant" or message.get("tool_calls"):
        return None
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content)


def _content(observation: Any) -> Content:
    shown = as_observation(observation)
    if not shown["images"]:  # templates of text models pass over blocks
        return shown["text"]
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": Image.fromarray(part)}
        for part in parts_of(shown)
    ]


def _method(schema: Mapping[str, Any]) -> Callable[..., Any]:
    """Returns a method that plays a call, with the signature and docstring that TRL reads."""
    name, arguments = schema["name"], schema["parameters"]
    required = arguments.get("required", ())
    properties = sorted(arguments.get("properties", {}).items(), key=lambda p: p[0] not in required)

    def method(self: TrlEnvironment, **given: Any) -> Any:
        return self._call(
            name, {k: v for k, v in given.items() if v is not None or k not in absent}
        )

    resolver = Registry[Any]().resolver_with_root(DRAFT202012.create_resource(arguments))
    kinds = {}
    for key, each in properties:
        try:
            if not key.isidentifier() or keyword.iskeyword(key) or key == "self":
                raise ValueError("it is no name of a Python parameter")
            kinds[key] = _annotation(each, lambda at: resolver.lookup(at).contents)
        except ValueError as error:
            raise ConfigError(
                f"TRL cannot be told of the argument '{key}' of the tool '{name}': {error}.\n"
                "Change the argument where the tool is made, or make the environment without this "
                "tool (tools=[...])."
            ) from error
    # A model writes null for what it leaves out, too.
    absent = {key for key, kind in kinds.items() if not _takes_null(kind)}
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    for key, kind in kinds.items():
        default = inspect.Parameter.empty if key in required else None
        parameters.append(
            inspect.Parameter(
                key, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=kind
            )
        )
    lines = [f"    {key}: {_description(each) or key}" for key, each in properties]
    method.__name__ = method.__qualname__ = name
    method.__doc__ = "\n".join([schema["description"], "", *(["Args:", *lines] if lines else [])])
    method.__annotations__ = kinds
    method.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return method


_KINDS = {
    "integer": int,
    "number": float,
    "string": str,
    "boolean": bool,
    "object": dict,
    "null": type(None),
}


def _description(schema: Any) -> str:
    """Returns it in one line: TRL would read ``word:`` at the start of a line as an argument."""
    return "" if schema is True else " ".join(str(schema.get("description", "")).split())


def _takes_null(kind: Any) -> bool:
    choices = get_args(kind) if get_origin(kind) in (Union, Literal) else (kind,)
    return not {Any, None, type(None)}.isdisjoint(choices)


def _annotation(
    schema: Any, lookup: Callable[[str], Any], within: frozenset[str] = frozenset()
) -> Any:
    """Returns the annotation from which TRL makes a schema of the same values, or of more.

    Args:
        schema: of a value.
        lookup: returns what is at a reference.
        within: the references that it is within: what contains itself is any value.

    Raises:
        ValueError: there is none.
    """
    if schema is True:
        return Any
    if not isinstance(schema, Mapping):
        raise ValueError("no value is allowed")
    if "$ref" in schema:
        reference = schema["$ref"]
        if reference in within:
            return Any
        try:
            found = lookup(reference)
        except Unresolvable as error:
            raise ValueError(f"nothing is at its reference {reference}") from error
        return _annotation(found, lookup, within | {reference})
    if "enum" in schema or "const" in schema:
        values = tuple(schema["enum"] if "enum" in schema else [schema["const"]])
        if not all(value is None or isinstance(value, (bool, int, float, str)) for value in values):
            raise ValueError("its values are lists or objects")
        return Literal[values]
    kind = schema.get("type")
    if isinstance(kind, list):
        return _union([_annotation({**schema, "type": each}, lookup, within) for each in kind])
    if kind == "array":
        items = schema.get("prefixItems", schema.get("items", True))
        if not isinstance(items, list):
            return list[_annotation(items, lookup, within)]  # type: ignore[misc]
        kinds = tuple(_annotation(each, lookup, within) for each in items)
        return tuple[kinds] if len(kinds) > 1 else list[kinds[0] if kinds else Any]  # type: ignore
    if kind in _KINDS:
        return _KINDS[kind]
    if kind is not None:
        raise ValueError(f"its type '{kind}' is none of JSON's")
    choices = schema.get("anyOf", schema.get("oneOf"))
    if choices:
        return _union([_annotation(each, lookup, within) for each in choices])
    parts = {_annotation(each, lookup, within) for each in schema.get("allOf", ())} - {Any}
    if len(parts) > 1:
        raise ValueError("it is several types at once (allOf)")
    return parts.pop() if parts else dict if "properties" in schema else Any


def _union(kinds: Sequence[Any]) -> Any:
    """Returns a union in which no two annotations are of the same JSON type, as TRL needs it."""
    found: dict[Any, Any] = {}
    values: list[Any] = []
    for kind in kinds:
        for each in get_args(kind) if get_origin(kind) is Union else (kind,):
            if get_origin(each) is Literal:
                values += get_args(each)
                continue
            plain = get_origin(each) or each
            plain = list if plain is tuple else plain
            several = list[Any] if plain is list else plain
            found[plain] = each if found.get(plain, each) == each else several
    if Any in found:
        return Any
    values = [value for value in values if type(value) not in found]
    distinct = (*found.values(), *([Literal[tuple(values)]] if values else []))
    return Union[distinct]  # noqa: UP007
