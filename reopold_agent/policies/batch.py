"""Batches of trajectories for a forward pass: padded to the longest, or packed without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from reopold_agent.policies.adapter import ModelAdapter
from reopold_agent.types import EncodedImage, Trajectory


@dataclass(frozen=True)
class TrajectoryBatch:
    """Trajectories as the input of one pass; the ``N`` loss tokens are listed row by row.

    Packed trajectories that share a prompt (a group's samples) hold it once, if the model's
    attention can read it from there: the first comes whole, of the others what follows the prompt.

    Attributes:
        ids_BT: a trajectory per row, padded on the right; or packed, one after the other: (1, T).
        positions_3BT: `ModelAdapter.positions` of each trajectory.
        places_BT: each token's place in its trajectory, where packed; None where padded.
        attention_BT: False at padding; None where there is none.
        row_N, column_N: places of the loss tokens.
        before_N: columns of the tokens before them, whose states predict them.
        images: the pictures of all trajectories, in order; those of a shared prompt once.
        tokens: number of tokens without padding.
        layout: where packed, the trajectories in the order in which they stand in the pass, each
            with its first place there; None where padded.
    """

    ids_BT: Tensor
    positions_3BT: Tensor
    places_BT: Tensor | None
    attention_BT: Tensor | None
    row_N: Tensor
    column_N: Tensor
    before_N: Tensor
    images: list[EncodedImage]
    tokens: int
    layout: list[tuple[int, int]] | None = None

    @classmethod
    def build(cls, adapter: ModelAdapter, trajectories: Sequence[Trajectory]) -> TrajectoryBatch:
        """Packs the trajectories if the model takes packed rows, else pads them.

        Padding has id 0 and is masked; there is no mask when all lengths are equal.
        """
        device = adapter.device
        lengths = [len(t.ids) for t in trajectories]
        positions = [adapter.positions(t.ids, t.images) for t in trajectories]
        if adapter.packed:
            return cls._build_packed(adapter, trajectories, positions)
        positions_3BT = torch.zeros((3, len(lengths), max(lengths)), dtype=torch.int64)
        for row, each in enumerate(positions):
            positions_3BT[:, row, : lengths[row]] = each
        loss = pad_sequence([torch.from_numpy(t.loss_mask) for t in trajectories], batch_first=True)
        row_N, column_N = torch.nonzero(loss, as_tuple=True)
        ids = pad_sequence([torch.from_numpy(t.ids) for t in trajectories], batch_first=True)
        attention = None
        if min(lengths) < max(lengths):
            attention = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return cls(
            ids_BT=ids.to(device),
            positions_3BT=positions_3BT.to(device),
            places_BT=None,
            attention_BT=None if attention is None else attention.to(device),
            row_N=row_N.to(device),
            column_N=column_N.to(device),
            before_N=(column_N - 1).to(device),
            images=[image for t in trajectories for image in t.images],
            tokens=sum(lengths),
        )

    @classmethod
    def _build_packed(
        cls,
        adapter: ModelAdapter,
        trajectories: Sequence[Trajectory],
        positions: Sequence[Tensor],
    ) -> TrajectoryBatch:
        device = adapter.device
        firsts = _first_with_prompt(adapter, trajectories) if adapter.shares_prompts else {}
        # The others follow the first one with their prompt.
        order = sorted(range(len(trajectories)), key=lambda row: (firsts.get(row, row), row))
        layout = [(row, trajectories[row].prompt_length if row in firsts else 0) for row in order]
        offsets = [0] * len(layout)
        images: list[EncodedImage] = []
        total = 0
        for row, start in layout:
            trajectory = trajectories[row]
            offsets[row] = total - start  # of its place 0, if it were there
            total += len(trajectory.ids) - start
            images += trajectory.images[_pictures_before(adapter, trajectory, start) :]
        columns, before = [], []
        for row, trajectory in enumerate(trajectories):
            places = torch.from_numpy(np.flatnonzero(trajectory.loss_mask))
            columns.append(places + offsets[row])
            first = firsts.get(row, row)
            inside = places - 1 >= (trajectory.prompt_length if row in firsts else 0)
            before.append(torch.where(inside, offsets[row], offsets[first]) + places - 1)
        column_N = torch.cat(columns)

        return cls(
            ids_BT=_packed([torch.from_numpy(t.ids) for t in trajectories], layout).to(device),
            positions_3BT=_packed(positions, layout).to(device),
            places_BT=_packed([torch.arange(len(t.ids)) for t in trajectories], layout).to(device),
            attention_BT=None,
            row_N=torch.zeros_like(column_N).to(device),
            column_N=column_N.to(device),
            before_N=torch.cat(before).to(device),
            images=images,
            tokens=total,
            layout=layout,
        )

    def scatter(self, values_N: Tensor) -> Tensor:
        """Returns values at the loss tokens and 0 elsewhere, as ``ids_BT``; differentiable."""
        filled = torch.zeros(self.ids_BT.shape, dtype=values_N.dtype, device=values_N.device)
        return filled.index_put((self.row_N, self.column_N), values_N)

    def aligned(self, values: Sequence[npt.NDArray[Any]]) -> Tensor:
        """Returns the trajectories' values, each aligned with its ids, as ``ids_BT``."""
        tensors = [torch.from_numpy(each) for each in values]
        if self.layout is None:
            return pad_sequence(tensors, batch_first=True).to(self.ids_BT.device)
        return _packed(tensors, self.layout).to(self.ids_BT.device)


@dataclass
class PassTokens:
    """Counts the tokens of forward passes.

    Attributes:
        computed: positions that were computed.
        real: those that were not padding.
    """

    computed: int = 0
    real: int = 0

    @property
    def padding_share(self) -> float:
        """Share of the computed positions that were padding; 0 if there were none."""
        return (self.computed - self.real) / max(1, self.computed)

    def __add__(self, other: PassTokens) -> PassTokens:
        return PassTokens(self.computed + other.computed, self.real + other.real)

    def add(self, batch: TrajectoryBatch) -> None:
        """Counts a pass."""
        self.computed += batch.ids_BT.numel()
        self.real += batch.tokens


def _packed(values: Sequence[Tensor], layout: Sequence[tuple[int, int]]) -> Tensor:
    """Returns what the rows have along their last axis, one after the other: (..., 1, T)."""
    return torch.cat([values[row][..., start:] for row, start in layout], dim=-1)[..., None, :]


def _first_with_prompt(adapter: ModelAdapter, rows: Sequence[Trajectory]) -> dict[int, int]:
    """Returns for each row whose prompt an earlier one has which row that is."""
    found: dict[int, int] = {}
    known: dict[bytes, list[int]] = {}
    for row, trajectory in enumerate(rows):
        length = trajectory.prompt_length
        number = _pictures_before(adapter, trajectory, length)
        if number is None or trajectory.loss_mask[:length].any():
            continue  # what a server is asked for may begin anywhere
        alike = known.setdefault(trajectory.ids[:length].tobytes(), [])
        pictures = trajectory.images[:number]
        first = next((each for each in alike if _show(rows[each].images, pictures)), None)
        if first is None:
            alike.append(row)
        else:
            found[row] = first
    return found


def _show(images: Sequence[EncodedImage], pictures: Sequence[EncodedImage]) -> bool:
    """Returns whether pictures begin with others."""
    pairs = zip(images, pictures, strict=False)
    return all(a.key == b.key or np.array_equal(a.pixels, b.pixels) for a, b in pairs)


def _pictures_before(adapter: ModelAdapter, trajectory: Trajectory, place: int) -> int | None:
    """Returns how many pictures stand before a place; None if it is inside of one."""
    seen = 0
    if adapter.image_token_id is not None:
        seen = int((trajectory.ids[:place] == adapter.image_token_id).sum())
    ends = list(accumulate((image.tokens for image in trajectory.images), initial=0))
    return ends.index(seen) if seen in ends else None
