"""Estimates memory of a GPU by role, phase of a step and part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reopold_agent.plan.passes import Pass
from reopold_agent.policies.architecture import Architecture, TextShape, VisionShape

SLICE_ELEMENTS = 2**25
"""Most logits that a head holds at once: `objectives.chunks.SLICE_ELEMENTS`, without PyTorch."""

_HEAD_BYTES = 14
"""Bytes per logit of the head at its peak: bfloat16, float32, and two more for the entropy."""

SERVER_RESERVE = 2 * 2**30
"""Bytes of a vLLM server for activations of its passes and CUDA graphs (assumed)."""

PROCESS_RESERVE = 1.5 * 2**30
"""Bytes of a process for CUDA context, NCCL buffers and fragmentation (assumed)."""


SLEEPING_SERVER = 1.5 * 2**30
"""Bytes that a sleeping vLLM server keeps: its CUDA context and CUDA graphs (assumed)."""

SYNC_BUCKET = 2 * 2**30
"""Bytes of verl's bucket of weights for a server (``update_weights_bucket_megabytes``)."""


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
        sharded: FSDP2 gathers a layer at a time; otherwise autocast keeps copies of all weights.
        compute_bytes: bytes per activation and gathered weight: 2 for bfloat16.
        master_bytes: bytes per stored weight and gradient.
        trained: number of trained parameters.
        adapters: these are LoRA's; weights have no gradients.
        checkpointing: activations of a layer are recomputed in the backward pass.
        dense_mask: attention reads a mask (`Pass.mask`), and its kernel a copy of it.
        offload: weights, gradients and optimizer are on the CPU between uses.
    """

    ranks: int
    sharded: bool
    compute_bytes: int
    master_bytes: int
    trained: float
    adapters: bool
    checkpointing: bool
    dense_mask: bool
    offload: bool

    def resident(self, model: Architecture) -> dict[str, float]:
        """Returns the bytes held between updates: weights, and AdamW's two float32 moments."""
        return {} if self.offload else self._state(model)

    def weights(self, model: Architecture) -> dict[str, float]:
        """Returns the bytes of the weights of one rank."""
        return {"weights": self.master_bytes * model.parameters / self.ranks}

    def copied(self, model: Architecture) -> float:
        """Returns the bytes of a copy of the trained weights that generates (``engine.ahead``)."""
        return self.master_bytes * self.trained + self._copies(model, 0.0)

    def scoring(self, model: Architecture, largest: Pass, pictures: float) -> dict[str, float]:
        """Returns the bytes held in a pass for the old log-probs.

        Args:
            model: the student.
            largest: the micro-batch with the most tokens.
            pictures: tokens of its pictures.
        """
        text, width = model.text, self.compute_bytes
        held = self.resident(model)
        if self.offload:
            held = self.weights(model)
        live = 4 * text.hidden + 3 * text.mlp
        seen = 0.0
        if model.vision is not None:
            tower = model.vision
            values = 4 * tower.width + tower.mlp_matrices * tower.mlp
            seen = pictures * tower.merge**2 * values
        # The layer that computes, the next, and the buffer in which it arrives.
        layers = 3 * width * text.layer_weights
        return {
            **held,
            "gathered": self._copies(model, layers + width * _embeddings(text)),
            "activations": width * max(largest.computed * live, seen) + self._mask(largest),
            "head": _HEAD_BYTES * min(SLICE_ELEMENTS, largest.tokens * text.vocab),
        }

    def updating(self, model: Architecture, largest: Pass, pictures: float) -> dict[str, float]:
        """Returns the bytes held in an update, at the larger of two moments.

        One is the backward pass of the first layer that it reaches, when the inputs of all layers
        are still held; the other that of a block of the vision tower.

        Args:
            model: the student.
            largest: the micro-batch with the most tokens.
            pictures: tokens of its pictures.
        """
        text, width = model.text, self.compute_bytes
        live, kept = self._text_values(text)
        decoder = largest.computed * (live + kept)
        seen = 0.0
        if model.vision is not None:
            block, inputs = self._vision_values(model.vision)
            patches = pictures * model.vision.merge**2
            decoder += patches * inputs
            seen = patches * (block + inputs)
        gradients = 0.0 if self.adapters else 1.0
        # As in `scoring`, with the gradients of the layer and their float32 copy to be summed.
        layers = (3 * width + gradients * width) * text.layer_weights
        waiting = gradients * 4 * text.layer_weights
        if text.tied:  # gathered with the root, until the end
            root = (1 + gradients) * width * text.vocab * text.hidden
        else:  # gradients of the output embedding on their way
            root, waiting = 0.0, max(waiting, gradients * 4 * text.vocab * text.hidden)
        return {
            **self._state(model),
            "gradients": self.master_bytes * self.trained / self.ranks,
            "gathered": self._copies(model, layers + root + waiting),
            "activations": width * max(decoder, seen) + self._mask(largest),
            "head": _HEAD_BYTES * min(SLICE_ELEMENTS, largest.tokens * text.vocab),
        }

    def _state(self, model: Architecture) -> dict[str, float]:
        return {
            **self.weights(model),
            "optimizer": 8 * self.trained / self.ranks,
        }

    def _copies(self, model: Architecture, gathered: float) -> float:
        """Returns the bytes of weights (and gradients) in the precision of the computation."""
        if self.sharded:
            return gathered
        same = self.compute_bytes == self.master_bytes
        return 0.0 if same else self.compute_bytes * model.parameters

    def _mask(self, largest: Pass) -> float:
        return (1 + self.compute_bytes) * largest.mask if self.dense_mask else 0.0

    def _text_values(self, text: TextShape) -> tuple[float, float]:
        """Returns the values per token of the layer that computes, and of all others."""
        # The gradients of two of the MLP's vectors, and of the residual stream.
        live = layer_values(text) + 2 * text.mlp + text.hidden
        if self.checkpointing:
            return live, text.hidden * text.layers
        return live, layer_values(text) * (text.layers - 1)

    def _vision_values(self, vision: VisionShape) -> tuple[float, float]:
        """Returns the values per patch of the block that computes, and of all others."""
        # The results of the first matrices, and as many of what is made of them.
        inner = (vision.mlp_matrices - 1) * vision.mlp
        kept = 14 * vision.width + 2 * inner
        live = kept + inner + vision.width
        if self.checkpointing:
            return live, vision.width * vision.depth
        return live, kept * (vision.depth - 1)


def _embeddings(text: TextShape) -> float:
    """Counts the values of the embedding that is gathered while the decoder computes."""
    return text.vocab * text.hidden if text.tied else 0.0


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
