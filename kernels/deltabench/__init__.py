"""Benchmarks of the operators and of a whole decode step; ``kernels/bench.py`` is the command. Not installed."""
