"""Loads checkpoints from local folders, the Hugging Face hub or the embedded demo."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging as hf_logging
from transformers.utils.hub import cached_file

from reopold_agent.common.compat import silence_docstring_checks
from reopold_agent.common.weights import indexed_files, weights_digest
from reopold_agent.config import ModelsConfig, group_word, model_key
from reopold_agent.errors import (
    ConfigError,
    ModelError,
    VocabularyMismatchError,
    first_line,
)
from reopold_agent.policies.adapter import ModelAdapter
from reopold_agent.policies.architecture import FAMILIES, OWN_CODE, Family, unknown_family
from reopold_agent.policies.attention import attend_by_rows
from reopold_agent.policies.compiling import compile_layers
from reopold_agent.policies.lora import merge_adapter, with_adapter
from reopold_agent.policies.templates import ChatTemplate, chat_template
from reopold_agent.policies.transformers_policy import CopiedPolicy, TransformersPolicy
from reopold_agent.policies.vision import VisionProcessor

_log = logging.getLogger(__name__)

silence_docstring_checks()

DEMO_PREFIX = "demo:"
_VIDEOS = "video_preprocessor_config.json"
_UNREADABLE = (OSError, ValueError, ImportError, RuntimeError, SafetensorError)
"""Raised for truncated files, files missing in the hub's cache, and shapes that do not fit."""


@dataclass(frozen=True)
class ModelSpec:
    """Which checkpoint to load and how.

    Attributes:
        path: ``demo:NAME`` (a folder of the embedded weights, such as ``demo:student``), a local
            folder, or a hub id ``org/name``.
        revision: branch, tag or commit on the hub.
        dtype: dtype of the weights: ``float32``, ``bfloat16`` or ``float16``.
        attention: ``sdpa`` or ``eager``.
        trust_remote_code: whether to run code that the checkpoint contains.
        lora: arguments of `peft.LoraConfig` (``r``, ``lora_alpha``, ``target_modules`` ...), or
            None to train all weights.
        gradient_checkpointing: recompute activations in the backward pass.
        chat_template: the template to use in place of the checkpoint's own: a shipped one's name
            or a file (`reopold_agent.policies.templates`).
    """

    path: str
    revision: str | None = None
    dtype: str = "float32"
    attention: str = "sdpa"
    trust_remote_code: bool = False
    lora: Mapping[str, Any] | None = None
    gradient_checkpointing: bool = False
    chat_template: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ModelError(
                f"model dtype must be float32, bfloat16 or float16, got '{self.dtype}'"
            )

    def saved_in(self, folder: Path) -> ModelSpec:
        """Returns how to load the complete model, without an adapter, that a run has saved.

        Its chat template is saved with it.
        """
        return replace(
            self,
            path=str(folder),
            revision=None,
            lora=None,
            gradient_checkpointing=False,
            chat_template=None,
        )


def student_spec(models: ModelsConfig) -> ModelSpec:
    """Returns the student's checkpoint, with the chat template of the run."""
    return ModelSpec(**vars(models.student), chat_template=models.chat_template)


@dataclass
class Processing:
    """A checkpoint's tokenizer, picture processor and configuration, without its weights.

    Attributes:
        video_settings: text of the video processor's file, which is only passed on: of Qwen3-VL's
            models programs would take another processor without it. None if there is none.
    """

    spec: ModelSpec
    tokenizer: PreTrainedTokenizerBase
    vision: VisionProcessor | None
    video_settings: str | None
    config: Any = field(repr=False)

    @property
    def image_token_id(self) -> int | None:
        """Id of the image placeholder token; None for text-only models."""
        return None if self.vision is None else int(self.config.image_token_id)

    def save_processing(self, folder: Path) -> None:
        """Writes tokenizer and picture processor, and what the checkpoint says of videos."""
        self.tokenizer.save_pretrained(folder)
        if self.vision is None:
            return
        self.vision.processor.save_pretrained(folder)
        if self.video_settings is not None:
            (folder / _VIDEOS).write_text(self.video_settings, "utf-8")


