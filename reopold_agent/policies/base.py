"""The two things a policy can do: continue sequences, and score the ones that exist."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from reopold_agent.types import Completion, Request, Sampling, TokenScores, Trajectory


class Generator(Protocol):
    """A generation session: many sequences in flight, over several turns each.

    A request always carries all ids of its sequence. An implementation keeps what it has computed
    for the sequence's key (KV cache, prefix cache) until `release`.
    """

    def submit(self, requests: Sequence[Request]) -> None:
        """Adds turns to generate. A key may have one turn in flight."""
        ...

    def step(self) -> list[Completion]:
        """Advances all turns in flight by one token (or more) and returns those that ended."""
        ...

    def release(self, key: int) -> None:
        """Forgets a sequence."""
        ...

    @property
    def in_flight(self) -> int:
        """Number of turns being generated."""
        ...


class Policy(Protocol):
    """A model that generates and scores over one fixed set of allowed ids.

    Log-probs are at temperature 1 over the allowed ids, whatever the sampling (never renormalised
    by top_p: trl #6789).
    """

    def generator(self, sampling: Sampling) -> Generator:
        """A new session with the current weights."""
        ...

    def score(
        self, trajectories: Sequence[Trajectory], *, with_entropy: bool = False
    ) -> list[TokenScores]:
        """Log-probs of the student's tokens, given the same ids and the same pixels.

        Without ``with_entropy`` the entropies are zeros.
        """
        ...
