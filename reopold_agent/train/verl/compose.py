"""Translates a run's configuration into verl's.

verl's YAML files and its dataclasses disagree in places (its distillation, for one), so every key
that this engine depends on is set here; `overrides` of the user come last.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from reopold_agent.config import EngineConfig, ModelConfig, ServerConfig, TrainConfig
from reopold_agent.errors import ConfigError
from reopold_agent.objectives import Objective
from reopold_agent.policies.architecture import find_architecture
from reopold_agent.policies.attention import IMPLEMENTATION, packed_kernel
from reopold_agent.policies.loading import check_attention, resolve_path
from reopold_agent.policies.lora import check_merged, without_adapter
from reopold_agent.rollout.lengths import episode_limit, prompt_limit
from reopold_agent.train.engine import needs_teacher
from reopold_agent.train.teachers import TeacherSettings, run_teachers
from reopold_agent.train.verl.supported import (
    check_objective,
    check_settings,
    check_tensor_parallel,
    student_gpus,
    teacher_gpus,
    teacher_replicas,
)

TEACHER_TOKENS_PER_PASS = 4096
"""Tokens of one pass of the teacher's servers. Prompt log-probs take ``tokens x vocabulary x 4``
bytes (2.5 GB with Qwen's vocabulary); without a bound they exhaust a GPU (vllm #5907)."""

LORA_SETTINGS, FROZEN_DTYPE = "reopold_settings", "reopold_dtype"
"""Keys of our settings of LoRA among verl's (``actor_rollout_ref.model.lora``)."""

GLOO = "gloo"
"""Name of `weights.GlooWeights` among verl's ways to send weights to servers on other GPUs."""

CPU_CACHE_BYTES = 256 * 2**20
"""Keys and values of a server on a CPU, for tiny models."""


def check_supported(config: TrainConfig, objective: Objective) -> None:
    """Refuses what this engine cannot do, before anything is started; needs no verl.

    Raises:
        ConfigError: names the setting and the way out.
    """
    check_objective(config.objective["name"], objective)
    check_settings(config)
    run_device(config.engine)
    taught = needs_teacher(config, objective)
    student_gpus(config.engine, taught)
    teachers = run_teachers(config) if taught else []
    if teachers:
        teacher_replicas(config.engine, len(teachers))
    models = [("student", config.model.student), *(("teacher", each.model) for each in teachers)]
    shapes = []
    for role, spec in models:
        # Of a checkpoint that is not there, or of another family, others tell.
        with suppress(ConfigError):
            shapes.append((role, find_architecture(spec.path)))
    check_tensor_parallel(config.engine, shapes)


def check_adapter(model: Any) -> None:
    """Refuses a LoRA adapter that this engine cannot train or send to its servers.

    Args:
        model: the student, of which only the shapes matter.

    Raises:
        ConfigError: it has an adapter of the input embedding.
        ModelError: as `check_merged`.
    """
    check_merged(model)
    if hasattr(without_adapter(model).get_input_embeddings(), "base_layer"):
        # FSDP2 replaces a module's class, which Python refuses for that of peft.
        raise ConfigError(
            "engine=verl cannot divide an adapter of the input embedding over GPUs.\nLeave "
            "embed_tokens out of model.student.lora.target_modules, or use engine=local."
        )


def run_device(engine: EngineConfig) -> str:
    """Returns the type of the devices that compute, ``cuda`` or ``cpu``.

    Raises:
        ConfigError: the engine runs on neither.
    """
    if engine.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f"engine.device={engine.device} is not one of engine=verl's.\nUse auto, cuda or cpu."
        )
    if engine.device != "auto":
        return engine.device
    # The driver of a cluster may itself have no GPU.
    remote = engine.ray_address or os.environ.get("RAY_ADDRESS")
    return "cuda" if remote or torch.cuda.is_available() else "cpu"


def student_kernel(config: TrainConfig, device: str) -> str | None:
    """Returns the attention kernel of the student's packed rows; None where it pads them.

    Args:
        config: the run's configuration.
        device: ``cuda`` or ``cpu``.

    Raises:
        ConfigError: it is not installed, does not run there, or the student has another.
    """
    kernel = packed_kernel(config.engine, device)
    check_attention(config.model.student.attention, "student", kernel)
    return kernel


