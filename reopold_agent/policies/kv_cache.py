"""Key-value cache for many sequences of different lengths, with one slot each.

Slots are contiguous from position 0 of each sequence, so continuing a sequence after a tool call
costs only its new tokens, and a batch never carries another batch's padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_BLOCK = 64
"""Capacity along time grows in steps of this many tokens; time and slots by at least a quarter."""


@dataclass
class Window:
    """Which slots and positions the next forward pass writes, and how far it looks back."""

    first: int
    rows: int
    starts: Tensor
    lengths: Tensor
    ends_at: int


class SlotCache:
    """Key-value cache that Hugging Face attention layers write through `update`.

    Set `window` before each forward pass. Row ``r`` of the pass is slot ``first + r``; its token
    ``t < lengths[r]`` goes to position ``starts[r] + t``; tokens past ``lengths[r]`` are padding
    and are not stored.
    """

    is_compileable = False

    def __init__(self) -> None:
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._window: Window | None = None
        self._flat: tuple[Tensor, Tensor, Tensor] | None = None

    def set_window(self, window: Window) -> None:
        """Prepares the next forward pass."""
        self._window = window
        if int(window.lengths.max()) == 1:
            self._flat = None
            return
        longest = int(window.lengths.max())
        steps = torch.arange(longest, device=window.lengths.device)
        row, step = torch.nonzero(steps[None] < window.lengths[:, None], as_tuple=True)
        self._flat = (row, step, window.starts[row] + step)

    def attention_mask(self, query_length: int) -> Tensor:
        """Returns (rows, 1, query, key) bool: each query sees the keys up to its own position."""
        window = self._current()
        queries = window.starts[:, None] + torch.arange(query_length, device=window.starts.device)
        keys = torch.arange(window.ends_at, device=window.starts.device)
        return (keys[None, None] <= queries[:, :, None])[:, None]

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores the new keys and values and returns all visible ones (batch, heads, time, dim)."""
        window = self._current()
        last = window.first + window.rows
        for store, new in ((self._keys, keys), (self._values, values)):
            buffer = self._grown(store.get(layer), new, last, window.ends_at)
            store[layer] = buffer
            rows = buffer[window.first : last]
            if self._flat is None:
                every = torch.arange(window.rows, device=new.device)
                rows[every, :, window.starts] = new[:, :, 0]
            else:
                row, step, position = self._flat
                rows[row, :, position] = new[row, :, step]
        return (
            self._keys[layer][window.first : last, :, : window.ends_at],
            self._values[layer][window.first : last, :, : window.ends_at],
        )

    def get_seq_length(self, layer: int = 0) -> int:
        """Returns how many keys the current pass sees; some Hugging Face models call this."""
        return 0 if self._window is None else self._window.ends_at

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first ``length`` tokens of a slot into another."""
        for store in (self._keys, self._values):
            for layer, buffer in store.items():
                if target >= buffer.shape[0]:
                    buffer = store[layer] = _resized(buffer, target + 1, buffer.shape[2])
                buffer[target, :, :length] = buffer[source, :, :length]

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchanges the first ``length`` tokens of two slots."""
        if one == other:
            return
        for store in (self._keys, self._values):
            for layer, buffer in store.items():
                if max(one, other) >= buffer.shape[0]:
                    buffer = store[layer] = _resized(buffer, max(one, other) + 1, buffer.shape[2])
                kept = buffer[one, :, :length].clone()
                buffer[one, :, :length] = buffer[other, :, :length]
                buffer[other, :, :length] = kept

    def _current(self) -> Window:
        if self._window is None:
            raise RuntimeError("set_window must come before a forward pass")
        return self._window

    @staticmethod
    def _grown(buffer: Tensor | None, new: Tensor, slots: int, length: int) -> Tensor:
        if buffer is None:
            heads, width = new.shape[1], new.shape[3]
            capacity = -(-length // _BLOCK) * _BLOCK
            return new.new_zeros((slots, heads, capacity, width))
        if slots > buffer.shape[0] or length > buffer.shape[2]:
            capacity = buffer.shape[2]
            if length > capacity:
                capacity = -(-max(length, capacity + capacity // 4) // _BLOCK) * _BLOCK
            buffer = _resized(buffer, max(slots, buffer.shape[0]), capacity)
        return buffer


def _resized(buffer: Tensor, slots: int, length: int) -> Tensor:
    if slots > buffer.shape[0]:  # growing by one slot at a time would copy the buffer each time
        slots = max(slots, buffer.shape[0] + buffer.shape[0] // 4)
    grown = buffer.new_zeros((slots, buffer.shape[1], length, buffer.shape[3]))
    grown[: buffer.shape[0], :, : buffer.shape[2]] = buffer
    return grown
