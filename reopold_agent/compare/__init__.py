"""Comparison of evaluations: `python -m reopold_agent.compare`."""
