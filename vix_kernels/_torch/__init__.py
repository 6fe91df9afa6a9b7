"""Implementations of the primitives in plain PyTorch.

dropout.py, feed_forward.py and packed_linear.py are for CPUs. All other implementations run on any device.

The kernels for a primitive, if any, are in the file with the same name in _triton/.
"""
