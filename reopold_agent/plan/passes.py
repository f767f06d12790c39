"""Divides episodes into micro-batches as the engines do, and counts what padding adds."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from reopold_agent.policies.grouping import split_by_tokens


@dataclass(frozen=True)
class Pass:
    """One micro-batch; lengths in tokens.

    Attributes:
        rows: sequences.
        longest: tokens of the longest one.
        tokens: tokens of all, without padding.
        packed: rows follow each other in one sequence, in place of padding.
    """

    rows: int
    longest: float
    tokens: float
    packed: bool

    @property
    def computed(self) -> float:
        """Tokens that the model computes."""
        return self.tokens if self.packed else self.rows * self.longest

    @property
    def mask(self) -> float:
        """Elements of a dense attention mask."""
        return self.tokens**2 if self.packed else self.rows * self.longest**2


def divide(lengths: Sequence[float], budget: int, *, packed: bool, by_rows: bool) -> list[Pass]:
    """Divides sequences into micro-batches.

    Args:
        lengths: of the sequences, ascending.
        budget: most tokens of a micro-batch; a longer sequence is one of its own.
        packed: rows are packed.
        by_rows: the budget counts padded tokens and rows of similar length come together, as in
            the local engine (`split_by_tokens`). Otherwise it counts tokens without padding and
            micro-batches are of equal size, as in verl (``utils.seqlen_balancing``).
    """
    if by_rows:
        indices = split_by_tokens(lengths, budget, packed=packed)
        groups = [[lengths[index] for index in group] for group in indices]
    else:
        groups = _balanced(lengths, max(1, math.ceil(sum(lengths) / budget)))
    return [Pass(len(group), max(group), sum(group), packed) for group in groups if group]


def _balanced(lengths: Sequence[float], count: int) -> list[list[float]]:
    """Gives each sequence, the longest first, to the micro-batch with the fewest tokens."""
    groups: list[list[float]] = [[] for _ in range(count)]
    sizes = [(0.0, index) for index in range(count)]
    for length in reversed(lengths):
        size, index = heapq.heappop(sizes)
        groups[index].append(length)
        heapq.heappush(sizes, (size + length, index))
    return groups


def padding_share(passes: Sequence[Pass]) -> float:
    """Returns the share of the computed tokens that is padding, in [0, 1)."""
    computed = sum(each.computed for each in passes)
    return 1.0 - sum(each.tokens for each in passes) / computed
