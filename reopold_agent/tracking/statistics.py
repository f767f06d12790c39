"""Computes metrics of a step and of an evaluation from trajectories.

Keys are those of ``metrics.jsonl``. A share or mean over no values is NaN (null in the file).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from reopold_agent.common.statistics import wilson_interval
from reopold_agent.types import FloatArray, StopReason, Trajectory

HISTOGRAM_EDGES: tuple[float, ...] = tuple(i / 4 for i in range(-80, 21))
"""Edges of the reward histograms, nats: -20 to 5 by 0.25, the same at every step and in every
run, so that they can be added and compared. The outermost bins also count values beyond them."""

ENTROPY_PERCENTILES = (10, 50, 90, 99)

_BY_ENVIRONMENT = ("success", "reward", "tool_rate", "response_tokens", "turns", "episodes")
"""The keys after ``rollout/`` that a mixture has for each environment."""


def reward_histogram(values: npt.ArrayLike) -> dict[str, list[float] | list[int]]:
    """Counts values per bin of `HISTOGRAM_EDGES`.

    Bins include their left edge. Values beyond the edges, the infinities too, count in the
    outermost bins; NaN is not counted.

    Returns:
        ``{"edges": n + 1 floats, "counts": n ints}``.
    """
    array = np.asarray(values, dtype=np.float64).ravel()
    array = np.clip(array[~np.isnan(array)], HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
    counts, _ = np.histogram(array, bins=np.asarray(HISTOGRAM_EDGES))
    return {"edges": list(HISTOGRAM_EDGES), "counts": [int(count) for count in counts]}


def distillation_statistics(
    trajectories: Sequence[Trajectory],
    *,
    floor: float | None = None,
    threshold: float | None = None,
    logp: Sequence[FloatArray] | None = None,
    entropy: Sequence[FloatArray] | None = None,
) -> dict[str, Any]:
    """Computes rewards, entropies and mask shares over the tokens that the student sampled.

    The reward of a token is ``R = teacher_logp - logp`` in float32, nats, under the sampling
    policy. Keys without data are left out: ``reward/*`` and ``mask/exploration_share`` if a
    teacher scored no trajectory, and all keys if there is no loss token.

    Means, extremes and percentiles are over finite values; ``reward/nonfinite`` and
    ``entropy/nonfinite`` count the other tokens. Shares are of all loss tokens; a reward of minus
    infinity is below the floor, and NaN is neither below nor kept, as in the objective.

    Args:
        trajectories: trajectories that the step trained on.
        floor: the objective's reward floor (paper, eq. 7); without it the keys that need it
            (``reward/clipped*``, ``reward/floor``, ``reward/below_floor``,
            ``mask/exploration_share``) are left out.
        threshold: the objective's entropy threshold (tau, eq. 10); without it
            ``entropy/threshold`` and ``mask/refinement_share`` are left out.
        logp, entropy: per trajectory (L,) float32, used in place of the trajectories' values by
            engines that recompute them in a full pass.

    Returns:
        Contract keys ``reward/*``, ``entropy/*``, ``mask/exploration_share`` (tokens with
        ``R > floor``) and ``mask/refinement_share`` (tokens with entropy >= threshold).

    Raises:
        ValueError: ``logp`` or ``entropy`` does not fit the trajectories.
    """
    row: dict[str, Any] = {}
    logps = [t.logp for t in trajectories] if logp is None else logp
    entropies = [t.entropy for t in trajectories] if entropy is None else entropy
    rewards_scored: list[FloatArray] = []
    entropies_scored: list[FloatArray] = []
    entropies_all: list[FloatArray] = []
    for t, logp_L, entropy_L in zip(trajectories, logps, entropies, strict=True):
        if not logp_L.shape == entropy_L.shape == t.loss_mask.shape:
            raise ValueError(
                f"task {t.task_id}: loss_mask, logp and entropy have shapes {t.loss_mask.shape}, "
                f"{logp_L.shape} and {entropy_L.shape}; one value per id is needed"
            )
        entropies_all.append(entropy_L[t.loss_mask])
        if t.teacher_logp is not None:
            with np.errstate(invalid="ignore"):  # inf - inf is NaN, which is counted below
                rewards_scored.append(t.teacher_logp[t.loss_mask] - logp_L[t.loss_mask])
            entropies_scored.append(entropy_L[t.loss_mask])
    reward = _concatenate(rewards_scored)
    if reward.size:
        row |= _reward_statistics(reward, floor)
        row["reward/abs_by_entropy_decile"] = abs_by_decile(reward, _concatenate(entropies_scored))
    every = _concatenate(entropies_all)
    if every.size:
        finite = every[np.isfinite(every)].astype(np.float64)
        row["entropy/mean"] = _mean(finite)
        row["entropy/percentiles"] = {
            str(p): float(np.percentile(finite, p)) if finite.size else math.nan
            for p in ENTROPY_PERCENTILES
        }
        row["entropy/nonfinite"] = int(every.size - finite.size)
        if threshold is not None:
            row["entropy/threshold"] = float(threshold)
            row["mask/refinement_share"] = float(np.mean(every >= np.float32(threshold)))
    return row


def _reward_statistics(reward: FloatArray, floor: float | None) -> dict[str, Any]:
    finite = reward[np.isfinite(reward)].astype(np.float64)
    row: dict[str, Any] = {
        "reward/mean": _mean(finite),
        "reward/min": float(finite.min()) if finite.size else math.nan,
        "reward/max": float(finite.max()) if finite.size else math.nan,
        "reward/nonfinite": int(reward.size - finite.size),
        "reward/histogram": reward_histogram(reward),
    }
    if floor is not None:
        # float32 on both sides, as in the objective, so that the shares are those of its masks.
        edge = np.float32(floor)
        clipped = np.maximum(reward, edge)
        row["reward/floor"] = float(floor)
        row["reward/clipped_mean"] = _mean(clipped[np.isfinite(clipped)].astype(np.float64))
        row["reward/below_floor"] = float(np.mean(reward <= edge))
        row["reward/clipped_histogram"] = reward_histogram(clipped)
        row["mask/exploration_share"] = float(np.mean(reward > edge))
    return row


def abs_by_decile(reward: npt.ArrayLike, entropy: npt.ArrayLike, groups: int = 10) -> list[float]:
    """Returns the mean of ``|reward|`` by decile of entropy, ascending (paper, figure 5).

    Tokens are sorted by entropy and cut into ``groups`` parts of equal size (or one more in the
    first ones). Tokens of equal entropy share their mean, so that their order does not matter.
    Tokens with a value that is not finite are left out.

    Returns:
        ``groups`` floats; NaN for a part without tokens.
    """
    values = np.abs(np.asarray(reward, dtype=np.float64))
    keys = np.asarray(entropy, dtype=np.float64)
    usable = np.isfinite(values) & np.isfinite(keys)
    values, keys = values[usable], keys[usable]
    _, place, count = np.unique(keys, return_inverse=True, return_counts=True)
    mean_of_ties = np.bincount(place, weights=values, minlength=count.size) / np.maximum(count, 1)
    return [_mean(part) for part in np.array_split(np.repeat(mean_of_ties, count), groups)]


def by_environment(trajectories: Sequence[Trajectory]) -> dict[str, list[Trajectory]]:
    """Returns the trajectories of each environment, by its name, in their order."""
    found: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        found.setdefault(trajectory.env, []).append(trajectory)
    return found


def environment_statistics(
    trajectories: Sequence[Trajectory], kept: Sequence[float]
) -> dict[str, float]:
    """Computes the figures of each environment of a mixture in a step.

    Args:
        trajectories: of the step, including failed ones.
        kept: number of tokens of each that the update's loss kept.

    Returns:
        ``env/NAME/success`` and other figures of `rollout_statistics`, and ``env/NAME/kept_share``,
        the share of all kept tokens that are this environment's; nothing for one environment.
    """
    parts = by_environment(trajectories)
    return part_statistics("env", parts, trajectories, kept) if len(parts) > 1 else {}


def part_statistics(
    kind: str,
    parts: Mapping[str, Sequence[Trajectory]],
    trajectories: Sequence[Trajectory],
    kept: Sequence[float],
) -> dict[str, float]:
    """Computes the figures of parts of a step, under keys that begin with ``KIND/NAME/``.

    Args:
        kind: what they are parts by.
        parts: trajectories of the step by the name of their part.
        trajectories, kept: as for `environment_statistics`.
    """
    row: dict[str, float] = {}
    tokens = {id(t): count for t, count in zip(trajectories, kept, strict=True)}
    for name, part in parts.items():
        found = rollout_statistics(part)
        for key in _BY_ENVIRONMENT:
            row[f"{kind}/{name}/{key}"] = found[f"rollout/{key}"]
        own = sum(tokens[id(t)] for t in part)
        row[f"{kind}/{name}/kept_share"] = own / sum(kept) if sum(kept) else math.nan
    return row


def rollout_statistics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Computes the outcome of the episodes of a step, including failed ones.

    Returns:
        ``rollout/success``; ``rollout/reward`` (of the environment, mean of the finite ones);
        ``rollout/tool_rate`` (share of episodes with at least one tool call);
        ``rollout/tool_errors`` (share of tool calls that failed, NaN when there were none);
        ``rollout/tool_calls``, ``rollout/response_tokens`` (sampled ones) and ``rollout/turns``
        per episode; ``rollout/stop/<reason>`` as shares, one key for every `StopReason`;
        ``rollout/episodes``.
    """
    calls = [call for t in trajectories for call in t.tool_calls]
    rewards = np.asarray([t.reward for t in trajectories], dtype=np.float64)
    row = {
        "success": _mean([t.success for t in trajectories]),
        "reward": _mean(rewards[np.isfinite(rewards)]),
        "tool_rate": _mean([bool(t.tool_calls) for t in trajectories]),
        "tool_errors": _mean([not call.ok for call in calls]),
        "tool_calls": _mean([len(t.tool_calls) for t in trajectories]),
        "response_tokens": _mean([t.response_tokens for t in trajectories]),
        "turns": _mean([len(t.turns) for t in trajectories]),
        "episodes": float(len(trajectories)),
        **_stop_shares(trajectories),
    }
    return {f"rollout/{key}": value for key, value in row.items()}


def gap_statistics(
    trajectories: Sequence[Trajectory], logp: Sequence[FloatArray]
) -> dict[str, float]:
    """Measures the gap between log-probs of the sampler and of the trainer.

    Args:
        trajectories: trajectories with the sampler's ``logp``.
        logp: the trainer's log-probs, per trajectory (L,) float32.

    Returns:
        ``sync/logp_gap_mean`` and ``sync/logp_gap_max``, nats, over the sampled tokens; empty
        without trajectories.
    """
    pairs = zip(trajectories, logp, strict=True)
    gaps = [np.abs(t.logp - trainer_L)[t.loss_mask] for t, trainer_L in pairs]
    if not gaps:
        return {}
    values = np.concatenate(gaps)
    return {"sync/logp_gap_mean": float(values.mean()), "sync/logp_gap_max": float(values.max())}


def importance_statistics(
    trajectories: Sequence[Trajectory], logp: Sequence[FloatArray], cap: float
) -> dict[str, float]:
    """Describes the weights of truncated importance sampling.

    Args:
        trajectories: trajectories with the sampler's ``logp``.
        logp: the trainer's log-probs before the update, per trajectory (L,) float32.
        cap: the largest weight.

    Returns:
        ``importance/mean``, of the weights after the cap, and ``importance/capped_share`` over the
        sampled tokens; empty without tokens.
    """
    pairs = zip(trajectories, logp, strict=True)
    gap = _concatenate([(trainer_L - t.logp)[t.loss_mask] for t, trainer_L in pairs])
    if not gap.size:
        return {}
    capped = gap > math.log(cap)
    weight = np.exp(np.where(capped, math.log(cap), gap).astype(np.float64))
    return {"importance/mean": _mean(weight), "importance/capped_share": _mean(capped)}


def evaluation_statistics(
    trajectories: Sequence[Trajectory], confidence: float = 0.95
) -> dict[str, Any]:
    """Computes the values of an "eval" row, which the summary has too.

    The interval assumes independent episodes: give one episode per task.

    Returns:
        ``success``, ``low``, ``high`` (`wilson_interval`), ``n``, ``tool_rate``,
        ``tool_errors``, ``response_tokens``, ``turns``, ``reward`` and ``stop/<reason>``.
    """
    n = len(trajectories)
    low, high = wilson_interval(sum(bool(t.success) for t in trajectories), n, confidence)
    rollout = rollout_statistics(trajectories)
    row: dict[str, Any] = {"success": rollout["rollout/success"], "low": low, "high": high, "n": n}
    for key in ("tool_rate", "tool_errors", "response_tokens", "turns", "reward"):
        row[key] = rollout[f"rollout/{key}"]
    return row | _stop_shares(trajectories)


def _stop_shares(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    return {
        f"stop/{reason.value}": _mean([t.stop_reason == reason for t in trajectories])
        for reason in StopReason
    }


def _mean(values: npt.ArrayLike) -> float:
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()) if array.size else math.nan


def _concatenate(parts: Iterable[npt.NDArray[Any]]) -> FloatArray:
    return np.concatenate([np.zeros(0, np.float32), *parts]).astype(np.float32, copy=False)
