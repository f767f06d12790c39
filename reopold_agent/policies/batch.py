"""Trajectories as padded batches for a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reopold_agent.policies.adapter import ModelAdapter
from reopold_agent.types import EncodedImage, Trajectory


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
