"""Real checkpoints' code path: folders in Hugging Face layout and the field's data formats, used
by overrides alone. Only the sizes are small."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import random_picture, tiny_config
from PIL import Image
from running import command, composed, environment, lines, train_rows, weights
from transformers import Qwen2_5_VLForConditionalGeneration

from reopold_agent.train import finish, step_log
from reopold_agent.train.setup import LocalEngine

SMALL = (
    "env=pixel_reasoner",
    "model=qwen2_5_vl_3b",
    "steps=2",
    "engine.device=cpu",
    "engine.threads=1",
    "batch.prompts=2",
    "batch.samples=2",
    "batch.mini_batch=1",
    "rollout.max_response_tokens=96",
    "rollout.max_turn_tokens=10",
    "pixels.prompt.min_pixels=9408",
    "pixels.prompt.max_pixels=12544",
    "pixels.observation.max_pixels=6272",
    "evaluation.tasks=2",
    "evaluation.curve_tasks=2",
    "evaluation.max_turns=2",
    "optimizer.lr=1e-4",
)


def png(seed: int, height: int = 90, width: int = 120) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(random_picture(seed, height, width)).save(encoded, "PNG")
    return encoded.getvalue()


def save_checkpoint(folder: Path, tokenizer: Any, vision: Any, seed: int, **text: Any) -> Path:
    """What `hf download` leaves: weights, configuration, tokenizer with template, processor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(tiny_config(tokenizer, **text))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    vision.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, vision: Any
) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    student = save_checkpoint(folder / "3B", tokenizer, vision, 0)
    wider = len(tokenizer) + 141  # the 7B's vocabulary is padded wider than the 3B's
    return student, save_checkpoint(folder / "7B", tokenizer, vision, 1, vocab_size=wider)


def pixel_reasoner_folder(folder: Path) -> Path:
    """Rows as parquet (train) and JSON lines (test), pictures and frames in zip archives."""
    folder.mkdir()
    frames = [f"videos/v1/frame_{i}.png" for i in range(3)]
    pictures = ["images/a.png", "images/deep/b.png"]
    for archive, names in (("images.zip", pictures), ("videos.zip", frames)):
        with zipfile.ZipFile(folder / archive, "w") as opened:
            for seed, name in enumerate(names):
                opened.writestr(name, png(seed))
    train = [
        {"qid": "q1", "question": "<image>What is it?", "answer": ["cat", "a cat"]},
        {"qid": "q2", "question": "How many?", "answer": ["3"]},
        {"qid": "q3", "question": "<video>What happens?", "answer": ["B"]},
    ]
    shown = [[pictures[0]], pictures, frames]
    train = [
        {**row, "image": names, "is_video": len(names) == 3}
        for row, names in zip(train, shown, strict=True)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(train), folder / "train.parquet")
    test = [
        {"qid": 7, "question": "Yes?", "answer": "yes", "image": pictures[:1], "is_video": False},
        {"qid": 8, "question": "When?", "answer": "A", "image": frames, "is_video": True},
    ]
    (folder / "test.jsonl").write_text("\n".join(json.dumps(row) for row in test), "utf-8")
    return folder


def verl_folder(folder: Path) -> Path:
    """VerlTool's parquet files: pictures by path and by bytes, frames in extra_info."""
    (folder / "pictures").mkdir(parents=True)
    names = [f"pictures/{i}.png" for i in range(3)]
    for seed, name in enumerate(names):
        (folder / name).write_bytes(png(seed))

    def row(index: int, question: str, images: Sequence[Any], **extra: Any) -> dict[str, Any]:
        return {
            "data_source": "pixel_reasoner",
            "prompt": [
                {"role": "system", "content": "You are another assistant."},
                {"role": "user", "content": "<image>" * len(images) + question},
            ],
            "images": list(images),
            "ability": "visual_reasoning",
            "reward_model": {"style": "rule", "ground_truth": "4"},
            "extra_info": {"split": "train", "index": index, "is_video": False, **extra},
        }

    paths = [
        row(0, "How many dots?", [{"image": names[0]}], qid="v0"),
        row(1, "What changes?", [{"image": name} for name in names], qid="v1", is_video=True),
    ]
    inside = [row(i, "Which number?", [{"bytes": png(i), "path": None}]) for i in range(2)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(paths), folder / "train.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(inside), folder / "test.parquet")
    return folder


def check_run(folder: Path, student: Path, questions: dict[str, tuple[str, int]]) -> None:
    """The run trained on these tasks (id: question, pictures) and is whole."""
    rows = train_rows(folder)
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert row["rollout/episodes"] == 4
        assert row["rollout/stop/env_error"] == 0
        assert np.isfinite([row["loss"], row["grad_norm"], row["reward/mean"]]).all()
        assert row["grad_norm"] > 0
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert [summary[who]["n"] for who in ("before", "after", "teacher")] == [2, 2, 2]
    seen = set()
    for row in lines(folder / "trajectories.jsonl"):
        question, pictures = questions[row["task_id"]]
        seen.add(row["task_id"])
        assert question in row["prompt"]
        assert "<image>" not in row["prompt"]
        assert "<video>" not in row["prompt"]
        shown = row["images"][:pictures]
        assert row["prompt"].count("<|vision_start|>") == pictures == len(shown)
        for image in shown:
            assert 9408 <= image["width"] * image["height"] <= 12544
            assert (folder / image["picture"]).is_file()
    assert len(seen) >= 2
    before, after = weights(student), weights(folder / "final")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert max(float((before[n] - after[n]).abs().max()) for n in before) < 1e-2
    Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "final")


