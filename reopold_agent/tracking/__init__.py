"""Output of a run: metrics, trajectories, progress, plots, summary.

`reopold_agent.tracking.plots` is not imported here, so that matplotlib is only loaded for
drawing, and so that ``python -m reopold_agent.tracking.plots RUN`` works.
"""

from reopold_agent.common.files import to_json, write_json_atomic, write_text_atomic
from reopold_agent.tracking.metrics import JsonLines, MetricsWriter, read_json_lines, read_metrics
from reopold_agent.tracking.progress import Progress
from reopold_agent.tracking.run_folder import RunFolder
from reopold_agent.tracking.statistics import (
    distillation_statistics,
    evaluation_statistics,
    rollout_statistics,
)
from reopold_agent.tracking.summary import print_summary
from reopold_agent.tracking.trajectories import save_pictures, trajectory_record

__all__ = [
    "JsonLines",
    "MetricsWriter",
    "Progress",
    "RunFolder",
    "distillation_statistics",
    "evaluation_statistics",
    "print_summary",
    "read_json_lines",
    "read_metrics",
    "rollout_statistics",
    "save_pictures",
    "to_json",
    "trajectory_record",
    "write_json_atomic",
    "write_text_atomic",
]
