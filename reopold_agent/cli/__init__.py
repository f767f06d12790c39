"""The `reopold` command, and what all commands share: Hydra, error messages, completion."""
