"""Makes the form in which a teacher reads the student's episodes: its own prompt and pixels.

A teacher with a view (``model.teacher.view``) reads the student's tokens after another prompt, with
a hint, say, and sees the pictures at its own size. A `Reader` collects what the environment shows
(`Shown`) while the student plays, and makes the teacher's form of the episode (`Reading`) when it
has ended. The student's prompt and tokens are not touched.

What a hint may be is as in OPSD (arXiv 2601.18734: a reference solution, in the words of its figure
2) and SDPO (arXiv 2601.20802: the environment's feedback on this very attempt). The words around
it can be replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import gymnasium
import numpy as np
from PIL import Image

from reopold_agent.common.pixels import PixelLimits
from reopold_agent.config import HINT, PixelsConfig, ViewConfig
from reopold_agent.envs.base import ToolEnv
from reopold_agent.errors import DataError
from reopold_agent.policies.spans import Aligner, TokenBytes
from reopold_agent.policies.vision import VisionProcessor
from reopold_agent.rollout.chat import ChatRenderer, observation_message
from reopold_agent.types import (
    EncodedImage,
    Message,
    Observation,
    PixelArray,
    Reading,
    StopReason,
    Task,
    Trajectory,
)

TEMPLATES: Mapping[str, str] = {
    "answer": f"The correct answer is {HINT}. Solve the problem with your own reasoning, so that "
    "it leads to this answer.",
    "solution": f"Here is a reference solution:\n{HINT}\n\nAfter understanding the reference "
    "solution, please try to solve this problem using your own approach below:",
    "feedback": f"The following is feedback on your attempt at this problem:\n{HINT}\n\nCorrectly "
    "solve the original question.",
    "environment": HINT,
}
"""The words around each kind of hint."""


@dataclass
class Shown:
    """What an environment shows in an episode, as the teacher sees it.

    Attributes:
        prompt: the first messages, without the hint.
        hint: what the task says to the teacher; None if that is known only at the end, or nothing.
        observations: the messages that answered the student's turns.
    """

    prompt: list[Message]
    hint: str | None
    observations: list[Message] = field(default_factory=list)


@dataclass(frozen=True)
class Opening:
    """What an environment knows at the start of an episode and does not show to the student.

    Attributes:
        system: the teacher's own system message, with the environment's tools; None: the student's.
        hint: for the teacher, as `hint_of` found it.
        originals: the question's pictures at full size; None if the environment does not have them.
    """

    system: str | None
    hint: str | None
    originals: tuple[PixelArray | Image.Image, ...] | None


class Reader:
    """Reads episodes as one teacher does.

    With the student's tokenizer and an empty view the teacher's form equals the student's, token by
    token.

    Args:
        view: what differs.
        chat: renders conversations for the teacher's tokenizer.
        vision: encodes pictures for the teacher; None for text-only models.
        pixels: the student's limits, for pictures whose limits the view does not give.
        aligner: translates the student's turns if the teacher's tokenizer is another.
        max_tokens: longest sequence of the teacher; None if it has no limit.
    """

    def __init__(
        self,
        view: ViewConfig,
        chat: ChatRenderer,
        vision: VisionProcessor | None,
        *,
        pixels: PixelsConfig,
        max_tokens: int | None = None,
        aligner: Aligner | None = None,
    ) -> None:
        self.view, self._chat, self._vision, self._aligner = view, chat, vision, aligner
        own = view.pixels
        self._full_size = own.prompt is not None
        self.prompt_pixels = PixelLimits(**vars(own.prompt or pixels.prompt))
        self.observation_pixels = PixelLimits(**vars(own.observation or pixels.observation))
        self.max_tokens = max_tokens

    def for_pixels(self, pixels: PixelsConfig) -> Reader:
        """Returns the reader for an environment in which the student has these limits."""
        return Reader(
            self.view,
            self._chat,
            self._vision,
            pixels=pixels,
            max_tokens=self.max_tokens,
            aligner=self._aligner,
        )

    @property
    def factor(self) -> int:
        """Patch x merge of the teacher's pictures, pixels."""
        return 28 if self._vision is None else self._vision.factor

    def opening(self, env: gymnasium.Env[Any, Any]) -> Opening:
        """Returns what an environment whose episode has begun knows for the teacher.

        Called where the environment runs.

        Raises:
            DataError: its task has no such hint.
        """
        inner = env.unwrapped
        state = inner.episode if isinstance(inner, ToolEnv) else None
        hint = None
        if self.view.hint not in (None, "feedback"):
            hint = hint_of(self.view, inner, None if state is None else state.task)
        full = None if state is None or not self._full_size else tuple(state.images)
        system = self.view.system
        if system is not None and isinstance(inner, ToolEnv):
            system = inner.with_tools(system)
        return Opening(system, hint, full)

    def begin(self, observation: Observation, info: Mapping[str, Any], opening: Opening) -> Shown:
        """Starts an episode.

        Args:
            observation, info: what the environment's ``reset`` returned.
            opening: what `opening` returned then.
        """
        turns: list[tuple[Any, Observation]] = [*info.get("history", ()), ("user", observation)]
        system = opening.system
        if system is None:
            system = str(info.get("system_prompt", ""))
        messages = [Message("system", (system,))] if system else []
        originals = opening.originals
        shown = sum(len(turn["images"]) for _, turn in turns)
        if originals is not None and len(originals) != shown:
            raise ValueError(f"the question shows {shown} pictures of {len(originals)}")
        remaining = None if originals is None else iter(originals)
        for role, turn in turns:
            count = len(turn["images"])
            pictures: Sequence[PixelArray | Image.Image] = turn["images"]
            if remaining is not None:
                pictures = [next(remaining) for _ in range(count)]
            content = observation_message(turn, self._encode(pictures, self.prompt_pixels)).content
            messages.append(Message(role, content))
        return Shown(messages, opening.hint)

    def observe(self, shown: Shown, observation: Observation) -> None:
        """Notes what the environment answered to a turn of the student."""
        images = self._encode(observation["images"], self.observation_pixels)
        shown.observations.append(observation_message(observation, images))

    def prompt(self, shown: Shown, hint: str | None) -> tuple[list[int], list[EncodedImage]]:
        """Returns the ids of the teacher's prompt, and its pictures.

        Args:
            shown: as `begin` returned it.
            hint: of the task or the episode; None without one.
        """
        messages = list(shown.prompt)
        if hint is not None:
            template = self.view.template or TEMPLATES[self.view.hint or "environment"]
            last = messages[-1]
            words = "\n\n" + template.replace(HINT, hint)
            messages[-1] = Message(last.role, (*last.content, words))
        return self._chat.prompt(messages)

    def read(self, episode: Trajectory, shown: Shown) -> Reading:
        """Returns an episode that has ended in the teacher's form."""
        hint = feedback(episode) if self.view.hint == "feedback" else shown.hint
        ids, images = self.prompt(shown, hint)
        prompt_length = len(ids)
        mask = [False] * prompt_length
        own_spans = np.full(len(episode.ids), -1)
        spans, count = [-1] * prompt_length, 0
        for turn, message in zip_longest(episode.turns, shown.observations):
            if turn is None:  # the turn after the last observation could not be generated
                break
            sampled = episode.ids[turn.start : turn.end]
            if self._aligner is None:
                ids += sampled.tolist()
                mask += episode.loss_mask[turn.start : turn.end].tolist()
            else:
                aligned = self._aligner.align(sampled.tolist())
                ids += aligned.ids.tolist()
                mask += [True] * len(aligned.ids)
                shift = np.where(aligned.student >= 0, count, 0)
                own_spans[turn.start : turn.end] = aligned.student + shift
                spans += [span + count if span >= 0 else -1 for span in aligned.teacher.tolist()]
                count += aligned.spans
            if message is not None:
                between, more = self._chat.continuation(message, ids[-1])
                ids += between
                images += more
                mask += [False] * len(between)
                spans += [-1] * len(between)
        error = None
        if self.max_tokens is not None and len(ids) >= self.max_tokens:
            error = (
                f"as the teacher reads it, it has {len(ids)} tokens, and with the one that scoring "
                f"adds more than the teacher's {self.max_tokens}"
            )
        logp, entropy = np.zeros((2, len(ids)), dtype=np.float32)
        if self._aligner is None:
            logp[mask] = episode.logp[episode.loss_mask]
            entropy[mask] = episode.entropy[episode.loss_mask]
        read = Trajectory(
            task_id=episode.task_id,
            index=episode.index,
            sample=episode.sample,
            prompt_length=prompt_length,
            ids=np.array(ids, dtype=np.int64),
            loss_mask=np.array(mask, dtype=np.bool_),
            logp=logp,
            entropy=entropy,
            images=images,
            turns=[],
            stop_reason=episode.stop_reason,
            reward=episode.reward,
            success=episode.success,
        )
        if self._aligner is None:
            return Reading(read, error)
        return Reading(
            read, error, own_spans, np.array(spans, dtype=np.int64), decode=self._chat.raw
        )

    def _encode(
        self, pictures: Sequence[PixelArray | Image.Image], limits: PixelLimits
    ) -> list[EncodedImage]:
        if not pictures:
            return []
        if self._vision is None:
            raise ValueError("the environment shows pictures, but the model reads text only")
        return [self._vision.encode(picture, limits) for picture in pictures]


