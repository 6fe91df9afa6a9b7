"""Integrations with other libraries. They keep a library's names, signatures and weights but run vix_kernels' attentions."""
