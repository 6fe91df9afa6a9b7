"""The primitives in plain PyTorch, for any device. Files have the same names as in _triton."""
