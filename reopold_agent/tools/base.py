"""A tool: a typed function of the episode's state that gives the model text and pictures."""

from __future__ import annotations

import logging
import queue
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from PIL import Image

from reopold_agent.errors import (
    ConfigError,
    ToolError,
    ToolProcessError,
    ToolResultError,
    ToolTimeoutError,
)
from reopold_agent.registry import Registry
from reopold_agent.tools.schema import check_arguments, parameters_schema, shorten
from reopold_agent.types import IMAGE_MARK, Region, Task, ToolCall

_log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_CHARACTERS = 1_000_000
"""A result with more text is refused: no context holds it, and every process would copy it."""

MAX_PICTURES = 256
"""A result with more pictures is refused (the environment shows fewer still)."""

MAX_PIXELS = 200_000_000
"""A result with more pixels, of all pictures together, is refused before it is decoded."""

MAX_MESSAGE = 10_000
"""Characters of an error that the model is told; the rest is cut."""


@dataclass
class EpisodeState:
    """What a tool may look at. It changes nothing of it but ``extra``.

    Attributes:
        task: the question.
        images: every picture of the episode so far at full size, RGB, in order of appearance;
            the model counts them from 1. Pictures that a tool returns are appended here.
        frames: number of leading ``images`` that are frames of the question's video; 0 if none.
        options: per tool, settings from the environment's configuration.
        extra: a place for the tools' own notes within an episode: JSON values, since a tool may
            run in a process of its own (`reopold_agent.tools.isolation`).
    """

    task: Task
    images: list[Image.Image]
    frames: int = 0
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def image(self, number: int) -> Image.Image:
        """The picture of that number, counted from 1.

        Raises:
            ToolError: there is none.
        """
        if not 1 <= number <= len(self.images):
            raise ToolError(
                f"There is no image {shorten(number, 24)}; the images are numbered 1 to "
                f"{len(self.images)}."
            )
        return self.images[number - 1]


