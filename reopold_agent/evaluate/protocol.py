"""How a benchmark is played: its protocol, what the user sets instead, and how the two differ.

What the user sets for this benchmark (``benchmarks.NAME.pixels``) counts first, then what the user
sets for all (``single.*``, ``pixels.*``), then what the benchmark itself needs, and then the
protocol (``configs/protocol``): its section of the suite before that of benchmarks of one or of
several turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from reopold_agent.config import PixelsConfig, SamplingConfig, build, flatten
from reopold_agent.errors import ConfigError
from reopold_agent.evaluate.benchmarks import Benchmark, LoadedBenchmark, select
from reopold_agent.evaluate.words import configuration, shipped_benchmarks


@dataclass(frozen=True)
class PlayConfig:
    """What the user sets for benchmarks of one kind; None leaves it to the protocol."""

    env: str
    temperature: float | None = None
    top_p: float | None = None
    max_turns: int | None = None
    max_response_tokens: int | None = None
    max_turn_tokens: int | None = None
    env_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Play:
    """How a benchmark is played.

    Attributes:
        temperature, top_p: of the sampling.
        max_turns: assistant turns, including the answer.
        max_response_tokens: tokens after the prompt.
        max_turn_tokens: tokens of one turn.
        pixels: size limits of pictures.
        env_kwargs: settings of the environment.
    """

    temperature: float
    top_p: float
    max_turns: int
    max_response_tokens: int
    max_turn_tokens: int
    pixels: PixelsConfig
    env_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        SamplingConfig(self.temperature, self.top_p)
        for name in ("max_turns", "max_response_tokens", "max_turn_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


def play_of(
    benchmark: Benchmark,
    protocol: Mapping[str, Any],
    given: PlayConfig | None = None,
    pixels: Mapping[str, Any] | None = None,
) -> Play:
    """Returns how a benchmark is played.

    Args:
        benchmark: the benchmark.
        protocol: an option of ``configs/protocol``.
        given: what the user sets for benchmarks of its kind, beside the words of the tools; None
            for the protocol alone.
        pixels: likewise, as ``{"prompt": {"max_pixels": ...}}``; None values count as not set.

    Raises:
        ConfigError: a setting is missing, unknown or wrong.
    """
    shipped = _shipped(benchmark.name)
    own = {"pixels": benchmark.pixels, "env_kwargs": benchmark.env_kwargs}
    needed = {} if shipped is None else {key: getattr(shipped, key) for key in own}
    everyones = {} if given is None else {k: v for k, v in asdict(given).items() if k != "env"}
    parts: list[Mapping[str, Any]] = [
        {"env_kwargs": _words() if benchmark.play == "agentic" else {}},
        _section(protocol, str(benchmark.play)),
        _section(protocol, benchmark.suite, only=str(benchmark.play)),
        needed,
        {**everyones, "env_kwargs": _changed(everyones.get("env_kwargs") or {}, _words())},
        {} if pixels is None else {"pixels": pixels},
        {key: value for key, value in own.items() if value != needed.get(key)},
    ]
    values: dict[str, Any] = {}
    for part in parts:
        values = _merged(values, part)
    return build(Play, values, f"{benchmark.play}.")


def differences(loaded: LoadedBenchmark, play: Play, judge: str) -> list[str]:
    """Returns what differs from the paper, one sentence each; none for other suites.

    Args:
        loaded: the benchmark with its rows.
        play: how it is played.
        judge: name of the judge.
    """
    benchmark = loaded.benchmark
    shipped = _shipped(benchmark.name)
    if benchmark.suite not in PAPER_SUITES or shipped is None:
        return []
    told = [benchmark.note] if benchmark.note else []
    ours, theirs = (_settings(each) for each in (play, play_of(shipped, _paper())))
    for name in _ASKED:
        ours[name], theirs[name] = getattr(benchmark, name), getattr(shipped, name)
    if shipped.questions is not None:
        ours["questions"] = len(loaded.tasks) + len(loaded.left_out)
        theirs["questions"] = shipped.questions
    told += [
        f"{name} {_shown(ours.get(name))} instead of {_shown(theirs.get(name))}"
        for name in dict.fromkeys([*theirs, *ours])
        if ours.get(name) != theirs.get(name)
    ]
    if loaded.blind:
        told.append(f"{loaded.blind} questions without their picture")
    if benchmark.suite != "math":
        told.append(f"judge {judge} instead of gemini-2.0-flash-001, which is no longer served")
    return told


PAPER_SUITES = ("agentic", "visual", "math")
"""Suites that the paper reports."""

_ASKED = ("samples", "limit", "part", "held_out_share", "where", "collapse_repeats", "kind",
          "play", "metric", "format")  # fmt: skip
"""Settings of a benchmark that say what is asked, how often, and how it is graded."""


@cache
def _shipped(name: str) -> Benchmark | None:
    """Returns a benchmark as it is shipped; None for one of the user's own."""
    entries = shipped_benchmarks()
    return select(entries, [name], None)[0] if name in entries else None


def _words() -> Mapping[str, Any]:
    """Returns the words of the paper's tools, the default of ``words=``."""
    words: Mapping[str, Any] = configuration("words/verltool.yaml")
    return words


def _paper() -> Mapping[str, Any]:
    """Returns the paper's protocol."""
    node = OmegaConf.create({"protocol": configuration("protocol/paper.yaml")})
    found: Any = OmegaConf.to_container(node, resolve=True)
    protocol: Mapping[str, Any] = found["protocol"]
    return protocol


def _changed(given: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key not in usual or usual[key] != value}


def _section(protocol: Mapping[str, Any], name: str, only: str | None = None) -> Mapping[str, Any]:
    """Returns a section; nothing if it is for benchmarks of another kind than ``only``."""
    section = protocol.get(name) or {}
    if not isinstance(section, Mapping):
        raise ConfigError(f"'protocol.{name}' must be a group of settings, got {section!r}")
    kind = section.get("play", name if name in ("agentic", "single") else only)
    if only is not None and kind != only:
        return {}
    return {key: value for key, value in section.items() if key != "play"}


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the first values, and over them those of the second.

    None means "not set", except in the environment's settings, which are passed on as they are.
    """
    found = dict(first)
    for key, value in second.items():
        if key == "env_kwargs":
            found[key] = {**(found.get(key) or {}), **(value or {})}
        elif isinstance(value, Mapping):
            found[key] = _merged(found.get(key) or {}, value)
        elif value is not None:
            found[key] = value
    return found


def _settings(play: Play) -> dict[str, Any]:
    """Returns all settings by their dotted keys."""
    return {key: value for key, value in flatten(asdict(play)).items() if value != {}}


def _shown(value: object) -> str:
    text = "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
