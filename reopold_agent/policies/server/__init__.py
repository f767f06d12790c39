"""``policy=server``: a model behind HTTP, usually a teacher on another machine.

`policy` holds the policy, `transport` sends requests (several addresses, retries, time limits),
`protocol` defines the messages of our server, and `clients` is the interface to the two kinds of
server: ours (``python -m reopold_agent.serve``; `reopold`) and any vLLM server with
``/v1/completions`` (`completions`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reopold_agent.config import build
from reopold_agent.policies.server.clients import Identity
from reopold_agent.policies.server.policy import ServerPolicy
from reopold_agent.policies.server.protocol import Vocabulary
from reopold_agent.policies.server.settings import ServerSettings

__all__ = ["Identity", "ServerPolicy", "ServerSettings", "make_server_policy"]


def make_server_policy(
    settings: Mapping[str, Any],
    *,
    tokenizer_size: int,
    forbidden_ids: Sequence[int],
    stop_ids: Sequence[int],
    image_token_id: int | None,
    tokenizer_fingerprint: str | None = None,
    vocabulary_rows: int | None = None,
    wanted: Identity | None = None,
) -> ServerPolicy:
    """Connects to the servers of one role and checks that they serve the right model.

    Args:
        settings: see `ServerSettings`.
        tokenizer_size: number of ids that the tokenizer knows; rows from there on are padding.
        forbidden_ids: ids that have probability 0 everywhere.
        stop_ids: a turn ends with the first of these.
        image_token_id: the placeholder of a merged patch; None for text-only models.
        tokenizer_fingerprint: the result of `protocol.tokenizer_fingerprint`; None skips its check.
        vocabulary_rows: rows of the model's output embedding, padding included, if known.
        wanted: the checkpoint that should be served; None accepts any.

    Raises:
        ConfigError: a setting is wrong.
        ModelServerError: no address answered, or one refused the request.
        ModelError: a server serves another model.
    """
    policy = ServerPolicy(
        build(ServerSettings, settings, "policy."),
        Vocabulary(
            size=tokenizer_size,
            forbidden_ids=tuple(sorted(int(i) for i in forbidden_ids)),
            stop_ids=tuple(sorted(int(i) for i in stop_ids)),
            image_token_id=image_token_id,
            fingerprint=tokenizer_fingerprint,
            rows=vocabulary_rows,
        ),
        wanted,
    )
    try:
        policy.check()
    except BaseException:
        policy.close()
        raise
    return policy
