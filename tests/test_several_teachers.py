"""Several teachers in one run: which teaches what, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from hydra.errors import HydraException
from running import composed, results, train

from reopold_agent.cli.groups import check_once
from reopold_agent.cli.messages import explain
from reopold_agent.config import TeacherConfig, TrainConfig
from reopold_agent.data import loading
from reopold_agent.data.checks import BadRowsError
from reopold_agent.envs.base import ToolEnv
from reopold_agent.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelServerError,
    VocabularyMismatchError,
)
from reopold_agent.objectives import GKD
from reopold_agent.plan.compose import plan_run
from reopold_agent.policies.loading import load_processing, student_spec
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.rollout import task_teachers
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.rollout.checks import checked_run
from reopold_agent.rollout.reading import Readers
from reopold_agent.rollout.runner import EpisodeSpec
from reopold_agent.rollout.task_teachers import check_task_teachers
from reopold_agent.train import finish
from reopold_agent.train.engine import run_objective
from reopold_agent.train.roles import check_roles
from reopold_agent.train.rows import Row
from reopold_agent.train.scoring import Scoring, ScoringByTeacher
from reopold_agent.train.setup import prepared, run_reader
from reopold_agent.train.teachers import Teachers, run_teachers
from reopold_agent.train.update import Updater
from reopold_agent.train.verl.records import from_row, to_row
from reopold_agent.train.verl.supported import check_settings, teacher_replicas
from reopold_agent.types import Task, TokenScores, Trajectory

NONE = "model.teacher=null"
TINY = (
    "steps=2",
    "evaluation.tasks=2",
    "evaluation.every=0",
    "batch.prompts=2",
    "batch.mini_batch=2",
)


def of(env: str, made: Trajectory) -> Trajectory:
    made.env, made.teacher_logp = env, None
    return made


# Settings


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("model.teachers={default: DIR}",),
            r"model\.teacher gives all of them another one, demo:teacher\.\n"
            r"Set one of the two to null",
        ),
        (
            (NONE, "model.teachers={math: DIR}"),
            r"model\.teachers\.math is the teacher of an environment that is not in the run, which "
            r"has pixel_reasoner\.\nLeave it out \(~model\.teachers\.math, if model= brings it\), "
            r"or add the environment to env=",
        ),
        (
            (NONE, "model.teachers={default: {pth: DIR}}"),
            r"unknown setting 'model\.teachers\.default\.pth'\. Did you mean 'model\.teachers",
        ),
        (
            ("env=[pixel_reasoner,math]", "model=demo", NONE, "model.teachers={math: DIR}"),
            r"model\.teachers has no teacher for env=pixel_reasoner\.\nAdd \+model\.teachers\.",
        ),
        (
            (NONE, "model.teachers={default: [A, B]}"),
            r"'model\.teachers\.default' must be the path of one teacher, or .*; got \['A', 'B'\]\."
            r"\nSet model\.teachers\.default=PATH or 'model\.teachers\.default=\{path: PATH",
        ),
        (
            ("env=[pixel_reasoner,math,geometry]", "model=generalist", "model.teachers.math=null"),
            r"one teacher, .*; got None\.\nSet .* or leave it out \(~model\.teachers\.math, if ",
        ),
        (
            (NONE, "model.teachers={default: {view: {hint: answer}}}"),
            r"'model\.teachers\.default' has settings, but no path\.\nGive all of them at once: "
            r"'model\.teachers\.default=\{path: PATH, view: \{hint: answer\}\}'\.",
        ),
        (
            ("env=[math,geometry]", "model=generalist", "model.teachers=null", "model.teacher=A"),
            r"'model\.teacher' must be a group of settings, got 'A'\.\n"
            r"For a path write 'model\.teacher=\{path: A\}'\.",
        ),
        (
            (NONE, "model.teachers={default: {path: DIR, follow: 0.5}}"),
            r"model\.teachers\.default\.follow: only model\.teacher can follow the student, alone",
        ),
        (
            ("model.teacher_key=domain",),
            r"model\.teacher_key=domain chooses among model\.teachers, which is not set\.\nSet ",
        ),
        (
            ("policy.teachers={math: {name: server}}",),
            r"policy\.teachers\.math is for a teacher that model\.teachers lacks\.\nLeave it out",
        ),
        (
            (NONE, "model.teachers={default: DIR}", "policy.teachers={default: server}"),
            r"'policy\.teachers\.default' must be a group of settings, got 'server'",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused_in_two_lines(
    words: tuple[str, ...], told: str
) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        composed(*words)
    assert str(caught.value).count("\n") <= 1


THREE = "env=[pixel_reasoner,math,geometry] model=generalist"


@pytest.mark.parametrize(
    ("words", "what", "advice"),
    [
        (
            f"{THREE} model.teacher.path=A model.teacher.align=bytes",
            "there is no 'model.teacher.path', since model.teacher is null here, and "
            "model.teachers is set.",
            "Set it as a whole: model.teachers=null 'model.teacher={path: A, align: bytes}'.",
        ),
        (
            "env=pixel_reasoner model.teachers.pixel_reasoner=A",
            "there is no 'model.teachers.pixel_reasoner', since model.teachers is null here, and "
            "model.teacher is set.",
            "Set it as a whole: model.teacher=null 'model.teachers={pixel_reasoner: A}'.",
        ),
        (
            f"{THREE} model.teachers.math=A model.teachers.math.align=bytes",
            "there is no 'model.teachers.math.align', since model.teachers.math is a path here.",
            "Set it as a whole: 'model.teachers.math={path: A, align: bytes}'.",
        ),
        (
            f"{THREE} model.teachers.math.view.hint=answer",
            "there is no 'model.teachers.math.view.hint', since model.teachers.math is a path "
            "here.",
            "Set it as a whole: 'model.teachers.math={path: demo:generalist_math, view: {hint: "
            "answer}}'.",
        ),
        (
            "policy.teachers.math.name=server",
            "there is no 'policy.teachers.math.name', since policy.teachers is null here.",
            "Set it as a whole: 'policy.teachers={math: {name: server}}'.",
        ),
        (
            "model.student.lora.r=8",
            "there is no 'model.student.lora.r', since model.student.lora is null here.",
            "Set it as a whole: 'model.student.lora={r: 8, target_modules: all-linear}'.",
        ),
        (
            f"{THREE} model.teachers={{math:A,default:B}}",
            "unknown setting 'model.teachers.default'.",
            " A new name needs a + before the word: +model.teachers=...",
        ),
        ("batch={promts:4}", "unknown setting 'batch.promts'.", "Did you mean 'batch.prompts'? "),
    ],
)
def test_keys_of_groups_that_are_not_there(
    words: str, what: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["reopold train", *words.split()])
    with pytest.raises(HydraException) as caught:
        composed(*words.split())
    told = explain(caught.value, "train")
    assert told is not None
    assert told[0] == what
    assert advice in told[1]


@pytest.mark.parametrize(
    "words",
    [
        (THREE, "model.teachers=null", "model.teacher={path: A, align: bytes}"),
        ("env=pixel_reasoner", NONE, "model.teachers={pixel_reasoner: A}"),
        (THREE, "model.teachers.math={path: A, view: {hint: answer}}"),
        (THREE, "+model.teachers={math: A, default: B}"),
        (
            "env=math model=generalist model.teacher=null",
            "model.teachers=null",
            "model.teachers={default: A}",
        ),
        (
            "env=math model=generalist model.teacher=null",
            "model.teachers=null",
            "+model.teachers={default: A}",
        ),
    ],
)
def test_what_the_messages_advise_can_be_set(words: tuple[str, ...]) -> None:
    first, *others = words
    check_once(others)
    config, _ = composed(*first.split(), *others)
    assert "A" in {each.path for each in config.model.all_teachers.values()}


def test_a_path_or_settings_and_names_that_share_a_teacher() -> None:
    config, _ = composed(
        NONE,
        "model.teachers={pixel_reasoner: A, default: {path: B, dtype: bfloat16}}",
        "policy.teachers={default: {name: server, urls: [http://one:1]}}",
    )
    first, second = run_teachers(config)
    assert (first.names, first.role) == (("pixel_reasoner",), "teacher pixel_reasoner")
    assert first.model == TeacherConfig("A")
    assert first.policy == {"name": "transformers"}
    assert (second.names, second.model) == (("default",), TeacherConfig("B", dtype="bfloat16"))
    assert second.policy == {"name": "server", "urls": ["http://one:1"]}
    config, _ = composed(NONE, "model.teachers={pixel_reasoner: A, default: {path: A}}")
    (shared,) = run_teachers(config)
    assert shared.names == ("pixel_reasoner", "default")
    (alone,) = run_teachers(composed()[0])
    assert (alone.names, alone.role) == (("default",), "teacher")


def test_a_config_with_several_teachers_can_be_made_from_another() -> None:
    words = (NONE, "+model.teachers={default: demo:teacher, pixel_reasoner: self}")
    config = composed(*words, "+policy.teachers={default: {name: transformers}}")[0]
    again = replace(config, model=replace(config.model), policy=replace(config.policy))
    assert again == config
    # As an export does, to give the student its run's chat template.
    student_spec(replace(config.model, chat_template="chat.jinja"))


def test_settings_of_the_policy_are_merged_by_kind() -> None:
    config, _ = composed(
        NONE,
        "model.teachers={default: A, pixel_reasoner: B}",
        "policy=server",
        "policy.teachers={pixel_reasoner: {urls: [http://b:1]}}",
    )
    usual, other = run_teachers(config)
    assert usual.policy == config.policy.teacher
    assert other.policy == {**config.policy.teacher, "urls": ["http://b:1"]}
    assert config.policy.names == {"transformers", "server"}


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        (
            ("objective=gkd", "policy.teachers={default: {name: server}}"),
            r"objective=gkd compares whole distributions, which policy\.teachers\.default\.name="
            r"server does not give",
        ),
        (("objective=sft",), r"learns from episodes that one teacher plays, and model\.teachers"),
    ],
)
def test_objectives_that_several_teachers_cannot_serve(
    objective: tuple[str, ...], told: str
) -> None:
    config, _ = composed(NONE, "model.teachers={pixel_reasoner: A, default: B}", *objective)
    with pytest.raises(ConfigError, match=told):
        check_roles(config, run_objective(config))


def test_a_vocabulary_that_differs_names_its_teacher(tmp_path: Path) -> None:
    teachers = "{pixel_reasoner: demo:teacher, default: demo:figures_teacher}"
    told = (
        r"(?s)and teacher default 'demo:figures_teacher'.*"
        r"or 'model\.teachers\.default=\{path: demo:figures_teacher, align: bytes\}' \(docs/"
    )
    with pytest.raises(VocabularyMismatchError, match=told):
        train(tmp_path, NONE, f"model.teachers={teachers}")


# Which teaches what


def test_an_episode_s_teacher_is_its_environment_s_or_the_default(random_trajectory: Any) -> None:
    a, b = object(), object()
    teachers = Teachers({"math": a, "geometry": b, "default": a})
    trajectories = [
        of(env, random_trajectory(n)) for n, env in enumerate(("geometry", "", "math", "geometry"))
    ]
    assert [teachers.of(t) for t in trajectories] == [b, a, a, b]
    assert teachers.parts(trajectories) == [(b, [0, 3]), (a, [1, 2])]
    assert teachers.distinct == [a, b]
    assert teachers.only is None
    assert Teachers({"math": a, "default": a}).only is a
    assert Teachers({}).only is None
    with pytest.raises(ValueError, match="an episode of 'math' needs the teacher"):
        Teachers({"geometry": b}).named("math")


class Recorder:
    """Scores with its own value, and notes what it was asked."""

    def __init__(self, value: float, fault: bool = False) -> None:
        self.value, self.fault = value, fault
        self.asked: list[list[int]] = []

    def score(self, trajectories: Sequence[Trajectory], **_: Any) -> list[TokenScores]:
        self.asked.append([t.index for t in trajectories])
        if self.fault:
            raise ModelServerError("http://b:1 does not answer")
        return [
            TokenScores(
                np.where(t.loss_mask, self.value, 0.0).astype(np.float32), np.zeros_like(t.logp)
            )
            for t in trajectories
        ]


class Beside(Recorder):
    """Scores while others generate."""

    scoring_threads = 2


def by_teacher(**teachers: Any) -> ScoringByTeacher:
    return ScoringByTeacher(Teachers({name: Scoring(each) for name, each in teachers.items()}))


def test_each_row_is_scored_by_its_teacher_and_each_teacher_here_in_one_batch(
    random_trajectory: Any,
) -> None:
    math, geometry, served = Recorder(-1.0), Recorder(-2.0), Beside(-3.0)
    scoring = by_teacher(math=math, geometry=geometry, digits=served)
    envs = ["geometry", "math", "digits", "math", "geometry", "digits"]
    rows = [Row(of(env, random_trajectory(n))) for n, env in enumerate(envs)]
    for row in rows:
        scoring.begin(row)
    problems = scoring.finish(rows, 0)
    scoring.close()
    assert not problems.failed
    assert not problems.invalid
    assert (math.asked, geometry.asked) == ([[1, 3]], [[0, 4]])
    assert sorted(served.asked) == [[2], [5]]
    expected = {"math": -1.0, "geometry": -2.0, "digits": -3.0}
    for row in rows:
        t = row.trajectory
        assert t.teacher_logp is not None
        assert set(t.teacher_logp[t.loss_mask]) == {expected[t.env]}


def test_a_teacher_that_scores_none_of_its_rows_ends_the_step(random_trajectory: Any) -> None:
    scoring = by_teacher(math=Recorder(-1.0), geometry=Beside(-2.0, fault=True))
    rows = [Row(of(env, random_trajectory(n))) for n, env in enumerate(("math", "geometry"))]
    with pytest.raises(ModelServerError, match="step 3: the teacher scored nothing; http://b:1"):
        scoring.finish(rows, 3)
    scoring.close()


def test_the_divergence_of_each_row_is_from_its_teacher(
    random_trajectory: Callable[..., Trajectory],
    make_policy: Callable[..., TransformersPolicy],
    make_model: Callable[..., Any],
) -> None:
    student, one, other = (make_policy(make_model(seed=n)) for n in (1, 2, 3))
    config = composed()[0].optimizer
    rows = [of(("math", "geometry", "math")[n], random_trajectory(n)) for n in range(3)]

    def divergence(teachers: dict[str, Any], chosen: list[Trajectory]) -> list[torch.Tensor]:
        each = {name: Scoring(teacher, with_states=True) for name, teacher in teachers.items()}
        known, made = Teachers(teachers), [Row(t) for t in chosen]
        ScoringByTeacher(Teachers(each)).finish(made, 0)
        updater = Updater(student, GKD(), config, max_tokens=999, teachers=known)
        with torch.no_grad():
            pair = updater._divergence(made)
        return [each.split([t.response_tokens for t in chosen]) for each in pair]

    both, logp = divergence({"math": one, "geometry": other}, rows)
    for n, row in enumerate(rows):
        ((alone,), (own,)) = divergence({"default": one if n != 1 else other}, [row])
        torch.testing.assert_close(both[n], alone)
        torch.testing.assert_close(logp[n], own)
    ((wrong,), _) = divergence({"default": other}, [rows[0]])
    assert (wrong - both[0]).abs().max() > 1e-3


def test_a_default_teacher_gives_the_run_of_a_single_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finish, "make_plots", lambda folder: None)
    with torch.random.fork_rng(devices=[]):
        train(tmp_path / "one", *TINY)
        train(tmp_path / "named", *TINY, NONE, "model.teachers={pixel_reasoner: demo:teacher}")
    assert results(tmp_path / "one") == results(tmp_path / "named")


def test_a_mixture_s_episodes_are_scored_and_played_by_their_environment_s_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run with two teachers has each one's scores of its environment, and its evaluation."""
    monkeypatch.setattr(finish, "make_plots", lambda folder: None)
    mixture = ("env=[pixel_reasoner,geometry]", "model=demo", "steps=1", "logging.trajectories=4")
    small = ("batch.prompts=4", "batch.mini_batch=4", "evaluation.tasks=2", "evaluation.every=0")
    runs = {
        "both": (NONE, "model.teachers={geometry: demo:student, default: demo:teacher}"),
        "pixel_reasoner": ("model.teacher.path=demo:teacher",),
        "geometry": ("model.teacher.path=demo:student",),
    }
    found = {}
    for name, words in runs.items():
        with torch.random.fork_rng(devices=[]):
            train(tmp_path / name, *mixture, *small, *words)
        found[name] = results(tmp_path / name)
    both = found["both"]["trajectories.jsonl"]
    assert {row["env"] for row in both} == {"pixel_reasoner", "geometry"}
    for place, row in enumerate(both):
        alone = found[row["env"]]["trajectories.jsonl"][place]
        assert row["ids"] == alone["ids"]
        # Batches of other sizes round otherwise.
        np.testing.assert_allclose(row["teacher_logp"], alone["teacher_logp"], atol=1e-4)
        other = found["geometry" if row["env"] == "pixel_reasoner" else "pixel_reasoner"]
        wrong = np.array(other["trajectories.jsonl"][place]["teacher_logp"])
        assert abs(row["teacher_logp"] - wrong).max() > 0.1

    def taught(name: str, env: str) -> list[dict[str, Any]]:
        rows = [row for row in found[name]["metrics.jsonl"] if row.get("who") == "teacher"]
        return [{k: row[k] for k in row if k.startswith(f"env/{env}/")} for row in rows]

    for env in ("pixel_reasoner", "geometry"):
        assert taught("both", env) == taught(env, env) != []


