"""Gives each update its learning rate; both engines use it."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from reopold_agent.config import CONSTANT


def learning_rate_factor(done: int, kind: str, warmup: int, updates: int | None) -> float:
    """Returns the share of the highest learning rate that an update has.

    In warm-up update n of w it is n / w. After the warm-up it stays 1, or falls from 1 to 0 along
    half a cosine over the remaining updates, as in transformers'
    ``get_cosine_schedule_with_warmup``.

    Args:
        done: number of updates before this one.
        kind: ``optimizer.lr_scheduler_type``.
        warmup: ``optimizer.warmup_steps``, in updates.
        updates: number of updates of the whole run; a constant rate needs none.
    """
    if done < warmup:
        return (done + 1) / warmup
    if kind == CONSTANT:
        return 1.0
    assert updates is not None, "a rate that falls needs the length of the run"
    progress = min(1.0, (done - warmup) / max(1, updates - warmup))
    return 0.5 * (1.0 + math.cos(math.pi * progress))


class LearningRate(LambdaLR):
    """Counts updates; the optimizer has the learning rate of the next one.

    Args:
        optimizer: what gets the rate; its own is the highest.
        kind, warmup, updates: as in `learning_rate_factor`.
    """

    def __init__(self, optimizer: Optimizer, kind: str, warmup: int, updates: int | None) -> None:
        super().__init__(optimizer, lambda done: learning_rate_factor(done, kind, warmup, updates))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the count, and sets the rate that the next update has in this run.

        The restored optimizer has that of the run as it was, which may have had fewer steps.
        """
        super().load_state_dict(state_dict)
        for group, base, factor in zip(
            self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(self.last_epoch)
