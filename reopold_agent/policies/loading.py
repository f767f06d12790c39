"""Checkpoints in: from a local folder, the Hugging Face hub, or the package's own demo."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging as hf_logging

from reopold_agent.errors import (
    ConfigError,
    MissingExtraError,
    ModelError,
    VocabularyMismatchError,
    first_line,
)
from reopold_agent.policies.adapter import ModelAdapter
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.policies.vision import VisionProcessor

_log = logging.getLogger(__name__)

DEMO_PREFIX = "demo:"
_MULTIMODAL = ("qwen2_5_vl",)
_UNREADABLE = (OSError, ValueError, ImportError, RuntimeError, SafetensorError)
"""Files that are cut off, absent in the hub's cache, or of other shapes than the configuration."""


@dataclass(frozen=True)
class ModelSpec:
    """Which checkpoint to load and how.

    Attributes:
        path: ``demo:student``, ``demo:teacher`` (any folder of the package's demo weights), a local
            folder, or a hub id ``org/name``.
        revision: branch, tag or commit on the hub.
        dtype: of the weights: ``float32``, ``bfloat16`` or ``float16``.
        attention: ``sdpa`` or ``eager``.
        trust_remote_code: run code that comes with the checkpoint; off by default.
        lora: settings of `peft.LoraConfig` (``r``, ``lora_alpha``, ``target_modules`` ...), or
            None to train all weights.
        gradient_checkpointing: recompute activations in the backward pass.
    """

    path: str
    revision: str | None = None
    dtype: str = "float32"
    attention: str = "sdpa"
    trust_remote_code: bool = False
    lora: Mapping[str, Any] | None = None
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ModelError(
                f"model dtype must be float32, bfloat16 or float16, got '{self.dtype}'"
            )


@dataclass
class Processing:
    """What belongs to a checkpoint besides its weights: tokenizer and picture processor."""

    spec: ModelSpec
    tokenizer: PreTrainedTokenizerBase
    vision: VisionProcessor | None
    config: Any = field(repr=False)

    @property
    def image_token_id(self) -> int | None:
        """Id of the placeholder of a merged patch; None for text-only models."""
        return None if self.vision is None else int(self.config.image_token_id)


@dataclass
class LoadedModel(Processing):
    """A checkpoint ready to use."""

    adapter: ModelAdapter

    def policy(
        self,
        *,
        forbidden_ids: Sequence[int],
        stop_ids: Sequence[int],
        max_tokens_per_pass: int,
    ) -> TransformersPolicy:
        """The model as a policy; ids are those of the conversation format (`ChatRenderer`)."""
        return TransformersPolicy(
            self.adapter,
            allowed_ids=len(self.tokenizer),
            forbidden_ids=forbidden_ids,
            stop_ids=stop_ids,
            max_tokens_per_pass=max_tokens_per_pass,
        )

    def save(self, folder: Path, *, merge: bool = False) -> None:
        """Writes model, tokenizer and picture processor in Hugging Face layout, as safetensors.

        Args:
            folder: where to.
            merge: fold a LoRA adapter into the weights and write a complete model; training
                cannot go on afterwards. Otherwise only the adapter is written.
        """
        model: Any = self.adapter.model
        if merge and self.spec.lora is not None:
            model = model.merge_and_unload()
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if self.vision is not None:
            self.vision.processor.save_pretrained(folder)


def pick_device(wanted: str) -> torch.device:
    """The device of a setting: ``auto`` is a GPU where there is one.

    Raises:
        ConfigError: a GPU is asked for and PyTorch sees none.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("engine.device asks for a GPU, but PyTorch sees none; use device=cpu")
    return torch.device(wanted)


def device_name(device: torch.device) -> str:
    """The GPU's name, or ``cpu``; for records."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def model_path(model: str) -> str:
    """The checkpoint that ``model=`` means: a training run's folder stands for its student.

    Raises:
        ConfigError: the run has neither a final model nor a checkpoint.
    """
    folder = Path(model).expanduser()
    if not (folder / "metrics.jsonl").is_file():
        return model
    if (folder / "final" / "config.json").is_file():
        return str(folder / "final")
    found = sorted((folder / "checkpoints").glob("step-*/model/config.json"))
    if not found:
        raise ConfigError(f"the run {folder} has neither a final model nor a full checkpoint yet")
    return str(found[-1].parent)


def resolve_path(path: str) -> str:
    """Turns ``demo:NAME`` into the folder that the package ships, and the folder of a training
    run into its student; other paths stay.

    Raises:
        ModelError: no such demo model.
    """
    if not path.startswith(DEMO_PREFIX):
        return model_path(path)
    root = resources.files("reopold_agent") / "demo" / "weights"
    folder = Path(str(root)) / path.removeprefix(DEMO_PREFIX)
    if not folder.is_dir():
        folders = sorted(p.name for p in Path(str(root)).iterdir() if p.is_dir())
        shipped = ", ".join(f"demo:{name}" for name in folders)
        raise ModelError(f"there is no demo model '{path}'; the package ships {shipped or 'none'}")
    return str(folder)


