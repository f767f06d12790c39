"""Plays a few episodes with a run's own models before any update, and checks what they show."""
