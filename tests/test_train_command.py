"""``python -m reopold_agent.train`` as a user types it: processes, signals, files, output."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from PIL import Image
from running import (
    assert_same_weights,
    command,
    composed,
    environment,
    lines,
    results,
    snapshot,
    start,
    train,
    train_rows,
    wait_until,
    words,
)
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from reopold_agent.view.export import export_page
from reopold_agent.view.run import Run

SETTINGS = ("steps=5", "checkpoint.every=2", "data.train.size=8")

TRAIN_KEYS = {
    *("kind", "step", "phase", "loss", "grad_norm", "lr"),
    *("reward/mean", "reward/min", "reward/max", "reward/clipped_mean", "reward/below_floor"),
    *("reward/floor", "reward/histogram", "reward/clipped_histogram"),
    *("reward/abs_by_entropy_decile", "entropy/mean", "entropy/percentiles", "entropy/threshold"),
    *("mask/kept_share", "mask/exploration_share", "mask/refinement_share"),
    *("ratio/mean", "ratio/max", "ratio/ppo_clip_share"),
    *("rollout/success", "rollout/reward", "rollout/tool_rate", "rollout/tool_errors"),
    *("rollout/response_tokens", "rollout/turns", "rollout/stop/answer"),
    *("time/generate", "time/environment", "time/teacher", "time/old_logp", "time/update"),
    *("time/sync", "time/other", "time/step", "tokens_per_second", "perf/padding_share"),
}
EVAL_KEYS = {
    *("kind", "step", "who", "sampling", "success", "low", "high", "n", "tool_rate"),
    *("response_tokens", "stop/answer"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(place: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run that nothing happened to. Tests must not change its folder."""
    folder = place / "whole"
    done = command(words(folder, *SETTINGS), place)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.mark.parametrize("job", ["train", "evaluate"])
def test_the_terminal_says_what_seems_wrong_in_the_rows(job: str, tmp_path: Path) -> None:
    row = {"problem": "Which one?", "answer": "A", "left_image": "a.png"}
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({**row, "id": i}) for i in range(3)))
    asked = [f"+benchmarks.mine={{path: {file}, format: math_jsonl}}", "model=demo:nothing"]
    if job == "train":
        asked = ["env=math", "data=math_jsonl", f"data.train.path={file}", f"data.eval.path={file}"]
        asked += ["steps=1", "batch.prompts=1", "batch.mini_batch=1", "evaluation.tasks=0"]
    done = command(
        [sys.executable, "-m", f"reopold_agent.{job}", *asked, "hydra.run.dir=run"], tmp_path
    )
    assert f"warning: 3 of 3 rows of {file} have a column 'left_image' that looks" in done.stderr
    assert "\nwarning: 3 of 3 rows of " in done.stderr  # options that are not there


# What a run leaves


@pytest.mark.slow
def test_a_run_writes_the_documented_files(
    whole: tuple[Path, subprocess.CompletedProcess[str]], place: Path
) -> None:
    folder, _ = whole
    overrides = [word for word in words(folder, *SETTINGS)[3:] if not word.startswith("hydra.")]
    _, raw = composed(*overrides)
    # Resolved, so that a run that goes on for more steps does not explore again.
    raw["objective"]["switch_step"] = int(raw["objective"]["switch_share"] * raw["steps"] + 0.5)
    assert yaml.safe_load((folder / "config.yaml").read_text("utf-8")) == raw

    versions = json.loads((folder / "versions.json").read_text("utf-8"))
    root = Path(__file__).parents[1]
    if (root / ".git").exists():
        head = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True
        )
        assert versions["git"]["commit"] == head.stdout.strip()
    assert versions["packages"]["torch"]
    assert versions["device"] == "cpu"

    rows = lines(folder / "metrics.jsonl")
    steps = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in steps] == list(range(5))
    for row in steps:
        assert not TRAIN_KEYS - row.keys()
        parts = sum(v for k, v in row.items() if k.startswith("time/") and k != "time/step")
        assert parts == pytest.approx(row["time/step"], rel=0.02)
    evaluations = [row for row in rows if row["kind"] == "eval"]
    for row in evaluations:
        assert not EVAL_KEYS - row.keys()
    assert [(r["who"], r["step"], r["sampling"], r["curve"], r["n"]) for r in evaluations] == [
        ("student", 0, "sampled", False, 3),
        ("student", 0, "greedy", False, 3),
        ("teacher", 0, "sampled", False, 3),
        ("teacher", 0, "greedy", False, 3),
        ("student", 2, "sampled", True, 2),
        ("student", 4, "sampled", True, 2),
        ("student", 5, "sampled", False, 3),
        ("student", 5, "greedy", False, 3),
    ]

    trajectories = lines(folder / "trajectories.jsonl")
    assert len(trajectories) == 5 * 4
    for row in trajectories:
        assert row["images"]
        for image in row["images"]:
            with Image.open(folder / image["picture"]) as picture:
                assert picture.size == (image["width"], image["height"])
        assert row["teacher_logp"] is not None
        assert len(row["ids"]) == len(row["tokens"]) == len(row["logp"])
        assert "<tools>" in row["prompt"]
    assert len({row["task_id"] for row in trajectories[:8]}) == 8

    plots = {path.name for path in (folder / "plots").iterdir()}
    assert plots >= {"success.png", "reward_histogram.png", "entropy_and_masks.png", "time.png"}
    for path in (folder / "plots").iterdir():
        with Image.open(path) as picture:
            assert min(picture.size) > 200

    assert sorted(os.listdir(folder / "checkpoints")) == ["step-000004", "step-000005"]
    AutoTokenizer.from_pretrained(folder / "final")
    Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "final")
    assert_same_weights(folder / "final", folder / "checkpoints/step-000005/model")

    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    for name, who, step in (
        ("before", "student", 0),
        ("after", "student", 5),
        ("teacher",) * 2 + (0,),
    ):
        for part, sampling in ((summary[name], "sampled"), (summary[name]["greedy"], "greedy")):
            (row,) = [
                r
                for r in evaluations
                if (r["who"], r["step"], r["sampling"], r["curve"]) == (who, step, sampling, False)
            ]
            for key in ("success", "low", "high", "n", "tool_rate"):
                assert part[key] == row[key]
            assert 0 <= part["low"] <= part["success"] <= part["high"] <= 1
    assert (summary["env"], summary["steps"], summary["seed"]) == ("pixel_reasoner", 5, 0)
    assert Path(summary["run"]) == folder
    assert 0 < summary["train_seconds"] < summary["seconds"]
    assert (folder / "train.log").exists()
    known = {
        *("config.yaml", "versions.json", "metrics.jsonl", "trajectories.jsonl", "summary.json"),
        *("pictures", "plots", "checkpoints", "final", "train.log", ".lock", "model.json"),
    }
    assert set(os.listdir(folder)) == known
    assert os.listdir(place) == ["whole"]  # nothing beside it, .hydra or outputs


