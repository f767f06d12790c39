"""The architectures that are known here, and the shapes of a checkpoint.

Shapes come from its ``config.json``, or from a table of published sizes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from reopold_agent.common.compat import silence_docstring_checks
from reopold_agent.errors import ConfigError, first_line


@dataclass(frozen=True)
class TowerKind:
    """How the vision tower of a family is built.

    Attributes:
        gated: its feed-forward layers are SwiGLU, with three matrices; otherwise they have two.
        norm_vectors: vectors of a norm: 1 for RMS norms, 2 for layer norms (with a bias).
        patch_bias: whether the patches' embedding has a bias.
        width, out: entries of ``vision_config`` with the tower's width and the merger's.
        defaults: what its files may leave out.
    """

    gated: bool
    norm_vectors: int
    patch_bias: bool
    width: str
    out: str
    defaults: Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """An architecture that is known here: what tells it apart from the others.

    All are decoders with grouped-query attention and SwiGLU that transformers can build. How
    positions and pictures enter is asked of the model itself (`ModelAdapter`).

    Attributes:
        name: what its users call it.
        biases: whether queries, keys and values have biases.
        head_norms: whether the queries and keys of each head are normalised.
        tower: the vision tower; None for text-only models.
        option: the option of ``model`` with settings for any of its checkpoints.
    """

    name: str
    biases: bool = False
    head_norms: bool = False
    tower: TowerKind | None = None
    option: str = "causal_lm"


_TOWER = {
    "num_heads": 16,
    "in_channels": 3,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "patch_size": 14,
}
_QWEN2_TOWER = TowerKind(
    gated=False,
    norm_vectors=2,
    patch_bias=False,
    width="embed_dim",
    out="hidden_size",
    defaults={**_TOWER, "depth": 32, "embed_dim": 1280, "mlp_ratio": 4},
)
_QWEN2_5_TOWER = TowerKind(
    gated=True,
    norm_vectors=1,
    patch_bias=False,
    width="hidden_size",
    out="out_hidden_size",
    defaults={
        **_TOWER,
        "depth": 32,
        "window_size": 112,
        "fullatt_block_indexes": (7, 15, 23, 31),
    },
)
_QWEN3_TOWER = TowerKind(
    gated=False,
    norm_vectors=2,
    patch_bias=True,
    width="hidden_size",
    out="out_hidden_size",
    defaults={
        **_TOWER,
        "depth": 27,
        "patch_size": 16,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": (8, 16, 24),
    },
)

FAMILIES: Mapping[str, Family] = {
    "qwen2": Family("Qwen2 and Qwen2.5", biases=True),
    "qwen3": Family("Qwen3", head_norms=True),
    "llama": Family("Llama"),
    "mistral": Family("Mistral"),
    "qwen2_vl": Family("Qwen2-VL", biases=True, tower=_QWEN2_TOWER, option="qwen2_5_vl"),
    "qwen2_5_vl": Family("Qwen2.5-VL", biases=True, tower=_QWEN2_5_TOWER, option="qwen2_5_vl"),
    "qwen3_vl": Family("Qwen3-VL", head_norms=True, tower=_QWEN3_TOWER, option="qwen3_vl"),
}
"""By ``model_type`` of ``config.json``. What was tested with each is in docs/models.md."""

OWN_CODE = Family("a model with code of its own", biases=True)
"""What is taken for the family of text models that transformers does not know."""


def unknown_family(who: str, model_type: str) -> str:
    """Returns the message about a model of none of `FAMILIES`; ``who`` names it."""
    seeing, text = (
        ", ".join(each.name for each in FAMILIES.values() if (each.tower is not None) == sees)
        for sees in (True, False)
    )
    return (
        f"{who} is a {model_type} model, which is not supported.\nTake one of {seeing} (with "
        f"pictures), {text} (text only); docs/models.md says what was tested."
    )


@dataclass(frozen=True)
class TextShape:
    """A decoder with grouped-query attention and SwiGLU.

    Attributes:
        hidden: width of the residual stream.
        mlp: width of the feed-forward layer.
        tied: whether the output embedding is the input's.
        parameters: all parameters, a tied embedding once.
        biases, head_norms: as in `Family`.
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
    biases: bool = True
    head_norms: bool = False

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
    """A vision tower of the Qwen-VL models.

    Attributes:
        out: width that the mergers hand to the decoder; one token per merge x merge patches.
        full_blocks: blocks that attend to the whole picture; the others attend within windows.
        parameters: all parameters of the tower.
        window: side of an attention window in pixels.
        mergers: one, and one for each DeepStack feature, which early layers of the decoder add.
        places: learned position embeddings.
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
    mergers: int = 1
    places: int = 0
    kind: TowerKind = _QWEN2_5_TOWER

    @property
    def pixels_per_token(self) -> int:
        """Pixels of a token of the decoder."""
        return (self.patch * self.merge) ** 2

    @property
    def mlp_matrices(self) -> int:
        """Matrices of a feed-forward layer."""
        return 3 if self.kind.gated else 2

    @property
    def patch_values(self) -> int:
        """Values in a patch: both frames of a pair, all channels."""
        return self.channels * self.temporal * self.patch**2

    @property
    def block_weights(self) -> int:
        """Number of weights in the matrices of one block."""
        return 4 * self.width**2 + self.mlp_matrices * self.width * self.mlp

    @property
    def merger_weights(self) -> int:
        """Number of weights in the mergers' matrices; each runs once per token."""
        wide = self.merge**2 * self.width
        return self.mergers * (wide * wide + wide * self.out)

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

