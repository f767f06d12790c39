"""The embedded geometry: tasks with drawn figures."""
