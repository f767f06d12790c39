"""The interface between `ServerPolicy` and each kind of server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from reopold_agent.common.http import Deadline
from reopold_agent.errors import ModelError, NonFiniteError
from reopold_agent.policies.server.protocol import first_difference
from reopold_agent.policies.server.transport import Address
from reopold_agent.types import Completion, Request, Sampling, TokenScores, Trajectory

_DIGEST = 64
"""Characters of `weights_digest`; a commit has fewer."""


@dataclass(frozen=True)
class Identity:
    """Which model a server says that it has, or which one it should have.

    Attributes:
        model: the checkpoint's name there, or its path here.
        weights: what tells the weights from others (`loading.known_weights`), if that is known.
    """

    model: str
    weights: str | None = None

    def differs(self, other: Identity) -> bool | None:
        """Returns whether the weights are others; None if that is not known.

        A commit on the hub tells nothing beside another commit, whose weights may be the same.
        """
        if self.weights is None or other.weights is None:
            return None
        if self.weights == other.weights:
            return False
        return True if len(self.weights) == len(other.weights) == _DIGEST else None


class ServerClient(Protocol):
    """A client of one kind of server. All methods may be called from several threads.

    They raise `AttemptError` if another attempt may help, `ModelServerError` if the server
    refuses, `ModelError` if its answer does not belong to the request, and `NonFiniteError` for
    log-probs that are not finite. ``deadline`` is that of all exchanges of a call.
    """

    score_batch: int
    """The most trajectories in one call of `score`."""

    def check(self, address: Address, deadline: Deadline) -> Identity:
        """Checks that the server has the right model; returns which one it says it has."""
        ...

    def score(
        self,
        address: Address,
        trajectories: Sequence[Trajectory],
        with_entropy: bool,
        deadline: Deadline,
    ) -> list[TokenScores]:
        """Returns log-probs of the student's tokens, as `Policy.score`."""
        ...

    def generate(
        self, address: Address, name: str, request: Request, sampling: Sampling, deadline: Deadline
    ) -> Completion:
        """Generates one turn of the sequence that the server knows as ``name``."""
        ...

    def release(self, address: Address, names: Sequence[str], deadline: Deadline) -> None:
        """Tells the server that it may forget these sequences."""
        ...


def same_ids(ours: Sequence[int], theirs: Sequence[int], what: str, url: str) -> None:
    """Checks that an answer is about the ids of the request.

    Raises:
        ModelError: it is about other ids (peers were off by some positions: ms-swift #9011).
    """
    difference = first_difference(ours, theirs)
    if difference is not None:
        raise ModelError(
            f"{url} answered about other {what} than those of the request: {difference}"
        )


def finite(values: Sequence[float], what: str, url: str) -> Sequence[float]:
    """Returns the values after checking that they are finite.

    Raises:
        NonFiniteError: some are not finite.
    """
    bad = [value for value in values if not abs(value) < float("inf")]
    if bad:
        raise NonFiniteError(f"{url} gave {what} that are not finite ({bad[0]}, {len(bad)} in all)")
    return values
