"""A judge on this machine: any causal language model in Hugging Face layout."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from reopold_agent.errors import ModelError
from reopold_agent.judges.llm.base import Backend, Completion, How, Prompt
from reopold_agent.judges.llm.failures import UndecidedError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LocalSettings:
    """The model and how to run it.

    Attributes:
        model: folder or hub id of a causal language model.
        revision: branch, tag or commit on the hub.
        device: "auto" is the first GPU, else the CPU.
        dtype: "auto" is the checkpoint's own.
        max_output_tokens: most tokens of the reply.
        trust_remote_code: whether code of the checkpoint may run.
    """

    model: str
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    max_output_tokens: int = 128
    trust_remote_code: bool = False


class LocalBackend(Backend):
    """A model on this machine, with transformers; it is loaded at the first prompt.

    The prompt ends with the reply's beginning, ``{"answer": ``, so that even a small model keeps
    to the form; generation ends with the first complete object.
    """

    def __init__(self, settings: LocalSettings) -> None:
        self._settings = settings
        self._loaded: tuple[Any, Any, torch.device] | None = None
        self._lock = threading.Lock()  # the model runs one prompt at a time

    @property
    @override
    def name(self) -> str:
        return "local"

    @property
    @override
    def model(self) -> str:
        return self._settings.model

    @override
    def settings(self) -> Mapping[str, Any]:
        return {
            "temperature": 0,
            "revision": self._settings.revision,
            "dtype": self._settings.dtype,
            "max_output_tokens": self._settings.max_output_tokens,
        }

    @override
    def describe(self) -> Mapping[str, Any]:
        import transformers

        return {"transformers": transformers.__version__, "device": self._settings.device}

    def _load(self) -> tuple[Any, Any, torch.device]:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        settings = self._settings
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        where = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(settings.model, **where)
            model: Any = AutoModelForCausalLM.from_pretrained(
                settings.model,
                dtype=settings.dtype,
                use_safetensors=True,  # the other format is a pickle, which can run code
                **where,
            )
        except (OSError, ValueError) as error:
            raise ModelError(
                f"the judge's model '{settings.model}' cannot be loaded: {error}"
            ) from error
        return tokenizer, model.to(device).eval(), torch.device(device)

    @override
    def ask(self, prompt: Prompt, timeout: float) -> Completion:
        with self._lock:
            if self._loaded is None:
                self._loaded = self._load()
            return self._generate(prompt, timeout, *self._loaded)

    def _generate(
        self, prompt: Prompt, timeout: float, tokenizer: Any, model: Any, device: torch.device
    ) -> Completion:
        import torch

        begun = f'{{"{prompt.field}": '
        ids = self._ids(prompt, begun, tokenizer)
        longest = getattr(model.config, "max_position_embeddings", None)
        room = None if longest is None else longest - self._settings.max_output_tokens
        if room is not None and len(ids) > room:
            reason = f"the prompt has {len(ids)} tokens; the model takes {room}"
            raise UndecidedError(How.TOO_LONG, reason)
        input_ids = torch.tensor([ids], device=device)
        with torch.inference_mode():
            out = model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                do_sample=False,
                max_new_tokens=self._settings.max_output_tokens,
                max_time=timeout,
                pad_token_id=tokenizer.eos_token_id or 0,
                stop_strings=["}"],
                tokenizer=tokenizer,
            )
        new = out[0, len(ids) :].tolist()
        text = begun + tokenizer.decode(new, skip_special_tokens=True)
        tokens = (len(ids), len(new))
        try:
            _, end = json.JSONDecoder().raw_decode(text)
        except ValueError:
            # If the reply is not merely cut off, validation says what is wrong with it.
            if len(new) >= self._settings.max_output_tokens:
                raise UndecidedError(
                    How.TRUNCATED,
                    "the reply stopped at max_output_tokens",
                    said=text,
                    tokens=tokens,
                ) from None
            return Completion(text, *tokens)
        return Completion(text[:end], *tokens)

    @staticmethod
    def _ids(prompt: Prompt, begun: str, tokenizer: Any) -> list[int]:
        """Returns the prompt's ids; control tokens in question and response are encoded as text."""
        mark = next(c for c in map(chr, range(0x100000, 0x10FFFE)) if c not in prompt.user)
        if tokenizer.chat_template:
            messages = [
                {"role": "system", "content": prompt.system},
                {"role": "user", "content": mark},
            ]
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            before, _, after = text.partition(mark)
            ids = tokenizer.encode(before, add_special_tokens=False)
        else:
            before, after = f"{prompt.system}\n\n", "\n\n"
            ids = tokenizer.encode(before, add_special_tokens=True)
            if ids and ids[-1] == tokenizer.eos_token_id:
                ids = ids[:-1]
        ids = ids + text_ids(prompt.user, tokenizer)
        return list(ids + tokenizer.encode(after + begun, add_special_tokens=False))

    @override
    def close(self) -> None:
        self._loaded = None


def text_ids(text: str, tokenizer: Any) -> list[int]:
    """Returns the ids of a text without any added token, even where the text spells one.

    A spelled token is cut after its first character. (Tokenizers can read special tokens as text,
    but not other added tokens, such as DeepSeek's turn marks.) Added tokens that are only spaces
    are kept: they control nothing.
    """
    text = text.encode("utf-8", "replace").decode("utf-8")
    added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.content.strip()]
    cuts = [0]
    if added:
        written = re.compile(f"(?={'|'.join(map(re.escape, added))})")
        cuts += [match.start() + 1 for match in written.finditer(text)]
    ends = [*cuts[1:], len(text)]
    ids: list[int] = []
    for start, end in zip(cuts, ends, strict=True):
        ids += tokenizer.encode(text[start:end], add_special_tokens=False)
    return ids
