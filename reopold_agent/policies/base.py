"""What a policy is: it generates sequences, and scores existing ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from reopold_agent.types import Completion, Request, Sampling, TokenScores, Trajectory

if TYPE_CHECKING:
    from reopold_agent.policies.loading import Processing  # would import PyTorch


class Generator(Protocol):
    """A generation session: many sequences in flight, over several turns each.

    A request always carries all ids of its sequence. An implementation keeps what it has computed
    for the sequence's key (KV cache, prefix cache) until `release`.
    """

    def submit(self, requests: Sequence[Request]) -> None:
        """Adds turns to generate. A key may have one turn in flight."""
        ...

    def step(self) -> list[Completion]:
        """Advances all turns in flight by one token (or more) and returns those that ended.

        A turn that could not be generated, after retries, comes back with ``error`` set.
        """
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


@runtime_checkable
class RunsBeside(Protocol):
    """A generator that works on by itself while nobody calls `Generator.step`.

    ``step`` then waits a moment at most. Observations may be submitted as they arrive: what is
    sampled depends on a request's own seed, not on who shares the batch (up to rounding).
    """

    runs_beside: bool


@runtime_checkable
class ScoresBeside(Protocol):
    """A policy that scores while another generates.

    ``scoring_threads`` is how many threads may call `Policy.score` at once. A call about one
    trajectory that fails raises `ModelServerError`, and that trajectory is dropped.
    """

    scoring_threads: int


@runtime_checkable
class TakesWeights(Protocol):
    """A policy that generates with a copy of the trainer's weights."""

    def sync(self, model: Any) -> None:
        """Replaces the weights by those of the trainer's `torch.nn.Module`."""
        ...

    def sleep(self) -> None:
        """Gives accelerator memory back, if so configured, until `wake`."""
        ...

    def wake(self) -> None:
        """Takes the memory again; call it before `sync` and before generation."""
        ...


@runtime_checkable
class Closeable(Protocol):
    """A policy that holds processes or connections."""

    def close(self) -> None:
        """Ends them."""
        ...


@dataclass(frozen=True)
class PolicyRole:
    """What a maker of policies (`PolicyKind.make`) is given for one role.

    Attributes:
        role: ``student``, ``teacher`` or ``model``; used in messages.
        settings: the role's, without ``name``.
        processing: the checkpoint's tokenizer and picture processor, and where it is.
        dtype: to compute in unless the settings say otherwise, ``float32`` or ``bfloat16``.
        forbidden_ids: ids that have probability 0 everywhere, besides those that the tokenizer
            does not know.
        stop_ids: a turn ends with the first of these.
        max_pixels: pixels of the largest picture that it will be sent; None if that is not known.
        seed: of the random draws that depend on no request's own seed.
    """

    role: str
    settings: Mapping[str, Any]
    processing: Processing
    dtype: str
    forbidden_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    max_pixels: int | None = None
    seed: int = 0
