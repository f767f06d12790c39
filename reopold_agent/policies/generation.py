"""Generation by continuous batching with one key-value slot per sequence.

Turns enter and leave the batch one by one. After a tool call only the observation is computed. The
prompts' common prefix is computed once, and equal prompts (a group's samples) once per group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from reopold_agent.objectives.chunks import BANNED
from reopold_agent.policies.adapter import ModelAdapter
from reopold_agent.policies.kv_cache import SlotCache, Window
from reopold_agent.types import Completion, EncodedImage, Request, Sampling

_SHARED_PREFIX = 16
"""A common prefix with fewer tokens than this is not worth a separate pass."""

_CACHED_ELEMENTS = 2**18
"""Logits that are sampled from at once on a CPU: few enough for its cache, whatever is computed in
between."""

_LARGE_WEIGHTS, _FEW_ROWS = 2**22, 32
"""From and up to which a CPU multiplies faster with the weights on the left (MKL's float32: 21 in
place of 53 ms for 8 rows x 512 x 151,936)."""


@dataclass
class _Sequence:
    """State of one sequence: its slot, its cached tokens, and the turn in flight."""

    key: int
    slot: int
    cached: list[int] = field(default_factory=list)
    images_cached: int = 0
    next_position: int = 0
    request: Request | None = None
    rng: np.random.Generator | None = None
    sampled: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)


@dataclass
class _Prefill:
    """One row of a prefill pass: ``ids[start:]`` of a sequence, and positions of all its ids."""

    sequence: _Sequence
    ids: list[int]
    start: int
    positions: Tensor
    images: list[EncodedImage]


class TransformersGenerator:
    """One generation session; implements `Generator`.

    Args:
        adapter: the model; its weights must not change while the session lasts.
        sampling: temperature and top_p.
        banned: int64 ids of probability 0.
        stop_ids: a turn ends with the first of these.
        max_tokens_per_pass: most rows x tokens of one prefill pass.

    Slots ``[0, decoding)`` hold the turns in flight, so that a decoding pass reads the cache
    without gathering. The other slots hold sequences that wait for their environment.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        sampling: Sampling,
        *,
        banned: Tensor,
        stop_ids: frozenset[int],
        max_tokens_per_pass: int,
    ) -> None:
        self._adapter, self._sampling = adapter, sampling
        self._banned, self._stop_ids = banned, stop_ids
        self._max_tokens_per_pass = max_tokens_per_pass
        self._cache = SlotCache()
        self._sequences: dict[int, _Sequence] = {}
        self._by_slot: list[_Sequence] = []
        self._decoding = 0

    @property
    def in_flight(self) -> int:
        """Number of turns being generated."""
        return self._decoding

    def submit(self, requests: Sequence[Request]) -> None:
        """Runs the requests' new tokens through the model and samples each one's first token.

        Raises:
            ValueError: a key already has a turn in flight, or the ids do not continue what the
                session has seen of the sequence. No request of the call is accepted then.
            ModelError: a request's ids and pictures do not match. No request is accepted either.
        """
        with torch.no_grad():
            self._submit(requests)

    def step(self) -> list[Completion]:
        """Returns the turns that have ended and advances the others by one token."""
        done = [s for s in self._by_slot[: self._decoding] if self._finished(s)]
        completions = [self._complete(s) for s in done]
        if self._decoding and not completions:
            with torch.no_grad():
                self._decode()
        return completions

    def release(self, key: int) -> None:
        """Frees the sequence's slot.

        Raises:
            KeyError: there is no such sequence.
        """
        sequence = self._sequences.pop(key)
        if sequence.request is not None:
            self._leave_decoding(sequence)
        self._swap(sequence.slot, len(self._by_slot) - 1)
        self._by_slot.pop()

    # Prefill

    def _submit(self, requests: Sequence[Request]) -> None:
        if len({request.key for request in requests}) != len(requests):
            raise ValueError("two requests of one call have the same key")
        for request in requests:
            self._check(request)
        originals: dict[tuple[tuple[int, ...], tuple[int, ...]], Request] = {}
        copies: list[tuple[Request, Request]] = []
        unique: list[Request] = []
        for request in requests:
            identity = (tuple(request.ids), tuple(image.key for image in request.images))
            if request.key in self._sequences or identity not in originals:
                unique.append(request)
                originals.setdefault(identity, request)
            else:
                copies.append((request, originals[identity]))
        # Compute all positions before any sequence enters, since this may reject a request.
        positions = [self._adapter.positions(r.ids, r.images) for r in unique]
        # Rows that need a pass enter first, so that their slots are adjacent.
        rows = [self._prefill(r, p) for r, p in zip(unique, positions, strict=True)]
        fresh = [row for row in rows if row.start == 0]
        if len(fresh) > 1:
            self._share_prefix(fresh)
        states: dict[int, Tensor] = {}
        for group in _contiguous_groups(rows, self._max_tokens_per_pass):
            hidden_BD = self._pass(group)
            for index, row in enumerate(group):
                states[row.sequence.key] = hidden_BD[index]
        for request, original in copies:
            sequence, source = self._enter(request), self._sequences[original.key]
            self._cache.copy(source.slot, sequence.slot, len(source.cached))
            sequence.cached = list(source.cached)
            sequence.images_cached = source.images_cached
            sequence.next_position = source.next_position
            states[sequence.key] = states[source.key]
        entered = [self._sequences[request.key] for request in requests]
        self._sample(entered, torch.stack([states[s.key] for s in entered]))

    def _check(self, request: Request) -> None:
        sequence = self._sequences.get(request.key)
        cached = sequence.cached if sequence is not None else []
        if sequence is not None and sequence.request is not None:
            raise ValueError(f"sequence {request.key} already has a turn in flight")
        if list(request.ids[: len(cached)]) != cached:
            raise ValueError(f"the ids of sequence {request.key} do not continue those sent before")
        if len(request.ids) <= len(cached):
            raise ValueError(f"sequence {request.key} has no new token to continue from")
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {request.max_tokens}")

    def _enter(self, request: Request) -> _Sequence:
        sequence = self._sequences.get(request.key)
        if sequence is None:
            sequence = _Sequence(key=request.key, slot=len(self._by_slot))
            self._sequences[request.key] = sequence
            self._by_slot.append(sequence)
        sequence.request = request
        sequence.rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(request.seed)))
        sequence.sampled, sequence.logp, sequence.entropy = [], [], []
        self._swap(sequence.slot, self._decoding)
        self._decoding += 1
        return sequence

    def _prefill(self, request: Request, positions: Tensor) -> _Prefill:
        sequence = self._enter(request)
        return _Prefill(
            sequence,
            list(request.ids),
            len(sequence.cached),
            positions,
            list(request.images[sequence.images_cached :]),
        )

    def _share_prefix(self, rows: list[_Prefill]) -> None:
        """Computes the common text prefix of all new prompts once and copies it to each slot."""
        first = rows[0].ids
        length = min(len(row.ids) for row in rows) - 1
        for row in rows[1:]:
            length = next((i for i in range(length) if first[i] != row.ids[i]), length)
        image_id = self._adapter.image_token_id
        if image_id is not None and image_id in first[:length]:
            length = first.index(image_id)
        if length < _SHARED_PREFIX:
            return
        source = rows[0]
        self._pass([_Prefill(source.sequence, first[:length], 0, source.positions[:, :length], [])])
        for row in rows[1:]:
            self._cache.copy(source.sequence.slot, row.sequence.slot, length)
        for row in rows:
            row.start = length

    def _pass(self, rows: Sequence[_Prefill]) -> Tensor:
        """Runs rows in adjacent slots and returns the hidden state after each row's last id."""
        device = self._adapter.device
        lengths = [len(row.ids) - row.start for row in rows]
        shape = (len(rows), max(lengths))
        ids = torch.zeros(shape, dtype=torch.int64)
        positions = torch.zeros((3, *shape), dtype=torch.int64)
        for index, row in enumerate(rows):
            ids[index, : lengths[index]] = torch.tensor(row.ids[row.start :])
            positions[:, index, : lengths[index]] = row.positions[:, row.start :]
        lengths_B = torch.tensor(lengths, device=device)
        self._cache.set_window(
            Window(
                first=rows[0].sequence.slot,
                rows=len(rows),
                starts=torch.tensor([row.start for row in rows], device=device),
                lengths=lengths_B,
                ends_at=max(len(row.ids) for row in rows),
            )
        )
        hidden_BTD = self._adapter.hidden_states(
            ids.to(device),
            positions.to(device),
            [image for row in rows for image in row.images],
            self._cache.attention_mask(shape[1]),
            self._cache,
        )
        for row in rows:
            row.sequence.cached = list(row.ids)
            row.sequence.images_cached += len(row.images)
            row.sequence.next_position = int(row.positions.max()) + 1
        return hidden_BTD[torch.arange(len(rows), device=device), lengths_B - 1]

    # Decoding

    def _decode(self) -> None:
        device = self._adapter.device
        rows = self._by_slot[: self._decoding]
        starts = torch.tensor([len(s.cached) for s in rows], device=device)
        positions = torch.tensor([s.next_position for s in rows], device=device)
        self._cache.set_window(
            Window(
                first=0,
                rows=len(rows),
                starts=starts,
                lengths=torch.ones_like(starts),
                ends_at=max(len(s.cached) for s in rows) + 1,
            )
        )
        hidden_BTD = self._adapter.hidden_states(
            torch.tensor([[s.sampled[-1]] for s in rows], device=device),
            positions[None, :, None].expand(3, -1, 1),
            [],
            self._cache.attention_mask(1),
            self._cache,
        )
        for sequence in rows:
            sequence.cached.append(sequence.sampled[-1])
            sequence.next_position += 1
        self._sample(rows, hidden_BTD[:, 0])

    def _sample(self, rows: Sequence[_Sequence], hidden_BD: Tensor) -> None:
        with self._adapter.autocast():
            logits_BV = _logits(hidden_BD, self._adapter.head.weight).float()
        logits_BV.index_fill_(1, self._banned, BANNED)
        uniform_B = torch.tensor(
            [s.rng.random() for s in rows if s.rng is not None],
            dtype=torch.float64,
            device=logits_BV.device,
        )
        size = len(rows)
        if logits_BV.device.type == "cpu":
            size = max(1, _CACHED_ELEMENTS // logits_BV.shape[1])
        drawn = [
            self._draw(logits_bV, uniform_b)
            for logits_bV, uniform_b in zip(
                torch.split(logits_BV, size), torch.split(uniform_B, size), strict=True
            )
        ]
        ids, logps, entropies = (torch.cat(each).tolist() for each in zip(*drawn, strict=True))
        for sequence, token, logp, entropy in zip(rows, ids, logps, entropies, strict=True):
            sequence.sampled.append(token)
            sequence.logp.append(logp)
            sequence.entropy.append(entropy)

    def _draw(self, logits_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns sampled ids, their log-probs and the entropies."""
        logp_BV = torch.log_softmax(logits_BV, dim=-1)
        ids_B = sample_tokens(logits_BV, uniform_B, self._sampling)
        chosen_B = logp_BV.gather(1, ids_B[:, None])[:, 0]
        return ids_B, chosen_B, -logp_BV.exp().mul_(logp_BV).sum(dim=-1)

    def _finished(self, sequence: _Sequence) -> bool:
        if sequence.request is None:
            raise RuntimeError("a sequence in flight has no request")
        return self._stopped(sequence) or len(sequence.sampled) >= sequence.request.max_tokens

    def _stopped(self, sequence: _Sequence) -> bool:
        own = None if sequence.request is None else sequence.request.stop_ids
        return sequence.sampled[-1] in (own or self._stop_ids)

    def _complete(self, sequence: _Sequence) -> Completion:
        stopped = self._stopped(sequence)
        self._leave_decoding(sequence)
        return Completion(
            key=sequence.key,
            ids=tuple(sequence.sampled),
            logp=tuple(sequence.logp),
            entropy=tuple(sequence.entropy),
            finish="stop" if stopped else "length",
        )

    # Slots

    def _leave_decoding(self, sequence: _Sequence) -> None:
        sequence.request = None
        self._decoding -= 1
        self._swap(sequence.slot, self._decoding)

    def _swap(self, one: int, other: int) -> None:
        if one == other:
            return
        first, second = self._by_slot[one], self._by_slot[other]
        self._cache.swap(one, other, max(len(first.cached), len(second.cached)))
        first.slot, second.slot = other, one
        self._by_slot[one], self._by_slot[other] = second, first


def _logits(hidden_BD: Tensor, weight_VD: Tensor) -> Tensor:
    few = hidden_BD.shape[0] <= _FEW_ROWS and weight_VD.numel() >= _LARGE_WEIGHTS
    if few and hidden_BD.device.type == "cpu":
        return (weight_VD @ hidden_BD.T).T.contiguous()
    return hidden_BD @ weight_VD.T


def _contiguous_groups(rows: Sequence[_Prefill], most: int) -> Iterator[list[_Prefill]]:
    """Yields rows in adjacent slots whose rows x longest new part is at most ``most``."""
    group: list[_Prefill] = []
    longest = 0
    for row in sorted(rows, key=lambda r: r.sequence.slot):
        length = max(longest, len(row.ids) - row.start)
        adjacent = bool(group) and row.sequence.slot == group[-1].sequence.slot + 1
        if group and (not adjacent or length * (len(group) + 1) > most):
            yield group
            group, length = [], len(row.ids) - row.start
        group.append(row)
        longest = length
    if group:
        yield group


def sample_tokens(logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling) -> Tensor:
    """Draws one id per row by inverting the cumulative distribution.

    Args:
        logits_BV: float32; impossible ids at `BANNED`.
        uniform_B: float64 in [0, 1), one draw per row, so that a row's token depends only on its
            own random stream.
        sampling: temperature 0 takes the largest logit; top_p keeps the smallest set of most
            likely ids whose probability reaches it.

    Returns:
        (batch,) int64.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    # In place: a further array of all ids in float64 would cost more than what is computed in it.
    scaled_BV = logits_BV.to(torch.float64, copy=True).div_(sampling.temperature)
    probabilities_BV = torch.softmax(scaled_BV, dim=-1)
    if sampling.top_p < 1:
        ordered_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True)
        before_BV = ordered_BV.cumsum(dim=-1) - ordered_BV
        ordered_BV = ordered_BV.masked_fill(before_BV >= sampling.top_p, 0.0)
        chosen = _invert(ordered_BV, uniform_B)
        return order_BV.gather(1, chosen[:, None])[:, 0]
    return _invert(probabilities_BV, uniform_B)


def _invert(weights_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Returns the ids; overwrites the weights."""
    cumulative_BV = weights_BV.cumsum_(dim=-1)
    # Strictly below the total, so that rounding cannot pick an id of weight 0 at the end.
    target_B = uniform_B * cumulative_BV[:, -1]
    chosen = torch.searchsorted(cumulative_BV, target_B[:, None], right=True)[:, 0]
    return chosen.clamp(max=weights_BV.shape[1] - 1)
