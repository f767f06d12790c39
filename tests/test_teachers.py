"""Teachers: one that follows the student, an earlier checkpoint, one of another size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config
from running import assert_same_weights, composed, results, train, train_rows, weights
from test_engine_objectives import crash_before
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from reopold_agent.errors import ConfigError, ModelError, VocabularyMismatchError
from reopold_agent.policies.loading import ModelSpec, load_model, resolve_path
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.train import finish, resume
from reopold_agent.train.following import FollowingTeacher
from reopold_agent.train.loop import TrainingLoop

STUDENT, TEACHER = (Path(resolve_path(f"demo:{name}")) for name in ("student", "teacher"))
TINY = ("steps=3", "evaluation.tasks=1", "evaluation.every=0", "evaluation.teacher=false")
KEEP = ("checkpoint.every=1", "checkpoint.keep=9")


@pytest.fixture(autouse=True)
def plain_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No plots; global random state kept."""
    monkeypatch.setattr(finish, "make_plots", lambda folder: None)
    monkeypatch.setattr(resume, "make_plots", lambda folder: None)
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture
def teachers(monkeypatch: pytest.MonkeyPatch) -> list[TransformersPolicy]:
    """The teachers of the runs in a test."""
    found: list[TransformersPolicy] = []
    original = TrainingLoop.run

    def run(self: TrainingLoop, *arguments: Any) -> Any:
        assert isinstance(self.roles.teacher, TransformersPolicy)
        found.append(self.roles.teacher)
        return original(self, *arguments)

    monkeypatch.setattr(TrainingLoop, "run", run)
    return found


def is_model(policy: TransformersPolicy, folder: Path) -> bool:
    """Whether the policy's weights are those of a checkpoint, bit for bit."""
    saved, mine = weights(folder), policy.adapter.model.state_dict()
    return all(torch.equal(mine[_name(name, mine)], value) for name, value in saved.items())


def _name(saved: str, mine: dict[str, Any]) -> str:
    """Checkpoints keep the names that Qwen2.5-VL had before transformers 4.52."""
    if saved in mine:
        return saved
    for old, new in (("visual.", "model.visual."), ("model.", "model.language_model.")):
        if saved.startswith(old):
            return new + saved.removeprefix(old)
    raise KeyError(saved)


# A teacher that follows


@pytest.mark.parametrize(("follow", "every"), [(0.75, 1), (0.75, 2), (0.0, 1), (0.0, 3)])
def test_the_weights_after_each_step_by_hand(tmp_path: Path, follow: float, every: int) -> None:
    train(
        tmp_path,
        *TINY,
        *KEEP,
        "optimizer.lr=1e-2",
        "model.teacher.view.hint=answer",  # else a copy is refused
        f"model.teacher.follow={follow}",
        f"model.teacher.follow_every={every}",
    )
    expected = {name: value.double() for name, value in weights(TEACHER).items()}
    for step in (1, 2, 3):
        checkpoint = tmp_path / f"checkpoints/step-00000{step}"
        student, teacher = weights(checkpoint / "model"), weights(checkpoint / "teacher")
        assert student.keys() == teacher.keys() == expected.keys()
        if step % every == 0:
            for name, value in student.items():
                expected[name] = follow * expected[name] + (1 - follow) * value.double()
        for name, value in teacher.items():
            assert (value.double() - expected[name]).abs().max() < 1e-6, name
        if follow == 0 and step % every == 0:
            assert_same_weights(checkpoint / "model", checkpoint / "teacher")
        elif step < every:
            assert_same_weights(TEACHER, checkpoint / "teacher")
        else:
            moved = [n for n in teacher if not torch.equal(teacher[n], student[n])]
            assert moved
    # The folder that one continues from is the student's, as ever.
    assert_same_weights(tmp_path / "final", tmp_path / "checkpoints/step-000003/model")


