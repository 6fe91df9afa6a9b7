"""Integrations with other libraries, which keep a library's names, signatures and weights but run vix_kernels' attentions."""
