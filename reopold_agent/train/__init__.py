"""Trains a student: ``python -m reopold_agent.train``."""
