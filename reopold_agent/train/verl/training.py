"""Adapts verl's FSDP engine to this project's rules, and the worker that holds it.

Four things differ from verl's own: log-probs and entropies are computed for the student's own
tokens only, without logits of the whole batch, and ids that must not be sampled have probability 0
as in sampling (`head`); packed rows run without flash-attn too (`policies.attention`); positions
and patches are made from the pictures by `VisionProcessor`; gradients are divided once per
mini-batch by the number of kept tokens on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from verl.utils.device import get_device_id, get_device_name
from verl.utils.fsdp_utils import load_fsdp_model_to_gpu
from verl.utils.py_functional import convert_to_regular_types
from verl.utils.tensordict_utils import assign_non_tensor, get_non_tensor_data
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine_workers import ActorRolloutRefWorker

from reopold_agent.policies.attention import IMPLEMENTATION, attend_by_rows, attends_by_rows
from reopold_agent.policies.batch import PassTokens
from reopold_agent.policies.lora import merged_weights, with_adapter, without_adapter
from reopold_agent.policies.vision import VisionProcessor
from reopold_agent.rollout.chat import forbidden_ids
from reopold_agent.train.learning_rate import LearningRate
from reopold_agent.train.totals import TokenTotals
from reopold_agent.train.verl.checkpoints import ADAPTER
from reopold_agent.train.verl.compose import FROZEN_DTYPE, LORA_SETTINGS
from reopold_agent.train.verl.head import TokenHead, Wanted, before_tokens
from reopold_agent.train.verl.loss import ObjectiveLoss
from reopold_agent.train.verl.records import pixels_of
from reopold_agent.types import EncodedImage

TOTALS = "reopold_totals"
"""The metric that carries an update's `TokenTotals` from the workers to the trainer."""

PASSES = "reopold_passes"
"""The metric with each rank's `PassTokens` since its last update, that update's included."""

_STATES = "reopold_states"
"""Key of the places whose log-probs the head computes, among verl's arguments for its outputs."""


