"""Evaluation: benchmarks, playing them, scoring, reports."""
