"""Actions of any Gymnasium space as the arguments of a tool call: their JSON schema, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from reopold_agent.errors import ConfigError, ToolError
from reopold_agent.tools.schema import as_json, check_by_schema

MAX_NUMBERS = 2000
"""Most numbers of an array: a longer one does not fit a tool call (`tools.parse`)."""

_MAX_SCHEMAS = 64
"""An array of more entries with different bounds gets the widest of them as the bounds of all."""

_MAX_CHARSET = 200
"""A character set that is larger is not written out."""

Schema = dict[str, Any]


class Actions:
    """The actions of a space, as a model writes them.

    A `Dict` has one argument per key, any other space the one argument ``action``. Arrays are
    nested lists, a `Discrete` is its names or an integer, a `OneOf` an object with ``choice`` and
    ``value``.

    Args:
        space: the space.
        names: names of the values of a `Discrete`, or such names by the key of a `Dict` (of nested
            ones: ``outer.inner``).
        defaults: arguments that the model may leave out, with their values in JSON's form.

    Attributes:
        schema: JSON schema of the arguments.

    Raises:
        ConfigError: the space cannot become a schema, or names or defaults do not fit it.
    """

    def __init__(
        self,
        space: spaces.Space[Any],
        names: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self._space = space
        by_key = names if isinstance(names, Mapping) else {"": names} if names else {}
        self._names = {key: [str(name) for name in each] for key, each in by_key.items()}
        self._unused = set(self._names)
        self._defaults = dict(defaults or {})
        self._whole = not isinstance(space, spaces.Dict)
        inner = self._schema(space, "")
        if self._whole:
            inner = _object({"action": inner})
        self.schema: Schema = inner
        if self._unused:
            raise ConfigError(
                f"there are names for {_listed(self._unused)}, but no such Discrete part in "
                f"{space}.\nName parts by the keys of the Dict, or give one list for a Discrete."
            )
        unknown = set(self._defaults) - set(inner["properties"])
        if unknown:
            raise ConfigError(
                f"there are defaults for {_listed(unknown)}, but no such arguments.\n"
                f"The arguments are: {', '.join(inner['properties'])}."
            )
        for key, value in self._defaults.items():
            self._check_default(key, value)
        inner["required"] = [key for key in inner["required"] if key not in self._defaults]

    def action(self, arguments: Mapping[str, Any]) -> Any:
        """Returns the element of the space that stands for arguments checked by the schema.

        Raises:
            ToolError: there is none; the message is for the model.
        """
        given = {**self._defaults, **arguments}
        action = self._value(self._space, "", given["action"] if self._whole else given)
        if not self._space.contains(action):
            raise ToolError(f"This is not an action of the environment, whose actions are: {self}.")
        return action

    def __str__(self) -> str:
        return str(self._space)

    def _check_default(self, key: str, value: Any) -> None:
        """Checks a default as an argument is checked.

        Raises:
            ConfigError: it would be refused.
        """
        part = self._space if self._whole else self._space[key]  # type: ignore[index]  # a Dict
        try:
            check_by_schema(_object({key: self.schema["properties"][key]}), {key: value})
            fits = part.contains(self._value(part, "" if self._whole else key, value))
        except ToolError as error:
            raise ConfigError(
                f"the default of an argument does not fit: {error}\nCorrect action_defaults."
            ) from error
        if not fits:
            raise ConfigError(
                f"the default {as_json(value)} of '{key}' is not in {part}.\n"
                "Correct action_defaults."
            )

    # The schema

    def _schema(self, space: spaces.Space[Any], place: str) -> Schema:
        # A space of its own by a subclass is what its base class is, but for its `contains`.
        for kind, write in self._writers.items():
            if isinstance(space, kind):
                return write(self, space, place)
        if space.dtype is not None and space.dtype.kind == "U":
            return {"type": "string"}
        raise ConfigError(
            f"the action space has the part {type(space).__name__}, which cannot become a JSON "
            f"schema: {space}.\nRegister the environment in a wrapper "
            "(gymnasium.wrappers.TransformAction) that takes Discrete, MultiDiscrete, MultiBinary, "
            "Box, Text, Dict, Tuple, Sequence or OneOf."
        )

    def _discrete(self, space: spaces.Discrete, place: str) -> Schema:
        names = self._names.get(place)
        if names is None:
            first = int(space.start)
            return {"type": "integer", "minimum": first, "maximum": first + int(space.n) - 1}
        self._unused.discard(place)
        if len(names) != space.n or len(set(names)) != len(names):
            raise ConfigError(
                f"{space} has {space.n} values, but the names are {', '.join(names)}.\n"
                "Give each value a name of its own, in order (action_names)."
            )
        return {"type": "string", "enum": names}

    def _multi_discrete(self, space: spaces.MultiDiscrete, place: str) -> Schema:
        return _array(space.shape, space.start, space.start + (space.nvec - 1), _integer)

    def _multi_binary(self, space: spaces.MultiBinary, place: str) -> Schema:
        zeros = np.zeros(space.shape, dtype=np.int64)
        return _array(space.shape, zeros, zeros + 1, _integer)

    def _box(self, space: spaces.Box, place: str) -> Schema:
        leaf = _number if np.issubdtype(space.dtype, np.floating) else _integer
        return _array(space.shape, space.low, space.high, leaf)

    def _text(self, space: spaces.Text, place: str) -> Schema:
        schema: Schema = {
            "type": "string",
            "minLength": space.min_length,
            "maxLength": space.max_length,
        }
        characters = space.characters
        if type(space) is spaces.Text and 0 < len(characters) <= _MAX_CHARSET:
            schema["pattern"] = f"^[{''.join(map(re.escape, characters))}]*$"
        return schema

    def _dict(self, space: spaces.Dict, place: str) -> Schema:
        return _object(
            {str(key): self._schema(each, _below(place, key)) for key, each in space.items()}
        )

    def _tuple(self, space: spaces.Tuple[Any], place: str) -> Schema:
        return _list([self._schema(each, _below(place, i)) for i, each in enumerate(space.spaces)])

    def _sequence(self, space: spaces.Sequence, place: str) -> Schema:
        if space.stack:
            raise ConfigError(
                f"the action space has a stacked Sequence, which cannot become a JSON schema: "
                f"{space}.\nUse Sequence(..., stack=False)."
            )
        return {"type": "array", "items": self._schema(space.feature_space, _below(place, "item"))}

    def _one_of(self, space: spaces.OneOf[Any], place: str) -> Schema:
        choices = [self._schema(each, _below(place, i)) for i, each in enumerate(space.spaces)]
        return {
            "anyOf": [
                _object({"choice": {"type": "integer", "enum": [i]}, "value": choice})
                for i, choice in enumerate(choices)
            ]
        }

    _writers: Mapping[type[Any], Callable[[Actions, Any, str], Schema]] = {
        spaces.Discrete: _discrete,
        spaces.MultiDiscrete: _multi_discrete,
        spaces.MultiBinary: _multi_binary,
        spaces.Box: _box,
        spaces.Text: _text,
        spaces.Dict: _dict,
        spaces.Tuple: _tuple,
        spaces.Sequence: _sequence,
        spaces.OneOf: _one_of,
    }

    # And back

    def _value(self, space: spaces.Space[Any], place: str, given: Any) -> Any:
        if isinstance(space, spaces.Discrete):
            names = self._names.get(place)
            number = int(given) if names is None else int(space.start) + names.index(given)
            return np.dtype(space.dtype).type(number)
        if isinstance(space, (spaces.Box, spaces.MultiDiscrete, spaces.MultiBinary)):
            with np.errstate(over="ignore"):  # told below
                values = np.array(given, dtype=space.dtype)
            if not np.all(np.isfinite(values)):
                raise ToolError(f"'{place or 'action'}': a number is too large for {values.dtype}.")
            return values
        if isinstance(space, spaces.Dict):
            return {
                key: self._value(each, _below(place, key), given[str(key)])
                for key, each in space.items()
            }
        if isinstance(space, spaces.Tuple):
            parts = zip(space.spaces, given, strict=True)
            return tuple(self._value(s, _below(place, i), v) for i, (s, v) in enumerate(parts))
        if isinstance(space, spaces.Sequence):
            within = _below(place, "item")
            return tuple(self._value(space.feature_space, within, each) for each in given)
        if isinstance(space, spaces.OneOf):
            choice = int(given["choice"])
            value = self._value(space.spaces[choice], _below(place, choice), given["value"])
            return np.int64(choice), value
        return given


def _below(place: str, key: object) -> str:
    return f"{place}.{key}" if place else str(key)


def _listed(keys: set[str]) -> str:
    return ", ".join(repr(key) if key else "the whole action" for key in sorted(keys))


def _object(properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _list(items: list[Schema]) -> Schema:
    count = len(items)
    schema: Schema = {"type": "array", "minItems": count, "maxItems": count}
    if items and all(each == items[0] for each in items):
        return {**schema, "items": items[0]}
    return {**schema, "prefixItems": items}


def _array(
    shape: tuple[int, ...],
    low: npt.NDArray[Any],
    high: npt.NDArray[Any],
    leaf: Callable[[Any, Any], Schema],
) -> Schema:
    """Returns the schema of nested lists of a shape, whose entries have these bounds."""
    size = int(np.prod(shape))
    if size > MAX_NUMBERS:
        raise ConfigError(
            f"an action has an array of {size} numbers; a call holds {MAX_NUMBERS}.\n"
            "Choose an environment with smaller actions, or wrap it "
            "(gymnasium.wrappers.TransformAction)."
        )
    if size > _MAX_SCHEMAS:
        low, high = np.full(shape, low.min()), np.full(shape, high.max())
    if not shape:
        return leaf(low[()], high[()])
    return _list([_array(shape[1:], low[i], high[i], leaf) for i in range(shape[0])])


def _integer(low: Any, high: Any) -> Schema:
    return {"type": "integer", "minimum": int(low), "maximum": int(high)}


def _number(low: Any, high: Any) -> Schema:
    schema: Schema = {"type": "number"}
    if np.isfinite(low):
        schema["minimum"] = float(str(low))  # 0.7, not the float32's 0.699999988
    if np.isfinite(high):
        schema["maximum"] = float(str(high))
    return schema
