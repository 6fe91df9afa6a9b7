"""Triton kernels, one file per primitive. Only this folder and measure/ import triton."""
