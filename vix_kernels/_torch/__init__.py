"""Implementations of the primitives in plain PyTorch, for any device. The file names are the same as in _triton."""
