"""The embedded mathematics: tasks of written arithmetic."""
