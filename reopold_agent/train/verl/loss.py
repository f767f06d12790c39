"""Adapts this project's objectives to verl's loss function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from verl.utils.tensordict_utils import get_non_tensor_data
from verl.workers.utils.padding import no_padding_2_padding

from reopold_agent.objectives import Needs, Objective, TokenBatch
from reopold_agent.objectives.pieces import scale_gradient
from reopold_agent.train.totals import TokenTotals

STEP, THRESHOLD = "reopold_step", "reopold_threshold"
"""Values that the trainer sends with each batch: the step, from 0, and the objective's threshold
over the whole batch of a step, before it is split over ranks, mini- and micro-batches."""

WEIGHTS = "rollout_is_weights"
"""verl's field of importance weights, nested (rows, response)."""


class ObjectiveLoss:
    """A loss function for verl's engine: the numerator of the loss of a micro-batch.

    The loss is a mean over what is kept in the mini-batch of all ranks, whose number is known only
    after its last micro-batch: `take_totals` has it, and the engine divides the gradients once
    (see `training`), as the local engine does.

    Args:
        objective: of the run.
        weighted: whether batches hold importance weights (`WEIGHTS`).
    """

    def __init__(self, objective: Objective, *, weighted: bool) -> None:
        self.objective, self._weighted = objective, weighted
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
        step = int(get_non_tensor_data(data, STEP, None))
        threshold = get_non_tensor_data(data, THRESHOLD, None)
        terms = self.objective.terms(tokens, step, threshold)
        self._totals.add(terms, tokens.loss_mask)
        return terms.numerator, {}

    def take_totals(self) -> TokenTotals:
        """Returns the counts since the last call, and resets them."""
        totals, self._totals = self._totals, TokenTotals()
        return totals


def token_batch(logp: Tensor, data: Any, needs: Needs, *, weighted: bool) -> TokenBatch:
    """Converts a micro-batch of verl to a `TokenBatch`, (rows, longest response).

    Args:
        logp: nested, of whole sequences in verl's shifted alignment; carries the gradient.
        data: nested fields of `records.to_row` and ``old_log_probs``, ``entropy``, ``advantages``,
            `WEIGHTS`.
        needs: what must be there.
        weighted: multiply the gradient of each token by its importance weight.
    """
    student_BT = no_padding_2_padding(logp, data)
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
    return TokenBatch(
        logp=student_BT,
        logp_old=padded("old_log_probs"),
        logp_teacher=(
            no_padding_2_padding(data["teacher_logprobs"], data) if Needs.TEACHER in needs else None
        ),
        entropy=padded("entropy"),
        loss_mask=mask_BT,
        advantage=padded("advantages") if outcome else None,
        response_length=mask_BT.sum(dim=1, keepdim=True).expand_as(student_BT).float(),
    )
