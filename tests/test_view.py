"""A teacher's view: the teacher reads another prompt and other pixels, the student never does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_chat import whole_conversation
from test_gkd import logps_of, plain_divergence
from test_rollout import T1, ScriptedPolicy
from typing_extensions import override

from reopold_agent.common.pixels import PixelLimits, ShownSizes
from reopold_agent.config import PixelConfig, PixelsConfig, ViewConfig, ViewPixels
from reopold_agent.demo.tasks import DemoTasks
from reopold_agent.envs.pixel_reasoner import PixelReasonerEnv
from reopold_agent.objectives import DivergenceSettings
from reopold_agent.policies.attention import attend_by_rows
from reopold_agent.policies.batch import TrajectoryBatch
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.policies.vision import VisionProcessor
from reopold_agent.rollout.chat import ChatRenderer, observation_message
from reopold_agent.rollout.reading import Reader
from reopold_agent.rollout.runner import EpisodeSpec, RolloutLimits, RolloutRunner
from reopold_agent.train.rows import Row
from reopold_agent.train.scoring import Scoring
from reopold_agent.types import Message, Request, Task, Trajectory

PIXELS = PixelsConfig(PixelConfig(3136, 3136), PixelConfig(3136, 3136))
SHARP = ViewPixels(PixelConfig(12544, 12544), PixelConfig(6272, 6272))
TASKS = 4

CROP = (
    '<tool_call>\n{"name": "crop_image", "arguments": {"bbox_2d": [0, 0, 0.6, 0.5], '
    '"target_image": 1}}\n</tool_call>'
)
FRAMES = (
    '<tool_call>\n{"name": "select_frames", "arguments": {"target_frames": [2, 1]}}\n</tool_call>'
)


class WithWords(PixelReasonerEnv):
    """Tells the teacher where to look."""

    @override
    def teacher_prompt(self, task: Task) -> str | None:
        return f"Look at {task.id}."


def env_of(**settings: Any) -> PixelReasonerEnv:
    """Pictures, and videos of several frames."""
    tasks = DemoTasks("train", TASKS, 3, video_share=0.5)
    return WithWords(data={"train": tasks, "eval": tasks}, max_turns=3, **settings)


@pytest.fixture
def play(
    chat: ChatRenderer, vision: VisionProcessor, say: Callable[..., list[int]]
) -> Callable[..., list[Trajectory]]:
    """``play(view)``: the same scripted episodes of up to three turns, as a teacher reads them."""

    def script(request: Request, turn: int) -> list[int]:
        text = [FRAMES if request.key % 2 else CROP, CROP, "It is \\boxed{3}."][turn]
        return say(f"Turn {turn}. " + text, end=request.key % 3 > 0)

    def run(view: ViewConfig | None, **settings: Any) -> list[Trajectory]:
        reader = None
        if view is not None:
            reader = Reader(view, chat, vision, pixels=PIXELS, max_tokens=settings.get("context"))
        runner = RolloutRunner(
            env_of,
            chat,
            vision,
            prompt_pixels=PixelLimits(3136, 3136),
            observation_pixels=PixelLimits(3136, 3136),
            limits=RolloutLimits(max_turns=3),
            reader=reader,
        )
        episodes = [EpisodeSpec("train", i) for i in range(TASKS)]
        try:
            return runner.run(ScriptedPolicy(script), episodes, T1, (1,))
        finally:
            runner.close()

    return run


@pytest.fixture(scope="module")
def teachers(
    make_model: Callable[..., Any], make_policy: Callable[..., TransformersPolicy]
) -> dict[str, TransformersPolicy]:
    packed = make_model(7)
    attend_by_rows(packed, "sdpa")
    return {"padded": make_policy(make_model(7)), "packed": make_policy(packed)}


def by_hand(
    trajectory: Trajectory, vision: VisionProcessor, view: ViewConfig, hint: str | None
) -> list[Message]:
    """The conversation as a teacher should read it, from a second play of the environment."""
    env = env_of()
    seen = PixelLimits(**vars(PIXELS.prompt))
    env.sizes = ShownSizes(seen, seen, vision.factor)  # as the student sees the pictures
    observation, info = env.reset(options={"split": "train", "index": trajectory.index})
    assert env.episode is not None
    own = view.pixels
    prompt = own.prompt or PIXELS.prompt
    originals: Sequence[Any] = env.episode.images if own.prompt else observation["images"]
    limits = PixelLimits(**vars(prompt))
    shown = observation_message(observation, [vision.encode(i, limits) for i in originals])
    words = () if hint is None else (f"\n\n{hint}",)
    messages = [
        Message("system", (env.with_tools(view.system) if view.system else info["system_prompt"],)),
        Message("user", (*shown.content, *words)),
    ]
    limits = PixelLimits(**vars(own.observation or PIXELS.observation))
    for number, turn in enumerate(trajectory.turns):
        messages.append(Message("assistant", (turn.text,)))
        observation = env.step(turn.text)[0]
        if number + 1 < len(trajectory.turns):
            images = [vision.encode(image, limits) for image in observation["images"]]
            messages.append(observation_message(observation, images))
    return messages


@pytest.mark.parametrize("rows", ["padded", "packed"])
def test_an_empty_view_reads_what_the_student_read(
    play: Any, teachers: dict[str, TransformersPolicy], rows: str
) -> None:
    plain, read = play(None), play(ViewConfig())
    assert all(t.reading is None and t.for_teacher is t for t in plain)
    assert sum(len(t.turns) == 3 for t in read) == TASKS
    assert max(len(t.images) for t in read) > 4
    for one, other in zip(plain, read, strict=True):
        assert other.reading is not None
        mine = other.reading.trajectory
        for name in ("ids", "loss_mask", "logp", "entropy"):
            assert np.array_equal(getattr(mine, name), getattr(one, name)), name
        assert mine.images == other.images
        assert mine.prompt_length == one.prompt_length
    for each in (plain, read):
        problems = Scoring(teachers[rows]).finish([Row(t) for t in each], 0)
        assert not problems.failed
        assert not problems.invalid
    for one, other in zip(plain, read, strict=True):
        assert one.teacher_logp is not None
        assert np.array_equal(one.teacher_logp, other.teacher_logp)


VIEWS = [
    (ViewConfig(system="Zoom in before you answer."), None),
    (ViewConfig(pixels=SHARP), None),
    (ViewConfig(pixels=ViewPixels(observation=SHARP.observation)), None),
    (ViewConfig(hint="answer", template="({hint})"), lambda t, answer: f"({answer})"),
    (ViewConfig(hint="environment"), lambda t, answer: f"Look at {t.task_id}."),
    (
        ViewConfig(system="Look.", hint="feedback", template="<{hint}>", pixels=SHARP),
        lambda t, answer: (
            "<The attempt was successful.>"
            if answer == "3"
            else "<The attempt failed: its answer is wrong.>"
        ),
    ),
]


@pytest.mark.parametrize(
    ("view", "words", "rows"),
    [*((*each, "padded") for each in VIEWS), (*VIEWS[-1], "packed")],
)
def test_the_teacher_reads_the_conversation_rendered_by_hand(
    play: Any,
    teachers: dict[str, TransformersPolicy],
    chat: ChatRenderer,
    vision: VisionProcessor,
    view: ViewConfig,
    words: Any,
    rows: str,
) -> None:
    teacher = teachers[rows]
    plain, trajectories = play(None), play(view)
    answers = [task.answers[0] for task in DemoTasks("train", TASKS, 3, video_share=0.5)]
    assert "3" in answers
    by_itself = []
    for before, t in zip(plain, trajectories, strict=True):
        hint = None if words is None else words(t, answers[t.index])
        messages = by_hand(t, vision, view, hint)
        expected = whole_conversation(chat.tokenizer, messages, False)
        read = t.for_teacher
        # The template ends every turn; the student's last one may have no end.
        assert expected[: len(read.ids)] == read.ids.tolist()
        assert len(expected) - len(read.ids) <= 2
        images = [part for m in messages for part in m.content if not isinstance(part, str)]
        assert read.images == images
        # The student's tokens are its own, and it has read nothing of this.
        assert read.ids[read.loss_mask].tolist() == t.ids[t.loss_mask].tolist()
        assert np.array_equal(t.ids, before.ids)
        assert t.images == before.images
        assert t.ids.tolist() != read.ids.tolist() or view.pixels.prompt is not None
        by_itself.append(score_by_hand(teacher, expected, images, read))
    problems = Scoring(teacher).finish([Row(t) for t in trajectories], 0)
    assert not problems.failed
    for t, wanted in zip(trajectories, by_itself, strict=True):
        found = t.teacher_logp
        assert found is not None
        assert found.shape == t.ids.shape
        assert not found[~t.loss_mask].any()
        np.testing.assert_allclose(found[t.loss_mask], wanted, rtol=1e-4, atol=1e-4)
    unread = teacher.score(plain)
    moved = [
        np.abs(t.teacher_logp - s.logp).max() for t, s in zip(trajectories, unread, strict=True)
    ]
    assert min(moved) > 1e-3


def score_by_hand(
    teacher: TransformersPolicy, ids: list[int], images: list[Any], read: Trajectory
) -> Any:
    """Log-probs of the student's tokens from the model's own logits over the conversation."""
    banned = teacher.banned.tolist()
    with torch.no_grad():
        pixel_values, grids = teacher.adapter.vision.patches(images)  # type: ignore[union-attr]
        positions = teacher.adapter.positions(ids, images)
        inputs: dict[str, Any] = {"attention_mask": None}
        if teacher.adapter.packed:
            places = torch.arange(len(ids))[None]
            inputs["position_ids"] = torch.cat([places[None], positions[:, None]])
        else:
            inputs["position_ids"] = positions[:, None]
        logits = teacher.adapter.model(
            input_ids=torch.tensor([ids]),
            pixel_values=pixel_values,
            image_grid_thw=grids,
            use_cache=False,
            **inputs,
        ).logits[0]
    logits[:, banned] = -torch.inf
    logp = torch.log_softmax(logits.double(), -1)
    return [float(logp[i - 1, ids[i]]) for i in np.flatnonzero(read.loss_mask)]


@pytest.mark.parametrize("settings", [DivergenceSettings(0.5), DivergenceSettings(1.0, 5)])
def test_whole_distributions_under_a_view(
    play: Any,
    teachers: dict[str, TransformersPolicy],
    policy: TransformersPolicy,
    chat: ChatRenderer,
    settings: DivergenceSettings,
) -> None:
    teacher = teachers["padded"]
    trajectories = play(ViewConfig(hint="answer", pixels=SHARP))
    allowed = [i for i in range(len(chat.tokenizer)) if i not in chat.forbidden_ids]
    found, _ = policy.divergence(trajectories, teacher, settings)
    read = [t.for_teacher for t in trajectories]
    own, _ = logps_of(policy, TrajectoryBatch.build(policy.adapter, trajectories), allowed)
    with torch.no_grad():
        his, _ = logps_of(teacher, TrajectoryBatch.build(teacher.adapter, read), allowed)
    p, q = own.exp(), his.exp()
    if settings.top_k is not None:
        ids = his.topk(settings.top_k).indices
        p, q = p.gather(1, ids), q.gather(1, ids)
        p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    wanted = plain_divergence(p, q, settings.beta)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4)


def test_a_reading_longer_than_the_teachers_context_is_dropped(
    play: Any, policy: TransformersPolicy
) -> None:
    longest = max(len(t.for_teacher.ids) for t in play(ViewConfig(pixels=SHARP)))
    rows = [Row(t) for t in play(ViewConfig(pixels=SHARP), context=longest)]
    problems = Scoring(policy).finish(rows, 0)
    dropped = [r for r in rows if len(r.trajectory.for_teacher.ids) == longest]
    assert problems.failed == dropped
    assert 0 < len(dropped) < len(rows)
    assert dropped[0].trajectory.reading is not None
    assert f"{longest} tokens" in str(dropped[0].trajectory.reading.error)
    assert [r.trajectory.teacher_logp is None for r in rows] == [r in dropped for r in rows]
    all_long = [Row(replace(r.trajectory)) for r in dropped]
    with pytest.raises(ValueError, match="can read no episode"):
        Scoring(policy).finish(all_long, 0)
