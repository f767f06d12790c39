"""Any vLLM server (``vllm serve MODEL``), by its OpenAI-compatible ``/v1/completions``: text only.

Token ids go in as the prompt, ``prompt_logprobs`` and ``return_token_ids`` bring log-probs and the
ids back. Such a server normalises over the whole vocabulary, padding and forbidden ids included,
and this project over the allowed ids. With ``m`` the probability of the masked ids::

    log p(token | allowed) = log p(token) - log(1 - m)

What the ``top_logprobs`` most likely ids of a position show of ``m`` is taken out exactly. Of the
rest it is known that no id is more likely than the last one listed, and that all unlisted ids
together have what is left to 1; so the value given is at most ``bound`` nats too low, never too
high. `MaskBound` keeps count of that bound.

Pictures: vLLM's ``/inference/v1/generate`` takes ids with pictures only as its own preprocessed
tensors in its internal serialisation, which changes with its version. `reopold_agent.serve` with
``policy=vllm`` takes pictures, and masks exactly.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from reopold_agent.errors import ConfigError, ModelError
from reopold_agent.policies.server.backends import finite, same_ids
from reopold_agent.policies.server.protocol import Vocabulary
from reopold_agent.policies.server.settings import ServerSettings
from reopold_agent.policies.server.transport import Address, Transport
from reopold_agent.types import Completion, Request, Sampling, TokenScores, Trajectory

_MODELS, _COMPLETIONS = "/v1/models", "/v1/completions"
_LOWEST = -9999.0
"""vLLM's stand-in for minus infinity in JSON."""


class MaskBound:
    """How far log-probs over the allowed ids may lie above what was given, in nats."""

    def __init__(self) -> None:
        self.largest = self._sum = 0.0
        self.tokens = 0
        self._lock = threading.Lock()

    @property
    def mean(self) -> float:
        """Over all tokens so far."""
        return self._sum / self.tokens if self.tokens else 0.0

    def add(self, bounds: Sequence[float]) -> None:
        """Counts these tokens' bounds."""
        with self._lock:
            self.largest = max(self.largest, *bounds, 0.0)
            self._sum += sum(bounds)
            self.tokens += len(bounds)


class CompletionsBackend:
    """Implements `Backend` for vLLM's HTTP server.

    Args:
        settings: which model is wanted, and how many ids are listed per token.
        vocabulary: which ids are allowed.
        transport: carries the messages.
    """

    score_batch = 1

    def __init__(
        self, settings: ServerSettings, vocabulary: Vocabulary, transport: Transport
    ) -> None:
        self._settings, self._vocabulary, self._transport = settings, vocabulary, transport
        self._masked = frozenset(vocabulary.masked)
        self._models: dict[Address, str] = {}
        self.bound = MaskBound()

    def check(self, address: Address, deadline: float) -> None:
        """See `Backend`. A vLLM server tells its model's name, not its tokenizer."""
        answer = self._transport.exchange(address, "GET", _MODELS, None, deadline)
        try:
            names = [str(each["id"]) for each in answer["data"]]
        except (KeyError, TypeError) as error:
            raise ModelError(f"{address.url} is no OpenAI-compatible server: {error!r}") from error
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

    def score(
        self,
        address: Address,
        trajectories: Sequence[Trajectory],
        with_entropy: bool,
        deadline: float,
    ) -> list[TokenScores]:
        """See `Backend`.

        Raises:
            ValueError: entropies were asked for, which vLLM does not give.
        """
        if with_entropy:
            raise ValueError("a vLLM server gives no entropies; score with the trainer's model")
        return [self._score(address, each, deadline) for each in trajectories]

    def _score(self, address: Address, trajectory: Trajectory, deadline: float) -> TokenScores:
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

    def generate(
        self, address: Address, name: str, request: Request, sampling: Sampling, deadline: float
    ) -> Completion:
        """See `Backend`. vLLM finds earlier turns in its prefix cache; entropies are zeros."""
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
                # Said, because a checkpoint's own generation defaults would slip in otherwise.
                "top_k": 0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "seed": int(seed),
                "stop_token_ids": list(self._vocabulary.stop_ids),
                "ignore_eos": True,  # the stop ids are all of them
                "logprobs": (self._vocabulary.rows or 0) if listed < 0 else listed,
                "return_tokens_as_token_ids": True,
                "logit_bias": {str(i): -100.0 for i in sorted(self._masked)},
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

    def release(self, address: Address, names: Sequence[str], deadline: float) -> None:
        """See `Backend`; vLLM's prefix cache forgets by itself."""

    def _complete(self, address: Address, body: Mapping[str, Any], deadline: float) -> Any:
        common = {
            "model": self._models[address],
            "return_token_ids": True,
            "add_special_tokens": False,
        }
        answer = self._transport.exchange(
            address, "POST", _COMPLETIONS, {**common, **body}, deadline
        )
        try:
            (choice,) = answer["choices"]
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{address.url} gave no single completion: {error!r}") from error
        return choice

    def _allowed(
        self, tokens: Sequence[int], listed: Sequence[Mapping[int, float]], url: str
    ) -> list[float]:
        """Log-probs over the allowed ids; counts their bounds.

        Args:
            tokens: the ids themselves.
            listed: for each, log-probs over the whole vocabulary of itself and of the most likely.
            url: for messages.
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
                "a vLLM server takes token ids with pictures only in a form of its own version; "
                "serve this teacher with: python -m reopold_agent.serve model=... policy=vllm"
            )


def _field(choice: Mapping[str, Any], name: str, address: Address) -> Any:
    value = choice.get(name) if isinstance(choice, dict) else None
    if value is None:
        raise ModelError(
            f"{address.url} gave no {name}; it must be a vLLM server that knows return_token_ids"
        )
    return value
