"""Checks whether a run may start, may continue, or is already complete in its folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from reopold_agent.common.files import write_json_atomic
from reopold_agent.common.weights import weights_digest
from reopold_agent.config import (
    COMMON_SETTINGS,
    CONSTANT,
    FILLED_SETTINGS,
    OUTCOME_DEFAULTS,
    OVER,
    TrainConfig,
    config_differences,
)
from reopold_agent.data.demonstrations import Demonstration
from reopold_agent.data.fingerprint import (
    demonstrations_digest,
    demonstrations_pictures_digest,
)
from reopold_agent.envs.from_config import MADE
from reopold_agent.errors import CheckpointError
from reopold_agent.policies.loading import ModelSpec, resolve_path
from reopold_agent.tracking.plots import make_plots
from reopold_agent.tracking.run_folder import RunFolder
from reopold_agent.tracking.summary import print_summary

_log = logging.getLogger(__name__)

FREE_TO_CHANGE = (
    *("resume", "checkpoint", "logging", "tracking", "tools", "on_nonfinite"),
    *(f"engine.{role}_server.stall_seconds" for role in ("student", "teacher")),
    # What is advised where memory was full: only the order of sums changes.
    *("engine.max_tokens_per_pass", "engine.max_tokens_per_micro_batch", "rollout.concurrency"),
    "model.student.gradient_checkpointing",
    *(
        f"policy.{role}.{key}"
        for role in ("student", "teacher")
        for key in ("seconds", "start_seconds", "connect_seconds", "timeout_seconds", "retries")
    ),
)
"""Sections and keys that do not change the results; a resumed run may change them."""


_OTHER_TASKS = (
    "warning: the environment makes other tasks than when this run was started; the figures before "
    "and after are of different tasks. Let load_tasks give the same tasks in each process, or give "
    "another hydra.run.dir to start anew."
)


def filled_in(settings: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an objective's settings with the saved values of those that are left to the run."""
    kept = set(COMMON_SETTINGS) - set(FILLED_SETTINGS)  # whose null means that there is none
    return {
        key: saved.get(key) if value is None and key not in kept else value
        for key, value in settings.items()
    }


