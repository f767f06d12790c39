"""Makes the parameter update: objective, accumulation over micro-batches, clipping, AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from reopold_agent.common.memory import LARGE, return_freed_memory
from reopold_agent.config import OptimizerConfig
from reopold_agent.errors import NonFiniteError
from reopold_agent.objectives import Needs, Objective, TokenBatch
from reopold_agent.objectives.pieces import scale_gradient, span_teacher_logp, turns
from reopold_agent.policies.base import Policy
from reopold_agent.policies.batch import TrajectoryBatch
from reopold_agent.policies.grouping import split_by_tokens
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.tracking.trajectories import TokenUse
from reopold_agent.train.environments import environments
from reopold_agent.train.learning_rate import LearningRate
from reopold_agent.train.nonfinite import Finding, describe
from reopold_agent.train.rows import Row, Threshold, spans_of, threshold_of, trajectories_of
from reopold_agent.train.teachers import Teachers
from reopold_agent.train.token_use import token_uses
from reopold_agent.train.totals import TokenTotals


@dataclass(frozen=True)
class UpdateStats:
    """Figures of the updates of one step; token figures are over all its mini-batches.

    ``loss`` and ``grad_norm`` (before clipping) are means over the updates made; ``lr`` is the rate
    of the last one. ``skipped`` counts mini-batches whose loss or gradient was not finite.
    """

    loss: float
    grad_norm: float
    lr: float
    kept_share: float
    ratio_mean: float
    ratio_max: float
    ppo_clip_share: float
    threshold: Threshold
    skipped: int = 0

    def row(self) -> dict[str, float]:
        """Returns the figures under their names in ``metrics.jsonl``."""
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
        """Returns the figures of a step without an update: no row was informative."""
        nan = float("nan")
        return cls(nan, 0.0, nan, 0.0, nan, nan, nan, None)


@dataclass(frozen=True)
class _Gradient:
    """A mini-batch's counts, gradient norm before clipping, and the use of each row's tokens."""

    counts: TokenTotals
    norm: float
    uses: list[tuple[Row, TokenUse]]


def _causes(part: Sequence[Row], tokens: TokenBatch, loss: float) -> list[Finding]:
    """Returns the rows that make the loss of a micro-batch not finite.

    These are the rows with values that are not finite, or all rows if every value is finite.
    """
    found: list[Finding] = []
    sizes = [row.trajectory.response_tokens for row in part]
    named_values = (
        ("the student's log-probs in the update", tokens.logp),
        ("the divergence from the teacher", tokens.divergence),
    )
    for name, values in named_values:
        if values is None:
            continue
        pieces = torch.split(values.detach().reshape(-1), sizes)
        found += [
            (row, f"{name} are not finite ({int((~piece.isfinite()).sum())} of {len(piece)})")
            for row, piece in zip(part, pieces, strict=True)
            if not piece.isfinite().all()
        ]
    return found or [(row, f"the loss of its micro-batch is {loss}") for row in part]


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters that require a gradient, in the model's order."""
    return [p for p in model.parameters() if p.requires_grad]


