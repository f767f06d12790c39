"""The configurations of all commands, composed by Hydra."""