_VISION: dict[str, Any] = {"depth": 32, "width": 1280, "heads": 16, "full_blocks": 4}
_VISION_3: dict[str, Any] = {
    "kind": _QWEN3_TOWER,
    "patch": 16,
    "window": 0,
    "mergers": 4,
    "places": 2304,
}
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
    "Qwen3-VL-2B": (
        TextShape(2048, 28, 16, 8, 128, 6144, 151936, True, 1_720_574_976, False, True),
        VisionShape(24, 1024, 16, 4096, 2048, 24, 406_957_056, **_VISION_3),
    ),
    "Qwen3-VL-4B": (
        TextShape(2560, 36, 32, 8, 128, 9728, 151936, True, 4_022_468_096, False, True),
        VisionShape(24, 1024, 16, 4096, 2560, 24, 415_347_712, **_VISION_3),
    ),
    "Qwen3-VL-8B": (
        TextShape(4096, 36, 32, 8, 128, 12288, 151936, False, 8_190_735_360, False, True),
        VisionShape(27, 1152, 16, 4304, 4096, 27, 576_388_336, **_VISION_3),
    ),
    "Qwen3-VL-32B": (
        TextShape(5120, 64, 64, 8, 128, 25600, 151936, False, 32_762_123_264, False, True),
        VisionShape(27, 1152, 16, 4304, 5120, 27, 595_266_800, **_VISION_3),
    ),
    "R1-Distill-Qwen-1.5B": (
        TextShape(1536, 28, 12, 2, 128, 8960, 151936, False, 1_777_088_000),
        None,
    ),
    "R1-Distill-Qwen-7B": (_TEXT_7B, None),
    "R1-Distill-Qwen-32B": (_TEXT_32B, None),
}
"""From the ``config.json`` of each size's first release. Parameters are those of the model built
from it, which a test repeats; the totals agree with the model cards (3.75, 8.29, 33.5, 2.13, 4.44,
8.77, 33.4, 1.78, 7.62 and 32.8 billion). They are written down so that plans of these sizes start
without PyTorch."""