@dataclass
class LoadedModel(Processing):
    """A checkpoint with its weights, ready to use."""

    adapter: ModelAdapter

    def policy(
        self,
        *,
        forbidden_ids: Sequence[int],
        stop_ids: Sequence[int],
        max_tokens_per_pass: int = 16384,
        copied: bool = False,
    ) -> TransformersPolicy:
        """Returns a policy; the ids are those of the conversation format (`ChatRenderer`).

        With ``copied`` it has weights of its own (`CopiedPolicy`).
        """
        kind = CopiedPolicy if copied else TransformersPolicy
        return kind(
            self.adapter.copied() if copied else self.adapter,
            allowed_ids=len(self.tokenizer),
            forbidden_ids=forbidden_ids,
            stop_ids=stop_ids,
            max_tokens_per_pass=max_tokens_per_pass,
        )

    def save(self, folder: Path, *, merge: bool = False, dtype: str | None = None) -> None:
        """Writes model, tokenizer and picture processor in Hugging Face layout, as safetensors.

        Args:
            folder: where to write.
            merge: merge a LoRA adapter into the weights and write a complete model, after which
                training cannot continue. Otherwise only the adapter is written.
            dtype: convert the weights to this dtype first; None keeps theirs.
        """
        model: Any = self.adapter.model
        if merge and self.spec.lora is not None:
            model = merge_adapter(model)
        if dtype is not None:
            model.to(getattr(torch, dtype))
        _save_model(model, folder)
        self.save_processing(folder)


def _save_model(model: Any, folder: Path) -> None:
    """Writes a model with the generation settings of its checkpoint, whatever they are.

    Many checkpoints have some that contradict each other (a temperature without ``do_sample``):
    transformers reads them with a warning, and refuses to write them.
    """
    settings: Any = getattr(model, "generation_config", None)
    try:
        if settings is not None:
            settings.validate(strict=True)
    except ValueError:
        model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        try:
            model.save_pretrained(folder)
        finally:
            model.generation_config = settings
        written = folder / "generation_config.json"
        if written.is_file():  # not beside an adapter
            written.write_text(settings.to_json_string(), "utf-8")
    else:
        model.save_pretrained(folder)


def pick_device(name: str) -> torch.device:
    """Returns the device of a setting; ``auto`` is a GPU if there is one.

    Raises:
        ConfigError: the setting names a GPU and PyTorch sees none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("engine.device asks for a GPU, but PyTorch sees none; use device=cpu")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """Returns the GPU's name, or ``cpu``, for records."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def model_path(model: str) -> str:
    """Returns the checkpoint that ``model=`` refers to; a run's folder stands for its student.

    That is ``final/`` of a finished run, and else the newest checkpoint (`final_student`).

    Raises:
        ConfigError: the run has neither a final model nor a checkpoint.
    """
    folder = Path(model).expanduser()
    if not (folder / "metrics.jsonl").is_file():
        return model
    found = sorted((folder / "checkpoints").glob("step-*/model/config.json"))
    final = final_student(folder, has_checkpoint=bool(found))
    if final is not None:
        return str(final)
    if not found and any((folder / "checkpoints").glob("step-*/model/adapter_config.json")):
        raise ConfigError(
            f"the run {folder} has no whole model yet, only LoRA adapters.\nWrite one and give its "
            f"folder: python -m reopold_agent.train.export {folder} DIR"
        )
    if not found:
        raise ConfigError(f"the run {folder} has neither a final model nor a full checkpoint yet")
    return str(found[-1].parent)


def final_student(run: Path, *, has_checkpoint: bool) -> Path | None:
    """Returns the folder of a run's trained student; None if a checkpoint is newer, or without one.

    Args:
        run: the run folder.
        has_checkpoint: whether it has a checkpoint to take instead. A run that goes on for more
            steps has no ``summary.json`` until its end, but still its old ``final/``.
    """
    goes_on = (run / "config.yaml").is_file() and not (run / "summary.json").is_file()
    if not (run / "final" / "config.json").is_file() or (goes_on and has_checkpoint):
        return None
    return run / "final"


def sees_pictures(config: Any) -> bool:
    """Returns whether a checkpoint with this configuration (`check_available`) takes pictures."""
    return family(config).tower is not None


def family(config: Any) -> Family:
    """Returns the family of a checkpoint with this configuration (`check_available`)."""
    return FAMILIES.get(config.model_type, OWN_CODE)


