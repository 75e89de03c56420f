"""Benchmarks, run by hand: `python -m tests.benchmarks.NAME`. Nothing here is collected by pytest."""
