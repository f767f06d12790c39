"""``reopold export``: writes a run's student for other programs."""
