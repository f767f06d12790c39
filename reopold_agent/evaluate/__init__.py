"""Evaluation: benchmarks, answers, grading, metrics and reports."""
