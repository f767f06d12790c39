"""Checks for what would stop a run; each reports what it found and what to do about it."""
