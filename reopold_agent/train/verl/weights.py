"""Sends the trainer's weights to servers on other (pretended) GPUs of machines without any.

On GPUs verl's own ``nccl`` does it, which needs them.
"""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Iterable
from datetime import timedelta
from typing import Any

import ray
import torch
from torch import Tensor
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

from reopold_agent.train.verl.compose import GLOO

_torch: Any = torch.distributed  # whose types of stores and groups are not complete

_TIMEOUT = timedelta(minutes=10)


@CheckpointEngineRegistry.register(GLOO)
class GlooWeights(CheckpointEngine):
    """Broadcasts one tensor after the other from the trainer's first rank to all servers.

    Names, shapes and dtypes go through the store by which the processes find each other.
    `verl.checkpoint_engine.base.CheckpointEngine` documents the methods.

    Args:
        bucket_size: unused: nothing is put together.
        is_master: whether this is the trainer's first rank.
    """

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self._is_master = is_master
        self._store: Any = None
        self._group: Any = None

    def prepare(self) -> dict[str, Any]:
        """Returns where the first rank waits for the others; nothing on other ranks."""
        if not self._is_master:
            return {}
        host = ray.util.get_node_ip_address().strip("[]")
        listening = socket.create_server((host, 0))
        port = listening.getsockname()[1]
        self._store = _torch.TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )
        return {"host": host, "port": port}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict[str, Any]]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Returns the ranks: the trainer's first one and the servers; the others' are -1."""
        size = 1 + rollout_world_size

        def arguments(ranks: list[int]) -> dict[str, list[Any]]:
            return {
                "rank": list(ranks),
                "size": [size] * len(ranks),
                "address": [metadata[0]] * len(ranks),
            }

        return (
            arguments([0] + [-1] * (actor_wg_world_size - 1)),
            arguments(list(range(1, size))),
        )

    def init_process_group(self, rank: int, size: int, address: dict[str, Any]) -> None:
        """Connects this process with the others."""
        if rank < 0:
            return
        if self._store is None:
            self._store = _torch.TCPStore(address["host"], address["port"], is_master=False)
        self._group = _torch.ProcessGroupGloo(self._store, rank, size, _TIMEOUT)

    def finalize(self) -> None:
        """Disconnects this process."""
        self._group = self._store = None

    @torch.no_grad()
    async def send_weights(
        self, weights: Iterable[tuple[str, Tensor]], global_steps: int | None = None
    ) -> None:
        """Sends the weights; ranks without a part in it gather them all the same."""
        count = 0
        for name, value in weights:
            if self._group is not None:
                dtype = str(value.dtype).removeprefix("torch.")
                header = json.dumps([name, [*value.shape], dtype])
                self._store.set(f"weight/{count}", header)
                self._group.broadcast(value.detach().contiguous(), root=0).wait()
                count += 1
        if self._group is not None:
            self._store.set(f"weight/{count}", json.dumps(None))

    async def receive_weights(
        self, global_steps: int | None = None
    ) -> AsyncIterator[tuple[str, Tensor]]:
        """Yields the weights in the order in which they are sent."""
        count = 0
        while (header := json.loads(self._store.get(f"weight/{count}"))) is not None:
            name, shape, dtype = header
            value = torch.empty(shape, dtype=getattr(torch, dtype))
            self._group.broadcast(value, root=0).wait()
            count += 1
            yield name, value
