"""The parameter update: objective, accumulation over micro-batches, clipping, AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from reopold_agent.config import OptimizerConfig
from reopold_agent.engines.totals import TokenTotals
from reopold_agent.errors import NonFiniteError
from reopold_agent.objectives import Needs, Objective, TokenBatch
from reopold_agent.policies.batch import TrajectoryBatch, split_by_tokens
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.types import FloatArray, Trajectory


@dataclass(frozen=True)
class UpdateStats:
    """What the updates of one step did; token figures are over all its mini-batches.

    ``loss`` and ``grad_norm`` (before clipping) are means over the mini-batches; ``lr`` is that
    of the last one.
    """

    loss: float
    grad_norm: float
    lr: float
    kept_share: float
    ratio_mean: float
    ratio_max: float
    ppo_clip_share: float
    threshold: float | None

    def row(self) -> dict[str, float]:
        """By the names of ``metrics.jsonl``."""
        return {
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "lr": self.lr,
            "mask/kept_share": self.kept_share,
            "ratio/mean": self.ratio_mean,
            "ratio/max": self.ratio_max,
            "ratio/ppo_clip_share": self.ppo_clip_share,
        }

    @classmethod
    def none(cls) -> UpdateStats:
        """Of a step without an update: nothing in its batch was informative."""
        nan = float("nan")
        return cls(nan, 0.0, nan, 0.0, nan, nan, nan, None)


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient, in the model's order."""
    return [p for p in model.parameters() if p.requires_grad]


class Updater:
    """Owns the optimizer of one student.

    Args:
        policy: the student.
        objective: the loss.
        config: AdamW's settings.
        teacher: for objectives on whole distributions.
        max_tokens: rows x tokens of one micro-batch; any value gives the same gradient.
    """

    def __init__(
        self,
        policy: TransformersPolicy,
        objective: Objective,
        config: OptimizerConfig,
        *,
        max_tokens: int,
        teacher: TransformersPolicy | None = None,
    ) -> None:
        self.policy, self.objective, self.teacher = policy, objective, teacher
        self._config, self._max_tokens = config, max_tokens
        self._parameters = trainable_parameters(policy.adapter.model)
        self.optimizer = torch.optim.AdamW(
            self._parameters,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        warmup = config.warmup_steps
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda done: min(1.0, (done + 1) / warmup) if warmup else 1.0
        )

    def step(
        self,
        mini_batches: Sequence[Sequence[Trajectory]],
        step: int,
        logp_old: dict[int, FloatArray],
        entropy: dict[int, FloatArray],
    ) -> UpdateStats:
        """One update per mini-batch.

        Args:
            mini_batches: scored trajectories; together they are the step's batch.
            step: training step from 0, for the objective's phases.
            logp_old: log-probs under the policy that sampled, by ``id(trajectory)``, (L,).
            entropy: its entropies, likewise.

        Raises:
            NonFiniteError: loss or gradient is not finite. The parameters are then as before
                that mini-batch's update.
        """
        everything = [t for batch in mini_batches for t in batch]
        # One threshold for the whole batch: micro- and mini-batches must not change who is kept.
        entropies = np.concatenate([entropy[id(t)][t.loss_mask] for t in everything])
        entropies_N = torch.from_numpy(entropies)
        threshold = self.objective.threshold(entropies_N, torch.ones_like(entropies_N))
        model = self.policy.adapter.model
        model.train()
        totals = TokenTotals()
        losses, norms, rate = [], [], 0.0
        for batch in mini_batches:
            self.optimizer.zero_grad(set_to_none=True)
            counts = TokenTotals()
            for group in split_by_tokens([len(t.ids) for t in batch], self._max_tokens):
                part = [batch[i] for i in group]
                tokens = self._token_batch(part, logp_old, entropy)
                terms = self.objective.terms(tokens, step, threshold)
                terms.numerator.backward()  # type: ignore[no-untyped-call]
                counts.add(terms, tokens.loss_mask)
            # The loss is a mean over what is kept in the whole mini-batch, whose number is known
            # only now: gradients of the sums are divided once, so the split cannot matter.
            scale = 1.0 / max(1.0, counts.denominator)
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
            norm = float(nn.utils.clip_grad_norm_(self._parameters, self._config.max_grad_norm))
            loss = counts.loss
            totals.merge(counts)
            if not np.isfinite(loss) or not np.isfinite(norm):
                self.optimizer.zero_grad(set_to_none=True)
                raise NonFiniteError(
                    f"step {step}: the loss is {loss} and the gradient norm {norm}; the update was "
                    f"not made. Tasks in this mini-batch: {', '.join(t.task_id for t in batch[:8])}"
                    f"{' ...' if len(batch) > 8 else ''}"
                )
            rate = float(self.optimizer.param_groups[0]["lr"])  # before the scheduler moves on
            self.optimizer.step()
            self.scheduler.step()
            losses.append(loss)
            norms.append(norm)
        model.eval()
        return UpdateStats(
            loss=float(np.mean(losses)),
            grad_norm=float(np.mean(norms)),
            lr=rate,
            threshold=threshold,
            **totals.shares(),
        )

    def _token_batch(
        self,
        trajectories: Sequence[Trajectory],
        logp_old: dict[int, FloatArray],
        entropy: dict[int, FloatArray],
    ) -> TokenBatch:
        """The loss tokens of a micro-batch as one row: (1, N)."""
        adapter, objective = self.policy.adapter, self.objective
        divergence_N = None
        if objective.needs & Needs.DISTRIBUTIONS:
            if self.teacher is None:
                raise ValueError("an objective on whole distributions needs the teacher")
            divergence_N, logp_N = self.policy.divergence(
                trajectories, self.teacher, objective.divergence
            )
        else:
            logp_N, _ = self.policy.logprobs(TrajectoryBatch.build(adapter, trajectories))

        def flat(values: Sequence[FloatArray]) -> Tensor:
            chosen = [v[t.loss_mask] for v, t in zip(values, trajectories, strict=True)]
            return torch.from_numpy(np.concatenate(chosen)).to(adapter.device)[None]

        def spread(values: Sequence[float]) -> Tensor:
            pairs = zip(trajectories, values, strict=True)
            return flat([np.full(len(t.ids), value, np.float32) for t, value in pairs])

        teacher = [t.teacher_logp for t in trajectories if t.teacher_logp is not None]
        advantage = [t.advantage for t in trajectories if t.advantage is not None]
        if objective.needs & Needs.TEACHER and len(teacher) != len(trajectories):
            raise ValueError("a trajectory has no teacher scores")
        if objective.needs & Needs.OUTCOME and len(advantage) != len(trajectories):
            raise ValueError("a trajectory has no advantage")
        complete = len(trajectories)
        return TokenBatch(
            logp=logp_N[None],
            logp_old=flat([logp_old[id(t)] for t in trajectories]),
            logp_teacher=flat(teacher) if len(teacher) == complete else None,
            entropy=flat([entropy[id(t)] for t in trajectories]),
            loss_mask=torch.ones_like(logp_N[None], dtype=torch.bool),
            advantage=spread(advantage) if len(advantage) == complete else None,
            response_length=spread([t.response_tokens for t in trajectories]),
            divergence=None if divergence_N is None else divergence_N[None],
        )
