"""Integrations with other libraries.

An integration keeps a library's names, signatures and weights, but computes attention with vix_kernels.
"""