def check_for_vllm(config: Any, path: str, role: str) -> None:
    """Checks that vLLM gives a checkpoint's tokens the positions that transformers gives them.

    Qwen3-VL mixes positions in time, rows and columns by turns. transformers always does so, and
    vLLM where the configuration says it, as the published ones do.

    Args:
        config: of the checkpoint (`check_available`).
        path: of the checkpoint, for messages.
        role: ``student``, ``teacher`` or the like; used in messages.

    Raises:
        ModelError: it would not; the message says what to add.
    """
    if config.model_type != "qwen3_vl":
        return
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    lacks = []
    if not rope.get("mrope_interleaved"):
        lacks.append('"mrope_interleaved": true')
    if "mrope_section" not in rope:
        lacks.append('"mrope_section": [24, 20, 20]')
    if lacks:
        raise ModelError(
            f"config.json of the {role} '{path}' lacks {' and '.join(lacks)}, without which vLLM "
            "computes other positions than transformers.\nAdd it to text_config.rope_parameters "
            "there (rope_scaling in older files), or use policy=transformers and engine=local."
        )


def context_length(config: Any) -> int | None:
    """Returns the longest sequence of a checkpoint with this configuration; None if it has none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def resolve_path(path: str) -> str:
    """Resolves ``demo:NAME`` and run folders to a checkpoint's folder; other paths are unchanged.

    Raises:
        ModelError: there is no such demo model.
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


def known_weights(spec: ModelSpec, config: Any) -> str | None:
    """Returns what tells a checkpoint's weights from others; None if they are not here.

    That is `weights_digest` of a folder, and of a model on the hub its commit.

    Args:
        spec: the checkpoint.
        config: its configuration (`check_available`).
    """
    folder = Path(resolve_path(spec.path))
    if folder.is_dir():
        return weights_digest(folder)
    commit: str | None = getattr(config, "_commit_hash", None)
    return commit