def verl_config(
    config: TrainConfig,
    folder: Path,
    *,
    with_teacher: bool,
    device: str,
    contexts: Mapping[str, int],
) -> DictConfig:
    """Returns verl's configuration of this run.

    Args:
        config: the run's configuration.
        folder: the run folder; verl's checkpoints go to ``folder/checkpoints``.
        with_teacher: start servers for the teacher.
        device: ``cuda`` or ``cpu``.
        contexts: longest sequence of each model (``max_position_embeddings``), by role.

    Raises:
        ConfigError: sequences do not fit the models, or an override names no key of verl's.
    """
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    # Hydra's state is global, and Hydra may have started this process.
    saved = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("verl.trainer.config", version_base=None):
            composed = compose("ppo_trainer", overrides=["actor_rollout_ref.rollout.name=vllm"])
    finally:
        GlobalHydra.instance().clear()
        if saved is not None:
            GlobalHydra.instance().initialize(saved)
    OmegaConf.set_struct(composed, False)
    settings = {
        **_trainer(config, folder, with_teacher, device),
        **_student(config, device, contexts["student"]),
        **_optimizer(config),
    }
    if with_teacher:
        entries = _teacher_entries(config)
        shape = OmegaConf.to_container(composed.distillation.teacher_models.teacher_model)
        for entry in entries:
            OmegaConf.update(composed, f"distillation.teacher_models.{entry}", shape)
        for entry, teacher in entries.items():
            settings.update(_teacher(config, teacher.model, entry, device, min(contexts.values())))
            if len(entries) > 1:  # for one, verl fills in both
                replicas = teacher_replicas(config.engine, len(entries))
                where = f"distillation.teacher_models.{entry}"
                settings.update({f"{where}.key": teacher.names[0]})
                settings.update({f"{where}.num_replicas": replicas})
    for key, value in settings.items():
        OmegaConf.update(composed, key, value, merge=False, force_add=True)
    for key, value in config.engine.overrides.items():
        if OmegaConf.select(composed, key, default=_ABSENT) is _ABSENT:
            raise ConfigError(
                f"engine.overrides: verl has no setting '{key}' (see its trainer/config/*.yaml)"
            )
        OmegaConf.update(composed, key, value, merge=False)
    return composed


_ABSENT = object()


def _trainer(config: TrainConfig, folder: Path, with_teacher: bool, device: str) -> dict[str, Any]:
    engine = config.engine
    return {
        "trainer.device": device,
        "trainer.use_v1": True,
        "trainer.v1.trainer_mode": "sync",
        "trainer.nnodes": engine.nodes,
        "trainer.n_gpus_per_node": student_gpus(engine, with_teacher),
        "trainer.total_epochs": 1,
        "trainer.total_training_steps": config.steps,
        "trainer.logger": [],
        "trainer.project_name": "reopold",
        "trainer.experiment_name": folder.name,
        "trainer.val_before_train": False,
        "trainer.test_freq": -1,
        "trainer.save_freq": config.checkpoint.every or config.steps,
        "trainer.max_actor_ckpt_to_keep": config.checkpoint.keep,
        "trainer.default_local_dir": str(folder / "checkpoints"),
        "trainer.resume_mode": "disable" if config.resume == "never" else "auto",
        "trainer.balance_batch": True,
        "data.train_batch_size": config.batch.prompts,
        "data.gen_batch_size": None,
        "data.shuffle": False,
        "data.dataloader_num_workers": 0,
        "algorithm.adv_estimator": "grpo",  # unused: the objective has its own
        "algorithm.use_kl_in_reward": False,
        **_importance_weights(config.importance_cap),
        "critic.enable": False,
        "reward.num_workers": 1,  # unused: the environment gives the reward
        "reward.reward_model.enable": False,
        "reward.reward_model.rollout.name": "vllm",
        "transfer_queue.enable": True,
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": _storage_units(
            engine, device
        ),
    }


def _importance_weights(cap: float | None) -> dict[str, Any]:
    """Returns the settings of verl's own truncated importance sampling (`Trainer` runs it)."""
    settings = {
        "bypass_mode": False,
        "rollout_is": None if cap is None else "token",
        "rollout_is_threshold": 2.0 if cap is None else cap,
        "rollout_is_batch_normalize": False,
        "rollout_rs": None,
        "rollout_rs_threshold": None,
    }
    return {f"algorithm.rollout_correction.{key}": value for key, value in settings.items()}


def _storage_units(engine: EngineConfig, device: str) -> int:
    return 1 if device == "cpu" else 2 * engine.nodes


