"""Whole training steps with a real f, forward and backward, beside torchdeq's and JAX's."""
