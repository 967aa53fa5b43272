"""Benchmarks, grouped by what they measure; each is a command: `python -m benchmarks.GROUP.NAME`.

Results are written to `benchmarks/results/`.
"""
