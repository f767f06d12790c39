"""Estimates memory of a GPU by role, phase of a step and part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reopold_agent.plan.workload import Workload
from reopold_agent.policies.architecture import Architecture, TextShape

SERVER_RESERVE = 2 * 2**30
"""Bytes of a vLLM server for activations of its passes and CUDA graphs (assumed)."""

PROCESS_RESERVE = 1.5 * 2**30
"""Bytes of a process for CUDA context, NCCL buffers and fragmentation (assumed)."""


@dataclass(frozen=True)
class GpuMemory:
    """Bytes on one GPU of a role, by phase of a step and part."""

    role: str
    gpus: int
    phases: Mapping[str, Mapping[str, float]]

    @property
    def peak(self) -> tuple[str, float]:
        """The phase with the most memory, and its bytes."""
        totals = {phase: sum(parts.values()) for phase, parts in self.phases.items()}
        phase = max(totals, key=lambda name: totals[name])
        return phase, totals[phase]


@dataclass(frozen=True)
class TrainerMemory:
    """How the trainer divides memory and computes.

    Attributes:
        ranks: GPUs over which weights, gradients and optimizer are divided.
        tokens: tokens of one pass with gradient.
        compute_bytes: bytes per activation and gathered weight: 2 for bfloat16.
        master_bytes: bytes per stored weight and gradient.
        trained: number of trained parameters.
        logits: most logits held at once.
    """

    ranks: int
    tokens: float
    compute_bytes: int
    master_bytes: int
    checkpointing: bool
    trained: float
    logits: float
    offload: bool

    def resident(self, model: Architecture) -> dict[str, float]:
        """Returns the bytes held between updates: weights, and AdamW's two float32 moments."""
        if self.offload:
            return {}
        return {
            "weights": self.master_bytes * model.parameters / self.ranks,
            "optimizer": 8 * self.trained / self.ranks,
        }

    def updating(self, model: Architecture, work: Workload) -> dict[str, float]:
        """Returns the bytes held in an update: gradients, activations and logits too."""
        gathered = 0.0
        if self.ranks > 1:
            # Two layers (one computes, the next arrives) and both embeddings, whole.
            vocabulary = model.text.vocab * model.text.hidden * (1 if model.text.tied else 2)
            gathered = self.compute_bytes * (2 * model.text.layer_weights + vocabulary)
        elif self.compute_bytes < self.master_bytes:
            gathered = self.compute_bytes * model.parameters  # autocast's copies
        return {
            "weights": self.master_bytes * model.parameters / self.ranks,
            "gradients": self.master_bytes * self.trained / self.ranks,
            "optimizer": 8 * self.trained / self.ranks,
            "gathered": gathered,
            "activations": self.compute_bytes * self._activations(model, work),
            # The logits, their log-softmax and their gradient.
            "logits": 3 * self.compute_bytes * self.logits,
        }

    def _activations(self, model: Architecture, work: Workload) -> float:
        live = self.tokens * layer_values(model.text)
        kept = self.tokens * model.text.hidden * model.text.layers
        values = live + kept if self.checkpointing else live * model.text.layers
        if model.vision is not None:
            share = (work.prompt_pictures.total + work.observation_pictures.total) / work.length
            patches = self.tokens * share * model.vision.merge**2
            block = patches * (12 * model.vision.width + 4 * model.vision.mlp)
            kept = patches * model.vision.width * model.vision.depth
            values += block + kept if self.checkpointing else block * model.vision.depth
        return values


def layer_values(text: TextShape) -> float:
    """Counts values per token that one layer keeps for its backward pass.

    They are the inputs of the two norms, of the two halves and of the output projections
    (8 x hidden), q, k, v before and after rotation, and four vectors of the MLP's width. Flash and
    SDPA attention keep no scores.
    """
    attention = 2 * (text.heads + 2 * text.kv_heads) * text.head_dim
    return 8 * text.hidden + attention + 4 * text.mlp


def server_cache(model: Architecture, budget: float, gpus: int, value_bytes: int = 2) -> float:
    """Returns the bytes per GPU left for a server's cache; negative if it cannot start."""
    return budget - value_bytes * model.parameters / gpus - SERVER_RESERVE


def cache_sequences(
    model: Architecture, cache: float, length: float, gpus: int, value_bytes: int = 2
) -> int:
    """Returns how many sequences of this length a server's cache holds."""
    per_token = model.text.kv_bytes(value_bytes) / min(gpus, model.text.kv_heads)
    return max(0, int(cache / (per_token * length)))
