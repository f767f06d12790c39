"""Settings of a policy server, and its assembly from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reopold_agent.common.secrets import key_from_environment
from reopold_agent.config import EngineConfig, PolicyConfig
from reopold_agent.errors import ConfigError

if TYPE_CHECKING:
    from reopold_agent.serve.http import PolicyServer


@dataclass(frozen=True)
class ServeConfig:
    """The settings of a policy server: the model and the address.

    Attributes:
        checkpoint: a folder, a hub id, ``demo:NAME``, or a training run's folder.
        revision: branch, tag or commit on the hub.
        host, port: where to listen; port 0 takes a free one. The default host is reachable
            from this machine only, since no token is needed unless ``token_env`` gives one.
        token_env: environment variable with the token that clients must send.
        stop_at_tool_call: as ``rollout.stop_at_tool_call`` of the runs that generate here.
        device, dtype, attention, threads, max_tokens_per_pass: as in a training run's engine and
            model, for ``policy=transformers``; on a GPU ``sdpa`` scores packed rows.
        chat_template: as ``model.chat_template`` of these runs.
        picture_gib: most GiB of clients' pictures that are kept, as pixels.
        max_waiting: most requests at once; further ones get HTTP 503 and may try again.
        max_kept: most sequences whose keys and values are kept between turns.
        request_seconds: a request fails when the model has worked on none for so long; there is no
            limit on its wait or its length.
        max_body_mib: size of the largest accepted request.
        policy: ``policy.student`` generates and scores: ``transformers``, ``vllm`` or a plugin's.
    """

    checkpoint: str
    revision: str | None = None
    host: str = "127.0.0.1"
    port: int = 8100
    token_env: str = "REOPOLD_API_KEY"
    stop_at_tool_call: bool = True
    device: str = "auto"
    dtype: str = "auto"
    attention: str = "sdpa"
    chat_template: str | None = None
    trust_remote_code: bool = False
    threads: int | None = None
    max_tokens_per_pass: int = 16384
    picture_gib: float = 2.0
    max_waiting: int = 1024
    max_kept: int = 256
    request_seconds: float = 3600.0
    max_body_mib: int = 256
    policy: PolicyConfig = field(default_factory=PolicyConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port must be from 0 to 65535, got {self.port}")
        for name in ("picture_gib", "max_waiting", "max_kept", "request_seconds", "max_body_mib"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")


@contextmanager
def serving(config: ServeConfig) -> Iterator[PolicyServer]:
    """Loads the model and opens the server; the caller runs ``serve_forever`` on it.

    Raises:
        ReopoldError: the model cannot be loaded, or the address is in use.
    """
    # Imported here so that --help and configuration errors do not wait for PyTorch.
    import torch

    from reopold_agent.policies.attention import packed_kernel
    from reopold_agent.policies.base import Closeable
    from reopold_agent.policies.loading import (
        LoadedModel,
        ModelSpec,
        known_weights,
        load_model,
        load_processing,
        model_path,
        pick_device,
    )
    from reopold_agent.policies.registry import is_trainers_own, make_policy
    from reopold_agent.policies.server.protocol import Served, Vocabulary, tokenizer_fingerprint
    from reopold_agent.rollout.chat import ChatRenderer
    from reopold_agent.serve.http import PolicyServer
    from reopold_agent.serve.pictures import PictureStore
    from reopold_agent.serve.service import PolicyService

    settings = config.policy.student
    own = is_trainers_own(settings)
    device = pick_device(config.device)
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    spec = ModelSpec(
        path=model_path(config.checkpoint),
        revision=config.revision,
        dtype=dtype,
        attention=config.attention,
        chat_template=config.chat_template,
        trust_remote_code=config.trust_remote_code,
    )
    processing = load_processing(spec, "model")
    chat = ChatRenderer(processing.tokenizer, stop_at_tool_call=config.stop_at_tool_call)
    packs = config.attention == "sdpa"
    kernel = packed_kernel(EngineConfig(), device.type) if packs else None
    model = load_model(spec, "model", device, kernel=kernel) if own else processing
    policy: Any
    if isinstance(model, LoadedModel):
        policy = model.policy(
            forbidden_ids=chat.forbidden_ids,
            stop_ids=chat.stop_ids,
            max_tokens_per_pass=config.max_tokens_per_pass,
        )
    else:
        policy = make_policy(
            "model",
            settings,
            model,
            dtype=dtype,
            forbidden_ids=chat.forbidden_ids,
            stop_ids=chat.stop_ids,
        )
    served = Served(
        model=config.checkpoint,
        revision=config.revision,
        vocabulary=Vocabulary(
            size=len(model.tokenizer),
            forbidden_ids=tuple(sorted(chat.forbidden_ids)),
            stop_ids=tuple(sorted(chat.stop_ids)),
            image_token_id=model.image_token_id,
            fingerprint=tokenizer_fingerprint(model.tokenizer),
            rows=int(model.config.get_text_config().vocab_size),
        ),
        policy=settings["name"],
        entropy=own,
        weights=known_weights(spec, model.config),
    )
    service = PolicyService(
        policy,
        max_waiting=config.max_waiting,
        seconds=config.request_seconds,
        max_kept=config.max_kept,
    )
    try:
        try:
            server = PolicyServer(
                config.host,
                config.port,
                service,
                PictureStore(model.vision, int(config.picture_gib * 2**30)),
                served,
                token=key_from_environment([config.token_env] if config.token_env else []),
                max_body_bytes=config.max_body_mib * 2**20,
            )
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {config.host}:{config.port}: {error.strerror or error}\n"
                "Give another port=N (0: any that is free) or host=ADDRESS."
            ) from error
        with server:
            yield server
    finally:
        service.close()
        if isinstance(policy, Closeable):
            policy.close()
