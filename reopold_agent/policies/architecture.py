"""Reads the shapes of a checkpoint from its ``config.json``, or from a table of published sizes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from reopold_agent.errors import ConfigError, first_line


@dataclass(frozen=True)
class TextShape:
    """A decoder of the Qwen2 family: grouped-query attention and SwiGLU.

    Attributes:
        hidden: width of the residual stream.
        mlp: width of the feed-forward layer.
        tied: whether the output embedding is the input's.
        parameters: all parameters, a tied embedding once.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    tied: bool
    parameters: int

    @property
    def layer_weights(self) -> int:
        """Number of weights in the matrices of one layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return 2 * self.hidden * queries + 2 * self.hidden * keys + 3 * self.hidden * self.mlp

    def kv_bytes(self, value_bytes: int = 2) -> int:
        """Returns the bytes per token of the key-value cache."""
        return 2 * self.layers * self.kv_heads * self.head_dim * value_bytes


@dataclass(frozen=True)
class VisionShape:
    """Qwen2.5-VL's vision tower.

    Attributes:
        out: width that the merger hands to the decoder; one token per merge x merge patches.
        full_blocks: blocks that attend to the whole picture; the others attend within windows.
        parameters: all parameters of the tower.
        window: side of an attention window in pixels.
    """

    depth: int
    width: int
    heads: int
    mlp: int
    out: int
    full_blocks: int
    parameters: int
    patch: int = 14
    merge: int = 2
    temporal: int = 2
    channels: int = 3
    window: int = 112

    @property
    def patch_values(self) -> int:
        """Values in a patch: both frames of a pair, all channels."""
        return self.channels * self.temporal * self.patch**2

    @property
    def block_weights(self) -> int:
        """Number of weights in the matrices of one block."""
        return 4 * self.width**2 + 3 * self.width * self.mlp

    @property
    def merger_weights(self) -> int:
        """Number of weights in the merger's matrices; it runs once per token."""
        wide = self.merge**2 * self.width
        return wide * wide + wide * self.out

    @property
    def window_patches(self) -> int:
        """Patches of one attention window."""
        return (self.window // self.patch) ** 2


@dataclass(frozen=True)
class Architecture:
    """Shapes of a checkpoint and their source; ``image_token`` is the placeholder's id."""

    name: str
    text: TextShape
    vision: VisionShape | None
    source: str
    image_token: int | None = None

    @property
    def parameters(self) -> int:
        """All parameters, including the vision tower's."""
        return self.text.parameters + (self.vision.parameters if self.vision else 0)

    def undivided(self, parts: int) -> str | None:
        """Returns what vLLM cannot share out among so many GPUs; None if it can share out all.

        Source: vLLM's layers ``VocabParallelEmbedding``, which fills up to blocks, and
        ``ColumnParallelLinear``; its attention repeats key-value heads where there are too few.
        """
        text, tower = self.text, self.vision
        fewer, more = sorted((text.kv_heads, parts))
        if more % fewer:
            return f"{text.kv_heads} key-value heads"
        rows = -(-text.vocab // _VOCAB_BLOCK) * _VOCAB_BLOCK
        counts = {"attention heads": text.heads, "units of the feed-forward layer": text.mlp}
        counts["rows of the embedding"] = rows
        if tower is not None:
            counts["attention heads of the vision tower"] = tower.heads
            counts["units of the vision tower's feed-forward layer"] = tower.mlp
        return next((f"{count} {name}" for name, count in counts.items() if count % parts), None)


_VOCAB_BLOCK = 64
"""vLLM fills embeddings up to a multiple of this (``DEFAULT_VOCAB_PADDING_SIZE``)."""

_VISION = {"depth": 32, "width": 1280, "heads": 16, "full_blocks": 4}
_TEXT_7B = TextShape(3584, 28, 28, 4, 128, 18944, 152064, False, 7_615_616_512)
_TEXT_32B = TextShape(5120, 64, 40, 8, 128, 27648, 152064, False, 32_763_876_352)
_SIZES: Mapping[str, tuple[TextShape, VisionShape | None]] = {
    "Qwen2.5-VL-3B": (
        TextShape(2048, 36, 16, 2, 128, 11008, 151936, True, 3_085_938_688),
        VisionShape(mlp=3420, out=2048, parameters=668_684_288, **_VISION),
    ),
    "Qwen2.5-VL-7B": (
        _TEXT_7B,
        VisionShape(mlp=3420, out=3584, parameters=676_550_144, **_VISION),
    ),
    "Qwen2.5-VL-32B": (
        _TEXT_32B,
        VisionShape(mlp=3456, out=5120, parameters=688_841_984, **_VISION),
    ),
    "R1-Distill-Qwen-1.5B": (
        TextShape(1536, 28, 12, 2, 128, 8960, 151936, False, 1_777_088_000),
        None,
    ),
    "R1-Distill-Qwen-7B": (_TEXT_7B, None),
    "R1-Distill-Qwen-32B": (_TEXT_32B, None),
}
"""From the ``config.json`` of each size's first release. Parameters are those of the model built
from it, which a test repeats; the totals agree with the model cards (3.75, 8.29, 33.5, 1.78, 7.62
and 32.8 billion). They are written down so that plans of these sizes start without PyTorch."""

PUBLISHED: Mapping[str, str] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": "Qwen2.5-VL-3B",
    "Qwen/Qwen2.5-VL-7B-Instruct": "Qwen2.5-VL-7B",
    "Qwen/Qwen2.5-VL-32B-Instruct": "Qwen2.5-VL-32B",
    "VerlTool/pixel-reaoner-qwen2-5vl-3b-sft": "Qwen2.5-VL-3B",
    "TIGER-Lab/PixelReasoner-RL-v1": "Qwen2.5-VL-7B",
    "TIGER-Lab/PixelReasoner-WarmStart": "Qwen2.5-VL-7B",
    "xyliu6/NoisyRollout-Geo3K-32B": "Qwen2.5-VL-32B",
    "xyliu6/NoisyRollout-Geo3k-7B": "Qwen2.5-VL-7B",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": "R1-Distill-Qwen-1.5B",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": "R1-Distill-Qwen-7B",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": "R1-Distill-Qwen-32B",
    "Skywork/Skywork-OR1-Math-7B": "R1-Distill-Qwen-7B",
    "Skywork/Skywork-OR1-7B": "R1-Distill-Qwen-7B",
    "Skywork/Skywork-OR1-32B-Preview": "R1-Distill-Qwen-32B",
}
"""Hub id to size. Fine-tuned checkpoints have the shapes of what they started from."""


def find_architecture(path: str) -> Architecture:
    """Finds the shapes of a checkpoint: a folder, ``demo:NAME``, a run's folder or a hub id.

    Reads its ``config.json`` if it is on this machine, also in the cache of the hub.

    Raises:
        ConfigError: it is neither here nor in the table, or of another family.
    """
    file = _config_file(path)
    if file is not None:
        try:
            values = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise ConfigError(f"{file} is not JSON: {error}") from error
        return from_config(path, values, str(file))
    if path not in PUBLISHED:
        raise ConfigError(
            f"the shapes of '{path}' are not known: there is no config.json on this machine, and "
            "the table of published sizes lacks it. Give a folder, or fetch the file: "
            f"huggingface-cli download {path} config.json"
        )
    text, vision = _SIZES[PUBLISHED[path]]
    return Architecture(path, text, vision, f"published shapes of {PUBLISHED[path]}")


def from_config(name: str, values: Mapping[str, Any], source: str) -> Architecture:
    """Reads shapes from a ``config.json`` of Qwen2, Qwen2.5-VL or a decoder of the same structure.

    Raises:
        ConfigError: a needed entry is missing, or transformers cannot build the model.
    """
    text = values.get("text_config") or values
    sees = values.get("model_type") == "qwen2_5_vl"
    # Qwen2.5-VL ties embeddings by its outer entry alone.
    ties = values if sees else {**text, **values}
    try:
        heads = int(text["num_attention_heads"])
        shape = TextShape(
            hidden=int(text["hidden_size"]),
            layers=int(text["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(text.get("num_key_value_heads") or heads),
            head_dim=int(text.get("head_dim") or int(text["hidden_size"]) // heads),
            mlp=int(text["intermediate_size"]),
            vocab=int(text["vocab_size"]),
            tied=bool(ties.get("tie_word_embeddings", False)),
            parameters=0,
        )
        vision = values.get("vision_config")
        tower = None
        if vision and sees:
            # Files of the first release leave out defaults of the class.
            tower = VisionShape(
                depth=int(vision.get("depth", 32)),
                width=int(vision["hidden_size"]),
                heads=int(vision.get("num_heads", 16)),
                mlp=int(vision["intermediate_size"]),
                out=int(vision.get("out_hidden_size", shape.hidden)),
                full_blocks=len(vision.get("fullatt_block_indexes", (7, 15, 23, 31))),
                patch=int(vision.get("patch_size", 14)),
                merge=int(vision.get("spatial_merge_size", 2)),
                temporal=int(vision.get("temporal_patch_size", 2)),
                channels=int(vision.get("in_channels", vision.get("in_chans", 3))),
                window=int(vision.get("window_size", 112)),
                parameters=0,
            )
    except KeyError as error:
        raise ConfigError(f"{source} has no entry {error} that a plan needs") from error
    if sees or values.get("model_type") == "qwen2":
        parameters = decoder_parameters(shape)
    else:
        try:
            parameters = _count_parameters(values)
        except Exception as error:  # any kind: transformers checks the user's file
            reason = first_line(error)
            message = f"transformers cannot build the model of {source}: {reason}"
            raise ConfigError(message) from error
    shape = replace(shape, parameters=parameters)
    if tower is not None:
        tower = replace(tower, parameters=tower_parameters(tower))
    return Architecture(name, shape, tower, source, values.get("image_token_id"))


def decoder_parameters(text: TextShape) -> int:
    """Counts the parameters of a Qwen2 decoder: embeddings, matrices, biases and norms."""
    biases = (text.heads + 2 * text.kv_heads) * text.head_dim
    layer = text.layer_weights + biases + 2 * text.hidden
    embeddings = (1 if text.tied else 2) * text.vocab * text.hidden
    return embeddings + text.layers * layer + text.hidden


def tower_parameters(tower: VisionShape) -> int:
    """Counts the parameters of Qwen2.5-VL's vision tower: matrices, biases and norms."""
    block = tower.block_weights + 7 * tower.width + 2 * tower.mlp
    merger = tower.merger_weights + (tower.merge**2 + 1) * tower.width + tower.out
    return tower.patch_values * tower.width + tower.depth * block + merger


def _count_parameters(values: Mapping[str, Any]) -> int:
    """Counts the parameters of the model that transformers builds, on the meta device.

    A model type that transformers does not know (its code comes with the checkpoint, and is not
    run) counts as Qwen2.
    """
    # Imported here because it takes seconds: a model class loads torch._dynamo and scikit-learn.
    # Qwen2 and Qwen2.5-VL are counted without it.
    import torch
    from transformers import (
        CONFIG_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    kind = str(values.get("model_type"))
    if kind not in CONFIG_MAPPING:
        kind = "qwen2"
        values = {"num_key_value_heads": values["num_attention_heads"], **values}
    config = CONFIG_MAPPING[kind](**values)
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config, attn_implementation="eager")
    return sum(parameter.numel() for parameter in model.parameters())


def _config_file(path: str) -> Path | None:
    if path.startswith("demo:"):
        weights = resources.files("reopold_agent") / "demo" / "weights"
        folders = [Path(str(weights / path.removeprefix("demo:")))]
    else:
        folders = [Path(path), Path(path) / "final", *_cached(path)]
    return next((f / "config.json" for f in folders if (f / "config.json").is_file()), None)


def _cached(path: str) -> list[Path]:
    """Lists the snapshots of a hub id in the cache, newest first."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    snapshots = hub / f"models--{path.replace('/', '--')}" / "snapshots"
    if not snapshots.is_dir():
        return []
    return sorted(snapshots.iterdir(), key=lambda folder: folder.stat().st_mtime, reverse=True)
