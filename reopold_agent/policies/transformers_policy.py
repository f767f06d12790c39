"""Generation and scoring with Hugging Face models in this process.

Generation is continuous batching with one key-value slot per sequence: turns enter and leave the
batch one by one, a sequence that comes back from a tool pays only for its observation, the
prompts' common beginning is computed once, and equal prompts (a group's samples) once per group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from reopold_agent.policies.adapter import ModelAdapter
from reopold_agent.policies.kv_cache import SlotCache, Window
from reopold_agent.policies.logprobs import BANNED, token_logprobs
from reopold_agent.types import (
    Completion,
    EncodedImage,
    Request,
    Sampling,
    TokenScores,
    Trajectory,
)

_SHARED_PREFIX = 16
"""A common beginning shorter than this many tokens is not worth a pass of its own."""


class TransformersPolicy:
    """A policy around a Hugging Face model; implements `Policy`.

    Args:
        adapter: the model.
        allowed_ids: number of ids the tokenizer knows; rows from there on are padding.
        forbidden_ids: ids that must not be sampled; they have probability 0 everywhere.
        stop_ids: a turn ends with the first of these.
        max_tokens_per_pass: bound on rows x tokens of one forward pass (memory).
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        *,
        allowed_ids: int,
        forbidden_ids: Sequence[int],
        stop_ids: Sequence[int],
        max_tokens_per_pass: int = 16384,
    ) -> None:
        self.adapter = adapter
        self.stop_ids = frozenset(stop_ids)
        self.max_tokens_per_pass = max_tokens_per_pass
        padded = range(allowed_ids, adapter.vocabulary_rows)
        banned = sorted({*forbidden_ids, *padded})
        self.banned = torch.tensor(banned, dtype=torch.int64, device=adapter.device)

    def generator(self, sampling: Sampling) -> TransformersGenerator:
        """A new session; end it (drop it) before the weights change."""
        self.adapter.model.eval()
        return TransformersGenerator(self, sampling)

    @torch.no_grad()
    def score(
        self, trajectories: Sequence[Trajectory], *, with_entropy: bool = False
    ) -> list[TokenScores]:
        """See `Policy.score`; passes are bounded by ``max_tokens_per_pass``."""
        was_training = self.adapter.model.training
        self.adapter.model.eval()
        scores: list[TokenScores | None] = [None] * len(trajectories)
        for group in split_by_tokens([len(t.ids) for t in trajectories], self.max_tokens_per_pass):
            batch = TrajectoryBatch.build(self.adapter, [trajectories[i] for i in group])
            logp_N, entropy_N = self.logprobs(batch, with_entropy=with_entropy)
            logp_BT = batch.scatter(logp_N).cpu().numpy()
            entropy = torch.zeros_like(logp_N) if entropy_N is None else entropy_N
            entropy_BT = batch.scatter(entropy).cpu().numpy()
            for row, index in enumerate(group):
                length = len(trajectories[index].ids)
                scores[index] = TokenScores(logp_BT[row, :length], entropy_BT[row, :length])
        self.adapter.model.train(was_training)
        return [score for score in scores if score is not None]

    def logprobs(
        self, batch: TrajectoryBatch, *, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs (and entropies) of the batch's loss tokens, flat; see `TrajectoryBatch`.

        Differentiable unless called under ``no_grad``.
        """
        hidden_BTD = self.adapter.hidden_states(
            batch.ids_BT, batch.positions_3BT, batch.images, batch.attention_BT
        )
        # The state before a token predicts it.
        hidden_ND = hidden_BTD[batch.row_N, batch.column_N - 1]
        targets_N = batch.ids_BT[batch.row_N, batch.column_N]
        weight_VD = self.adapter.head.weight
        with self.adapter.autocast():
            return token_logprobs(
                hidden_ND, weight_VD, targets_N, self.banned, with_entropy=with_entropy
            )


@dataclass(frozen=True)
class TrajectoryBatch:
    """Trajectories padded on the right. The ``N`` loss tokens are listed row by row."""

    ids_BT: Tensor
    positions_3BT: Tensor
    attention_BT: Tensor | None
    row_N: Tensor
    column_N: Tensor
    images: list[EncodedImage]

    @classmethod
    def build(cls, adapter: ModelAdapter, trajectories: Sequence[Trajectory]) -> TrajectoryBatch:
        """Pads with id 0 under a mask; no mask at all when all lengths are equal."""
        device = adapter.device
        lengths = [len(t.ids) for t in trajectories]
        shape = (len(trajectories), max(lengths))
        ids = torch.zeros(shape, dtype=torch.int64)
        positions = torch.zeros((3, *shape), dtype=torch.int64)
        attention = torch.zeros(shape, dtype=torch.bool)
        loss = torch.zeros(shape, dtype=torch.bool)
        for row, trajectory in enumerate(trajectories):
            length = lengths[row]
            ids[row, :length] = torch.from_numpy(trajectory.ids)
            positions[:, row, :length] = adapter.positions(trajectory.ids, trajectory.images)
            attention[row, :length] = True
            loss[row, :length] = torch.from_numpy(trajectory.loss_mask)
        row_N, column_N = torch.nonzero(loss, as_tuple=True)
        return cls(
            ids_BT=ids.to(device),
            positions_3BT=positions.to(device),
            attention_BT=None if bool(attention.all()) else attention.to(device),
            row_N=row_N.to(device),
            column_N=column_N.to(device),
            images=[image for t in trajectories for image in t.images],
        )

    def scatter(self, values_N: Tensor) -> Tensor:
        """(batch, time) with the values at the loss tokens and 0 elsewhere; differentiable."""
        filled = torch.zeros(self.ids_BT.shape, dtype=values_N.dtype, device=values_N.device)
        return filled.index_put((self.row_N, self.column_N), values_N)


def split_by_tokens(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Groups indices so that rows x longest stays within ``most``; similar lengths together.

    A sequence longer than ``most`` forms a group of its own. Order within and between groups
    depends on the lengths only.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= most:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


@dataclass
class _Sequence:
    """State of one sequence: its slot, what is cached, and the turn in flight."""

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
    """One row of a prefill pass: ``ids[start:]`` of a sequence with all its positions."""

    sequence: _Sequence
    ids: list[int]
    start: int
    positions: Tensor
    images: list[EncodedImage]


class TransformersGenerator:
    """One generation session; implements `Generator`.

    Slots ``[0, decoding)`` are the turns in flight, so that a decoding pass reads the cache
    without gathering; the other slots belong to sequences that wait for their environment.
    """

    def __init__(self, policy: TransformersPolicy, sampling: Sampling) -> None:
        self.policy, self.sampling = policy, sampling
        self._adapter = policy.adapter
        self._cache = SlotCache()
        self._sequences: dict[int, _Sequence] = {}
        self._by_slot: list[_Sequence] = []
        self._decoding = 0
        self._last_ids: list[int] = []

    @property
    def in_flight(self) -> int:
        """Number of turns being generated."""
        return self._decoding

    def submit(self, requests: Sequence[Request]) -> None:
        """Runs the requests' new tokens through the model and samples each one's first token.

        Raises:
            ValueError: a key already has a turn in flight, or the ids do not continue what the
                session has seen of the sequence.
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
        # Rows that need a pass enter first, so that their slots are adjacent.
        rows = [self._enter(request) for request in unique]
        fresh = [row for row in rows if row.start == 0]
        if len(fresh) > 1:
            self._share_prefix(fresh)
        states: dict[int, Tensor] = {}
        for group in _contiguous_groups(rows, self.policy.max_tokens_per_pass):
            hidden_BD = self._pass(group)
            for index, row in enumerate(group):
                states[row.sequence.key] = hidden_BD[index]
        for request, original in copies:
            sequence, source = self._enter(request).sequence, self._sequences[original.key]
            self._cache.copy(source.slot, sequence.slot, len(source.cached))
            sequence.cached = list(source.cached)
            sequence.images_cached = source.images_cached
            sequence.next_position = source.next_position
            states[sequence.key] = states[source.key]
        entered = [self._sequences[request.key] for request in requests]
        self._sample(entered, torch.stack([states[s.key] for s in entered]))

    def _enter(self, request: Request) -> _Prefill:
        sequence = self._sequences.get(request.key)
        if sequence is None:
            sequence = _Sequence(key=request.key, slot=len(self._by_slot))
            self._sequences[request.key] = sequence
            self._by_slot.append(sequence)
        if sequence.request is not None:
            raise ValueError(f"sequence {request.key} already has a turn in flight")
        if list(request.ids[: len(sequence.cached)]) != sequence.cached:
            raise ValueError(
                f"the ids of sequence {request.key} do not continue what was sent before"
            )
        if len(request.ids) <= len(sequence.cached):
            raise ValueError(f"sequence {request.key} has no new token to continue from")
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {request.max_tokens}")
        sequence.request = request
        sequence.rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(request.seed)))
        sequence.sampled, sequence.logp, sequence.entropy = [], [], []
        self._swap(sequence.slot, self._decoding)
        self._decoding += 1
        return _Prefill(
            sequence,
            list(request.ids),
            len(sequence.cached),
            self._adapter.positions(request.ids, request.images),
            list(request.images[sequence.images_cached :]),
        )

    def _share_prefix(self, rows: list[_Prefill]) -> None:
        """Computes the text that all new prompts begin with once and copies it to each slot."""
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
            row.sequence.cached = first[:length]
        for row in rows:
            row.start = length

    def _pass(self, rows: Sequence[_Prefill]) -> Tensor:
        """One forward pass over rows in adjacent slots; hidden state after each row's last id."""
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
            logits_BV = (hidden_BD @ self._adapter.head.weight.T).float()
        logits_BV.index_fill_(1, self.policy.banned, BANNED)
        logp_BV = torch.log_softmax(logits_BV, dim=-1)
        entropy_B = torch.special.entr(logp_BV.exp()).sum(dim=-1)
        uniform_B = torch.tensor(
            [s.rng.random() for s in rows if s.rng is not None],
            dtype=torch.float64,
            device=logits_BV.device,
        )
        ids_B = sample_tokens(logits_BV, uniform_B, self.sampling)
        chosen_B = logp_BV.gather(1, ids_B[:, None])[:, 0]
        for sequence, token, logp, entropy in zip(
            rows, ids_B.tolist(), chosen_B.tolist(), entropy_B.tolist(), strict=True
        ):
            sequence.sampled.append(token)
            sequence.logp.append(logp)
            sequence.entropy.append(entropy)

    def _finished(self, sequence: _Sequence) -> bool:
        if sequence.request is None:
            raise RuntimeError("a sequence in flight has no request")
        stopped = sequence.sampled[-1] in self.policy.stop_ids
        return stopped or len(sequence.sampled) >= sequence.request.max_tokens

    def _complete(self, sequence: _Sequence) -> Completion:
        stopped = sequence.sampled[-1] in self.policy.stop_ids
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


