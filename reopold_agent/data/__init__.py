"""Loading tasks from the rows of data sets, and writing them back."""

from reopold_agent.data.export import write_verl
from reopold_agent.data.loading import load_tasks

__all__ = ["load_tasks", "write_verl"]
