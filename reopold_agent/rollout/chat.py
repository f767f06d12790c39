"""Renders conversations as token ids with the checkpoint's chat template, without drift.

The ids that the student sampled are kept; they are not decoded and encoded again. The template's
text around an observation is encoded separately and appended. The result equals the template's
tokenisation of the whole conversation, because every piece starts or ends at a control token, and
no tokenizer merges across one (drift elsewhere: trl #5224, verl #6719).

Text that only looks like a control token (a question that contains ``<|im_end|>``) is encoded as
ordinary text, so that no question, file name or tool output can forge a turn or an image.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from reopold_agent.errors import ModelError
from reopold_agent.types import IMAGE_MARK, EncodedImage, Message, Observation

IMAGE_TOKEN = "<|image_pad|>"
FORBIDDEN_TOKENS = (IMAGE_TOKEN, "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
"""Never sampled: image tokens without a picture would not match the number of image features."""

_ANSWER = "\N{INVISIBLE SEPARATOR}student\N{INVISIBLE SEPARATOR}"
_THOUGHT = f"\N{INVISIBLE SEPARATOR}thought\N{INVISIBLE SEPARATOR}\n</think>\n\n{_ANSWER}"
"""A turn of a reasoning model, whose ``<think>`` some templates write into the prompt."""


class ChatRenderer:
    """Renders prompts and observations for one tokenizer.

    Templates that rewrite earlier turns (Qwen3's and DeepSeek-R1-Distill's drop the thoughts) can
    be used for episodes of one turn only; `check_appends` and `continuation` refuse them.

    Args:
        tokenizer: the checkpoint's tokenizer.
        stop_at_tool_call: whether ``</tool_call>`` ends a turn.

    Raises:
        ModelError: the tokenizer has no chat template, or the template ends turns without a
            control token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, stop_at_tool_call: bool = True):
        if not tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer of '{tokenizer.name_or_path}' has no chat template; use an "
                "instruction-tuned checkpoint, or put its chat_template.jinja beside the tokenizer"
            )
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._control = {token.content: i for i, token in added.items() if token.special}
        if not self._control:
            raise ModelError(f"the tokenizer of '{tokenizer.name_or_path}' has no control tokens")
        # DeepSeek's turn marks are added tokens but not special ones; a question must not forge
        # them either.
        opening = self._apply([Message("user", ("?",))], True)
        self._unspecial = frozenset(
            token.content
            for token in added.values()
            if not token.special and token.content in opening
        )
        self._control |= {t.content: i for i, t in added.items() if t.content in self._unspecial}
        longest_first = sorted(self._control, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self.image_id = self._control.get(IMAGE_TOKEN)
        names = {token.content: i for i, token in added.items()}
        self.forbidden_ids = tuple(names[name] for name in FORBIDDEN_TOKENS if name in names)
        turns = [Message("user", ("?",)), Message("assistant", (_ANSWER,))]
        whole = self._apply(turns, False)
        self._turn_marks = frozenset(mark for mark in self._unspecial if mark in whole)
        first = self._split.match(whole.rpartition(_ANSWER)[2])
        if first is None:
            raise ModelError(
                "the chat template does not end an assistant turn with a control token"
            )
        self.turn_end_id = self._control[first.group()]
        stops = {self.turn_end_id}
        if tokenizer.eos_token_id is not None:
            stops.add(int(tokenizer.eos_token_id))
        if "<|endoftext|>" in names:
            stops.add(names["<|endoftext|>"])
        if stop_at_tool_call and "</tool_call>" in names:
            stops.add(names["</tool_call>"])
        self.stop_ids = tuple(sorted(stops))

    def check_appends(self) -> None:
        """Checks that the template can be used for episodes of several turns.

        Raises:
            ModelError: the template rewrites earlier turns.
        """
        self._continuation_text(Message("user", ("?",)))

    def prompt(self, messages: Sequence[Message]) -> tuple[list[int], list[EncodedImage]]:
        """Returns the ids of a conversation for the student to continue, and its images in order.

        Each image takes one placeholder id per merged patch.
        """
        guarded, guards = self._guard(messages)
        images = _images(messages)
        return self._ids(self._apply(guarded, True), guards, images), images

    def continuation(
        self, observation: Message, last_id: int
    ) -> tuple[list[int], list[EncodedImage]]:
        """Returns the ids between the student's turn and its next one, and their images.

        Args:
            observation: the user turn that answers the student.
            last_id: the last id that the student sampled; if it is the end of turn, the one that
                the template writes is left out.

        Raises:
            ModelError: the template rewrites earlier turns.
        """
        guarded, guards = self._guard([observation])
        images = _images([observation])
        ids = self._ids(self._continuation_text(guarded[0]), guards, images)
        return (ids[1:] if last_id == self.turn_end_id else ids), images

    def text(self, ids: Sequence[int]) -> str:
        """Decodes ids without control tokens and without any other change."""
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def turn_ids(self, text: str) -> list[int]:
        """Returns the ids of an assistant turn that the student did not sample, with its end.

        The turn ends with a tool call or with the end-of-turn token. Other control strings in the
        text are encoded as ordinary text.
        """
        ids: list[int] = []
        for words in self._cut(text, self._turn_marks):
            ids += self._plain(words)
        return ids if ids and ids[-1] in self.stop_ids else [*ids, self.turn_end_id]

    def raw(self, ids: Sequence[int]) -> str:
        """Decodes ids with control tokens, for records and viewers."""
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def _ids(self, text: str, guards: dict[str, str], images: list[EncodedImage]) -> list[int]:
        ids: list[int] = []
        remaining = iter(images)
        for piece in self._split.split(text):
            control = self._control.get(piece)
            if control is None:
                for words in self._unguarded(piece, guards):
                    ids += self._plain(words)
            elif control == self.image_id:
                image = next(remaining, None)
                if image is None:
                    raise ModelError("the chat template wrote more images than the messages hold")
                ids += [control] * image.tokens
            else:
                ids.append(control)
        if next(remaining, None) is not None:
            raise ModelError(
                "the chat template left out an image; this model's template takes text only"
            )
        return ids

    def _unguarded(self, piece: str, guards: dict[str, str]) -> list[str]:
        """Returns the piece with its original words, in parts that contain no control token."""
        if not guards:
            return [piece] if piece else []
        words = re.sub("[" + "".join(guards) + "]", lambda guard: guards[guard.group()], piece)
        return self._cut(words, self._unspecial)

    @staticmethod
    def _cut(text: str, tokens: Collection[str]) -> list[str]:
        """Splits the text after the first character of each token, so that no part contains one.

        A tokenizer can read special tokens as text, but not other added tokens.
        """
        if not tokens:
            return [text] if text else []
        written = re.compile("(?=" + "|".join(map(re.escape, tokens)) + ")")
        cuts = [0, *(match.start() + 1 for match in written.finditer(text)), len(text)]
        return [text[a:b] for a, b in itertools.pairwise(cuts) if a < b]

    def _plain(self, text: str) -> list[int]:
        # JSON can contain half a surrogate pair, which no tokenizer accepts.
        text = text.encode("utf-8", "replace").decode("utf-8")
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return [int(i) for i in encoded["input_ids"]]

    def _guard(self, messages: Sequence[Message]) -> tuple[list[Message], dict[str, str]]:
        """Replaces control strings in the messages by characters that occur nowhere in them."""
        messages = [Message(m.role, _joined(m.content)) for m in messages]
        whole = "".join(p for m in messages for p in m.content if isinstance(p, str))
        typed = [token for token in self._control if token in whole]
        if not typed:
            return list(messages), {}
        spare = (chr(c) for c in range(0x100000, 0x10FFFD) if chr(c) not in whole)
        guards = {next(spare): token for token in typed}

        def hide(part: str | EncodedImage) -> str | EncodedImage:
            if isinstance(part, str):
                for guard, token in guards.items():
                    part = part.replace(token, guard)
            return part

        return [Message(m.role, tuple(hide(p) for p in m.content)) for m in messages], guards

    def _continuation_text(self, observation: Message) -> str:
        """Returns what the template writes between an assistant's words and its next turn."""
        opening = Message("user", ("?",))
        start = self._apply([opening], True) + _THOUGHT
        whole = self._apply([opening, Message("assistant", (_THOUGHT,)), observation], True)
        if not whole.startswith(start):
            raise ModelError(
                f"the chat template of '{self.tokenizer.name_or_path}' rewrites earlier turns (it "
                "drops their thoughts, for example), so it cannot be used for several turns.\n"
                "Play one turn (rollout.max_turns=1 evaluation.max_turns=1; in evaluate "
                "agentic.max_turns=1), or put a chat_template.jinja that only appends beside the "
                "checkpoint's tokenizer."
            )
        return whole.removeprefix(start)

    def _apply(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        rows: Any = [{"role": m.role, "content": _template_content(m)} for m in messages]
        rendered: Any = self.tokenizer.apply_chat_template(
            rows, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return str(rendered)


def _images(messages: Sequence[Message]) -> list[EncodedImage]:
    return [part for m in messages for part in m.content if isinstance(part, EncodedImage)]


def _joined(content: Sequence[str | EncodedImage]) -> tuple[str | EncodedImage, ...]:
    """Joins neighbouring texts, as the template does: a control string may span two of them."""
    joined: list[str | EncodedImage] = []
    for part in content:
        if joined and isinstance(part, str) and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return tuple(joined)


def _template_content(message: Message) -> str | list[dict[str, str]]:
    # Text-only templates (Qwen2.5, DeepSeek) take a string; Qwen2.5-VL's takes both.
    if not _images([message]):
        return "".join(part for part in message.content if isinstance(part, str))
    return [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
        for part in message.content
    ]


def observation_message(observation: Observation, images: Sequence[EncodedImage]) -> Message:
    """Makes the user turn of an observation; ``images`` are its encoded pictures in order.

    Raises:
        ValueError: the numbers of image marks in the text and of pictures differ.
    """
    texts = observation["text"].split(IMAGE_MARK)
    if len(texts) - 1 != len(images):
        raise ValueError(
            f"an observation has {len(images)} images but {len(texts) - 1} image marks "
            "(U+FFFC) in its text"
        )
    content: list[str | EncodedImage] = []
    for position, text in enumerate(texts):
        if text:
            content.append(text)
        if position < len(images):
            content.append(images[position])
    return Message("user", tuple(content))