def test_a_copy_of_the_student_has_nothing_to_teach(tmp_path: Path) -> None:
    train(
        tmp_path,
        *TINY,
        "model.teacher.follow=0.0",
        "model.teacher.follow_every=2",
        "objective=rkl_sg",
    )
    first, second, third = train_rows(tmp_path)
    assert first["reward/max"] > 1e-2
    assert second["reward/max"] > 1e-2
    assert abs(third["reward/max"]) < 1e-4  # copied after the second step
    assert abs(third["reward/min"]) < 1e-4


@pytest.mark.parametrize("objective", ["reopold", "gkd"])
def test_a_following_teacher_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    words = (*TINY, "steps=4", "checkpoint.every=2", "model.teacher.follow=0.9")
    words = (*words, "optimizer.lr=1e-2", f"objective={objective}", "evaluation.teacher=true")
    train(tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        crash_before(patch, 3)
        with pytest.raises(SystemExit):
            train(tmp_path / "broken", *words)
    train(tmp_path / "broken", *words)
    assert results(tmp_path / "broken") == results(tmp_path / "whole")
    for name in ("final", "checkpoints/step-000004/teacher"):
        assert_same_weights(tmp_path / "broken" / name, tmp_path / "whole" / name)


def test_a_teacher_that_stays_is_not_saved(tmp_path: Path) -> None:
    train(tmp_path, *TINY, "steps=1")
    assert not (tmp_path / "checkpoints/step-000001/teacher").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("model.teacher.follow=1.0",), r"follow must lie in \[0, 1\), got 1.0"),
        (("model.teacher.follow=-0.1",), r"follow must lie in \[0, 1\)"),
        (("model.teacher.follow=0.9", "model.teacher.follow_every=0"), "follow_every must be pos"),
        (("model.teacher.follow=0.9", "model.teacher.dtype=bfloat16"), "teacher.dtype=float32"),
        (
            ("model.teacher.follow=0.9", "model.student.lora={r: 4, target_modules: [q_proj]}"),
            "cannot follow a LoRA adapter",
        ),
        (
            ("+model.teacher.lora={r: 4, target_modules: [q_proj]}",),
            r"^model\.teacher\.lora=.*no effect\.\nLeave lora out; merge",
        ),
        (
            ("~model.teacher", "+model.teachers={math: {path: demo:x, lora: {r: 4}}}"),
            r"lora=\{'r': 4\}.* no effect\.\nLeave lora out; merge",
        ),
        (("model.student.follow=0.9",), "student.follow"),
    ],
)
def test_settings_of_a_following_teacher_that_cannot_work(
    words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(Exception, match=message) as caught:
        composed(*words)
    if not words[0].startswith("model.student"):
        assert isinstance(caught.value, ConfigError)


def checkpoint(folder: Path, tokenizer: Any, vision: Any, seed: int, **changes: Any) -> Path:
    """A random model in Hugging Face layout; ``vision_*`` changes are of the picture encoder."""
    text = {k: v for k, v in changes.items() if not k.startswith("vision_")}
    config = tiny_config(tokenizer, **text)
    for name, value in changes.items():
        if name.startswith("vision_"):
            setattr(config.vision_config, name.removeprefix("vision_"), value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    vision.processor.save_pretrained(folder)
    return folder


LARGER = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "vision_out_hidden_size": 96,
    "vision_depth": 3,
}


@pytest.fixture(scope="module")
def demo_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(STUDENT)


def test_another_architecture_cannot_follow(
    tmp_path: Path, demo_tokenizer: Any, vision: Any
) -> None:
    for name, changes in (("deeper", {"num_hidden_layers": 3}), ("wider", {"vocab_size": 1200})):
        path = checkpoint(tmp_path / name, demo_tokenizer, vision, 0, **changes)
        models = [
            load_model(ModelSpec(str(each)), role, torch.device("cpu"))
            for role, each in (("teacher", path), ("student", STUDENT))
        ]
        with pytest.raises(ModelError, match=r"do not correspond, the first is .*own architecture"):
            FollowingTeacher(*models, decay=0.5, every=1)
        with pytest.raises(ModelError, match=r"model\.teacher\.follow"):
            train(tmp_path / "run", *TINY, f"model.teacher.path={path}", "model.teacher.follow=0.5")


# An earlier checkpoint


def test_an_older_checkpoint_teaches(tmp_path: Path, teachers: list[TransformersPolicy]) -> None:
    first = tmp_path / "first"
    train(first, *TINY, *KEEP, "optimizer.lr=1e-2")
    assert is_model(teachers[-1], TEACHER)
    older = first / "checkpoints/step-000002/model"
    for number, (path, expected) in enumerate(
        [(first, first / "final"), (older, older), (f"{first}/", first / "final")]
    ):
        train(tmp_path / f"run{number}", *TINY, "steps=1", f"model.teacher.path={path}")
        assert is_model(teachers[-1], expected)
        assert not is_model(teachers[-1], TEACHER)
    shutil.rmtree(first / "final")
    train(tmp_path / "unfinished", *TINY, "steps=1", f"model.teacher.path={first}")
    assert is_model(teachers[-1], first / "checkpoints/step-000003/model")
    shutil.rmtree(first / "checkpoints")
    with pytest.raises(ConfigError, match="neither a final model nor a full checkpoint"):
        train(tmp_path / "nothing", *TINY, f"model.teacher.path={first}")


# Another size, another vocabulary


@pytest.mark.parametrize(
    "objective",
    ["reopold objective.switch_step=0", "skew_rkl", "gkd", "gkd objective.top_k=5", "sft"],
)
def test_a_larger_teacher_padded_wider(
    tmp_path: Path,
    demo_tokenizer: Any,
    vision: Any,
    teachers: list[TransformersPolicy],
    objective: str,
) -> None:
    rows = len(demo_tokenizer) + 77
    path = checkpoint(tmp_path / "7B", demo_tokenizer, vision, 1, vocab_size=rows, **LARGER)
    words = f"objective={objective}".split()
    train(tmp_path / "run", *TINY, *words, "steps=2", f"model.teacher.path={path}")
    teacher: Any = teachers[0].adapter
    assert teacher.head.weight.shape == (rows, 96)
    assert len(teacher.model.model.language_model.layers) == 3
    for row in train_rows(tmp_path / "run"):
        values = torch.tensor([row["loss"], row["grad_norm"], row["reward/mean"]])
        assert values.isfinite().all()
        assert row["grad_norm"] > 0
    assert is_model(teachers[0], path)  # it learns nothing
    Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "run/final")