# Tasks that name their teachers

ROWS = [
    {"problem": "1+2", "answer": "3", "domain": "near"},
    {"problem": "2+2", "answer": "4", "domain": "far"},
    {"problem": "3+2", "answer": "5", "domain": None},
    {"problem": "4+2", "answer": "6"},
]
NEAR, FAR = "near: demo:arithmetic_teacher", "far: demo:arithmetic_far"


def named_rows(folder: Path, rows: list[dict[str, Any]], *more: str) -> list[str]:
    """Words of a run on rows of files, of which each is trained on and held out."""
    folder.mkdir(exist_ok=True)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [f"data.{split}.path={path}" for split in ("train", "eval")]
    batch = [f"batch.prompts={len(rows)}", f"batch.mini_batch={len(rows)}", "steps=1"]
    ends = ["evaluation.every=0", f"evaluation.tasks={len(rows)}", "logging.trajectories=9"]
    return ["env=math", "data=math_jsonl", *data, *batch, *ends, *more]


def by_column(more: str = "default: demo:arithmetic_teacher") -> list[str]:
    teachers = ", ".join(each for each in (NEAR, FAR, more) if each)
    return [NONE, f"model.teachers={{{teachers}}}", "model.teacher_key=domain"]


def test_a_task_s_teacher_is_the_one_it_names_or_its_environment_s(random_trajectory: Any) -> None:
    a, b, c = object(), object(), object()
    teachers = Teachers({"geometry": a, "math": b, "default": c})
    tasks = [("math", ""), ("math", "geometry"), ("digits", ""), ("digits", "math")]
    made = [of(env, random_trajectory(n)) for n, (env, _) in enumerate(tasks)]
    for trajectory, (_, name) in zip(made, tasks, strict=True):
        trajectory.teacher = name
    assert [teachers.of(each) for each in made] == [b, a, c, b]
    assert teachers.of(EpisodeSpec("eval", 0, env="math", teacher="geometry")) is a
    with pytest.raises(ValueError, match="an episode of 'music' needs the teacher"):
        teachers.named("math", "music")


