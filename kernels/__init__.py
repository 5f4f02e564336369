"""Triton kernels of deqfast, one module an op; installed as deqfast.kernels.

Importing a module of it imports Triton; nothing in deqfast does so before a solve asks for these kernels.
"""
