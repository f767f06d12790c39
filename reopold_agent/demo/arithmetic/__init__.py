"""The embedded mathematics: written arithmetic, and small text models that know it."""
