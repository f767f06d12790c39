"""Policies: models that generate turns and score trajectories."""
