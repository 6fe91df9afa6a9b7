"""Triton kernels, one file a primitive. The only folder that imports triton."""
