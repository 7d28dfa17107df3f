"""Benchmarks, as programs: `python benchmarks/run.py`, or `maskrcnn benchmark` where only the package is installed."""