class Updater:
    """Updates one student, and owns its optimizer.

    Args:
        policy: the student.
        objective: the loss.
        config: AdamW's settings.
        teachers: for objectives on whole distributions.
        max_tokens: tokens of one micro-batch, counted as `split_by_tokens` does; any value gives
            the same gradient.
        skip_nonfinite: leave out mini-batches whose loss or gradient is not finite.
        means_by_environment: the loss is the mean of the environments' means.
        run_updates: number of updates of the whole run, for a learning rate that falls.

    Attributes:
        updates: number of updates made so far by this object.
        rejected: rows of the last `step` that prevented an update, each with what was wrong.
    """

    def __init__(
        self,
        policy: TransformersPolicy,
        objective: Objective,
        config: OptimizerConfig,
        *,
        max_tokens: int,
        teachers: Teachers[Policy] | None = None,
        skip_nonfinite: bool = False,
        means_by_environment: bool = False,
        run_updates: int | None = None,
    ) -> None:
        self.policy, self.objective = policy, objective
        self._teachers = Teachers({}) if teachers is None else teachers
        self._means_by_environment = means_by_environment
        self._config, self._max_tokens, self._skip = config, max_tokens, skip_nonfinite
        self.updates = 0
        self.rejected: list[Finding] = []
        self._parameters = trainable_parameters(policy.adapter.model)
        device = policy.adapter.device.type
        trained = sum(each.numel() for each in self._parameters)
        self._large = device == "cpu" and trained >= LARGE
        self.optimizer = torch.optim.AdamW(
            self._parameters,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            # The default holds one more float32 copy of all trained weights on a GPU, and of the
            # largest on a CPU, where it is five times slower for large models.
            fused=device == "cuda" or self._large,
        )
        self.scheduler = LearningRate(
            self.optimizer, config.lr_scheduler_type, config.warmup_steps, run_updates
        )

    @property
    def done(self) -> int:
        """Number of updates of the whole run so far, also those of earlier processes."""
        return int(self.scheduler.last_epoch)

    @property
    def _rate(self) -> float:
        """The learning rate of the next update."""
        return float(self.optimizer.param_groups[0]["lr"])

    def step(
        self, mini_batches: Sequence[Sequence[Row]], step: int, threshold: Threshold
    ) -> UpdateStats:
        """Makes one update per mini-batch, and sets the ``use`` of its rows.

        Args:
            mini_batches: rows with old log-probs, entropies and other values that the objective
                needs.
            step: training step from 0, for the objective's phases.
            threshold: the entropy threshold over all rows of the step, or of each environment
                (`rows.entropy_threshold`).

        Raises:
            NonFiniteError: loss or gradient is not finite, and the run does not skip. Parameters
                and optimizer are then as before that mini-batch's update.
        """
        self.rejected = []
        totals = TokenTotals()
        losses, norms = [], []
        rate = self._rate
        if self._large:
            return_freed_memory()
        model = self.policy.adapter.model
        model.train()
        try:
            for batch in mini_batches:
                made = self._gradient(batch, step, threshold)
                if isinstance(made, list):
                    # First of all, so that these gradients do not reach another update.
                    self._forget_gradient()
                    self.rejected += made
                    if not self._skip:
                        raise NonFiniteError(describe(step, made))
                    continue
                totals.merge(made.counts)
                losses.append(made.counts.loss)
                norms.append(made.norm)
                rate = self._rate
                if self._large:
                    return_freed_memory()
                self.optimizer.step()
                self._forget_gradient()  # episodes and scores of the next step need its memory
                self.scheduler.step()
                self.updates += 1
                for row, use in made.uses:  # only now, because a rejected update uses no token
                    row.use = use
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

    def try_gradient(self, rows: Sequence[Row], step: int, threshold: Threshold) -> float:
        """Computes a gradient as an update would, and forgets it; the weights stay.

        Args:
            rows, step, threshold: as in `step`, for one mini-batch.

        Returns:
            The gradient's norm before clipping.

        Raises:
            NonFiniteError: loss or gradient is not finite.
        """
        model = self.policy.adapter.model
        model.train()
        try:
            made = self._gradient(rows, step, threshold)
        finally:
            model.eval()
            self._forget_gradient()
        if isinstance(made, list):
            raise NonFiniteError(describe(step, made))
        return made.norm

    def _forget_gradient(self) -> None:
        """Frees the parameters' gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def _gradient(
        self, batch: Sequence[Row], step: int, threshold: Threshold
    ) -> _Gradient | list[Finding]:
        """Computes a mini-batch's gradient into the parameters, or returns why it is invalid."""
        counts = TokenTotals()
        uses: list[tuple[Row, TokenUse]] = []
        lengths = [len(row.trajectory.ids) for row in batch]
        packed = self.policy.adapter.packed
        envs = None
        if self._means_by_environment or isinstance(threshold, Mapping):
            means = self._means_by_environment
            envs = environments(self.objective, batch, step, threshold, means=means)
        for group in split_by_tokens(lengths, self._max_tokens, packed=packed):
            part = [batch[i] for i in group]
            tokens = self._token_batch(part)
            if envs is None:
                terms = self.objective.terms(tokens, step, threshold_of(threshold, ""))
            else:
                number = [envs.names.index(row.trajectory.env) for row in part]
                sizes = [row.trajectory.response_tokens for row in part]
                env_N = torch.tensor(number).repeat_interleave(torch.tensor(sizes))
                env_BT = env_N[None].to(tokens.logp.device)
                terms = envs.terms(self.objective, tokens, env_BT, step)
            if not torch.isfinite(terms.numerator):
                return _causes(part, tokens, float(terms.numerator.detach()))
            terms.numerator.backward()  # type: ignore[no-untyped-call]
            counts.add(terms, tokens.loss_mask)
            uses += zip(part, token_uses(trajectories_of(part), terms), strict=True)
        # The loss is a mean over the kept tokens of the whole mini-batch, whose number is known
        # only now. Dividing the gradients of the sums once makes the split irrelevant.
        scale = 1.0 / max(1.0, counts.denominator)
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
        norm = float(nn.utils.clip_grad_norm_(self._parameters, self._config.max_grad_norm))
        if not np.isfinite(norm):
            return [(row, f"the gradient norm of its mini-batch is {norm}") for row in batch]
        return _Gradient(counts, norm, uses)

    def _divergence(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Returns the divergence from each row's teacher, and the log-probs, both (N,)."""
        pieces: dict[int, tuple[Tensor, Tensor]] = {}
        trajectories = trajectories_of(rows)
        for teacher, places in self._teachers.parts(trajectories):
            chosen = [trajectories[place] for place in places]
            kept = [rows[place].teacher_states for place in places]
            states = [each for each in kept if each is not None]
            if not isinstance(teacher, TransformersPolicy) or len(states) < len(kept):
                raise ValueError("an objective on whole distributions needs the teacher's states")
            pair = self.policy.divergence(chosen, teacher, states, self.objective.divergence)
            if len(chosen) == len(rows):
                return pair
            sizes = [t.response_tokens for t in chosen]
            divided = zip(*(torch.split(each, sizes) for each in pair), strict=True)
            pieces.update(zip(places, divided, strict=True))
        divergences, logps = zip(*(pieces[place] for place in sorted(pieces)), strict=True)
        return torch.cat(divergences), torch.cat(logps)

    def _token_batch(self, rows: Sequence[Row]) -> TokenBatch:
        """Returns the loss tokens of a micro-batch, one after the other: (1, N)."""
        trajectories = trajectories_of(rows)
        old_logps = [row.behaviour[0] for row in rows]
        adapter, objective = self.policy.adapter, self.objective
        divergence_N = None
        if objective.needs & Needs.DISTRIBUTIONS:
            divergence_N, logp_N = self._divergence(rows)
        else:
            logp_N, _ = self.policy.logprobs(TrajectoryBatch.build(adapter, trajectories))

        def flat(values: Sequence[NDArray[Any]]) -> Tensor:
            chosen = [v[t.loss_mask] for v, t in zip(values, trajectories, strict=True)]
            return torch.from_numpy(np.concatenate(chosen)).to(adapter.device)[None]

        def spread(values: Sequence[float]) -> Tensor:
            pairs = zip(trajectories, values, strict=True)
            return flat([np.full(len(t.ids), value, np.float32) for t, value in pairs])

        teacher = [t.teacher_logp for t in trajectories if t.teacher_logp is not None]
        complete = len(trajectories)
        scores = flat(teacher) if len(teacher) == complete else None
        spans = spans_of(rows)
        if scores is not None and spans is not None:
            sampled = flat([t.logp for t in trajectories])
            scores = span_teacher_logp(scores[0], sampled[0], logp_N, flat(spans)[0])[None]
        weights = [row.weight for row in rows if row.weight is not None]
        if weights:
            logp_N = scale_gradient(logp_N, flat(weights)[0])
        advantage = [t.advantage for t in trajectories if t.advantage is not None]
        if objective.needs & Needs.TEACHER and scores is None:
            raise ValueError("a trajectory has no teacher scores")
        if objective.needs & Needs.OUTCOME and len(advantage) != len(trajectories):
            raise ValueError("a trajectory has no advantage")
        reference = [row.reference_logp for row in rows if row.reference_logp is not None]
        masks = [torch.from_numpy(t.loss_mask) for t in trajectories]
        return TokenBatch(
            logp=logp_N[None],
            logp_old=flat(old_logps),
            logp_teacher=scores,
            entropy=flat([row.span_entropy for row in rows]),
            loss_mask=flat([row.learned for row in rows]),
            advantage=spread(advantage) if len(advantage) == complete else None,
            response_length=spread([t.response_tokens for t in trajectories]),
            divergence=None if divergence_N is None else divergence_N[None],
            taught=spread([row.taught for row in rows]).bool(),
            episode=spread(range(complete)).long(),
            turn=flat([turns(mask).numpy() for mask in masks]),
            logp_reference=flat(reference) if len(reference) == complete else None,
        )
