"""Families of fixed-point problems, one file a field; `bench.problems` is the way in."""
