"""Implementations of the primitives in plain PyTorch, for any device.

The kernels for a primitive, if any, are in the file with the same name in _triton/.
"""
