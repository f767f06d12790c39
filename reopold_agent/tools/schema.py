"""Makes a JSON schema from a typed signature, and checks a model's arguments against it.

Both use the same annotations, so the schema and the accepted values cannot differ. The check is
strict on purpose: a boolean is not a number, a string is not a list, and NaN is refused. A tool
that brings its schema (a server's, an action space's) is checked against that.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError, best_match, relevance
from jsonschema.validators import validator_for
from referencing import Registry

from reopold_agent.errors import ConfigError, ToolError

DEFAULT_DRAFT = Draft202012Validator
"""The draft of a JSON schema that does not name its own."""

_NAMES = {int: "integer", float: "number", str: "string", bool: "boolean"}
_ARTICLES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def parameters_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """Returns the JSON schema of a tool's arguments: all parameters but the episode's state.

    ``Annotated[T, "text"]`` adds a description; a default makes a parameter optional.

    Raises:
        ConfigError: an annotation is missing or not supported, or a parameter cannot be given by
            its name.
    """
    properties: dict[str, Any] = {}
    required = []
    for name, parameter in arguments_of(function).items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigError(
                f"tool '{name_of(function)}' has the parameter '{parameter}', which a call cannot "
                "give by a name.\nName each argument, with an annotation: query: str"
            )
        hint = _hint(function, name)
        properties[name] = _schema(hint, f"{name_of(function)}({name})")
        if parameter.default is inspect.Parameter.empty:
            required.append(name)
    return {"type": "object", "properties": properties, "required": required}


def takes_state(function: Callable[..., Any]) -> bool:
    """Returns whether a tool's first parameter is the episode's state.

    It is if its annotation says ``EpisodeState``, or if it is named ``state`` (or ``_``) and has no
    annotation, or one that says nothing or names another class than a container's: an argument
    ``state: Optional[str]`` is refused like any other.
    """
    first = next(iter(inspect.signature(function).parameters.values()), None)
    if first is None or first.kind not in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
        return False
    try:
        hint = _hints(_typed(function)).get(first.name)
    except NameError:
        hint = first.annotation
    if _is_state(hint):
        return True
    plain = hint is None or hint is Any or isinstance(hint, str)
    other = isinstance(hint, type) and hint not in (*_NAMES, dict, list, tuple, set, bytes)
    return (plain or other) and first.name.strip("_") in ("state", "")


def name_of(function: Callable[..., Any]) -> str:
    """Returns the name of a function, or of a callable's class."""
    function = function.func if isinstance(function, partial) else function
    return str(getattr(function, "__name__", type(function).__name__))


def check_arguments(
    function: Callable[..., Any],
    arguments: object,
    known: Mapping[str, inspect.Parameter] | None = None,
) -> dict[str, Any]:
    """Checks and converts the arguments of a call.

    Args:
        function: the tool's.
        arguments: as the model gave them.
        known: its `arguments_of`, which take as long to read as the check.

    Raises:
        ToolError: an argument is wrong; the message says for the model what is expected.
    """
    if not isinstance(arguments, Mapping):
        raise ToolError(f"The arguments must be a JSON object, got {as_json(arguments)}.")
    known = arguments_of(function) if known is None else known
    unknown = [str(key) for key in arguments if key not in known]
    if unknown:
        raise ToolError(
            f"Unknown argument '{shorten(unknown[0], 40)}'. The arguments are: {', '.join(known)}."
        )
    checked: dict[str, Any] = {}
    for name, parameter in known.items():
        if name in arguments:
            checked[name] = _check(_hint(function, name), arguments[name], name)
        elif parameter.default is inspect.Parameter.empty:
            raise ToolError(f"The argument '{name}' is missing.")
    return checked


def check_by_schema(schema: Mapping[str, Any], arguments: object) -> dict[str, Any]:
    """Checks the arguments of a call against a JSON schema (draft 2020-12 unless it names another).

    Raises:
        ToolError: an argument is wrong; the message says for the model what is expected.
    """
    if not isinstance(arguments, Mapping):
        raise ToolError(f"The arguments must be a JSON object, got {as_json(arguments)}.")
    # An empty registry: references to other documents are not fetched.
    checker = validator_for(schema, default=DEFAULT_DRAFT)(schema, registry=Registry())
    error = max(checker.iter_errors(arguments), key=relevance, default=None)
    if error is not None:
        error = _meant(error)
        place = error.json_path.removeprefix("$").removeprefix(".")
        where = f"'{shorten(place)}': " if place else ""
        raise ToolError(f"{where}{shorten(error.message, 400)}.")
    return dict(arguments)


def _meant(error: ValidationError) -> ValidationError:
    """Returns what is wrong within the alternative (of ``anyOf``) that a value was meant to be.

    An object is meant to be the alternative whose fixed values it has, such as the number of a
    choice: what is wrong with its other values by another alternative is not to the point.
    """
    branches: dict[Any, list[ValidationError]] = {}
    for each in error.context or ():
        branches.setdefault(each.relative_schema_path[0], []).append(each)
    if not branches:
        return error
    meant = [errors for errors in branches.values() if not any(map(_is_other, errors))]
    if len(meant) == 1:
        return _meant(max(meant[0], key=relevance))
    first, *others = branches.values()
    for each in first:
        same = [[e for e in errors if e.relative_path == each.relative_path] for errors in others]
        if all(any(e.message == each.message for e in errors) for errors in same):
            return each  # whichever was meant, this is wrong
        if not meant and _is_other(each) and all(any(map(_is_other, errors)) for errors in same):
            alike = [each, *(next(filter(_is_other, errors)) for errors in same)]
            listed = [value for e in alike for value in _fixed(e)]
            each.message = f"{each.instance!r} is not one of {listed!r}"
            return each
    return best_match(iter([error])) or error


