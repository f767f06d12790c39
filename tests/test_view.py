"""A teacher's view: the teacher reads another prompt and other pixels, the student never does."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import assert_same_weights, composed, results, train, train_rows
from step_rows import states_of
from test_chat import whole_conversation
from test_engine_objectives import crash_before
from test_gkd import logps_of, plain_divergence
from test_rollout import T1, ScriptedPolicy
from typing_extensions import override

from reopold_agent.common.pixels import PixelLimits, ShownSizes
from reopold_agent.config import PixelConfig, PixelsConfig, ViewConfig, ViewPixels
from reopold_agent.data import load_tasks
from reopold_agent.demo.tasks import DemoTasks
from reopold_agent.envs.pixel_reasoner import PixelReasonerEnv
from reopold_agent.errors import ConfigError, DataError, ModelServerError
from reopold_agent.objectives import DivergenceSettings, make_objective
from reopold_agent.policies.attention import attend_by_rows
from reopold_agent.policies.batch import TrajectoryBatch
from reopold_agent.policies.loading import ModelSpec, load_processing
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.policies.vision import VisionProcessor
from reopold_agent.rollout.chat import ChatRenderer, observation_message
from reopold_agent.rollout.from_config import make_runner
from reopold_agent.rollout.reading import Reader, feedback, hint_of
from reopold_agent.rollout.runner import EpisodeSpec, RolloutLimits, RolloutRunner
from reopold_agent.rollout.view_checks import check_view
from reopold_agent.tracking.trajectories import trajectory_record
from reopold_agent.train import finish
from reopold_agent.train.banner import self_teacher_note
from reopold_agent.train.rows import Row
from reopold_agent.train.scoring import Scoring
from reopold_agent.train.setup import evaluated_by
from reopold_agent.train.verl.supported import check_settings
from reopold_agent.types import Message, Request, StopReason, Task, TokenScores, Trajectory

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
    """``play(view)``: the same scripted episodes of up to three turns, as a teacher reads them;
    with ``by_teacher`` it is the teacher who plays."""

    def script(request: Request, turn: int) -> list[int]:
        text = [FRAMES if request.key % 2 else CROP, CROP, "It is \\boxed{3}."][turn]
        return say(f"Turn {turn}. " + text, end=request.key % 3 > 0)

    def run(
        view: ViewConfig | None, *, by_teacher: bool = False, **settings: Any
    ) -> list[Trajectory]:
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
            reader=None if by_teacher else reader,
            plays_as=reader if by_teacher else None,
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


@pytest.mark.parametrize(("view", "words"), VIEWS)
def test_a_teacher_that_plays_reads_its_view(
    play: Any, chat: ChatRenderer, vision: VisionProcessor, view: ViewConfig, words: Any
) -> None:
    answers = [task.answers[0] for task in DemoTasks("train", TASKS, 3, video_share=0.5)]
    for t in play(view, by_teacher=True):
        # There is no feedback on an attempt that has yet to be made.
        told = words is not None and view.hint != "feedback"
        messages = by_hand(t, vision, view, words(t, answers[t.index]) if told else None)
        expected = whole_conversation(chat.tokenizer, messages, False)
        assert expected[: len(t.ids)] == t.ids.tolist()
        assert t.images == [
            part for m in messages for part in m.content if not isinstance(part, str)
        ]
        assert t.reading is None


def test_each_teacher_is_evaluated_with_its_view(
    chat: ChatRenderer, vision: VisionProcessor, say: Callable[..., list[int]]
) -> None:
    teacher = load_processing(ModelSpec("demo:student"), "teacher")
    config = composed("model.teacher.path=self", "model.teacher.view.system='Look at the card.'")[0]
    runner = make_runner(config, chat, vision, split="eval")
    (own,) = evaluated_by(config, runner, {"teacher": teacher}).distinct
    spec = EpisodeSpec("eval", 0)
    policy = ScriptedPolicy(lambda *_: say("It is \\boxed{3}."))
    prompts = []
    for each in (runner, own):
        try:
            (episode,) = each.run(policy, [spec], T1, (1,))
        finally:
            each.close()
        prompts.append(chat.raw(episode.ids[: episode.prompt_length].tolist()))
    assert "Look at the card." in prompts[1]
    assert "Look at the card." not in prompts[0]


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
    states = states_of(trajectories, teacher)
    found, _ = policy.divergence(trajectories, teacher, states, settings)
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


class Beside:
    """A teacher that scores beside the rollout: minus the number of each id's place."""

    scoring_threads = 2

    def score(
        self, trajectories: Sequence[Trajectory], *, with_entropy: bool = False
    ) -> list[TokenScores]:
        return [
            TokenScores(-np.arange(1, len(t.ids) + 1, dtype=np.float32), t.entropy)
            for t in trajectories
        ]


