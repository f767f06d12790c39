"""``policy=vllm``: generation and scoring with vLLM on this machine.

`policy` is the policy, `engine` drives vLLM's step loop on a thread, `requests` converts requests
and answers, `worker` runs inside vLLM's processes, and `sync` transfers the trainer's weights.
"""

from __future__ import annotations

from reopold_agent.config import build
from reopold_agent.policies.base import PolicyRole
from reopold_agent.policies.loading import check_for_vllm, resolve_path
from reopold_agent.policies.vllm.engine import VllmEngine
from reopold_agent.policies.vllm.policy import VllmPolicy
from reopold_agent.policies.vllm.settings import VllmSettings, engine_arguments

__all__ = ["VllmPolicy", "make_vllm_policy"]


def make_vllm_policy(role: PolicyRole) -> VllmPolicy:
    """Starts an engine for a checkpoint.

    Raises:
        MissingExtraError: vLLM is not installed.
        ConfigError: a setting is wrong.
        ModelError: vLLM would compute other positions, or the engine did not start.
    """
    settings = build(VllmSettings, role.settings, f"policy.{role.role}.")
    spec, config = role.processing.spec, role.processing.config
    check_for_vllm(config, spec.path, role.role)
    arguments = engine_arguments(
        settings,
        path=resolve_path(spec.path),
        revision=spec.revision,
        dtype=role.dtype,
        longest=int(config.get_text_config().max_position_embeddings),
        has_vision=role.processing.vision is not None,
        max_pixels=role.max_pixels,
        seed=role.seed,
        trust_remote_code=spec.trust_remote_code,
    )
    engine = VllmEngine(role.role, arguments, settings)
    try:
        return VllmPolicy(
            engine,
            settings,
            allowed_ids=len(role.processing.tokenizer),
            forbidden_ids=role.forbidden_ids,
            stop_ids=role.stop_ids,
            image_token_id=role.processing.image_token_id,
            dtype=arguments["dtype"],
        )
    except BaseException:
        engine.close()
        raise