def _is_other(error: ValidationError) -> bool:
    """Returns whether an object lacks a fixed value of an alternative."""
    return error.validator in ("enum", "const") and len(error.relative_path) == 1


def _fixed(error: ValidationError) -> list[Any]:
    value: Any = error.validator_value
    return list(value) if error.validator == "enum" else [value]


def as_json(value: object) -> str:
    """Returns a value as a model writes it, cut as `shorten` does: strings have quotes."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except (RecursionError, TypeError, ValueError):  # too deep, or too many digits
        text = f"a {type(value).__name__}"
    return shorten(text)


def shorten(value: object, most: int = 80) -> str:
    """Returns a value as text for a message, cut so that it cannot fill the context."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except (RecursionError, ValueError):  # too deep, or an integer of more digits than allowed
        text = f"a {type(value).__name__}"
    # Half a surrogate pair can be written as a JSON escape, but is not text that can be encoded.
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= most else text[: most - 3] + "..."


def arguments_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Returns the parameters of a tool without the episode's state."""
    parameters = list(inspect.signature(function).parameters.items())
    return dict(parameters[1:] if takes_state(function) else parameters)


def _is_state(hint: Any) -> bool:
    if isinstance(hint, str):  # its name is not known at run time
        return "EpisodeState" in hint
    classes = hint.__mro__ if isinstance(hint, type) else ()
    return any(each.__name__ == "EpisodeState" for each in classes) or any(
        _is_state(each) for each in get_args(hint) if isinstance(each, type)
    )


def _typed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function that has the annotations."""
    if isinstance(function, partial):
        return _typed(function.func)
    return function if inspect.isroutine(function) else type(function).__call__


@lru_cache(maxsize=512)  # reading them takes ten times as long as checking the arguments
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(function, include_extras=True)


def _hint(function: Callable[..., Any], name: str) -> Any:
    try:
        hints = _hints(_typed(function))
    except NameError as error:
        raise ConfigError(
            f"an annotation of tool '{name_of(function)}' cannot be read: {error}; import the name "
            "at the top of the module, not under TYPE_CHECKING"
        ) from error
    if name not in hints:
        raise ConfigError(
            f"the parameter '{name}' of tool '{name_of(function)}' has no annotation.\nAdd its "
            f"type ({name}: str); for the episode's state, name the first parameter state"
        )
    return hints[name]


def _schema(hint: Any, where: str) -> dict[str, Any]:
    if get_origin(hint) is Annotated:
        inner, *notes = get_args(hint)
        schema = _schema(inner, where)
        text = next((note for note in notes if isinstance(note, str)), None)
        if text is None:
            return schema
        # Qwen's schemas have type, description, items in this order.
        kind = schema.pop("type")
        return {"type": kind, "description": text, **schema}
    if hint in _NAMES:
        return {"type": _NAMES[hint]}
    if get_origin(hint) is list and get_args(hint):
        (item,) = get_args(hint)
        return {"type": "array", "items": _schema(item, where)}
    if get_origin(hint) is Literal:
        values = get_args(hint)
        kinds = {type(value) for value in values}
        if len(kinds) == 1 and (kind := kinds.pop()) in (str, int):
            return {"type": _NAMES[kind], "enum": list(values)}
    raise ConfigError(
        f"{where}: {hint!r} is not supported; use int, float, str, bool, list[...], or Literal of "
        "strings or of integers"
    )


def _check(hint: Any, value: Any, where: str) -> Any:
    if get_origin(hint) is Annotated:
        return _check(get_args(hint)[0], value, where)
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise ToolError(f"'{where}' must be a list, got {as_json(value)}.")
        (item,) = get_args(hint)
        return [_check(item, each, f"{where}[{i}]") for i, each in enumerate(value)]
    if get_origin(hint) is Literal:
        for option in get_args(hint):
            # By type first: in Python True equals 1. In JSON, though, 90.0 is the number 90.
            same = type(value) is type(option) or (type(value), type(option)) == (float, int)
            if same and value == option:
                return option
        options = ", ".join(map(as_json, get_args(hint)))
        raise ToolError(f"'{where}' must be one of {options}, got {as_json(value)}.")
    given = _plain(hint, value)
    if given is None:
        raise ToolError(f"'{where}' must be {_ARTICLES[hint]}, got {as_json(value)}.")
    return given


def _plain(hint: Any, value: Any) -> Any:
    """Returns a string, number or truth value as the type of the annotation; None if it is none."""
    if isinstance(value, bool) != (hint is bool):
        return None
    if hint is float and isinstance(value, (int, float)):
        try:
            number = float(value)
        except OverflowError:
            return None
        return number if math.isfinite(number) else None
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # JSON has one kind of number; 2.0 means 2
    return value if isinstance(value, hint) else None