def test_a_teacher_elsewhere_gets_its_own_form(play: Any) -> None:
    trajectories = play(ViewConfig(system="Zoom in.", pixels=SHARP))
    scoring = Scoring(Beside())  # type: ignore[arg-type]  # it generates nothing
    rows = [Row(t) for t in trajectories]
    for row in rows[:2]:
        scoring.begin(row)
    assert not scoring.finish(rows, 0).failed
    scoring.close()
    for t in trajectories:
        places = np.flatnonzero(t.for_teacher.loss_mask) + 1
        assert t.teacher_logp is not None
        assert (-t.teacher_logp[t.loss_mask]).tolist() == places.tolist()


def test_what_a_server_fails_is_counted_without_what_its_teacher_cannot_read(play: Any) -> None:
    class Failing(Beside):
        def score(
            self, trajectories: Sequence[Trajectory], *, with_entropy: bool = False
        ) -> list[TokenScores]:
            if trajectories[0].index in failing:
                raise ModelServerError("full")
            return super().score(trajectories)

    rows = [Row(t) for t in play(ViewConfig(system="Zoom in.", pixels=SHARP))]
    last = rows[-1].trajectory
    assert last.reading is not None
    last.reading = replace(last.reading, error="too long")
    failing = {row.trajectory.index for row in rows[:-2]}
    scoring = Scoring(Failing())  # type: ignore[arg-type]  # it generates nothing
    # One row has scores, though as many failed as there were to score.
    assert len(scoring.finish(rows, 0).failed) == len(rows) - 1
    assert rows[-2].trajectory.teacher_logp is not None
    failing.add(rows[-2].trajectory.index)
    with pytest.raises(ModelServerError, match="the teacher scored nothing; full"):
        scoring.finish(rows, 0)
    scoring.close()


# Settings


HINTED = ("model.teacher.path=self", "model.teacher.view.hint=answer")


def test_self_is_the_students_checkpoint() -> None:
    config, raw = composed("model.teacher.path=self", "model.student.path=demo:teacher")
    assert config.model.teacher is not None
    assert config.model.teacher.path == "demo:teacher"
    assert config.model.self_taught == ["default"]
    assert raw["model"]["teacher"]["path"] == "self"
    assert config.model.teacher.view.empty
    objective = make_objective("reopold", {})
    mixed = ("env=[pixel_reasoner,math]", "model=demo", "model.teacher=null")
    for words, what in (
        (("model.teacher.path=self",), "model.teacher: the student's own start"),
        (("model.teacher.path=self", "model.teacher.follow=0.9"), "an average of the student"),
        (("model.teacher.follow=0.0", "model.teacher.follow_every=2"), "a copy of the student"),
        ((*mixed, "model.teachers={default: demo:teacher, math: self}"), "model.teachers.math: "),
    ):
        told = str(self_teacher_note(composed(*words)[0], objective))
        assert what in told
        assert "only hold the student" in told
    assert self_teacher_note(composed(*HINTED)[0], objective) is None
    assert self_teacher_note(composed()[0], objective) is None
    assert (
        self_teacher_note(composed("model.teacher.path=self")[0], make_objective("grpo", {}))
        is None
    )
    composed(*HINTED, "model.teacher.follow=0.0")  # a copy that knows more


COPY = ("model.teacher.path=self", "model.teacher.follow=0.0")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (COPY, "every reward is 0.\nGive it model.teacher.view"),
        (COPY[1:], "every reward is 0.\nGive it model.teacher.view"),  # after a step
        (("model.teacher.view.hint=answers",), "hint must be one of .* Did you mean 'answer'"),
        (("model.teacher.view.template='Psst: {hint}'",), "view.hint is null.\nChoose a hint"),
        ((*HINTED, "model.teacher.view.template=Psst"), "has no {hint}, .*\nWrite that"),
        ((*HINTED, "objective=grpo"), "objective=grpo asks for no scores.\nLeave it out"),
        ((*HINTED, "objective=sft"), "objective=sft asks for no scores.\nLeave it out"),
        (
            ("model.teacher.view.hint=solution",),
            "has no reference solution.\nName its column with data.train.solution=COLUMN",
        ),
        (
            ("model.teacher.view.hint=environment",),
            "no words from PixelReasonerEnv.teacher_prompt.\nOverride this method",
        ),
        (
            (*HINTED, f"model.teacher.view.system={'word ' * 3000}"),
            "prompt of task demo-train-0-0 has .* tokens; at most .*\nShorten the view",
        ),
        (
            (
                *("env=math", "model=arithmetic"),
                "model.teacher.view.pixels.prompt={min_pixels: 3136, max_pixels: 3136}",
            ),
            "the student reads text only.\nLeave it out",
        ),
    ],
)
def test_views_that_cannot_work(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message.replace("{", r"\{")) as caught:
        train(tmp_path, *words)
    assert len(str(caught.value).splitlines()) == 2 or "Did you mean" in message
    assert not (tmp_path / "config.yaml").exists()


