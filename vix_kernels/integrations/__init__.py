"""Integrations with other libraries: their names, signatures and weights with the attentions of vix_kernels."""