def check_available(spec: ModelSpec, role: str, *, weights: bool = True) -> Any:
    """Reads a checkpoint's configuration and checks that its files are present.

    Call it for student and teacher before loading weights.

    Args:
        spec: the checkpoint.
        role: ``student`` or ``teacher``; used in messages.
        weights: whether a local folder must contain the weights, which a server may hold instead.

    Returns:
        The Hugging Face configuration.

    Raises:
        ModelError: something is missing; the message says what to download or set.
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
                f"the {role} '{path}' contains Python code, which is not run by default. Read it, "
                f"then set {_setting_key(role, 'trust_remote_code')}=true if you trust it"
            ) from error
        unknown = re.search(r"model type `([^`]+)` but Transformers does not", str(error))
        if unknown is not None:
            raise ModelError(unknown_family(f"the {role} '{path}'", unknown[1])) from error
        if looks_local:
            raise ModelError(f"cannot read the {role} in '{folder}': {error}") from error
        local = re.sub(r"[^\w.-]", "_", path.rsplit("/", 1)[-1])
        raise ModelError(
            f"the {role} '{path}' is neither a local folder nor could it be read from the Hugging "
            f"Face hub ({first_line(error)[:200]}).\nDownload it where there is network access:\n"
            f"  hf download {path} --local-dir models/{local}\n"
            f"and set {_setting_key(role, 'path')}=models/{local}"
        ) from error
    _check_family(config, spec, role, weights)
    # Hugging Face also takes the one that a processor's own file holds.
    pictures = ("preprocessor_config.json", "processor_config.json")
    if looks_local and sees_pictures(config) and not any((folder / p).is_file() for p in pictures):
        raise ModelError(
            f"the {role}'s folder '{folder}' lacks a picture processor ({pictures[0]})"
        )
    return config


def _check_family(config: Any, spec: ModelSpec, role: str, weights: bool) -> None:
    """Checks that the model is of a known family, or a text model whose code is its checkpoint's.

    Text models on a server (``weights`` is false) only have to share the tokenizer.

    Raises:
        ModelError: it is of another family.
    """
    kind = config.model_type
    text_only = getattr(config, "vision_config", None) is None
    if kind in FAMILIES or (text_only and (kind not in CONFIG_MAPPING or not weights)):
        return
    raise ModelError(unknown_family(f"the {role} '{spec.path}'", kind))


def load_model(
    spec: ModelSpec,
    role: str,
    device: torch.device,
    *,
    autocast: torch.dtype | None = None,
    saved: Path | None = None,
    kernel: str | None = None,
    compiled: bool = False,
) -> LoadedModel:
    """Loads a checkpoint: weights, tokenizer, and the picture processor of a vision model.

    Args:
        spec: the checkpoint.
        role: ``student`` or ``teacher``; used in messages.
        device: device of the weights.
        autocast: dtype of the computation if it differs from the weights' (bfloat16 over float32
            master weights in training, since at a learning rate of 1e-6 a bfloat16 weight would
            not change at all).
        saved: a folder written by `LoadedModel.save`, whose weights (or LoRA adapter) replace
            the checkpoint's own.
        kernel: attention kernel of packed rows (`attention.packed_kernel`); None pads rows.
        compiled: compile parts of its layers (`compiling.compile_layers`).

    Raises:
        ModelError: something is missing or does not fit; see `check_available`.
        ConfigError: the kernel does not load, or ``spec.attention`` cannot take packed rows.
        MissingExtraError: LoRA is configured and peft is not installed.
    """
    check_attention(spec.attention, role, kernel)
    processing = load_processing(spec, role, saved=saved)
    path = _weights_path(spec, saved)
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the run has its own
    try:
        model, report = _model_class(processing).from_pretrained(
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
    if getattr(model, "_hf_peft_config_loaded", False):  # of the hub: a folder was checked before
        raise ModelError(_told_of_both(f"checkpoint '{path}'", role))
    absent = sorted(report["missing_keys"])
    if absent:  # transformers would continue with random weights instead
        raise ModelError(
            f"the {role} in '{path}' lacks {len(absent)} of its weights, the first is {absent[0]}"
        )
    model.to(device)
    if kernel is not None:
        attend_by_rows(model, kernel)
    if spec.lora is not None:
        model = with_adapter(model, spec.lora, saved)
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # Only the reentrant kind needs inputs with gradients. With them a frozen vision tower would
        # be recomputed and differentiated for nothing. (After LoRA, since peft asks for them too.)
        model.disable_input_require_grads()
    adapter = ModelAdapter(model, processing.vision, processing.image_token_id, autocast=autocast)
    if len(processing.tokenizer) > adapter.vocabulary_rows:
        raise ModelError(
            f"the tokenizer of '{spec.path}' knows {len(processing.tokenizer)} ids, but the model "
            f"has only {adapter.vocabulary_rows} rows"
        )
    if adapter.packed and not adapter.keeps_rows_apart():
        raise ModelError(
            f"with {kernel} the {role} '{spec.path}' ({type(model).__name__}) computes packed rows "
            "otherwise than single ones.\nSet "
            + ("attention=eager." if role == "model" else "engine.packed=false.")
        )
    if compiled:
        compile_layers(model)
    return LoadedModel(**vars(processing), adapter=adapter)


def _model_class(processing: Processing) -> Any:
    """Returns the class with which transformers loads a checkpoint."""
    has_vision = processing.vision is not None
    return AutoModelForImageTextToText if has_vision else AutoModelForCausalLM


def without_weights(processing: Processing) -> Any:
    """Returns the model, with its LoRA adapter if it has one, without memory for weights.

    Raises:
        MissingExtraError: peft is not installed.
        ModelError: the adapter does not fit the model.
    """
    spec = processing.spec
    with torch.device("meta"):
        model = _model_class(processing).from_config(
            processing.config, trust_remote_code=spec.trust_remote_code
        )
        return model if spec.lora is None else with_adapter(model, spec.lora)


def check_attention(attention: str, role: str, kernel: str | None) -> None:
    """Checks that a checkpoint may be loaded for packed rows.

    Args:
        attention: the setting of the checkpoint.
        role: of the checkpoint, for messages.
        kernel: of packed rows (`attention.packed_kernel`); None where rows are padded.

    Raises:
        ConfigError: the checkpoint's setting asks for another attention than the kernel.
    """
    if kernel is not None and attention != "sdpa":
        raise ConfigError(
            f"{_setting_key(role, 'attention')}={attention} pads rows, and this run packs "
            "them.\nUse sdpa, or engine.packed=false."
        )


def load_processing(
    spec: ModelSpec, role: str, *, saved: Path | None = None, weights: bool = True
) -> Processing:
    """Loads a checkpoint's tokenizer and picture processor, without its weights.

    Args:
        spec, role, saved: as in `load_model`.
        weights: as in `check_available`.

    Raises:
        ModelError: something is missing; see `check_available`.
        ConfigError: there is no such chat template.
    """
    given = None if spec.chat_template is None else chat_template(spec.chat_template)
    config = check_available(spec, role, weights=weights)
    path = _weights_path(spec, saved)
    vision = videos = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
        if sees_pictures(config):
            file = cached_file(
                path,
                _VIDEOS,
                revision=spec.revision,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
            videos = None if file is None else Path(file).read_text("utf-8")
    except _UNREADABLE as error:
        raise ModelError(f"cannot load the {role} from '{path}': {error}") from error
    if sees_pictures(config):
        vision = _picture_processor(spec, role, path)
        _check_patches(vision, config.vision_config, f"the {role} '{spec.path}'")
    if given is not None:
        own = tokenizer.chat_template
        own = own if isinstance(own, str) else None  # some tokenizers have several
        tokenizer.chat_template = ChatTemplate(given, given.source, own)
    return Processing(spec, tokenizer, vision, videos, config)


def _picture_processor(spec: ModelSpec, role: str, path: str) -> VisionProcessor:
    try:
        return VisionProcessor(
            Qwen2VLImageProcessorPil.from_pretrained(path, revision=spec.revision or "main")
        )
    except (*_UNREADABLE, AttributeError, TypeError) as error:  # the last two: JSON of other types
        raise ModelError(
            f"the {role} '{spec.path}' has no preprocessor_config.json that can be read; with it a "
            "model is given its pictures.\nCopy that file from the checkpoint that this one was "
            "trained from, for example Qwen/Qwen2.5-VL-3B-Instruct."
        ) from error


def _weights_path(spec: ModelSpec, saved: Path | None) -> str:
    """Returns where to load weights from; a LoRA adapter's base weights are not in ``saved``."""
    return str(saved) if saved is not None and spec.lora is None else resolve_path(spec.path)


