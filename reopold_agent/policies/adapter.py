"""All knowledge of model architectures, in one place.

`ModelAdapter` computes hidden states from token ids and pictures with a Hugging Face causal or
image-text model; `logprobs` does the projection to the vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from reopold_agent.common.memory import LARGE, release_unchanged
from reopold_agent.errors import ModelError
from reopold_agent.policies.attention import attends_by_rows, shares_prompts
from reopold_agent.policies.lora import without_adapter
from reopold_agent.policies.vision import VisionProcessor
from reopold_agent.types import EncodedImage, IntArray


class ModelAdapter:
    """A model with its picture processor.

    Args:
        model: of one of `architecture.FAMILIES`, as Hugging Face builds it, or wrapped by peft.
        vision: needed when pictures occur.
        image_token_id: id of the image placeholder; None for text-only models.
        autocast: dtype of the computation if it differs from the weights' dtype.

    Attributes:
        packed: whether the model takes packed rows (`attention.attend_by_rows`).
        shares_prompts: whether such rows can read the prompt of an earlier one.
    """

    def __init__(
        self,
        model: nn.Module,
        vision: VisionProcessor | None,
        image_token_id: int | None,
        *,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self._autocast = autocast
        self.vision = vision
        self.image_token_id = image_token_id
        base = without_adapter(model)
        self._body: Any = base.model
        self._multimodal_positions = hasattr(base.model, "get_rope_index")
        self.text_config: Any = base.config.get_text_config()
        self.head: nn.Linear = base.get_output_embeddings()
        attention = str(getattr(self.text_config, "_attn_implementation", "sdpa"))
        self._released: dict[str, tuple[int, int]] = {}
        self.packed = attends_by_rows(attention)
        self.shares_prompts = shares_prompts(attention)
        if not self.packed and attention not in ("sdpa", "eager"):
            raise ModelError(
                f"attention '{attention}' cannot mask sequences of different lengths in one batch; "
                "set model.attention=sdpa (PyTorch picks its flash kernels where it can)"
            )
        self._additive_mask = attention == "eager"
        if self.head.bias is not None:
            raise ModelError("models whose output embedding has a bias are not supported")

    def copied(self) -> ModelAdapter:
        """Returns the adapter of a copy of the model; weights that are not trained are shared."""
        frozen = [each for each in self.model.parameters() if not each.requires_grad]
        model = copy.deepcopy(self.model, {id(each): each for each in frozen})
        return ModelAdapter(model, self.vision, self.image_token_id, autocast=self._autocast)

    @property
    def device(self) -> torch.device:
        """The device of the output embedding."""
        return self.head.weight.device

    def release_weights(self) -> None:
        """Gives a CPU's memory of frozen weights back until the next pass reads them again.

        Only weights of a large model that are as they are in their file (`release_unchanged`).

        Raises:
            ModelError: a file was changed since they were given back before, so that the last pass
                had other weights.
        """
        weights = [each for each in self.model.parameters() if not each.requires_grad]
        if self.device.type != "cpu" or sum(each.numel() for each in weights) < LARGE:
            return
        for path, state in release_unchanged((w.data_ptr(), w.nbytes) for w in weights).items():
            if self._released.setdefault(path, state) != state:
                raise ModelError(
                    f"{path} was changed while its model was in use, so that it is not the same "
                    "any more.\nPut the file back and start the command again: it continues from "
                    "the last checkpoint. Write new weights into another folder."
                )

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns the context in which the model computes.

        Entered once around many passes, it converts each weight only once.
        """
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self._autocast)

    @property
    def autocasts(self) -> bool:
        """Whether the computation's dtype differs from the weights'."""
        return self._autocast is not None

    @property
    def vocabulary_rows(self) -> int:
        """Rows of the output embedding; may exceed the tokenizer's size (padding)."""
        return int(self.head.weight.shape[0])

    def positions(self, ids: Sequence[int] | IntArray, images: Sequence[EncodedImage]) -> Tensor:
        """Returns the position ids of a whole sequence, (3, length) int64, by the model's own rule.

        Models that see pictures: multimodal RoPE from the grids (`get_rope_index`). Text models:
        0, 1, 2 ... three times, of which one is used.

        Raises:
            ModelError: placeholders and pictures do not match.
        """
        ids_L = torch.as_tensor(ids, dtype=torch.int64)
        placeholders = (
            0 if self.image_token_id is None else int((ids_L == self.image_token_id).sum())
        )
        expected = sum(image.tokens for image in images)
        if placeholders != expected:
            raise ModelError(
                f"{placeholders} image placeholder tokens for pictures that need {expected}; the "
                "ids and the pictures of the sequence do not match"
            )
        if not self._multimodal_positions or not images:
            return torch.arange(len(ids_L)).expand(3, -1)
        kinds = torch.eq(ids_L, self.image_token_id or 0).int()
        position_ids, _ = self._body.get_rope_index(
            ids_L[None], kinds[None], torch.tensor([image.grid for image in images])
        )
        positions: Tensor = position_ids[:, 0]
        return positions

    def hidden_states(
        self,
        ids_BT: Tensor,
        positions_3BT: Tensor,
        images: Sequence[EncodedImage],
        attention_mask: Tensor | None,
        cache: Any = None,
        places_BT: Tensor | None = None,
    ) -> Tensor:
        """Computes the last hidden states, (batch, time, width).

        Args:
            ids_BT: int64.
            positions_3BT: as `positions`, stacked.
            images: all pictures whose placeholders are in ``ids_BT``, row by row, in order.
            attention_mask: (batch, time), or (batch, 1, query, key) bool, or None.
            cache: keys and values of earlier tokens; updated in place.
            places_BT: place of each token in its row, where several rows are packed into one
                sequence; it tells the rows apart. A row that begins at a place above 0 goes on
                from the tokens before that place of the last row that begins at 0.
        """
        if attention_mask is not None and attention_mask.dim() == 4 and self._additive_mask:
            lowest = torch.finfo(self.head.weight.dtype).min
            attention_mask = torch.where(attention_mask, 0.0, lowest).to(self.head.weight.dtype)
        inputs: dict[str, Any] = {
            "input_ids": ids_BT,
            "attention_mask": attention_mask,
            "past_key_values": cache,
            "use_cache": cache is not None,
        }
        if not self._multimodal_positions:
            inputs["position_ids"] = positions_3BT[0]
        elif places_BT is None:
            inputs["position_ids"] = positions_3BT
        else:
            inputs["position_ids"] = torch.cat([places_BT[None], positions_3BT])
        if images:
            if self.vision is None:
                raise ModelError("this model takes no pictures, but the environment shows some")
            pixel_values, grids = self.vision.patches(images)
            inputs["pixel_values"] = pixel_values.to(self.device)
            inputs["image_grid_thw"] = grids.to(self.device)
        with self.autocast():
            hidden: Tensor = self._body(**inputs).last_hidden_state
        return hidden

    @torch.no_grad()
    def keeps_rows_apart(self) -> bool:
        """Returns whether packed rows give the states of single ones, tried on a few tokens.

        A model whose layers do not attend through transformers' interface (recurrent ones, code of
        a checkpoint) would mix the rows without an error; so would a kernel that does not fit.
        """
        window = getattr(self.text_config, "sliding_window", None) or 40
        lengths = [min(length, window) for length in (24, 1, 40)]  # the mask below has no window
        ids = torch.arange(sum(lengths), device=self.device)[None] % self.vocabulary_rows
        places = torch.cat([torch.arange(n) for n in lengths])[None].to(self.device)
        packed = self.hidden_states(ids, places.expand(3, 1, -1), [], None, places_BT=places)
        singly = []
        for row, spots in zip(
            *(torch.split(each[0], lengths) for each in (ids, places)), strict=True
        ):
            seen = (spots[:, None] >= spots)[None, None]
            singly.append(self.hidden_states(row[None], spots.expand(3, 1, -1), [], seen))
        single = torch.cat(singly, dim=1)
        exact = single.dtype == torch.float32 and not self.autocasts
        return bool((packed - single).norm() <= (1e-3 if exact else 5e-2) * single.norm())
