"""Padded batches of trajectories for a forward pass."""

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
    """Trajectories padded on the right; the ``N`` loss tokens are listed row by row."""

    ids_BT: Tensor
    positions_3BT: Tensor
    attention_BT: Tensor | None
    row_N: Tensor
    column_N: Tensor
    images: list[EncodedImage]

    @classmethod
    def build(cls, adapter: ModelAdapter, trajectories: Sequence[Trajectory]) -> TrajectoryBatch:
        """Pads with id 0 and masks it; there is no mask when all lengths are equal."""
        device = adapter.device
        ids = _padded([t.ids for t in trajectories])
        positions = torch.zeros((3, *ids.shape), dtype=torch.int64)
        attention = torch.zeros(ids.shape, dtype=torch.bool)
        for row, trajectory in enumerate(trajectories):
            length = len(trajectory.ids)
            positions[:, row, :length] = adapter.positions(trajectory.ids, trajectory.images)
            attention[row, :length] = True
        loss = _padded([t.loss_mask for t in trajectories])
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
        """Returns (batch, time) with values at the loss tokens and 0 elsewhere; differentiable."""
        filled = torch.zeros(self.ids_BT.shape, dtype=values_N.dtype, device=values_N.device)
        return filled.index_put((self.row_N, self.column_N), values_N)

    def padded(self, values: Sequence[npt.NDArray[Any]]) -> Tensor:
        """Returns the trajectories' values, each aligned with its ids, as (batch, time)."""
        return _padded(values).to(self.ids_BT.device)


def _padded(values: Sequence[npt.NDArray[Any]]) -> Tensor:
    return pad_sequence([torch.from_numpy(each) for each in values], batch_first=True)


def split_by_tokens(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Groups the indices of sequences of similar length so that rows x longest is at most ``most``.

    A longer sequence forms a group of its own. The order within and between groups depends only on
    the lengths.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= most:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