def test_rows_are_scored_and_played_by_the_teachers_that_they_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As runs with each of these teachers alone; one of them has a system message of its own."""
    monkeypatch.setattr(finish, "make_plots", lambda folder: None)
    view = "{path: demo:arithmetic_far, view: {system: Answer at once.}}"
    several = f"{{far: {view}, default: demo:arithmetic_teacher}}"
    teachers = {
        "both": [NONE, f"model.teachers={several}", "model.teacher_key=domain"],
        "default": ["model.teacher.path=demo:arithmetic_teacher"],
        "far": [NONE, f"model.teachers={{default: {view}}}"],
    }
    rows = [{**row, "domain": row.get("domain") and "far"} for row in ROWS]
    rows[0]["domain"] = "default"
    found = {}
    for name, words in teachers.items():
        with torch.random.fork_rng(devices=[]):
            train(tmp_path / name, *named_rows(tmp_path / name, rows), *words)
        found[name] = results(tmp_path / name)
    both = found["both"]["trajectories.jsonl"]
    assert sorted(row.get("teacher", "") for row in both) == ["", "", "default", "far"]
    for place, row in enumerate(both):
        own = "far" if row.get("teacher") == "far" else "default"
        alone = found[own]["trajectories.jsonl"][place]
        assert row["ids"] == alone["ids"]
        np.testing.assert_allclose(row["teacher_logp"], alone["teacher_logp"], atol=1e-5)
        assert row.get("teacher_prompt") == alone.get("teacher_prompt")
        assert ("Answer at once." in row.get("teacher_prompt", "")) == (own == "far")
    metrics = found["both"]["metrics.jsonl"]
    (step,) = (row for row in metrics if row["kind"] == "train")
    assert (step["teacher/far/episodes"], step["teacher/default/episodes"]) == (1, 3)
    assert step["teacher/far/kept_share"] + step["teacher/default/kept_share"] == pytest.approx(1)
    for sampling in ("sampled", "greedy"):
        ends = {
            name: next(
                row
                for row in each["metrics.jsonl"]
                if row.get("who") == "teacher" and row["sampling"] == sampling
            )
            for name, each in found.items()
        }
        assert (ends["both"]["teacher/far/n"], ends["both"]["teacher/default/n"]) == (1, 3)
        total = sum(
            n * ends["both"][f"teacher/{t}/success"] for t, n in (("far", 1), ("default", 3))
        )
        assert total / 4 == ends["both"]["success"]


def test_a_teacher_that_is_not_there_is_a_bad_row(tmp_path: Path) -> None:
    rows = [*ROWS, {"problem": "5+2", "answer": "7", "domain": "music"}]
    words = named_rows(tmp_path, rows, *by_column())
    told = "unknown teacher .*'domain' is 'music', and model.teachers has near, far, default"
    with pytest.raises(BadRowsError, match=told):
        train(tmp_path / "run", *words)
    skipping = [f"data.{split}.on_bad_row=skip" for split in ("train", "eval")]
    config, _ = composed(*words, *skipping)
    student = load_processing(student_spec(config.model), "student")
    found, counts = checked_run(config, student, [None], tmp_path / "report.json")
    assert counts == {"math": {"train": 4, "eval": 4}}
    assert found.data.left_out == {"train": [4], "eval": [4]}


def test_a_row_without_a_teacher_and_a_teacher_without_a_row(tmp_path: Path) -> None:
    words = named_rows(tmp_path, ROWS)
    with pytest.raises(BadRowsError, match=r"no teacher .* nothing in 'domain', and .* no default"):
        train(tmp_path / "run", *words, *by_column(""))
    elsewhere = [word.replace("=domain", "=domian") for word in by_column()]
    assert elsewhere != by_column()
    with pytest.raises(ConfigError, match=r"domian, but no training task has a value there.\nCorr"):
        train(tmp_path / "run", *named_rows(tmp_path, ROWS), *elsewhere)
    unused = by_column("math: demo:arithmetic_teacher, music: demo:arithmetic_far")
    with pytest.raises(ConfigError, match=r"model\.teachers\.music teaches nothing: .*\nLeave it"):
        train(tmp_path / "run", *words, *unused)
    odd = named_rows(tmp_path / "odd", [{**ROWS[0], "domain": [1]}], *by_column())
    with pytest.raises(BadRowsError, match=r"must name a teacher, got \[1\]"):
        train(tmp_path / "run", *odd)


def test_made_tasks_without_a_teacher_are_refused_too() -> None:
    config, _ = composed(
        NONE, "model.teachers={far: demo:teacher}", "model.teacher_key=domain", "data.train.size=9"
    )
    told = r"task .* of 'train' in env=pixel_reasoner has no teacher: .*\nAdd model\.teachers\."
    with pytest.raises(DataError, match=told):
        check_task_teachers(config)


class ManySums(ToolEnv):
    """More tasks than are looked at; one in a hundred names another teacher than the rest."""

    def load_tasks(self, split: str) -> Sequence[Task]:
        names = ["rare" if i % 100 == 1 else "far" for i in range(2000)]
        return [Task(str(i), "1+1", ("2",), metadata={"domain": n}) for i, n in enumerate(names)]


def test_many_tasks_without_a_value_in_the_column_are_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(task_teachers, "make_env", lambda member: ManySums())
    words = (
        "env=math",
        NONE,
        f"model.teachers={{{FAR}, rare: demo:teacher, default: demo:teacher}}",
    )
    config, _ = composed(*words, "model.teacher_key=domian")
    told = (
        r"^model\.teacher_key=domian, but none of 65 training tasks looked at has a value there\."
        r"\nDid you mean 'domain'\? Correct the column, or leave out model\.teacher_key: each "
    )
    with pytest.raises(ConfigError, match=told):
        check_task_teachers(config)
    config, _ = composed(words[0], NONE, f"model.teachers={{{FAR}}}", "model.teacher_key=domian")
    with pytest.raises(DataError, match=r"\nDid you mean 'domain'\? Add model\.teachers\.default="):
        check_task_teachers(config)
    config, _ = composed(*words, "model.teacher_key=domain")
    check_task_teachers(config)  # the rare one is not among those looked at
    assert "none of the 65 training tasks looked at names model.teachers.rare" in caplog.text


@pytest.mark.parametrize("key", ["domain", "null"])
def test_the_teacher_of_an_option_s_tasks_has_the_option_s_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """The option ``mine`` has the environment that is registered as ``math``."""
    (tmp_path / "env").mkdir()
    (tmp_path / "env/mine.yaml").write_text("# @package _global_\ndefaults: [math]\n")
    named_rows(tmp_path, [ROWS[3], {**ROWS[0], "domain": "mine"}])  # the first names no teacher

    def config_of(mine: str) -> TrainConfig:
        models = f"mine: {{path: demo:student, view: {mine}}}, geometry: demo:teacher"
        paths = [f"mix.envs.mine.data.{x}.path={tmp_path}/rows.jsonl" for x in ("train", "eval")]
        return composed(
            *(f"--config-dir={tmp_path}", "env=[mine,geometry]", "mix.envs.mine.data=math_jsonl"),
            *("model=demo", NONE, f"model.teachers={{{models}}}", f"model.teacher_key={key}"),
            *(*paths, "mix.envs.geometry.data.train.size=9", "evaluation.tasks=2", "steps=1"),
        )[0]

    def check(config: TrainConfig) -> TrainConfig:
        return prepared(config, run_objective(config), tmp_path / "report.json")[0]

    config = check(config_of("{system: Add.}"))
    student = load_processing(student_spec(config.model), "student")
    teachers = {each.role: student for each in run_teachers(config)}
    readers = run_reader(config, ChatRenderer(student.tokenizer), student, teachers)
    assert isinstance(readers, Mapping)
    reader = readers["mine"]
    reader = reader.of("") if isinstance(reader, Readers) else reader
    assert reader is not None
    assert reader.view.system == "Add."
    with pytest.raises(DataError, match="solution"):
        check(config_of("{hint: solution}"))
    if key != "null":
        with monkeypatch.context() as patch:  # an environment that names no teachers
            patch.setattr(task_teachers, "make_env", lambda member: gymnasium.Env())
            with pytest.raises(ConfigError, match="no training task has a value there"):
                check_task_teachers(config)


def test_a_continued_run_has_the_same_column_and_the_same_names_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finish, "make_plots", lambda folder: None)
    words = [*named_rows(tmp_path, ROWS, *by_column()), "evaluation.tasks=0"]
    with torch.random.fork_rng(devices=[]):
        train(tmp_path / "run", *words)
    with pytest.raises(CheckpointError, match=r"model\.teacher_key: domain -> subject"):
        train(tmp_path / "run", *words, "model.teacher_key=subject", "steps=2")
    changed = [{**row, "domain": "far"} if n == 0 else row for n, row in enumerate(ROWS)]
    changed[1] = {**ROWS[1], "domain": "near"}
    named_rows(tmp_path, changed)
    loading._load.cache_clear()  # another process reads the file anew
    with pytest.raises(CheckpointError, match=r"rows of data\.train, but others now"):
        train(tmp_path / "run", *words, "steps=2")


def test_verl_stores_the_teacher_that_a_task_names(random_trajectory: Any) -> None:
    made = of("math", random_trajectory(0))
    made.teacher = "far"
    assert from_row(to_row(made)).trajectory.teacher == "far"


# Commands beside training


def test_the_plan_holds_the_weights_of_all_teachers() -> None:
    same = ("env=math", "engine.precision=float32", NONE)
    one = plan_run([*same, "model.teachers={default: demo:arithmetic_teacher}"])
    two = plan_run(
        [*same, "model.teachers={math: demo:arithmetic_teacher, default: demo:arithmetic_far}"],
    )
    held = [plan.memory[0].phases["update"]["teacher"] for plan in (one, two)]
    assert held[1] == 2 * held[0] > 0


@pytest.mark.parametrize(("gpus", "teachers", "each", "replicas"), [(2, 2, 1, 1), (8, 2, 2, 2)])
def test_verl_divides_the_gpus_among_teachers(
    gpus: int, teachers: int, each: int, replicas: int
) -> None:
    engine = composed(
        "engine=verl",
        f"engine.gpus_per_node={gpus}",
        f"engine.teacher_server.tensor_parallel={each}",
    )[0].engine
    assert teacher_replicas(engine, teachers) == replicas
    with pytest.raises(
        ConfigError, match=r"7 teachers, each on .* cannot divide .* GPUs evenly\.\n"
    ):
        teacher_replicas(engine, 7)


def test_verl_takes_no_policy_of_a_teacher() -> None:
    config, _ = composed(
        "engine=verl", NONE, "model.teachers={default: A}", "policy.teachers={default: {urls: [u]}}"
    )
    with pytest.raises(ConfigError, match=r"takes no policy\.teachers"):
        check_settings(config)
