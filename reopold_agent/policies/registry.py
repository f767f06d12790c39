"""Kinds of policies by name, open to other packages.

``transformers`` is the trainer's own model and has no maker here. An entry point of the group
``reopold_agent.policies`` points to a `PolicyKind`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reopold_agent.policies.base import Policy, PolicyRole
from reopold_agent.policies.loading import Processing, known_weights
from reopold_agent.registry import Registry

TRANSFORMERS = "transformers"


@dataclass(frozen=True)
class PolicyKind:
    """A kind of policy.

    Attributes:
        make: makes one; raises `ConfigError` for settings that cannot be.
        package: must be installed; the extra of the same name installs it.
        weights: whether it reads the checkpoint's weights here; a server has them.
    """

    make: Callable[[PolicyRole], Policy]
    package: str | None = None
    weights: bool = True


POLICIES: Registry[PolicyKind] = Registry("policy", "reopold_agent.policies", PolicyKind)


def _vllm(role: PolicyRole) -> Policy:
    from reopold_agent.policies.vllm import make_vllm_policy

    return make_vllm_policy(role)


def _server(role: PolicyRole) -> Policy:
    from reopold_agent.policies.server import Identity, make_server_policy
    from reopold_agent.policies.server.protocol import tokenizer_fingerprint

    spec = role.processing.spec
    return make_server_policy(
        role.settings,
        tokenizer_size=len(role.processing.tokenizer),
        forbidden_ids=role.forbidden_ids,
        stop_ids=role.stop_ids,
        image_token_id=role.processing.image_token_id,
        tokenizer_fingerprint=tokenizer_fingerprint(role.processing.tokenizer),
        vocabulary_rows=int(role.processing.config.get_text_config().vocab_size),
        wanted=Identity(spec.path, known_weights(spec, role.processing.config)),
    )


POLICIES.register("vllm", PolicyKind(_vllm, package="vllm"))
POLICIES.register("server", PolicyKind(_server, weights=False))


def is_trainers_own(settings: Mapping[str, Any]) -> bool:
    """Whether the role is served by a model in the trainer's process.

    Raises:
        UnknownNameError: there is no such kind of policy.
    """
    if settings["name"] == TRANSFORMERS:
        return True
    POLICIES.get(settings["name"])
    return False


def reads_weights(settings: Mapping[str, Any]) -> bool:
    """Whether the role's weights must be on this machine.

    Raises:
        UnknownNameError: there is no such kind of policy.
    """
    return is_trainers_own(settings) or POLICIES.get(settings["name"]).weights


def make_policy(
    role: str,
    settings: Mapping[str, Any],
    processing: Processing,
    *,
    dtype: str,
    forbidden_ids: Sequence[int],
    stop_ids: Sequence[int],
    max_pixels: int | None = None,
    seed: int = 0,
) -> Policy:
    """A policy that is not the trainer's own.

    Args:
        role, processing, dtype, forbidden_ids, stop_ids, max_pixels, seed: as of `PolicyRole`.
        settings: ``name``, and those of that kind.

    Raises:
        UnknownNameError: there is no such kind of policy.
        ReopoldError: the policy cannot be made.
    """
    rest = {key: value for key, value in settings.items() if key != "name"}
    kind = POLICIES.get(settings["name"])
    ids = tuple(forbidden_ids), tuple(stop_ids)
    return kind.make(PolicyRole(role, rest, processing, dtype, *ids, max_pixels, seed))
