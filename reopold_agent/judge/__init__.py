"""Measures rules and judges on labelled pairs: ``python -m reopold_agent.judge check``."""
