"""Triton kernels for the operators in primitives/. Only this folder and measure/ import triton."""