def check_vocabularies(student: Processing, teacher: Processing, role: str = "teacher") -> None:
    """Checks that each token id means the same to student and teacher.

    The models may be padded to different widths (Qwen2.5-VL: 151,936 and 152,064 rows); the
    tokenizers must agree on every id that can occur.

    Args:
        student: of the student.
        teacher: of the teacher.
        role: what messages call the teacher: ``teacher``, ``teacher NAME`` or ``reference``.

    Raises:
        VocabularyMismatchError: they differ; the message shows the first ids.
        ModelError: the models prepare pictures differently, or the teacher cannot see them.
    """
    of_student = {i: token for token, i in student.tokenizer.get_vocab().items()}
    of_teacher = {i: token for token, i in teacher.tokenizer.get_vocab().items()}
    ids = sorted({*of_student, *of_teacher})
    differing = [i for i in ids if of_student.get(i) != of_teacher.get(i)]
    if differing:
        kind, _, name = role.partition(" ")
        shown = "\n".join(
            f"  id {i}: student {of_student.get(i)!r}, {kind} {of_teacher.get(i)!r}"
            for i in differing[:5]
        )
        if kind == "reference":
            way_out = "or objective.reference=null for the student as it is before training."
        elif name:  # as a whole, since a path has no settings to add to
            group = {"path": teacher.spec.path, "align": "bytes"}
            way_out = f"or {group_word(f'model.teachers.{name}', group)} (docs/vocabularies.md)."
        else:
            way_out = f"or {model_key(role, 'align')}=bytes (docs/vocabularies.md)."
        raise VocabularyMismatchError(
            f"student '{student.spec.path}' and {role} '{teacher.spec.path}' disagree on "
            f"{len(differing)} token ids, so the {kind} would score other text than the student "
            f"wrote. The first:\n{shown}\nUse a {kind} with the student's tokenizer, {way_out}"
        )
    student_id, teacher_id = student.image_token_id, teacher.image_token_id
    if student_id is not None and teacher_id is not None and student_id != teacher_id:
        raise VocabularyMismatchError(
            f"the image placeholder is id {student_id} for the student and {teacher_id} for the "
            f"{role}"
        )
    check_sees(student, teacher, role)
    if student.vision is not None and teacher.vision is not None:
        _check_processors(student.vision, teacher.vision, role)


def check_sees(student: Processing, teacher: Processing, role: str = "teacher") -> None:
    """Checks that the teacher sees pictures if the student does.

    Raises:
        ModelError: it does not.
    """
    if student.vision is not None and teacher.vision is None:
        raise ModelError(
            f"the {role} '{teacher.spec.path}' reads text only, but the student sees pictures; "
            "it would score without them"
        )


def _check_processors(student: VisionProcessor, teacher: VisionProcessor, role: str) -> None:
    differing = []
    for name in ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std"):
        values = [getattr(each.processor, name) for each in (student, teacher)]
        if not np.array_equal(values[0], values[1]):
            differing.append(f"{name} is {values[0]} and {values[1]}")
    if differing:
        raise ModelError(
            f"student and {role} prepare pictures differently: {', '.join(differing)}.\nUse a "
            "teacher of the student's family, for which a picture has the same tokens."
        )


