"""Playing an environment by hand: what `reopold_agent.play` is made of. Nothing here imports
PyTorch, unless tokens are to be counted."""
