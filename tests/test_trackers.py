"""Trackers: they hold the rows of ``metrics.jsonl``, and never harm a run."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from running import command, environment, start, train, train_rows, wait_until, words

from reopold_agent.errors import CheckpointError, ConfigError, MissingExtraError, UnknownNameError
from reopold_agent.tracking.metrics import MetricsWriter, read_metrics
from reopold_agent.tracking.trackers import (
    TRACKERS,
    Point,
    Started,
    TrackedRun,
    base,
    feed,
    flat_settings,
    follow_run,
    make_trackers,
    point_of,
    send_results,
)
from reopold_agent.tracking.trackers.wandb import offline_records

Series = dict[str, list[tuple[int, float]]]

SETTINGS: dict[str, dict[str, Any]] = {
    "tensorboard": {},
    "wandb": {"mode": "offline"},
    "mlflow": {"uri": "mlruns"},
}


def train_row(step: int, value: float) -> dict[str, Any]:
    return {
        "kind": "train",
        "step": step,
        "phase": "exploration",
        "loss": value,
        "reward/mean": -value,
        "reward/histogram": {"edges": [0.0, 1.0], "counts": [3]},
        "entropy/threshold": None,
    }


def eval_row(step: int, sampling: str, success: float) -> dict[str, Any]:
    row = {"kind": "eval", "step": step, "who": "student", "sampling": sampling, "curve": False}
    return {**row, "success": success, "n": 8}


def rows_of_run(made_by: float, first: int = 0, last: int = 6) -> list[dict[str, Any]]:
    """Rows as a run writes them: an evaluation before step 0, one after step 3 (two rows)."""
    rows = []
    for step in range(first, last):
        if step in (0, 4) and not (step == first and step > 0):
            rows += [eval_row(step, "sampled", step / 10), eval_row(step, "greedy", step / 20)]
        rows.append(train_row(step, made_by + step))
    return rows


def wanted(folder: Path) -> Series:
    """The series that ``metrics.jsonl`` holds."""
    series: Series = {}
    for row in read_metrics(folder):
        point = point_of(row)
        for name, value in point.values.items():
            series.setdefault(name, []).append((point.step, value))
    return series


# The trackers' own readers


def read_tensorboard(folder: Path) -> Series:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = events.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
        if not tag.startswith("_hparams_")
    }


def read_mlflow(folder: Path) -> Series:
    tracking = pytest.importorskip("mlflow.tracking")
    client = tracking.MlflowClient(tracking_uri=(folder.parent / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("reopold")
    (run,) = client.search_runs([experiment.experiment_id])
    series = {}
    for name in run.data.metrics:
        if name != base.SENT:
            history = client.get_metric_history(run.info.run_id, name)
            series[name] = [(each.step, each.value) for each in history]
    return series


def read_wandb(folder: Path) -> Series:
    """All offline parts of the run, as ``wandb sync`` would upload them, in order."""
    pytest.importorskip("wandb")
    parts = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len({path.name for path in parts}) == 1, "parts of one run have one id"
    until = time.monotonic() + 60
    while [each.WhichOneof("record_type") for each in offline_records(parts[-1])][-1:] != ["exit"]:
        assert time.monotonic() < until, "wandb's process, which writes the file, does not end"
        time.sleep(0.05)
    series: Series = {}
    for path in parts:
        for record in offline_records(path):
            if record.WhichOneof("record_type") != "history":
                continue
            items = record.history.item
            values = {(each.key or "/".join(each.nested_key)): each.value_json for each in items}
            for name, value in values.items():
                if name not in ("step", base.SENT) and not name.startswith("_"):
                    point = (int(values["step"]), float(value))
                    series.setdefault(name, []).append(point)
    return series


READERS: dict[str, Callable[[Path], Series]] = {
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "mlflow": read_mlflow,
}


def assert_same(found: Series, expected: Series) -> None:
    assert found.keys() == expected.keys()
    for name, points in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        assert [v for _, v in found[name]] == pytest.approx([v for _, v in points], rel=1e-6), name


tracker = pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                importlib.util.find_spec(name) is None, reason=f"{name} is not installed"
            ),
        )
        for name in READERS
    ],
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    path = tmp_path / "run"
    path.mkdir()
    return path


def write(folder: Path, settings: dict[str, Any], *rows: dict[str, Any]) -> None:
    with follow_run(settings, folder, {"seed": 0, "model": {"path": None}}):
        metrics = MetricsWriter(folder / "metrics.jsonl")
        for row in rows:
            metrics.write(row)
        metrics.close()


def ends_with(
    error: BaseException, settings: dict[str, Any], folder: Path, *rows: dict[str, Any]
) -> None:
    """A run that writes some rows and ends with an error."""

    def run() -> None:
        with follow_run(settings, folder, {"seed": 0}):
            for row in rows:
                MetricsWriter(folder / "metrics.jsonl").write(row)
            time.sleep(0.1)
            raise error

    with pytest.raises(type(error)):
        run()


# Each tracker, read back


@tracker
def test_a_tracker_holds_what_metrics_jsonl_holds(name: str, folder: Path) -> None:
    write(folder, {name: SETTINGS[name]}, *rows_of_run(1.0))
    found = READERS[name](folder)
    assert_same(found, wanted(folder))
    assert found["loss"] == [(step, 1.0 + step) for step in range(6)]
    assert found["eval/student/greedy/success"] == [(0, 0.0), (4, pytest.approx(0.2))]
    assert not {"phase", "reward/histogram", "entropy/threshold"} & found.keys()


DIES = """
import json, os, signal, sys, time
from pathlib import Path
from reopold_agent.tracking.metrics import MetricsWriter
from reopold_agent.tracking.trackers import follow_run
folder, settings, rows = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
with follow_run(settings, folder, {"seed": 0}):
    metrics = MetricsWriter(folder / "metrics.jsonl")
    for row in rows:
        metrics.write(row)
    state = folder / "trackers.json"
    until = time.monotonic() + 60
    (name,) = settings
    while not state.exists() or json.loads(state.read_text())[name]["rows"] < len(rows):
        assert time.monotonic() < until
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@tracker
@pytest.mark.parametrize("unrecorded", [0, 1])
def test_killed_and_resumed_each_step_is_there_once(
    name: str, unrecorded: int, folder: Path
) -> None:
    """``unrecorded``: the kill fell between the tracker's taking a row and our noting it."""
    settings = {name: SETTINGS[name]}
    done = subprocess.run(
        [sys.executable, "-c", DIES, str(folder), *map(json.dumps, (settings, rows_of_run(1.0)))],
        env={k: v for k, v in environment().items() if k != "WANDB_SERVICE"},  # one of its own
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    state = json.loads((folder / "trackers.json").read_text())
    assert state[name]["rows"] == 10
    state[name]["rows"] -= unrecorded
    (folder / "trackers.json").write_text(json.dumps(state))
    # The run goes on from the checkpoint after 3 steps and makes other values this time.
    with follow_run(settings, folder, {"seed": 0}):
        metrics = MetricsWriter(folder / "metrics.jsonl")
        assert metrics.truncate_after(3) == 5
        for row in rows_of_run(50.0, first=3, last=9):
            metrics.write(row)
        metrics.close()
    found = READERS[name](folder)
    expected = wanted(folder)
    if name == "tensorboard":  # can be told to forget
        assert_same(found, expected)
        return
    for series, points in expected.items():
        assert [step for step, _ in found[series]] == [step for step, _ in points], series
    # The others keep what they held: MLflow all rows, wandb those that its process had written.
    values = dict(found["loss"])
    assert all(values[step] in (1.0 + step, 50.0 + step) for step in range(6))
    assert name != "mlflow" or values == {s: (1.0 if s < 6 else 50.0) + s for s in range(9)}


@tracker
def test_a_tracker_that_is_added_later_gets_all_rows(name: str, folder: Path) -> None:
    write(folder, {}, *rows_of_run(1.0))
    write(folder, {name: SETTINGS[name]}, *rows_of_run(1.0, first=6, last=8))
    assert_same(READERS[name](folder), wanted(folder))


@tracker
def test_an_evaluation_that_is_made_again_counts_with_its_last_figures(
    name: str, folder: Path
) -> None:
    for accuracy in (0.25, 0.75):
        send_results({name: SETTINGS[name]}, folder, {"seed": 0}, {"demo/accuracy": accuracy})
    assert READERS[name](folder)["demo/accuracy"][-1] == (0, 0.75)


def test_mlflow_knows_the_settings_and_the_end(folder: Path) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    write(folder, {"mlflow": {"experiment": "mine"}}, *rows_of_run(1.0))
    client = tracking.MlflowClient(tracking_uri=(folder.parent / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("mine")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params == {"seed": "0", "model.path": "None"}
    assert run.info.status == "FINISHED"
    ends_with(KeyboardInterrupt(), {"mlflow": {}}, folder, train_row(6, 1.0))
    assert client.get_run(run.info.run_id).info.status == "KILLED"


def test_tensorboard_knows_the_settings(folder: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write(folder, {"tensorboard": {"folder": "elsewhere"}}, *rows_of_run(1.0))
    found = events.EventAccumulator("elsewhere")
    found.Reload()
    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"model.path" in content


# A run as a user starts it


@pytest.mark.slow
def test_training_killed_and_resumed_in_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    folder = tmp_path / "run"
    arguments = words(folder, "steps=6", "checkpoint.every=2", "tracking=tensorboard")
    process = start(arguments, tmp_path)
    wait_until(lambda: len(train_rows(folder)) >= 5, process)
    process.kill()
    process.communicate()
    done = command(arguments, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert [row["step"] for row in train_rows(folder)] == list(range(6))
    assert_same(read_tensorboard(folder), wanted(folder))


def test_a_resumed_run_may_change_its_trackers(folder: Path) -> None:
    train(folder, "evaluation.tasks=1", "steps=1")
    pytest.importorskip("tensorboard")
    summary = train(folder, "evaluation.tasks=1", "steps=1", "tracking=tensorboard")
    assert summary["steps"] == 1
    assert_same(read_tensorboard(folder), wanted(folder))  # of a run that was complete


# Trackers that fail


@dataclass
class Scripted:
    """Does to each call what a test says; what it took is in ``taken``."""

    note: str = ""
    taken: ClassVar[list[int]] = []
    ends: ClassVar[list[str]] = []
    trouble: ClassVar[Callable[[str], None]] = staticmethod(lambda call: None)
    _calls: int = field(default=0, init=False)

    def start(self, run: TrackedRun) -> Started:
        type(self).trouble("start")
        return Started("mine", run.sent)

    def log(self, point: Point, sent: int) -> None:
        type(self).trouble("log")
        self.taken.append(sent)

    def finish(self, status: str) -> None:
        type(self).trouble("finish")
        self.ends.append(status)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[Scripted]:
    monkeypatch.setitem(TRACKERS._things, "scripted", Scripted)
    monkeypatch.setattr(Scripted, "taken", [])
    monkeypatch.setattr(Scripted, "ends", [])
    monkeypatch.setattr(feed, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(feed, "RETRY_SECONDS", (0.01, 0.01, 0.01))
    return Scripted


def fails(monkeypatch: pytest.MonkeyPatch, trouble: Callable[[str], None]) -> None:
    monkeypatch.setattr(Scripted, "trouble", staticmethod(trouble))


def test_a_run_that_replaces_another_begins_anew(
    scripted: type[Scripted], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[str | None, int]] = []
    start = Scripted.start

    def noted(self: Scripted, run: TrackedRun) -> Started:
        begun.append((run.id, run.kept))
        return start(self, run)

    monkeypatch.setattr(Scripted, "start", noted)
    write(folder, {"scripted": {}}, *rows_of_run(1.0))
    for replaces in (False, True):
        with follow_run({"scripted": {}}, folder, {"seed": 1}) as trackers:
            if replaces:
                trackers.begin_anew()
            metrics = MetricsWriter(folder / "metrics.jsonl")
            metrics.truncate_after(-1)
            for row in rows_of_run(1.0):
                metrics.write(row)
            metrics.close()
    assert begun == [(None, 0), ("mine", 10), (None, 0)]
    assert scripted.taken == [*range(1, 11)] * 2


def test_a_call_that_fails_is_made_again(
    scripted: type[Scripted],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[str] = []

    def trouble(call: str) -> None:
        seen.append(call)
        if call != "finish" and seen.count(call) % 2:
            raise OSError("the network is away")

    fails(monkeypatch, trouble)
    write(folder, {"scripted": {}}, *rows_of_run(1.0))
    assert scripted.taken == list(range(1, 11))
    assert scripted.ends == ["finished"]
    assert capsys.readouterr().err == ""
    assert json.loads((folder / "trackers.json").read_text()) == {
        "scripted": {"id": "mine", "rows": 10}
    }


@pytest.mark.parametrize("error", [RuntimeError("no route"), SystemExit(3)])
def test_a_tracker_that_always_fails_is_dropped_and_reported_at_the_end(
    error: BaseException,
    scripted: type[Scripted],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls: list[str] = []

    def trouble(call: str) -> None:
        calls.append(call)
        if call == "log":
            raise error

    fails(monkeypatch, trouble)
    with caplog.at_level(logging.ERROR), follow_run({"scripted": {}}, folder, {}):
        metrics = MetricsWriter(folder / "metrics.jsonl")
        metrics.write(train_row(0, 1.0))
        until = time.monotonic() + 30
        while calls.count("log") < 4 and time.monotonic() < until:
            time.sleep(0.01)
        metrics.write(train_row(1, 1.0))
        time.sleep(0.2)
        assert calls.count("log") == 4  # given up: not once more while the run goes on
    assert calls.count("log") == 5  # and the last time at its end
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2, messages  # at the first failure, and when it is given up
    assert "training continues" in messages[0]
    error_line, advice = capsys.readouterr().err.strip().splitlines()
    assert error_line.startswith("warning: tracking=scripted: 2 of 2 rows were not sent; 5 calls")
    assert "same command" in advice
    # The same command, when the tracker is well again.
    fails(monkeypatch, lambda call: None)
    with follow_run({"scripted": {}}, folder, {}):
        pass
    assert scripted.taken == [1, 2]


def test_a_tracker_that_hangs_delays_no_step_and_little_at_the_end(
    scripted: type[Scripted],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    let_go = threading.Event()
    monkeypatch.setattr(feed, "CLOSE_SECONDS", 0.2)
    fails(monkeypatch, lambda call: let_go.wait(60) and None)
    began = time.monotonic()
    write(folder, {"scripted": {}}, *rows_of_run(1.0))
    assert time.monotonic() - began < 30  # it hangs for 60
    let_go.set()
    assert "did not answer within 0.2 s" in capsys.readouterr().err
    assert len(read_metrics(folder)) == 10


def test_a_failing_tracker_does_not_affect_the_others(
    scripted: type[Scripted], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")

    def trouble(call: str) -> None:
        raise RuntimeError(call)

    fails(monkeypatch, trouble)
    write(folder, {"scripted": {}, "tensorboard": {}}, *rows_of_run(1.0))
    assert_same(read_tensorboard(folder), wanted(folder))


def test_keys_are_in_no_message(
    scripted: type[Scripted],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("STORE_CREDENTIALS", "hunter")  # of a tracker that is not known here

    def trouble(call: str) -> None:
        raise RuntimeError(
            "key 0123456789abcdef refused at https://me:secret@host/x?sig=hunter hunter"
        )

    fails(monkeypatch, trouble)
    with caplog.at_level(logging.DEBUG):
        write(folder, {"scripted": {}}, *rows_of_run(1.0))
    told = capsys.readouterr().err + caplog.text
    assert "[hidden] refused at https://[hidden]@host/x" in told
    assert "0123456789abcdef" not in told
    assert "secret" not in told
    assert "hunter" not in told


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "finished"), (KeyboardInterrupt(), "stopped"), (ConfigError("x"), "failed")],
)
def test_a_tracker_learns_how_the_run_ended(
    error: BaseException | None, status: str, scripted: type[Scripted], folder: Path
) -> None:
    if error is None:
        write(folder, {"scripted": {}}, train_row(0, 1.0))
    else:
        ends_with(error, {"scripted": {}}, folder, train_row(0, 1.0))
    assert scripted.taken == [1]
    assert scripted.ends == [status]


def test_a_refused_run_starts_no_tracker(scripted: type[Scripted], folder: Path) -> None:
    write(folder, {}, *rows_of_run(1.0))
    before = sorted(os.listdir(folder))
    ends_with(CheckpointError("other settings"), {"scripted": {}}, folder)
    assert scripted.taken == scripted.ends == []
    assert sorted(os.listdir(folder)) == before


# What a user gets wrong


def test_names_and_settings_are_checked_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'wandb'"):
        make_trackers({"wandbb": {}})
    with pytest.raises(ConfigError, match=r"Did you mean 'tracking.tensorboard.folder'"):
        make_trackers({"tensorboard": {"foldr": 1}})
    with pytest.raises(ConfigError, match="must be a group of settings"):
        make_trackers({"tensorboard": 3})
    with pytest.raises(ConfigError, match="online or offline, got 'on'"):
        make_trackers({"wandb": {"mode": "on"}})


@pytest.mark.parametrize(
    ("name", "package"),
    [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow-skinny")],
)
def test_a_missing_package_gives_the_command(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError) as caught:
        make_trackers({name: {"mode": "offline"} if name == "wandb" else {}})
    assert f"'{package}'" in str(caught.value)
    assert 'pip install -e ".[track]"' in str(caught.value)


def test_wandb_without_a_key_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"no API key\. Run: wandb login"):
        make_trackers({"wandb": {"mode": "online"}})


def test_a_damaged_state_is_reported(folder: Path, scripted: type[Scripted]) -> None:
    (folder / "trackers.json").write_text("{half")
    with pytest.raises(CheckpointError, match="Delete it"):
        follow_run({"scripted": {}}, folder, {})


def test_a_plugin_must_be_a_dataclass_with_three_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Deaf:
        def start(self, run: TrackedRun) -> Started:
            return Started(None, 0)

    class Plain:
        pass

    monkeypatch.setitem(TRACKERS._things, "deaf", Deaf)
    monkeypatch.setitem(TRACKERS._things, "plain", Plain)
    with pytest.raises(ConfigError, match="lacks one of start, log and finish"):
        make_trackers({"deaf": {}})
    with pytest.raises(ConfigError, match="is not a dataclass"):
        make_trackers({"plain": {}})


PLUGIN = """
from dataclasses import dataclass
from pathlib import Path
from reopold_agent.tracking.trackers import Point, Started, TrackedRun

@dataclass
class Notebook:
    path: str = "notes.txt"
    def start(self, run: TrackedRun) -> Started:
        return Started(None, run.sent)
    def log(self, point: Point, sent: int) -> None:
        with Path(self.path).open("a") as stream:
            print(point.step, *point.values, file=stream)
    def finish(self, status: str) -> None:
        with Path(self.path).open("a") as stream:
            print(status, file=stream)
"""


@pytest.mark.slow
def test_a_tracker_of_another_package_is_an_option(tmp_path: Path) -> None:
    (tmp_path / "notebook_plugin.py").write_text(PLUGIN)
    info = tmp_path / "notebook-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: notebook\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[reopold_agent.trackers]\nnotebook = notebook_plugin:Notebook\n"
    )
    env = {**environment(), "PYTHONPATH": str(tmp_path)}
    run = [sys.executable, "-m", "reopold_agent.train"]
    settings: dict[str, Any] = {"env": env, "cwd": tmp_path, "capture_output": True, "text": True}
    told = subprocess.run([*run, "--help"], timeout=120, check=True, **settings).stdout
    assert "mlflow, none, notebook, tensorboard, wandb" in told
    arguments = words(tmp_path / "run", "steps=1", "evaluation.tasks=1", "tracking=notebook")
    done = subprocess.run(
        [*arguments, "tracking.notebook.path=mine.txt"], timeout=300, check=False, **settings
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "mine.txt").read_text().splitlines()
    assert lines[-1] == "finished"
    assert len(lines) == len(read_metrics(tmp_path / "run")) + 1


def test_nested_settings_become_flat() -> None:
    flat = flat_settings({"a": {"b": None, "c": [1, 2]}, "d": 0.5, "e": True})
    assert flat == {"a.b": "None", "a.c": "[1, 2]", "d": 0.5, "e": True}