@dataclass(frozen=True)
class Readers:
    """The readers of an environment whose tasks name their teachers.

    Attributes:
        named: the reader of each teacher by its name in ``model.teachers``.
        other: that of tasks that name none.
    """

    named: Mapping[str, Reader | None]
    other: Reader | None

    def of(self, teacher: str) -> Reader | None:
        """Returns the reader for the teacher that a task names; None if that reads as it is.

        Raises:
            KeyError: there is no such teacher, which the checks before a run exclude.
        """
        return self.named[teacher] if teacher else self.other


def make_aligner(student: ChatRenderer, teacher: ChatRenderer, whose: str) -> Aligner | None:
    """Makes what translates the student's turns for a teacher with another tokenizer.

    Args:
        student, teacher: render conversations for either tokenizer.
        whose: the teacher, for messages.

    Returns:
        None if both tokenizers have the same tokens, and turns end with the same one: then the
        teacher reads the very ids that the student sampled.

    Raises:
        VocabularyMismatchError: the tokenizers cannot be aligned; the message says why and where.
    """
    same = student.tokenizer.get_vocab() == teacher.tokenizer.get_vocab()
    if same and student.turn_end_id == teacher.turn_end_id:
        return None
    ours = TokenBytes(student.tokenizer, "the student")
    theirs = TokenBytes(teacher.tokenizer, whose)
    theirs.check(_SAMPLES)
    # A tool call's tag, which may end a turn as well, is a word; these are not.
    ends = [i for i in student.stop_ids if i in ours.special or i == student.turn_end_id]
    return Aligner(ours, theirs, dict.fromkeys(ends, teacher.turn_end_id))


