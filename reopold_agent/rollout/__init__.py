"""Episodes: environment x policy -> `Trajectory`."""