def _student(config: TrainConfig, device: str, context: int) -> dict[str, Any]:
    engine, spec = config.engine, config.model.student
    prompt, length = lengths(config, context)
    kernel = student_kernel(config, device)
    attention = spec.attention if kernel is None else IMPLEMENTATION + kernel
    actor, rollout, model = (f"actor_rollout_ref.{part}" for part in ("actor", "rollout", "model"))
    precision = engine.precision
    if precision == "auto":
        precision = "float32" if device == "cpu" else "bfloat16"
    adapts, saved = spec.lora is not None, ["model", "optimizer", "extra"]
    return {
        "data.max_prompt_length": prompt,
        "data.max_response_length": config.rollout.max_response_tokens,
        f"{model}.path": resolve_path(spec.path),
        f"{model}.trust_remote_code": spec.trust_remote_code,
        f"{model}.enable_gradient_checkpointing": spec.gradient_checkpointing,
        f"{model}.use_remove_padding": kernel is not None,
        f"{model}.use_fused_kernels": False,  # `head.TokenHead` has their place
        f"{model}.override_config": {"attn_implementation": attention},
        f"{actor}.strategy": "fsdp2",
        f"{actor}.use_dynamic_bsz": True,
        f"{actor}.ppo_max_token_len_per_gpu": engine.max_tokens_per_micro_batch,
        f"{actor}.ppo_mini_batch_size": config.batch.mini_batch,
        f"{actor}.ppo_epochs": 1,
        f"{actor}.shuffle": False,
        f"{actor}.entropy_coeff": 0.0,
        f"{actor}.use_kl_loss": False,
        f"{actor}.use_torch_compile": False,
        f"{actor}.checkpoint.save_contents": saved if adapts else [*saved, "hf_model"],
        f"{actor}.checkpoint.load_contents": saved,
        f"{actor}.checkpoint.save_lora_only": adapts,
        f"{actor}.fsdp_config.model_dtype": "fp32",  # master weights
        f"{actor}.fsdp_config.mixed_precision": {
            "param_dtype": "bf16" if precision == "bfloat16" else "fp32",
            "reduce_dtype": "fp32",
            "buffer_dtype": "fp32",
        },
        f"{actor}.fsdp_config.use_torch_compile": False,
        f"{actor}.fsdp_config.param_offload": engine.offload,
        f"{actor}.fsdp_config.optimizer_offload": engine.offload,
        f"{actor}.fsdp_config.seed": config.seed,
        f"{rollout}.n": config.batch.samples,
        f"{rollout}.temperature": 1.0,  # for the trainer's log-probs; requests have their own
        f"{rollout}.top_p": 1.0,
        f"{rollout}.calculate_log_probs": True,
        f"{rollout}.log_prob_use_dynamic_bsz": True,
        f"{rollout}.log_prob_max_token_len_per_gpu": engine.max_tokens_per_pass,
        f"{rollout}.load_format": "safetensors",
        f"{rollout}.prompt_length": prompt,
        f"{rollout}.response_length": config.rollout.max_response_tokens,
        **_server(rollout, engine.student_server, config, spec, device, length),
        # They generate while the trainer computes, and so never sleep.
        **({f"{rollout}.free_cache_engine": False} if engine.ahead else {}),
        **_apart(engine, device),
        **{f"{model}.{key}": value for key, value in verl_lora(spec.lora, spec.dtype).items()},
    }


def _apart(engine: EngineConfig, device: str) -> dict[str, Any]:
    """Returns the settings of servers on GPUs of their own; nothing for those that train."""
    if not engine.rollout_gpus_per_node:
        return {}
    rollout = "actor_rollout_ref.rollout"
    sent = f"{rollout}.checkpoint_engine"
    own = {f"{sent}.custom_backend_module": "reopold_agent.train.verl.weights"}
    return {
        f"{rollout}.nnodes": engine.nodes,
        f"{rollout}.n_gpus_per_node": engine.rollout_gpus_per_node,
        f"{rollout}.free_cache_engine": False,
        f"{sent}.backend": GLOO if device == "cpu" else "nccl",
        **(own if device == "cpu" else {}),
    }


def verl_lora(lora: Mapping[str, Any] | None, dtype: str) -> dict[str, Any]:
    """Returns verl's settings with which it trains an adapter and sends merged weights.

    verl itself reads few of peft's settings: all go to `training.FsdpEngine`, which makes the
    adapter.

    Args:
        lora: arguments of `peft.LoraConfig`, or None to train all weights.
        dtype: of the frozen weights.
    """
    if lora is None:
        return {}
    settings = {"merge": True, LORA_SETTINGS: dict(lora), FROZEN_DTYPE: dtype}
    return {"lora_rank": lora.get("r", 8), "lora": settings}


def _teacher_entries(config: TrainConfig) -> dict[str, TeacherSettings]:
    """Returns the teachers by their entries in verl's ``teacher_models``.

    verl drops the entry ``teacher_model`` where there are others, so several have other names.
    """
    teachers = run_teachers(config)
    if not teachers:
        raise ConfigError("a teacher is needed, but model.teacher is null")
    if len(teachers) == 1:
        return {"teacher_model": teachers[0]}
    return {f"teacher_{number}": teacher for number, teacher in enumerate(teachers)}


