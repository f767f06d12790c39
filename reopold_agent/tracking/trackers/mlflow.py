"""Sends metrics to MLflow: a folder, a database or a server."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reopold_agent.errors import ConfigError
from reopold_agent.tracking.trackers.base import (
    SENT,
    TRACKERS,
    Point,
    Started,
    TrackedRun,
    require,
)

_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_UNUSABLE = re.compile(r"[^\w\-. :/]")
"""Characters that MLflow refuses in names, such as those of a benchmark's categories."""

_MOST_PARAMETERS = 100
"""Most parameters of one request."""

_LONGEST_PARAMETER = 500
"""Most characters for servers older than MLflow 2.10; newer ones take 6,000."""


@TRACKERS.add("mlflow")
@dataclass
class MLflow:
    """Logs to an MLflow run, whose id is saved in ``RUN/trackers.json``.

    Rows that MLflow has are not sent again when a run resumes, since it cannot delete a row.

    Attributes:
        uri: a folder, ``sqlite:///FILE`` (needs the full ``mlflow``) or a server's address; null:
            ``MLFLOW_TRACKING_URI``, else the folder ``mlruns``.
        experiment: name of the experiment, created if it does not exist.
        name: name of the run; null: the end of the folder's path.

    Raises:
        MissingExtraError: mlflow-skinny is not installed.
        ConfigError: the package for a database is missing.
    """

    uri: str | None = None
    experiment: str = "reopold"
    name: str | None = None
    _client: Any = field(default=None, init=False, repr=False)
    _id: str = field(default="", init=False, repr=False)
    _where: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        require("mlflow-skinny", "mlflow", "mlflow")
        where = self.uri or os.environ.get("MLFLOW_TRACKING_URI") or "mlruns"
        if "://" not in where and where != "databricks":
            where = Path(where).absolute().as_uri()
        if where.startswith("file:"):
            # MLflow 3 must be told to use a folder, the only store of mlflow-skinny.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        elif where.split(":")[0] in ("sqlite", "mysql", "postgresql", "mssql"):
            try:
                require("mlflow", "sqlalchemy", "mlflow")
            except ImportError:
                raise ConfigError(
                    "tracking.mlflow.uri is a database, which mlflow-skinny cannot open. "
                    "Run: pip install mlflow, or give a folder or a server's address"
                ) from None
        self._where = where

    def start(self, run: TrackedRun) -> Started:
        """Resumes the run with this id, or opens a new one with the settings as parameters."""
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=self._where)
        if run.id is not None:
            self._id = run.id
            held = self._client.get_run(run.id).data.metrics.get(SENT)
            self._client.update_run(run.id, status="RUNNING")
            return Started(run.id, run.sent if held is None else int(held))
        found = self._client.get_experiment_by_name(self.experiment)
        experiment = (
            found.experiment_id
            if found is not None
            else self._client.create_experiment(self.experiment)
        )
        made = self._client.create_run(
            experiment, run_name=self.name or run.name, tags={"kind": run.kind}
        )
        self._id = made.info.run_id
        parameters = [
            Param(key, str(value)[:_LONGEST_PARAMETER]) for key, value in run.config.items()
        ]
        for first in range(0, len(parameters), _MOST_PARAMETERS):
            self._client.log_batch(self._id, params=parameters[first : first + _MOST_PARAMETERS])
        return Started(self._id, 0)

    def log(self, point: Point, sent: int) -> None:
        """Sends the row in one request."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = {
            **point.values,
            SENT: float(sent),
        }  # last, since a folder is written in this order
        metrics = [
            Metric(_UNUSABLE.sub("_", name), value, now, point.step)
            for name, value in values.items()
        ]
        self._client.log_batch(self._id, metrics=metrics)

    def finish(self, status: str) -> None:
        """Marks the run as ended."""
        self._client.set_terminated(self._id, status=_STATUS[status])
