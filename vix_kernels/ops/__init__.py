"""Attention functions, one per file, each with its equations and a plain PyTorch reference.

The other files contain rotary embeddings, attention weights and shared helpers.
"""
