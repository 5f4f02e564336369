"""A solve between two evaluations of f."""
