"""Runs a study's commands, several at a time; it can be stopped and continued at any time.

Every run is a process of its own, ``python -m reopold_agent.train``: it can be repeated by hand,
and a run that fails or is killed leaves the others alone.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from reopold_agent.common.files import write_json_atomic
from reopold_agent.common.processes import die_with_parent
from reopold_agent.common.terminal import duration
from reopold_agent.errors import CheckpointError, Terminated
from reopold_agent.study.grid import Probe, Run

TAIL = 12
"""Number of lines that are shown of a failed run's log."""


@dataclass
class Work:
    """One process of a study.

    Attributes:
        name: name for messages.
        command: returns the command line when the process starts.
        log: file for its output.
        done: whether its result exists.
        weight: duration relative to other work, to estimate the time left.
        after: work of which at least one must have succeeded before.
        alone: whether nothing may run beside it, since it measures time.
        then: called after it succeeded.
    """

    name: str
    command: Callable[[], list[str]]
    log: Path
    done: Callable[[], bool]
    weight: float = 1.0
    after: Sequence[Work] = ()
    alone: bool = False
    then: Callable[[], None] = lambda: None
    failed: bool = field(default=False, init=False)


def work_for(runs: Sequence[Run], out: Path) -> list[Work]:
    """Lists the training runs and the probes that follow them."""
    trained = {run: _train_work(run) for run in runs}
    works: list[Work] = []
    for run in runs:
        works.append(trained[run])
        if run.probed is not None:
            works.append(_probe_work(run, trained[run]))
    probe = runs[0].study.probe if runs else None
    if probe is None:
        return works
    works += [_model_work(trained, who, probe, out) for who in ("student", "teacher")]
    if not probe.latency:
        return works
    first = min(run.seed for run in runs)
    works += [
        _latency_work({run: trained[run]}, "final", probe, out)
        for run in runs
        if run.seed == first and run.probed is not None
    ]
    return [*works, _latency_work(trained, "teacher", probe, out)]


def run_all(
    works: Sequence[Work], jobs: int, say: Callable[[str], None], *, poll: float = 0.05
) -> dict[str, str]:
    """Runs the work that is not done, ``jobs`` processes at a time.

    Returns:
        Reasons by name of the work that failed; it does not stop the rest.

    Raises:
        KeyboardInterrupt: after Ctrl-C (or SIGTERM), once the children have saved and ended.
    """
    waiting = [work for work in works if not work.done()]
    skipped = len(works) - len(waiting)
    if skipped:
        say(f"{skipped} of {len(works)} are already done")
    failures: dict[str, str] = {}
    running: list[tuple[Work, subprocess.Popen[bytes], float]] = []
    total, finished, started = sum(work.weight for work in waiting), 0.0, time.monotonic()
    count = 0
    with _terminable():
        try:
            while waiting or running:
                _start_more(waiting, running, jobs, failures, say)
                for entry in [each for each in running if each[1].poll() is not None]:
                    running.remove(entry)
                    work, process, since = entry
                    count, finished = count + 1, finished + work.weight
                    seconds = time.monotonic() - since
                    left = (time.monotonic() - started) * (total - finished) / finished
                    note = f"{count + skipped}/{len(works)} {work.name}"
                    if process.returncode == 0 and work.done():
                        work.then()
                        say(f"{note}  {duration(seconds)}  {duration(left)} left")
                    else:
                        work.failed = True
                        failures[work.name] = _reason(process.returncode, work.log)
                        say(f"{note}  FAILED, {failures[work.name]}")
                time.sleep(poll)
        except KeyboardInterrupt:
            _stop([process for _, process, _ in running], say)
            raise
    return failures


def check_overrides(runs: Sequence[Run], out: Path) -> None:
    """Refuses to mix runs of two definitions, and saves the definition of these runs.

    Raises:
        CheckpointError: a setting has runs that were made with other overrides; names them.
    """
    path = out / "study.json"
    known: dict[str, list[str]] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    changed, others = [], False
    for run in runs:
        before, now = known.get(run.setting.label), _without_seed(run.overrides)
        if before is not None and before != now and _has_runs(run.folder.parent):
            removed, added = sorted({*before} - {*now}), sorted({*now} - {*before})
            line = f"{run.setting.label}: {' '.join(removed) or '-'} -> {' '.join(added) or '-'}"
            changed += [line] if line not in changed else []
        others = others or (before is not None and before != now)
        known[run.setting.label] = now
    if changed:
        raise CheckpointError(
            f"{out} has runs of other settings (then -> now):\n  "
            + "\n  ".join(changed)
            + f"\nChoose another folder with out=, or delete {out / 'runs'}/SETTING to run these "
            "settings again."
        )
    out.mkdir(parents=True, exist_ok=True)
    if others:  # figures of models before training may be of other models
        shutil.rmtree(out / "models", ignore_errors=True)
    write_json_atomic(path, known)


def finished(run: Run) -> bool:
    """Whether the training of a run has finished."""
    return (run.folder / "summary.json").is_file()


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Locks the study's folder; the kernel releases the lock however this process ends.

    Raises:
        CheckpointError: another process has the lock.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a+") as stream:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(f"another study command is working in {out}") from None
        yield


