"""Generation and scoring with Hugging Face models in this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat

import numpy as np
import torch
from torch import Tensor, nn

from reopold_agent.objectives import DivergenceSettings
from reopold_agent.objectives.chunks import compute_dtype
from reopold_agent.objectives.divergence import divergence_of_states, top_tokens, topk_divergence
from reopold_agent.policies.adapter import ModelAdapter
from reopold_agent.policies.batch import PassTokens, TrajectoryBatch
from reopold_agent.policies.generation import TransformersGenerator
from reopold_agent.policies.grouping import split_by_tokens
from reopold_agent.policies.logprobs import token_logprobs
from reopold_agent.types import FloatArray, Sampling, TokenScores, Trajectory


class TransformersPolicy:
    """A policy around a Hugging Face model; implements `Policy`.

    Args:
        adapter: the model.
        allowed_ids: size of the tokenizer; further rows of the output embedding are padding.
        forbidden_ids: further ids that get probability 0.
        stop_ids: a turn ends with the first of these.
        max_tokens_per_pass: most tokens of one forward pass: rows x longest, or the rows' own where
            the model takes packed rows (memory).

    Attributes:
        passes: the tokens of all passes of `score`, `logprobs` and `divergence` so far.
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
        self.passes = PassTokens()
        padded = range(allowed_ids, adapter.vocabulary_rows)
        banned = sorted({*forbidden_ids, *padded})
        self.banned = torch.tensor(banned, dtype=torch.int64, device=adapter.device)

    def generator(self, sampling: Sampling) -> TransformersGenerator:
        """Starts a generation session; do not use it after the weights change."""
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
        self,
        trajectories: Sequence[Trajectory],
        *,
        with_entropy: bool = False,
        with_states: bool = False,
    ) -> list[TokenScores]:
        """Computes log-probs of the student's tokens, and entropies (zeros unless asked for).

        ``with_states`` keeps the states too, from which `divergence` gets the distributions.
        """
        was_training = self.adapter.model.training
        self.adapter.model.eval()
        scores: list[TokenScores | None] = [None] * len(trajectories)
        lengths = [len(t.ids) for t in trajectories]
        most, packed = self.max_tokens_per_pass, self.adapter.packed
        for group in split_by_tokens(lengths, most, packed=packed):
            part = [trajectories[i] for i in group]
            batch = TrajectoryBatch.build(self.adapter, part)
            hidden_ND, targets_N = self._states(batch)
            logp_N, entropy_N = self._token_logprobs(hidden_ND, targets_N, with_entropy)
            entropy = torch.zeros_like(logp_N) if entropy_N is None else entropy_N
            states: Iterable[Tensor | None] = repeat(None, len(part))
            if with_states:
                with self.adapter.autocast():
                    dtype = compute_dtype(hidden_ND, self.adapter.head.weight)
                sizes = [t.response_tokens for t in part]
                states = torch.split(hidden_ND.to("cpu", dtype), sizes)
            values = zip(_spread(part, logp_N), _spread(part, entropy), states, strict=True)
            for index, (logp_L, entropy_L, states_ND) in zip(group, values, strict=True):
                scores[index] = TokenScores(logp_L, entropy_L, states_ND)
        self.adapter.model.train(was_training)
        return [score for score in scores if score is not None]

    def logprobs(
        self, batch: TrajectoryBatch, *, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Computes log-probs (N,) and entropies (N,) of the batch's loss tokens.

        Log-probs are differentiable unless called under ``no_grad``.
        """
        return self._token_logprobs(*self._states(batch), with_entropy)

    def divergence(
        self,
        trajectories: Sequence[Trajectory],
        teacher: TransformersPolicy,
        states: Sequence[Tensor],
        settings: DivergenceSettings,
    ) -> tuple[Tensor, Tensor]:
        """Computes the divergence from the teacher's distribution at each loss token.

        Args:
            trajectories: run in one forward pass.
            teacher: a policy over the same allowed ids; no gradient reaches it.
            states: of each trajectory, from the teacher's `score` of it in the teacher's own form
                (`Trajectory.for_teacher`).
            settings: which divergence; see `reopold_agent.objectives.gkd.GKD`.

        Returns:
            ``(divergence_N, logp_N)``, both differentiable: the divergence, and the student's
            log-prob of the token.
        """
        student_ND, targets_N = self._states(TrajectoryBatch.build(self.adapter, trajectories))
        teacher_NE = torch.cat(list(states)).to(self.adapter.device)
        student_VD, teacher_VE = self.adapter.head.weight, teacher.adapter.head.weight
        with self.adapter.autocast():
            if settings.top_k is None:
                # Padded rows beyond the tokenizer are banned.
                rows = min(len(student_VD), len(teacher_VE))
                divergence_N, logp_N = divergence_of_states(
                    student_ND,
                    student_VD if rows == len(student_VD) else student_VD[:rows],
                    teacher_NE,
                    teacher_VE[:rows],
                    targets_N,
                    settings.beta,
                    self.banned[self.banned < rows],
                )
            else:
                ids_NK, teacher_NK = top_tokens(
                    teacher_NE, teacher_VE, settings.top_k, teacher.banned
                )
                ids_NK = torch.cat([ids_NK, targets_N[:, None]], dim=1)
                both_NK, _ = token_logprobs(student_ND, student_VD, ids_NK, self.banned)
                student_NK, logp_N = both_NK[:, :-1], both_NK[:, -1]
                divergence_N = topk_divergence(
                    student_NK, teacher_NK, settings.beta, rest=settings.rest
                )
            if settings.min_entropy is not None:
                with torch.no_grad():
                    _, entropy_N = token_logprobs(
                        teacher_NE, teacher_VE, targets_N, teacher.banned, with_entropy=True
                    )
                assert entropy_N is not None
                divergence_N = torch.where(entropy_N >= settings.min_entropy, divergence_N, 0.0)
            return divergence_N, logp_N

    def _token_logprobs(
        self, hidden_ND: Tensor, targets_N: Tensor, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        with self.adapter.autocast():
            return token_logprobs(
                hidden_ND,
                self.adapter.head.weight,
                targets_N,
                self.banned,
                with_entropy=with_entropy,
            )

    def _states(self, batch: TrajectoryBatch) -> tuple[Tensor, Tensor]:
        """Returns the states that predict the loss tokens, (N, width), and these tokens, (N,)."""
        self.passes.add(batch)
        hidden_BTD = self.adapter.hidden_states(
            batch.ids_BT,
            batch.positions_3BT,
            batch.images,
            batch.attention_BT,
            places_BT=batch.places_BT,
        )
        hidden_ND = hidden_BTD[batch.row_N, batch.before_N]
        return hidden_ND, batch.ids_BT[batch.row_N, batch.column_N]


class CopiedPolicy(TransformersPolicy):
    """A copy of the trainer's model that generates beside it; implements `TakesWeights`."""

    @torch.no_grad()
    def sync(self, model: nn.Module) -> None:
        """Takes the weights of the model of which this one's is a copy (`ModelAdapter.copied`)."""
        pairs = zip(self.adapter.model.parameters(), model.parameters(), strict=True)
        for own, trainers in pairs:
            if own is not trainers:
                own.copy_(trainers)

    def sleep(self) -> None:
        """Does nothing: it keeps its memory, since it generates while the trainer computes."""

    def wake(self) -> None:
        """Does nothing."""


def _spread(trajectories: Sequence[Trajectory], values_N: Tensor) -> Iterator[FloatArray]:
    """Yields each trajectory's values, aligned with its ids: 0 where there is no loss token."""
    sizes = [t.response_tokens for t in trajectories]
    for trajectory, values in zip(trajectories, torch.split(values_N.cpu(), sizes), strict=True):
        aligned = np.zeros(len(trajectory.ids), dtype=np.float32)
        aligned[trajectory.loss_mask] = values.numpy()
        yield aligned
