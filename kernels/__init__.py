"""Triton kernels of deqfast, one module an op; installed as deqfast.kernels."""