def _train_work(run: Run) -> Work:
    overrides = [*run.overrides, f"hydra.run.dir={run.folder}"]
    steps = next(
        (int(w.removeprefix("steps=")) for w in run.overrides if w.startswith("steps=")), 1
    )
    return Work(
        name=run.name,
        command=lambda: [sys.executable, "-m", "reopold_agent.train", *overrides],
        log=run.log,
        done=lambda: finished(run),
        weight=steps,
        then=lambda: _delete_optimizer_states(run.folder),
    )


def _probe(folder: Path, who: str, target: Path, probe: Probe, *more: str) -> list[str]:
    words = [str(folder), f"--who={who}", f"--out={target}", f"--tasks={probe.tasks}"]
    words += [f"--samples={probe.samples}", *more]
    return [sys.executable, "-m", "reopold_agent.study.probe", *words]


def _probe_work(run: Run, after: Work) -> Work:
    probe = run.probed
    assert probe is not None  # the caller asks for probed runs only
    return Work(
        name=f"{run.name}, {probe.samples} samples per task",
        command=lambda: _probe(run.folder, "run", run.probe, probe),
        log=run.log.with_suffix(".probe.log"),
        done=lambda: _matches(run.probe, probe),
        weight=after.weight * 0.4,
        after=(after,),
    )


def _model_work(trained: Mapping[Run, Work], who: str, probe: Probe, out: Path) -> Work:
    """Probes a model before training from any finished run: it is the same in all of them."""
    target = out / "models" / f"{who}.json"
    return Work(
        name=f"{who} before training, {probe.samples} samples per task",
        command=lambda: _probe(_finished_folder(trained), who, target, probe),
        log=target.with_suffix(".log"),
        done=lambda: _matches(target, probe),
        weight=_weight(trained),
        after=tuple(trained.values()),
    )


def _latency_work(trained: Mapping[Run, Work], who: str, probe: Probe, out: Path) -> Work:
    name = who if who == "teacher" else next(iter(trained)).setting.label
    target = out / "models" / f"latency-{name}.json"
    more = (f"--latency={','.join(map(str, probe.latency))}", f"--questions={probe.questions}")
    return Work(
        name=f"latency of {name}",
        command=lambda: _probe(_finished_folder(trained), who, target, probe, *more),
        log=target.with_suffix(".log"),
        done=target.is_file,
        weight=_weight(trained),
        after=tuple(trained.values()),
        alone=True,
    )


def _finished_folder(trained: Mapping[Run, Work]) -> Path:
    return next(run.folder for run in trained if finished(run))


def _weight(trained: Mapping[Run, Work]) -> float:
    return 0.2 * min(work.weight for work in trained.values())


def _start_more(
    waiting: list[Work],
    running: list[tuple[Work, subprocess.Popen[bytes], float]],
    jobs: int,
    failures: dict[str, str],
    say: Callable[[str], None],
) -> None:
    for work in list(waiting):
        if len(running) >= jobs or any(other.alone for other, _, _ in running):
            return
        if work.after and all(other.failed for other in work.after):
            waiting.remove(work)
            work.failed = True
            failures[work.name] = f"{', '.join(other.name for other in work.after)} failed"
            continue
        if work.after and not any(other.done() for other in work.after):
            continue
        # Work that measures time comes last, so that the rest need not wait for it.
        if work.alone and (running or any(not other.alone for other in waiting)):
            continue
        waiting.remove(work)
        running.append((work, _spawn(work), time.monotonic()))


def _spawn(work: Work) -> subprocess.Popen[bytes]:
    work.log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with work.log.open("wb") as log:
        # A session of its own: the terminal's Ctrl-C reaches only this process, which forwards one,
        # so that children do not mistake a second one for "stop at once".
        return subprocess.Popen(
            work.command(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            # A run that outlived a killed study would keep its folder locked against the next
            # one. It may be killed: its checkpoints survive that.
            preexec_fn=die_with_parent,
        )


def _stop(processes: Sequence[subprocess.Popen[bytes]], say: Callable[[str], None]) -> None:
    """Lets the children save and exit; a second Ctrl-C kills them."""
    say(f"stopping {len(processes)} runs; press Ctrl-C again to stop at once")
    try:
        for process in processes:
            process.send_signal(signal.SIGINT)
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


@contextmanager
def _terminable() -> Iterator[None]:
    """Treats SIGTERM as a Ctrl-C, so that children are stopped."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _reason(status: int, log: Path) -> str:
    how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    text = log.read_text("utf-8", "replace") if log.is_file() else ""
    tail = [line for line in text.splitlines() if line.strip()][-TAIL:]
    return f"{how}; end of {log}:\n" + "\n".join(f"    {line}" for line in tail)


def _delete_optimizer_states(folder: Path) -> None:
    """Deletes the optimizer states of a finished run, two thirds of its size."""
    for state in folder.glob("checkpoints/step-*/state.pt"):
        state.unlink()


def _matches(path: Path, probe: Probe) -> bool:
    """Whether a probe with these numbers of tasks and samples is saved."""
    if not path.is_file():
        return False
    saved: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return (saved["tasks"], saved["samples"]) == (probe.tasks, probe.samples)


def _without_seed(overrides: Sequence[str]) -> list[str]:
    return [word for word in overrides if not word.startswith("seed=")]


def _has_runs(folder: Path) -> bool:
    return any(folder.glob("seed-*/config.yaml"))