PIXEL_REASONER = {
    "q1": ("What is it?", 1),
    "q2": ("How many?", 2),
    "q3": ("What happens?", 3),
}


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "make_plots", lambda folder: None)


def train(folder: Path, *overrides: str) -> None:
    words = [*SMALL, *overrides]
    with torch.random.fork_rng(devices=[]):
        LocalEngine(*composed(*words), folder, words).run()


@pytest.mark.slow
def test_pixel_reasoner_s_layout_by_the_command(
    checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    student, teacher = checkpoints
    data = pixel_reasoner_folder(tmp_path / "data")
    done = command(
        [
            *(sys.executable, "-m", "reopold_agent.train", *SMALL),
            f"model.student.path={student}",
            f"model.teacher.path={teacher}",
            f"data.train.path={data}",
            f"data.eval.path={data}",
            "data.eval.split=test",
            "hydra.run.dir=run",
        ],
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert environment()["HF_HUB_OFFLINE"] == "1"
    check_run(tmp_path / "run", student, PIXEL_REASONER)
    kept = json.loads((tmp_path / "run/versions.json").read_text())
    assert kept["device"] == "cpu"


@pytest.mark.usefixtures("no_plots")
def test_extracted_pictures_and_frames(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    student, teacher = checkpoints
    data = pixel_reasoner_folder(tmp_path / "data")
    for archive in ("images.zip", "videos.zip"):
        with zipfile.ZipFile(data / archive) as opened:
            opened.extractall(data)
        (data / archive).unlink()
    train(
        tmp_path / "run",
        f"model.student.path={student}",
        f"model.teacher.path={teacher}",
        f"data.train.path={data / 'train.parquet'}",
        f"data.eval.path={data / 'test.jsonl'}",
        "model.student.attention=eager",
    )
    check_run(tmp_path / "run", student, PIXEL_REASONER)


@pytest.mark.usefixtures("no_plots")
def test_verl_s_parquet(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    student, teacher = checkpoints
    data = verl_folder(tmp_path / "data")
    train(
        tmp_path / "run",
        "data=verl",
        f"model.student.path={student}",
        f"model.teacher.path={teacher}",
        f"data.train.path={data / 'train.parquet'}",
        f"data.eval.path={data / 'test.parquet'}",
        "pixels.prompt.min_pixels=9408",
        "pixels.prompt.max_pixels=12544",
    )
    check_run(tmp_path / "run", student, {"v0": ("How many dots?", 1), "v1": ("What changes?", 3)})


@pytest.mark.slow
@pytest.mark.usefixtures("no_plots")
def test_the_real_vocabulary(
    qwen_tokenizer: Any, vision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """151,936 rows for the student, 152,064 for the teacher, Qwen2.5-VL's own template."""
    said: list[str] = []
    original: Callable[..., Any] = step_log.trajectory_record
    monkeypatch.setattr(
        step_log,
        "trajectory_record",
        lambda *a, **k: (lambda r: (said.append(r["prompt"]), r)[1])(original(*a, **k)),
    )
    student = save_checkpoint(tmp_path / "3B", qwen_tokenizer, vision, 0, vocab_size=151_936)
    teacher = save_checkpoint(tmp_path / "7B", qwen_tokenizer, vision, 1, vocab_size=152_064)
    data = pixel_reasoner_folder(tmp_path / "data")
    train(
        tmp_path / "run",
        f"model.student.path={student}",
        f"model.teacher.path={teacher}",
        f"data.train.path={data}",
        f"data.eval.path={data}",
        "data.eval.split=test",
        "evaluation.teacher=true",
        "engine.max_tokens_per_micro_batch=600",
    )
    check_run(tmp_path / "run", student, PIXEL_REASONER)
    for prompt in said:
        assert prompt.startswith("<|im_start|>system\nYou are a helpful assistant.\n\n# Tools")
        assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    for row in lines(tmp_path / "run/trajectories.jsonl"):
        sampled = [i for i, student in zip(row["ids"], row["loss_mask"], strict=True) if student]
        assert max(sampled) < len(qwen_tokenizer)  # never one of the padded rows
