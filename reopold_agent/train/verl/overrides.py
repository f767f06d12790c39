"""Refuses settings of verl that nothing reads here, because the engine replaces their reader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reopold_agent.config import flatten
from reopold_agent.errors import ConfigError

_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
_MODEL = "actor_rollout_ref.model"
_LONG_ROWS = "rollout.max_response_tokens, engine.offload or model.student.gradient_checkpointing"
_LOSS = "objective= and its settings"
_DATA = "data=, env=, batch.* or rollout.*"
_LOSS_KEYS = (
    *("clip_ratio", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c", "tau_pos", "tau_neg"),
    *("policy_loss", "loss_agg_mode", "loss_scale_factor", "entropy_coeff", "calculate_entropy"),
    *("calculate_sum_pi_squared", "use_kl_loss", "kl_loss_coef", "kl_loss_type"),
)
_SCHEDULE = "optimizer.lr_scheduler_type or optimizer.warmup_steps"
_SCHEDULE_KEYS = (
    *("lr_scheduler_type", "lr_warmup_steps", "lr_warmup_steps_ratio", "min_lr_ratio"),
    *("num_cycles", "total_training_steps", "warmup_style", "zero_indexed_step"),
)
_LORA_KEYS = (
    *("lora", "lora_rank", "lora_alpha", "lora_adapter_path", "target_modules", "exclude_modules"),
)
_VALIDATION_KEYS = (
    *("val_before_train", "val_only", "test_freq", "log_val_generations", "validation_data_dir"),
)

INSTEAD: Mapping[str, str] = {
    "algorithm.rollout_correction": "objective.importance_cap",
    "algorithm": _LOSS,
    "critic": _LOSS,
    "reward": "env=",
    "data": _DATA,
    "distillation.distillation_loss": _LOSS,
    "actor_rollout_ref.ref": _LOSS,
    **{f"{_ACTOR}.{key}": _LOSS for key in _LOSS_KEYS},
    **{f"{_ACTOR}.{key}": "batch.*" for key in ("ppo_epochs", "shuffle", "data_loader_seed")},
    f"{_ACTOR}.ppo_mini_batch_size": "batch.mini_batch",
    **{f"{_ACTOR}.optim.{key}": _SCHEDULE for key in _SCHEDULE_KEYS},
    f"{_ACTOR}.ulysses_sequence_parallel_size": _LONG_ROWS,
    f"{_ACTOR}.fsdp_config.ulysses_sequence_parallel_size": _LONG_ROWS,
    f"{_MODEL}.use_remove_padding": "engine.packed",
    f"{_MODEL}.override_config": "engine.packed and engine.attention",
    f"{_MODEL}.use_fused_kernels": "engine.max_tokens_per_micro_batch",
    **{f"{_MODEL}.{key}": "model.student.lora" for key in _LORA_KEYS},
    f"{_ROLLOUT}.layered_summon": "model.student.lora",
    f"{_ROLLOUT}.n": "batch.samples",
    **{
        f"{_ROLLOUT}.{key}": "sampling.*"
        for key in ("temperature", "top_k", "top_p", "do_sample", "val_kwargs")
    },
    f"{_ROLLOUT}.multi_turn": _DATA,
    f"{_ROLLOUT}.agent": "engine.rollout_workers",
    **{f"trainer.{key}": "evaluation.*" for key in _VALIDATION_KEYS},
    "trainer.critic_warmup": "steps",
    "trainer.total_epochs": "steps",
    "trainer.total_training_steps": "steps",
}
"""Keys of verl, or groups of them, and what sets the same here. In `Trainer`: losses, advantages,
data, validation; in `FsdpEngine`: the learning rate's schedule, adapters, attention, and the head,
which takes whole rows (Ulysses splits them) and makes no logits; in `RolloutWorker`: episodes."""


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """Checks ``engine.overrides``.

    Raises:
        ConfigError: a key would have no effect, or would spoil the run.
    """
    for key in flatten(overrides):
        parts = key.split(".")
        groups = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
        for group in groups:
            if group in INSTEAD:
                raise ConfigError(
                    f"engine.overrides: '{key}' would not act as in verl, since this engine "
                    f"replaces the part of verl that reads it.\nSet {INSTEAD[group]} instead."
                )
