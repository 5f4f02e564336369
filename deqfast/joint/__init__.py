"""The joint solve: a fixed point and its input at once."""