@pytest.mark.slow
def test_plain_output_is_plain_and_says_what_to_run_next(
    whole: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = whole
    assert "\x1b" not in done.stdout + done.stderr
    assert (done.stdout + done.stderr).isascii()
    assert "\r" not in done.stdout + done.stderr
    for step in range(1, 6):
        assert re.search(rf"step {step}/5 .*success .*reward .* left", done.stdout)
    for text in ("student before", "student after", "teacher", "95 % interval", str(folder)):
        assert text in done.stdout
    assert "rollout.max_turns=2 " in done.stdout.split("Next:")[1]
    assert f"steps=10 hydra.run.dir={folder}" in done.stdout
    assert done.stderr == ""


# Killed, interrupted, refused


def rows(folder: Path) -> int:
    return len(train_rows(folder))


DIES_WRITING = """
import os, signal
from reopold_agent.common import files
from reopold_agent.train.__main__ import main
flush, count = files.flush_tree, []
def die(folder):
    count.append(1)
    if len(count) == 2:  # all files of the second checkpoint are there
        os.kill(os.getpid(), signal.SIGKILL)
    flush(folder)
files.flush_tree = die
main()
"""


@pytest.mark.slow
def test_killed_at_any_time_and_resumed_it_is_the_same_run(
    whole: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    checkpoints = folder / "checkpoints"
    arguments = words(folder, *SETTINGS)
    # While a checkpoint is written: it does not count.
    done = command([sys.executable, "-c", DIES_WRITING, *arguments[3:]], tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = sorted(os.listdir(checkpoints))
    assert left[0].startswith(".step-000004.")
    assert left[1:] == ["step-000002"]
    assert rows(folder) == 4
    # In mid-step: the rows after the checkpoint of step 2 are made again.
    process = start(arguments, tmp_path)
    wait_until(lambda: rows(folder) == 3, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert rows(folder) == 3
    assert "step-000002" in os.listdir(checkpoints)
    # At any time at all. Unseeded on purpose; a failure prints the delay.
    process = start(arguments, tmp_path)
    delay = random.uniform(1.0, 8.0)
    print(f"killed after {delay:.3f} s")
    time.sleep(delay)
    process.kill()
    process.wait()
    done = command(arguments, tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(checkpoints)) == ["step-000004", "step-000005"]
    assert results(folder) == results(whole[0])
    assert_same_weights(folder / "final", whole[0] / "final")
    ours, theirs = (json.loads((each / "summary.json").read_text()) for each in (folder, whole[0]))
    for key in ("before", "after", "teacher"):
        assert ours[key] == theirs[key]


@pytest.mark.slow
def test_ctrl_c_saves_and_its_command_continues(
    whole: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "a run"
    process = start(words(folder, *SETTINGS, "checkpoint.every=0", "resume=never"), tmp_path)
    wait_until(lambda: rows(folder) >= 2, process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    (saved,) = os.listdir(folder / "checkpoints")
    step = int(saved.removeprefix("step-"))
    assert 2 <= step < 5
    assert rows(folder) == step  # the step was finished
    assert f"Stopped after step {step}" in error
    assert not (folder / "summary.json").exists()

    printed = error.split("Continue with:\n")[1].strip().splitlines()[0].strip()
    assert printed.startswith("python -m reopold_agent.train ")
    assert "resume=" not in printed
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = command(printed, elsewhere)
    assert done.returncode == 0, done.stderr
    assert f"at step {step}" in done.stdout
    assert results(folder) == results(whole[0])
    assert_same_weights(folder / "final", whole[0] / "final")


@pytest.mark.slow
def test_a_refused_command_touches_nothing(
    whole: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder = whole[0]
    before = snapshot(folder)
    done = command(words(folder, *SETTINGS, "seed=1", "optimizer.lr=1e-3"), tmp_path)
    assert done.returncode == 2
    assert "optimizer.lr: 0.0003 -> 0.001" in done.stderr
    assert "seed: 0 -> 1" in done.stderr
    assert "Traceback" not in done.stderr
    assert snapshot(folder) == before


@pytest.mark.slow
def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    """A file size limit is the nearest to a full disk that needs no other file system."""
    folder = tmp_path / "run"
    limit = 1_200_000  # less than model.safetensors, more than everything else
    done = command(
        words(folder, "steps=1", "evaluation.tasks=1", "evaluation.teacher=false"),
        tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "could not write checkpoint" in done.stderr
    assert "there is no earlier one" in done.stderr
    assert os.listdir(folder / "checkpoints") == []


# The command line


def _main(*arguments: str, then: str = "") -> subprocess.CompletedProcess[str]:
    code = f"""
import sys
sys.argv = ["train", *{arguments!r}]
from reopold_agent.train.__main__ import main
main()
{then}
"""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=60
    )


def test_the_whole_configuration_is_printed_without_torch() -> None:
    done = _main("--cfg", "job", "seed=3", then="assert 'torch' not in sys.modules, 'torch'")
    assert done.returncode == 0, done.stderr
    printed = OmegaConf.to_container(OmegaConf.create(done.stdout), resolve=True)
    assert isinstance(printed, dict)
    config = composed("seed=3")[1]
    assert {k: v for k, v in printed.items() if k in config} == config


def test_help_lists_groups_and_examples() -> None:
    done = _main("--help")
    assert done.returncode == 0
    for text in ("pixel_reasoner", "qwen2_5_vl_3b", "verl", "hydra.run.dir=", "mixture: 0.1"):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("argument", "code", "text"),
    [
        ("stps=3", 2, "unknown setting 'stps'.\n  Did you mean 'steps'?"),
        ("+stps=3", 2, "unknown setting 'stps'.\n  Did you mean 'steps'?"),
        ("env=pixel_resoner", 2, "Did you mean 'pixel_reasoner'?"),
        ("model=dem", 2, "Did you mean 'demo'?"),
        ("data=verll", 2, "Did you mean 'verl'?"),
        ("steps=many", 2, "'steps' must be int, got 'many'"),
        ("data=verl", 2, "data.eval.path, data.train.path"),
        ("env=gym:FrozenLake-v1 data=verl", 2, "'data': env=gym:FrozenLake-v1 makes its own tasks"),
        ("objective.mixture=2", 2, "objective.mixture"),
    ],
)
def test_errors_are_reported_without_a_traceback(
    argument: str, code: int, text: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    done = _main(*argument.split(), f"hydra.run.dir={folder}")
    assert done.returncode == code
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "config.yaml").exists()


def test_no_steps_evaluate_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = train(tmp_path / "run", "steps=0")
    assert summary["before"] == summary["after"]
    assert (summary["before"]["n"], summary["teacher"]["n"]) == (3, 3)
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert {(row["kind"], row["who"]) for row in rows} == {("eval", "student"), ("eval", "teacher")}
    assert not (tmp_path / "run" / "final").exists()  # a copy of the student would be a waste
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert [p.name for p in (tmp_path / "run" / "plots").iterdir()] == ["success.png"]
    text = capsys.readouterr().out
    assert "not trained" in text
    assert "student after" not in text
    assert not any("final" in command for command in summary["next"])


def test_no_held_out_tasks_train_without_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = train(tmp_path / "run", "steps=2", "evaluation.tasks=0", "evaluation.every=1")
    assert summary["before"] is summary["after"] is summary["teacher"] is None
    assert [r["kind"] for r in lines(tmp_path / "run" / "metrics.jsonl")] == ["train", "train"]
    assert (tmp_path / "run" / "final" / "config.json").is_file()
    text = capsys.readouterr().out
    assert "Trained without held-out evaluation, pixel_reasoner, 2 steps" in text
    assert "student before" not in text
    assert "held-out: " not in text
    export_page([Run(tmp_path / "run")], tmp_path / "page.html")