def _teacher(
    config: TrainConfig, spec: ModelConfig, entry: str, device: str, context: int
) -> dict[str, Any]:
    engine = config.engine
    prompt, length = lengths(config, context)
    teacher = f"distillation.teacher_models.{entry}"
    inference = f"{teacher}.inference"
    loss = "distillation.distillation_loss"
    return {
        "distillation.enabled": True,  # for its servers; the loss is ours (`loss.ObjectiveLoss`)
        "distillation.nnodes": engine.nodes,
        "distillation.n_gpus_per_node": teacher_gpus(engine),
        f"{loss}.loss_mode": "k1",
        f"{loss}.topk": None,
        f"{loss}.use_task_rewards": False,
        f"{loss}.distillation_loss_coef": 1.0,
        f"{loss}.loss_max_clamp": None,
        f"{loss}.log_prob_min_clamp": None,
        f"{loss}.use_policy_gradient": True,
        f"{loss}.policy_loss_mode": "vanilla",
        f"{teacher}.model_path": resolve_path(spec.path),
        f"{inference}.name": "vllm",
        f"{inference}.temperature": 1.0,
        f"{inference}.prompt_length": prompt,
        f"{inference}.response_length": config.rollout.max_response_tokens,
        f"{inference}.load_format": "auto",
        **_server(inference, engine.teacher_server, config, spec, device, length),
        f"{inference}.gpu_memory_utilization": engine.teacher_memory_share,
        f"{inference}.max_num_batched_tokens": TEACHER_TOKENS_PER_PASS,
        # On shared GPUs its servers sleep, and on a CPU too: they take no requests then, although
        # they have no memory to give.
        f"{inference}.free_cache_engine": engine.shares_gpus,
    }


def _server(
    where: str,
    server: ServerConfig,
    config: TrainConfig,
    spec: ModelConfig,
    device: str,
    length: int,
) -> dict[str, Any]:
    """Returns the settings that the student's and the teacher's vLLM servers share."""
    cpu = device == "cpu"
    # Servers size their memory by the largest picture, which for Qwen2.5-VL's own limits has 12.8
    # million pixels. Pictures come with the size that they keep (`VisionProcessor.encode`), and
    # the frames of a video are pictures.
    pictures = {
        "mm_processor_kwargs": {"do_resize": False, "max_pixels": config.pixels.most()},
        "limit_mm_per_prompt": {"video": 0},
    }
    settings: dict[str, Any] = {
        "tensor_model_parallel_size": server.tensor_parallel,
        "data_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "gpu_memory_utilization": server.memory_share,
        "max_num_seqs": server.max_sequences,
        "max_model_len": length,
        "max_num_batched_tokens": 8192,
        "enforce_eager": cpu or server.eager,
        "dtype": _server_dtype(config, spec, device),
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        # Sleeping servers give the GPU to the trainer; a CPU has nothing to give.
        "free_cache_engine": not cpu,
        "enable_sleep_mode": not cpu,
        "seed": config.seed,
        "engine_kwargs": {"vllm": pictures},
    }
    if cpu:
        settings["engine_kwargs"]["vllm"]["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
    return {f"{where}.{key}": value for key, value in settings.items()}


def _server_dtype(config: TrainConfig, spec: ModelConfig, device: str) -> str:
    """Returns float32 only where the whole run uses it."""
    whole = spec.dtype == "float32" and config.engine.precision == "float32"
    return "float32" if device == "cpu" or whole else "bfloat16"


def lengths(config: TrainConfig, context: int) -> tuple[int, int]:
    """Returns the longest prompt, and the longest sequence plus the token that scoring adds."""
    prompt, length = prompt_limit(config, context), episode_limit(config, context)
    assert prompt is not None  # a context limits both
    assert length is not None
    return prompt, length


def _optimizer(config: TrainConfig) -> dict[str, Any]:
    settings = config.optimizer
    optim = "actor_rollout_ref.actor.optim"
    return {
        "actor_rollout_ref.actor.grad_clip": settings.max_grad_norm,
        f"{optim}.optimizer": "AdamW",
        f"{optim}.optimizer_impl": "torch.optim",
        f"{optim}.lr": settings.lr,
        f"{optim}.betas": [settings.beta1, settings.beta2],
        f"{optim}.weight_decay": settings.weight_decay,
        f"{optim}.override_optimizer_config": {"eps": settings.eps},
        f"{optim}.clip_grad": settings.max_grad_norm,
        f"{optim}.lr_scheduler_type": settings.lr_scheduler_type,
        # In updates, not in steps (`training.FsdpEngine`).
        f"{optim}.lr_warmup_steps": settings.warmup_steps,
        f"{optim}.total_training_steps": config.updates,
    }
