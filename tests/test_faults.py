"""Kills, full disks, locks, signals and damaged checkpoints: the promises of reliability.md."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from running import (
    SMALL,
    assert_same_weights,
    command,
    environment,
    last_of_each,
    lines,
    results,
    snapshot,
    start,
    train,
    train_rows,
    wait_until,
    words,
)

import reopold_agent.evaluate.run as eval_run
from reopold_agent.common.files import replaced_folder, write_bytes_atomic
from reopold_agent.errors import CheckpointError, ReopoldError, StorageError
from reopold_agent.tracking.metrics import JsonLines, read_json_lines
from reopold_agent.tracking.run_folder import RunFolder
from reopold_agent.train import evaluation, finish, recovery, resume, step_log
from reopold_agent.train.checkpoint import check_files, newest_checkpoint
from reopold_agent.train.step_log import StepLog

REPOSITORY = Path(__file__).resolve().parents[1]
KILLS = int(os.environ.get("REOPOLD_TEST_KILLS", "8"))
SHORT = ("steps=4", "checkpoint.every=1", "evaluation.tasks=1", "evaluation.every=0")
EVALUATION = (
    "benchmarks.demo.limit=8",
    "samples=1",
    "agentic.max_turn_tokens=40",
    "agentic.max_response_tokens=160",
    "engine.threads=1",
)


def nothing_left_over(folder: Path) -> None:
    assert not list(folder.rglob(".*.tmp"))


# Kills


@pytest.mark.slow
def test_a_run_killed_repeatedly_has_the_same_result(tmp_path: Path) -> None:
    """``REOPOLD_TEST_KILLS=50`` for the whole proof; the figures are in docs/reliability.md."""
    figures = tmp_path / "figures.json"
    script = str(REPOSITORY / "benchmarks" / "faults.py")
    done = subprocess.run(
        [sys.executable, script, "--kills", str(KILLS), "--json", str(figures)],
        capture_output=True,
        text=True,
        env={**environment(), "TMPDIR": str(tmp_path)},
        timeout=800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    train_report, evaluate_report = json.loads(figures.read_text("utf-8"))
    for report in (train_report, evaluate_report):
        assert report["kills"] == sum(report["landed"].values()) == KILLS
        assert report["problems"] == report["different"] == []
    assert len(train_report["landed"]) >= 2


def test_a_killed_owner_leaves_no_lock_and_no_leftovers(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    code = (
        "import sys, time\n"
        "from reopold_agent.tracking.run_folder import RunFolder\n"
        "with RunFolder(sys.argv[1]).lock() as run:\n"
        "    (run.checkpoints / '.step-000003.7.tmp' / 'model').mkdir(parents=True)\n"
        "    (run.pictures / '.a.png.7.tmp').write_text('half')\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)\n"
    )
    owner = start([sys.executable, "-c", code, str(folder.path)], tmp_path)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "held\n"
    with pytest.raises(CheckpointError, match=f"in use by process {owner.pid}"), folder.lock():
        pytest.fail("two owners")
    assert list(folder.path.rglob(".*.tmp")), "a refused owner touches nothing"
    owner.kill()
    owner.communicate()
    with folder.lock():
        nothing_left_over(folder.path)


def test_a_replaced_folder_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    target = tmp_path / "final"
    with replaced_folder(target) as new:
        (new / "a").write_text("1")
        assert not target.exists()

    def lost() -> None:
        with replaced_folder(target) as new:
            (new / "a").write_text("2")
            raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        lost()
    assert (target / "a").read_text() == "1"
    with replaced_folder(target) as new:
        (new / "b").write_text("3")
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


# Two owners


@pytest.mark.slow
@pytest.mark.parametrize("what", ["train", "evaluate"])
def test_a_second_command_on_the_folder_is_refused_and_touches_nothing(
    tmp_path: Path, what: str
) -> None:
    folder = tmp_path / "run"
    if what == "train":
        arguments = words(folder, "steps=400", "evaluation.every=0")
        begun = lambda: len(train_rows(folder)) >= 1  # noqa: E731
    else:
        arguments = evaluate_words(folder, "benchmarks.demo.limit=800")
        begun = lambda: len(lines(folder / "responses.jsonl")) >= 1  # noqa: E731
    owner = start(arguments, tmp_path)
    try:
        wait_until(begun, owner)
        os.kill(owner.pid, signal.SIGSTOP)  # so that all that changes is the second's doing
        wait_until(lambda: is_stopped(owner.pid), owner)  # a thread may still be writing
        before = {
            p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.suffix != ".log"
        }
        done = command(arguments, tmp_path)
        after = {
            p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.suffix != ".log"
        }
        os.kill(owner.pid, signal.SIGCONT)
        assert done.returncode == 2, done.stderr
        assert f"in use by process {owner.pid}" in done.stderr
        assert "Traceback" not in done.stderr
        assert after == before
        assert owner.poll() is None
    finally:
        owner.kill()
        owner.communicate()


def is_stopped(pid: int) -> bool:
    """Whether every thread of a process is stopped; also true where /proc cannot tell."""
    threads = list(Path(f"/proc/{pid}/task").glob("*/stat"))
    return all(each.read_text().rsplit(")", 1)[1].split()[0] == "T" for each in threads)


def evaluate_words(folder: Path, *overrides: str) -> list[str]:
    module = [sys.executable, "-m", "reopold_agent.evaluate"]
    return [*module, *last_of_each(*EVALUATION, *overrides), f"hydra.run.dir={folder}"]


# Full disks


class Disk:
    """A file system of a few megabytes that can be filled up and emptied."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def fill(self, leave: int = 0) -> None:
        self.free()
        room = os.statvfs(self.path)
        size = room.f_bavail * room.f_frsize - leave
        with self._ballast.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, max(4096, size // 4096 * 4096))

    def free(self) -> None:
        self._ballast.unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield Disk(place)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder, *SHORT)
    return folder


