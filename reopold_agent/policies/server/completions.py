"""Uses any vLLM server (``vllm serve MODEL``) through ``/v1/completions``, for text only.

The prompt is token ids; ``prompt_logprobs`` and ``return_token_ids`` return log-probs and ids.
Such a server normalises over the whole vocabulary, padding and forbidden ids included, but this
project normalises over the allowed ids. With ``m`` the probability of the masked ids::

    log p(token | allowed) = log p(token) - log(1 - m)

The server lists the ``top_logprobs`` most likely ids of a position; their share of ``m`` is removed
exactly. Each masked id that is not listed is at most as likely as the last one listed, and all
unlisted ids together have the probability that remains to 1. So the result is at most ``bound``
nats too low and never too high. `MaskBound` records this bound.

Pictures are not supported: vLLM's ``/inference/v1/generate`` takes them with ids only as
preprocessed tensors in an internal format, which changes with its version. `reopold_agent.serve`
with ``policy=vllm`` takes pictures and masks exactly.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from typing_extensions import override

from reopold_agent.common.http import Deadline
from reopold_agent.errors import ConfigError, ModelError
from reopold_agent.policies.server.clients import Identity, ServerClient, finite, same_ids
from reopold_agent.policies.server.protocol import Vocabulary
from reopold_agent.policies.server.settings import ServerSettings
from reopold_agent.policies.server.transport import Address, Transport
from reopold_agent.types import Completion, Request, Sampling, TokenScores, Trajectory

_MODELS, _COMPLETIONS = "/v1/models", "/v1/completions"
_LOWEST = -9999.0
"""vLLM's stand-in for minus infinity in JSON."""


class MaskBound:
    """Records by how many nats the true log-probs over allowed ids may exceed the results."""

    def __init__(self) -> None:
        self.largest = self._sum = 0.0
        self.tokens = 0
        self._lock = threading.Lock()

    @property
    def mean(self) -> float:
        """The mean over all tokens so far."""
        return self._sum / self.tokens if self.tokens else 0.0

    def add(self, bounds: Sequence[float]) -> None:
        """Records the bounds of more tokens."""
        with self._lock:
            self.largest = max(self.largest, *bounds, 0.0)
            self._sum += sum(bounds)
            self.tokens += len(bounds)