def check_available(spec: ModelSpec, role: str, *, weights: bool = True) -> Any:
    """Reads a checkpoint's configuration and makes sure its files can be had.

    Call it for student and teacher before anything heavy is loaded.

    Args:
        spec: the checkpoint.
        role: ``student`` or ``teacher``; used in messages.
        weights: whether a folder must hold the weights too; not so where a server has them.

    Returns:
        The Hugging Face configuration.

    Raises:
        ModelError: the message says what is missing and what to download or set.
    """
    path = resolve_path(spec.path)
    folder = Path(path)
    looks_local = folder.is_dir() or path.startswith((".", "/", "~")) or path.count("/") != 1
    if looks_local:
        _check_folder(folder, role, weights)
    try:
        config = AutoConfig.from_pretrained(
            path, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"the {role} '{path}' wants to run Python code of its own, which is refused. Read "
                f"that code, then set {_setting(role, 'trust_remote_code')}=true if you trust it"
            ) from error
        if looks_local:
            raise ModelError(f"cannot read the {role} in '{folder}': {error}") from error
        local = re.sub(r"[^\w.-]", "_", path.rsplit("/", 1)[-1])
        raise ModelError(
            f"the {role} '{path}' is neither a folder here nor could it be read from the Hugging "
            f"Face hub ({first_line(error)[:200]}).\nDownload it where there is a network:\n"
            f"  hf download {path} --local-dir models/{local}\n"
            f"and set {_setting(role, 'path')}=models/{local}"
        ) from error
    if getattr(config, "vision_config", None) is not None and config.model_type not in _MULTIMODAL:
        raise ModelError(
            f"the {role} '{spec.path}' is a {config.model_type} model; of the vision-language "
            f"models, {', '.join(_MULTIMODAL)} is supported"
        )
    return config


def load_model(
    spec: ModelSpec,
    role: str,
    device: torch.device,
    *,
    autocast: torch.dtype | None = None,
    saved: Path | None = None,
) -> LoadedModel:
    """Loads a checkpoint: weights, tokenizer, and picture processor if it sees.

    Args:
        spec: the checkpoint.
        role: ``student`` or ``teacher``; used in messages.
        device: where the weights go.
        autocast: compute in this dtype while the weights keep theirs (bfloat16 over float32
            master weights when training: at a learning rate of 1e-6 a bfloat16 weight would not
            move at all).
        saved: a folder written by `LoadedModel.save` whose weights (or LoRA adapter) take the
            place of the checkpoint's own.

    Raises:
        ModelError: something is missing or does not fit; see `check_available`.
        MissingExtraError: LoRA was asked for and peft is not installed.
    """
    processing = load_processing(spec, role, saved=saved)
    sees = processing.vision is not None
    path = _weights_path(spec, saved)
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the run has its own
    model_class: Any = Qwen2_5_VLForConditionalGeneration if sees else AutoModelForCausalLM
    try:
        model, report = model_class.from_pretrained(
            path,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            use_safetensors=True,  # the other format is a pickle, which can run code
            dtype=getattr(torch, spec.dtype),
            attn_implementation=spec.attention,
            output_loading_info=True,
        )
    except _UNREADABLE as error:
        raise ModelError(f"cannot load the {role} from '{path}': {error}") from error
    absent = sorted(report["missing_keys"])
    if absent:  # transformers would go on with random numbers in their place
        raise ModelError(
            f"the {role} in '{path}' lacks {len(absent)} of its weights, the first is {absent[0]}"
        )
    model.to(device)
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if spec.lora is not None:
        model = _with_lora(model, spec.lora, saved)
    adapter = ModelAdapter(model, processing.vision, processing.image_token_id, autocast=autocast)
    if len(processing.tokenizer) > adapter.vocabulary_rows:
        raise ModelError(
            f"the tokenizer of '{spec.path}' knows {len(processing.tokenizer)} ids, but the model "
            f"has only {adapter.vocabulary_rows} rows"
        )
    return LoadedModel(**vars(processing), adapter=adapter)


def load_processing(
    spec: ModelSpec, role: str, *, saved: Path | None = None, weights: bool = True
) -> Processing:
    """Loads a checkpoint's tokenizer and picture processor, not its weights.

    Args:
        spec, role, saved: as in `load_model`.
        weights: as in `check_available`.

    Raises:
        ModelError: something is missing; see `check_available`.
    """
    config = check_available(spec, role, weights=weights)
    path = _weights_path(spec, saved)
    vision = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
        if config.model_type in _MULTIMODAL:
            processor = Qwen2VLImageProcessorPil.from_pretrained(
                path, revision=spec.revision or "main"
            )
            vision = VisionProcessor(processor)
    except _UNREADABLE as error:
        raise ModelError(f"cannot load the {role} from '{path}': {error}") from error
    return Processing(spec, tokenizer, vision, config)


