"""Sends a run's figures to TensorBoard, Weights & Biases, MLflow, or a tracker of a plugin.

``metrics.jsonl`` remains the record. `feed.Trackers` reads its rows and sends them, with one thread
per tracker, so that a slow or failing tracker delays nothing.
"""

from reopold_agent.tracking.trackers.base import (
    TRACKERS,
    Point,
    Started,
    TrackedRun,
    Tracker,
    flat_settings,
    make_trackers,
    point_of,
)
from reopold_agent.tracking.trackers.feed import Trackers, follow_run, send_results
from reopold_agent.tracking.trackers.mlflow import MLflow
from reopold_agent.tracking.trackers.tensorboard import TensorBoard
from reopold_agent.tracking.trackers.wandb import WeightsAndBiases

__all__ = [
    "TRACKERS",
    "MLflow",
    "Point",
    "Started",
    "TensorBoard",
    "TrackedRun",
    "Tracker",
    "Trackers",
    "WeightsAndBiases",
    "flat_settings",
    "follow_run",
    "make_trackers",
    "point_of",
    "send_results",
]
