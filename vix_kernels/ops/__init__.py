"""Attention functions, one per file, each with its equations and a plain PyTorch reference.

The other files contain functions for rotary embeddings and attention weights, and shared helpers.
"""
