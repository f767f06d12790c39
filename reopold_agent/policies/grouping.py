"""Groups sequences into forward passes; imports no PyTorch, so that the plan can use it too."""

from __future__ import annotations

from collections.abc import Sequence


def split_by_tokens(
    lengths: Sequence[float], most: int, *, packed: bool = False
) -> list[list[int]]:
    """Groups the indices of sequences for passes of at most ``most`` tokens.

    A longer sequence forms a group of its own. The order within and between groups depends only on
    the lengths.

    Args:
        lengths: of the sequences.
        most: bound on rows x longest; on the sum of the lengths where rows are packed.
        packed: whether rows are packed. Padded ones are grouped with those of similar length.
    """
    groups: list[list[int]] = []
    totals: list[float] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for number in range(0 if packed else max(0, len(groups) - 1), len(groups)):
            width = lengths[index if packed else groups[number][0]]
            if totals[number] + width <= most:
                groups[number].append(index)
                totals[number] += width
                break
        else:
            groups.append([index])
            totals.append(lengths[index])
    return groups