def _check_patches(vision: VisionProcessor, config: Any, who: str) -> None:
    """Checks that a picture processor makes the patches that the model takes.

    Raises:
        ModelError: it is that of another model.
    """
    for name, other in (
        ("patch_size", "patch_size"),
        ("temporal_patch_size", "temporal_patch_size"),
        ("merge_size", "spatial_merge_size"),
    ):
        made, taken = getattr(vision.processor, name), getattr(config, other)
        if made != taken:
            raise ModelError(
                f"{who} takes pictures with {name} {taken}, and its preprocessor_config.json has "
                f"{made}.\nPut the file of the model's own checkpoint there."
            )


def _setting_key(role: str, name: str) -> str:
    """Returns a setting's key on the command line; `evaluate` and `serve` have just one model."""
    if role != "model":
        return model_key(role, name)
    return "model" if name == "path" else name


def _told_of_adapter(folder: Path, role: str) -> str:
    """Says that a folder holds a LoRA adapter, and how to get the whole model."""
    told = f"the {role}'s folder '{folder}' holds a LoRA adapter, not a whole model.\n"
    where = folder.resolve()
    run = next((each for each in where.parents[:4] if (each / "metrics.jsonl").is_file()), None)
    if run is not None and (run / "final" / "config.json").is_file():
        return f"{told}Give the run, whose final/ is merged: {_setting_key(role, 'path')}={run}"
    if run is not None:
        return (
            f"{told}Write the run's student as a whole and give that folder: "
            f"python -m reopold_agent.train.export {run} DIR"
        )
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = str(settings["base_model_name_or_path"])
    except (OSError, ValueError, LookupError, TypeError):
        base = "BASE"
    return (
        f"{told}Merge it with its model and give the new folder DIR, in Python with peft (for a "
        "model that sees pictures with AutoModelForImageTextToText and AutoProcessor):\n"
        "  from peft import PeftModel; from transformers import AutoModelForCausalLM, "
        f"AutoTokenizer\n  model = AutoModelForCausalLM.from_pretrained({base!r}, dtype='auto')\n"
        f"  PeftModel.from_pretrained(model, {str(folder)!r}).merge_and_unload()"
        f".save_pretrained('DIR')\n  AutoTokenizer.from_pretrained({base!r}).save_pretrained('DIR')"
    )


def _told_of_both(where: str, role: str) -> str:
    """Says that a whole model has a LoRA adapter beside it, and what to do.

    Transformers would apply the adapter, to weights that it may have been merged into before.
    """
    return (
        f"the {role}'s {where} holds a whole model and a LoRA adapter (adapter_config.json): "
        "whether they are merged cannot be told.\nIf they are, delete the files adapter_*; if not, "
        "move these files to a folder of their own and give that: the message then says how to "
        "merge them."
    )


def _told_of_pickles(folder: Path) -> str:
    """Says how to convert weights in pickles, which can run code, to safetensors."""
    try:
        sees = "vision_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        sees = False
    kind = "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"
    return (
        "; its *.bin are pickles, which can run code.\nIf you trust them, convert them in Python:\n"
        f"  from transformers import {kind}\n"
        f"  model = {kind}.from_pretrained({str(folder)!r}, dtype='auto')\n"
        f"  model.save_pretrained({str(folder)!r})"
    )


def _check_folder(folder: Path, role: str, weights: bool) -> None:
    if not folder.is_dir():
        raise ModelError(
            f"the {role}'s folder '{folder}' does not exist; set {_setting_key(role, 'path')} to a "
            "folder in Hugging Face layout or to a hub id such as Qwen/Qwen2.5-VL-3B-Instruct"
        )
    whole = any(not each.name.startswith("adapter_") for each in folder.glob("*.safetensors"))
    if (folder / "adapter_config.json").is_file() and not (
        (folder / "config.json").is_file() and (whole or not weights)
    ):
        raise ModelError(_told_of_adapter(folder, role))
    if (folder / "adapter_config.json").is_file() and whole and weights:
        raise ModelError(_told_of_both(f"folder '{folder}'", role))
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
        told = f"the {role}'s folder '{folder}' lacks {', '.join(missing)}"
        if not whole and any(folder.glob("*.bin")) and weights:
            told += _told_of_pickles(folder)
        raise ModelError(told)
    try:
        files = indexed_files(folder) if weights else []
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the {role}'s folder '{folder}' has an index of its weights that cannot be read "
            f"({error}); download model.safetensors.index.json again"
        ) from error
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ModelError(
            f"the {role}'s folder '{folder}' lacks {len(absent)} of {len(files)} weight "
            f"files, the first is {absent[0]}; the download is incomplete"
        )