@dataclass(frozen=True)
class ToolResult:
    """What the model sees: text with one `IMAGE_MARK` per picture, and the pictures.

    Attributes:
        regions: where the pictures come from, for those who look at the episode later; a tool
            need not say.

    Raises:
        ToolResultError: the text is none, or marks and pictures differ in number.
    """

    text: str
    images: tuple[Image.Image, ...] = ()
    regions: tuple[Region, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise ToolResultError(f"its text is of type {type(self.text).__name__}")
        marks = self.text.count(IMAGE_MARK)
        if marks != len(self.images):
            raise ToolResultError(f"{marks} image marks in its text, but {len(self.images)} images")


class RaisedError(Exception):
    """What a tool raised, where the exception itself must not or cannot be passed on: an exit, an
    interrupt, anything in another process.

    Attributes:
        kind: the exception's class, by name.
        details: its traceback, for the log.
    """

    def __init__(self, kind: str, details: str) -> None:
        self.kind, self.details = kind, details
        super().__init__(kind, details)

    def __str__(self) -> str:
        return f"{self.kind}\n{self.details}"


class Runs(Protocol):
    """Where a tool runs: on a thread (`on_thread`), or in a worker process."""

    def __call__(
        self, tool: Tool, state: EpisodeState, arguments: dict[str, Any], seconds: float, /
    ) -> ToolResult:
        """Runs the tool on checked arguments for at most ``seconds``.

        Returns:
            The result, its pictures RGB and loaded.

        Raises:
            ToolError: for the model, word for word.
            ToolResultError, ToolProcessError: for the model and the log.
            Exception: a bug in the tool, for the log.
        """
        ...


@dataclass(frozen=True)
class Tool:
    """A named function that the model may call.

    Attributes:
        name: as the model calls it; `shown_as` changes it.
        function: ``function(state, **arguments) -> ToolResult``; raises `ToolError` with a
            message for the model.
        description: what the model is told.
        aliases: other names that are accepted.
        timeout_s: wall-clock limit of one call, seconds.
        shown_parameters: JSON schema of the arguments as the model is shown it, where that is
            not the one made from the signature. Calls are checked against the signature anyway.
    """

    name: str
    function: Callable[..., ToolResult]
    description: str
    aliases: tuple[str, ...] = ()
    timeout_s: float = 20.0
    shown_parameters: Mapping[str, Any] | None = None

    def answers_to(self, name: str) -> bool:
        """Whether a call by that name means this tool."""
        return name == self.name or name in self.aliases

    def shown_as(
        self,
        name: str | None = None,
        *,
        description: str | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> Tool:
        """The same tool in the words that a checkpoint was trained on.

        Args:
            name: another name; the old one stays as an alias.
            description: another description.
            parameters: another JSON schema of the arguments.

        Raises:
            ConfigError: the schema's arguments are not the tool's.
        """
        shown = self
        if name is not None and name != self.name:
            others = tuple(a for a in (self.name, *self.aliases) if a != name)
            shown = replace(shown, name=name, aliases=others)
        if description is not None:
            shown = replace(shown, description=description)
        if parameters is not None:
            ours = set(parameters_schema(self.function)["properties"])
            theirs = set(parameters.get("properties", {}))
            if ours != theirs:
                raise ConfigError(
                    f"tool '{self.name}' has the arguments {', '.join(sorted(ours))}, but the "
                    f"schema to show names {', '.join(sorted(theirs)) or 'none'}"
                )
            shown = replace(shown, shown_parameters=parameters)
        return shown

    def schema(self) -> dict[str, Any]:
        """The JSON schema that goes into the system message (OpenAI's and Qwen's form)."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": self.shown_parameters or parameters_schema(self.function),
            },
        }

    def call(
        self,
        state: EpisodeState,
        arguments: object,
        *,
        seconds: float | None = None,
        run: Runs | None = None,
    ) -> tuple[ToolCall, ToolResult]:
        """Runs the tool. Nothing but a result leaves this method, whatever the tool does.

        Args:
            state: the episode.
            arguments: as the model gave them; checked here.
            seconds: a tighter limit than the tool's own, for an episode that runs out of time.
            run: where; a thread of this process unless given.

        Returns:
            The record of the call, and what the model is shown; on failure a text that begins
            with "Execution error:".
        """
        limit = self.timeout_s if seconds is None else min(seconds, self.timeout_s)
        started = time.perf_counter()
        shown: Mapping[str, Any] = arguments if isinstance(arguments, Mapping) else {}
        try:
            given = check_arguments(self.function, arguments)
            result = (run or on_thread)(self, state, given, limit)
        except ToolError as error:
            message = message_of(error)
        except (ToolResultError, ToolProcessError) as error:
            _log.error("tool '%s' failed on %s: %s", self.name, shown, error)
            message = f"The tool {self.name} failed: {message_of(error)}."
        except Exception as error:  # a bug in the tool is the developer's, not the model's
            _log.exception("tool '%s' failed on %s", self.name, shown)
            kind = error.kind if isinstance(error, RaisedError) else type(error).__name__
            message = f"The tool {self.name} failed: {kind}."
        else:
            spent = time.perf_counter() - started
            return ToolCall(self.name, shown, True, None, spent, result.regions), result
        spent = time.perf_counter() - started
        return ToolCall(self.name, shown, False, message, spent), failure(message)


def on_thread(
    tool: Tool, state: EpisodeState, arguments: dict[str, Any], seconds: float
) -> ToolResult:
    """Runs a tool on a thread of this process; see `Runs`."""
    # The pictures are checked within the time limit too: opening one may take long.
    return run_bounded(lambda: usable(tool.function(state, **arguments)), seconds)


def usable(result: object) -> ToolResult:
    """A tool's result with its pictures loaded, as RGB.

    Raises:
        ToolResultError: see `checked`.
        OSError: a picture that cannot be read.
    """
    fit = checked(result)
    return replace(fit, images=tuple(image.convert("RGB") for image in fit.images))


def checked(result: object) -> ToolResult:
    """The result, if it is one that can be shown; its pictures are not decoded yet.

    Raises:
        ToolResultError: not a `ToolResult` of text and PIL images, or too much of either.
    """
    if not isinstance(result, ToolResult):
        raise ToolResultError(f"it returned {_named(result)}, not a ToolResult")
    if len(result.text) > MAX_CHARACTERS:
        raise ToolResultError(
            f"it returned {len(result.text)} characters; the most is {MAX_CHARACTERS}"
        )
    if len(result.images) > MAX_PICTURES:
        raise ToolResultError(
            f"it returned {len(result.images)} images; the most is {MAX_PICTURES}"
        )
    pixels = 0
    for image in result.images:
        if not isinstance(image, Image.Image):
            raise ToolResultError(f"it returned {_named(image)} as a picture, not PIL's Image")
        if 0 in image.size:
            raise ToolResultError(f"it returned a picture of {image.width}x{image.height} pixels")
        pixels += image.width * image.height
        if pixels > MAX_PIXELS:
            raise ToolResultError(f"it returned more than {MAX_PIXELS} pixels")
    regions = tuple(result.regions)
    if len(regions) > MAX_PICTURES or not all(isinstance(each, Region) for each in regions):
        raise ToolResultError("it returned regions that are none")
    return replace(result, regions=regions)


def _named(value: object) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"


def message_of(error: BaseException) -> str:
    """An exception's message, which may be a third party's code to make, cut to a bound."""
    try:
        text = str(error)
    except Exception:
        text = type(error).__name__
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 3] + "..."


def failure(reason: str) -> ToolResult:
    """What the model sees of a call that failed (Pixel-Reasoner's words)."""
    return ToolResult(f"Execution error:\n{reason.replace(IMAGE_MARK, ' ')}")


def run_bounded(function: Callable[[], T], seconds: float) -> T:
    """Runs a function on a daemon thread and waits at most ``seconds`` for it.

    A function that never returns keeps its thread, but neither the episode nor the process's
    exit. (Code that holds the interpreter's lock for ever cannot be bounded by a thread.)

    Raises:
        ToolTimeoutError: the time is up.
        RaisedError: the function wanted to end the process (SystemExit, KeyboardInterrupt ...).
        Exception: whatever else the function raised.
    """
    outcome: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def work() -> None:
        try:
            outcome.put((True, function()))
        except Exception as error:  # handed to the caller, who raises it
            outcome.put((False, error))
        except BaseException as error:  # SystemExit and the like must not pass for success
            outcome.put((False, RaisedError(type(error).__name__, traceback.format_exc())))

    threading.Thread(target=work, daemon=True, name="reopold-tool").start()
    try:
        ok, value = outcome.get(timeout=max(0.0, seconds))
    except queue.Empty:
        raise ToolTimeoutError(f"The tool did not finish within {seconds:g} seconds.") from None
    if not ok:
        raise value
    result: T = value
    return result


TOOLS: Registry[Tool] = Registry("tool", "reopold_agent.tools", Tool)


def tool(
    name: str,
    *,
    description: str | None = None,
    aliases: tuple[str, ...] = (),
    timeout_s: float = 20.0,
) -> Callable[[Callable[..., ToolResult]], Tool]:
    """Makes a tool of a function and registers it.

    The description is the function's docstring unless given. Parameters after the first need
    annotations (`reopold_agent.tools.schema`).

    Raises:
        ConfigError: no description, an unsupported annotation, or a name that is taken.
    """

    def decorate(function: Callable[..., ToolResult]) -> Tool:
        text = description or (function.__doc__ or "").strip().split("\n\n")[0]
        if not text:
            raise ConfigError(f"tool '{name}' needs a description or a docstring")
        made = Tool(name, function, " ".join(text.split()), aliases, timeout_s)
        made.schema()
        return TOOLS.register(name, made, aliases=aliases)

    return decorate
