"""Supervised training on recorded traces."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from reopold_agent.policies.batch import TrajectoryBatch
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.types import Trajectory


@dataclass(frozen=True)
class Schedule:
    """Length and learning rate of a supervised run.

    The learning rate rises linearly to ``peak`` over ``warmup`` steps, then falls along a cosine to
    ``final_share`` of it.
    """

    steps: int
    peak: float
    batch: int = 32
    warmup: int = 50
    final_share: float = 0.1

    def rate(self, step: int) -> float:
        """Returns the learning rate at a step, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.peak * (
            self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * done))
        )


def train_supervised(
    policy: TransformersPolicy,
    schedule: Schedule,
    batch_at: Callable[[int], Sequence[Trajectory]],
    report: Callable[[int, float], None],
) -> None:
    """Minimises the mean cross-entropy of the assistant's tokens with AdamW (gradient norm <= 1).

    Args:
        policy: its model is trained.
        schedule: number of steps and learning rate.
        batch_at: returns the traces of a step, counted from 0.
        report: called after each step with the step and its loss in nats per token.
    """
    model = policy.adapter.model
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.peak, betas=(0.9, 0.95), weight_decay=0.0
    )
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        traces = batch_at(step)
        tokens = sum(int(trace.loss_mask.sum()) for trace in traces)
        total = 0.0
        # Traces with few and many images are separate: padding would double the work.
        groups: dict[int, list[Trajectory]] = {}
        for trace in traces:
            groups.setdefault(len(trace.images), []).append(trace)
        for _, group_traces in sorted(groups.items()):
            batch = TrajectoryBatch.build(policy.adapter, group_traces)
            logp_N, _ = policy.logprobs(batch)
            loss = -logp_N.sum() / tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        report(step, total)
    model.eval()
