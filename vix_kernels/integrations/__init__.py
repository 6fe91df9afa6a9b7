"""Integrations from other libraries: their names, signatures and weights, this library's attention."""
