"""Gradients through a fixed point."""