def full_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, disk: Disk) -> None:
    """Fills the disk before the ``call``-th call of a function."""
    original: Callable[..., Any] = getattr(owner, name)
    calls: list[int] = []

    def wrapped(*arguments: Any, **settings: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            disk.fill()
        return original(*arguments, **settings)

    monkeypatch.setattr(owner, name, wrapped)


def two_lines_about(error: ReopoldError, path: str) -> None:
    said = str(error).splitlines()
    assert len(said) == 2, said
    assert path in said[0]
    assert "No space left" in said[0]
    assert "ree some space" in said[1]
    assert "same command" in said[1]


PLACES = {
    "trajectories and pictures": (StepLog, "write_trajectories", 3, "run/", 2),
    "checkpoint": (recovery, "save_checkpoint", 3, "step-000003", 2),
    "final": (finish, "save_final", 1, "final", 4),
    "summary": (finish, "write_json_atomic", 1, "summary.json", 4),
    "plots": (finish, "make_plots", 1, "plots", 4),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_full_disk_is_reported_and_the_run_continues_later(
    whole: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    owner, name, call, told, kept = PLACES[place]
    folder = disk.path / "run"
    with monkeypatch.context() as patch:
        full_at(patch, owner, name, call, disk)
        with pytest.raises(ReopoldError) as caught:
            train(folder, *SHORT)
    two_lines_about(caught.value, told)
    newest = newest_checkpoint(folder / "checkpoints")
    assert newest is not None
    assert newest.name == f"step-{kept:06d}"
    check_files(newest)
    torch.load(newest / "state.pt", weights_only=True)
    nothing_left_over(folder)
    data = (folder / "metrics.jsonl").read_bytes()
    assert data.endswith(b"}\n")
    assert [row["step"] for row in train_rows(folder)] == list(range(len(train_rows(folder))))
    read_json_lines(folder / "trajectories.jsonl")
    if place in ("final", "summary"):
        assert not (folder / "summary.json").exists()
    disk.free()
    train(folder, *SHORT)
    assert results(folder) == results(whole)
    assert_same_weights(folder / "final", whole / "final")
    assert (folder / "plots" / "success.png").exists()


def test_a_row_of_metrics_that_does_not_fit_ends_the_run(
    whole: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = disk.path / "run"
    with monkeypatch.context() as patch:
        # Rows alone are written: the first may still fit its page, the next one does not.
        full_at(patch, step_log, "training_metrics", 3, disk)
        with pytest.raises(StorageError) as caught:
            train(folder, *SHORT, "checkpoint.every=2", "logging.trajectories=0")
    two_lines_about(caught.value, "metrics.jsonl")
    assert (folder / "metrics.jsonl").read_bytes().endswith(b"}\n")
    assert [row["step"] for row in train_rows(folder)][:2] == [0, 1]
    disk.free()
    train(folder, *SHORT)
    assert results(folder)["metrics.jsonl"] == results(whole)["metrics.jsonl"]
    assert_same_weights(folder / "final", whole / "final")


@pytest.mark.slow
def test_a_full_disk_at_the_start_is_two_lines_without_a_traceback(
    tmp_path: Path, disk: Disk
) -> None:
    folder = disk.path / "run"
    for leave in (0, 200_000, 3_000_000):
        disk.fill(leave)
        done = command(words(folder, *SHORT), tmp_path)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr, (leave, done.stderr)
        assert "No space left" in done.stderr, (leave, done.stderr)
        assert len(done.stderr.strip().splitlines()) == 2, done.stderr
        disk.free()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize(
    ("owner", "name", "call", "told"),
    [
        ("play", "response_row", 4, "run/"),
        ("run", "write_json_atomic", 2, "results.json"),  # after model.json
        ("run", "write_page", 1, "report.html"),
        ("run", "make_plots", 1, "scaling-demo.png"),
    ],
)
def test_a_full_disk_in_an_evaluation(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, owner: str, name: str, call: int, told: str
) -> None:
    folder = disk.path / "run"
    module = {"run": eval_run, "play": sys.modules["reopold_agent.evaluate.answers"]}[owner]
    with monkeypatch.context() as patch:
        full_at(patch, module, name, call, disk)
        with pytest.raises(StorageError) as caught:
            evaluate(folder)
    two_lines_about(caught.value, told)
    rows = read_json_lines(folder / "responses.jsonl")
    assert (folder / "responses.jsonl").read_bytes().endswith(b"}\n")
    nothing_left_over(folder)
    disk.free()
    figures = evaluate(folder)["benchmarks"]["demo"]
    assert figures["answers"] == 16
    again = read_json_lines(folder / "responses.jsonl")
    assert again[: len(rows)] == rows  # what was written is not asked again
    assert (folder / "report.html").exists()


def evaluate(folder: Path) -> dict[str, Any]:
    from hydra import compose, initialize_config_module

    with initialize_config_module("reopold_agent.configs", version_base="1.3"):
        composed = compose("evaluate", [*EVALUATION, "samples=2", "ks=[1,2]"])
    config, raw = eval_run.load_config(composed)
    return eval_run.Evaluation(config, raw, folder).run()


def test_a_read_only_run_folder_is_reported(whole: Path, disk: Disk) -> None:
    folder = disk.path / "run"
    shutil.copytree(whole, folder)
    subprocess.run(["mount", "-o", "remount,ro", str(disk.path)], check=True)
    with pytest.raises(ReopoldError, match="Read-only file system"):
        train(folder, *SHORT)
    subprocess.run(["mount", "-o", "remount,rw", str(disk.path)], check=True)


def test_what_the_system_refuses_names_the_file_and_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "x.json"
    with pytest.raises(StorageError, match=r"cannot write .*x\.json: No such file"):
        write_bytes_atomic(path, b"1")
    path.parent.mkdir()
    path.mkdir()
    with pytest.raises(StorageError, match=r"cannot write .*x\.json"):
        write_bytes_atomic(path, b"1")
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]
    with pytest.raises(StorageError, match=r"cannot write .*x\.json"):
        JsonLines(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with JsonLines(tmp_path / "rows.jsonl") as writer:
        writer.write({"a": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
        try:
            with pytest.raises(StorageError, match=r"(?s)rows\.jsonl: File too large.*ulimit -f"):
                writer.write({"a": "long" * 20})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        writer.write({"a": 2})
    assert read_json_lines(tmp_path / "rows.jsonl") == [{"a": 1}, {"a": 2}]


# Damaged checkpoints


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_folder(path: Path) -> None:  # stands for a file that cannot be read; root reads all others
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", ["state.pt", "model/model.safetensors", "model/config.json"])
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink, make_folder])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_offered(
    whole: Path, tmp_path: Path, damage: Callable[[Path], Any], name: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "summary.json").unlink()
    newest, before = (folder / "checkpoints" / f"step-{n:06d}" for n in (4, 3))
    damage(newest / name)
    with pytest.raises(CheckpointError) as caught:
        train(folder, *SHORT)
    said = str(caught.value)
    assert str(newest / name) in said.splitlines()[0]
    assert f"remove {newest}" in said
    assert f"go on from {before}" in said
    shutil.rmtree(newest)  # as it says
    train(folder, *SHORT)
    assert results(folder) == results(whole)
    assert_same_weights(folder / "final", whole / "final")


def test_a_damaged_only_checkpoint_offers_the_start(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-000003")
    (folder / "checkpoints" / "step-000004" / "trainer.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"(?s)trainer\.json.*from the start"):
        train(folder, *SHORT)


@pytest.mark.parametrize("name", ["config.yaml", "summary.json"])
def test_other_files_that_are_damaged_are_named(whole: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / name).write_text("{a: [")
    with pytest.raises(CheckpointError, match=f"cannot read .*{name}"):
        train(folder, *SHORT)


# Signals


@pytest.mark.slow
def test_sigterm_ends_training_as_ctrl_c_does(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = ("steps=6", "checkpoint.every=0", "evaluation.every=0", "evaluation.tasks=1")
    process = start(words(folder, *settings), tmp_path)
    wait_until(lambda: len(train_rows(folder)) >= 1, process)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 143, error
    assert "Traceback" not in error
    (saved,) = os.listdir(folder / "checkpoints")
    step = int(saved.removeprefix("step-"))
    assert f"Stopped after step {step}; saved" in error
    assert len(train_rows(folder)) == step
    done = command(words(folder, *settings), tmp_path)
    assert done.returncode == 0, done.stderr
    train(tmp_path / "whole", *settings)
    assert results(folder) == results(tmp_path / "whole")


SLOW = """
import sys, time
from reopold_agent.train.loop import TrainingLoop
from reopold_agent.train.__main__ import main
step = TrainingLoop.step
def slow(self, number, position):
    if number == 1:
        print("in the step", flush=True)
        time.sleep(600)
    return step(self, number, position)
TrainingLoop.step = slow
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    arguments = [sys.executable, "-c", SLOW, *words(folder, "steps=3", "evaluation.tasks=1")[3:]]
    process = start(arguments, tmp_path)
    wait_until(lambda: len(train_rows(folder)) == 1, process)
    time.sleep(0.5)
    process.send_signal(number)
    time.sleep(0.5)
    assert process.poll() is None  # it waits for its step
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == (143 if number == signal.SIGTERM else 130), error
    assert "press Ctrl-C again to stop at once" in error
    assert "Traceback" not in error


LAST = """
import os, signal
from reopold_agent.train.loop import TrainingLoop
from reopold_agent.train.__main__ import main
step = TrainingLoop.step
def signalled(self, number, position):
    os.kill(os.getpid(), signal.SIGINT)
    return step(self, number, position)
TrainingLoop.step = signalled
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True])
def test_a_signal_in_the_last_step_of_a_run_ends_those_that_would_follow(
    tmp_path: Path, several: bool
) -> None:
    settings = last_of_each(*SMALL, "steps=1", "evaluation.tasks=0")
    more = ["--multirun", "seed=0,1", "hydra.sweep.dir=."] if several else ["hydra.run.dir=0"]
    done = command([sys.executable, "-c", LAST, *more, *settings], tmp_path)
    assert done.returncode == (130 if several else 0), done.stderr
    assert "Traceback" not in done.stderr
    assert [path.parent.name for path in tmp_path.glob("*/summary.json")] == ["0"]


def test_a_signal_in_an_evaluation_loses_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops at once: the step before it is saved, and resuming repeats the evaluation."""
    settings = (*SHORT, "evaluation.every=2", "evaluation.curve_tasks=3")
    train(tmp_path / "whole", *settings)
    folder = tmp_path / "run"
    original = evaluation.play_held_out
    played: list[int] = []

    def interrupted(*arguments: Any, on_done: Callable[[Any], None], **others: Any) -> Any:
        def count(trajectory: Any) -> None:
            played.append(1)
            if len(train_rows(folder)) == 2 and len(played) > 4:
                os.kill(os.getpid(), signal.SIGTERM)
            on_done(trajectory)

        return original(*arguments, on_done=count, **others)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "play_held_out", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(folder, *settings)
    curve = [r for r in lines(folder / "metrics.jsonl") if r["kind"] == "eval" and r["curve"]]
    assert curve == []
    assert newest_checkpoint(folder / "checkpoints") == folder / "checkpoints" / "step-000002"
    train(folder, *settings)
    assert results(folder) == results(tmp_path / "whole")


@pytest.mark.slow
def test_sigterm_ends_an_evaluation_as_ctrl_c_does(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = ("benchmarks.demo.limit=200", "engine.concurrency=4")
    process = start(evaluate_words(folder, *settings), tmp_path)
    wait_until(lambda: len(lines(folder / "responses.jsonl")) >= 3, process)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    assert "The same command with the same hydra.run.dir continues" in error
    assert "Traceback" not in error
    kept = read_json_lines(folder / "responses.jsonl")
    assert 3 <= len(kept) < 200
    done = command(evaluate_words(folder, *settings), tmp_path)
    assert done.returncode == 0, done.stderr
    again = read_json_lines(folder / "responses.jsonl")
    assert again[: len(kept)] == kept
    assert len(again) == 200


def test_a_finished_run_is_left_alone(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "make_plots", lambda folder: None)
    before = snapshot(whole)
    train(whole, *SHORT)
    assert snapshot(whole) == before