def test_a_teacher_of_another_tokenizer_is_refused_with_the_reason(
    tmp_path: Path, teachers: list[TransformersPolicy], edited: Callable[[Path], tuple[int, str]]
) -> None:
    other = shutil.copytree(TEACHER, tmp_path / "other")
    first, token = edited(other)
    with pytest.raises(VocabularyMismatchError) as caught:
        train(tmp_path / "run", *TINY, f"model.teacher.path={other}")
    message = str(caught.value)
    assert f"'{other}' disagree on 2 token ids" in message
    assert f"id {first}: student {token!r}" in message
    assert "\nUse a teacher with the student's tokenizer, or model.teacher.align=bytes" in message
    assert teachers == []
    assert not (tmp_path / "run/config.yaml").exists()


@pytest.fixture
def edited() -> Callable[[Path], tuple[int, str]]:
    """``edited(folder)``: two ids of a tokenizer change places; the first, and its token."""

    def edit(folder: Path) -> tuple[int, str]:
        path = folder / "tokenizer.json"
        saved = json.loads(path.read_text("utf-8"))
        vocabulary = saved["model"]["vocab"]
        names = {index: token for token, index in vocabulary.items()}
        first, second = sorted(names)[200:202]
        vocabulary[names[first]], vocabulary[names[second]] = second, first
        path.write_text(json.dumps(saved), "utf-8")
        return first, names[first]

    return edit