def _contiguous_groups(rows: Sequence[_Prefill], most: int) -> Iterator[list[_Prefill]]:
    """Runs of rows in adjacent slots whose rows x longest new part stays within ``most``."""
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
        uniform_B: float64 in [0, 1): one draw per row, so that a row's token depends only on its
            own stream.
        sampling: temperature 0 takes the largest logit; top_p keeps the smallest set of most
            likely ids whose probability reaches it.

    Returns:
        (batch,) int64.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    probabilities_BV = torch.softmax(logits_BV.double() / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ordered_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True)
        before_BV = ordered_BV.cumsum(dim=-1) - ordered_BV
        ordered_BV = ordered_BV.masked_fill(before_BV >= sampling.top_p, 0.0)
        chosen = _invert(ordered_BV, uniform_B)
        return order_BV.gather(1, chosen[:, None])[:, 0]
    return _invert(probabilities_BV, uniform_B)


def _invert(weights_BV: Tensor, uniform_B: Tensor) -> Tensor:
    cumulative_BV = weights_BV.cumsum(dim=-1)
    # Strictly below the total, so that rounding cannot pick an id of weight 0 at the end.
    target_B = uniform_B * cumulative_BV[:, -1]
    chosen = torch.searchsorted(cumulative_BV, target_B[:, None], right=True)[:, 0]
    return chosen.clamp(max=weights_BV.shape[1] - 1)
