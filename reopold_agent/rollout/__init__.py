"""Plays episodes of a policy in environments and records them as `Trajectory` objects."""
