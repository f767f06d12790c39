"""What a run says and keeps for afterwards: next commands, more steps, logs, empty folders."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from PIL import Image
from running import command, composed, lines, results, train, train_rows, words
from safetensors.torch import load_file, save_file

from reopold_agent.config import config_differences
from reopold_agent.data import loading
from reopold_agent.errors import CheckpointError, ModelError
from reopold_agent.tracking.run_folder import RunFolder
from reopold_agent.train import evaluation, finish, setup
from reopold_agent.train.checkpoint import newest_checkpoint
from reopold_agent.train.finish import next_commands
from reopold_agent.train.interrupts import again
from reopold_agent.train.resume import FREE_TO_CHANGE, RunState

SHORT = (
    *("evaluation.tasks=2", "evaluation.teacher=false", "evaluation.every=0"),
    *("checkpoint.every=0", "objective.switch_share=0.5"),
)


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "make_plots", lambda folder: None)


def test_a_finished_run_goes_on_without_a_second_exploration(tmp_path: Path) -> None:
    """Optimizer, data and the step of the switch are those of one run with that switch."""
    folder = tmp_path / "run"
    first = train(folder, *SHORT)
    assert (folder / "checkpoints/step-000004").is_dir()
    more = train(folder, *SHORT, "steps=6")
    assert [row["phase"] for row in train_rows(folder)] == 2 * ["exploration"] + 4 * ["refinement"]
    whole = tmp_path / "whole"
    train(whole, *SHORT, "steps=6", "objective.switch_step=2")
    for name in ("metrics.jsonl", "trajectories.jsonl"):
        ends = [row for row in results(folder)[name] if (row["kind"], row["step"]) != ("eval", 4)]
        assert ends == results(whole)[name]
    assert (more["before"], more["steps"], more["after"]) == (
        first["before"],
        6,
        finish.summarise(lines(folder / "metrics.jsonl"), *_facts(6), folder)["after"],
    )
    saved = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
    assert (saved["steps"], saved["objective"]["switch_step"]) == (6, 2)
    # Again the same command does nothing, fewer steps are refused, and even more go on.
    assert train(folder, *SHORT, "steps=6") == more
    with pytest.raises(CheckpointError, match="steps: 6 -> 5"):
        train(folder, *SHORT, "steps=5")
    with pytest.raises(CheckpointError, match=r"optimizer\.lr: "):
        train(folder, *SHORT, "steps=7", "optimizer.lr=1")
    train(folder, *SHORT, "steps=7")
    assert train_rows(folder)[-1]["phase"] == "refinement"


def _facts(steps: int) -> tuple[Any]:
    from running import SMALL

    return (composed(*SMALL, *SHORT, f"steps={steps}")[0],)


@pytest.mark.parametrize(
    ("first", "more", "told"),
    [
        (
            1,
            0,
            r"note: no step explores, because objective.switch_share=0.33 of 1 step is less than",
        ),
        (
            1,
            6,
            r"note: no step explores. The run was started with too few .* for 2 steps \(.* of 6",
        ),
        (3, 6, r"note: exploration ends after step 1, as when .* For 2 steps of it"),
        (3, 0, None),
    ],
)
def test_a_run_with_less_exploration_says_so(
    first: int, more: int, told: str | None, tmp_path: Path
) -> None:
    words = ("evaluation.tasks=0", "checkpoint.every=0", "batch.prompts=2", "batch.mini_batch=2")
    summary = train(tmp_path, *words, f"steps={first}")
    if more:
        summary = train(tmp_path, *words, f"steps={more}")
    assert ("note" in summary) == (told is not None)
    if told is not None:
        assert re.match(told, summary["note"])


def test_exploration_that_the_user_sets_is_not_remarked_on(tmp_path: Path) -> None:
    for word in ("objective.switch_step=0", "objective.switch_share=0"):
        summary = train(tmp_path / word, "evaluation.tasks=0", "steps=1", word)
        assert "note" not in summary
    never = train(tmp_path / "never", "evaluation.tasks=0", "steps=1", "objective.switch_step=3")
    assert never["note"].startswith("note: every step explores, because objective.switch_step=3 is")


ROWS = [{"problem": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(8)]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    loading._load.cache_clear()  # another process would read the file again


OTHER = [{"problem": "What is 1 + 1?", "answer": "3"}, *ROWS[1:]]


@pytest.mark.parametrize(
    ("split", "rows", "told"),
    [
        ("train", ROWS[:5], r"8 rows of data\.train then, 5 now"),
        ("train", OTHER, r"8 rows of data\.train, but others now"),
        ("train", ROWS[::-1], r"8 rows of data\.train, but others now"),
        ("eval", ROWS[:5], r"8 rows of data\.eval then, 5 now"),
    ],
)
def test_a_run_does_not_go_on_with_other_rows(
    split: str, rows: list[dict[str, Any]], told: str, tmp_path: Path
) -> None:
    files = {each: tmp_path / f"{each}.jsonl" for each in ("train", "eval")}
    for file in files.values():
        write(file, ROWS)
    words = ["env=math", "data=math_jsonl", *(f"data.{k}.path={v}" for k, v in files.items())]
    words += ["evaluation.tasks=2", "evaluation.teacher=false", "evaluation.every=0"]
    words += ["rollout.max_turns=1", "evaluation.max_turns=1"]
    train(tmp_path / "run", *words, "steps=1")
    write(files[split], rows)
    told = rf"was started with other rows: {told}\.\nGive the same rows to continue it, or another"
    for _ in range(2):  # a refusal does not make the new rows the run's own
        with pytest.raises(CheckpointError, match=told):
            train(tmp_path / "run", *words, "steps=2")
    assert len(train_rows(tmp_path / "run")) == 1
    write(files[split], ROWS)
    assert train(tmp_path / "run", *words, "steps=2")["steps"] == 2


def test_a_run_of_an_earlier_version_goes_on_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    write(file, ROWS)
    words = ["env=math", "data=math_jsonl", f"data.train.path={file}", "evaluation.tasks=0"]
    train(tmp_path / "run", *words, "steps=1")
    (tmp_path / "run/data.json").unlink()
    write(file, ROWS[:5])
    capsys.readouterr()
    train(tmp_path / "run", *words, "steps=2")
    assert "did not record its rows" in " ".join(capsys.readouterr().out.split())
    write(file, ROWS)
    with pytest.raises(CheckpointError, match=r"5 rows of data\.train then, 8 now"):
        train(tmp_path / "run", *words, "steps=3")
    # A run that never saved a step starts over, with what is there.
    write(tmp_path / "new.jsonl", ROWS)
    state = RunState(composed(*words)[0], {}, RunFolder(tmp_path / "run"))
    assert state.check_data(continues=False) is None


def test_a_run_does_not_go_on_with_other_pictures(tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    Image.new("RGB", (56, 56), "red").save(data / "red.png")
    Image.new("RGB", (56, 56), "green").save(data / "green.png")

    def trained(picture: str, steps: int) -> int:
        row = {"problem": "<image>Which colour?", "answer": "5", "images": [picture]}
        write(data / "rows.jsonl", [row] * 4)
        words = ["env=geometry", "data=geometry3k", "model=figures", "evaluation.tasks=0"]
        words += [f"data.train.path={data}", "data.train.split=null", f"steps={steps}"]
        return int(train(run, *words)["steps"])

    assert trained("red.png", 1) == 1
    told = r"other rows: 4 rows of data\.train with other pictures now\.\nGive the same rows"
    with pytest.raises(CheckpointError, match=told):
        trained("green.png", 2)
    assert trained("red.png", 2) == 2
    known = json.loads((run / "data.json").read_text("utf-8"))
    for old in known.values():  # as an earlier version wrote it
        del old["pictures_sha256"]
    (run / "data.json").write_text(json.dumps(known), "utf-8")
    assert trained("green.png", 3) == 3
    with pytest.raises(CheckpointError, match=told):
        trained("red.png", 4)


def test_a_run_does_not_go_on_with_another_teacher_at_the_same_path(tmp_path: Path) -> None:
    weights = Path(str(resources.files("reopold_agent") / "demo" / "weights"))
    teacher, student, run = tmp_path / "teacher", tmp_path / "student", tmp_path / "run"
    shutil.copytree(weights / "arithmetic_teacher", teacher)
    shutil.copytree(weights / "arithmetic_student", student)
    words = ["env=math", "evaluation.tasks=0", f"model.teacher.path={teacher}"]
    words += [f"model.student.path={student}"]
    train(run, *words, "steps=1")

    def changed(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        found[min(found)].view(-1)[0] += 1
        save_file(found, folder / "model.safetensors", {"format": "pt"})

    changed(student)  # the run's own is in its checkpoint
    assert train(run, *words, "steps=2")["steps"] == 2
    changed(teacher)
    told = rf"started with other weights of the teacher in {teacher}\.\nPut those back"
    with pytest.raises(CheckpointError, match=told):
        train(run, *words, "steps=3")
    (run / "model.json").unlink()  # as an earlier version left it
    assert train(run, *words, "steps=3")["steps"] == 3
    changed(teacher)
    with pytest.raises(CheckpointError, match=told):
        train(run, *words, "steps=4")


def test_demonstrations_must_stay_the_same(tmp_path: Path) -> None:
    file = tmp_path / "expert.jsonl"

    def conversation(answer: str) -> dict[str, Any]:
        turns = [("user", "What is 2 + 2?"), ("assistant", f"It is \\boxed{{{answer}}}.")]
        return {"messages": [{"role": role, "content": text} for role, text in turns]}

    write(file, [conversation("4")] * 4)
    words = ["env=math", "objective=sft", "objective.source=recorded", "model.teacher=null"]
    words += ["evaluation.tasks=0", f"+data.demonstrations={{path: {file}}}"]
    train(tmp_path / "run", *words, "steps=1")
    write(file, [conversation("4")] * 3 + [conversation("5")])
    with pytest.raises(CheckpointError, match="4 demonstrations, but others now"):
        train(tmp_path / "run", *words, "steps=2")


def test_a_run_killed_while_it_goes_on_is_not_taken_for_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, *SHORT, "steps=1")
    with monkeypatch.context() as patch:
        patch.setattr(setup, "save_student", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path, *SHORT, "steps=2")
    assert not (tmp_path / "summary.json").exists()
    assert train(tmp_path, *SHORT, "steps=2")["steps"] == 2


def test_the_next_commands_repeat_the_words_of_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    summary = train(folder, *SHORT, "steps=1", "data=demo", "resume=never", "seed=3")
    view, evaluate, other_seed, more, export = map(shlex.split, summary["next"])
    module = ["python", "-m"]
    assert view == [*module, "reopold_agent.view", str(folder)]
    assert evaluate == [*module, "reopold_agent.evaluate", "env=pixel_reasoner", f"model={folder}"]
    assert {*SHORT, "data=demo", "steps=1", "seed=4"} <= {*other_seed}
    assert {*SHORT, "data=demo", "steps=2", "seed=3", f"hydra.run.dir={folder}"} <= {*more}
    assert not {"resume=never", "seed=3", "hydra.run.dir"} & {*other_seed}
    assert "steps=1" not in more
    assert export[2:] == [
        "reopold_agent.train.export",
        str(folder),
        f"{folder}-bf16",
        "dtype=bfloat16",
    ]


def test_words_with_spaces_and_plus_are_repeated_as_they_must_be_typed() -> None:
    given = ["+seed=1", "env.kwargs={a: 1}", "hydra.run.dir=x", "resume=must"]
    printed = again(given, "seed=2", "hydra.run.dir=a b")
    assert shlex.split(printed)[3:] == ["env.kwargs={a: 1}", "seed=2", "hydra.run.dir=a b"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_ctrl_c_in_an_evaluation_says_how_to_go_on(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = evaluation.play_held_out

    def interrupted(*arguments: Any, **others: Any) -> Any:
        trained = newest_checkpoint(tmp_path / "run/checkpoints") is not None
        if trained == (when == "after"):
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments, **others)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "play_held_out", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", *SHORT, "steps=1")
    said = capsys.readouterr().err
    expected = {
        "before": "before the first step; nothing was trained yet.\nStart again with:\n",
        "after": "after the last step; all 1 are saved.\nContinue with:\n",
    }
    assert f"Stopped in the evaluation {expected[when]}" in said
    assert said.rstrip().endswith(f"hydra.run.dir={tmp_path / 'run'}")
    assert train(tmp_path / "run", *SHORT, "steps=1")["after"]["n"] == 2


def test_a_refusal_before_the_run_leaves_nothing_in_its_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        train(tmp_path / "run", "model.student.path=/no/such/folder")
    assert list((tmp_path / "run").iterdir()) == []


CRASH = """
import sys
from reopold_agent.train.collect import Collector
from reopold_agent.train.__main__ import main
def broken(*_): raise RuntimeError("crashed here")
Collector.collect = broken
main()
"""


@pytest.mark.slow
def test_folders_and_logs_of_commands_that_end_early(tmp_path: Path) -> None:
    refused = (["rollout.concurrency=0"], ["model.student.path=/no/such", "hydra.run.dir=a/b"])
    for wrong in refused:
        done = command([*words(tmp_path)[:3], *wrong], tmp_path)
        assert done.returncode == 2, done.stderr
        assert list(tmp_path.iterdir()) == []
    python, _, _, *rest = words(tmp_path / "run", *SHORT, "evaluation.tasks=0")
    done = command([python, "-c", CRASH, *rest], tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("RuntimeError: crashed here") == 1
    log = (tmp_path / "run/train.log").read_text("utf-8")
    assert "Traceback (most recent call last)" in log
    assert "RuntimeError: crashed here" in log


@pytest.mark.slow
def test_the_folder_of_configurations_is_repeated(tmp_path: Path) -> None:
    own = tmp_path / "my, [own] configs/env"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("# @package _global_\ndefaults: [math]\n")
    flag = ["--config-dir", str(own.parent)]
    short = (
        "env=[mine,geometry]",
        "model=demo",
        "steps=0",
        "evaluation.tasks=1",
        "evaluation.teacher=false",
    )
    arguments = [*words(tmp_path / "run", *short), *flag]
    done = command(arguments, tmp_path)
    assert done.returncode == 0, done.stderr
    for module, section in (("train", "mix.envs"), ("evaluate", "environments")):
        lines = done.stdout.splitlines()
        printed = next(line for line in lines if f"reopold_agent.{module} " in line).strip()
        assert shlex.join(flag) in printed
        pasted = command(f"{printed} --cfg job", tmp_path)
        assert pasted.returncode == 0, pasted.stderr
        made = OmegaConf.create(pasted.stdout)
        assert OmegaConf.select(made, f"{section}.mine.env.name") == "math"


def test_the_evaluation_to_come_asks_for_the_option_of_the_run() -> None:
    # The option `mine` has the environment that is registered as `math`.
    config, _ = composed("env=math", "steps=0")
    places = ["--config-dir=a b", "hydra.searchpath=[file://c]"]
    for typed, asked in (("env=mine", "env=mine"), ("seed=1", "env=math")):
        _, evaluate = next_commands(config, Path("run"), [*places, "batch.prompts=4", typed])
        module = ["python", "-m", "reopold_agent.evaluate"]
        assert shlex.split(evaluate) == [*module, *places, asked, "model=DIR"]


def test_no_evaluation_is_proposed_where_there_are_no_held_out_tasks(tmp_path: Path) -> None:
    given = ("data=math_jsonl", f"data.train.path={tmp_path / 'rows.jsonl'}", "evaluation.tasks=0")
    config, _ = composed("env=math", *given)
    assert not any("evaluate" in each for each in next_commands(config, tmp_path, given))


def test_time_limits_may_change_and_other_settings_may_not() -> None:
    def differences(role: str, key: str) -> list[str]:
        saved, now = ({"engine": {role: {key: value}}} for value in (600, 900))
        return config_differences(saved, now, FREE_TO_CHANGE)

    assert differences("teacher_server", "stall_seconds") == []
    changed = ["engine.teacher_server.max_sequences: 600 -> 900"]
    assert differences("teacher_server", "max_sequences") == changed
    saved, now = ({"policy": {"student": {"seconds": value}}} for value in (1.0, 2.0))
    assert config_differences(saved, now, FREE_TO_CHANGE) == []


@pytest.mark.parametrize(
    "word", ["engine.max_tokens_per_micro_batch=64", "model.student.gradient_checkpointing=true"]
)
def test_what_is_advised_for_full_memory_may_change(word: str) -> None:
    _, saved = composed("env=math")
    _, now = composed("env=math", word)
    assert config_differences(saved, now, FREE_TO_CHANGE) == []
    assert config_differences(saved, now, ()) != []


def test_an_option_of_ones_own_overrides_what_stands_in_train_yaml(tmp_path: Path) -> None:
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [math]\nsteps: 2\nseed: 7\nsampling: {temperature: 0.6}\n"
        "checkpoint: {every: 5}\non_nonfinite: skip\nobjective: {importance_cap: 5}\n",
        "utf-8",
    )
    path = f"hydra.searchpath=[file://{tmp_path}]"
    config, _ = composed(path, "env=mine", "checkpoint.every=3")
    found = config.steps, config.seed, config.sampling.temperature, config.checkpoint.every
    assert found == (2, 7, 0.6, 3)
    assert config.on_nonfinite == "skip"
    assert config.objective["importance_cap"] == 5