PUBLISHED: Mapping[str, str] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": "Qwen2.5-VL-3B",
    "Qwen/Qwen2.5-VL-7B-Instruct": "Qwen2.5-VL-7B",
    "Qwen/Qwen2.5-VL-32B-Instruct": "Qwen2.5-VL-32B",
    **{
        f"Qwen/Qwen3-VL-{size}-{kind}": f"Qwen3-VL-{size}"
        for size in ("2B", "4B", "8B", "32B")
        for kind in ("Instruct", "Thinking")
    },
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
    """Reads shapes from a ``config.json`` of `FAMILIES`, or of a checkpoint with its own code.

    Raises:
        ConfigError: the model is of another family, a needed entry is missing, or transformers
            cannot build the model.
    """
    text = values.get("text_config") or values
    family = FAMILIES.get(str(values.get("model_type")), OWN_CODE)
    # Models that see pictures tie embeddings by the outer entry alone.
    ties = values if family.tower is not None else {**text, **values}
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
            biases=family.biases,
            head_norms=family.head_norms,
        )
        tower = None
        if family.tower is not None:
            tower = _tower(family.tower, values["vision_config"], shape.hidden)
    except KeyError as error:
        raise ConfigError(f"{source} has no entry {error} that a plan needs") from error
    if family.tower is not None or values.get("model_type") in ("qwen2", "qwen3"):
        parameters = decoder_parameters(shape)
    else:
        try:
            parameters = _count_parameters(name, values)
        except ConfigError:
            raise
        except Exception as error:  # any kind: transformers checks the user's file
            reason = first_line(error)
            message = f"transformers cannot build the model of {source}: {reason}"
            raise ConfigError(message) from error
    shape = replace(shape, parameters=parameters)
    return Architecture(name, shape, tower, source, values.get("image_token_id"))


def _tower(kind: TowerKind, given: Mapping[str, Any], hidden: int) -> VisionShape:
    """Reads a tower from ``vision_config``; ``hidden`` is the decoder's width."""
    entries = {**kind.defaults, **given}
    depth, width = int(entries["depth"]), int(entries[kind.width])
    mlp = entries["mlp_ratio"] * width if "mlp_ratio" in entries else entries["intermediate_size"]
    shape = VisionShape(
        depth=depth,
        width=width,
        heads=int(entries["num_heads"]),
        mlp=int(mlp),
        out=int(entries.get(kind.out, hidden)),
        full_blocks=len(entries.get("fullatt_block_indexes", range(depth))),
        patch=int(entries["patch_size"]),
        merge=int(entries["spatial_merge_size"]),
        temporal=int(entries["temporal_patch_size"]),
        channels=int(entries.get("in_chans", entries["in_channels"])),
        window=int(entries.get("window_size", 0)),
        parameters=0,
        mergers=1 + len(entries.get("deepstack_visual_indexes", ())),
        places=int(entries.get("num_position_embeddings", 0)),
        kind=kind,
    )
    return replace(shape, parameters=tower_parameters(shape))


def decoder_parameters(text: TextShape) -> int:
    """Counts the parameters of a decoder: embeddings, matrices, biases and norms."""
    biases = (text.heads + 2 * text.kv_heads) * text.head_dim if text.biases else 0
    norms = 2 * text.hidden + (2 * text.head_dim if text.head_norms else 0)
    layer = text.layer_weights + biases + norms
    embeddings = (1 if text.tied else 2) * text.vocab * text.hidden
    return embeddings + text.layers * layer + text.hidden


def tower_parameters(tower: VisionShape) -> int:
    """Counts the parameters of a vision tower: matrices, biases and norms."""
    kind, width, wide = tower.kind, tower.width, tower.merge**2 * tower.width
    # Biases of q, k and v, of the output and of the feed-forward layer; two norms.
    block = tower.block_weights + 5 * width + (tower.mlp_matrices - 1) * tower.mlp
    block += 2 * kind.norm_vectors * width
    # The first merger normalises patches, DeepStack's normalise what they have joined.
    norms = kind.norm_vectors * (width + (tower.mergers - 1) * wide)
    mergers = tower.merger_weights + tower.mergers * (wide + tower.out) + norms
    patches = (tower.patch_values + kind.patch_bias + tower.places) * width
    return patches + tower.depth * block + mergers


def _count_parameters(name: str, values: Mapping[str, Any]) -> int:
    """Counts the parameters of the text model that transformers builds, on the meta device.

    A model type that transformers does not know (its code comes with the checkpoint, and is not
    run) counts as Qwen2.

    Raises:
        ConfigError: transformers knows the model type, and this package does not.
    """
    # Imported here because it takes seconds: a model class loads torch._dynamo.
    # Qwen's models are counted without it.
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    silence_docstring_checks()
    kind = str(values.get("model_type"))
    if kind not in CONFIG_MAPPING:
        kind = "qwen2"
        values = {"num_key_value_heads": values["num_attention_heads"], **values}
    elif kind not in FAMILIES:
        raise ConfigError(unknown_family(f"'{name}'", kind))
    config = CONFIG_MAPPING[kind](**values)
    auto: Any = AutoModelForCausalLM
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