def test_held_out_tasks_need_the_hint_if_the_teacher_plays_them() -> None:
    student = load_processing(ModelSpec("demo:student"), "student")
    config = composed("model.teacher.path=self", "model.teacher.view.hint=environment")[0]
    envs = "reopold_agent.rollout.view_checks.make_env"

    class OnlyTrain(PixelReasonerEnv):
        @override
        def teacher_prompt(self, task: Task) -> str | None:
            return "Look." if "train" in task.id else None

    def made(*_: Any) -> PixelReasonerEnv:
        tasks = {split: DemoTasks(split, TASKS, 3) for split in ("train", "eval")}
        return OnlyTrain(data=tasks, max_turns=3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(envs, made)
        with pytest.raises(DataError, match=r"Or use evaluation\.teacher=false") as caught:
            check_view(config, config.model.teacher, student, None)
        assert len(str(caught.value).splitlines()) == 2
        check_view(
            replace(config, evaluation=replace(config.evaluation, teacher=False)),
            config.model.teacher,
            student,
            None,
        )


def test_a_hint_needs_a_task_that_has_one() -> None:
    view, task = ViewConfig(hint="answer"), Task("lake-3", "Walk.")
    with pytest.raises(
        DataError, match="task lake-3 has no answer, its environment decides"
    ) as one:
        hint_of(view, env_of(), task)
    with pytest.raises(DataError, match="object is no ToolEnv") as other:
        hint_of(view, object(), None)
    assert [len(str(each.value).splitlines()) for each in (one, other)] == [2, 2]


def test_verl_refuses_a_view() -> None:
    config = composed(*HINTED, "engine=verl", "engine.device=cpu")[0]
    with pytest.raises(ConfigError, match=r"does not support model\.teacher\.view\.\nUse"):
        check_settings(config)


def test_reference_solutions_are_a_column_of_the_rows(tmp_path: Path) -> None:
    rows = [
        {"question": "1+1?", "answer": "2", "why": "Count to 2."},
        {"question": "1+2?", "answer": "3", "why": [{"role": "assistant", "content": "Go on."}]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    spec = {"source": "math_jsonl", "path": str(path)}
    tasks = load_tasks({**spec, "solution": "why"})
    env = WithWords(data={"train": tasks})
    view = ViewConfig(hint="solution")
    assert [hint_of(view, env, task) for task in tasks] == ["Count to 2.", "Go on."]
    assert "solution" not in load_tasks({**spec, "solution": None})[0].metadata
    with pytest.raises(DataError, match="no reference solution in the column 'because'"):
        load_tasks({**spec, "solution": "because"})


def test_records_show_what_the_teacher_read(play: Any, chat: ChatRenderer) -> None:
    read, plain = (
        play(view)[0] for view in (ViewConfig(hint="answer", template="Psst {hint}"), None)
    )
    hinted, usual = (trajectory_record(t, 0, decode=chat.raw) for t in (read, plain))
    assert "Psst" in hinted["teacher_prompt"]
    assert "Psst" not in hinted["prompt"]
    assert hinted["prompt"] == usual["prompt"]
    assert "teacher_prompt" not in usual


def test_feedback_is_the_environments_word(play: Any) -> None:
    (first, *_) = play(None)
    assert feedback(replace(first, success=True)) == "The attempt was successful."
    cut = replace(first, success=False, stop_reason=StopReason.MAX_TURNS)
    assert "cut off" in feedback(cut)
    own = replace(first, info={"feedback": "Line 3: NameError"})
    assert feedback(own) == "Line 3: NameError"


@pytest.mark.parametrize("objective", ["reopold", "gkd"])
def test_a_student_that_teaches_itself_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    monkeypatch.setattr(finish, "make_plots", lambda folder: None)
    words = (
        *HINTED,
        "model.teacher.view.pixels.prompt={min_pixels: 6272, max_pixels: 6272}",
        "model.teacher.follow=0.5",
        f"objective={objective}",
        "optimizer.lr=1e-3",
        "evaluation.tasks=0",
        "checkpoint.every=2",
    )
    with torch.random.fork_rng(devices=[]):
        train(tmp_path / "whole", *words)
        with monkeypatch.context() as patch:
            crash_before(patch, 3)
            with pytest.raises(SystemExit):
                train(tmp_path / "broken", *words)
        train(tmp_path / "broken", *words)
    assert results(tmp_path / "broken") == results(tmp_path / "whole")
    assert_same_weights(tmp_path / "broken/final", tmp_path / "whole/final")
    rewards = [row["reward/max"] for row in train_rows(tmp_path / "whole")]
    assert min(rewards) > 1e-3  # the view makes a difference
