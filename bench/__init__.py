"""Benchmarks of deqfast: speed of one solver step, and evaluations to tolerance on a suite of real problems."""
