"""Hostile files: every reader against thousands of spoilt ones. The command is `python -m benchmarks.fuzz`."""
