"""Tools: typed functions of an episode's state that return text and pictures for the model."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import numbers
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
from PIL import Image

from reopold_agent.common.bounded import DeadlineError, RaisedError, run_bounded
from reopold_agent.common.pictures import to_rgb
from reopold_agent.common.pixels import Shown, ShownSizes
from reopold_agent.errors import (
    ConfigError,
    ToolError,
    ToolProcessError,
    ToolResultError,
    ToolTimeoutError,
)
from reopold_agent.registry import Registry
from reopold_agent.tools.schema import (
    arguments_of,
    check_arguments,
    check_by_schema,
    name_of,
    parameters_schema,
    shorten,
    takes_state,
)
from reopold_agent.types import IMAGE_MARK, Region, Task, ToolCall

_log = logging.getLogger(__name__)

MAX_CHARACTERS = 1_000_000
"""Most characters of a result: no context holds more, and every process would copy them."""

MAX_PICTURES = 256
"""Most pictures of a result (an environment shows fewer)."""

MAX_PIXELS = 200_000_000
"""Most pixels of all pictures of a result; checked before they are decoded."""

MAX_MESSAGE = 10_000
"""Most characters of an error message for the model; the rest is cut."""


@dataclass
class EpisodeState:
    """What a tool may read. It may change only ``extra``.

    Attributes:
        task: the question.
        images: every picture of the episode so far at full size, RGB, in order of appearance;
            the model counts them from 1. Pictures that a tool returns are appended here.
        frames: number of leading ``images`` that are frames of the question's video; 0 if none.
        options: per tool, settings from the environment's configuration.
        extra: notes that tools keep within an episode: JSON values, since a tool may run in another
            process (`reopold_agent.tools.isolation`).
        sizes: how pictures are resized for the model.
        overview_side, side: limits of the longer side of the question's pictures and of all
            pictures, to which the environment scales them down before.
    """

    task: Task
    images: list[Image.Image]
    frames: int = 0
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    sizes: ShownSizes = field(default_factory=ShownSizes)
    overview_side: int | None = None
    side: int | None = None

    def image(self, number: int) -> Image.Image:
        """Returns picture ``number``, counted from 1.

        Raises:
            ToolError: there is no such picture.
        """
        if not 1 <= number <= len(self.images):
            raise ToolError(
                f"There is no image {shorten(number, 24)}; the images are numbered 1 to "
                f"{len(self.images)}."
            )
        return self.images[number - 1]

    def shown(self, number: int) -> Shown:
        """Returns how large the model sees picture ``number``, counted from 1.

        Raises:
            ToolError: there is no such picture.
        """
        size = self.image(number).size
        if number > len(self.task.images):
            return self.shown_later(size)
        return self.sizes.of(size, prompt=True, sides=(self.overview_side, self.side))

    def shown_later(self, size: tuple[int, int]) -> Shown:
        """Returns how large the model will see a picture of this size that a tool returns."""
        return self.sizes.of(size, prompt=False, sides=(self.side,))


@dataclass(frozen=True)
class ToolResult:
    """What the model sees, and what the call did to the episode.

    Attributes:
        text: for the model, with one `IMAGE_MARK` per picture.
        images: the pictures.
        regions: which parts of earlier pictures these show, for the viewer; optional.
        done: whether the call ends the episode.
        reward: reward of this step. A call that ends the episode without one leaves the verdict to
            the environment (`ToolEnv.reward`).
        success: verdict of a call that ends the episode with a reward; None for ``reward > 0``.

    Raises:
        ToolResultError: the text is not a string, marks and pictures differ in number, the reward
            is no finite number, or there is a verdict on an episode that goes on, or one that is
            neither true nor false.
    """

    text: str
    images: tuple[Image.Image, ...] = ()
    regions: tuple[Region, ...] = ()
    done: bool = False
    reward: float | None = None
    success: bool | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise ToolResultError(f"its text is of type {type(self.text).__name__}")
        if self.reward is not None and not _is_finite(self.reward):
            raise ToolResultError(f"its reward is {self.reward!r}, not a finite number")
        if self.success is not None and (self.reward is None or not self.done):
            raise ToolResultError("it has a verdict (success) without done=True and a reward")
        if self.success is not None and not is_verdict(self.success):
            raise ToolResultError(f"its success is {self.success!r}, neither True nor False")
        marks = self.text.count(IMAGE_MARK)
        if marks != len(self.images):
            raise ToolResultError(f"{marks} image marks in its text, but {len(self.images)} images")


class ToolRunner(Protocol):
    """Runs a tool: on a thread (`on_thread`), or in a worker process."""

    def __call__(
        self, tool: Tool, state: EpisodeState, arguments: dict[str, Any], seconds: float, /
    ) -> ToolResult:
        """Runs the tool on checked arguments for at most ``seconds``.

        Returns:
            The result, its pictures RGB and loaded.

        Raises:
            ToolError: its message is shown to the model word for word.
            ToolResultError, ToolProcessError: its message is shown to the model and logged.
            Exception: a bug in the tool; it is logged.
        """
        ...


@dataclass(frozen=True)
class Tool:
    """A named function that the model may call.

    Attributes:
        name: the name that the model calls; `shown_as` changes it.
        function: ``function(state, **arguments) -> ToolResult``; raises `ToolError` with a
            message for the model. Without ``input_schema`` the state may be left out.
        description: for the model.
        aliases: other accepted names.
        timeout_s: wall-clock limit of one call, seconds.
        shown_parameters: JSON schema of the arguments for the model if it differs from the one
            made from the signature. Calls are always checked against the signature.
        input_schema: JSON schema of the arguments, for a function whose signature does not tell
            them (``**arguments``); calls are checked against it.
        inline: whether it may run on the caller's thread, which is faster but enforces no time
            limit: for a tool whose work is bounded by the size of the episode's pictures. Its new
            pictures are shown as they are, not copied: it must not change them afterwards.
        original_words: for a tool with the option ``sizes`` (``shown`` or ``original``): by
            argument, the description under ``original``. Under ``shown`` such an argument is in
            pixels as the model sees them, and an environment that shows the tool's own words
            states the sizes of the question's pictures. None: the tool has no such option.
        runner: runs the tool instead of a thread or a worker process: for one whose work is done
            elsewhere, by a server.
    """

    name: str
    function: Callable[..., ToolResult]
    description: str
    aliases: tuple[str, ...] = ()
    timeout_s: float = 20.0
    shown_parameters: Mapping[str, Any] | None = None
    input_schema: Mapping[str, Any] | None = None
    inline: bool = False
    original_words: Mapping[str, str] | None = None
    runner: ToolRunner | None = None

    @classmethod
    def of(
        cls,
        function: Callable[..., ToolResult],
        name: str | None = None,
        description: str | None = None,
        **fields: Any,
    ) -> Tool:
        """Makes a tool of a typed function.

        Parameters but the state need annotations (`reopold_agent.tools.schema`).

        Args:
            function: ``function(state, **arguments) -> ToolResult``, with or without the state.
            name: its name; None for the function's.
            description: for the model; None for the first paragraph of the docstring.
            **fields: the other attributes.

        Raises:
            ConfigError: no description, an unsupported annotation, or a parameter that cannot be
                given by its name.
        """
        name = name_of(function) if name is None else name
        documented = function.func if isinstance(function, partial) else function
        text = description or (documented.__doc__ or "").strip().split("\n\n")[0]
        if not text:
            raise ConfigError(f"tool '{name}' needs a description or a docstring")
        made = cls(name, function, " ".join(text.split()), **fields)
        made.schema()
        return made

    @cached_property
    def takes_state(self) -> bool:
        """Whether the function is called with the episode's state before its arguments."""
        return self.input_schema is not None or takes_state(self.function)

    @cached_property
    def _arguments(self) -> Mapping[str, inspect.Parameter]:
        return arguments_of(self.function)

    @property
    def needs_sizes(self) -> bool:
        """Whether the model needs to know how large it sees the question's pictures."""
        return bool(self.original_words) and self.shown_parameters is None

    def answers_to(self, name: str) -> bool:
        """Whether a call to ``name`` is a call to this tool."""
        return name == self.name or name in self.aliases

    def shown_as(
        self,
        name: str | None = None,
        *,
        description: str | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> Tool:
        """Returns the same tool with the name and schema that a checkpoint was trained on.

        Args:
            name: another name; the old one becomes an alias.
            description: another description.
            parameters: another JSON schema of the arguments.

        Raises:
            ConfigError: the schema names other arguments than the tool has.
        """
        shown = self
        if name is not None and name != self.name:
            others = tuple(a for a in (self.name, *self.aliases) if a != name)
            shown = replace(shown, name=name, aliases=others)
        if description is not None:
            shown = replace(shown, description=description)
        if parameters is not None:
            ours = set(self.parameters().get("properties", {}))
            theirs = set(parameters.get("properties", {}))
            if ours != theirs:
                raise ConfigError(
                    f"tool '{self.name}' has the arguments {', '.join(sorted(ours))}, but the "
                    f"schema to show names {', '.join(sorted(theirs)) or 'none'}"
                )
            shown = replace(shown, shown_parameters=parameters)
        return shown

    def with_options(self, options: Mapping[str, Any]) -> Tool:
        """Returns the tool with the words that suit its options; others' words stay.

        Raises:
            ConfigError: ``sizes`` is neither ``shown`` nor ``original``.
        """
        if self.original_words is None:
            return self
        sizes = options.get("sizes", "shown")
        if sizes not in ("shown", "original"):
            raise ConfigError(f"tool '{self.name}': sizes must be shown or original, got '{sizes}'")
        if sizes == "shown" or not self.needs_sizes:
            return self
        parameters = self.parameters()
        for argument, words in self.original_words.items():
            parameters["properties"][argument]["description"] = words
        return replace(self, shown_parameters=parameters)

    def parameters(self) -> dict[str, Any]:
        """Returns the JSON schema that calls are checked against."""
        if self.input_schema is not None:
            return dict(self.input_schema)
        return parameters_schema(self.function)

    def schema(self) -> dict[str, Any]:
        """Returns the JSON schema for the system message (OpenAI's and Qwen's form)."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": self.shown_parameters or self.parameters(),
            },
        }

    def call(
        self,
        state: EpisodeState,
        arguments: object,
        *,
        seconds: float | None = None,
        run: ToolRunner | None = None,
    ) -> tuple[ToolCall, ToolResult]:
        """Runs the tool and turns every failure into a result.

        Args:
            state: the episode's.
            arguments: as the model gave them; they are checked here.
            seconds: a tighter limit than the tool's own, for an episode that runs out of time.
            run: runs the tool; by default the tool's own ``runner``, or `on_thread`.

        Returns:
            The record of the call and the result for the model; the text of a failure begins
            with "Execution error:".
        """
        limit = self.timeout_s if seconds is None else min(seconds, self.timeout_s)
        started = time.perf_counter()
        shown: Mapping[str, Any] = arguments if isinstance(arguments, Mapping) else {}
        try:
            if self.input_schema is None:
                given = check_arguments(self.function, arguments, self._arguments)
            else:
                given = check_by_schema(self.input_schema, arguments)
            result = (run or self.runner or on_thread)(self, state, given, limit)
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
    """Runs a tool in this process, on a thread of its own unless it is ``inline``.

    Raises:
        Exception: as `ToolRunner` does.
    """
    if tool.inline:
        given = (state,) if tool.takes_state else ()
        return usable(tool.function(*given, **arguments), state.images, handed_over=True)
    theirs = replace(state)
    call = partial(tool.function, theirs) if tool.takes_state else tool.function
    try:
        # The pictures are checked within the time limit too: opening one may take long.
        return run_bounded(lambda: usable(call(**arguments), state.images), seconds)
    except DeadlineError:
        # The thread goes on; what it still does must not change the episode.
        with suppress(Exception):  # of a third party's values, which then stay shared
            theirs = replace(theirs, extra=copy.deepcopy(theirs.extra))
        raise ToolTimeoutError(f"The tool did not finish within {seconds:g} seconds.") from None
    finally:
        state.extra = theirs.extra


def usable(
    result: object, known: Sequence[Image.Image], *, handed_over: bool = False
) -> ToolResult:
    """Checks a tool's result and returns it with its pictures loaded, as RGB.

    Args:
        result: what the tool returned.
        known: the episode's pictures, which are not copied if the tool returns them.
        handed_over: whether the tool will not change its pictures, so that these need no copy.

    Raises:
        ToolResultError: the result is invalid; see `checked`.
        OSError: a picture cannot be read.
    """
    valid = checked(result)
    same = {id(image) for image in known}

    def rgb(image: Image.Image) -> Image.Image:
        if id(image) in same:
            return image
        image.load()
        made = to_rgb(image)
        # The tool may go on using a picture of its own.
        return made.copy() if made is image and not handed_over else made

    return replace(valid, images=tuple(map(rgb, valid.images)))


def checked(result: object) -> ToolResult:
    """Returns a tool's result if it is valid; does not decode its pictures.

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
        raise ToolResultError("it returned invalid regions")
    return replace(result, regions=regions)


def is_verdict(value: object) -> bool:
    """Whether a value says true or false: a boolean, NumPy's too, or the number 0 or 1."""
    return isinstance(value, (numbers.Real, np.bool_)) and value in (0, 1)


def _is_finite(value: object) -> bool:
    try:
        return math.isfinite(value)  # type: ignore[arg-type]
    except TypeError:
        return False


def _named(value: object) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"


def message_of(error: BaseException) -> str:
    """Returns an exception's message, cut; making it may run a third party's code and fail."""
    try:
        text = str(error)
    except Exception:
        text = type(error).__name__
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 3] + "..."


def failure(reason: str) -> ToolResult:
    """Returns the result that the model is shown for a failed call, in Pixel-Reasoner's words."""
    return ToolResult(f"Execution error:\n{reason.replace(IMAGE_MARK, ' ')}")


TOOLS: Registry[Tool] = Registry("tool", "reopold_agent.tools", Tool)


def tool(
    name: str,
    *,
    description: str | None = None,
    aliases: tuple[str, ...] = (),
    timeout_s: float = 20.0,
    inline: bool = False,
    original_words: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., ToolResult]], Tool]:
    """Makes a decorator that turns a function into a tool (`Tool.of`) and registers it.

    Raises:
        ConfigError: no description, an unsupported annotation, or a name that is taken.
    """

    def decorate(function: Callable[..., ToolResult]) -> Tool:
        made = Tool.of(
            function,
            name,
            description,
            aliases=aliases,
            timeout_s=timeout_s,
            inline=inline,
            original_words=original_words,
        )
        return TOOLS.register(name, made, aliases=aliases)

    return decorate
