"""The parameter update: objective, accumulation over micro-batches, clipping, AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from reopold_agent.config import OptimizerConfig
from reopold_agent.engines.nonfinite import Finding, describe
from reopold_agent.engines.token_use import token_uses
from reopold_agent.engines.totals import TokenTotals
from reopold_agent.errors import NonFiniteError
from reopold_agent.objectives import Needs, Objective, TokenBatch
from reopold_agent.policies.batch import TrajectoryBatch, split_by_tokens
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.tracking.trajectories import TokenUse
from reopold_agent.types import FloatArray, Trajectory


@dataclass(frozen=True)
class UpdateStats:
    """What the updates of one step did; token figures are over all its mini-batches.

    ``loss`` and ``grad_norm`` (before clipping) are means over the updates made; ``lr`` is that
    of the last one. ``skipped`` mini-batches gave numbers that are not finite.
    """

    loss: float
    grad_norm: float
    lr: float
    kept_share: float
    ratio_mean: float
    ratio_max: float
    ppo_clip_share: float
    threshold: float | None
    skipped: int = 0

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


@dataclass(frozen=True)
class _Gradient:
    """Of one mini-batch: its counts, the norm before clipping, and what it made of its tokens."""

    counts: TokenTotals
    norm: float
    uses: dict[int, TokenUse]


def _to_blame(part: Sequence[Trajectory], tokens: TokenBatch, loss: float) -> list[Finding]:
    """Who made the loss of a micro-batch what it is: those whose own numbers are not finite, or
    all of them where none are."""
    found: list[Finding] = []
    sizes = [t.response_tokens for t in part]
    named_values = (
        ("the student's log-probs in the update", tokens.logp),
        ("the divergence from the teacher", tokens.divergence),
    )
    for name, values in named_values:
        if values is None:
            continue
        pieces = torch.split(values.detach().reshape(-1), sizes)
        found += [
            (t, f"{name} are not finite ({int((~piece.isfinite()).sum())} of {len(piece)})")
            for t, piece in zip(part, pieces, strict=True)
            if not piece.isfinite().all()
        ]
    return found or [(t, f"the loss of its micro-batch is {loss}") for t in part]


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
        skip_nonfinite: leave out mini-batches whose loss or gradient is not finite.

    Attributes:
        updates: updates made so far by this object.
        blamed: trajectories of the last `step` because of which an update was not made, each with
            what was wrong.
    """

    def __init__(
        self,
        policy: TransformersPolicy,
        objective: Objective,
        config: OptimizerConfig,
        *,
        max_tokens: int,
        teacher: TransformersPolicy | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        self.policy, self.objective, self.teacher = policy, objective, teacher
        self.uses: dict[int, TokenUse] = {}  # of the last step, by id(trajectory)
        self._config, self._max_tokens, self._skip = config, max_tokens, skip_nonfinite
        self.updates = 0
        self.blamed: list[Finding] = []
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
            NonFiniteError: loss or gradient is not finite, and the run does not skip. Parameters
                and optimizer are then as before that mini-batch's update.
        """
        everything = [t for batch in mini_batches for t in batch]
        # One threshold for the whole batch: micro- and mini-batches must not change who is kept.
        entropies = np.concatenate([entropy[id(t)][t.loss_mask] for t in everything])
        entropies_N = torch.from_numpy(entropies)
        threshold = self.objective.threshold(entropies_N, torch.ones_like(entropies_N))
        self.uses, self.blamed = {}, []
        totals = TokenTotals()
        losses, norms = [], []
        rate = float(self.optimizer.param_groups[0]["lr"])
        model = self.policy.adapter.model
        model.train()
        try:
            for batch in mini_batches:
                made = self._gradient(batch, step, threshold, logp_old, entropy)
                if isinstance(made, list):
                    # Before anything else: what is in the gradients must reach no other update.
                    self.optimizer.zero_grad(set_to_none=True)
                    self.blamed += made
                    if not self._skip:
                        raise NonFiniteError(describe(step, made))
                    continue
                totals.merge(made.counts)
                losses.append(made.counts.loss)
                norms.append(made.norm)
                rate = float(self.optimizer.param_groups[0]["lr"])  # before the scheduler moves on
                self.optimizer.step()
                self.scheduler.step()
                self.updates += 1
                self.uses.update(made.uses)  # only now: a refused update made nothing of its tokens
        finally:
            model.eval()
        return UpdateStats(
            loss=float(np.mean(losses)) if losses else float("nan"),
            grad_norm=float(np.mean(norms)) if norms else float("nan"),
            lr=rate,
            threshold=threshold,
            skipped=len(mini_batches) - len(losses),
            **totals.shares(),
        )

    def _gradient(
        self,
        batch: Sequence[Trajectory],
        step: int,
        threshold: float | None,
        logp_old: dict[int, FloatArray],
        entropy: dict[int, FloatArray],
    ) -> _Gradient | list[Finding]:
        """Leaves a mini-batch's gradient in the parameters; or says who is to blame that there is
        none."""
        self.optimizer.zero_grad(set_to_none=True)
        counts = TokenTotals()
        uses: dict[int, TokenUse] = {}
        for group in split_by_tokens([len(t.ids) for t in batch], self._max_tokens):
            part = [batch[i] for i in group]
            tokens = self._token_batch(part, logp_old, entropy)
            terms = self.objective.terms(tokens, step, threshold)
            if not torch.isfinite(terms.numerator):
                return _to_blame(part, tokens, float(terms.numerator.detach()))
            terms.numerator.backward()  # type: ignore[no-untyped-call]
            counts.add(terms, tokens.loss_mask)
            uses.update(zip(map(id, part), token_uses(part, terms), strict=True))
        # The loss is a mean over what is kept in the whole mini-batch, whose number is known
        # only now: gradients of the sums are divided once, so the split cannot matter.
        scale = 1.0 / max(1.0, counts.denominator)
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
        norm = float(nn.utils.clip_grad_norm_(self._parameters, self._config.max_grad_norm))
        if not np.isfinite(norm):
            return [(t, f"the gradient norm of its mini-batch is {norm}") for t in batch]
        return _Gradient(counts, norm, uses)

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
