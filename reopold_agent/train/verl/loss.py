"""Adapts this project's objectives to verl's loss function."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from verl.utils.tensordict_utils import get_non_tensor_data
from verl.workers.utils.padding import no_padding_2_padding

from reopold_agent.objectives import LossTerms, Needs, Objective, TokenBatch
from reopold_agent.objectives.pieces import scale_gradient, turns
from reopold_agent.train.environments import Environments
from reopold_agent.train.totals import TokenTotals

STEP, THRESHOLD = "reopold_step", "reopold_threshold"
"""Values that the trainer sends with each batch: the step, from 0, and the objective's threshold
over the whole batch of a step, before it is split over ranks, mini- and micro-batches (as JSON:
verl's tables would take a dictionary by environment apart)."""

ENV = "reopold_env"
"""Field with a row's environment, as a position among the run's; only where the loss needs it."""

WEIGHTS = "rollout_is_weights"
"""verl's field of importance weights, nested (rows, response)."""

ADVANTAGES, TAUGHT = "advantages", "reopold_taught"
"""Fields of each row's advantage and of `TokenBatch.taught` (1 or 0), nested (rows, response)."""


class ObjectiveLoss:
    """A loss function for verl's engine: the numerator of the loss of a micro-batch.

    The loss is a mean over what is kept in the mini-batch of all ranks, whose number is known only
    after its last micro-batch: `take_totals` has it, and the engine divides the gradients once
    (see `training`), as the local engine does.

    Args:
        objective: of the run.
        weighted: whether batches hold importance weights (`WEIGHTS`).
        names: the run's environments, if batches hold `ENV`; else None.
        means_by_environment: the loss is the mean of the environments' means.

    Attributes:
        counts: with means by environment, the denominator for each in the mini-batch of all ranks,
            which the engine sets before its passes (`count`).
    """

    def __init__(
        self,
        objective: Objective,
        *,
        weighted: bool,
        names: Sequence[str] | None = None,
        means_by_environment: bool = False,
    ) -> None:
        self.objective, self._weighted = objective, weighted
        self._names, self.means_by_environment = names, means_by_environment
        self.counts: list[float] | None = None
        self._totals = TokenTotals()

    def __call__(
        self, model_output: dict[str, Tensor], data: Any, dp_group: Any = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Returns the sum over this micro-batch, and no metrics.

        Args:
            model_output: ``log_probs`` of all tokens, nested, as verl's engine computes them.
            data: the micro-batch.
            dp_group: unused; verl passes it.
        """
        tokens = token_batch(
            model_output["log_probs"], data, self.objective.needs, weighted=self._weighted
        )
        terms = self._terms(tokens, data, self.counts)
        self._totals.add(terms, tokens.loss_mask)
        return terms.numerator, {}

    def count(self, data: Any) -> list[float]:
        """Returns the denominator for each environment in this rank's mini-batch.

        It follows from the log-probs before the update of the step, as in the local engine.
        """
        old_BT = data["old_log_probs"].to_padded_tensor(0.0)
        tokens = _token_batch(old_BT, data, self.objective.needs, weighted=False)
        assert self._names is not None
        counts = []
        for number in range(len(self._names)):
            mask = tokens.loss_mask & (_environment(data, old_BT) == number)
            part = replace(tokens, loss_mask=mask)
            counts.append(float(self._terms(part, data, None).denominator))
        return counts

    def _terms(self, tokens: TokenBatch, data: Any, counts: list[float] | None) -> LossTerms:
        step = int(get_non_tensor_data(data, STEP, None))
        threshold = json.loads(get_non_tensor_data(data, THRESHOLD, "null"))
        if self._names is None:
            return self.objective.terms(tokens, step, threshold)
        envs = Environments(self._names, threshold, counts)
        return envs.terms(self.objective, tokens, _environment(data, tokens.logp), step)

    def take_totals(self) -> TokenTotals:
        """Returns the counts since the last call, and resets them."""
        totals, self._totals = self._totals, TokenTotals()
        return totals


def token_batch(logp: Tensor, data: Any, needs: Needs, *, weighted: bool) -> TokenBatch:
    """Converts a micro-batch of verl to a `TokenBatch`, (rows, longest response).

    Args:
        logp: nested, of whole sequences in verl's shifted alignment; carries the gradient.
        data: nested fields of `records.to_row` and ``old_log_probs``, ``entropy``, `ADVANTAGES`,
            `TAUGHT`, `WEIGHTS`.
        needs: what must be there.
        weighted: multiply the gradient of each token by its importance weight.
    """
    return _token_batch(no_padding_2_padding(logp, data), data, needs, weighted=weighted)


def _environment(data: Any, like_BT: Tensor) -> Tensor:
    """Returns each token's environment, (rows, longest response)."""
    number_B: Tensor = data[ENV]
    return number_B.to(like_BT.device)[:, None].expand_as(like_BT)


def _token_batch(student_BT: Tensor, data: Any, needs: Needs, *, weighted: bool) -> TokenBatch:
    width = student_BT.shape[1]

    def padded(name: str) -> Tensor:
        values = data[name]
        if values.is_nested:
            values = values.to_padded_tensor(0.0)
        extra = width - values.shape[1]
        return torch.nn.functional.pad(values, (0, extra)) if extra else values

    mask_BT = padded("response_mask").bool()
    if weighted:
        student_BT = scale_gradient(student_BT, padded(WEIGHTS))
    outcome = Needs.OUTCOME in needs
    turn_BT = turns(mask_BT)
    return TokenBatch(
        logp=student_BT,
        logp_old=padded("old_log_probs"),
        logp_teacher=(
            no_padding_2_padding(data["teacher_logprobs"], data) if Needs.TEACHER in needs else None
        ),
        entropy=padded("entropy"),
        loss_mask=mask_BT,
        advantage=padded(ADVANTAGES) if outcome else None,
        response_length=mask_BT.sum(dim=1, keepdim=True).expand_as(student_BT).float(),
        taught=padded(TAUGHT).bool() if outcome else None,
        episode=torch.arange(len(mask_BT), device=mask_BT.device)[:, None].expand_as(turn_BT),
        turn=turn_BT,
    )
