"""Benchmarks: `python -m benchmarks.gpu` does everything that needs a GPU, in one call."""
