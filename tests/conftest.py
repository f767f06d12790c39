"""Shared fixtures: tiny random models, a tokenizer trained in memory, random trajectories.

Everything is made here from seeds; nothing is downloaded and no file of the machine is needed
except where a fixture says so and skips.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

# Before the hub's client is imported: a test that would download must fail, not wait.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch is imported, and for the processes that tests start: the tiny models are fastest so.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest
import torch
from real_data import VARIABLE, real_data
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from examples.embedded_models.tokenizer import train_tokenizer
from reopold_agent.common.pixels import PixelLimits
from reopold_agent.objectives import chunks, divergence
from reopold_agent.policies import logprobs
from reopold_agent.policies.adapter import ModelAdapter
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.policies.vision import VisionProcessor
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.types import EncodedImage, StopReason, Trajectory, Turn

torch.set_num_threads(1)  # two cores are shared; one thread is as fast at these sizes

hypothesis.settings.register_profile(
    "reopold", deadline=None, max_examples=60, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("reopold")

PADDED_ROWS = 13
"""Rows of the tiny model's vocabulary that no id of its tokenizer uses (real models have some)."""

_TEXTS = (
    "You are a helpful assistant.",
    '<tool_call>\n{"name": "crop_image", "arguments": {"bbox_2d": [1, 2]}}\n</tool_call>',
    "user\nassistant\nsystem\n\nHere is the cropped image (Image Size: 56x56):\n",
    "Guidelines: reason step by step.\n\nThe answer is \\boxed{7}.",
)


@pytest.fixture
def logit_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all logits that the test computes a slice or block at a time, in order."""
    sizes: list[int] = []
    original = chunks.make_logits

    def watched(
        hidden: Tensor, weight: Tensor, banned: Tensor | None, room: Tensor | None = None
    ) -> Tensor:
        logits = original(hidden, weight, banned, room)
        sizes.append(logits.numel())
        return logits

    for module in (chunks, divergence, logprobs):
        monkeypatch.setattr(module, "make_logits", watched)
    return sizes


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", ())
    count = sum(VARIABLE in str(report.longrepr) for report in skipped)
    if count:
        terminalreporter.write_line(f"{count} tests skipped: they need {VARIABLE}=DIR")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Qwen's control tokens and chat format over about 400 byte-level ids."""
    return train_tokenizer(_TEXTS * 4, vocab_size=400)


@pytest.fixture(scope="session")
def qwen_tokenizer() -> Any:
    """The real Qwen2.5-VL vocabulary and chat template."""
    return AutoTokenizer.from_pretrained(real_data("qwen_tokenizer"))


@pytest.fixture(scope="session")
def chat(tokenizer: PreTrainedTokenizerFast) -> ChatRenderer:
    return ChatRenderer(tokenizer)


@pytest.fixture
def say(chat: ChatRenderer) -> Callable[..., list[int]]:
    """Returns the ids of a turn, with or without its end."""

    def ids(text: str, end: bool = True) -> list[int]:
        encoded = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*encoded, *([chat.turn_end_id] if end else [])]

    return ids


@pytest.fixture(scope="session")
def vision() -> VisionProcessor:
    return VisionProcessor(Qwen2VLImageProcessorPil())


def tiny_config(tokenizer: PreTrainedTokenizerFast, **text: Any) -> Qwen2_5_VLConfig:
    """Two layers, two heads with one key-value head, a windowed and a full vision block."""

    def token(name: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(name))  # type: ignore[arg-type]

    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + PADDED_ROWS,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 4096,
            "initializer_range": 0.15,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "bos_token_id": None,
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10.0,
                "mrope_section": [4, 6, 6],
            },
            **text,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.15,
        },
        tie_word_embeddings=True,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )


@pytest.fixture(scope="session")
def make_model(
    tokenizer: PreTrainedTokenizerFast,
) -> Callable[..., Qwen2_5_VLForConditionalGeneration]:
    """``make_model(seed=0, attention="sdpa", **text_config)``: random weights, evaluation mode."""

    def make(
        seed: int = 0, attention: str = "sdpa", **text: Any
    ) -> Qwen2_5_VLForConditionalGeneration:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = tiny_config(tokenizer, **text)
            config._attn_implementation = attention
            return Qwen2_5_VLForConditionalGeneration(config).eval()

    return make


@pytest.fixture(scope="session")
def model(make_model: Callable[..., Any]) -> Qwen2_5_VLForConditionalGeneration:
    """The tiny model of most tests; do not change its weights."""
    return make_model()