class FsdpEngine(FSDPEngineWithLMHead):
    """verl's FSDP engine with our head, pictures from pixels, and one division per mini-batch."""

    def initialize(self) -> None:
        """Builds the model, whose head then computes log-probs in place of logits."""
        super().initialize()
        self._passes = PassTokens()
        self._model = without_adapter(self.module)
        self._head = TokenHead(
            self._model.get_output_embeddings(),
            banned_ids(self.model_config.tokenizer, self._model.config),
        )
        self._vision: VisionProcessor | None = None
        if hasattr(self._model.config, "vision_config"):
            processor = Qwen2VLImageProcessorPil.from_pretrained(self.model_config.local_path)
            self._vision = VisionProcessor(processor, cache_bytes=0)  # each is seen once
            # verl shows a blank picture, times 0, to a micro-batch without any, so that all ranks
            # gather the tower's weights; but it takes the result for a tensor where there are no
            # DeepStack features.
            self._model.model.visual.register_forward_hook(
                lambda tower, inputs, output: (
                    output
                    if hasattr(output, "deepstack_features")
                    else getattr(output, "pooler_output", output)
                )
            )

    def _build_module(self) -> Any:
        """Loads the model, which then attends as in the local engine.

        For packed rows verl would put a function in place that calls flash-attn.
        """
        config = self.model_config.hf_config
        attention = str(config._attn_implementation)
        if not attends_by_rows(attention):
            return super()._build_module()
        # The second is an entry that verl adds, and that checkpoints contain.
        config._attn_implementation = config.attn_implementation = "sdpa"
        self.use_remove_padding = False
        module = super()._build_module()
        self.use_remove_padding = True
        attend_by_rows(module, attention.removeprefix(IMPLEMENTATION))
        return module

    def _build_lora_module(self, module: Any) -> Any:
        """Puts the local engine's adapter around the model; verl takes few of peft's settings."""
        settings = convert_to_regular_types(self.model_config.lora)
        # verl's own ``model_dtype`` also rounds buffers: the frequencies of rotary positions.
        for parameter in module.parameters():
            parameter.data = parameter.data.to(getattr(torch, settings[FROZEN_DTYPE]))
        # One rank's weights are sent to all, and dropout differs between ranks.
        torch.manual_seed(self.engine_config.seed + self.rank)
        module = with_adapter(module, settings[LORA_SETTINGS])
        module.disable_input_require_grads()  # as in `load_model`
        return module

    def get_per_tensor_param(self, *args: Any, **kwargs: Any) -> Any:
        """Returns weights for the servers by name, and None: an adapter is merged.

        verl itself would leave out the adapters outside of layers (a vision tower's merger), copy
        the whole model, and send bfloat16.
        """
        if not self._is_lora:
            return super().get_per_tensor_param(*args, **kwargs)
        return self._merged_weights(), None

    @torch.no_grad()
    def _merged_weights(self) -> Iterator[tuple[str, Tensor]]:
        load_fsdp_model_to_gpu(self.module)  # the worker moves it back, if it is offloaded
        for name, value in merged_weights(self.module):
            yield name, value.full_tensor() if isinstance(value, DTensor) else value

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """Saves as verl, which makes an empty model by the model's configuration for the export.

        transformers would look for a package with the name of our attention, so that the
        configuration names it only between checkpoints. An adapter is also saved as peft does.
        """
        config = self._model.config
        attention, config._attn_implementation = config._attn_implementation, "sdpa"
        try:
            super().save_checkpoint(local_path, *args, **kwargs)
            if self._is_lora:
                self._save_adapter(Path(local_path) / ADAPTER)
        finally:
            config._attn_implementation = attention

    def _save_adapter(self, folder: Path) -> None:
        device = get_device_id()
        whole = {
            name: value.to(device).full_tensor().cpu()
            for name, value in self.module.state_dict().items()
            if "lora_" in name
        }
        if self.rank == 0:
            self.module.save_pretrained(folder, state_dict=whole, save_embedding_layers=False)
        dist.barrier()

    def _build_lr_scheduler(self, optimizer: Any) -> Any:
        """Returns the local engine's schedule, which counts updates; verl's counts steps."""
        settings = self.optimizer_config
        return LearningRate(
            optimizer,
            settings.lr_scheduler_type,
            settings.lr_warmup_steps,
            settings.total_training_steps,
        )

    def optimizer_step(self) -> Any:
        """Makes one update and advances the schedule, which in verl advances once per step."""
        self._rate = float(self.optimizer.param_groups[0]["lr"])
        norm = super().optimizer_step()
        if np.isfinite(float(norm)):  # otherwise verl has skipped the update
            self.lr_scheduler.step()
        return norm

    def lr_scheduler_step(self) -> float:
        """Returns the learning rate of the last update."""
        return self._rate

    def prepare_model_inputs(self, micro_batch: Any) -> Any:
        """Returns verl's inputs; patches and multimodal positions are made from the pixels."""
        pictures = _pictures(micro_batch)
        micro_batch = micro_batch.copy()
        micro_batch.pop("multi_modal_inputs", None)  # verl expects patches here, not pixels
        inputs, arguments = super().prepare_model_inputs(micro_batch=micro_batch)
        ids, width = micro_batch["input_ids"], inputs["input_ids"].shape[1]
        self._passes.computed += inputs["input_ids"].numel()
        self._passes.real += ids.values().numel()
        packed = inputs["attention_mask"] is None
        arguments[_STATES] = self._announce(micro_batch, None if packed else width)
        if self._vision is None:
            return inputs, arguments
        encoded = [[self._vision.adopt(pixels) for pixels in row] for row in pictures]
        positions = [
            self._positions(row.cpu(), images)
            for row, images in zip(ids.unbind(), encoded, strict=True)
        ]
        laid = torch.zeros((4, *inputs["input_ids"].shape), dtype=torch.int64)
        if packed:  # one row after the other, and padding at the end
            joined = torch.cat(positions, dim=1)
            laid[:, 0, : joined.shape[1]] = joined
        else:
            for row, position in enumerate(positions):
                laid[:, row, : position.shape[1]] = position
        device = inputs["input_ids"].device
        inputs["position_ids"] = laid.to(device)
        images = [image for row in encoded for image in row]
        if images:
            patches, grids = self._vision.patches(images)
            inputs["pixel_values"] = patches.to(device)
            inputs["image_grid_thw"] = grids.to(device)
        return inputs, arguments

    def prepare_model_outputs(
        self, output: Any, output_args: Any, micro_batch: Any, logits_processor_func: Any
    ) -> dict[str, Tensor]:
        """Returns ``log_probs``, and ``entropy`` if asked for, of all tokens, nested as in verl.

        They are 0 except at the student's own tokens (``response_mask``).
        """
        ids, places = micro_batch["input_ids"], (output_args[_STATES],)
        logp_N, entropy_N = output.logits
        found = {"log_probs": logp_N}
        if get_non_tensor_data(micro_batch, "calculate_entropy", False):
            found["entropy"] = entropy_N
        nothing = torch.zeros(ids.values().shape, dtype=logp_N.dtype, device=logp_N.device)
        return {
            name: torch.nested.nested_tensor_from_jagged(
                nothing.index_put(places, values), ids.offsets()
            )
            for name, values in found.items()
        }

    def forward_backward_batch(
        self, data: Any, loss_function: Callable[..., Any], forward_only: bool = False
    ) -> Any:
        """Makes verl's passes; for an `ObjectiveLoss`, then divides the sums over all ranks.

        A pass holds at most the tokens that the settings allow, or a single longer row.
        """
        self._fit_longest(data)
        if isinstance(loss_function, ObjectiveLoss) and loss_function.means_by_environment:
            counts = torch.tensor(loss_function.count(data), device=get_device_id())
            dist.all_reduce(counts, group=self.get_data_parallel_group())
            loss_function.counts = counts.tolist()
        output = super().forward_backward_batch(data, loss_function, forward_only)
        if forward_only or not isinstance(loss_function, ObjectiveLoss):
            return output
        totals = self._over_ranks(loss_function.take_totals())
        # FSDP averages over the ranks, but this is a sum.
        scale = self.get_data_parallel_size() / max(1.0, totals.denominator)
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
        output["loss"] = [totals.loss]
        output["metrics"][TOTALS] = [vars(totals)] if dist.get_rank() == 0 else []
        output["metrics"][PASSES] = [vars(self._passes)]
        self._passes = PassTokens()
        return output

    def _fit_longest(self, data: Any) -> None:
        """Raises the tokens of a micro-batch to the longest row of all ranks, if that is longer."""
        longest = data["input_ids"].offsets().diff().max().to(get_device_id())
        dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=self.get_data_parallel_group())
        allowed = int(get_non_tensor_data(data, "max_token_len_per_gpu", 0))
        assign_non_tensor(data, max_token_len_per_gpu=max(allowed, int(longest)))

    def _announce(self, micro_batch: Any, width: int | None) -> Tensor:
        """Tells the head which log-probs the next pass is for.

        Args:
            micro_batch: nested ``input_ids`` and ``response_mask``.
            width: of padded rows; None where they are packed.

        Returns:
            (N,) int64: where the student's tokens are predicted, in the joined rows.
        """
        ids, masks = micro_batch["input_ids"], micro_batch["response_mask"].unbind()
        joined = before_tokens(ids.offsets()[1:].tolist(), masks)
        states = joined
        if width is not None:
            lengths = ids.offsets().diff().tolist()
            states = before_tokens([n * width + size for n, size in enumerate(lengths)], masks)
        entropy = bool(get_non_tensor_data(micro_batch, "calculate_entropy", False))
        self._head.wanted = Wanted(states, ids.values()[joined + 1], entropy)
        return joined

    def _over_ranks(self, totals: TokenTotals) -> TokenTotals:
        every: list[Any] = [None] * self.get_data_parallel_size()
        dist.all_gather_object(every, vars(totals), group=self.get_data_parallel_group())
        merged = TokenTotals()
        for one in every:
            merged.merge(TokenTotals(**one))
        return merged

    def _positions(self, ids_L: Tensor, images: list[EncodedImage]) -> Tensor:
        """Returns (4, L): positions in the text, then the three of multimodal RoPE."""
        text = torch.arange(len(ids_L))
        if not images:
            return text.expand(4, -1)
        kinds = torch.eq(ids_L, int(self._model.config.image_token_id)).int()
        grids = torch.tensor([image.grid for image in images])
        three, _ = self._model.model.get_rope_index(ids_L[None], kinds[None], grids)
        return torch.cat([text[None], three[:, 0]])


for _device, _vendor in (("cuda", "nvidia"), ("cpu", None)):
    EngineRegistry.register(
        model_type="language_model", backend=["fsdp", "fsdp2"], device=_device, vendor=_vendor
    )(FsdpEngine)


class StudentWorker(ActorRolloutRefWorker):
    """verl's worker on one (pretended) GPU. Importing this module registers `FsdpEngine`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if get_device_name() == "cpu" and not dist.is_initialized():
            # verl would request "cpu:gloo,cpu:gloo", which torch refuses.
            torch.set_num_threads(1)
            dist.init_process_group("gloo")


def banned_ids(tokenizer: Any, config: Any) -> list[int]:
    """Returns the ids of probability 0: `forbidden_ids` and padded rows."""
    rows = int(config.get_text_config().vocab_size)
    return sorted({*forbidden_ids(tokenizer), *range(len(tokenizer), rows)})


def _pictures(micro_batch: Any) -> list[list[Any]]:
    rows = micro_batch.get("multi_modal_inputs", [])
    return [pixels_of({"multi_modal_inputs": getattr(row, "data", row)}) for row in rows]
