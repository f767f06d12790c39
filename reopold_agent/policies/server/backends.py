"""What `ServerPolicy` asks of a kind of server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from reopold_agent.errors import ModelError, NonFiniteError
from reopold_agent.policies.server.protocol import first_difference
from reopold_agent.policies.server.transport import Address
from reopold_agent.types import Completion, Request, Sampling, TokenScores, Trajectory


class Backend(Protocol):
    """Speaks to servers of one kind. All methods may be called from several threads.

    They raise `AttemptError` where another attempt may help, `ModelServerError` where the server
    refuses, `ModelError` where it answered about something else, `NonFiniteError` for log-probs
    that are none. ``deadline`` is on `time.monotonic`'s clock.
    """

    score_batch: int
    """Most trajectories of one `score`."""

    def check(self, address: Address, deadline: float) -> None:
        """Makes sure that the server has the right model."""
        ...

    def score(
        self,
        address: Address,
        trajectories: Sequence[Trajectory],
        with_entropy: bool,
        deadline: float,
    ) -> list[TokenScores]:
        """See `Policy.score`."""
        ...

    def generate(
        self, address: Address, name: str, request: Request, sampling: Sampling, deadline: float
    ) -> Completion:
        """One turn of the sequence that the server knows as ``name``."""
        ...

    def release(self, address: Address, names: Sequence[str], deadline: float) -> None:
        """Forgets sequences."""
        ...


def same_ids(ours: Sequence[int], theirs: Sequence[int], what: str, url: str) -> None:
    """Makes sure that an answer is about the ids that were asked about.

    Raises:
        ModelError: it is about others (peers were off by some positions: ms-swift #9011).
    """
    difference = first_difference(ours, theirs)
    if difference is not None:
        raise ModelError(f"{url} answered about other {what} than was asked: {difference}")


def finite(values: Sequence[float], what: str, url: str) -> Sequence[float]:
    """The values themselves.

    Raises:
        NonFiniteError: some are not finite.
    """
    bad = [value for value in values if not abs(value) < float("inf")]
    if bad:
        raise NonFiniteError(f"{url} gave {what} that are not finite ({bad[0]}, {len(bad)} in all)")
    return values