_SAMPLES = (
    "The answer is \\boxed{12}.",
    '  I look closer.\n\n<tool_call>\n{"name": "crop_image", "arguments": {"box": [0, 1]}}\n',
    "na\u00efve \u4f60\u597d \u2211\u221a \U0001f600\tend \r\n ",
)
"""Texts whose tokens must stand for their bytes."""


def hint_of(view: ViewConfig, env: Any, task: Task | None) -> str:
    """Returns a task's hint for the teacher.

    Args:
        view: says which.
        env: the environment without its wrappers.
        task: the task; None if the environment is no `ToolEnv`.

    Raises:
        DataError: the task has none; the message says what to do.
    """
    if task is None or not isinstance(env, ToolEnv):
        raise DataError(
            f"model.teacher.view.hint={view.hint} is made from a task, and {type(env).__name__} is "
            "no ToolEnv.\nUse hint=feedback, or view.system for words that do not depend on it."
        )
    found: Mapping[str, Callable[[], str | None]] = {
        "answer": lambda: " or ".join(task.answers),
        "solution": lambda: str(task.metadata.get("solution") or ""),
        "environment": lambda: env.teacher_prompt(task),
    }
    hint = found[view.hint or ""]()
    if hint:
        return hint
    missing, instead = {
        "answer": ("has no answer, its environment decides", "hint=feedback tells the outcome"),
        "solution": (
            "has no reference solution",
            "Name its column with data.train.solution=COLUMN, or use hint=answer",
        ),
        "environment": (
            f"gets no words from {type(env).__name__}.teacher_prompt",
            "Override this method to return some for every task",
        ),
    }[view.hint or ""]
    raise DataError(
        f"model.teacher.view.hint={view.hint}, but task {task.id} {missing}.\n{instead}."
    )


def feedback(episode: Trajectory) -> str:
    """Returns the environment's verdict on an episode that has ended, in words.

    An environment says more with ``info["feedback"]`` in its last step.
    """
    own = episode.info.get("feedback")
    if isinstance(own, str) and own:
        return own
    if episode.success:
        return "The attempt was successful."
    if episode.stop_reason is StopReason.ANSWER:
        return "The attempt failed: its answer is wrong."
    return "The attempt failed: it was cut off before it gave an answer."