class RunState:
    """The state of a run folder, before anything is loaded.

    Args:
        config: the checked configuration.
        raw: the same configuration as plain values.
        folder: the run folder.

    Attributes:
        replaces_run: whether `check` found the steps of a run with other settings, which go.
    """

    def __init__(self, config: TrainConfig, raw: Mapping[str, Any], folder: RunFolder) -> None:
        self._config, self._raw, self._folder = config, dict(raw), folder
        self._models: dict[str, Any] = {}
        self.replaces_run = False

    def check(self, newest: Path | None) -> dict[str, Any] | None:
        """Checks that the run may start, or continue from the checkpoint ``newest``.

        It may continue with the same settings, or with more steps.

        Returns:
            The configuration in the folder, if the run continues.

        Raises:
            CheckpointError: ``resume`` forbids it, or the folder's run has other settings.
        """
        resume, folder = self._config.resume, self._folder
        if resume == "never" and (newest is not None or folder.config.exists()):
            raise CheckpointError(
                f"{folder.path} already holds a run. Choose another hydra.run.dir, or "
                "resume=auto to continue it."
            )
        if newest is None and resume == "must":
            raise CheckpointError(f"resume=must, but {folder.path} holds no checkpoint")
        if newest is None and not (folder.config.is_file() and _has_steps(folder.metrics)):
            return None
        if not folder.config.is_file():
            raise CheckpointError(f"{folder.path} has checkpoints, but no config.yaml")
        try:
            saved = OmegaConf.to_container(OmegaConf.load(folder.config))
        except (OSError, ValueError, YAMLError) as error:
            raise CheckpointError(f"cannot read {folder.config}: {error}") from error
        if not isinstance(saved, dict):
            raise CheckpointError(f"{folder.config} is not a configuration")
        before = {str(key): value for key, value in saved.items()}
        # Runs of earlier versions did not have these settings.
        usual = {**dict.fromkeys(OVER, "batch"), **OUTCOME_DEFAULTS}
        before["objective"] = {**usual, **(before.get("objective") or {})}
        before["optimizer"] = {"lr_scheduler_type": CONSTANT, **(before.get("optimizer") or {})}
        now = dict(self._raw)
        now["objective"] = filled_in({**usual, **now["objective"]}, before["objective"])
        before["engine"] = {"ahead": 0, "compile": False, **(before.get("engine") or {})}
        for each in (before, now):
            each["model"] = dict(each.get("model") or {})
        folder.same_template(before["model"], now["model"], self._config.model.chat_template)
        now["steps"] = min(now["steps"], before.get("steps", now["steps"]))
        different = config_differences(before, now, FREE_TO_CHANGE)
        if different and newest is None:
            _log.warning(
                "warning: %s has no checkpoint; the steps there, of a run with other settings, are "
                "removed (saved -> now):\n  %s\nGive another hydra.run.dir to keep them.",
                folder.path,
                "\n  ".join(different),
            )
            self.replaces_run = True
        elif different:
            raise CheckpointError(
                f"{folder.path} was started with other settings (saved -> now):\n  "
                + "\n  ".join(different)
                + "\nGive the same settings to continue it (or more steps), or another "
                "hydra.run.dir to start anew."
            )
        return None if newest is None else before

    def check_models(self, continues: bool, specs: Mapping[str, ModelSpec]) -> None:
        """Checks that a continued run has the weights that it was started with; call it before they
        are loaded.

        Digests of those that its checkpoints do not hold, the teacher's above all, are in
        ``model.json`` (`record_models`). Runs of earlier versions have none and continue.

        Args:
            continues: whether the run continues from a checkpoint.
            specs: the run's checkpoints by role.

        Raises:
            CheckpointError: weights are others.
        """
        teacher = self._config.model.teacher
        saved = {"student"} if specs["student"].lora is None else set()
        if teacher is not None and teacher.follow is not None:
            saved.add("teacher")
        for role in specs.keys() - saved:
            weights = weights_digest(Path(resolve_path(specs[role].path)))
            self._models[role] = {"path": specs[role].path, "weights": weights}
        if not continues or not self._folder.model.is_file():
            return
        before = self._read(self._folder.model)
        for role, now in sorted(self._models.items()):
            had = before.get(role, now)
            if None not in (had["weights"], now["weights"]) and had["weights"] != now["weights"]:
                raise CheckpointError(
                    f"{self._folder.path} was started with other weights of the {role} in "
                    f"{now['path']}.\nPut those back to continue it, or give another hydra.run.dir "
                    "to start anew."
                )

    def record_models(self) -> None:
        """Writes what `check_models` found."""
        if self._models:
            write_json_atomic(self._folder.model, self._models)

    def check_data(
        self, continues: bool, recorded: Sequence[Demonstration] | None = None
    ) -> str | None:
        """Checks that a continued run has the rows that it was started with; call it once they are
        read.

        Their fingerprints are in ``data.json``. The embedded tasks have none: their settings
        determine them. Tasks that an environment makes may be others; that is only told, since they
        may be drawn anew on purpose.

        Args:
            continues: whether the run continues from a checkpoint.
            recorded: the demonstrations that are trained on, if any.

        Returns:
            What to tell the user: the run was started without fingerprints, or its environment
            makes other tasks now; else None.

        Raises:
            CheckpointError: the rows are others.
        """
        now = self._fingerprints(recorded)
        if not now:
            return None
        if continues and self._folder.data.is_file():
            before = self._read(self._folder.data)
            made = {name for name in {*before, *now} if name.rpartition("/")[2] == MADE}
            changed = [
                _change(name, before.get(name), now.get(name))
                for name in sorted({*before, *now} - made)
                if _differ(before.get(name), now.get(name))
            ]
            if changed:
                raise CheckpointError(
                    f"{self._folder.path} was started with other rows: {'; '.join(changed)}.\n"
                    "Give the same rows to continue it, or another hydra.run.dir to start anew."
                )
            write_json_atomic(self._folder.data, now)  # with what an earlier version left out
            others = any(before.get(name, now.get(name)) != now.get(name) for name in made)
            return _OTHER_TASKS if others else None
        write_json_atomic(self._folder.data, now)
        if not continues:
            return None
        return (
            "note: an earlier version started this run and did not record its rows; it continues "
            "with those that are there now"
        )

    def _fingerprints(self, recorded: Sequence[Demonstration] | None) -> dict[str, Any]:
        """Returns number and digest of rows: those of files as the report on them says."""
        report = self._folder.data_report
        found = self._read(report) if report.is_file() else {}
        now: dict[str, Any] = {
            key: {"sha256": told["sha256"]}
            for key, told in found.items()
            if key.rpartition("/")[2] == MADE and "sha256" in told
        }
        now |= {
            split: {
                "rows": told["usable"],
                **{key: told[key] for key in ("sha256", "pictures_sha256") if key in told},
            }
            for split, told in found.items()
            if split.rpartition("/")[2] in self._config.splits
        }
        if recorded is not None:
            now["demonstrations"] = {
                "rows": len(recorded),
                "sha256": demonstrations_digest(recorded),
                "pictures_sha256": demonstrations_pictures_digest(recorded),
            }
        return now

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"cannot read {path}: {error}\nRemove it and give the same command again."
            ) from error
        return found

    def show_again(self) -> dict[str, Any]:
        """Prints and returns the summary of a complete run; nothing is computed again."""
        try:
            summary: dict[str, Any] = json.loads(self._folder.summary.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"cannot read {self._folder.summary}: {error}\n"
                "Remove it and give the same command again: it is made anew from metrics.jsonl."
            ) from error
        make_plots(self._folder.path)  # the only files that come after the summary
        print_summary(summary)
        return summary


def _has_steps(metrics: Path) -> bool:
    """Whether a run without a checkpoint has got as far as its first step."""
    if not metrics.is_file():
        return False
    with metrics.open("rb") as rows:
        return any(b'"kind": "train"' in row or b'"kind":"train"' in row for row in rows)


def _differ(before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> bool:
    """Whether rows differ; an earlier version did not record their pictures."""
    if before is None or now is None:
        return before is not now
    return {**now, **before} != now


def _change(name: str, before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> str:
    """Says how the rows of a split, or the demonstrations, have changed."""
    had, has = (0 if each is None else each["rows"] for each in (before, now))
    what = "demonstrations" if name == "demonstrations" else f"rows of data.{name}"
    if before is not None and now is not None and before["sha256"] == now["sha256"]:
        return f"{had} {what} with other pictures now"
    return f"{had} {what} then, {has} now" if had != has else f"{had} {what}, but others now"
