"""Who generates and who scores."""
