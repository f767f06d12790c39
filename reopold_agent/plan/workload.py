"""The episodes of a step and their lengths."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reopold_agent.config import TrainConfig
from reopold_agent.errors import ConfigError

_ASSUMED_FOR = 784
"""Pixels of a token in `_ASSUMED`: Qwen2.5-VL has one per 28 x 28 pixels."""


@dataclass(frozen=True)
class PictureLoad:
    """Mean number of pictures, and mean tokens of each."""

    count: float = 0.0
    tokens: float = 0.0

    @property
    def total(self) -> float:
        """Tokens of all pictures."""
        return self.count * self.tokens


@dataclass(frozen=True)
class Workload:
    """Episodes of a step; lengths are means per episode, in tokens.

    Attributes:
        response: tokens that the student samples, at most ``response_max``.
        observation_text: text tokens that tools return.
        sources: source of each assumed or measured figure.
    """

    prompts: int
    samples: int
    prompt_text: float
    prompt_pictures: PictureLoad
    response: float
    response_max: int
    observation_text: float
    observation_pictures: PictureLoad
    sources: Mapping[str, str]

    def __post_init__(self) -> None:
        if not 0 < self.response <= self.response_max:
            raise ConfigError(
                f"the mean response must lie in (0, {self.response_max}], the budget "
                f"rollout.max_response_tokens; got {self.response:g}"
            )

    @property
    def episodes(self) -> int:
        """Episodes per step."""
        return self.prompts * self.samples

    @property
    def prompt(self) -> float:
        """Tokens of the prompt."""
        return self.prompt_text + self.prompt_pictures.total

    @property
    def observation(self) -> float:
        """Tokens that the environment adds after the prompt."""
        return self.observation_text + self.observation_pictures.total

    @property
    def length(self) -> float:
        """Tokens of a whole episode."""
        return self.prompt + self.response + self.observation

    @property
    def picture_share(self) -> float:
        """Share of an episode's tokens that are pictures."""
        return (self.prompt_pictures.total + self.observation_pictures.total) / self.length

    @property
    def tokens(self) -> float:
        """Tokens of all episodes of a step."""
        return self.episodes * self.length

    def responses(self, count: int) -> list[float]:
        """Returns ``count`` evenly spaced quantiles of the response length, ascending.

        The distribution is an exponential one, cut off at the budget, with the mean ``response``.
        """
        scale = _scale(self.response, self.response_max)
        if math.isinf(scale):
            return [float(self.response_max)] * count
        drawn = [-scale * math.log1p(-(i + 0.5) / count) for i in range(count)]
        cut = [min(float(self.response_max), length) for length in drawn]
        # A few quantiles miss the tail's share of the mean; a common factor corrects for it.
        factor = self.response / statistics.fmean(cut)
        return [min(float(self.response_max), length * factor) for length in cut]


def _scale(mean: float, most: float) -> float:
    """Returns the scale of an exponential distribution with this mean when cut off at ``most``."""
    if mean > 0.999 * most:
        return math.inf
    low, high = mean, 1e4 * most
    for _ in range(100):
        middle = math.sqrt(low * high)
        if middle * -math.expm1(-most / middle) < mean:
            low = middle
        else:
            high = middle
    return low


@dataclass(frozen=True)
class _Assumed:
    """Assumptions for an environment.

    Attributes:
        picture, observed_picture: tokens of Qwen2.5-VL.
        response: share of the budget.
    """

    prompt_text: float
    picture: float
    response: float
    observation_text: float
    observed_pictures: float
    observed_picture: float
    why: Mapping[str, str]


_ASSUMED: Mapping[str, _Assumed] = {
    "math": _Assumed(
        *(120, 0, 5500 / 8192, 0, 0, 0),
        {
            "prompt": "LUFFY's 2019 held-out questions have 98 tokens on average; chat tokens",
            "response": "DeepScaleR's R1-Distill-1.5B under 8192 tokens begins at 5500",
        },
    ),
    "geometry": _Assumed(
        *(150, 360, 0.25, 0, 0, 0),
        {
            "prompt": "six figures of Geometry3K under these pixel limits have 336 to 368 tokens",
            "response": "a quarter of the budget; no source",
        },
    ),
    "pixel_reasoner": _Assumed(
        *(700, 1250, 300 / 8192, 40, 0.7, 600),
        {
            "prompt": "one large picture at the pixel limit, tools' descriptions; no video",
            "response": "300 of 8192 tokens; no source",
            "observation": "0.7 crops of 600 tokens; no source",
        },
    ),
}
_OTHER = _Assumed(
    *(500, 1000, 0.25, 0, 0, 0),
    {"prompt": "no figures for this environment", "response": "a quarter of the budget; no source"},
)


