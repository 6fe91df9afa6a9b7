"""The primitives in plain PyTorch, for any device; one file each, with the names of those in _triton."""
