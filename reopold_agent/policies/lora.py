"""LoRA adapters: put around a model, added to weights that others need, merged at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from reopold_agent.errors import MissingExtraError, ModelError, suggestion

_WITHOUT_VLLM = "generate without it (engine=local policy.student.name=transformers)"


def with_adapter(model: Any, settings: Mapping[str, Any], saved: Path | None = None) -> Any:
    """Puts a LoRA adapter around a model, whose own weights are frozen.

    A new one is drawn by PyTorch's random numbers, and changes nothing yet. Its weights are float32
    if the model's are bfloat16 or float16.

    Args:
        model: a transformers model.
        settings: arguments of `peft.LoraConfig`.
        saved: a folder with an adapter of this model, which is taken in place of a new one.

    Raises:
        MissingExtraError: peft is not installed.
        ModelError: the settings do not fit the model, or the adapter cannot be read.
    """
    try:
        from peft import LoraConfig, PeftModel, get_peft_model
    except ImportError as error:
        raise MissingExtraError("peft", "lora", "model.student.lora") from error
    if saved is not None:
        try:
            return PeftModel.from_pretrained(model, str(saved), is_trainable=True)
        except (
            *(OSError, ValueError, ImportError, RuntimeError),
            *(SafetensorError, UnpicklingError),
        ) as error:
            raise ModelError(f"cannot load the adapter from '{saved}': {error}") from error
    try:
        wrapped = get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", **settings}))
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"model.student.lora does not fit this model: {error}\n"
            "Set what peft's LoraConfig takes, such as "
            "'model.student.lora={r: 16, lora_alpha: 32, target_modules: all-linear}'."
        ) from error
    _check_modules(without_adapter(wrapped), settings.get("target_modules"))
    if not any(parameter.requires_grad for parameter in wrapped.parameters()):
        raise ModelError(
            "model.student.lora leaves nothing to train.\n"
            "Leave out inference_mode, which is for adapters that are only used."
        )
    head = model.get_output_embeddings()
    if head is not None and type(head) is not nn.Linear:
        # Log-probs use the projection's weight directly, so an adapter there would have no effect.
        raise ModelError("model.student.lora must not cover the output embedding (lm_head)")
    return wrapped


def _check_modules(base: Any, names: Any) -> None:
    """Checks that a model has each of the modules that are listed; peft is content with one.

    Raises:
        ModelError: it lacks one.
    """
    if names is None or isinstance(names, str):  # peft's own choice, or a pattern that it checks
        return
    modules = dict(base.named_modules())
    for name in names:
        if not any(f".{each}".endswith(f".{name}") for each in modules):
            linear = {
                each.removesuffix(".base_layer").rpartition(".")[2]
                for each, module in modules.items()
                if isinstance(module, nn.Linear) and ".lora_" not in each
            }
            raise ModelError(
                f"model.student.lora.target_modules names '{name}', which this model does not have."
                f"\n{suggestion(name, linear)}Its linear layers: {', '.join(sorted(linear))}."
            )


def without_adapter(model: Any) -> Any:
    """Returns the model inside peft's wrapper; one without an adapter itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def merged_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields weights by Hugging Face name (without peft's), with LoRA adapters added to their base.

    Weights divided by FSDP2 are yielded divided.

    Args:
        model: with or without an adapter; it is not changed.

    Raises:
        ModelError: as `check_merged`.
    """
    base = without_adapter(model)
    check_merged(model)
    adapted = _adapted(base)
    for name, parameter in base.named_parameters():
        layer = next((each for each in adapted if name.startswith(f"{each}.")), None)
        if layer is None:
            yield name, parameter
            continue
        rest = name.removeprefix(f"{layer}.")
        if not rest.startswith("base_layer."):
            continue  # the adapter itself
        value = parameter
        if rest == "base_layer.weight":
            module = adapted[layer]
            value = parameter + sum(
                module.get_delta_weight(adapter) for adapter in module.active_adapters
            )
        yield f"{layer}.{rest.removeprefix('base_layer.')}", value


def check_merged(model: Any) -> None:
    """Checks that `merged_weights` are all that an adapter computes.

    Args:
        model: with or without an adapter.

    Raises:
        ModelError: the adapter is none of LoRA, trains weights in another way too, or changes only
            one of the two embeddings that are one tensor.
    """
    base = without_adapter(model)
    adapted = _adapted(base)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if embedding in adapted.values() and embedding.base_layer.weight is head.weight:
        raise ModelError(
            "model.student.lora changes the input embedding, which is the output embedding too, "
            "and vLLM keeps one for both.\n"
            f"Leave embed_tokens out of target_modules, or {_WITHOUT_VLLM}."
        )
    others = [name for name, module in base.named_modules() if hasattr(module, "original_module")]
    others += [
        name
        for name, module in adapted.items()
        if not hasattr(module, "get_delta_weight")
        or any(getattr(module, "lora_variant", {}))
        or any(getattr(module, "lora_bias", {}).values())
    ]
    if others:
        raise ModelError(
            f"vLLM gets plain LoRA only, and {others[0]} is trained in another way.\n"
            "Leave modules_to_save, use_dora and lora_bias out of model.student.lora, or "
            f"{_WITHOUT_VLLM}."
        )


def _adapted(base: Any) -> dict[str, Any]:
    return {name: module for name, module in base.named_modules() if hasattr(module, "base_layer")}


def merge_adapter(model: Any) -> Any:
    """Returns the model without its adapter, whose effect is added to the weights in place.

    If input and output embedding are one tensor (``tie_word_embeddings``) and the adapter changes
    only the input's, they become two, in the weights and in the configuration: peft would add the
    change to both.

    Args:
        model: a model wrapped by peft.
    """
    base = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if hasattr(embedding, "base_layer") and embedding.base_layer.weight is head.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    merged = model.merge_and_unload()
    if merged.get_input_embeddings().weight is not merged.get_output_embeddings().weight:
        for config in (merged.config, merged.config.get_text_config()):
            config.tie_word_embeddings = False
    return merged