def _weights_path(spec: ModelSpec, saved: Path | None) -> str:
    """Where a checkpoint's files are; a LoRA adapter's base stays where it was."""
    return str(saved) if saved is not None and spec.lora is None else resolve_path(spec.path)


def check_vocabularies(student: Processing, teacher: Processing) -> None:
    """Makes sure that an id means the same to both, before any teacher score is believed.

    The models may be padded to different widths (Qwen2.5-VL: 151,936 and 152,064 rows); the
    tokenizers must agree on every id that can occur.

    Raises:
        VocabularyMismatchError: the message shows the first ids that differ.
    """
    mine = {i: token for token, i in student.tokenizer.get_vocab().items()}
    theirs = {i: token for token, i in teacher.tokenizer.get_vocab().items()}
    differing = [i for i in sorted({*mine, *theirs}) if mine.get(i) != theirs.get(i)]
    if differing:
        shown = "\n".join(
            f"  id {i}: student {mine.get(i)!r}, teacher {theirs.get(i)!r}" for i in differing[:5]
        )
        raise VocabularyMismatchError(
            f"student '{student.spec.path}' and teacher '{teacher.spec.path}' disagree on "
            f"{len(differing)} token ids, so the teacher would score other words than the student "
            f"said. The first:\n{shown}\nUse a teacher with the student's tokenizer."
        )
    ours, his = student.image_token_id, teacher.image_token_id
    if ours is not None and his is not None and ours != his:
        raise VocabularyMismatchError(
            f"the image placeholder is id {ours} for the student and {his} for the teacher"
        )
    if student.vision is not None and teacher.vision is None:
        raise ModelError(
            f"the teacher '{teacher.spec.path}' reads text only, but the student sees pictures; "
            "it would score without them"
        )
    if student.vision is not None and teacher.vision is not None:
        _check_processors(student.vision, teacher.vision)


def _check_processors(student: VisionProcessor, teacher: VisionProcessor) -> None:
    for name in ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std"):
        mine, his = getattr(student.processor, name), getattr(teacher.processor, name)
        if list(_listed(mine)) != list(_listed(his)):
            raise ModelError(
                f"student and teacher prepare pictures differently: {name} is {mine} and {his}"
            )


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _setting(role: str, name: str) -> str:
    """The setting's key in a command line; `evaluate` and `serve` have one model, of no role."""
    if role != "model":
        return f"model.{role}.{name}"
    return "model" if name == "path" else name


def _check_folder(folder: Path, role: str, weights: bool) -> None:
    if not folder.is_dir():
        raise ModelError(
            f"the {role}'s folder '{folder}' does not exist; set {_setting(role, 'path')} to a "
            "folder in Hugging Face layout or to a hub id such as Qwen/Qwen2.5-VL-3B-Instruct"
        )
    needed = [
        ("config.json", ["config.json"]),
        ("weights (*.safetensors)", ["*.safetensors"]),
        ("a tokenizer (tokenizer.json)", ["tokenizer.json", "vocab.json"]),
    ]
    if not weights:
        del needed[1]
    missing = [
        what
        for what, patterns in needed
        if not any(any(folder.glob(pattern)) for pattern in patterns)
    ]
    if missing:
        raise ModelError(f"the {role}'s folder '{folder}' lacks {', '.join(missing)}")
    index = folder / "model.safetensors.index.json"
    if weights and index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        absent = sorted(name for name in shards if not (folder / name).is_file())
        if absent:
            raise ModelError(
                f"the {role}'s folder '{folder}' lacks {len(absent)} of {len(shards)} weight "
                f"files, the first is {absent[0]}; the download is incomplete"
            )


def _with_lora(model: Any, settings: Mapping[str, Any], saved: Path | None) -> Any:
    try:
        from peft import LoraConfig, PeftModel, get_peft_model
    except ImportError as error:
        raise MissingExtraError("peft", "lora", "model.student.lora") from error
    if saved is not None:
        try:
            return PeftModel.from_pretrained(model, str(saved), is_trainable=True)
        except (*_UNREADABLE, UnpicklingError) as error:
            raise ModelError(f"cannot load the adapter from '{saved}': {error}") from error
    try:
        wrapped = get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", **settings}))
    except (TypeError, ValueError) as error:
        raise ModelError(f"model.student.lora does not fit this model: {error}") from error
    head = model.get_output_embeddings()
    if head is not None and type(head) is not torch.nn.Linear:
        # Log-probs read the projection's weight itself, so an adapter there would never act.
        raise ModelError("model.student.lora must not cover the output embedding (lm_head)")
    return wrapped
