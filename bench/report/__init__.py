"""docs/benchmarks.md out of results: `python -m bench.report`."""
