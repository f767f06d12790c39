"""Serves a policy over HTTP: ``python -m reopold_agent.serve``."""
