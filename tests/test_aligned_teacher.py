"""A teacher with another tokenizer and chat template, in whole runs of the local engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import composed, lines, results, train

from examples.embedded_models.digits_vocab2 import build
from reopold_agent.errors import ConfigError, ModelError, VocabularyMismatchError
from reopold_agent.train.verl.supported import check_settings

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


def test_a_tokenizer_that_cannot_be_aligned_is_refused(teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(teacher, folder)
    described: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())
    described["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": False}
    (folder / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(ModelError, match=r"cannot be aligned by bytes: .*WordPiece"):
        train(tmp_path, *TINY, f"model.teacher.path={folder}", ALIGNED)
