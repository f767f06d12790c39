"""Figures of played episodes: outcome, tools, rewards by place in the turn, the sampler's gap.

Pure arithmetic on trajectories; `findings` judges the figures, `report` shows them.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reopold_agent.common.statistics import wilson_interval
from reopold_agent.tools.parse import CLOSE, OPEN
from reopold_agent.types import BoolArray, FloatArray, StopReason, ToolCall, Trajectory

SURE = 0.9
"""Probability from which on the student counts as sure of a token."""

MOST_TURNS = 4
"""Turns that are shown one by one; later ones are shown together."""

ALL, OPENING, CALLS, MARKS, WORDS, END = (
    *("all tokens", "first of a turn", "tool calls", f"{OPEN}, {CLOSE}"),
    *("other words", "end of a turn"),
)
"""Names of groups of tokens besides those of turns."""

TRUNCATED = (StopReason.MAX_TOKENS, StopReason.MAX_TURNS, StopReason.TIME_LIMIT)
"""How episodes end at a budget."""

_MARK = re.compile(f"{re.escape(OPEN)}|{re.escape(CLOSE)}")
_CALL = re.compile(f"{re.escape(OPEN)}.*?(?:{re.escape(CLOSE)}|$)", re.DOTALL)


@dataclass(frozen=True)
class TokenGroup:
    """The reward ``R = log pi_T - log pi`` of the sampled tokens of one kind, nats.

    Attributes:
        name: of the group.
        tokens: how many there are.
        reward: their mean R.
        below: share with R at or below the floor.
        sure: how many of them the student is sure of (`SURE`).
        sure_reward: the median R of those; NaN without any.
    """

    name: str
    tokens: int
    reward: float
    below: float
    sure: int
    sure_reward: float


@dataclass(frozen=True)
class Gap:
    """How far the trainer's log-probs are from those that the sampler recorded.

    Attributes:
        mean, largest: of the absolute difference per token, nats.
        weight: mean importance weight ``exp(trainer - sampler)``; 1 without a gap.
        lowest, highest: the extreme weights.
    """

    mean: float
    largest: float
    weight: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class ToolUse:
    """How the student uses its tools.

    Attributes:
        names: the tools of the environment; None if it does not say.
        episodes: how many episodes have a call.
        cut: how many of these a budget ended.
        calls: number of calls.
        errors: failed calls by kind.
        example: message of the first failed call.
        named: turns that name a tool, but call none.
    """

    names: tuple[str, ...] | None
    episodes: int
    cut: int
    calls: int
    errors: Mapping[str, int]
    example: str
    named: int


@dataclass(frozen=True)
class Outcome:
    """How the episodes ended.

    Attributes:
        episodes: how many were played.
        success, low, high: share of successes and its 95 % interval.
        answered, by_length, by_turns, by_time, by_prompt, failed: number of episodes that ended
            with an answer, at a budget (tokens, turns, time of the tools), because their prompt was
            too long, and by another error.
        error: the first error.
    """

    episodes: int
    success: float
    low: float
    high: float
    answered: int
    by_length: int
    by_turns: int
    by_time: int
    by_prompt: int
    failed: int
    error: str

    @property
    def truncated(self) -> int:
        """Number of episodes that a budget ended."""
        return self.by_length + self.by_turns + self.by_time


def outcome_of(trajectories: Sequence[Trajectory]) -> Outcome:
    """Counts how episodes ended."""
    n = len(trajectories)
    stops = Counter(t.stop_reason for t in trajectories)
    wins = sum(t.success for t in trajectories)
    low, high = wilson_interval(wins, n)
    errors = [str(t.info["error"]).split("\n", 1)[0] for t in trajectories if "error" in t.info]
    long = sum("engine.max_prompt_tokens" in error for error in errors)
    return Outcome(
        n,
        wins / n,
        low,
        high,
        answered=stops[StopReason.ANSWER],
        by_length=stops[StopReason.MAX_TOKENS],
        by_turns=stops[StopReason.MAX_TURNS],
        by_time=stops[StopReason.TIME_LIMIT],
        by_prompt=long,
        failed=stops[StopReason.ENV_ERROR] + stops[StopReason.POLICY_ERROR] - long,
        error=errors[0] if errors else "",
    )


def tool_use_of(trajectories: Sequence[Trajectory], names: Sequence[str] | None) -> ToolUse:
    """Counts calls of tools and their errors.

    Args:
        trajectories: the episodes.
        names: the tools of the environment; None if it does not say.
    """
    calls = [call for t in trajectories for call in t.tool_calls]
    failed = [call for call in calls if not call.ok]
    turns = [turn for t in trajectories for turn in t.turns if turn.tool_call is None]
    return ToolUse(
        None if names is None else tuple(names),
        episodes=sum(bool(t.tool_calls) for t in trajectories),
        cut=sum(bool(t.tool_calls) and t.stop_reason in TRUNCATED for t in trajectories),
        calls=len(calls),
        errors=Counter(_error_kind(call, names or ()) for call in failed),
        example=(failed[0].error or "") if failed else "",
        named=sum(
            any(re.search(rf"\b{re.escape(name)}\b", turn.text) for name in names or ())
            for turn in turns
        ),
    )


def _error_kind(call: ToolCall, names: Sequence[str]) -> str:
    if not call.name:
        return "not readable"
    return "arguments or result" if call.name in names else "unknown tool"


def gap_of(trajectories: Sequence[Trajectory], trainer: Sequence[FloatArray]) -> Gap | None:
    """Compares the sampler's log-probs with the trainer's; None without a sampled token.

    Args:
        trajectories: the episodes, with the sampler's ``logp``.
        trainer: the trainer's log-probs, per trajectory (L,) float32, nats.
    """
    pairs = zip(trajectories, trainer, strict=True)
    parts = [(logp_L - t.logp)[t.loss_mask] for t, logp_L in pairs]
    gap = np.concatenate([np.zeros(0, np.float32), *parts]).astype(np.float64)
    if not gap.size:
        return None
    with np.errstate(over="ignore"):
        weight = np.exp(gap)
    return Gap(
        *(float(np.abs(gap).mean()), float(np.abs(gap).max())),
        *(float(weight.mean()), float(weight.min()), float(weight.max())),
    )


def token_groups(
    trajectories: Sequence[Trajectory],
    logp: Sequence[FloatArray],
    floor: float,
    decode: Callable[[Sequence[int]], str],
) -> list[TokenGroup]:
    """Describes the reward by turn and by kind of token; empty groups are left out.

    Args:
        trajectories: scored episodes.
        logp: the student's log-probs, per trajectory (L,) float32, nats.
        floor: the objective's reward floor, nats.
        decode: converts ids to text, with control tokens.
    """
    rewards: dict[str, list[FloatArray]] = {}
    sure: dict[str, list[BoolArray]] = {}

    def add(name: str, reward: FloatArray, is_sure: BoolArray) -> None:
        rewards.setdefault(name, []).append(reward)
        sure.setdefault(name, []).append(is_sure)

    several = any(len(t.turns) > 1 for t in trajectories)
    for t, logp_L in zip(trajectories, logp, strict=True):
        if t.teacher_logp is None:
            continue
        reward_L = t.teacher_logp - logp_L
        sure_L = logp_L >= np.log(SURE)
        for number, turn in enumerate(t.turns, 1):
            span = slice(turn.start, turn.end)
            reward, is_sure = reward_L[span], sure_L[span]
            call, mark = _places([decode([int(i)]) for i in t.ids[span]])
            last = np.zeros(len(reward), dtype=np.bool_)
            last[-1:] = turn.finish == "stop"
            first = np.arange(len(reward)) == 0
            add(ALL, reward, is_sure)
            if several:
                more = f"turn {MOST_TURNS} and later"
                add(f"turn {number}" if number < MOST_TURNS else more, reward, is_sure)
            for name, chosen in (
                (OPENING, first),
                (CALLS, call),
                (MARKS, mark),
                (WORDS, ~call & ~last),
                (END, last),
            ):
                add(name, reward[chosen], is_sure[chosen])
    turns = sorted(name for name in rewards if name.startswith("turn "))
    groups = []
    for name in (ALL, *turns, OPENING, CALLS, MARKS, WORDS, END):
        reward = np.concatenate(rewards.get(name, [np.zeros(0, np.float32)])).astype(np.float64)
        if not reward.size:
            continue
        surely = reward[np.concatenate(sure[name])]
        groups.append(
            TokenGroup(
                name,
                tokens=reward.size,
                reward=float(reward.mean()),
                below=float((reward <= floor).mean()),
                sure=surely.size,
                sure_reward=float(np.median(surely)) if surely.size else float("nan"),
            )
        )
    return groups


def _places(pieces: Sequence[str]) -> tuple[BoolArray, BoolArray]:
    """Returns which tokens of a turn belong to a tool call, and which to its marks."""
    ends = list(itertools.accumulate(map(len, pieces)))
    starts = [0, *ends[:-1]]
    text = "".join(pieces)

    def inside(pattern: re.Pattern[str]) -> BoolArray:
        chosen: npt.NDArray[np.bool_] = np.zeros(len(pieces), dtype=np.bool_)
        for found in pattern.finditer(text):
            for place, (start, end) in enumerate(zip(starts, ends, strict=True)):
                chosen[place] |= start < found.end() and end > found.start()
        return chosen

    return inside(_CALL), inside(_MARK)
