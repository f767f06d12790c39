"""Renders conversations as token ids with the checkpoint's chat template, without drift.

The ids that the student sampled are kept; they are not decoded and encoded again. The template's
text around an observation is encoded separately and appended. The result equals the template's
tokenisation of the whole conversation, because every piece starts or ends at a control token, and
no tokenizer merges across one (drift elsewhere: trl #5224, verl #6719).

Text that only looks like a control token (a question that contains ``<|im_end|>``) is encoded as
ordinary text, so that no question, file name or tool output can forge a turn or an image. A tag
that is a special token (`reopold_agent.policies.tags`) is the model's token in the system message
and the student's turns, and text in a user's.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from reopold_agent.errors import ModelError, first_line
from reopold_agent.policies.tags import special_tags, split_at
from reopold_agent.policies.templates import SHIPPED, ChatTemplate, chat_template
from reopold_agent.types import IMAGE_MARK, EncodedImage, Message, Observation

IMAGE_TOKEN = "<|image_pad|>"
FORBIDDEN_TOKENS = (IMAGE_TOKEN, "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
"""Never sampled: image tokens without a picture would not match the number of image features."""

_ANSWER = "\N{INVISIBLE SEPARATOR}student\N{INVISIBLE SEPARATOR}"
_THOUGHT = f"\N{INVISIBLE SEPARATOR}thought\N{INVISIBLE SEPARATOR}\n</think>\n\n{_ANSWER}"
"""A turn of a reasoning model, whose ``<think>`` some templates write into the prompt."""

_MARK = re.compile(r"<[|\N{FULLWIDTH VERTICAL LINE}][^<>\s]{1,40}[|\N{FULLWIDTH VERTICAL LINE}]>")
"""What control tokens of turns and pictures look like."""


class ChatRenderer:
    """Renders prompts and observations for one tokenizer.

    Templates that rewrite earlier turns (Qwen3's and DeepSeek-R1-Distill's drop the thoughts) can
    be used for episodes of one turn only; `check_appends` and `continuation` refuse them. The
    shipped ones (`reopold_agent.policies.templates`) only append.

    Args:
        tokenizer: the checkpoint's tokenizer.
        stop_at_tool_call: whether ``</tool_call>`` ends a turn.

    Raises:
        ModelError: the tokenizer has no chat template, or the template cannot be rendered, ends
            turns without a control token, or (if a setting gave it) writes control tokens that
            the tokenizer does not have.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, stop_at_tool_call: bool = True):
        if not tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer of '{tokenizer.name_or_path}' has no chat template; use an "
                "instruction-tuned checkpoint, or put its chat_template.jinja beside the tokenizer"
                f".\nOr set model.chat_template to a file or one of {', '.join(SHIPPED)}; in "
                "evaluate chat_template."
            )
        self.tokenizer = tokenizer
        self._given = isinstance(tokenizer.chat_template, ChatTemplate)
        self._template = f"of '{tokenizer.name_or_path}'"
        if isinstance(tokenizer.chat_template, ChatTemplate):
            self._template = tokenizer.chat_template.source
        added = tokenizer.added_tokens_decoder
        self._control = {token.content: i for i, token in added.items() if token.special}
        if not self._control:
            raise ModelError(f"the tokenizer of '{tokenizer.name_or_path}' has no control tokens")
        self._tags = special_tags(tokenizer)
        self._unread = frozenset(self._control.values()) - frozenset(self._tags.values())
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
        self.forbidden_ids = forbidden_ids(tokenizer)
        turns = [Message("user", ("?",)), Message("assistant", (_ANSWER,))]
        whole = self._apply(turns, False)
        self._check_marks(opening + whole)
        self._turn_marks = frozenset(mark for mark in self._unspecial if mark in whole)
        first = self._split.match(whole.rpartition(_ANSWER)[2])
        if first is None:
            raise ModelError(
                f"the chat template {self._template} does not end an assistant turn with a "
                "control token, so that the student could not end one.\nWrite one after the "
                "turn's words (<|im_end|> for Qwen's models)."
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
        question = Message("user", ("?",))
        openings = [[question]]
        if sample_prompts(self.tokenizer) is not None:  # some templates refuse a system message
            openings.append([Message("system", ("Be brief.",)), question])
        turns = [_ANSWER, _THOUGHT]
        if not self._apply([question], True).rstrip().endswith("<think>"):
            turns += [f"<think>\n{_THOUGHT}", f"<think>\n\n</think>\n\n{_ANSWER}"]
        for opening, turn in itertools.product(openings, turns):
            played = list(opening)
            for _ in range(2):
                start = self._apply(played, True) + turn
                played += [Message("assistant", (turn,)), question]
                if not self._apply(played, True).startswith(start):
                    raise self._rewrites()

    def check_words(self) -> None:
        """Checks that the template writes what the system message and the user say.

        Raises:
            ModelError: it leaves words out.
        """
        messages = [Message("system", ("Be brief.",)), Message("user", ("Who?",))]
        prompts = sample_prompts(self.tokenizer)  # None: some templates refuse a system message
        if prompts is not None:
            self._check_words(messages, self._apply(messages, True))

    def check_pictures(self) -> None:
        """Checks a template that a setting gave for a model that sees pictures.

        Raises:
            ModelError: it leaves pictures out.
        """
        if not self._given:
            return
        written = _pictures(self.tokenizer, None)
        if written.count(IMAGE_TOKEN) != 1:
            raise ModelError(
                f"the chat template {self._template} does not write {IMAGE_TOKEN} where a picture "
                "is, which the model sees.\nUse a template that does (model.chat_template="
                "qwen2_5_vl, say), or the model's own (null)."
            )
        self._check_marks(written)

    def other_prompts(self) -> bool:
        """Returns whether a template that a setting gave writes other prompts than the model's."""
        template = self.tokenizer.chat_template
        own = template.own if isinstance(template, ChatTemplate) else None
        own_prompts = None if own is None else sample_prompts(self.tokenizer, own)
        return own_prompts is not None and own_prompts != sample_prompts(self.tokenizer)

    def prompt(self, messages: Sequence[Message]) -> tuple[list[int], list[EncodedImage]]:
        """Returns the ids of a conversation for the student to continue, and its images in order.

        Each image takes one placeholder id per merged patch.

        Raises:
            ModelError: the template leaves out words of the system message or of the user.
        """
        guarded, guards = self._guard(messages)
        images = _images(messages)
        written = self._apply(guarded, True)
        self._check_words(guarded, written)
        return self._ids(written, guards, images), images

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
        return self.raw([i for i in ids if i not in self._unread])

    def turn_ids(self, text: str) -> list[int]:
        """Returns the ids of an assistant turn that the student did not sample, with its end.

        The turn ends with a tool call or with the end-of-turn token. Other control strings in the
        text are encoded as ordinary text.
        """
        ids: list[int] = []
        for piece in split_at(text, self._tags):
            if piece in self._tags:
                ids.append(self._tags[piece])
                continue
            for words in self._cut(piece, self._turn_marks):
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
        """Replaces control strings in the messages by characters that occur nowhere in them.

        Tags are replaced in a user's messages only.
        """
        messages = [Message(m.role, _joined(m.content)) for m in messages]
        whole = "".join(p for m in messages for p in m.content if isinstance(p, str))
        typed = [token for token in self._control if token in whole]
        if not typed:
            return list(messages), {}
        spare = (chr(c) for c in range(0x100000, 0x10FFFD) if chr(c) not in whole)
        guards = {next(spare): token for token in typed}

        def hide(part: str | EncodedImage, role: str) -> str | EncodedImage:
            if isinstance(part, str):
                for guard, token in guards.items():
                    if role == "user" or token not in self._tags:
                        part = part.replace(token, guard)
            return part

        hidden = [Message(m.role, tuple(hide(p, m.role) for p in m.content)) for m in messages]
        return hidden, guards

    def _continuation_text(self, observation: Message) -> str:
        """Returns what the template writes between an assistant's words and its next turn."""
        opening = Message("user", ("?",))
        start = self._apply([opening], True) + _THOUGHT
        whole = self._apply([opening, Message("assistant", (_THOUGHT,)), observation], True)
        if not whole.startswith(start):
            raise self._rewrites()
        return whole.removeprefix(start)

    def _rewrites(self) -> ModelError:
        """Returns the error for a template that rewrites earlier turns; it names a better one."""
        fitting = _shipped_instead(self.tokenizer)
        one_turn = "(rollout.max_turns=1 evaluation.max_turns=1; in evaluate agentic.max_turns=1)"
        advice = (
            f"Play one turn {one_turn}, or give a template that only appends: "
            "model.chat_template=FILE (in evaluate chat_template=FILE)."
            if fitting is None
            else f"Add model.chat_template={fitting} (in evaluate chat_template={fitting}), which "
            f"writes the same prompts and only appends; or play one turn {one_turn}."
        )
        return ModelError(
            f"the chat template {self._template} rewrites earlier turns (it drops their thoughts, "
            "or moves the system message, for example), so it cannot be used for several turns.\n"
            f"{advice}"
        )

    def _check_words(self, messages: Sequence[Message], rendered: str) -> None:
        """Checks that a rendered prompt has the words of its messages.

        Those of earlier assistant turns are not looked for: templates drop their thoughts.

        Raises:
            ModelError: words are missing.
        """
        for message in messages:
            words = [part.strip() for part in message.content if isinstance(part, str)]
            if message.role != "assistant" and not all(part in rendered for part in words):
                raise ModelError(
                    f"the chat template {self._template} leaves out words of the {message.role} "
                    "message, so that the model would not see them (a system message describes "
                    "the tools).\nUse a template that writes them: model.chat_template=FILE (in "
                    f"evaluate chat_template=FILE), or one of {', '.join(SHIPPED)}."
                )

    def _check_marks(self, rendered: str) -> None:
        """Checks that what looks like a control token in a setting's template is one.

        Raises:
            ModelError: the tokenizer would read it as ordinary text.
        """
        unknown = [mark for mark in _MARK.findall(rendered) if mark not in self._control]
        if self._given and unknown:
            raise ModelError(
                f"the chat template {self._template} writes {unknown[0]}, which is no control "
                f"token of the tokenizer of '{self.tokenizer.name_or_path}'.\nUse a template for "
                "this model: model.chat_template=FILE, or null for its own."
            )

    def _apply(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        rows = [{"role": m.role, "content": _template_content(m)} for m in messages]
        try:
            return _rendered(self.tokenizer, None, rows, add_generation_prompt)
        except Exception as error:  # a template is a program, and can fail in any way
            raise ModelError(
                f"the chat template {self._template} cannot be rendered: {first_line(error)}\n"
                "Mend it, or use another: model.chat_template=FILE (in evaluate "
                f"chat_template=FILE), or one of {', '.join(SHIPPED)}."
            ) from error


def forbidden_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Returns the ids of `FORBIDDEN_TOKENS` that the tokenizer has."""
    names = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    return tuple(names[name] for name in FORBIDDEN_TOKENS if name in names)


def _rendered(
    tokenizer: PreTrainedTokenizerBase, template: str | None, rows: Any, prompt: bool
) -> str:
    """Renders messages with a template; None is the tokenizer's."""
    return str(
        tokenizer.apply_chat_template(
            rows, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    )


def sample_prompts(
    tokenizer: PreTrainedTokenizerBase, template: str | None = None
) -> list[str] | None:
    """Returns how a template writes prompts of one turn; None if it cannot be rendered.

    Args:
        tokenizer: renders.
        template: the template; None takes the tokenizer's.
    """
    user, system = {"role": "user", "content": "?"}, {"role": "system", "content": "!"}
    try:
        return [_rendered(tokenizer, template, rows, True) for rows in ([user], [system, user])]
    except Exception:  # as in `ChatRenderer._apply`
        return None


def _pictures(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str:
    """Returns how a template writes a picture; "" if it cannot be rendered with one."""
    row = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
    try:
        return _rendered(tokenizer, template, [row], True)
    except Exception:  # as in `ChatRenderer._apply`: text-only templates do not expect a list
        return ""


def _shipped_instead(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns the name of the shipped template that writes a tokenizer's prompts, if one does."""
    prompts, sees = sample_prompts(tokenizer), IMAGE_TOKEN in _pictures(tokenizer, None)
    for name in SHIPPED:
        text = chat_template(name)
        same = prompts is not None and sample_prompts(tokenizer, text) == prompts
        if same and (IMAGE_TOKEN in _pictures(tokenizer, text)) == sees:
            return name
    return None


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
