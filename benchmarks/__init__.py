"""Benchmarks: `python -m benchmarks NAME`, one module each; results go to benchmarks/results as JSON."""