def assumed_workload(
    config: TrainConfig, pixels_per_token: int | None, given: Mapping[str, float]
) -> Workload:
    """Returns the assumed episodes of a step.

    Args:
        config: the run's configuration.
        pixels_per_token: of the student's pictures; None if it sees none.
        given: values that replace assumptions: ``prompt`` (tokens of text), ``pictures`` (in the
            prompt), ``response`` and ``observation`` (tokens in all).
    """
    if config.mix is not None:
        parts = {
            name: assumed_workload(member, pixels_per_token, given)
            for name, member in config.members.items()
        }
        return _mean_workload(parts, config.weights)
    assumed = _ASSUMED.get(config.env.name, _OTHER)
    most = config.rollout.max_response_tokens
    limits = config.pixels.prompt, config.pixels.observation
    tokens, observed = (
        min(max(wanted * _ASSUMED_FOR, limit.min_pixels), limit.max_pixels)
        / (pixels_per_token or _ASSUMED_FOR)
        for wanted, limit in zip((assumed.picture, assumed.observed_picture), limits, strict=True)
    )
    pictures = given.get("pictures", 1.0 if pixels_per_token and assumed.picture else 0.0)
    several = config.rollout.max_turns > 1
    seen = assumed.observed_pictures if pixels_per_token and several else 0.0
    text = assumed.observation_text if several else 0.0
    if "observation" in given:
        seen, text = 0.0, given["observation"]
    response = given.get("response", assumed.response * most)
    sources = {
        key: "given" if key in given else f"assumed: {assumed.why[key]}"
        for key in ("prompt", "response", "observation")
        if key in given or key in assumed.why
    }
    return Workload(
        prompts=config.batch.prompts,
        samples=config.batch.samples,
        prompt_text=given.get("prompt", assumed.prompt_text),
        prompt_pictures=PictureLoad(pictures, tokens),
        response=response,
        response_max=most,
        observation_text=text,
        observation_pictures=PictureLoad(seen, observed if seen else 0.0),
        sources=sources,
    )


def _mean_workload(parts: Mapping[str, Workload], weights: Mapping[str, float]) -> Workload:
    """Returns the mean episode of a mixture."""
    total = sum(weights.values())

    def mean(value: Callable[[Workload], float]) -> float:
        return sum(weights[name] * value(part) for name, part in parts.items()) / total

    def pictures(load: Callable[[Workload], PictureLoad]) -> PictureLoad:
        count = mean(lambda part: load(part).count)
        return PictureLoad(count, mean(lambda part: load(part).total) / count if count else 0.0)

    first = next(iter(parts.values()))
    return Workload(
        prompts=first.prompts,
        samples=first.samples,
        prompt_text=mean(lambda part: part.prompt_text),
        prompt_pictures=pictures(lambda part: part.prompt_pictures),
        response=mean(lambda part: part.response),
        response_max=max(part.response_max for part in parts.values()),
        observation_text=mean(lambda part: part.observation_text),
        observation_pictures=pictures(lambda part: part.observation_pictures),
        sources={
            key: "; ".join(
                f"{name}: {part.sources[key]}"
                for name, part in parts.items()
                if key in part.sources
            )
            for key in dict.fromkeys(key for part in parts.values() for key in part.sources)
        },
    )


def measured_workload(
    config: TrainConfig,
    rows: Sequence[Mapping[str, Any]],
    trajectories: Sequence[Mapping[str, Any]],
    image_token: int | None,
) -> Workload:
    """Returns the measured episodes of a step.

    Args:
        config: the run's configuration.
        rows: training rows of its ``metrics.jsonl`` (``rollout/response_tokens``).
        trajectories: rows of its ``trajectories.jsonl``, for prompts and observations.
        image_token: id of the placeholder for pictures.

    Raises:
        ConfigError: the run recorded no training step or no trajectory.
    """
    drawn = [t for t in trajectories if t.get("kind") == "train" and t.get("who") == "student"]
    if not rows or not drawn:
        raise ConfigError("the measured run has no training step or no recorded trajectory")
    split = [_split_pictures(t, image_token) for t in drawn]
    shown, observed = (_mean_pictures([each[i] for each in split]) for i in (0, 1))
    prompt = statistics.fmean(t["prompt_length"] for t in drawn)
    rest = statistics.fmean(
        len(t["ids"]) - t["prompt_length"] - t["response_tokens"] for t in drawn
    )
    source = f"measured: {len(rows)} steps, {len(drawn)} trajectories"
    return Workload(
        prompts=config.batch.prompts,
        samples=config.batch.samples,
        prompt_text=prompt - shown.total,
        prompt_pictures=shown,
        response=statistics.fmean(row["rollout/response_tokens"] for row in rows),
        response_max=config.rollout.max_response_tokens,
        observation_text=max(0.0, rest - observed.total),
        observation_pictures=observed,
        sources=dict.fromkeys(("prompt", "response", "observation"), source),
    )


def _split_pictures(
    trajectory: Mapping[str, Any], image_token: int | None
) -> tuple[list[int], list[int]]:
    """Returns the tokens of each picture in the prompt, and of each later one."""
    tokens = [int(image["tokens"]) for image in trajectory["images"]]
    inside = trajectory["ids"][: trajectory["prompt_length"]].count(image_token)
    ends = list(itertools.accumulate(tokens))
    shown = sum(end <= inside for end in ends)
    return tokens[:shown], tokens[shown:]


def _mean_pictures(groups: Sequence[Sequence[int]]) -> PictureLoad:
    flat = [tokens for group in groups for tokens in group]
    if not flat:
        return PictureLoad()
    return PictureLoad(len(flat) / len(groups), statistics.fmean(flat))
