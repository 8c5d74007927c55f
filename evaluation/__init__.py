"""Evaluation: pictures of the plate world drawn by other code, scoring, and adapters for benchmark suites."""