class CompletionsClient(ServerClient):
    """A client of vLLM's HTTP server.

    Args:
        settings: the expected model, and how many ids the server lists per token.
        vocabulary: the allowed ids.
        transport: sends the requests.
    """

    score_batch = 1
    streams = True
    """Whether turns are asked for token by token, which shows that the server works on them."""

    def __init__(
        self, settings: ServerSettings, vocabulary: Vocabulary, transport: Transport
    ) -> None:
        self._settings, self._vocabulary, self._transport = settings, vocabulary, transport
        self._masked = frozenset(vocabulary.masked)
        self._models: dict[Address, str] = {}
        self.bound = MaskBound()

    @override
    def check(self, address: Address, deadline: Deadline) -> Identity:
        # A vLLM server reports its model's name, but nothing about its tokenizer.
        answer = self._transport.exchange(address, "GET", _MODELS, None, deadline)
        try:
            names = [str(each["id"]) for each in answer["data"]]
        except (KeyError, TypeError) as error:
            raise ModelError(
                f"{address.url} is not an OpenAI-compatible server: {error!r}"
            ) from error
        wanted = self._settings.model
        if wanted is None and len(names) == 1:
            wanted = names[0]
        if wanted is None:
            raise ConfigError(
                f"{address.url} serves {', '.join(names) or 'nothing'}; name one with policy.model"
            )
        if wanted not in names:
            raise ModelError(
                f"the server {address.url} has '{', '.join(names)}', but policy.model is '{wanted}'"
            )
        self._models[address] = wanted
        return Identity(wanted)

    @override
    def score(
        self,
        address: Address,
        trajectories: Sequence[Trajectory],
        with_entropy: bool,
        deadline: Deadline,
    ) -> list[TokenScores]:
        if with_entropy:
            raise ValueError("a vLLM server gives no entropies; score with the trainer's model")
        return [self._score(address, each, deadline) for each in trajectories]

    def _score(self, address: Address, trajectory: Trajectory, deadline: Deadline) -> TokenScores:
        self._only_text(trajectory.images)
        ids = trajectory.ids.tolist()
        choice = self._complete(
            address,
            {
                "prompt": ids,
                "max_tokens": 1,
                "temperature": 0.0,
                "prompt_logprobs": self._settings.top_logprobs,
            },
            deadline,
        )
        same_ids(ids, _field(choice, "prompt_token_ids", address), "ids", address.url)
        listed = _field(choice, "prompt_logprobs", address)
        if len(listed) != len(ids):
            raise ModelError(f"{address.url} gave {len(listed)} log-probs for {len(ids)} ids")
        logp = np.zeros(len(ids), dtype=np.float32)
        positions = np.flatnonzero(trajectory.loss_mask)
        found = []
        for i in positions.tolist():
            try:
                entry = {int(key): float(value["logprob"]) for key, value in listed[i].items()}
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ModelError(
                    f"{address.url} gave no log-probs at position {i}: {error!r}"
                ) from error
            found.append(entry)
        logp[positions] = self._allowed([ids[i] for i in positions.tolist()], found, address.url)
        return TokenScores(logp, np.zeros_like(logp))

    @override
    def generate(
        self, address: Address, name: str, request: Request, sampling: Sampling, deadline: Deadline
    ) -> Completion:
        # vLLM finds earlier turns in its prefix cache; it returns no entropies.
        self._only_text(request.images)
        prompt = [int(i) for i in request.ids]
        listed = self._settings.top_logprobs
        seed = np.random.SeedSequence(request.seed).generate_state(1, np.uint64)[0] >> 1
        choice = self._complete(
            address,
            {
                "prompt": prompt,
                "max_tokens": request.max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                # Otherwise the checkpoint's own generation defaults would apply.
                "top_k": 0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "seed": int(seed),
                "stop_token_ids": list(self._vocabulary.stop_ids),
                "ignore_eos": True,  # stop_token_ids is complete
                "logprobs": (self._vocabulary.rows or 0) if listed < 0 else listed,
                "return_tokens_as_token_ids": True,
                "logit_bias": {str(i): -100.0 for i in sorted(self._masked)},
                "stream": self.streams,
            },
            deadline,
        )
        same_ids(prompt, _field(choice, "prompt_token_ids", address), "ids", address.url)
        ids = [int(i) for i in _field(choice, "token_ids", address)]
        said = _field(choice, "logprobs", address)
        try:
            entries = [
                {int(key.rpartition(":")[2]): float(value) for key, value in each.items()}
                for each in said["top_logprobs"]
            ]
            for token, entry, value in zip(ids, entries, said["token_logprobs"], strict=True):
                entry[token] = float(value)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"{address.url} gave other log-probs than tokens: {error!r}"
            ) from error
        if not 0 < len(ids) <= request.max_tokens:
            raise ModelError(f"{address.url} sampled {len(ids)} of {request.max_tokens} tokens")
        logp = self._allowed(ids, entries, address.url)
        return Completion(
            key=request.key,
            ids=tuple(ids),
            logp=tuple(logp),
            entropy=(0.0,) * len(ids),
            finish="stop" if ids[-1] in self._vocabulary.stop_ids else "length",
        )

    @override
    def release(self, address: Address, names: Sequence[str], deadline: Deadline) -> None:
        pass  # vLLM's prefix cache evicts by itself

    def _complete(self, address: Address, body: Mapping[str, Any], deadline: Deadline) -> Any:
        common = {
            "model": self._models[address],
            "return_token_ids": True,
            "add_special_tokens": False,
        }
        answer = self._transport.exchange(
            address, "POST", _COMPLETIONS, {**common, **body}, deadline, _whole
        )
        try:
            (choice,) = answer["choices"]
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{address.url} gave no single completion: {error!r}") from error
        return choice

    def _allowed(
        self, tokens: Sequence[int], listed: Sequence[Mapping[int, float]], url: str
    ) -> list[float]:
        """Returns log-probs over the allowed ids, and records their bounds.

        Args:
            tokens: the sampled ids.
            listed: for each of them, log-probs over the whole vocabulary of this id and of the most
                likely ids.
            url: the server, for messages.
        """
        masked, rows = self._masked, self._vocabulary.rows
        most = self._settings.top_logprobs
        values, bounds = [], []
        for token, entry in zip(tokens, listed, strict=True):
            if token not in entry:
                raise ModelError(f"{url} gave log-probs of other ids than {token}")
            if token in masked or token >= self._vocabulary.size or entry[token] <= _LOWEST:
                raise ModelError(f"{url}: id {token} was sampled, but has probability 0")
            finite(list(entry.values()), "log-probs", url)
            hidden = [i for i in entry if i in masked or i >= self._vocabulary.size]
            seen = sum(math.exp(entry[i]) for i in hidden)
            rest = max(0.0, 1.0 - sum(map(math.exp, entry.values())))
            if most < 0:
                rest = 0.0
            elif most and rows is not None:
                # The token itself is listed even where it is less likely than the others.
                last = sorted(entry.values(), reverse=True)[min(most, len(entry)) - 1]
                rest = min(rest, (len(masked) - len(hidden)) * math.exp(last))
            values.append(min(0.0, entry[token] - math.log1p(-seen)))
            bounds.append(-math.log1p(-min(rest / (1.0 - seen), 1.0 - 1e-12)))
        self.bound.add(bounds)
        return values

    def _only_text(self, images: Sequence[Any]) -> None:
        if images:
            raise ConfigError(
                "a vLLM server takes token ids with pictures only in a format of its own version; "
                "serve this model with: python -m reopold_agent.serve model=... policy=vllm"
            )


def _field(choice: Mapping[str, Any], name: str, address: Address) -> Any:
    value = choice.get(name) if isinstance(choice, dict) else None
    if value is None:
        raise ModelError(
            f"{address.url} gave no {name}; it must be a vLLM server that knows return_token_ids"
        )
    return value


def _whole(reply: bytes) -> Any:
    """Returns an answer, put together if it came as a stream of events.

    Raises:
        ValueError: it is not JSON, or the stream is not complete or of another form.
    """
    if not reply.startswith(b"data:"):  # an error, scores, or a server that does not stream
        return json.loads(reply)
    choice: dict[str, Any] = {"token_ids": []}
    for line in reply.decode().split("\n"):
        _, data, event = line.partition("data: ")
        if not data:
            continue
        if event.strip() == "[DONE]":
            return {"choices": [choice]}
        said = json.loads(event)
        try:
            if "error" in said:
                return {**said, "status": said["error"].get("code")}
            for part in said["choices"]:
                choice["token_ids"] += part["token_ids"]
                if part.get("prompt_token_ids") is not None:
                    choice["prompt_token_ids"] = part["prompt_token_ids"]
                for name, values in (part.get("logprobs") or {}).items():
                    choice.setdefault("logprobs", {}).setdefault(name, []).extend(values)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"an event of another form: {error!r}") from error
    raise ValueError("the stream ended early")
