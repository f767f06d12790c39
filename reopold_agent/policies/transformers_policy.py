"""Generation and scoring with Hugging Face models in this process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reopold_agent.policies.adapter import ModelAdapter
from reopold_agent.policies.batch import TrajectoryBatch, split_by_tokens
from reopold_agent.policies.generation import TransformersGenerator
from reopold_agent.policies.logprobs import token_logprobs
from reopold_agent.types import Sampling, TokenScores, Trajectory


class TransformersPolicy:
    """A policy around a Hugging Face model; implements `Policy`.

    Args:
        adapter: the model.
        allowed_ids: number of ids the tokenizer knows; rows from there on are padding.
        forbidden_ids: ids that must not be sampled; they have probability 0 everywhere.
        stop_ids: a turn ends with the first of these.
        max_tokens_per_pass: bound on rows x tokens of one forward pass (memory).
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        *,
        allowed_ids: int,
        forbidden_ids: Sequence[int],
        stop_ids: Sequence[int],
        max_tokens_per_pass: int = 16384,
    ) -> None:
        self.adapter = adapter
        self.stop_ids = frozenset(stop_ids)
        self.max_tokens_per_pass = max_tokens_per_pass
        padded = range(allowed_ids, adapter.vocabulary_rows)
        banned = sorted({*forbidden_ids, *padded})
        self.banned = torch.tensor(banned, dtype=torch.int64, device=adapter.device)

    def generator(self, sampling: Sampling) -> TransformersGenerator:
        """A new session; end it (drop it) before the weights change."""
        self.adapter.model.eval()
        return TransformersGenerator(
            self.adapter,
            sampling,
            banned=self.banned,
            stop_ids=self.stop_ids,
            max_tokens_per_pass=self.max_tokens_per_pass,
        )

    @torch.no_grad()
    def score(
        self, trajectories: Sequence[Trajectory], *, with_entropy: bool = False
    ) -> list[TokenScores]:
        """See `Policy.score`; passes are bounded by ``max_tokens_per_pass``."""
        was_training = self.adapter.model.training
        self.adapter.model.eval()
        scores: list[TokenScores | None] = [None] * len(trajectories)
        for group in split_by_tokens([len(t.ids) for t in trajectories], self.max_tokens_per_pass):
            batch = TrajectoryBatch.build(self.adapter, [trajectories[i] for i in group])
            logp_N, entropy_N = self.logprobs(batch, with_entropy=with_entropy)
            logp_BT = batch.scatter(logp_N).cpu().numpy()
            entropy = torch.zeros_like(logp_N) if entropy_N is None else entropy_N
            entropy_BT = batch.scatter(entropy).cpu().numpy()
            for row, index in enumerate(group):
                length = len(trajectories[index].ids)
                scores[index] = TokenScores(logp_BT[row, :length], entropy_BT[row, :length])
        self.adapter.model.train(was_training)
        return [score for score in scores if score is not None]

    def logprobs(
        self, batch: TrajectoryBatch, *, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs (and entropies) of the batch's loss tokens, flat; see `TrajectoryBatch`.

        Differentiable unless called under ``no_grad``.
        """
        hidden_BTD = self.adapter.hidden_states(
            batch.ids_BT, batch.positions_3BT, batch.images, batch.attention_BT
        )
        # The state before a token predicts it.
        hidden_ND = hidden_BTD[batch.row_N, batch.column_N - 1]
        targets_N = batch.ids_BT[batch.row_N, batch.column_N]
        weight_VD = self.adapter.head.weight
        with self.adapter.autocast():
            return token_logprobs(
                hidden_ND, weight_VD, targets_N, self.banned, with_entropy=with_entropy
            )
