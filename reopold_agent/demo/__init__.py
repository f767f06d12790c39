"""The embedded default: tasks, a tiny student and teacher, and the recipe that makes them."""
