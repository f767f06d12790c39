"""Batches of trajectories for a forward pass: padded to the longest, or packed without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from reopold_agent.policies.adapter import ModelAdapter
from reopold_agent.types import EncodedImage, Trajectory


@dataclass(frozen=True)
class TrajectoryBatch:
    """Trajectories as the input of one pass; the ``N`` loss tokens are listed row by row.

    Attributes:
        ids_BT: a trajectory per row, padded on the right; or packed, one after the other: (1, T).
        positions_3BT: `ModelAdapter.positions` of each trajectory.
        places_BT: each token's place in its trajectory, where packed; None where padded.
        attention_BT: False at padding; None where there is none.
        row_N, column_N: places of the loss tokens.
        images: the pictures of all trajectories, in order.
        tokens: number of tokens without padding.
    """

    ids_BT: Tensor
    positions_3BT: Tensor
    places_BT: Tensor | None
    attention_BT: Tensor | None
    row_N: Tensor
    column_N: Tensor
    images: list[EncodedImage]
    tokens: int

    @classmethod
    def build(cls, adapter: ModelAdapter, trajectories: Sequence[Trajectory]) -> TrajectoryBatch:
        """Packs the trajectories if the model takes packed rows, else pads them.

        Padding has id 0 and is masked; there is no mask when all lengths are equal.
        """
        device, packed = adapter.device, adapter.packed
        lengths = [len(t.ids) for t in trajectories]
        positions = [adapter.positions(t.ids, t.images) for t in trajectories]
        if packed:
            positions_3BT = torch.cat(positions, dim=1)[:, None]
        else:
            positions_3BT = torch.zeros((3, len(lengths), max(lengths)), dtype=torch.int64)
            for row, each in enumerate(positions):
                positions_3BT[:, row, : lengths[row]] = each
        places = torch.cat([torch.arange(n) for n in lengths])[None] if packed else None
        loss = _aligned([t.loss_mask for t in trajectories], packed)
        row_N, column_N = torch.nonzero(loss, as_tuple=True)
        attention = None
        if not packed and min(lengths) < max(lengths):
            attention = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return cls(
            ids_BT=_aligned([t.ids for t in trajectories], packed).to(device),
            positions_3BT=positions_3BT.to(device),
            places_BT=None if places is None else places.to(device),
            attention_BT=None if attention is None else attention.to(device),
            row_N=row_N.to(device),
            column_N=column_N.to(device),
            images=[image for t in trajectories for image in t.images],
            tokens=sum(lengths),
        )

    def scatter(self, values_N: Tensor) -> Tensor:
        """Returns values at the loss tokens and 0 elsewhere, as ``ids_BT``; differentiable."""
        filled = torch.zeros(self.ids_BT.shape, dtype=values_N.dtype, device=values_N.device)
        return filled.index_put((self.row_N, self.column_N), values_N)

    def aligned(self, values: Sequence[npt.NDArray[Any]]) -> Tensor:
        """Returns the trajectories' values, each aligned with its ids, as ``ids_BT``."""
        return _aligned(values, self.places_BT is not None).to(self.ids_BT.device)


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


def _aligned(values: Sequence[npt.NDArray[Any]], packed: bool) -> Tensor:
    tensors = [torch.from_numpy(each) for each in values]
    return torch.cat(tensors)[None] if packed else pad_sequence(tensors, batch_first=True)