@pytest.fixture(scope="session")
def make_policy(chat: ChatRenderer, vision: VisionProcessor) -> Callable[..., TransformersPolicy]:
    """``make_policy(model, **kwargs)`` with the chat's stop and forbidden ids."""

    def make(model: Any, **kwargs: Any) -> TransformersPolicy:
        settings: dict[str, Any] = {
            "allowed_ids": len(chat.tokenizer),
            "forbidden_ids": chat.forbidden_ids,
            "stop_ids": chat.stop_ids,
        }
        return TransformersPolicy(
            ModelAdapter(model, vision, chat.image_id), **{**settings, **kwargs}
        )

    return make


@pytest.fixture(scope="session")
def policy(
    make_policy: Callable[..., TransformersPolicy], model: Qwen2_5_VLForConditionalGeneration
) -> TransformersPolicy:
    return make_policy(model)


def random_picture(seed: int, height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Smooth noise, so that resizing matters but does not erase it."""
    rng = np.random.default_rng((seed, height, width))
    coarse = rng.integers(0, 256, (max(1, height // 7), max(1, width // 7), 3))
    rows = np.arange(height) * coarse.shape[0] // height
    columns = np.arange(width) * coarse.shape[1] // width
    return coarse[rows][:, columns].astype(np.uint8)


@pytest.fixture(scope="session")
def encode(vision: VisionProcessor) -> Callable[..., EncodedImage]:
    """``encode(seed, height=56, width=84)``: a random picture at about its own size."""

    def make(seed: int, height: int = 56, width: int = 84) -> EncodedImage:
        return vision.encode(random_picture(seed, height, width), PixelLimits(784, 300 * 784))

    return make


@pytest.fixture(scope="session")
def random_trajectory(chat: ChatRenderer) -> Callable[..., Trajectory]:
    """``random_trajectory(seed, images=(), turns=2, turn_tokens=6)``: a plausible episode.

    The first picture is in the prompt, one more comes with each observation while they last. The
    student's tokens are random allowed ids; log-probs, entropies and teacher's are random.
    """

    def make(
        seed: int, images: Sequence[EncodedImage] = (), turns: int = 2, turn_tokens: int = 6
    ) -> Trajectory:
        rng = np.random.default_rng(seed)
        names = chat.tokenizer.convert_tokens_to_ids
        start, end = names("<|vision_start|>"), names("<|vision_end|>")
        banned = {*chat.forbidden_ids, *chat.stop_ids}
        words = [i for i in range(len(chat.tokenizer)) if i not in banned]
        remaining = list(images)
        ids: list[int] = []
        mask: list[bool] = []

        def add(tokens: Sequence[int], student: bool) -> None:
            ids.extend(tokens)
            mask.extend([student] * len(tokens))

        def shown(most: int) -> list[int]:
            tokens: list[int] = []
            while remaining and most:
                image = remaining.pop(0)
                tokens += [start, *[chat.image_id or 0] * image.tokens, end]
                most -= 1
            return tokens

        add(rng.choice(words, 5 + seed % 7).tolist(), False)
        add(shown(max(1, len(images) - turns + 1)), False)
        add(rng.choice(words, 4).tolist(), False)
        prompt_length, spans = len(ids), []
        for turn in range(turns):
            begin = len(ids)
            add(rng.choice(words, int(rng.integers(1, turn_tokens + 1))).tolist(), True)
            spans.append(Turn(begin, len(ids), "", "stop"))
            if turn + 1 < turns:
                add([chat.turn_end_id, *shown(1), *rng.choice(words, 3).tolist()], False)
        used = [image for image in images if image not in remaining]
        loss = np.array(mask)
        length = len(ids)
        logp = np.where(loss, -rng.exponential(1.5, length), 0).astype(np.float32)
        return Trajectory(
            task_id=f"task-{seed}",
            index=seed,
            sample=0,
            prompt_length=prompt_length,
            ids=np.array(ids, dtype=np.int64),
            loss_mask=loss,
            logp=logp,
            entropy=np.where(loss, rng.exponential(1.0, length), 0).astype(np.float32),
            images=used,
            turns=spans,
            stop_reason=StopReason.ANSWER,
            reward=float(rng.integers(0, 2)),
            success=False,
            teacher_logp=np.where(loss, -rng.exponential(1.5, length), 0).astype(np.float32),
        )

    return make
