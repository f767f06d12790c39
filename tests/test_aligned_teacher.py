"""A teacher with another tokenizer and chat template, in whole runs of the local engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import test_text_checkpoints
import torch
from running import composed, lines, results, train, train_rows
from transformers import AutoTokenizer

from examples.embedded_models.digits_vocab2 import build
from reopold_agent.errors import ConfigError, ModelError, VocabularyMismatchError
from reopold_agent.policies.loading import ModelSpec, load_model, resolve_path
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.train import finish
from reopold_agent.train.update import Updater, UpdateStats
from reopold_agent.train.verl.supported import check_settings
from reopold_agent.types import Trajectory

TINY = ("steps=2", "evaluation.tasks=2", "evaluation.every=0", "batch.prompts=4",
        "batch.mini_batch=2", "logging.trajectories=4")  # fmt: skip
ALIGNED = "model.teacher.align=bytes"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped teacher with another tokenizer, hardly trained."""
    out = tmp_path_factory.mktemp("vocab2")
    build.build(out, build.TINY, lambda _: None)
    return out / "teacher_vocab2"


def test_a_run_with_another_vocabulary(teacher: Path, tmp_path: Path) -> None:
    words = (*TINY, f"model.teacher.path={teacher}", ALIGNED)
    train(tmp_path, *words)
    rows = [row for row in lines(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    assert len(rows) == 2
    for row in rows:
        # Most of the student's tokens are spans of their own; some have to be asked together.
        assert 0.5 < row["align/span_share"] < 1
        assert row["align/unaligned_share"] < 0.2
    for record in lines(tmp_path / "trajectories.jsonl"):
        mask = np.array(record["loss_mask"], bool)
        reward = np.array(record["teacher_logp"]) - np.array(record["logp"])
        assert np.isfinite(reward).all()
        # The tokens of a span have one reward, and the spans' rewards are not all the same.
        assert record["teacher_prompt"].startswith("<|turn|>system\n")
        assert 1 < len(np.unique(reward[mask].round(4))) < mask.sum()
    ends = [row for row in lines(tmp_path / "metrics.jsonl") if row["kind"] == "eval"]
    # The teacher plays with its own tokenizer: it still says something that can be graded.
    assert {row["who"] for row in ends} == {"student", "teacher"}


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> list[Trajectory]:
    """The episodes that a run in the test learns from."""
    found: list[Trajectory] = []
    original = Updater.step

    def step(self: Updater, mini_batches: Any, *arguments: Any) -> UpdateStats:
        found.extend(row.trajectory for batch in mini_batches for row in batch)
        return original(self, mini_batches, *arguments)

    monkeypatch.setattr(Updater, "step", step)
    monkeypatch.setattr(finish, "make_plots", lambda folder: None)
    return found


def assert_scored_in_its_form(episodes: list[Trajectory], teacher: Path) -> None:
    """The teacher's scores are those of its form of each episode, by another copy of it."""
    loaded = load_model(ModelSpec(str(teacher)), "teacher", torch.device("cpu"))
    chat = ChatRenderer(loaded.tokenizer)
    policy = loaded.policy(forbidden_ids=chat.forbidden_ids, stop_ids=chat.stop_ids)
    for episode in episodes:
        assert episode.reading is not None
        assert episode.reading.student_spans is not None
        read = episode.reading.trajectory
        ours, theirs = (each.ids[each.loss_mask].tolist() for each in (episode, read))
        assert ours != theirs
        assert chat.text(theirs) == "".join(turn.text for turn in episode.turns)
        (score,) = policy.score([read])
        wanted = episode.reading.to_student(episode, score.logp)
        assert episode.teacher_logp is not None
        assert np.abs(wanted - episode.teacher_logp).max() < 1e-3
        assert np.abs(wanted - episode.logp)[episode.loss_mask].max() > 0.1


def test_a_teacher_with_another_vocabulary_and_picture_processor(
    tmp_path: Path, trained_on: list[Trajectory]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve_path("demo:teacher_vocab2"))
    teacher = families.save_checkpoint(tmp_path / "teacher", "qwen3_vl", tokenizer, seed=1)
    words = (*TINY, "steps=1", "batch.prompts=8", "batch.mini_batch=8", "evaluation.tasks=0")
    train(tmp_path / "run", *words, f"model.teacher.path={teacher}", ALIGNED)
    assert len(trained_on) == 8
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for episode in trained_on:
        read = episode.for_teacher
        assert len(read.images) == len(episode.images) > 0
        for seen, shown in zip(read.images, episode.images, strict=True):
            for each, patch in ((seen, 16), (shown, 14)):
                height, width, _ = each.pixels.shape
                assert height % (2 * patch) == width % (2 * patch) == 0
                assert each.grid == (1, height // patch, width // patch)
        assert (read.ids == pad).sum() == sum(each.tokens for each in read.images)
    assert any(len(each.turns) > 1 for each in trained_on)  # pictures of tools are among these
    assert_scored_in_its_form(trained_on, teacher)


def test_a_text_teacher_with_another_vocabulary(
    tmp_path: Path, trained_on: list[Trajectory]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve_path("demo:teacher_vocab2"))
    teacher = test_text_checkpoints.save_checkpoint(
        tmp_path / "teacher", tokenizer, "qwen3", seed=1, padding=3
    )
    words = (*TINY, "env=math", "steps=1", "evaluation.tasks=0")
    train(tmp_path / "run", *words, f"model.teacher.path={teacher}", ALIGNED)
    assert len(trained_on) == 4
    (row,) = train_rows(tmp_path / "run")
    assert 0.2 < row["align/span_share"] < 1
    assert_scored_in_its_form(trained_on, teacher)


def test_the_same_vocabulary_gives_the_same_run_bit_for_bit(tmp_path: Path) -> None:
    plain, aligned = tmp_path / "plain", tmp_path / "aligned"
    train(plain, *TINY)
    train(aligned, *TINY, ALIGNED)
    ours, theirs = results(plain), results(aligned)
    assert ours["metrics.jsonl"] == theirs["metrics.jsonl"]
    for a, b in zip(ours["trajectories.jsonl"], theirs["trajectories.jsonl"], strict=True):
        assert b.pop("teacher_prompt")[:40] == a["prompt"][:40]
        assert a == b


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("objective=gkd",), "objective=gkd compares whole distributions"),
        (("objective=exopd",), "objective=exopd compares each token with a reference model"),
        (("objective=sft",), "objective=sft trains on tokens that the teacher writes"),
        (("model.teacher.follow=0.9",), "model.teacher.align=null"),
        (("model.teacher.align=words",), "model.teacher.align must be"),
    ],
)
def test_what_an_aligned_teacher_cannot_do(
    words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(tmp_path, *TINY, ALIGNED, *words)
    assert not list(tmp_path.iterdir())


def test_verl_takes_no_aligned_teacher() -> None:
    config, _ = composed("engine=verl", ALIGNED)
    with pytest.raises(ConfigError, match="engine=verl scores the student's own token ids"):
        check_settings(config)


def test_without_the_setting_another_vocabulary_is_refused(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(VocabularyMismatchError, match=r"model\.teacher\.align=bytes"):
        train(tmp_path, *TINY, f"model.teacher.path={teacher}")


def test_a_reference_with_another_vocabulary_is_refused_before_models_are_loaded(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("reopold_agent.train.setup.load_model")
    words = (*TINY, "objective=exopd", f"objective.reference={teacher}")
    with pytest.raises(VocabularyMismatchError) as caught:
        train(tmp_path / "run", *words)
    first, *ids, advice = str(caught.value).split("\n")
    assert first.startswith(f"student 'demo:student' and reference '{teacher}' disagree on ")
    assert "so the reference would score other text" in first
    assert all(", reference " in each and "teacher" not in each for each in ids)
    assert advice == (
        "Use a reference with the student's tokenizer, or objective.reference=null for the student "
        "as it is before training."
    )
    assert not list(tmp_path.rglob("*.*"))


def test_a_tokenizer_that_writes_in_lower_case_is_refused(teacher: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    described: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())
    described["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(ModelError, match=r"bytes: it reads 'T' of 'The answer .*' as 't'\.\nUse a"):
        train(tmp_path / "run", *TINY, f"model.teacher.path={folder}", ALIGNED)


def test_a_tokenizer_that_cannot_be_aligned_is_refused(teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(teacher, folder)
    described: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())
    described["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": False}
    (folder / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(ModelError, match=r"cannot be aligned by bytes: .*WordPiece"):
        train(tmp_path, *TINY, f"model.teacher.path={folder}", ALIGNED)
