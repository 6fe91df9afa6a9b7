"""Triton kernels for the primitives. Only this folder and measure/ import triton."""
